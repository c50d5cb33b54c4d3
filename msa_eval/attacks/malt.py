"""Which classes a targeted attack should try first: those that a linear model of the logits reaches with least change.

References:
    MALT Powers Up Adversarial Attacks (Melamed, Yehudai & Vardi, 2024), arXiv:2407.02240.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from msa_eval.attacks.ball import Ball
from msa_eval.attacks.losses import by_likelihood

CANDIDATES = 9
"""So many of the likeliest other classes are ranked, each by a gradient of its own; the rest follow by their logits."""


def rank_classes(logits: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, ball: Ball) -> Tensor:
    """The classes of each sample, the one first that the margin over it and its slope put nearest; the label last.

    Near is what a step along the norm's steepest ascent would reach first, were the logits linear: the label's margin
    over a class, divided by the dual norm of that margin's gradient. One pass forward, and one back for each candidate.

    Args:
        logits: a differentiable map of images to logits ``(n, k)``, each row from its own image.
        x: images ``(n, C, H, W)``.
        y: labels ``(n,)``.
        ball: whose norm counts.

    Returns:
        classes ``(n, k)``.
    """
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        found = logits(x)
        likely = by_likelihood(found.detach(), y)
        candidates = likely[:, : min(CANDIDATES, likely.shape[1] - 1)]
        margins = found.gather(1, y.unsqueeze(1)) - found.gather(1, candidates)
        distances = torch.stack([_distance(margin, x, ball) for margin in margins.unbind(dim=1)], dim=1)
    order = distances.argsort(dim=1, stable=True)
    return torch.cat([candidates.gather(1, order), likely[:, candidates.shape[1] :]], dim=1)


def _distance(margin: Tensor, x: Tensor, ball: Ball) -> Tensor:
    """How far each image ``(n, C, H, W)`` is from where its margin ``(n,)`` would be 0, by that margin's gradient."""
    (gradient,) = torch.autograd.grad(margin.sum(), x, retain_graph=True)
    slope = (gradient * ball.ascent(gradient)).flatten(1).sum(dim=1)
    return (margin.detach() / slope).nan_to_num(nan=torch.inf)
