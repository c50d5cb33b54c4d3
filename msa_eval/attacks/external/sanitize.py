"""Guards around a third-party attack: what it may not do is undone and reported.

Some attacks return clean images as adversarial ones, change a model's mode, round to float16 or to whole grey levels,
seed the global generators, write into the logits they are given, or leave the ball. None of that may reach a verdict.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from msa_eval.attacks.ball import per_image
from msa_eval.attacks.external.adapter import LibraryAttack
from msa_eval.attacks.external.batch_model import BatchModel
from msa_eval.attacks.external.faults import ExternalAttackError, Fault
from msa_eval.randomness import Chance


class Found(NamedTuple):
    """What an external attack returned, made sound.

    Attributes:
        x: points ``(n, C, H, W)`` inside the ball and the box, in float32.
        faults: what had to be mended, or was noticed.
    """

    x: Tensor
    faults: tuple[Fault, ...]


def run_guarded(library_attack: LibraryAttack, batch_model: BatchModel, *, seed: int, turn: int = 0) -> Found:
    """Run an external attack on the images of a batch model.

    The generators of torch, NumPy and Python are seeded for it and put back; the model draws from its own streams
    meanwhile, whatever the external attack does to the global ones.

    Args:
        library_attack: the attack.
        batch_model: what it is given as the model.
        seed: of all it draws.
        turn: counts its restarts from 0.

    Raises:
        ExternalAttackError: when it fails, or returns no points of the images' shape, or points that are not finite.
    """
    x, y = batch_model.clean[batch_model.rows], batch_model.y[batch_model.rows]
    seed = seed % 2**32  # as much as NumPy takes
    with Chance(seed, x.device) as chance, _quiet():
        batch_model.chance = chance
        try:
            points = library_attack.search(batch_model, x.clone(), y.clone(), seed, turn)
        finally:
            batch_model.chance = None
            batch_model.hold()
    faults = [Fault(kind, 1) for kind in batch_model.noticed()]
    faults += [Fault("seed", 1)] if chance.seeded else []
    points, mended = _sound(points, batch_model, x)
    return Found(points, (*faults, *mended))


def _sound(points: Any, batch_model: BatchModel, x: Tensor) -> tuple[Tensor, list[Fault]]:
    """Bring what an attack returned into float32, the ball and the box, and put points in the place of clean images."""
    if not isinstance(points, Tensor) or points.shape != x.shape:
        came = f"a tensor of shape {tuple(points.shape)}" if isinstance(points, Tensor) else type(points).__name__
        raise ExternalAttackError(f"it returned {came} for images of shape {tuple(x.shape)}")
    faults = []
    points = points.detach()
    if points.dtype != x.dtype:
        faults.append(Fault("dtype", len(x), detail=str(points.dtype).removeprefix("torch.")))
        scale = 1 if points.dtype.is_floating_point else 255
        points = points.to(x) / scale
    points = points.to(x).clone()
    if not bool(torch.isfinite(points).all()):
        broken = int((~torch.isfinite(points).flatten(1).all(dim=1)).sum())
        raise ExternalAttackError(f"it returned {broken} points that are not finite")
    moved = (points != x).flatten(1).any(dim=1)
    if (
        bool(moved.any())
        and bool(_on_grid(points[moved]))
        and not bool(_on_grid(batch_model.last[batch_model.rows][moved]))
    ):
        faults.append(Fault("rounded", int(moved.sum())))
    excess = batch_model.ball.excess(points, x)
    outside = excess > 0
    if bool(outside.any()):
        faults.append(Fault("outside", int(outside.sum()), float(excess.max())))
        points = torch.where(per_image(outside, points), batch_model.ball.project(points, x), points)
    best = batch_model.best[batch_model.rows]
    shown = (best != x).flatten(1).any(dim=1)
    still = {"clean": int((~moved & shown).sum()), "unmoved": int((~moved & ~shown).sum())}
    faults += [Fault(kind, count) for kind, count in still.items() if count]
    return torch.where(per_image(moved, points), points, best), faults


def _on_grid(points: Tensor) -> Tensor:
    """Whether all values are whole grey levels of 255."""
    levels = points * 255
    return (levels - levels.round()).abs().amax() < 1e-3


@contextmanager
def _quiet() -> Iterator[None]:
    """A user of this package need not see warnings and prints of other libraries."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
