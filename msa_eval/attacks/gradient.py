"""APGD on a batch under attack: on a surrogate's gradient, or on the target's own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from msa_eval.attacks.apgd import apgd
from msa_eval.attacks.attacked_batch import AttackedBatch
from msa_eval.attacks.losses import (
    LOSSES,
    MALT,
    TARGETED,
    Loss,
    alternating,
    averaged,
    by_likelihood,
    focused,
    most_likely_others,
    pooled,
    targeted_dlr,
)
from msa_eval.attacks.malt import rank_classes


def climb(
    trial: AttackedBatch,
    loss: Callable[[AttackedBatch, Tensor], Loss],
    *,
    steps: int,
    generator: torch.Generator,
    start: Tensor | None,
) -> Tensor:
    """Raise a loss, and return the points where it was highest ``(B, C, H, W)``.

    Args:
        trial: the trial.
        loss: of a trial, and of the places ``(n,)`` of the rows whose logits it will be given.
        steps: gradient steps.
        generator: draws the starting points.
        start: these ``(B, C, H, W)``, if they are drawn already; where only some rows are searched for they must be.
    """
    batch, rows = trial.batch, trial.rows
    apart = not trial.rows_interact and len(rows) < len(batch.y)
    if apart:
        assert start is not None
        model, x, y, start = trial.of_rows(), batch.x[rows], batch.y[rows], start[rows]
    else:
        model, x, y = trial, batch.x, batch.y
        rows = torch.arange(len(y), device=y.device)
    found = apgd(
        model, x, y, loss=loss(trial, rows), ball=trial.ball, steps=steps, generator=generator, start=start,
        draws=trial.eot, going=lambda: trial.searching,
    )  # fmt: skip
    return trial.start.x.index_copy(0, rows, found.x) if apart else found.x


def rank(trial: AttackedBatch) -> None:
    """Rank the classes of the samples searched for, by the surrogate's gradients at their clean images.

    Those of the others follow the target's clean logits. It takes a pass of each sample, and one back for each class.

    Args:
        trial: of a target that decides each row apart; its ranking is set.
    """
    batch, rows = trial.batch, trial.rows
    model = trial.of_rows() if len(rows) < len(batch.y) else trial

    def logits(points: Tensor) -> Tensor:
        return torch.stack([model(points) for _ in range(trial.eot)]).mean(dim=0)

    found = rank_classes(logits, batch.x[rows], batch.y[rows], trial.ball)
    trial.ranking = by_likelihood(batch.logits, batch.y).index_copy(0, rows, found)


@dataclass(frozen=True)
class ApgdAttack:
    """APGD with one loss.

    Attributes:
        loss: its name.
        steps: gradient steps.
        target: the rank of the class that a targeted loss pushes towards.
        turns: on an ensemble, whether its members take turns; else their mean is followed.
        from_start: whether to start at the trial's starting points; else at random ones.
    """

    loss: str
    steps: int
    target: int = 0
    turns: bool = False
    from_start: bool = False

    def __call__(self, trial: AttackedBatch, generator: torch.Generator) -> Tensor:
        """Return the points of highest surrogate loss."""
        if self.loss == MALT and trial.ranking is None and not (trial.rows_interact or trial.ensemble):
            rank(trial)
        start = trial.start.x if self.from_start else None
        if start is None and len(trial.rows) < len(trial.counted):
            drawn, rows = trial.ball.random(trial.batch.x, generator), trial.rows
            start = drawn if trial.among_others else trial.start.x.index_copy(0, rows, drawn[rows])
        return climb(trial, self._loss, steps=self.steps, generator=generator, start=start)

    def _loss(self, trial: AttackedBatch, rows: Tensor) -> Loss:
        loss = self._one(trial, rows)
        if trial.among_others:
            return pooled(loss, trial.counted)
        if trial.rows_interact and (trial.stops_early or len(trial.rows) < len(trial.counted)):
            return focused(loss, lambda: trial.rows)
        return loss

    def _one(self, trial: AttackedBatch, rows: Tensor) -> Loss:
        if self.loss == MALT and trial.ranking is not None:
            loss = targeted_dlr(trial.ranking[rows, self.target])
        elif self.loss in (TARGETED, MALT):
            clean = trial.clean_logits()
            likely = clean.mean(dim=0) if trial.ensemble else clean
            loss = targeted_dlr(most_likely_others(likely, trial.batch.y, self.target)[rows])
        else:
            loss = LOSSES[self.loss]
        if not trial.ensemble:
            return loss
        return alternating(loss, calls=trial.eot) if self.turns else averaged(loss)
