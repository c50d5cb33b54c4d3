"""Auto-PGD.

References:
    Reliable Evaluation of Adversarial Robustness with an Ensemble of Diverse Parameter-free Attacks
    (Croce & Hein, 2020), arXiv:2003.01690, Algorithm 1.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from msa_eval.attacks.ball import Ball
from msa_eval.attacks.found import Found
from msa_eval.attacks.losses import Loss
from msa_eval.attacks.sparse_apgd import sparse_apgd


def apgd(
    logits: Callable[[Tensor], Tensor],
    x: Tensor,
    y: Tensor,
    *,
    loss: Loss,
    ball: Ball,
    steps: int,
    generator: torch.Generator,
    start: Tensor | None = None,
    first_step: float = 2.0,
    draws: int = 1,
    going: Callable[[], bool] = lambda: True,
    rho: float = 0.75,
    momentum: float = 0.75,
) -> Found:
    """Raise a loss inside the ball around each image of a batch.

    Unlike AutoAttack's, the returned point is the best for *every* sample: clean inputs where the attacked model was
    not fooled would make a transfer to another model vacuous. One thing follows AutoAttack's code rather than the
    paper: the first window's first comparison is with a loss of 0, where the paper has the starting point's. In an L1
    ball it is `sparse_apgd`, whose first step is ε.

    Args:
        logits: a differentiable map of the whole batch ``(B, ...)`` to logits ``(B, k)``; it is called
            up to ``steps + 1`` times ``draws``, for the last point without gradient.
        x: images ``(B, C, H, W)`` in [0, 1].
        y: labels ``(B,)``.
        loss: what to raise.
        ball: the perturbation set.
        steps: gradient steps, at least 1.
        generator: draws the starting point.
        start: a starting point ``(B, C, H, W)`` instead of a random one; it is clipped to [0, 1].
        first_step: the first step size in units of ε; 2 in the paper.
        draws: calls for each point, over which values and gradients are averaged (expectation over transformation,
            for a model that answers at random).
        going: asked after each point; the search ends where it returns false.
        rho: the share of improving steps below which a sample's step size is halved.
        momentum: the weight of the new step against the last move.

    Raises:
        ValueError: when ``steps`` is less than 1.
    """
    if steps < 1:
        raise ValueError(f"expected at least 1 step, but got {steps}")
    point = (ball.random(x, generator) if start is None else start).clamp(0, 1)
    if ball.norm == "L1":
        return sparse_apgd(
            _asked(logits, y, loss, draws), x, point, ball=ball, steps=steps, first_step=min(first_step, 1.0),
            warm=start is not None, going=going,
        )  # fmt: skip
    per_sample = (-1, *[1] * (x.ndim - 1))
    value, gradient = _value_and_gradient(logits, point, y, loss, draws)
    best = Found(point.clone(), value)
    best_gradient = gradient.clone()
    onto_ball, scratch = ball.projection(x), torch.empty_like(point)
    step = torch.full_like(value, first_step * ball.eps)
    last = point
    improved = torch.zeros_like(value)
    previous = torch.zeros_like(value)
    halved_before = torch.ones_like(value, dtype=torch.bool)
    best_at_check = value
    window, shortest, shrink = (max(int(share * steps), 1) for share in (0.22, 0.06, 0.03))
    since_check = 0

    for i in range(steps):
        if not going():
            break
        size = step.view(per_sample)
        weight = momentum if i else 1.0
        move = onto_ball(ball.ascent(gradient).mul_(size).add_(point)).sub_(point)
        last_move = torch.sub(point, last, out=scratch).mul_(1 - weight)
        last, point = point, onto_ball(move.mul_(weight).add_(point).add_(last_move))

        if i + 1 < steps:
            value, gradient = _value_and_gradient(logits, point, y, loss, draws)
        else:
            with torch.no_grad():
                value = sum((loss(logits(point), y) for _ in range(draws)), torch.zeros_like(value)) / draws
        better = value > best.loss
        at = better.view(per_sample)
        best = Found(torch.where(at, point, best.x, out=best.x), torch.where(better, value, best.loss))
        torch.where(at, gradient, best_gradient, out=best_gradient)
        improved = improved + (value > previous)
        previous = value
        since_check += 1

        if since_check == window:
            stalled = ~halved_before & (best_at_check >= best.loss)
            halve = (improved <= rho * window) | stalled
            step = torch.where(halve, step / 2, step)
            at = halve.view(per_sample)
            point, gradient = torch.where(at, best.x, point), torch.where(at, best_gradient, gradient)
            halved_before, best_at_check = halve, best.loss
            improved = torch.zeros_like(improved)
            window, since_check = max(window - shrink, shortest), 0
    return best


def _asked(
    logits: Callable[[Tensor], Tensor], y: Tensor, loss: Loss, draws: int
) -> Callable[[Tensor, bool], tuple[Tensor, Tensor]]:
    """The loss of each sample at some points and, where it is wanted, the gradient of their sum."""

    def ask(points: Tensor, follow: bool) -> tuple[Tensor, Tensor]:
        if follow:
            return _value_and_gradient(logits, points, y, loss, draws)
        with torch.no_grad():
            mean = torch.stack([loss(logits(points), y) for _ in range(draws)]).mean(dim=0)
        return mean, torch.zeros_like(points)

    return ask


def _value_and_gradient(
    logits: Callable[[Tensor], Tensor], point: Tensor, y: Tensor, loss: Loss, draws: int
) -> tuple[Tensor, Tensor]:
    """The loss of each sample and the gradient of their sum: in a batch-dependent model, companions count."""
    values, gradients = [], []
    for _ in range(draws):
        point = point.detach().requires_grad_()
        with torch.enable_grad():
            value = loss(logits(point), y)
            (gradient,) = torch.autograd.grad(value.sum(), point)
        values.append(value.detach())
        gradients.append(gradient)
    if draws == 1:
        return values[0], gradients[0]
    return torch.stack(values).mean(dim=0), torch.stack(gradients).mean(dim=0)
