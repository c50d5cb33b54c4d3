"""Overtime: the last passes go to the samples nearest to falling, where each is decided apart from the others."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from msa_eval.attacks.attacked_batch import AttackedBatch
from msa_eval.attacks.gradient import climb
from msa_eval.attacks.losses import (
    MIN_CLASSES,
    TARGETED,
    Loss,
    margin,
    most_likely_others,
    probability_margin,
    targeted_dlr,
)
from msa_eval.defense.contract import decide

NEAREST = 8
"""One in so many of the standing samples is searched for at a time: those whose label leads by least."""

NEAREST_OF_THESE = 4
"""Every other start is for one in so many of them alone."""

TARGETS = 4
"""Towards so many classes in turn: by the ranking of earlier runs, else the likeliest at a sample's best point."""

UNTARGETED = (margin, probability_margin)
"""What is raised after these."""


@dataclass(frozen=True)
class OvertimeAttack:
    """APGD from one random start after another, against the few samples that are nearest to falling.

    Which they are is looked up before each start, by the lowest lead that the label ever had. Each loss is raised from
    two starts, of which the second is for the very nearest.

    Attributes:
        passes: a sample of the batch.
        steps: gradient steps from each start.
    """

    passes: int
    steps: int

    def __call__(self, trial: AttackedBatch, generator: torch.Generator) -> Tensor:
        """Return the starting points; every point found is in the trial's record."""
        batch, sought = trial.batch, trial.counted
        with torch.no_grad():
            at_best = decide(trial.target, trial.start.z).float()
        before = -margin(at_best, batch.y)
        allowed, turn = self.passes * len(batch.y) + trial.forwards, 0
        while bool((standing := sought & ~trial.broken).any()):
            lead = torch.minimum(before, trial.lead).masked_fill(~standing, torch.inf)
            share = NEAREST * (NEAREST_OF_THESE if turn % 2 else 1)
            nearest = lead.argsort(stable=True)[: -(-int(standing.sum()) // share)]
            if trial.forwards + len(nearest) * (self.steps + 1) * trial.eot > allowed:
                break
            trial.search_for(torch.zeros_like(sought).index_fill(0, nearest, True))
            drawn = trial.ball.random(batch.x, generator)
            start = trial.start.x.index_copy(0, trial.rows, drawn[trial.rows])
            climb(trial, partial(_loss, at_best, turn // 2), steps=self.steps, generator=generator, start=start)
            turn += 1
        return trial.start.x


def _loss(at_best: Tensor, number: int, trial: AttackedBatch, rows: Tensor) -> Loss:
    """Targeted DLR towards one class after another, then the margin, and that of the probabilities."""
    logits, y = at_best[rows], trial.batch.y[rows]
    classes = logits.shape[1]
    targets = min(TARGETS, classes - 1) if classes >= MIN_CLASSES[TARGETED] else 0
    place = number % (targets + len(UNTARGETED))
    if place >= targets:
        return UNTARGETED[place - targets]
    if trial.ranking is not None:
        return targeted_dlr(trial.ranking[rows, place])
    return targeted_dlr(most_likely_others(logits, y, place))
