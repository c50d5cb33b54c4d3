"""A batch under attack: the clean one, points in its place, and what a run did to it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from msa_eval.attacks.ball import per_image
from msa_eval.device import asynchronous
from msa_eval.peers.faults import Fault


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
class Point:
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

    def with_rows(self, mask: Tensor, other: Point) -> Point:
        """The same batch with some rows (a mask ``(B,)``) taken from another."""
        if not asynchronous(mask):  # by place is cheaper, where places can be known without waiting
            whole = bool(mask.all())
            return other if whole else Point(self.x.clone(), self.z.clone(), self.rounded).take(mask, other)
        x = torch.where(per_image(mask, self.x), other.x, self.x)
        z = torch.where(per_image(mask, self.z), other.z, self.z)
        return Point(x, z, self._rounded_with(mask, other.rounded))

    def take(self, mask: Tensor, other: Point | Placed) -> Point:
        """The same, in the place of this one, which is written over: its tensors must be nobody else's."""
        rows = mask.nonzero().flatten()
        self.x.index_copy_(0, rows, other.images(rows))
        self.z.index_copy_(0, rows, other.z.index_select(0, rows))
        return Point(self.x, self.z, self._rounded_with(mask, other.rounded))

    def placing(self, rows: Tensor, x: Tensor, z: Tensor, *, rounded: bool) -> Placed:
        """The same batch with new points ``(n, C, H, W)`` and features ``(n, ...)`` in some places ``(n,)``."""
        marked = self.rounded
        if rounded or marked is not None:
            marked = self.marked().index_fill(0, rows, rounded)
        return Placed(self.x, rows, x, self.z.index_copy(0, rows, z), marked)

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
class Placed:
    """A batch with new points in some places: a `Point` that is put together where it is asked for as a whole.

    Attributes:
        base: the points in the other places ``(B, C, H, W)``.
        places: of the new ones ``(n,)``.
        new: these ``(n, C, H, W)``.
        z: features of the whole ``(B, ...)``.
        rounded: as in `Point`.
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


@dataclass(frozen=True)
class Finding:
    """An adversarial batch that was judged, or several that differ in one row.

    Attributes:
        breaks: the samples it breaks, a mask ``(B,)``.
        x: the batch ``(B, C, H, W)``.
        own: where given, sample i is broken by the batch whose row i is ``own[i]`` ``(B, C, H, W)``.
    """

    breaks: Tensor
    x: Tensor
    own: Tensor | None = None


@dataclass(frozen=True)
class Trace:
    """What a run leaves to later ones and to the proofs: images, which are not kept for the tables.

    Attributes:
        final: the final points.
        best: each sample's own point of the lowest lead.
        best_lead: that lead ``(B,)``.
        company: who sat beside it ``(B, B - 1)``, where the attacker chooses.
        findings: adversarial batches that break samples not broken before, where these are kept.
        trail: the points of every iterate, where these are kept.
    """

    final: Point
    best: Point
    best_lead: Tensor
    company: Tensor | None
    findings: tuple[Finding, ...]
    trail: tuple[Point, ...]


@dataclass(frozen=True)
class Outcome:
    """What a run did to a batch; one entry a sample ``(B,)`` unless said otherwise.

    Attributes:
        surrogate_fooled: the attacked model is wrong on the final batch.
        final_broken: the hard target is wrong on the final batch.
        any_broken: it is wrong on some batch it was shown.
        first_iterate: the first of these, counted from 0; -1 where there is none.
        min_margin: the lowest logit lead of the label over all batches shown.
        perturbation: norm of the final perturbation.
        committed: right on the one shown batch that leaves the fewest right.
        forwards: images passed through the trunk (a number).
        backwards: images passed back through it (a number).
        decisions: rows decided by the hard target (a number).
        faults: of an attack of others, what it did and should not have.
    """

    surrogate_fooled: Tensor
    final_broken: Tensor
    any_broken: Tensor
    first_iterate: Tensor
    min_margin: Tensor
    perturbation: Tensor
    committed: Tensor
    forwards: int
    backwards: int
    decisions: int
    faults: tuple[Fault, ...] = ()

    @classmethod
    def failed(cls, batch: Batch) -> Outcome:
        """Of a run that came to no end: it broke nothing, and what it would have measured is NaN."""
        nothing, unknown = torch.zeros_like(batch.correct), torch.full_like(batch.y, torch.nan, dtype=torch.float32)
        first = torch.full_like(batch.y, -1)
        return cls(nothing, nothing, nothing, first, unknown, unknown, batch.correct, 0, 0, 0)

    def taking_back(self, taken: Tensor, correct: Tensor) -> Outcome:
        """The same run with some of its breaks taken back: these samples count as right on every batch it showed.

        Nothing else is changed, except that the attacker commits to the final batch where that now leaves fewer right.

        Args:
            taken: the samples ``(B,)``, right on the clean batch.
            correct: the samples that are right on it ``(B,)``.
        """
        final_broken, committed = self.final_broken & ~taken, self.committed | taken
        last = correct & ~final_broken
        return dataclasses.replace(
            self,
            final_broken=final_broken,
            any_broken=self.any_broken & ~taken,
            first_iterate=self.first_iterate.masked_fill(taken, -1),
            min_margin=torch.where(taken, self.min_margin.clamp(min=0), self.min_margin),
            committed=last if int(last.sum()) < int(committed.sum()) else committed,
        )
