"""The point of an L1 ball within the box that is nearest to another point."""

from __future__ import annotations

import torch
from torch import Tensor


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
