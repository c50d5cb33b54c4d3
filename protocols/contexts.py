"""Contexts: what the attacker controls, as a view of the target.

In ``joint`` every image of the batch is the attacker's, and the target is what it is. In ``solo`` only image i is, and
its companions stay clean; in ``alone`` image i is a batch of one. For these the target is seen *one at a time*: a batch
of points becomes as many batches as it has rows, each with one adversarial row. Attacks, verdicts and surrogates are
the same in all three.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from msa_eval.defense import Defense


class OneAtATime:
    """A target whose row i is decided in a batch of its own.

    A defence with a closed form has ``logits_one_at_a_time(z, companions, **settings)``; any other is asked once a
    row. All else is the defence's own.

    Args:
        defense: the target.
        companions: clean features ``(B, ...)``, of which row i gives way to the adversarial one; ``None`` for batches
            of one.
    """

    def __init__(self, defense: Defense, companions: Tensor | None) -> None:
        self._defense = defense
        self._companions = companions

    def __getattr__(self, name: str) -> Any:
        return getattr(self._defense, name)

    def features(self, x: Tensor) -> Tensor:
        """The defence's features."""
        return self._defense.features(x)

    def logits(self, z: Tensor, **settings: Any) -> Tensor:
        """Logits ``(B, k)`` of features ``(B, ...)``, each row decided in a batch of its own."""
        closed_form = getattr(self._defense, "logits_one_at_a_time", None)
        if closed_form is not None:
            logits: Tensor = closed_form(z, self._companions, **settings)
            return logits
        return torch.stack([self._decide_row(z, i, settings) for i in range(len(z))])

    def _decide_row(self, z: Tensor, i: int, settings: dict[str, Any]) -> Tensor:
        if self._companions is None:
            return self._defense.logits(z[i : i + 1], **settings)[0]
        batch = torch.cat([self._companions[:i], z[i : i + 1], self._companions[i + 1 :]])
        return self._defense.logits(batch, **settings)[i]


def in_context(defense: Defense, context: str, z: Tensor, *, batch_dependent: bool) -> Defense:
    """A target as an attacker in a context meets it.

    Args:
        defense: the target.
        context: ``joint``, ``solo`` or ``alone``.
        z: its features of the clean batch ``(B, ...)``.
        batch_dependent: whether it looks at companions at all; if not, all contexts are one.
    """
    if context == "joint" or not batch_dependent:
        return defense
    return OneAtATime(defense, z if context == "solo" else None)
