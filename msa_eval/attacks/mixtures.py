"""Mixtures of the points found so far: for each sample, and each class it may be taken for, the batch that serves best.

Any mixture of points of one ball is an adversarial batch. Which mixture serves against a sample is found from cached
features, so it costs decisions and no passes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from msa_eval.attacks.attacked_batch import AttackedBatch
from msa_eval.attacks.batch import AdversarialBatch, capacity
from msa_eval.attacks.companions import best_offer, descend
from msa_eval.attacks.prototype_mixtures import Mixtures
from msa_eval.defense.contexts import Companions
from msa_eval.defense.exchange import Exchange
from msa_eval.device import has_float64

WIDTH = 48
"""So many points, drawn anew for each place, are tried for an image where a defence has no closed form for that."""

AIMS, KEPT = 9, 2
"""With a closed form, mixtures are made towards so many classes at first, and towards the nearest of these later."""


class MixtureSearch:
    """The points of a batch's images, and the mixtures of them.

    Attributes:
        points: each a whole batch.
        aims: the classes aimed at for each sample ``(B, A)``.
        chosen: which point each image of the batch is at in the mixture towards each of them ``(B, A, B)``.
        margin: what the sample's label still leads that class by there ``(B, A)``.
    """

    def __init__(self, attacked: AttackedBatch, points: list[AdversarialBatch], generator: torch.Generator) -> None:
        self.attacked, self.points, self.generator = attacked, points, generator
        self.y = attacked.batch.y
        self._capacity = capacity(attacked.batch.x)
        self._closed_form = hasattr(attacked.target, "logits_with")
        target: Any = attacked.target
        exact = hasattr(target, "exchange") and has_float64(points[0].z.device)
        self._exchange: Exchange | None = target.exchange() if exact else None
        self._known = [] if self._exchange is None else [self._exchange.know(point.z) for point in points]
        with torch.no_grad():
            logits = torch.stack([attacked.target.logits(point.z).float() for point in points])
        label = self.y.view(1, -1, 1).expand(len(points), -1, 1)
        margins = (logits.gather(2, label) - logits).scatter(2, label, torch.inf)
        lowest = margins.min(dim=0)
        self.margin, self.aims = lowest.values.topk(
            min(AIMS, logits.shape[2] - 1) if self._closed_form else 1, largest=False
        )
        self.chosen = lowest.indices.gather(1, self.aims).unsqueeze(2).repeat(1, 1, len(self.y))
        if callable(getattr(attacked.target, "fc_logits", None)):
            self._clear()

    def is_unbroken(self, row: int) -> bool:
        """Whether a sample is searched for, right and not yet broken."""
        return bool((self.attacked.counted & self.attacked.batch.correct & ~self.attacked.broken)[row])

    def unbroken(self) -> Tensor:
        """The samples of which that holds."""
        return (self.attacked.counted & self.attacked.batch.correct & ~self.attacked.broken).nonzero().flatten()

    def nearest_first(self) -> Tensor:
        """The samples that stand, the one with the lowest margin first."""
        rows = self.unbroken()
        return rows[self.margin[rows].amin(dim=1).argsort()]

    def narrow(self) -> None:
        """Keep the nearest of the classes aimed at."""
        self.margin, order = self.margin.topk(min(KEPT, self.margin.shape[1]), largest=False)
        self.aims = self.aims.gather(1, order)
        self.chosen = self.chosen.gather(1, order.unsqueeze(2).expand(-1, -1, self.chosen.shape[2]))

    def recombine(self) -> int:
        """Mix the points anew against each sample that stands, and pass what seems to break it; passes made."""
        rows = self.unbroken()
        if len(rows) and len(self.y) > 1:
            if self._exchange is not None:
                self._exchanged(rows, self._exchange)
            else:
                for aim in range(self.aims.shape[1]):
                    self._asked(rows, aim)
        passed = 0
        for row in self.unbroken().tolist():
            margin, nearest = self.margin[row].min(dim=0)
            if self.is_unbroken(row) and margin <= 0:
                self.attacked.judge(self.mixture(row, int(nearest)).x)
                passed += 1
        return passed

    def mixture(self, row: int, aim: int) -> AdversarialBatch:
        """The batch mixed against a sample, towards one of its classes."""
        at = list(enumerate(self.chosen[row, aim].tolist()))
        return AdversarialBatch(
            torch.stack([self.points[p].x[j] for j, p in at]), torch.stack([self.points[p].z[j] for j, p in at])
        )

    def add(self, point: AdversarialBatch) -> None:
        """Keep a point; where there is no more room, the oldest that serves in no mixture gives way."""
        self.points.append(point)
        if self._exchange is not None:
            self._known.append(self._exchange.know(point.z))
        used = torch.zeros(len(self.points), dtype=torch.bool)
        used[-1] = True
        used[self.chosen[self.unbroken()].flatten().cpu()] = True
        if len(self.points) > self._capacity and not bool(used.all()):
            oldest = int((~used).nonzero()[0])
            del self.points[oldest]
            del self._known[oldest : oldest + 1]
            self.chosen = self.chosen - (self.chosen > oldest).to(self.chosen)

    def _clear(self) -> None:
        """Start each mixture with companions that are assigned to neither the label nor the class aimed at, if any.

        A class that nobody is assigned to has another prototype than one with a few; no single exchange leads there.
        """
        target: Any = self.attacked.target
        with torch.no_grad():
            assigned = torch.stack([target.fc_logits(point.z).argmax(dim=1) for point in self.points])
        for aim in range(self.aims.shape[1]):
            classes = torch.stack([self.y, self.aims[:, aim]])  # (2, B)
            outside = (assigned.unsqueeze(0) != classes.view(2, -1, 1, 1)).all(dim=0)  # (B, P, B)
            chosen = self.chosen[:, aim]
            now = outside.gather(1, chosen.unsqueeze(1)).squeeze(1)
            moved = torch.where(now | ~outside.any(dim=1), chosen, outside.to(torch.uint8).argmax(dim=1))
            self.chosen[:, aim] = moved.diagonal_scatter(chosen.diagonal())

    def _exchanged(self, rows: Tensor, exchange: Exchange) -> None:
        """Do the same towards all classes at once, where the defence says how its margins come from products."""
        aims, size = self.aims.shape[1], len(self.y)
        table = exchange.table(self._known)
        each = rows.repeat_interleave(aims)
        mixtures = Mixtures(
            exchange, table, self.chosen[rows].view(-1, size), each, self.y[each], self.aims[rows].flatten()
        )  # fmt: skip
        places: list[int] = torch.randperm(size - 1, generator=self.generator).tolist()
        for place in [None, *places]:
            mixtures.improve(place)
        self.chosen[rows] = mixtures.chosen.view(-1, aims, size)
        self.margin[rows] = mixtures.margin.view(-1, aims).to(self.margin)

    def _asked(self, rows: Tensor, aim: int) -> None:
        """Give each row itself, and then each image of its batch in turn, the point that serves best against it."""
        size, n = len(self.y), len(rows)
        target, y, toward = self.attacked.target, self.y[rows], self.aims[rows, aim]
        pool = torch.cat([point.z for point in self.points])  # point p of image j lies at p * size + j
        images = torch.arange(size, device=rows.device)
        others = images.expand(n, -1)[images != rows.unsqueeze(1)].view(n, -1)
        chosen = self.chosen[rows, aim]
        companions = Companions(pool, chosen.gather(1, others) * size + others, rows)

        now = chosen.gather(1, rows.unsqueeze(1)) * size + rows.unsqueeze(1)
        offers = torch.cat([now, self._tried() * size + rows.unsqueeze(1)], dim=1)
        own, _ = best_offer(target, pool[now.squeeze(1)], y, companions, offers, place=None, toward=toward)

        def candidates(place: int, now: Companions) -> Tensor:
            return self._tried() * size + others[:, place : place + 1]

        places = torch.randperm(size - 1, generator=self.generator).tolist()
        companions, margin = descend(
            target, pool[own], y, companions, places=places, candidates=candidates, toward=toward
        )  # fmt: skip
        chosen = chosen.scatter(1, others, torch.div(companions.index, size, rounding_mode="floor"))
        chosen = chosen.scatter(1, rows.unsqueeze(1), torch.div(own, size, rounding_mode="floor").unsqueeze(1))
        self.chosen[rows, aim], self.margin[rows, aim] = chosen, margin

    def _tried(self) -> Tensor:
        """Numbers of the points to try ``(w,)``: all that there are, or a few."""
        many = len(self.points)
        if self._closed_form:
            return torch.arange(many, device=self.y.device)
        return torch.randperm(many, generator=self.generator)[:WIDTH].to(self.y.device)
