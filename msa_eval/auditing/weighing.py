"""What signs weigh beside each other: which give way where another explains them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from msa_eval.auditing.sign import Sign

OF_ATTACKS = frozenset(
    {"zero_gradients", "own_gradient_zero", "gradient_free_beats_white_box", "transfer_beats_direct", "large_eps",
     "one_step", "loss_not_rising", "surrogate_disagrees", "gradient_truth"}
)  # fmt: skip
"""The signs that show how attacks fared, and give advice about them."""


def without_advice(signs: Iterable[Sign]) -> list[Sign]:
    """All signs, but of a model at chance those alone that say something of it: attacks have nothing to break there.

    >>> chance = Sign("clean_at_chance", True, "suspect", 0.0, 0.1, "It guesses.")
    >>> steps = Sign("loss_not_rising", True, "suspect", 0.0, 0.5, "Raise steps.")
    >>> [sign.name for sign in without_advice([chance, steps])]
    ['clean_at_chance']
    """
    found = list(signs)
    if not any(sign.name == "clean_at_chance" and sign.fired for sign in found):
        return found
    return [sign for sign in found if sign.name not in OF_ATTACKS]


def weighed(signs: Iterable[Sign], *, left: int | None = None) -> list[Sign]:
    """All signs; those that say nothing against a figure become notes.

    Where no sample is left there is nothing that attacks missed. Where the best gradient is true enough, that another
    one leads astray costs nothing.

    Args:
        signs: of one target.
        left: samples that no attack broke, in all contexts; ``None`` where that is not known.

    >>> astray = Sign("transfer_beats_direct", True, "suspect", 1.0, 0.1, "Another breaks more.")
    >>> truth = Sign("gradient_truth", False, "suspect", 0.9, 0.75, "It is true.")
    >>> [[sign.severity for sign in weighed(signs)] for signs in ([astray], [astray, truth])]
    [['suspect'], ['note', 'suspect']]
    """
    found = list(signs)
    true = any(sign.name == "gradient_truth" and not sign.fired for sign in found)
    settled = OF_ATTACKS if left == 0 else {"transfer_beats_direct"} if true else set()
    return [replace(sign, severity="note") if sign.fired and sign.name in settled else sign for sign in found]
