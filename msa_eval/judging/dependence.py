"""Whether a target's decision looks at the whole batch: as it says, or as its answers show."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import torch
from torch import Tensor

from msa_eval.attacks.ball import Ball
from msa_eval.attacks.losses import margin_loss
from msa_eval.defense.checks import check_trunk, looks_batch_dependent
from msa_eval.defense.contract import Defense, WholeModel, decide
from msa_eval.defense.micro_batches import is_out_of_memory, unwrap

STEPS, ROWS = 2, 16
"""So many steps are made, on so many images, towards points such as an attack visits."""


def looks_at_its_batch(
    defense: Defense, x: Tensor, logits: Tensor, ball: Ball | None, *, stochastic: bool = False
) -> bool:
    """Whether a target may look at the whole batch, as far as it says so or shows it.

    One that says it does, or says nothing although it has a trunk, is believed. One that says it does not is asked, as
    a whole model that says nothing is: on a clean batch, at random points of the ball, and after a few steps of an
    attack, for some look at their batch only where a pixel has left the grid of clean images.

    Args:
        defense: the target.
        x: a clean batch ``(B, C, H, W)``.
        logits: the target's answer to it ``(B, k)``.
        ball: the perturbation set; ``None`` to ask about clean images alone.
        stochastic: whether it answers at random: then it is taken at its word, and for dependent where it says nothing.

    Raises:
        ValueError: when the features of points in the ball depend on companions.
    """
    declared: bool | None = getattr(defense, "batch_dependent", True)
    asked = declared is False or (declared is None and isinstance(unwrap(defense), WholeModel))
    if not asked or stochastic:
        return declared is not False
    if len(x) < 2:
        return declared is None
    found = any(looks_batch_dependent(defense, z, answer) for z, answer in _answers(defense, x, logits, ball))
    if found and declared is False:
        warnings.warn(
            f"{type(unwrap(defense)).__name__} says batch_dependent = False, but its answers depend on companions, on "
            f"clean images or in the ball, so it is evaluated as a target that looks at its batch",
            stacklevel=2,
        )
    return found


def _answers(defense: Defense, x: Tensor, logits: Tensor, ball: Ball | None) -> Iterator[tuple[Tensor, Tensor]]:
    """Features of batches of points, and the target's answers."""
    with torch.no_grad():
        z = defense.features(x)
    yield z, logits
    if ball is None:
        return
    start = ball.random(x, torch.Generator().manual_seed(0))
    points = _attacked(defense, x[:ROWS], start[:ROWS], logits[:ROWS].argmax(dim=1), ball)
    mixed = points.clone()
    mixed[::2] = x[:ROWS:2]
    for batch in (start, points, mixed):
        with torch.no_grad():
            z = defense.features(batch)
        check_trunk(defense, batch, z)
        yield z, decide(defense, z)


def _attacked(defense: Defense, x: Tensor, start: Tensor, y: Tensor, ball: Ball) -> Tensor:
    """Points after a few steps up the target's own gradient; the start, where it has none."""
    points, project = start, ball.projection(x)
    for _ in range(STEPS):
        leaf = points.detach().requires_grad_()
        try:
            with torch.enable_grad():
                loss = margin_loss(defense.logits(defense.features(leaf)).float(), y).sum()
                (gradient,) = torch.autograd.grad(loss, leaf, allow_unused=True)
        except (RuntimeError, IndexError) as error:
            if is_out_of_memory(error):
                raise
            return points
        if gradient is None or not bool(gradient.isfinite().all()):
            return points
        points = project(points + ball.eps * ball.ascent(gradient))
    return points
