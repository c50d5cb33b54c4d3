"""The L1 ball: the nearest point of it within the box, and the sparse directions that get furthest in it."""

from __future__ import annotations

import torch
from torch import Tensor

FIRST_SHARE = 0.2
"""The share of an image's numbers that a step moves at first."""


def onto_l1(delta: Tensor, room: Tensor, radius: float) -> Tensor:
    """Project perturbations onto the L1 ball cut with a box, in the Euclidean sense.

    The projection lowers the size of every entry by one λ a row and cuts it at the box; λ is where the sizes add up
    to the radius, found among the points where an entry begins or ends to change (Croce & Hein 2021, Proposition 2.1).

    Args:
        delta: ``(B, D)``.
        room: how far each entry may go in its own direction ``(B, D)``, not negative.
        radius: of the ball.

    Returns:
        ``(B, D)``, of L1 norm at most the radius up to rounding.

    >>> onto_l1(torch.tensor([[3.0, -1.0, 0.5]]), torch.tensor([[1.0, 1.0, 1.0]]), 1.5)
    tensor([[ 1.0000, -0.5000,  0.0000]])
    """
    size = delta.abs()
    begins, ends = (size - room).clamp(min=0), size
    at, order = torch.cat([begins, ends], dim=1).sort(dim=1)
    slope = torch.where(order < size.shape[1], -1.0, 1.0).to(size).cumsum(dim=1)
    total = torch.minimum(size, room).sum(dim=1, keepdim=True)
    steps = torch.diff(at, dim=1) * slope[:, :-1]
    sums = torch.cat([total, total + steps.cumsum(dim=1)], dim=1)
    last = ((sums > radius).sum(dim=1, keepdim=True) - 1).clamp(min=0)
    over = (sums.gather(1, last) - radius).clamp(min=0)
    cut = at.gather(1, last) + over / -slope.gather(1, last).clamp(max=-1)
    cut = torch.where(total > radius, cut, torch.zeros_like(cut))
    kept = torch.minimum((size - cut).clamp(min=0), room)
    # What sums in float32 leave over is taken from all in proportion.
    kept = kept * (radius / kept.sum(dim=1, keepdim=True).clamp(min=radius))
    return kept * delta.sign()


def sparse_signs(gradient: Tensor, share: Tensor) -> Tensor:
    """Signs of the largest entries of a gradient ``(B, ...)``, a share ``(B,)`` of all, scaled to L1 norm 1.

    >>> sparse_signs(torch.tensor([[3.0, -4.0, 1.0, 0.5]]), torch.tensor([0.5]))
    tensor([[ 0.5000, -0.5000,  0.0000,  0.0000]])
    """
    size = gradient.abs().flatten(1)
    place = ((1 - share) * size.shape[1]).long().clamp(0, size.shape[1] - 1)
    least = size.sort(dim=1).values.gather(1, place.unsqueeze(1)).squeeze(1)
    flat = gradient.flatten(1)
    signs = torch.where(size >= least.unsqueeze(1), flat.sign(), torch.zeros_like(flat))
    return (signs / (signs.abs().sum(dim=1, keepdim=True) + 1e-10)).view_as(gradient)
