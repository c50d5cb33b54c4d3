"""A batch under attack: the clean one, and points in its place."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from msa_eval.attacks.ball import per_image
from msa_eval.defense.contexts import Companions
from msa_eval.device import asynchronous


@dataclass(frozen=True)
class Batch:
    """A clean batch and the target's answer to it.

    Attributes:
        number: its place in the plan.
        x: images ``(B, C, H, W)`` in [0, 1].
        y: labels ``(B,)``.
        z: features ``(B, ...)``.
        logits: of the hard target ``(B, k)``.
    """

    number: int
    x: Tensor
    y: Tensor
    z: Tensor
    logits: Tensor

    @cached_property
    def correct(self) -> Tensor:
        """Which samples the target gets right ``(B,)``."""
        return self.logits.argmax(dim=1) == self.y


@dataclass(frozen=True)
class CompanionPool:
    """Clean images that an attacker chooses each image's companions from.

    Attributes:
        companions: their features, and who sits where at first.
        identity: of each image of the pool ``(P,)``.
        classes: what the target takes each for ``(P,)``.
        own: of the batch's images ``(B,)``.
    """

    companions: Companions
    identity: Tensor
    classes: Tensor
    own: Tensor


@dataclass(frozen=True)
class AdversarialBatch:
    """A batch of points and their features.

    Attributes:
        x: points ``(B, C, H, W)``.
        z: features ``(B, ...)``.
        rounded: the rows ``(B,)`` whose features only serve to search: no verdict rests on them. ``None``: no row's.
    """

    x: Tensor
    z: Tensor
    rounded: Tensor | None = None

    def images(self, rows: Tensor) -> Tensor:
        """The points in some places ``(n,)``: ``(n, C, H, W)``."""
        return self.x.index_select(0, rows)

    def with_rows(self, mask: Tensor, other: AdversarialBatch) -> AdversarialBatch:
        """The same batch with some rows (a mask ``(B,)``) taken from another."""
        if not asynchronous(mask):  # by place is cheaper, where places can be known without waiting
            whole = bool(mask.all())
            return other if whole else AdversarialBatch(self.x.clone(), self.z.clone(), self.rounded).take(mask, other)
        x = torch.where(per_image(mask, self.x), other.x, self.x)
        z = torch.where(per_image(mask, self.z), other.z, self.z)
        return AdversarialBatch(x, z, self._rounded_with(mask, other.rounded))

    def take(self, mask: Tensor, other: AdversarialBatch | PartialBatch) -> AdversarialBatch:
        """The same, in the place of this one, which is written over: its tensors must be nobody else's."""
        rows = mask.nonzero().flatten()
        self.x.index_copy_(0, rows, other.images(rows))
        self.z.index_copy_(0, rows, other.z.index_select(0, rows))
        return AdversarialBatch(self.x, self.z, self._rounded_with(mask, other.rounded))

    def placing(self, rows: Tensor, x: Tensor, z: Tensor, *, rounded: bool) -> PartialBatch:
        """The same batch with new points ``(n, C, H, W)`` and features ``(n, ...)`` in some places ``(n,)``."""
        marked = self.rounded
        if rounded or marked is not None:
            marked = self.marked().index_fill(0, rows, rounded)
        return PartialBatch(self.x, rows, x, self.z.index_copy(0, rows, z), marked)

    def marked(self) -> Tensor:
        """The rows with rounded features ``(B,)``."""
        if self.rounded is None:
            return torch.zeros(len(self.x), dtype=torch.bool, device=self.x.device)
        return self.rounded

    def _rounded_with(self, mask: Tensor, other: Tensor | None) -> Tensor | None:
        if self.rounded is None:
            return None if other is None else mask & other
        return self.rounded & ~mask if other is None else torch.where(mask, other, self.rounded)


@dataclass(frozen=True)
class PartialBatch:
    """A batch with new points in some places: an `AdversarialBatch`, put together where it is asked for as a whole.

    Attributes:
        base: the points in the other places ``(B, C, H, W)``.
        places: of the new ones ``(n,)``.
        new: these ``(n, C, H, W)``.
        z: features of the whole ``(B, ...)``.
        rounded: as in `AdversarialBatch`.
    """

    base: Tensor
    places: Tensor
    new: Tensor
    z: Tensor
    rounded: Tensor | None

    @property
    def x(self) -> Tensor:
        """All points ``(B, C, H, W)``."""
        return self.base.index_copy(0, self.places, self.new)

    def images(self, rows: Tensor) -> Tensor:
        """The points in some places ``(n,)``: ``(n, C, H, W)``."""
        at = self._at.index_select(0, rows)
        hit = (at >= 0).nonzero().flatten()
        new = self.new.index_select(0, at.index_select(0, hit))
        return new if len(hit) == len(rows) else self.base.index_select(0, rows).index_copy_(0, hit, new)

    @cached_property
    def _at(self) -> Tensor:
        """Of each place, which of the new ones it has, or -1."""
        nobody = torch.full((len(self.base),), -1, device=self.places.device)
        return nobody.index_copy_(0, self.places, torch.arange(len(self.places), device=self.places.device))


POOL_BYTES = 2**31
"""Of a batch's points, images up to this size are kept."""


def capacity(x: Tensor) -> int:
    """How many points of a batch ``(B, C, H, W)`` there is room for, at least two.

    >>> capacity(torch.zeros(64, 3, 224, 224))
    55
    """
    return max(POOL_BYTES // max(x.nbytes, 1), 2)


def lowest_of_each(values: Tensor, places: Tensor, count: int) -> Tensor:
    """Where each place has its lowest value ``(count,)``, the first of equal ones; their number where it has none.

    >>> lowest_of_each(torch.tensor([3.0, 1.0, 2.0, 2.0]), torch.tensor([0, 2, 0, 0]), 3)
    tensor([2, 4, 1])
    """
    lowest = values.new_full((count,), torch.inf).scatter_reduce(0, places, values, "amin")
    order = torch.arange(len(values), device=values.device)
    order = torch.where(values <= lowest[places], order, len(values))
    return order.new_full((count,), len(values)).scatter_reduce(0, places, order, "amin")
