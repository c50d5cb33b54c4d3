"""Defences that draw at random at each answer."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from msa_eval import Samples
from msa_eval.attacks import Ball

from .adaptive import Logits, by_expectation
from .exact import additive
from .known import Known, digits
from .nets import net, reference, training_features


class NoisyInput(nn.Module):
    """Gaussian noise on the image."""

    def __init__(self, scale: float = 0.15) -> None:
        super().__init__()
        self.net, self.scale = reference(), scale

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x + self.scale * torch.randn_like(x))


class NoisyFeatures:
    """Gaussian noise on the features, before the decision."""

    def __init__(self, scale: float = 0.5) -> None:
        self.net, self.scale = reference(), scale * float(training_features().std())

    def features(self, x: Tensor) -> Tensor:
        return self.net.features(x)

    def logits(self, z: Tensor) -> Tensor:
        return self.net.logits(z + self.scale * torch.randn_like(z))


class RandomShift(nn.Module):
    """Each image is moved by up to a pixel each way (Xie et al. 2018, arXiv:1711.01991, without resizing)."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net("batch-norm")

    def forward(self, x: Tensor) -> Tensor:
        ways = torch.randint(0, 3, (len(x), 2))
        padded = F.pad(x, (1, 1, 1, 1))
        rows = (ways[:, :1] + torch.arange(8)).view(-1, 1, 8, 1).expand(-1, x.shape[1], 8, 10)
        columns = (ways[:, 1:] + torch.arange(8)).view(-1, 1, 1, 8).expand(-1, x.shape[1], 8, 8)
        return self.net(padded.gather(2, rows).gather(3, columns))


class Dropped:
    """Features are dropped at random, at test time too."""

    def __init__(self, share: float = 0.3) -> None:
        self.net, self.share = reference(), share

    def features(self, x: Tensor) -> Tensor:
        return self.net.features(x)

    def logits(self, z: Tensor) -> Tensor:
        return self.net.logits(F.dropout(z, self.share, training=True))


class Dithered(nn.Module):
    """Pixels are rounded to four levels, up or down at random."""

    def __init__(self) -> None:
        super().__init__()
        self.net = reference()

    def clean(self, x: Tensor) -> Tensor:
        return (3 * x + torch.rand_like(x)).floor().clamp(0, 3) / 3

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.clean(x))


class HiddenNoise(nn.Module):
    """Noise on the image, an outside denoiser under ``no_grad``, and a vote of four such."""

    def __init__(self, scale: float = 0.1) -> None:
        super().__init__()
        self.net, self.scale = reference(), scale

    def forward(self, x: Tensor) -> Tensor:
        votes = torch.zeros(len(x), 10)
        with torch.no_grad():
            for _ in range(4):
                votes += self.net((x + self.scale * torch.randn_like(x)).clamp(0, 1)).softmax(dim=1)
        return votes / 4


class NoisyLinear(nn.Module):
    """Two classes, a linear model and noise on the image that is the same either way: most answers are its sign."""

    def __init__(self, scale: float = 0.1) -> None:
        super().__init__()
        self.net, self.scale = net("linear"), scale

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x + self.scale * torch.randn_like(x))[:, [3, 8]]


def two_classes() -> Samples:
    """Threes and eights, as classes 0 and 1."""
    data = digits(320)
    rows = ((data.y == 3) | (data.y == 8)).nonzero().flatten()[:60]
    return Samples(data.x[rows], (data.y[rows] == 8).long(), "digits 3 and 8")


def drawn(defence: object, x: Tensor, y: Tensor, ball: Ball) -> Tensor:
    """Through single draws of itself."""
    route = defence if isinstance(defence, nn.Module) else _parts(defence)
    return by_expectation(route, [route], x, y, ball)


def _parts(defence: object) -> Logits:
    return lambda v: defence.logits(defence.features(v))  # type: ignore[attr-defined, no-any-return]


def dithered(defence: Dithered, x: Tensor, y: Tensor, ball: Ball) -> Tensor:
    """Rounded on the way there alone."""
    return by_expectation(defence, [lambda v: defence.net(v + (defence.clean(v) - v).detach())], x, y, ball)


def hidden(defence: HiddenNoise, x: Tensor, y: Tensor, ball: Ball) -> Tensor:
    """Through one noisy image, with its gradient."""

    def one(v: Tensor) -> Tensor:
        return defence.net((v + defence.scale * torch.randn_like(v)).clamp(0, 1))

    return by_expectation(defence, [one], x, y, ball)


def by_sign(defence: NoisyLinear, x: Tensor, y: Tensor, ball: Ball) -> Tensor:
    """In closed form: the noise of the lead is symmetric, so most answers are those without noise."""
    model = defence.net.double()
    return additive(lambda v: model(v)[:, [3, 8]], x, y, ball, torch.tensor([0.0, 1.0]))


DEFENCES = (
    Known("noisy-input", NoisyInput, drawn, behaviour="stochastic", source="Cohen et al. 2019"),
    Known("noisy-features", NoisyFeatures, drawn, behaviour="stochastic"),
    Known("random-shift", RandomShift, drawn, behaviour="stochastic", source="Xie et al. 2018"),
    Known("dropped-features", Dropped, drawn, behaviour="stochastic"),
    Known("noisy-linear", NoisyLinear, by_sign, behaviour="stochastic", exact=True, samples=two_classes),
    Known("dithering", Dithered, dithered, masked="random rounding", level="pixels", behaviour="stochastic"),
    Known("hidden-noise", HiddenNoise, hidden, masked="no_grad, votes", level="model", behaviour="stochastic"),
)
