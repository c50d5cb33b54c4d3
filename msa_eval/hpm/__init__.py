"""HPM, the reference defence, and its fine-tuning."""

from msa_eval.hpm.model import HPM, Variant

__all__ = ["HPM", "Variant"]
