"""APGD on a trial: of those rows alone that are searched for, where each is decided apart; else of the whole batch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from msa_eval.attacks.apgd import apgd
from msa_eval.attacks.losses import Loss
from msa_eval.protocols.trial import Trial


def climb(
    trial: Trial,
    loss: Callable[[Trial, Tensor], Loss],
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
