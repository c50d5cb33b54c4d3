"""Recombination and pursuit: every sample that stands gets a batch of its own, mixed from the points found so far.

Any mixture of points of one ball is an adversarial batch. Which mixture serves against a sample is found from cached
features, so it costs decisions and no passes. A pursuit goes on from there: a few steps that move the whole batch
against that one sample, whose points are mixed anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from msa_eval.protocols.composition import descend
from msa_eval.protocols.contexts import Company, decide_each
from msa_eval.protocols.trial import Point, Trial
from torch import Tensor

from msa_eval.attacks.losses import margin

WIDTH = 48
"""So many points, drawn anew for each place, are tried for an image."""

MOMENTUM = 0.75
FIRST_STEP, LAST_STEP = 0.4, 0.11
"""Lengths of a pursuit's steps, as shares of ε; they fall evenly."""


@dataclass(frozen=True)
class PursuitAttack:
    """Mixtures of the points found so far, and steps from them against one sample at a time.

    Attributes:
        points: what earlier runs found, each a whole batch.
        sweeps: how often each image of the batch is given another of its points, for each sample that stands.
        passes: of the whole batch, for steps; 0 for recombination alone.
        steps: in a row against one sample.
    """

    points: Sequence[Point]
    sweeps: int
    passes: int = 0
    steps: int = 8

    def __call__(self, trial: Trial, generator: torch.Generator) -> Tensor:
        """Return the starting points; every batch put together is in the trial's record."""
        mixer = _Mixer(trial, list(self.points), generator)
        rows = mixer.standing()
        for _ in range(self.sweeps):
            mixer.recombine(rows)
        for row in rows.tolist():
            mixer.confirm(row)
        left, turn = self.passes, 0
        while len(rows := mixer.standing()):
            for row in rows[mixer.lead[rows].argsort()].tolist():
                if left < self.steps + 2:
                    return trial.start.x
                if not mixer.stands(row):
                    continue
                mixer.pursue(row, turn, self.steps)
                left -= self.steps + 1
                if mixer.stands(row):
                    mixer.recombine(torch.tensor([row], device=rows.device))
                    left -= mixer.confirm(row)
            turn += 1
            if not self.passes:
                break
        return trial.start.x


class _Mixer:
    """The points of a batch's images, and for each sample the mixture that serves best against it.

    ``chosen`` ``(B, B)`` holds, for each sample, which point each image of the batch is at, and ``lead`` ``(B,)`` what
    the label still leads by in that mixture.
    """

    def __init__(self, trial: Trial, points: list[Point], generator: torch.Generator) -> None:
        self.trial, self.points, self.generator = trial, points, generator
        self.y = trial.batch.y
        with torch.no_grad():
            leads = torch.stack([-margin(trial.target.logits(point.z).float(), self.y) for point in points])
        lowest = leads.min(dim=0)
        self.lead = lowest.values
        self.chosen = lowest.indices.unsqueeze(1).repeat(1, len(self.y))

    def stands(self, row: int) -> bool:
        return bool((self.trial.counted & self.trial.batch.correct & ~self.trial.broken)[row])

    def standing(self) -> Tensor:
        return (self.trial.counted & self.trial.batch.correct & ~self.trial.broken).nonzero().flatten()

    def recombine(self, rows: Tensor) -> None:
        """Give each image of the batch, in turn, the point that serves best against each row."""
        size = len(self.y)
        if not len(rows) or size < 2:
            return
        pool = torch.cat([point.z for point in self.points])  # point p of image j lies at p * size + j
        images = torch.arange(size, device=rows.device)
        others = images.expand(len(rows), -1)[images != rows.unsqueeze(1)].view(len(rows), -1)
        company = Company(pool, self.chosen[rows].gather(1, others) * size + others, rows)
        own = self._own(rows, pool, company)

        def candidates(place: int, now: Company) -> Tensor:
            return self._drawn().to(rows.device) * size + others[:, place : place + 1]

        places = torch.randperm(size - 1, generator=self.generator).tolist()
        found, lead = descend(
            self.trial.target, pool[own], self.y[rows], company, places=places, candidates=candidates
        )  # fmt: skip
        self.chosen[rows] = torch.div(own, size, rounding_mode="floor").unsqueeze(1).expand(-1, size)
        self.chosen[rows] = self.chosen[rows].scatter(1, others, torch.div(found.index, size, rounding_mode="floor"))
        self.lead[rows] = lead

    def confirm(self, row: int) -> int:
        """Pass the batch in which a sample seems to be broken; how many passes that took."""
        if self.lead[row] > 0:
            return 0
        self.trial.judge(self.mixture(row))
        return 1

    def mixture(self, row: int) -> Tensor:
        """The batch ``(B, C, H, W)`` mixed against a sample."""
        return torch.stack([self.points[int(p)].x[j] for j, p in enumerate(self.chosen[row])])

    def pursue(self, row: int, turn: int, steps: int) -> None:
        """Move the whole batch from its mixture against one sample; its points join the others."""
        trial, ball = self.trial, self.trial.ball
        point, momentum = self.mixture(row), torch.zeros_like(trial.batch.x)
        for step in range(steps + 1):
            point = point.detach().requires_grad_(step < steps)
            with torch.set_grad_enabled(step < steps):
                logits = trial(point)
            self.points.append(trial.latest)
            if step == steps or not self.stands(row):
                break
            logits = logits[turn % len(logits)] if logits.ndim == 3 else logits
            (gradient,) = torch.autograd.grad(margin(logits, self.y)[row], point)
            momentum = MOMENTUM * momentum + ball.unit(gradient)
            length = ball.eps * (FIRST_STEP + (LAST_STEP - FIRST_STEP) * step / max(steps - 1, 1))
            point = ball.project(point.detach() + length * ball.ascent(momentum), trial.batch.x)

    def _own(self, rows: Tensor, pool: Tensor, company: Company) -> Tensor:
        """Each row's own point ``(n,)`` that its company serves best, as a place in the pool."""
        size = len(self.y)
        numbers = torch.cat(
            [self.chosen[rows, rows].unsqueeze(0), self._drawn().to(rows.device).unsqueeze(1).expand(-1, len(rows))]
        )
        options = numbers * size + rows
        times = len(options)
        everyone = Company(pool, company.index.repeat(times, 1), rows.repeat(times))
        with torch.no_grad():
            logits = decide_each(self.trial.target, pool[options.flatten()], everyone)
        leads = -margin(logits.float(), self.y[rows].repeat(times))
        best = leads.view(times, -1).argmin(dim=0)
        return options[best, torch.arange(len(rows), device=rows.device)]

    def _drawn(self) -> Tensor:
        """Numbers of the points to try, drawn without replacement."""
        many = len(self.points)
        return torch.randperm(many, generator=self.generator)[:WIDTH]
