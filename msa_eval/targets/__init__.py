"""Targets by name: all that can be evaluated, audited, verified or fine-tuned, with the same words everywhere."""

from msa_eval.targets.loading import load_target
from msa_eval.targets.target import Target

__all__ = ["Target", "load_target"]
