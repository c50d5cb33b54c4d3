"""Values that leave torch for NumPy and come back: what was made of what."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor


class Exports:
    """The tensors that a pass handed to NumPy, so that what comes back can be given their gradient.

    An array that comes back with as many values as one that left, in the same order of dimensions or in another (images
    are often turned to height, width, channels), is taken to be made of it value by value.
    """

    def __init__(self) -> None:
        self._left: list[Tensor] = []

    def leaves(self, value: Tensor, soft: Tensor | None = None) -> None:
        """A tensor is turned into an array."""
        source = value if soft is None else soft
        if source.requires_grad:
            self._left.append(source)

    def source_of(self, found: Tensor) -> Tensor | None:
        """What a tensor was made of, scaled to it; ``None`` where that can't be told."""
        for source in reversed(self._left):
            if source.numel() == found.numel() and source.numel() > 1:
                turned = _turned(source, found)
                if turned is not None:
                    return turned * _slope(turned.detach(), found)
        return None


def _turned(source: Tensor, found: Tensor) -> Tensor | None:
    """The dimensions in the order that fits best."""
    if source.shape == found.shape:
        return source
    orders = (source.permute(order) for order in itertools.permutations(range(source.ndim)) if source.ndim <= 4)
    fitting = [turned for turned in orders if turned.shape == found.shape]
    if not fitting:
        squeezed = [d for d in source.shape if d > 1] == [d for d in found.shape if d > 1]
        return source.reshape(found.shape) if squeezed else None
    return max(fitting, key=lambda turned: float(_correlation(turned.detach(), found)))


def _correlation(first: Tensor, second: Tensor) -> Tensor:
    a, b = first.float() - first.float().mean(), second.float() - second.float().mean()
    found: Tensor = (a * b).sum() / (a.norm() * b.norm()).clamp_min(1e-12)
    return found


def _slope(source: Tensor, found: Tensor) -> float:
    """The slope of the line through values before and after, such as 255 where bytes come back."""
    a, b = source.float() - source.float().mean(), found.float() - found.float().mean()
    slope = float((a * b).sum() / a.pow(2).sum().clamp_min(1e-12))
    return slope if slope != 0 and torch.isfinite(torch.tensor(slope)) else 1.0
