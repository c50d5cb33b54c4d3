"""Attacks of other libraries, behind checks: pyautoattack, torchattacks and foolbox.

What they return is made sound by `msa_eval.attacks.external.sanitize` before anything is made of it.
"""

from msa_eval.attacks.external.adapter import LibraryAttack
from msa_eval.attacks.external.batch_model import BatchModel
from msa_eval.attacks.external.faults import ExternalAttackError, Fault, describe_faults
from msa_eval.attacks.external.libraries import LIBRARIES, find, installed, library_of
from msa_eval.attacks.external.sanitize import Found, run_guarded

__all__ = [
    "LIBRARIES",
    "BatchModel",
    "ExternalAttackError",
    "Fault",
    "Found",
    "LibraryAttack",
    "describe_faults",
    "find",
    "installed",
    "library_of",
    "run_guarded",
]  # fmt: skip
