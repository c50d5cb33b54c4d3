"""Defences that mask their gradient after the network, at the level of logits."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from msa_eval import Samples
from msa_eval.attacks import Ball

from .adaptive import alone
from .known import Known, digits
from .nets import net, reference


class OneHot(nn.Module):
    """The predicted class and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.net = reference()

    def forward(self, x: Tensor) -> Tensor:
        return F.one_hot(self.net(x).argmax(dim=1), 10).float()


class RoundedLogits(nn.Module):
    """Logits to whole steps, and the detached remainder to break ties."""

    def __init__(self, grid: float = 1.0) -> None:
        super().__init__()
        self.net, self.grid = reference(), grid

    def forward(self, x: Tensor) -> Tensor:
        out = self.net(x)
        return (out / self.grid).round() * self.grid + 1e-3 * out.detach()


class Cold(nn.Module):
    """Probabilities at a temperature of 1/200: they are 0 and 1 in float32 (Papernot et al. 2016)."""

    def __init__(self) -> None:
        super().__init__()
        self.net = reference()

    def forward(self, x: Tensor) -> Tensor:
        return (200 * self.net(x)).softmax(dim=1)


class Clipped(nn.Module):
    """Logits cut off at ±1, so that most have no gradient; what was cut off counts a little, detached."""

    def __init__(self) -> None:
        super().__init__()
        self.net = reference()

    def forward(self, x: Tensor) -> Tensor:
        out = self.net(x)
        return out.clamp(-1, 1) + 1e-4 * out.detach()


class SineLead(nn.Module):
    """The lead of the predicted class is replaced by one that misleads whoever lowers it; the prediction stays.

    After AAA (Chen et al. 2022, arXiv:2205.12134), with its sine target, in closed form in place of inner steps.
    """

    def __init__(self, period: float = 3.0, depth: float = 0.7) -> None:
        super().__init__()
        self.net, self.period, self.depth = reference(), period, depth

    def forward(self, x: Tensor) -> Tensor:
        out = self.net(x)
        top = out.topk(2, dim=1)
        held = top.values[:, 0] - top.values[:, 1]
        centre = ((held / self.period).floor() + 0.5) * self.period
        shown = centre - self.depth * self.period * (torch.pi * (1 - 2 * (held - centre) / self.period)).sin()
        shown = shown.clamp(min=1e-3)
        moved = (top.values[:, 1] + shown).unsqueeze(1)
        return out.scatter(1, top.indices[:, :1], moved)


class HardVotes(nn.Module):
    """Five networks vote for a class each; ties go to the first network, by detached probabilities."""

    def __init__(self) -> None:
        super().__init__()
        self.nets = nn.ModuleList([reference(), *(net(name) for name in ("trades", "tanh", "mlp", "batch-norm"))])

    def forward(self, x: Tensor) -> Tensor:
        votes = torch.stack([F.one_hot(member(x).argmax(dim=1), 10) for member in self.nets]).sum(dim=0)
        return votes + 0.1 * self.nets[0](x).softmax(dim=1).detach()


class HalfDetachedLogits(nn.Module):
    """The logits of every second class are detached."""

    def __init__(self) -> None:
        super().__init__()
        self.net = reference()

    def forward(self, x: Tensor) -> Tensor:
        out = self.net(x)
        keep = (torch.arange(10) % 2 == 0).to(out.dtype)
        return keep * out + (1 - keep) * out.detach()


def shifted() -> Samples:
    """The digits with another order of classes."""
    data = digits()
    return Samples(data.x, (data.y + 1) % 10, "digits, labels shifted by one")


def inner(defence: nn.Module, x: Tensor, y: Tensor, ball: Ball) -> Tensor:
    """Through the network's own logits, which decide as the defence does."""
    return alone(defence, [defence.net], x, y, ball, score=defence.net)


def voted(defence: HardVotes, x: Tensor, y: Tensor, ball: Ball) -> Tensor:
    """Through the mean of the members' probabilities and logits, and of all but one member's."""

    def counted(v: Tensor) -> Tensor:
        return torch.stack([(4 * member(v)).softmax(dim=1) for member in defence.nets]).sum(dim=0).log()

    def mean(v: Tensor) -> Tensor:
        return torch.stack([member(v).log_softmax(dim=1) for member in defence.nets]).mean(dim=0)

    def three(members: tuple[int, ...]) -> object:
        return lambda v: torch.stack([defence.nets[i](v).log_softmax(dim=1) for i in members]).mean(dim=0)

    triples = [three(members) for members in ((0, 1, 2), (0, 3, 4))]
    return alone(defence, [counted, mean, *triples], x, y, ball, score=counted)  # type: ignore[list-item]


DEFENCES = (
    Known("one-hot", OneHot, inner, masked="argmax", level="logits"),
    Known("rounded-logits", RoundedLogits, inner, masked="rounding", level="logits"),
    Known("cold-softmax", Cold, inner, masked="saturation", level="logits", source="Papernot et al. 2016"),
    Known("clipped-logits", Clipped, inner, masked="saturation", level="logits", part=True),
    Known("sine-lead", SineLead, inner, masked="false lead", level="logits", part=True, source="Chen et al. 2022"),
    Known("hard-votes", HardVotes, voted, masked="argmax, counts", level="logits"),
    Known("half-detached-logits", HalfDetachedLogits, inner, masked="detach", level="logits", part=True),
    Known("labels-shifted", reference, lambda d, x, y, ball: alone(d, [d], x, y, ball), masked="another class order",
          level="model", never_sound=True, samples=shifted),
)  # fmt: skip
