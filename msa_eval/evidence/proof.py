"""A proof: an adversarial batch that breaks samples, and few of them that break all."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class Proof:
    """One verified adversarial batch, or several that differ in one row each.

    Attributes:
        target: ``defense`` or ``fc``.
        context: what the attacker controls.
        batch: its number in the plan; B is that batch's size.
        kind: ``batch`` is one batch, decided as it is. ``rows`` are n batches: each row of ``x`` takes the place of the
            image at its position in the clean batch, or is a batch of one (context ``alone``), or sits among its
            ``companions`` (``composed``). ``victims`` are n batches as well: row r of ``own`` takes the place of the
            image at its position in ``x``, whose other rows stay.
        positions: of the samples that are broken, different places in the batch ``(n,)``.
        x: images ``(B, C, H, W)``, or ``(n, C, H, W)`` where the kind is ``rows``.
        own: images ``(n, C, H, W)`` of ``victims``.
        companions: in ``composed``, indices into the data set ``(n, B - 1)``: who sits beside each row, in batch order
            without the row itself, which sits at its position.
        runs: where known, the run that found the batch, for each position.
    """

    target: str
    context: str
    batch: int
    kind: str
    positions: Tensor
    x: Tensor
    own: Tensor | None = None
    companions: Tensor | None = None
    runs: tuple[str, ...] = ()

    def only(self, keep: Tensor) -> Proof:
        """The proof of some of its positions, by a mask ``(n,)``."""
        return dataclasses.replace(
            self,
            positions=self.positions[keep],
            x=self.x[keep] if self.kind == "rows" else self.x,
            own=None if self.own is None else self.own[keep],
            companions=None if self.companions is None else self.companions[keep],
            runs=tuple(run for run, kept in zip(self.runs, keep.tolist(), strict=True) if kept) if self.runs else (),
        )


class Broken(NamedTuple):
    """A sample that a proof breaks, by its place in the plan."""

    target: str
    context: str
    batch: int
    position: int


def cover(candidates: Sequence[tuple[Tensor, T]]) -> list[tuple[Tensor, T]]:
    """Pick few batches that together break all that is broken (greedy set cover).

    Args:
        candidates: which samples a batch breaks, a mask ``(B,)``, and the batch.

    Returns:
        the picked ones, each with the samples that no earlier one breaks: masks that don't overlap.

    >>> masks = [torch.tensor(m, dtype=torch.bool) for m in ([1, 1, 0, 0], [0, 1, 1, 1], [0, 0, 1, 0])]
    >>> [name for mask, name in cover(list(zip(masks, "abc")))]
    ['b', 'a']
    """
    if not candidates:
        return []
    masks = torch.stack([mask for mask, _ in candidates]).bool()
    left = masks.any(dim=0)
    picked = []
    while bool(left.any()):
        best = int((masks & left).sum(dim=1).argmax())
        picked.append((masks[best] & left, candidates[best][1]))
        left = left & ~masks[best]
    return picked
