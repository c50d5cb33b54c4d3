"""Defences on the CIFAR-10 reference; the images lie in the folder that ``MSA_EVAL_SHARED`` names."""

from __future__ import annotations

import copy
import functools
import os
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from msa_eval import Classifier, Samples, load_checkpoint, load_samples
from msa_eval.attacks import Ball
from msa_eval.references import reference_path

from .adaptive import Effort, Logits, alone
from .known import Known
from .masked_pixels import AntiAdversary

COUNT = 32
PIXELS = Effort(steps=20, restarts=3, classes=3, sweeps=0)
"""Three thousand of them are too many to be changed one at a time."""


@functools.cache
def images() -> Samples:
    """The first test images."""
    data = load_samples(str(Path(os.environ["MSA_EVAL_SHARED"]) / "data/cifar10/test.npz"))
    return Samples(data.x[:COUNT].float() / 255, data.y[:COUNT], f"cifar10 ({COUNT})")


def reference() -> Classifier:
    """The packaged WideResNet-10-2 with its FC head."""
    return copy.deepcopy(load_checkpoint(reference_path("cifar10-wrn10-2")).classifier).eval()


class DetailShrunk(nn.Module):
    """The coarse part of an image as it is; small detail is taken for noise and shrunk, under ``no_grad``."""

    def __init__(self, least: float = 0.03) -> None:
        super().__init__()
        self.net, self.least = reference(), least

    def coarse(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, stride=1)

    def detail(self, x: Tensor) -> Tensor:
        return F.softshrink(x - self.coarse(x), self.least)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            detail = self.detail(x)
        return self.net(self.coarse(x) + detail)


class RoundedFeatures:
    """Four fifths of the features are rounded to a grid, the others left."""

    def __init__(self, grid: float = 0.25) -> None:
        self.net, self.grid = reference(), grid

    def features(self, x: Tensor) -> Tensor:
        return self.net.features(x)

    def logits(self, z: Tensor) -> Tensor:
        rounded = torch.arange(z.shape[1]) < 0.8 * z.shape[1]
        return self.net.logits(torch.where(rounded, (z / self.grid).round() * self.grid, z))


def inner(defence: nn.Module, x: Tensor, y: Tensor, ball: Ball) -> Tensor:
    """Through the network behind the defence."""
    return alone(defence, [defence.net], x, y, ball, effort=PIXELS)


def detail(defence: DetailShrunk, x: Tensor, y: Tensor, ball: Ball) -> Tensor:
    """With the gradient of the detail, and with the image as it is on the way back."""

    def whole(v: Tensor) -> Tensor:
        return defence.net(defence.coarse(v) + defence.detail(v))

    def straight(v: Tensor) -> Tensor:
        return defence.net(v + (defence.coarse(v) + defence.detail(v) - v).detach())

    return alone(defence, [straight, whole], x, y, ball, effort=PIXELS)


def rounded(defence: RoundedFeatures, x: Tensor, y: Tensor, ball: Ball) -> Tensor:
    """Rounded on the way there alone."""

    def decide(v: Tensor) -> Tensor:
        return defence.logits(defence.features(v))

    def passed(v: Tensor) -> Tensor:
        z = defence.features(v)
        return defence.net.logits(z) + (defence.logits(z) - defence.net.logits(z)).detach()

    routes: list[Logits] = [passed, defence.net]
    return alone(decide, routes, x, y, ball, effort=PIXELS)


DEFENCES = tuple(
    Known(name, make, attack, masked=by, level=level, part=True, eps=8 / 255, samples=images, shared=True,
          source=source)
    for name, make, attack, by, level, source in (
        ("cifar-anti-adversary", lambda: AntiAdversary(net=reference()), inner, "inner optimisation", "pixels",
         "Alfarra et al. 2022"),
        ("cifar-detail", DetailShrunk, detail, "no_grad", "pixels", ""),
        ("cifar-rounded-features", RoundedFeatures, rounded, "rounding", "features", ""),
    )
)  # fmt: skip
