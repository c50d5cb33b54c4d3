"""Built-in classifiers: a pre-activation WideResNet and a small CNN for 8x8 digits.

A classifier is a trunk (images to features) and a fully connected head. The registry at the end lets a
checkpoint name its architecture, so that the file alone is enough to rebuild the model.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Normalize(nn.Module):
    """Channel-wise ``(x - mean) / std`` inside the model, so that ε stays in [0, 1] pixel units.

    Args:
        mean: one value a channel.
        std: one positive value a channel.

    Raises:
        ValueError: when the lengths differ or a ``std`` is not positive.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        if len(mean) != len(std) or not mean or min(std) <= 0:
            raise ValueError(
                f"expected as many means as positive stds, one per channel, but got mean={list(mean)}, std={list(std)}"
            )
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(list(mean)).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(list(std)).view(1, -1, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise images ``(B, C, H, W)``."""
        return (x - self.mean) / self.std


class _PreActBlock(nn.Module):
    def __init__(self, width_in: int, width_out: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(width_in)
        self.conv1 = nn.Conv2d(width_in, width_out, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width_out)
        self.conv2 = nn.Conv2d(width_out, width_out, 3, padding=1, bias=False)
        same = width_in == width_out and stride == 1
        self.convShortcut = None if same else nn.Conv2d(width_in, width_out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.bn1(x))
        shortcut = x if self.convShortcut is None else self.convShortcut(active)
        out: Tensor = self.conv2(F.relu(self.bn2(self.conv1(active)))) + shortcut
        return out


def _stage(blocks: int, width_in: int, width_out: int, stride: int) -> nn.Module:
    """One stage; a stage of a single block is that block itself, which keeps parameter names short."""
    first = _PreActBlock(width_in, width_out, stride)
    if blocks == 1:
        return first
    return nn.Sequential(first, *(_PreActBlock(width_out, width_out, 1) for _ in range(blocks - 1)))


DEEPEST = 1000
"""A checkpoint that asks for more layers is none of ours, and would take its time."""


class WideResNet(nn.Module):
    """Trunk of a pre-activation wide residual network.

    References:
        Wide Residual Networks (Zagoruyko & Komodakis, 2016), arXiv:1605.07146.

    Args:
        depth: ``6 n + 4`` for ``n`` blocks a stage.
        width: the widening factor; the features are ``64 * width`` wide.

    Raises:
        ValueError: when ``depth`` is not ``6 n + 4`` or ``width`` is not positive.
    """

    def __init__(self, depth: int = 28, width: int = 10) -> None:
        super().__init__()
        blocks, rest = divmod(depth - 4, 6)
        if rest or blocks < 1 or width < 1:
            raise ValueError(
                f"expected a depth of 6n+4 (10, 16, 28, ...) and a width of at least 1, but got {depth} and {width}"
            )
        if depth > DEEPEST:
            raise ValueError(f"expected a depth of at most {DEEPEST}, but got {depth}")
        widths = [16, 16 * width, 32 * width, 64 * width]
        self.features_dim = widths[3]
        self.conv1 = nn.Conv2d(3, widths[0], 3, padding=1, bias=False)
        self.block1 = _stage(blocks, widths[0], widths[1], 1)
        self.block2 = _stage(blocks, widths[1], widths[2], 2)
        self.block3 = _stage(blocks, widths[2], widths[3], 2)
        self.bn1 = nn.BatchNorm2d(widths[3])

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``(B, 3, H, W)`` in [0, 1] to features ``(B, 64 * width)``."""
        out = self.block3(self.block2(self.block1(self.conv1(x))))
        return F.relu(self.bn1(out)).mean(dim=(2, 3))


class DigitsCNN(nn.Module):
    """Trunk of a three-layer CNN for 8x8 grey images.

    Args:
        width: channels of the first layer; the features are ``4 * width`` wide.

    Raises:
        ValueError: when ``width`` is not positive.
    """

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        if width < 1:
            raise ValueError(f"expected a width of at least 1, but got {width}")
        self.features_dim = 4 * width
        self.conv1 = nn.Conv2d(1, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.conv3 = nn.Conv2d(2 * width, 4 * width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``(B, 1, H, W)`` in [0, 1] to features ``(B, 4 * width)``."""
        out = F.relu(self.conv3(F.relu(self.conv2(F.relu(self.conv1(x))))))
        return out.mean(dim=(2, 3))


TRUNKS: Mapping[str, Callable[..., nn.Module]] = {"wideresnet": WideResNet, "digits-cnn": DigitsCNN}


class Classifier(nn.Module):
    """A trunk and its fully connected head: the model a defence is built on.

    As a target its decision is the head alone, so it never looks at the batch.

    Args:
        trunk: maps images ``(B, C, H, W)`` in [0, 1] to features ``(B, d)``, its own normalisation included.
        fc: maps features to logits ``(B, k)``.
    """

    batch_dependent = False

    def __init__(self, trunk: nn.Module, fc: nn.Linear) -> None:
        super().__init__()
        self.trunk = trunk
        self.fc = fc

    def features(self, x: Tensor) -> Tensor:
        """Map images ``(B, C, H, W)`` in [0, 1] to features ``(B, d)``."""
        z: Tensor = self.trunk(x)
        return z

    def logits(self, z: Tensor) -> Tensor:
        """Map features ``(B, d)`` to logits ``(B, k)``."""
        out: Tensor = self.fc(z)
        return out

    fc_logits = logits

    def forward(self, x: Tensor) -> Tensor:
        """Map images to logits."""
        return self.logits(self.features(x))


@dataclass(frozen=True)
class Blueprint:
    """What a checkpoint says of its architecture: enough to build the classifier with random weights.

    Attributes:
        architecture: a name of `TRUNKS`, or a target's word (see `msa_eval.targets`).
        arguments: keyword arguments of that trunk; of a target, ``cut`` says where it was cut.
        num_classes: k, at least 2.
        normalization: ``{"mean": [...], "std": [...]}``, one value a channel, or ``None``.
    """

    architecture: str
    arguments: Mapping[str, Any]
    num_classes: int
    normalization: Mapping[str, Sequence[float]] | None = None

    @property
    def by_name(self) -> bool:
        """Whether the architecture is a target by name, which `msa_eval.targets.rebuilding.rebuild` builds."""
        return "cut" in self.arguments

    def build(self) -> Classifier:
        """Build the classifier.

        Raises:
            ValueError: when the name is unknown or the arguments don't fit it.

        >>> Blueprint("wideresnet", {"depth": 10, "width": 2}, num_classes=10).build().fc.in_features
        128
        """
        if self.architecture not in TRUNKS:
            raise ValueError(f"unknown architecture {self.architecture!r}; available: {', '.join(sorted(TRUNKS))}")
        if self.num_classes < 2:
            raise ValueError(f"expected at least 2 classes, but got {self.num_classes}")
        make = TRUNKS[self.architecture]
        known = list(inspect.signature(make).parameters)
        if unknown := sorted(set(self.arguments) - set(known)):
            raise ValueError(f"architecture {self.architecture!r} takes {', '.join(known)}, not {', '.join(unknown)}")
        for name, value in self.arguments.items():
            if type(value) is not int:  # as all of them are
                raise ValueError(f"{name} of architecture {self.architecture!r} is a whole number, not {value!r}")
        try:
            trunk = make(**self.arguments)
        except TypeError as error:
            raise ValueError(f"architecture {self.architecture!r} can't be built: {error}") from error
        dim = trunk.features_dim
        assert isinstance(dim, int)
        if self.normalization is not None:
            trunk = nn.Sequential(Normalize(self.normalization["mean"], self.normalization["std"]), trunk)
        return Classifier(trunk, nn.Linear(dim, self.num_classes))
