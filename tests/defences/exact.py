"""Closed forms: which samples no point of the ball can break."""

from __future__ import annotations

import torch
from torch import Tensor

from msa_eval.attacks import Ball

from .adaptive import Logits

CLOSE = 1e-5
"""A lead this near zero is not decided in float32."""


def additive(score: Logits, x: Tensor, y: Tensor, ball: Ball, values: Tensor) -> Tensor:
    """Which samples are left of logits that are sums over pixels of a function of each, under Linf.

    Each pixel can then be set by itself, and towards one other class the best value of each gives the lowest lead.

    Args:
        score: logits of float64 images, ``score(x) = b + sum over p of f_p(x_p)``.
        x: images ``(N, 1, H, W)``.
        y: labels ``(N,)``.
        ball: of norm Linf.
        values: one value of each interval on which every ``f_p`` is constant, or the ends of one on which it is
            monotone for each class (0 and 1 for a linear model).

    Raises:
        AssertionError: when a lead is too near zero, or the point found doesn't have it.
    """
    left = torch.zeros(len(x), dtype=torch.bool)
    for row, (image, label) in enumerate(zip(x.double(), y, strict=True)):
        low, high = (image - ball.eps).clamp(0, 1).flatten(), (image + ball.eps).clamp(0, 1).flatten()
        tried = torch.cat([values.double(), torch.tensor([0.0, 1.0])]).unsqueeze(1).clamp(low, high)  # (V, P)
        flat = image.flatten()
        swapped = torch.where(torch.eye(len(flat), dtype=torch.bool), tried.unsqueeze(1), flat)  # (V, P, P)
        with torch.no_grad():
            moved = score(swapped.view(-1, *image.shape)).view(*tried.shape, -1)
            against = moved[..., label].unsqueeze(2) - moved  # (V, P, k)
            picks = against.argmin(dim=0)  # (P, k)
            points = tried.T.gather(1, picks).T.reshape(-1, *image.shape)
            classes = torch.arange(len(points))
            logits = score(points)
            reached = logits[:, label] - logits[classes, classes]
            here = score(image.unsqueeze(0))[0]
            expected = (against.amin(dim=0) - (here[label] - here)).sum(dim=0) + here[label] - here
        assert torch.allclose(reached, expected, atol=1e-6), "the logits are no sum over pixels"
        leads = torch.cat([reached[:label], reached[label + 1 :]])
        assert float(leads.abs().min()) > CLOSE, f"sample {row} is not decided"
        left[row] = bool((leads > 0).all())
    return left


def linear_l2(weight: Tensor, bias: Tensor, x: Tensor, y: Tensor, ball: Ball) -> Tensor:
    """Which samples are left of ``weight x + bias`` under L2 within the box.

    Against one class the lowest lead is at ``clip(x - c / t)`` for the difference ``c`` of two rows and the ``t > 0``
    at which the ball is reached (the Karush-Kuhn-Tucker conditions), found by bisection; where the box ends first, at
    its corner.
    """
    weight, bias, flat = weight.double(), bias.double(), x.flatten(1).double()
    worst = torch.full((len(x),), torch.inf, dtype=torch.double)
    for other in range(len(weight)):
        slope = weight[y] - weight[other]
        low, high = (torch.full((len(x), 1), v, dtype=torch.double) for v in (-12.0, 12.0))  # of log10 of 1 / t
        for _ in range(200):
            middle = (low + high) / 2
            inside = ((flat - slope * 10**middle).clamp(0, 1) - flat).norm(dim=1, keepdim=True) <= ball.eps
            low, high = torch.where(inside, middle, low), torch.where(inside, high, middle)
        point = (flat - slope * 10**low).clamp(0, 1)
        leads = (point * slope).sum(dim=1) + bias[y] - bias[other]
        worst = torch.where(y == other, worst, torch.minimum(worst, leads))
    assert float(worst.abs().min()) > CLOSE
    return worst > 0
