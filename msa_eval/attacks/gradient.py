"""APGD on a batch under attack: on a surrogate's gradient, or on the target's own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from msa_eval.attacks.apgd import apgd
from msa_eval.attacks.attacked_batch import Attack, AttackedBatch
from msa_eval.attacks.losses import (
    LOSSES,
    MALT,
    TARGETED,
    Loss,
    averaged,
    by_likelihood,
    focused,
    most_likely_others,
    pooled,
    targeted_dlr,
)
from msa_eval.attacks.malt import rank_classes


def rank(attacked: AttackedBatch) -> None:
    """Rank the classes of the samples searched for, by the surrogate's gradients at their clean images.

    Those of the others follow the target's clean logits. It takes a pass of each sample, and one back for each class.

    Args:
        attacked: of a target that decides each row apart; its ranking is set.
    """
    batch, rows = attacked.batch, attacked.rows
    model = attacked.of_rows() if len(rows) < len(batch.y) else attacked

    def logits(points: Tensor) -> Tensor:
        return torch.stack([model(points) for _ in range(attacked.eot)]).mean(dim=0)

    found = rank_classes(logits, batch.x[rows], batch.y[rows], attacked.ball)
    attacked.ranking = by_likelihood(batch.logits, batch.y).index_copy(0, rows, found)


@dataclass(frozen=True)
class ApgdAttack(Attack):
    """APGD with one loss.

    Attributes:
        loss: its name, or what makes it for a batch under attack and the places ``(n,)`` of the rows whose logits it
            will be given.
        steps: gradient steps.
        target: the rank of the class that a targeted loss pushes towards.
        from_start: whether to start at the batch's starting points; else at random ones.
    """

    label = "apgd"

    loss: str | Callable[[AttackedBatch, Tensor], Loss]
    steps: int
    target: int = 0
    from_start: bool = False

    def __call__(
        self, attacked: AttackedBatch, generator: torch.Generator, *, points: Tensor | None = None
    ) -> Tensor:  # fmt: skip
        """Return the points of highest surrogate loss ``(B, C, H, W)``.

        Args:
            attacked: the batch under attack.
            generator: draws the starting points.
            points: to start from, for the samples searched for, in place of these; the others stay at the start.
        """
        start, rows = attacked.start.x if self.from_start else None, attacked.rows
        if points is not None:
            start = attacked.start.x.index_copy(0, rows, points.index_select(0, rows))
        else:
            if self.loss == MALT and attacked.ranking is None and not (attacked.rows_interact or attacked.ensemble):
                rank(attacked)
            if start is None and len(rows) < len(attacked.counted):
                drawn = attacked.ball.random(attacked.batch.x, generator)
                start = drawn if attacked.among_others else attacked.start.x.index_copy(0, rows, drawn[rows])
        model: Callable[[Tensor], Tensor] = attacked
        x, y = attacked.batch.x, attacked.batch.y
        apart = not attacked.rows_interact and len(rows) < len(y)
        if apart:
            assert start is not None
            model, x, y, start = attacked.of_rows(), x[rows], y[rows], start[rows]
        else:
            rows = torch.arange(len(y), device=y.device)
        found = apgd(
            model, x, y, loss=self._loss(attacked, rows), ball=attacked.ball, steps=self.steps, generator=generator,
            start=start, draws=attacked.eot, going=lambda: attacked.searching,
        )  # fmt: skip
        return attacked.start.x.index_copy(0, rows, found.x) if apart else found.x

    def _loss(self, attacked: AttackedBatch, rows: Tensor) -> Loss:
        if callable(self.loss):
            return self.loss(attacked, rows)
        loss = self._named(self.loss, attacked, rows)
        if attacked.among_others:
            return pooled(loss, attacked.counted)
        if attacked.rows_interact and (attacked.stops_early or len(attacked.rows) < len(attacked.counted)):
            return focused(loss, lambda: attacked.rows)
        return loss

    def _named(self, name: str, attacked: AttackedBatch, rows: Tensor) -> Loss:
        if name == MALT and attacked.ranking is not None:
            loss = targeted_dlr(attacked.ranking[rows, self.target])
        elif name in (TARGETED, MALT):
            clean = attacked.clean_logits()
            likely = clean.mean(dim=0) if attacked.ensemble else clean
            loss = targeted_dlr(most_likely_others(likely, attacked.batch.y, self.target)[rows])
        else:
            loss = LOSSES[name]
        return averaged(loss) if attacked.ensemble else loss
