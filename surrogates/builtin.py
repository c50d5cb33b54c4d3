"""The surrogates that come with the toolkit.

References:
    Sensitivity as a Double-Edged Sword (Wang, 2026), arXiv:2606.01746, section 3.7.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor

from msa_eval.surrogates.registry import Surrogate, register, register_family


def fc_oracle(defense: Any, z: Tensor) -> Tensor:
    """The FC logits alone (Surrogate 1): the surest way to change whom a dynamic defence assigns to which class."""
    logits: Tensor = defense.fc_logits(z)
    return logits


def soft_hybrid(defense: Any, z: Tensor) -> Tensor:
    """P_soft in place of P_ste, forward and backward (Surrogate 2)."""
    logits: Tensor = defense.logits(z, assignment="soft")
    return logits


def ste(defense: Any, z: Tensor) -> Tensor:
    """The defence's own forward with its own gradient (BPDA): the naive attacker, possible on every defence."""
    logits: Tensor = defense.logits(z)
    return logits


def frozen_assignment(defense: Any, z: Tensor) -> Tensor:
    """P_hard held constant: the exact gradient of the hard forward almost everywhere."""
    logits: Tensor = defense.logits(z, assignment="frozen")
    return logits


def frozen_prototypes(defense: Any, z: Tensor) -> Tensor:
    """C_hybrid held constant at its current value: only the distance to it is followed."""
    logits: Tensor = defense.logits(z, assignment="frozen", constant_prototypes=True)
    return logits


def soft_hybrid_at(temperature: float) -> Surrogate:
    """``soft-hybrid`` with a temperature: towards the hard assignment as it falls, towards a uniform one as it grows.

    Raises:
        ValueError: when the temperature is not a positive, finite number.
    """
    if not 0 < temperature < float("inf"):
        raise ValueError(f"expected a positive temperature, but got {temperature:g}")

    def logits(defense: Any, z: Tensor) -> Tensor:
        out: Tensor = defense.logits(z, assignment="soft", temperature=temperature)
        return out

    return Surrogate(f"soft-hybrid@{temperature:g}", logits, applies=_has_a_temperature)


def _has_fc_logits(defense: Any) -> bool:
    return callable(getattr(defense, "fc_logits", None))


def _assigns_softly(defense: Any) -> bool:
    """Whether there is an assignment to soften; on a plain head, which takes none, this is its own exact gradient.

    Protocols replace a run whose surrogate is missing by one through the first they have, which on a plain head would
    be the FC head's: then its own gradient would hardly be followed.
    """
    return "assignment" in inspect.signature(defense.logits).parameters


def _has_a_temperature(defense: Any) -> bool:
    return "temperature" in inspect.signature(defense.logits).parameters


def _freezes_prototypes(defense: Any) -> bool:
    return "constant_prototypes" in inspect.signature(defense.logits).parameters


def _is_not_its_own_fc(defense: Any) -> bool:
    """Whether ``ste`` differs from ``fc-oracle``: for a plain classifier both are the same attack."""
    fc_logits = getattr(defense, "fc_logits", None)
    return fc_logits is None or fc_logits != defense.logits


FC_ORACLE = register(Surrogate("fc-oracle", fc_oracle, applies=_has_fc_logits))
SOFT_HYBRID = register(Surrogate("soft-hybrid", soft_hybrid, applies=_assigns_softly))
FROZEN_ASSIGNMENT = register(Surrogate("frozen-assignment", frozen_assignment, applies=_assigns_softly))
FROZEN_PROTOTYPES = register(Surrogate("frozen-prototypes", frozen_prototypes, applies=_freezes_prototypes))
STE = register(Surrogate("ste", ste, applies=_is_not_its_own_fc))
register_family("soft-hybrid", soft_hybrid_at)
