"""Defences that mask their gradient within the network."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from msa_eval.attacks import Ball

from .adaptive import DEEP, Logits, alone
from .known import Known
from .nets import BinaryTrunk, net, reference, training_features


class RoundedFeatures:
    """Four fifths of the features are rounded to a grid, the others left."""

    def __init__(self, share: float = 0.8, grid: float = 0.5) -> None:
        self.net, self.grid = reference(), grid * float(training_features().std())
        self.rounded = torch.arange(training_features().shape[1]) < share * training_features().shape[1]

    def features(self, x: Tensor) -> Tensor:
        return self.net.features(x)

    def logits(self, z: Tensor) -> Tensor:
        return self.net.logits(torch.where(self.rounded, (z / self.grid).round() * self.grid, z))


class SignFeatures(nn.Module):
    """A network of binary features, with ``sign`` where training had a straight-through estimator."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net("binary")

    def forward(self, x: Tensor) -> Tensor:
        trunk = self.net.trunk
        assert isinstance(trunk, BinaryTrunk)
        return self.net.fc(trunk.before(x).sign())  # type: ignore[operator, no-any-return]


class Codebook(nn.Module):
    """Each group of four features becomes the nearest of 24 codewords (argmin and a table)."""

    def __init__(self, words: int = 24) -> None:
        super().__init__()
        self.net = reference()
        self.register_buffer("words", training_features()[:words].view(words, -1, 4).transpose(0, 1).contiguous())

    def near(self, z: Tensor) -> Tensor:
        words, groups = self.get_buffer("words"), z.view(len(z), -1, 4).transpose(0, 1)
        index = torch.cdist(groups, words).argmin(dim=2)
        return torch.stack([word[i] for word, i in zip(words, index, strict=True)], dim=1).flatten(1)

    def soft(self, z: Tensor, sharp: float = 20.0) -> Tensor:
        words, groups = self.get_buffer("words"), z.view(len(z), -1, 4).transpose(0, 1)
        return ((-sharp * torch.cdist(groups, words)).softmax(dim=2) @ words).transpose(0, 1).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.net.logits(self.near(self.net.features(x)))


class Ripples(nn.Module):
    """Features with ripples so short that the gradient says nothing of the way ahead (shattered)."""

    def __init__(self, height: float = 0.01, frequency: float = 3000.0) -> None:
        super().__init__()
        self.net, self.height, self.frequency = reference(), height, frequency

    def forward(self, x: Tensor) -> Tensor:
        z = self.net.features(x)
        return self.net.logits(z + self.height * (self.frequency * z).sin())


class HalfDetachedFeatures(nn.Module):
    """Half of the features are detached."""

    def __init__(self) -> None:
        super().__init__()
        self.net = reference()

    def forward(self, x: Tensor) -> Tensor:
        z = self.net.features(x)
        half = z.shape[1] // 2
        return self.net.logits(torch.cat([z[:, :half], z[:, half:].detach()], dim=1))


class _Reversed(torch.autograd.Function):
    """The identity, whose gradient points the other way."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, z: Tensor) -> Tensor:  # type: ignore[override]
        return z.view_as(z)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> Tensor:  # type: ignore[override]
        return -grad


class ReversedGradient(nn.Module):
    """A custom gradient on half of the features that points the other way."""

    def __init__(self) -> None:
        super().__init__()
        self.net = reference()

    def forward(self, x: Tensor) -> Tensor:
        z = self.net.features(x)
        half = z.shape[1] // 2
        return self.net.logits(torch.cat([z[:, :half], _Reversed.apply(z[:, half:])], dim=1))


class NumpyFeatures(nn.Module):
    """Features to NumPy, cleared of small values there, and back."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.least = reference(), 0.3 * float(training_features().std())

    def forward(self, x: Tensor) -> Tensor:
        z = self.net.features(x).detach().numpy()
        return self.net.logits(torch.from_numpy(z * (z > self.least)))


class SteepFeatures(nn.Module):
    """The network of binary features again, with a sigmoid so steep that its gradient vanishes in float32."""

    def __init__(self, steep: float = 60.0) -> None:
        super().__init__()
        self.net, self.steep = net("binary"), steep

    def forward(self, x: Tensor) -> Tensor:
        return self.net.fc((self.steep * self.net.trunk.before(x)).tanh())  # type: ignore[operator, union-attr, no-any-return]


class OwnForward(nn.Module):
    """Parts named ``features`` and ``logits``, and a forward that does more than call them."""

    def __init__(self) -> None:
        super().__init__()
        held = reference()
        self.features, self.logits = held.trunk, held.fc

    def forward(self, x: Tensor) -> Tensor:
        z = self.features(x)
        return self.logits(0.8 * z + 0.2 * z.roll(1, dims=1))  # type: ignore[no-any-return]


def rounded(defence: RoundedFeatures, x: Tensor, y: Tensor, ball: Ball) -> Tensor:
    """Through the features as they are, and rounded on the way there alone."""

    def decide(v: Tensor) -> Tensor:
        return defence.logits(defence.features(v))

    def passed(v: Tensor) -> Tensor:
        z = defence.features(v)
        return defence.net.logits(z) + (defence.logits(z) - defence.net.logits(z)).detach()

    return alone(decide, [defence.net, passed], x, y, ball)


def binary(defence: nn.Module, x: Tensor, y: Tensor, ball: Ball) -> Tensor:
    """Through the straight-through estimator of training, and through sigmoids of two widths."""

    def smooth(steep: float) -> Logits:
        return lambda v: defence.net.fc((steep * defence.net.trunk.before(v)).tanh())

    return alone(defence, [defence.net, smooth(1.0), smooth(4.0)], x, y, ball, effort=DEEP)


def codebook(defence: Codebook, x: Tensor, y: Tensor, ball: Ball) -> Tensor:
    """Through soft assignments, the straight-through form, and the features as they are."""

    def straight(v: Tensor) -> Tensor:
        z = defence.net.features(v)
        return defence.net.logits(z + (defence.near(z) - z).detach())

    def soft(v: Tensor) -> Tensor:
        return defence.net.logits(defence.soft(defence.net.features(v)))

    return alone(defence, [soft, straight, defence.net], x, y, ball, effort=DEEP)


def unhidden(defence: nn.Module, x: Tensor, y: Tensor, ball: Ball) -> Tensor:
    """Through the network without what hides its features."""
    return alone(defence, [defence.net], x, y, ball)


def k_winners(defence: nn.Module, x: Tensor, y: Tensor, ball: Ball) -> Tensor:
    """Through itself, and through its mean over eight points nearby."""
    draw = torch.Generator().manual_seed(0)

    def nearby(v: Tensor) -> Tensor:
        noise = 0.3 * ball.eps * torch.randn(8, *v.shape, generator=draw)
        return defence((v + noise).flatten(0, 1)).view(8, len(v), -1).mean(dim=0)  # type: ignore[no-any-return]

    return alone(defence, [defence, nearby], x, y, ball, effort=DEEP)


def numpy_features(defence: NumpyFeatures, x: Tensor, y: Tensor, ball: Ball) -> Tensor:
    """Through the same in torch."""

    def cleared(v: Tensor) -> Tensor:
        z = defence.net.features(v)
        return defence.net.logits(z * (z > defence.least))

    return alone(defence, [cleared, defence.net], x, y, ball)


def own_forward(defence: nn.Module, x: Tensor, y: Tensor, ball: Ball) -> Tensor:
    """Through the module itself, which hides nothing."""
    return alone(defence, [defence], x, y, ball)


DEFENCES = (
    Known("rounded-features", RoundedFeatures, rounded, masked="rounding", level="features", part=True),
    Known("sign-features", SignFeatures, binary, masked="sign", level="features"),
    Known("steep-features", SteepFeatures, binary, masked="saturation", level="features", part=True),
    Known("codebook", Codebook, codebook, masked="argmin, table", level="features"),
    Known("ripples", Ripples, unhidden, masked="shattered gradient", level="features", part=True),
    Known("half-detached-features", HalfDetachedFeatures, unhidden, masked="detach", level="features", part=True),
    Known("reversed-gradient", ReversedGradient, unhidden, masked="false backward", level="features", part=True),
    Known("numpy-features", NumpyFeatures, numpy_features, masked="NumPy", level="features"),
    Known("k-winners", lambda: net("k-winners"), k_winners, masked="discontinuity", level="features", part=True,
          eps=0.1, source="Xiao et al. 2020"),
    Known("own-forward", OwnForward, own_forward, masked="forward of its own", level="model", part=True),
)  # fmt: skip
