"""Attacks: searches inside the perturbation ball that propose adversarial batches and never judge themselves."""

from msa_eval.attacks.apgd import apgd
from msa_eval.attacks.ball import Ball
from msa_eval.attacks.found import Found
from msa_eval.attacks.spsa import spsa
from msa_eval.attacks.square import Queries, square

__all__ = ["Ball", "Found", "Queries", "apgd", "spsa", "square"]
