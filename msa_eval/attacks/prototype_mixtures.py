"""Mixtures of points found so far, in closed form, for defences that decide by prototypes."""

from __future__ import annotations

from bisect import bisect_right

import torch
from torch import Tensor

from msa_eval.defense.exchange import Exchange, Known


class Mixtures:
    """One batch for each of some rows, put together from points, and improved against that row image by image.

    Args:
        exchange: the decision.
        table: what is known of the points ``(B, P, ...)``.
        chosen: which point each image is at, for each row ``(n, B)``.
        rows: the rows, in ascending order ``(n,)``.
        y: their labels ``(n,)``.
        toward: the class that each one's margin is over ``(n,)``.

    Attributes:
        chosen: as it is now.
        margin: what each row's label leads by there ``(n,)``; known once an image was tried.
    """

    def __init__(
        self, exchange: Exchange, table: Known, chosen: Tensor, rows: Tensor, y: Tensor, toward: Tensor
    ) -> None:
        self._exchange, self._table, self._rows = exchange, table, rows
        self._sorted: list[int] = rows.tolist()
        self._classes = torch.stack([y, toward], dim=1)
        self._anchor = exchange.anchor[self._classes]
        self.chosen = chosen.clone()
        images = torch.arange(chosen.shape[1], device=chosen.device)
        member = (table.assigned[images, chosen].unsqueeze(1) == self._classes.unsqueeze(2)).to(table.z)
        self._count, self._total = member.sum(dim=2), member @ table.moved[images, chosen]
        self.margin = torch.full_like(self._count[:, 0], torch.inf)

    def improve(self, place: int | None) -> None:
        """Give one place of each row's companions, or the row itself, the point that leaves its label the least margin.

        Args:
            place: among the images but the row's own, in their order; ``None`` for the row itself.
        """
        images = self._images(place)
        now = self.chosen.gather(1, images.unsqueeze(1))
        member, total, count = self._without(images, now.squeeze(1))
        margins = self._margins(place, images, total, count)
        lowest, which = margins.min(dim=1)
        before = margins.gather(1, now).squeeze(1)
        better = lowest < before
        taken = torch.where(better, which, now.squeeze(1))
        member = self._member(images, taken)
        self._count = count + member
        self._total = total + member.unsqueeze(2) * self._table.moved[images, taken].unsqueeze(1)
        self.chosen = self.chosen.scatter(1, images.unsqueeze(1), taken.unsqueeze(1))
        self.margin = torch.where(better, lowest, before)

    def _images(self, place: int | None) -> Tensor:
        """Which image is in a place of each row's companions ``(n,)``."""
        return self._rows if place is None else place + (self._rows <= place).to(self._rows)

    def _member(self, images: Tensor, points: Tensor) -> Tensor:
        """Whether points are assigned to either of the two classes ``(n, 2)``."""
        return (self._table.assigned[images, points].unsqueeze(1) == self._classes).to(self._table.z)

    def _without(self, images: Tensor, points: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Who is in the two classes of each row but for one image: sums ``(n, 2, d)`` and numbers ``(n, 2)``."""
        member = self._member(images, points)
        count = self._count - member
        total = self._total - member.unsqueeze(2) * self._table.moved[images, points].unsqueeze(1)
        # A class that is left empty must come out at zero, not at a rounding error over ε.
        return member, torch.where(count.unsqueeze(2) > 0, total, 0.0), count

    def _margins(self, place: int | None, images: Tensor, total: Tensor, count: Tensor) -> Tensor:
        """What each row's label leads by with an image at each of its points ``(n, P)``."""
        epsilon, compare = self._exchange.epsilon, self._exchange.compare
        share = 1 / (count + 1 + epsilon).unsqueeze(2)
        left = self._anchor + total / (count + epsilon).unsqueeze(2)  # the two prototypes, where it joins neither
        joined = self._anchor + total * share  # where it joins, but for its own part
        if place is None:
            zz, zl, zj, zu, ju = self._products_of_rows(left, joined)
        else:
            zz, zl, zj, zu, ju = self._products_of_companions(place, left, joined)
        ll, jj, uu = left.pow(2).sum(2, keepdim=True), joined.pow(2).sum(2, keepdim=True), self._table.squared[images]
        without = compare(zz, zl, ll)
        within = compare(zz, zj + share * zu, jj + 2 * share * ju + share**2 * uu.unsqueeze(1))
        joins = self._table.assigned[images].unsqueeze(1) == self._classes.unsqueeze(2)  # (n, 2, P)
        logits = torch.where(joins, within, without)
        return logits[:, 0] - logits[:, 1]

    def _products_of_companions(self, place: int, left: Tensor, joined: Tensor) -> tuple[Tensor, ...]:
        """Inner products, where the row stays and a companion moves: all rows but a few meet the same image there."""
        z = self._table.z[self._rows, self.chosen.gather(1, self._rows.unsqueeze(1)).squeeze(1)].unsqueeze(1)
        behind = bisect_right(self._sorted, place)
        sides = torch.cat([z, joined], dim=1)
        parts = [(sides[:behind], place + 1), (sides[behind:], place)]
        zu, ju = torch.cat([part @ self._table.moved[j].T for part, j in parts if len(part)]).split([1, 2], dim=1)
        return z.pow(2).sum(2, keepdim=True), left @ z.mT, joined @ z.mT, zu, ju

    def _products_of_rows(self, left: Tensor, joined: Tensor) -> tuple[Tensor, ...]:
        """Inner products, where the row itself moves."""
        z, moved = self._table.z[self._rows], self._table.moved[self._rows]
        zz, zu = z.pow(2).sum(2).unsqueeze(1), (z * moved).sum(2).unsqueeze(1)
        return zz, left @ z.mT, joined @ z.mT, zu, joined @ moved.mT
