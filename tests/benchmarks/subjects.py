"""What is measured: the references, AutoAttack's ResNet-18, and toys of any size."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from msa_eval import HPM, Classifier, Samples, load_checkpoint, load_samples
from msa_eval.attacks import Ball
from msa_eval.judging.batch_plan import plan_batches
from msa_eval.references import reference_path
from msa_eval.sensitivity import autoattack_resnet18


class Subject(NamedTuple):
    """A model, images and a ball around each.

    Attributes:
        hpm: the defence, where there is one.
        fc: the static classifier, on the same trunk.
        data: images and labels, in the order of the batches.
        ball: the perturbation set.
    """

    hpm: HPM | None
    fc: Classifier
    data: Samples
    ball: Ball

    def chunks(self, size: int) -> list[Samples]:
        """The images in pieces of one size, which contenders attack in turns."""
        data = self.data
        return [Samples(x, y, data.name) for x, y in zip(data.x.split(size), data.y.split(size), strict=True)]


NAMES = ("cifar10-wrn10-2", "resnet18", "digits")


def cifar10() -> Samples:
    """The test images of CIFAR-10, as ``data/cifar10/test.npz`` in the folder that MSA_EVAL_SHARED names.

    Raises:
        SystemExit: when they are not there.
    """
    path = Path(os.environ.get("MSA_EVAL_SHARED", ""), "data/cifar10/test.npz")
    if not path.is_file():
        raise SystemExit(f"no CIFAR-10 at {path}: set MSA_EVAL_SHARED to a folder that holds data/cifar10/test.npz")
    return load_samples(str(path))


def subject(name: str, samples: int) -> Subject:
    """A model and so many test images.

    Raises:
        ValueError: when there is no such model.
    """
    if name not in NAMES:
        raise ValueError(f"expected one of {', '.join(NAMES)}, but got {name!r}")
    digits = name == "digits"
    found = load_samples("digits") if digits else cifar10()
    data = Samples(found.x[:samples], found.y[:samples], found.name)
    ball = Ball("Linf", 0.15 if digits else 8 / 255)
    if name == "resnet18":
        return Subject(None, autoattack_resnet18(), data, ball)
    hpm = load_checkpoint(reference_path(name)).model
    assert isinstance(hpm, HPM)
    hpm = hpm.eval().requires_grad_(False)
    return Subject(hpm, hpm.fc_target, data, ball)


class ToyTrunk(nn.Module):
    """One convolution and a projection to as many features as wanted, so that heads of any size stay cheap."""

    def __init__(self, dim: int, width: int = 8) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, stride=2, padding=1)
        self.out = nn.Linear(width * 16, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``(B, 3, 8, 8)`` to features ``(B, dim)``."""
        z: Tensor = self.out(F.relu(self.conv(x)).flatten(1))
        return z


def toy(*, samples: int, classes: int, dim: int) -> Subject:
    """An untrained HPM on random images, labelled by its FC head."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        hpm = HPM(ToyTrunk(dim), nn.Linear(dim, classes)).eval().requires_grad_(False)
        x = torch.rand(samples, 3, 8, 8)
        with torch.no_grad():
            hpm.prototypes.copy_(hpm.fc.weight / hpm.fc.weight.norm(dim=1, keepdim=True))
            y = torch.cat([hpm(part).argmax(dim=1) for part in x.split(64)])
    return Subject(hpm, hpm.fc_target, Samples(x, y, "random"), Ball("Linf", 8 / 255))


def batches(data: Samples, size: int) -> list[tuple[Tensor, Tensor]]:
    """Images and labels, batch by batch, as an evaluation with ``batches.seed = 0`` seats them."""
    batch_plan = plan_batches(len(data), size=size, seed=0)
    return [(data.images(indices), data.y[indices]) for indices in batch_plan]
