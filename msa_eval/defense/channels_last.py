"""How images lie in memory when a trunk takes them: channels last, where convolutions gain by it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from msa_eval.defense.calling import call
from msa_eval.defense.contract import Defense, modules_of

SAME = 1e-3
"""The layout may change features by rounding alone, which is far below this share of the largest."""

PROBED = 2


def channels_last(x: Tensor) -> Tensor:
    """The same images ``(B, C, H, W)``, their channels last in memory; a gradient comes back as the images lay."""
    if x.requires_grad:
        x = x.view_as(x)  # a node of our own, also where these are the images that the gradient is asked for
        x.register_hook(lambda gradient: gradient.contiguous())
    return x.contiguous(memory_format=torch.channels_last)


def takes_channels_last(defense: Defense, x: Tensor) -> bool:
    """Whether a trunk is passed with channels last: on a CPU, where it has convolutions and its features stay the same.

    This is tried on two images, for a trunk's own code may look at how they lie in memory. Nothing is timed, so that
    every process answers the same.

    Args:
        defense: the target.
        x: images ``(B, C, H, W)``.
    """
    if x.ndim != 4 or x.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if x.is_contiguous(memory_format=torch.channels_last):
        return False  # they lie so already, such as those of one channel
    if not any(isinstance(part, nn.Conv2d) for module in modules_of(defense) for part in module.modules()):
        return False
    x = x[:PROBED].detach()
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        expected = call(defense.features, x)
        try:
            found = call(defense.features, channels_last(x))
        except RuntimeError:
            return False  # such as a view across what no longer lies side by side
    if not isinstance(expected, Tensor):
        return False  # which whoever asked for features tells
    return bool(((found - expected).abs() <= SAME * expected.abs().max()).all())
