"""Defences whose answer for an image depends on its batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from msa_eval import HPM, Samples
from msa_eval.attacks import Ball

from .adaptive import Effort, Logits, alone, together
from .known import Known, digits
from .nets import reference, reference_hpm, training_features, training_set


class Counts:
    """Features are centred on the batch, and classes that many images are assigned to (by argmax) are held back.

    Args:
        weight: of the share of the batch that is assigned to a class.
        hidden: whether the counts are taken under ``no_grad`` and the centre is detached.
    """

    def __init__(self, weight: float = 4.0, pull: float = 0.5) -> None:
        self.net, self.weight, self.pull = reference(), weight, pull
        self.mean = training_features().mean(0)

    def features(self, x: Tensor) -> Tensor:
        return self.net.features(x)

    def centred(self, z: Tensor) -> Tensor:
        return self.net.logits(z - self.pull * (z.mean(0) - self.mean))

    def logits(self, z: Tensor) -> Tensor:
        out = self.centred(z)
        shares = F.one_hot(out.argmax(dim=1), 10).float().mean(0)
        return out - self.weight * (shares - 0.1)

    def soft(self, z: Tensor) -> Tensor:
        out = self.centred(z)
        return out - self.weight * ((4 * out).softmax(dim=1).mean(0) - 0.1)


class CountsWithSurrogate(Counts):
    """The same, with the surrogate that counts softly."""

    surrogates = {"soft-counts": Counts.soft}  # noqa: RUF012


class HiddenCounts(Counts):
    """The same as hard to attack as can be: centre and counts are computed under ``no_grad``, features are rounded."""

    def logits(self, z: Tensor) -> Tensor:
        with torch.no_grad():
            centre = self.pull * (z.mean(0) - self.mean)
            shares = F.one_hot(self.net.logits(z - centre).argmax(dim=1), 10).float().mean(0)
        return self.net.logits(z.detach().mul(8).round().div(8) - centre) - self.weight * (shares - 0.1)


class SoftPrototypes:
    """Distances to prototypes that are half those of training, half soft means of the batch."""

    def __init__(self) -> None:
        self.net = reference()
        z, y = training_features(), training_set().y
        self.means = torch.stack([z[y == c].mean(0) for c in range(10)])

    def features(self, x: Tensor) -> Tensor:
        return self.net.features(x)

    def weights(self, z: Tensor) -> Tensor:
        return self.net.logits(z).softmax(dim=1)

    def logits(self, z: Tensor) -> Tensor:
        shares = self.weights(z)
        own = (shares.T @ z + self.means) / (shares.sum(0).unsqueeze(1) + 1)
        return -torch.cdist(z, 0.5 * self.means + 0.5 * own)


class HardPrototypes(SoftPrototypes):
    """Prototypes from hard assignments, taken under ``no_grad``."""

    def weights(self, z: Tensor) -> Tensor:
        return F.one_hot(self.net.logits(z).argmax(dim=1), 10).float()

    def logits(self, z: Tensor) -> Tensor:
        with torch.no_grad():
            shares = self.weights(z)
            own = (shares.T @ z + self.means) / (shares.sum(0).unsqueeze(1) + 1)
        return -torch.cdist(z, 0.5 * self.means + 0.5 * own)

    def mixed(self, z: Tensor, soft: bool) -> Tensor:
        """With the gradient through the batch's means, and through the assignments too if ``soft``."""
        shares = self.net.logits(z).softmax(dim=1) if soft else self.weights(z)
        own = (shares.T @ z + self.means) / (shares.sum(0).unsqueeze(1) + 1)
        return -torch.cdist(z, 0.5 * self.means + 0.5 * own)


class OffGrid(nn.Module):
    """Looks at its batch only where a pixel of it has left the grid of clean digits: then all are centred on it."""

    def __init__(self, pull: float = 0.6) -> None:
        super().__init__()
        self.net, self.pull = reference(), pull

    def forward(self, x: Tensor) -> Tensor:
        z = self.net.features(x)
        off = ((x * 16) - (x * 16).round()).abs().amax() > 0.01
        return self.net.logits(z - self.pull * off * (z.mean(0) - training_features().mean(0)))


class SortedBatch(nn.Module):
    """A feature becomes the average of the batch's that rank beside it, by NumPy, with half a gradient of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.net = reference()

    def forward(self, x: Tensor) -> Tensor:
        z = self.net.features(x)
        shown = z.detach()
        ranks = shown.argsort(dim=0).argsort(dim=0)
        ordered = shown.sort(dim=0).values
        beside = torch.stack([ordered.roll(s, dims=0) for s in (-1, 0, 1)])
        beside[0, -1], beside[2, 0] = ordered[-1], ordered[0]
        smooth = beside.mean(dim=0).gather(0, ranks)
        half = torch.arange(z.shape[1]) % 2 == 0
        return self.net.logits(torch.where(half, z, smooth))


Routes = Callable[[object], Sequence[Logits]]


def decide(defence: object, x: Tensor) -> Tensor:
    """The real answer."""
    if isinstance(defence, nn.Module) and not hasattr(defence, "logits"):
        return defence(x)  # type: ignore[no-any-return]
    return defence.logits(defence.features(x))  # type: ignore[attr-defined, no-any-return]


SHORT = Effort(steps=20, restarts=3, classes=3)


def counts(defence: Counts, x: Tensor, y: Tensor, ball: Ball) -> Tensor:
    """Through soft counts, through the centred logits, and through the network."""
    routes = [
        lambda v: defence.soft(defence.features(v)), lambda v: defence.centred(defence.features(v)),
    ]  # fmt: skip
    return together(lambda v: decide(defence, v), routes, x, y, ball, effort=SHORT)


def prototypes(defence: SoftPrototypes, x: Tensor, y: Tensor, ball: Ball) -> Tensor:
    """Through soft assignments, hard ones as constants, and the network."""
    routes: list[Logits] = [lambda v: defence.logits(defence.features(v)), defence.net]
    if isinstance(defence, HardPrototypes):
        hard = defence
        routes = [lambda v: hard.mixed(hard.features(v), True), lambda v: hard.mixed(hard.features(v), False)]
    return together(lambda v: decide(defence, v), routes, x, y, ball, effort=SHORT)


def hpm(defence: HPM, x: Tensor, y: Tensor, ball: Ball) -> Tensor:
    """Through soft, tempered and constant assignments, and the FC head."""
    ways = ({"assignment": "soft", "temperature": 0.3}, {"assignment": "frozen"}, {"assignment": "soft"})

    def route(way: dict[str, object]) -> Logits:
        return lambda v: defence.logits(defence.features(v), **way)  # type: ignore[arg-type]

    return together(lambda v: decide(defence, v), [route(way) for way in ways], x, y, ball, effort=SHORT)


def hpm_alone(defence: HPM, x: Tensor, y: Tensor, ball: Ball) -> Tensor:
    """The same, each digit in a batch of one."""

    def one(v: Tensor, **way: object) -> Tensor:
        return defence.logits_one_at_a_time(defence.features(v), None, **({"assignment": "ste"} | way))  # type: ignore[arg-type]

    ways = ({"assignment": "soft", "temperature": 0.3}, {"assignment": "frozen"}, {"assignment": "soft"})
    routes: list[Logits] = [lambda v, way=way: one(v, **way) for way in ways]  # type: ignore[misc]
    return alone(one, [*routes, lambda v: defence.fc_logits(defence.features(v))], x, y, ball)


def off_grid(defence: OffGrid, x: Tensor, y: Tensor, ball: Ball) -> Tensor:
    """Centred from the start, and not."""

    def centred(v: Tensor) -> Tensor:
        z = defence.net.features(v)
        return defence.net.logits(z - defence.pull * (z.mean(0) - training_features().mean(0)))

    return together(defence, [centred, defence.net], x, y, ball, effort=SHORT)


def ranked(defence: SortedBatch, x: Tensor, y: Tensor, ball: Ball) -> Tensor:
    """Through the network, and through a mean over neighbours whose ranks are constant."""

    def passed(v: Tensor) -> Tensor:
        z = defence.net.features(v)
        ranks = z.detach().argsort(dim=0).argsort(dim=0)
        ordered = z.sort(dim=0).values
        beside = torch.stack([torch.cat([ordered[1:], ordered[-1:]]), ordered, torch.cat([ordered[:1], ordered[:-1]])])
        half = torch.arange(z.shape[1]) % 2 == 0
        return defence.net.logits(torch.where(half, z, beside.mean(dim=0).gather(0, ranks)))

    return together(defence, [defence.net, passed], x, y, ball, effort=SHORT)


def batch() -> Samples:
    """What is evaluated in `joint`, as one batch."""
    return digits(32)


DEFENCES = (
    Known("hpm-joint", reference_hpm, hpm, behaviour="batch", context="joint", samples=batch,
          source="arXiv:2606.01746"),
    Known("hpm-alone", reference_hpm, hpm_alone, behaviour="batch", source="arXiv:2606.01746"),
    Known("counts-with-surrogate", CountsWithSurrogate, counts, behaviour="batch", context="joint", samples=batch),
    Known("counts", Counts, counts, behaviour="batch", context="joint", samples=batch),
    Known("soft-prototypes", SoftPrototypes, prototypes, behaviour="batch", context="joint", samples=batch),
    Known("hidden-counts", HiddenCounts, counts, masked="no_grad, rounding, detach", level="features",
          behaviour="batch", context="joint", samples=batch),
    Known("hidden-prototypes", HardPrototypes, prototypes, masked="no_grad, argmax", level="logits", part=True,
          behaviour="batch", context="joint", samples=batch),
    Known("off-grid", OffGrid, off_grid, masked="batch read off the grid alone", level="features", part=True,
          behaviour="batch", context="joint", samples=batch),
    Known("ranked-batch", SortedBatch, ranked, masked="sort, detach", level="features", part=True, behaviour="batch",
          context="joint", samples=batch),
)  # fmt: skip
