"""More passes for the samples nearest to falling.

Overtime is for targets that decide each row apart. `OddsAttack` is for those that answer at random: a search looks at a
point with a few draws, so where the odds are near even it may pass by a break, and a gradient averaged over as few
draws is mostly noise.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from msa_eval.attacks.apgd import apgd
from msa_eval.attacks.attacked_batch import Attack, AttackedBatch
from msa_eval.attacks.gradient import ApgdAttack
from msa_eval.attacks.losses import (
    MIN_CLASSES,
    TARGETED,
    Loss,
    margin_loss,
    most_likely_others,
    probability_margin,
    side_by_side,
    targeted_dlr,
)
from msa_eval.defense.contexts import OneAtATime
from msa_eval.defense.contract import decide

NEAREST = 8
"""One in so many of the unbroken samples is searched for at a time: those whose label leads by least."""

NEAREST_OF_THESE = 4
"""Every other start is for one in so many of them alone."""

SIDE_BY_SIDE = 6
"""So many starts are climbed from at a time, where a row can have several points."""

TARGETS = 4
"""Towards so many classes in turn: by the ranking of earlier runs, else the likeliest at a sample's best point."""

UNTARGETED = (margin_loss, probability_margin)
"""What is raised after these."""

ASKS = 99
"""Answers from which odds are estimated: their standard error is 5 % near even odds."""

NEAR = 0.3
"""The share of wrong answers from which on a sample is searched for: below it, four standard errors from even."""

EOT = 16
"""Draws that a gradient is averaged over."""

ROUNDS = (("margin", True), ("probability-margin", True), ("margin", False))
"""What is raised, and whether from the best point; else from a random one."""


@dataclass(frozen=True)
class BorderlineAttack(Attack):
    """APGD from one random start after another, against the few samples that are nearest to falling.

    Which they are is looked up before the starts, by the lowest margin that the label ever had. Each loss is raised
    from two starts, of which the second is for the very nearest.

    Attributes:
        passes: a sample of the batch.
        steps: gradient steps from each start.
    """

    label = "overtime"
    from_history = True

    passes: int
    steps: int

    def __call__(self, attacked: AttackedBatch, generator: torch.Generator) -> Tensor:
        """Return the starting points; every point found is in the batch's record."""
        batch = attacked.batch
        with torch.no_grad():
            at_best = decide(attacked.target, attacked.start.z).float()
        before = -margin_loss(at_best, batch.y)
        self._climb_all(attacked, generator, at_best, before)
        return attacked.start.x

    def _climb_all(self, attacked: AttackedBatch, generator: torch.Generator, at_best: Tensor, before: Tensor) -> None:
        """Climb from as many starts as the passes allow, side by side where a row can have several points."""
        sought, together = attacked.counted, SIDE_BY_SIDE if attacked.has_copies else 1
        allowed, turn = self.passes * len(sought) + attacked.forwards, 0
        while bool((unbroken := sought & ~attacked.broken).any()):
            margin = torch.minimum(before, attacked.margin).masked_fill(~unbroken, torch.inf)
            ranked, count = margin.argsort(stable=True), int(unbroken.sum())
            starts: list[Tensor] = []
            left = allowed - attacked.forwards
            for number in range(turn, turn + together):
                share = NEAREST * (NEAREST_OF_THESE if number % 2 else 1)
                nearest = ranked[: -(-count // share)]
                left -= len(nearest) * (self.steps + 1) * attacked.eot
                if left < 0:
                    break
                starts.append(nearest)
            if not starts:
                break
            self._climb(attacked, generator, at_best, starts, turn)
            turn += len(starts)

    def _climb(
        self, attacked: AttackedBatch, generator: torch.Generator, at_best: Tensor, starts: list[Tensor], turn: int
    ) -> None:
        """Climb once from each start: some rows each ``(n,)``, with the loss of its number, the first's given."""
        batch, ball = attacked.batch, attacked.ball
        attacked.search_for(torch.zeros_like(attacked.counted).index_fill(0, torch.cat(starts), True))
        drawn = [ball.random(batch.x, generator) for _ in starts]
        if len(starts) == 1:
            ApgdAttack(partial(_loss, at_best, turn // 2), self.steps)(attacked, generator, points=drawn[0])
            return
        places = torch.cat(starts)
        losses = [_loss(at_best, (turn + i) // 2, attacked, rows) for i, rows in enumerate(starts)]
        apgd(
            attacked.of_rows(places), batch.x[places], batch.y[places],
            loss=side_by_side(losses, [len(rows) for rows in starts]), ball=ball, steps=self.steps,
            generator=generator, start=torch.cat([x[rows] for x, rows in zip(drawn, starts, strict=True)]),
            going=lambda: attacked.searching,
        )  # fmt: skip


def _loss(at_best: Tensor, number: int, attacked: AttackedBatch, rows: Tensor) -> Loss:
    """Targeted DLR towards one class after another, then the margin, and that of the probabilities."""
    logits, y = at_best[rows], attacked.batch.y[rows]
    classes = logits.shape[1]
    targets = min(TARGETS, classes - 1) if classes >= MIN_CLASSES[TARGETED] else 0
    place = number % (targets + len(UNTARGETED))
    if place >= targets:
        return UNTARGETED[place - targets]
    if attacked.ranking is not None:
        return targeted_dlr(attacked.ranking[rows, place])
    return targeted_dlr(most_likely_others(logits, y, place))


@dataclass(frozen=True)
class OddsAttack(Attack):
    """APGD over many draws, for the samples whose odds are near even.

    Attributes:
        steps: gradient steps in each round.
    """

    label = "odds"
    from_history = True

    steps: int

    def __call__(self, attacked: AttackedBatch, generator: torch.Generator) -> Tensor:
        """Return the points of the last round."""
        sought = attacked.counted & (wrong_share(attacked) >= NEAR)
        attacked.eot, points = EOT, attacked.start.x
        for loss, from_start in ROUNDS:
            if not bool((unbroken := sought & ~attacked.broken).any()):
                break
            attacked.search_for(unbroken)
            points = ApgdAttack(loss, self.steps, from_start=from_start)(attacked, generator)
        return points


def wrong_share(attacked: AttackedBatch) -> Tensor:
    """The share of wrong answers at the starting points ``(B,)``, of `ASKS`; 0 for samples not searched for."""
    y, z = attacked.batch.y, attacked.start.z
    whole = attacked.rows_interact or isinstance(attacked.target, OneAtATime)
    rows = torch.arange(len(y), device=y.device) if whole else attacked.rows
    with torch.no_grad():
        wrong = sum((decide(attacked.target, z[rows]).argmax(dim=1) != y[rows]).float() for _ in range(ASKS))
    assert isinstance(wrong, Tensor)
    return torch.zeros(len(y), device=y.device).index_copy(0, rows, wrong / ASKS)
