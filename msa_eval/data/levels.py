"""The grid of values that files of images hold, such as the 256 levels of 8 bits."""

from __future__ import annotations

import torch
from torch import Tensor

MOST = 65536
"""Levels of 16 bits; float32 tells no finer grid in [0, 1] apart safely."""


def onto_levels(x: Tensor, levels: int) -> Tensor:
    """The nearest of so many even levels from 0 to 1; those of 8 bits come out as ``uint8 / 255`` does, to the bit.

    >>> onto_levels(torch.tensor([0.0, 0.4, 0.6, 1.0]), 3)
    tensor([0.0000, 0.5000, 0.5000, 1.0000])
    """
    return from_level(level_of(x, levels), levels)


def level_of(x: Tensor, levels: int) -> Tensor:
    """The number of the level nearest to each value, from 0, as floats."""
    return (x * (levels - 1)).round_()


def from_level(number: Tensor, levels: int) -> Tensor:
    """The values of levels by their numbers.

    On GPUs a division by a number of the host is a multiplication by its inverse, which rounds otherwise.
    """
    return number.float() / torch.tensor(float(levels - 1), device=number.device)
