"""Defences that hide nothing."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from msa_eval.attacks import Ball

from .adaptive import alone
from .exact import additive, linear_l2
from .known import Attack, Known
from .nets import net, reference, training_set


class Ensemble(nn.Module):
    """The mean of the logits of three networks."""

    def __init__(self) -> None:
        super().__init__()
        self.nets = nn.ModuleList([reference(), net("trades"), net("tanh")])

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([member(x) for member in self.nets]).mean(dim=0)


class Quantised(nn.Module):
    """Images on a grid of 1/16, with a straight-through estimator of its own: a `detach` that is not to be undone."""

    def __init__(self) -> None:
        super().__init__()
        self.net = reference()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x + ((x * 16).round() / 16 - x).detach())


class Probabilities(nn.Module):
    """Logarithms of probabilities."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net("trades")

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).log_softmax(dim=1)


class ClassMeans(nn.Module):
    """Distances to the class means of training, in pixels: no parameters."""

    def __init__(self) -> None:
        super().__init__()
        data = training_set()
        self.means = torch.stack([data.x[data.y == c].mean(0).flatten() for c in range(10)])

    def forward(self, x: Tensor) -> Tensor:
        return -torch.cdist(x.flatten(1), self.means)


def itself(defence: nn.Module, x: Tensor, y: Tensor, ball: Ball) -> Tensor:
    """Through itself."""
    return alone(defence, [defence], x, y, ball)


def of_net(name: str) -> Attack:
    """The closed form of a linear network."""

    def attack(defence: nn.Module, x: Tensor, y: Tensor, ball: Ball) -> Tensor:
        if ball.norm == "L2":
            layer = net(name)[1]  # type: ignore[index]
            return linear_l2(layer.weight.detach(), layer.bias.detach(), x, y, ball)
        return additive(defence.double(), x, y, ball, torch.tensor([0.0, 1.0]))

    return attack


def class_means(defence: ClassMeans, x: Tensor, y: Tensor, ball: Ball) -> Tensor:
    """Squared distances differ by a linear function, so the closed form is that of a linear network."""
    means = defence.means.double()
    layer = nn.Linear(64, 10).double()
    with torch.no_grad():
        layer.weight.copy_(2 * means)
        layer.bias.copy_(-(means**2).sum(dim=1))
    return additive(lambda v: layer(v.flatten(1)), x, y, ball, torch.tensor([0.0, 1.0]))


DEFENCES = (
    Known("adversarial-cnn", reference, itself),
    Known("natural-cnn", lambda: net("natural"), itself, eps=0.05),
    Known("trades-cnn", lambda: net("trades"), itself),
    Known("tanh-cnn", lambda: net("tanh"), itself),
    Known("mlp", lambda: net("mlp"), itself),
    Known("batch-norm-cnn", lambda: net("batch-norm"), itself),
    Known("linear", lambda: net("linear"), of_net("linear"), exact=True, eps=0.1),
    Known("linear-l2", lambda: net("linear"), of_net("linear"), exact=True, norm="L2", eps=0.5),
    Known("class-means", ClassMeans, class_means, exact=True, eps=0.05),
    Known("ensemble", Ensemble, itself),
    Known("quantised", Quantised, itself),
    Known("log-probabilities", Probabilities, itself),
)
