"""Auto-PGD for the L1 ball: sparse steps, projected onto what the ball and the box have in common.

References:
    Mind the Box: L1-APGD for Sparse Adversarial Attacks on Image Classifiers
    (Croce & Hein, 2021), arXiv:2103.01208, sections 3 and 4.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from msa_eval.attacks.ball import Ball, per_image
from msa_eval.attacks.found import Found
from msa_eval.attacks.l1 import FIRST_SHARE, sparse_signs

DENSITY = 1.5
"""Later steps move so many times fewer numbers than the best point has changed; a stalled step is cut by as much."""

CHECKED = 0.04
"""Of all steps, between two checks of the sparsity."""

SPARSER = 0.95
"""A best point with less than this share of the numbers it had changed before starts again from there, at full step."""

SHORTEST = 0.1
"""Of the first step size, below which no step falls."""


def sparse_apgd(
    ask: Callable[[Tensor, bool], tuple[Tensor, Tensor]],
    x: Tensor,
    start: Tensor,
    *,
    ball: Ball,
    steps: int,
    first_step: float,
    warm: bool,
    going: Callable[[], bool],
) -> Found:
    """Raise a loss inside the L1 ball around each image of a batch.

    This is one run of the paper's algorithm at the ball's own radius. The runs in balls of two and three times that
    radius, which AutoAttack makes first, are left out: a point outside the ball is no attack under this threat, and
    every point is judged.

    Args:
        ask: a pass at some points, with a gradient or, at the last, without: the loss of every sample ``(B,)``, and
            the gradient of their sum ``(B, ...)``.
        x: images ``(B, C, H, W)`` in [0, 1].
        start: the first points ``(B, C, H, W)``.
        ball: the perturbation set, of norm L1.
        steps: gradient steps, at least 1.
        first_step: the first step size in units of ε.
        warm: whether the start comes from an earlier search, whose sparsity is then kept.
        going: asked after each point; the search ends where it returns false.
    """
    count = x[0].numel()
    point = start
    loss, gradient = ask(point, True)
    best, best_gradient = Found(point.clone(), loss), gradient
    longest = first_step * ball.eps
    size = torch.full_like(best.loss, longest)
    changed = _changed(point, x)
    known = (changed > 0) & warm
    share = torch.where(known, changed / count / DENSITY, torch.full_like(changed, FIRST_SHARE))
    changed = torch.where(known, changed, torch.full_like(changed, count))
    window, since_check = max(int(CHECKED * steps), 1), 0
    for i in range(steps):
        if not going():
            break
        direction = sparse_signs(gradient, share)
        point = ball.project(point + per_image(size, point) * direction, x)
        loss, gradient = ask(point, i + 1 < steps)
        at = per_image(loss > best.loss, x)
        best = Found(torch.where(at, point, best.x), torch.maximum(loss, best.loss))
        best_gradient = torch.where(at, gradient, best_gradient)
        since_check += 1
        if since_check == window:
            now = _changed(best.x, x)
            sparser = now / changed < SPARSER
            size = torch.where(sparser, torch.full_like(size, longest), size / DENSITY).clamp(
                SHORTEST * longest, longest
            )
            share, changed, since_check = now / count / DENSITY, now, 0
            back = per_image(sparser, x)
            point, gradient = torch.where(back, best.x, point), torch.where(back, best_gradient, gradient)
    return best


def _changed(points: Tensor, x: Tensor) -> Tensor:
    """How many numbers of each image ``(B, ...)`` differ from the clean ones: ``(B,)``."""
    return (points != x).flatten(1).sum(dim=1).to(x.dtype)
