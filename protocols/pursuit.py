"""Recombination and pursuit: every sample that stands gets a batch of its own, mixed from the points found so far.

Any mixture of points of one ball is an adversarial batch. Which mixture serves against a sample is found from cached
features, so it costs decisions and no passes. A pursuit goes on from there: a few steps that move the whole batch
against that one sample, whose points are mixed anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from msa_eval.protocols.composition import FIRST_STEP, LAST_STEP, MOMENTUM, best_offer, descend
from msa_eval.protocols.contexts import Company
from msa_eval.protocols.history import capacity
from msa_eval.protocols.trial import Point, Trial
from torch import Tensor

from msa_eval.attacks.losses import margin

WIDTH = 48
"""So many points, drawn anew for each place, are tried for an image where a defence has no closed form for that."""

STEPS = 10
"""Of a pursuit against one sample, from a mixture of the points found so far."""

STALLED = 0.9
"""A pursuit that leaves more than this share of the lead is followed by one from a random start."""


@dataclass(frozen=True)
class PursuitAttack:
    """Mixtures of the points found so far, and steps from them against one sample at a time.

    Attributes:
        points: what earlier runs found, each a whole batch.
        sweeps: how often, at first, each image of the batch is given another of its points, for each sample that
            stands.
        passes: of the whole batch, for steps; 0 for recombination alone.
    """

    points: Sequence[Point]
    sweeps: int
    passes: int = 0

    def __call__(self, trial: Trial, generator: torch.Generator) -> Tensor:
        """Return the starting points; every batch put together is in the trial's record."""
        mixer = _Mixer(trial, list(self.points), generator)
        left = self.passes - mixer.recombine(sweeps=self.sweeps)
        turn, needed = 0, (STEPS + 1) * trial.eot + 1
        while left >= needed and len(rows := mixer.standing()):
            nearest = rows[mixer.lead[rows].argsort()]
            for row in nearest[: -(-len(rows) // (1 + turn % 2))].tolist():  # every other turn, half of them
                if left >= needed and mixer.stands(row):
                    left -= mixer.pursue(row, turn)
            left -= mixer.recombine(sweeps=1)
            turn += 1
        return trial.start.x


class _Mixer:
    """The points of a batch's images, and for each sample the mixture that serves best against it.

    ``chosen`` ``(B, B)`` holds, for each sample, which point each image of the batch is at, ``lead`` ``(B,)`` what the
    label still leads by in that mixture, and ``before`` ``(B,)`` what it led by when it was last pursued from there.
    """

    def __init__(self, trial: Trial, points: list[Point], generator: torch.Generator) -> None:
        self.trial, self.points, self.generator = trial, points, generator
        self.y = trial.batch.y
        self._capacity = capacity(trial.batch.x)
        with torch.no_grad():
            leads = torch.stack([-margin(trial.target.logits(point.z).float(), self.y) for point in points])
        lowest = leads.min(dim=0)
        self.lead = lowest.values
        self.chosen = lowest.indices.unsqueeze(1).repeat(1, len(self.y))
        self.before = torch.full_like(self.lead, torch.inf)

    def stands(self, row: int) -> bool:
        return bool((self.trial.counted & self.trial.batch.correct & ~self.trial.broken)[row])

    def standing(self) -> Tensor:
        return (self.trial.counted & self.trial.batch.correct & ~self.trial.broken).nonzero().flatten()

    def recombine(self, *, sweeps: int) -> int:
        """Mix the points anew against each sample that stands, and pass what seems to break it; passes made."""
        for _ in range(sweeps):
            self._sweep(self.standing())
        passed = 0
        for row in self.standing().tolist():
            if self.stands(row) and self.lead[row] <= 0:
                self.trial.judge(self._mixture(row))
                passed += 1
        return passed

    def pursue(self, row: int, turn: int) -> int:
        """Move the whole batch against one sample; its points join the others; passes made.

        It starts from the mixture, or at random where the last pursuit from there gained little: mixtures around one
        start end in the same place again and again.
        """
        trial, ball = self.trial, self.trial.ball
        anew = bool(self.lead[row] > STALLED * self.before[row])
        self.before[row] = torch.inf if anew else self.lead[row]
        point = ball.random(trial.batch.x, self.generator) if anew else self._mixture(row)
        momentum = torch.zeros_like(trial.batch.x)
        for step in range(STEPS + 1):
            point = point.detach().requires_grad_(step < STEPS)
            with torch.set_grad_enabled(step < STEPS):
                answers = [trial(point) for _ in range(trial.eot)]
            self._add(trial.latest)
            if anew:
                self.chosen[row] = len(self.points) - 1
            if step == STEPS or not self.stands(row):
                return (step + 1) * trial.eot
            followed = [answer[turn % len(answer)] if answer.ndim == 3 else answer for answer in answers]
            rise = torch.stack([margin(logits, self.y)[row] for logits in followed]).sum()
            (gradient,) = torch.autograd.grad(rise, point)
            momentum = MOMENTUM * momentum + ball.unit(gradient)
            length = ball.eps * (FIRST_STEP + (LAST_STEP - FIRST_STEP) * step / (STEPS - 1))
            point = ball.project(point.detach() + length * ball.ascent(momentum), trial.batch.x)
        raise AssertionError("the last step returns")

    def _add(self, point: Point) -> None:
        """Keep a point; where there is no more room, the oldest that serves in no mixture gives way."""
        self.points.append(point)
        used = torch.zeros(len(self.points), dtype=torch.bool)
        used[-1] = True
        used[self.chosen[self.standing()].flatten().cpu()] = True
        if len(self.points) > self._capacity and not bool(used.all()):
            oldest = int((~used).nonzero()[0])
            del self.points[oldest]
            self.chosen = self.chosen - (self.chosen > oldest).to(self.chosen)

    def _mixture(self, row: int) -> Tensor:
        """The batch ``(B, C, H, W)`` mixed against a sample."""
        return torch.stack([self.points[int(p)].x[j] for j, p in enumerate(self.chosen[row])])

    def _sweep(self, rows: Tensor) -> None:
        """Give each row itself, and then each image of its batch in turn, the point that serves best against it."""
        size, n = len(self.y), len(rows)
        if not n or size < 2:
            return
        target = self.trial.target
        pool = torch.cat([point.z for point in self.points])  # point p of image j lies at p * size + j
        images = torch.arange(size, device=rows.device)
        others = images.expand(n, -1)[images != rows.unsqueeze(1)].view(n, -1)
        company = Company(pool, self.chosen[rows].gather(1, others) * size + others, rows)

        now = (self.chosen[rows, rows] * size + rows).unsqueeze(1)
        offers = torch.cat([now, self._tried() * size + rows.unsqueeze(1)], dim=1)
        own, _ = best_offer(target, pool[now.squeeze(1)], self.y[rows], company, offers, place=None)

        def candidates(place: int, now: Company) -> Tensor:
            return self._tried() * size + others[:, place : place + 1]

        places = torch.randperm(size - 1, generator=self.generator).tolist()
        company, lead = descend(target, pool[own], self.y[rows], company, places=places, candidates=candidates)
        chosen = self.chosen[rows].scatter(1, others, torch.div(company.index, size, rounding_mode="floor"))
        chosen[torch.arange(n, device=rows.device), rows] = torch.div(own, size, rounding_mode="floor")
        self.chosen[rows], self.lead[rows] = chosen, lead

    def _tried(self) -> Tensor:
        """Numbers of the points to try ``(w,)``: all that there are, or a few."""
        many = len(self.points)
        if hasattr(self.trial.target, "logits_with"):
            return torch.arange(many, device=self.y.device)
        return torch.randperm(many, generator=self.generator)[:WIDTH].to(self.y.device)
