"""Surrogates: differentiable stand-ins for a defence's decision.

A surrogate is a function of a defence and its features, so that one trunk pass serves all of them and the hard
decision too. The registry holds the named ones; a function of a user's own is used directly.
"""

if __name__ != "msa_eval.surrogates":
    raise ImportError("import this package as msa_eval.surrogates, after 'pip install' or 'pip install -e .'")

from msa_eval.surrogates.builtin import FC_ORACLE, FROZEN_ASSIGNMENT, FROZEN_PROTOTYPES, SOFT_HYBRID, STE
from msa_eval.surrogates.ensemble import Ensemble, ensemble
from msa_eval.surrogates.registry import Surrogate, available, get, register, register_family

__all__ = [
    "FC_ORACLE",
    "FROZEN_ASSIGNMENT",
    "FROZEN_PROTOTYPES",
    "SOFT_HYBRID",
    "STE",
    "Ensemble",
    "Surrogate",
    "available",
    "ensemble",
    "get",
    "register",
    "register_family",
]
