"""Sparse directions: the signs of the largest entries of a gradient."""

from __future__ import annotations

import torch
from torch import Tensor

FIRST_SHARE = 0.2
"""The share of an image's numbers that a step moves at first."""


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
