"""Is a gradient true? How well it predicts the change of the hard target's margin, at steps of the size attacks take.

From points on clean images and points that a search has reached, the hard target is asked about steps forth and back
along random directions: signs of single pixels, and of squares of pixels, since a part of a defence may answer to one
of them alone. Half of the steps are made from a point nearby and are of another size: the part of a change that recurs
there is what a gradient can predict, and what does not recur (a class that flips in a batch, a value that is rounded
the other way) does not count against it. So honest discontinuity is not taken for masking.

With p the change that a gradient predicts, and d, d' the changes at a point and nearby, the figure is

    truth = <p, (d + d') / 2> / sqrt(<p, p> <d, d'>),

the cosine between the gradient and the hard target's own trend, its noise taken out; the products are sums over steps,
each sample's scaled by its own sizes.

References:
    Obfuscated Gradients Give a False Sense of Security (Athalye, Carlini & Wagner, 2018), arXiv:1802.00420, section 3.
    The correction is Spearman's for attenuation: The Proof and Measurement of Association between Two Things (1904).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from msa_eval.attacks.ball import Ball
from msa_eval.attacks.losses import margin_loss
from msa_eval.defense.contract import Defense, decide
from msa_eval.device import in_float64, onto
from msa_eval.randomness import seeded
from msa_eval.surrogates.registry import Surrogate

DIRECTIONS = 3
"""Of each kind, from each point, for `ROWS` samples or more; an ask each forth and back, from the point and nearby."""

ROWS = 24
"""Of fewer samples more directions are asked about, so that as many numbers add up to a figure."""

NEARBY, STEPS = 0.5, (0.75, 0.5)
"""How far away nearby is, and how long the steps are at a point and there, in units of ε."""

CLIMB = (1.0, 0.5, 0.25)
"""The steps to a point that a search reaches, in units of ε."""

LEAST_SIGNAL = 0.1
"""The share of the changes that is taken to recur at least: where less does, a figure is low, not large by chance."""


class Truth(NamedTuple):
    """How true a gradient is.

    Attributes:
        figure: from -1 to 1; 1 where it predicts whatever can be predicted, 0 where there is none.
        lowest: the same along the kind of directions, and at the kind of points, where it is lowest.
        signal: the share of the hard target's changes that recurs nearby, from 0 to 1.
    """

    figure: float
    lowest: float
    signal: float


@dataclass(frozen=True)
class _Step:
    """A step forth and back: between which points, and whether their order was turned."""

    point: int
    nearby: int
    kind: int
    forth: Tensor
    back: Tensor
    turned: Tensor


class HardResponse:
    """What the hard target answers to small steps; any number of gradients can be held to it.

    Args:
        defense: the target.
        x: images ``(B, C, H, W)``; the whole batch where a decision looks at companions.
        y: labels ``(B,)``.
        ball: the protocol's.
        counted: the samples that the figure is of ``(B,)``.
        climber: whose gradient leads to the points of a search; random ones without it.
        interacting: whether a sample's margin may depend on companions.
        seed: of the steps.
        draws: answers averaged, of a target that answers at random; their seeds are the same at all points.

    Attributes:
        defense: the target.
        points: the clean images, and points of a short search from them.
    """

    def __init__(
        self,
        defense: Defense,
        x: Tensor,
        y: Tensor,
        ball: Ball,
        *,
        counted: Tensor | None = None,
        climber: Surrogate | None = None,
        interacting: bool = False,
        seed: int = 0,
        draws: int = 1,
    ) -> None:
        self.defense, self._x, self._y, self._ball = defense, x, y, ball
        self._counted = torch.ones_like(y, dtype=torch.bool) if counted is None else counted
        self._seed, self._draws = seed, draws
        one = (len(x), *[1] * (x.ndim - 1))
        # Where rows are decided apart a second gradient would be the first.
        self._signs = [self._random_signs(self._generator(7 + i), one) for i in range(2 if interacting else 1)]
        self.points = [x, self._reached(climber)]
        self._directions = DIRECTIONS * max(1, min(4, round(ROWS / max(int(self._counted.sum()), 1))))
        changes = [self.margin_loss(step.forth) - self.margin_loss(step.back) for step in self._steps()]
        self._changes = torch.stack(changes).view(2, 2, self._directions, 2, -1)

    def margin_loss(self, x: Tensor) -> Tensor:
        """The hard margin of each sample ``(B,)``: positive where it is wrong, by a hair where a tie makes it so."""
        total = torch.zeros_like(x[:, 0].flatten(1)[:, 0])
        for draw in range(self._draws):
            with seeded(self._seed + draw), torch.no_grad():
                logits = decide(self.defense, self.defense.features(x))
            value, wrong = margin_loss(logits, self._y), logits.argmax(dim=1) != self._y
            total = total + torch.where(wrong, value.clamp_min(1e-20), value).nan_to_num(0.0, 0.0, 0.0)
        return total / self._draws

    def truth_of(self, surrogate: Surrogate) -> Truth:
        """Hold a surrogate's gradient to the answers."""
        predicted = torch.stack([self._predicted(surrogate, signs) for signs in self._signs])
        # A step nearby may be of another length and turned round: both its changes are brought to the first one's.
        kinds = [self._truth(predicted[:, i, j], self._changes[i, j]) for i in range(2) for j in range(2)]
        whole = self._truth(predicted.flatten(1, 3), self._changes.flatten(0, 2))
        return Truth(whole.figure, min(kind.figure for kind in kinds), whole.signal)

    def _predicted(self, surrogate: Surrogate, signs: Tensor) -> Tensor:
        """What the gradient predicts of each step, shaped as the changes are."""
        gradients = [self.gradient(surrogate, x, signs) for x in self.points]
        steps = ((gradients[step.point] * (step.forth - step.back)).flatten(1).sum(dim=1) for step in self._steps())
        return torch.stack(list(steps)).view(self._changes.shape)

    def gradient(self, surrogate: Surrogate, x: Tensor, signs: Tensor | None = None) -> Tensor:
        """The gradient of each sample's margin ``(B, C, H, W)``; zero where there is none.

        In a batch the margins of companions are added with random signs ``(B, 1, ...)``, so that they make noise,
        and no trend; two such gradients tell how much noise that is.
        """
        signs, total = self._signs[0] if signs is None else signs, torch.zeros_like(x)
        for draw in range(self._draws):
            leaf = x.detach().clone().requires_grad_()
            with seeded(self._seed + draw), torch.enable_grad():
                logits = surrogate.logits(self.defense, leaf if surrogate.on_images else self.defense.features(leaf))
                if not logits.requires_grad:
                    continue
                value = (margin_loss(logits.float(), self._y) * signs.flatten()).sum()
                (found,) = torch.autograd.grad(value, leaf, allow_unused=True)
            total = total if found is None else total + found
        return (total * signs).nan_to_num(0.0, 0.0, 0.0)

    def _truth(self, predicted: Tensor, changes: Tensor) -> Truth:
        """From predictions ``(1 or 2, D, 2, B)`` and changes ``(D, 2, B)``: of a step, at the point and nearby."""
        # Unit lengths: a step's change by its length.
        p, d = (in_float64(values[..., self._counted]) for values in (predicted, changes))
        lengths = torch.tensor(STEPS, device=d.device).view(1, 2, 1)
        p, d = p / lengths, d / lengths
        size_p = p.pow(2).sum(dim=(1, 2)).prod(dim=0).pow(1 / len(p)).clamp_min(1e-30)
        size_d = d.pow(2).sum(dim=(0, 1)).clamp_min(1e-30)
        moved = d.pow(2).sum(dim=(0, 1)) > 0
        if not bool(moved.any()):
            return Truth(0.0, 0.0, 0.0)
        recurring = float((2 * (d[:, 0] * d[:, 1]).sum(dim=0) / size_d)[moved].mean())
        steady = float(((p[0] * p[-1]).sum(dim=(0, 1)) / size_p)[moved].mean())
        explained = float(((p.mean(dim=0) * d).sum(dim=(0, 1)) / (size_p * size_d).sqrt())[moved].mean())
        figure = explained / (max(recurring, LEAST_SIGNAL) * max(steady, LEAST_SIGNAL)) ** 0.5
        signal = recurring * float(moved.double().mean())
        return Truth(max(-1.0, min(1.0, figure)), 0.0, max(0.0, min(1.0, signal)))

    def _steps(self) -> Iterator[_Step]:
        """All steps, the same each time they are asked for: none is kept, since images may be large."""
        generator = self._generator(1)
        for point, x in enumerate(self.points):
            for kind in range(2):
                for _ in range(self._directions):
                    direction = self._direction(generator, kind)
                    for nearby in range(2):
                        # Turned round at random, so that companions' steps make no trend either.
                        turn = self._random_signs(generator, self._signs[0].shape)
                        start = x
                        if nearby:
                            away = self._random_signs(generator, x.shape)
                            start = (x + NEARBY * self._ball.eps * self._ball.unit(away)).clamp(0, 1)
                        move = STEPS[nearby] * self._ball.eps * turn * direction
                        forth, back = (start + move).clamp(0, 1), (start - move).clamp(0, 1)
                        at = (turn > 0).expand_as(x)
                        yield _Step(
                            point, nearby, kind, torch.where(at, forth, back), torch.where(at, back, forth), turn
                        )

    def _reached(self, climber: Surrogate | None) -> Tensor:
        """A point of a short search from each image."""
        x, ball = self._x, self._ball
        if climber is None:
            return ball.random(x, self._generator(2))
        point = x
        for step in CLIMB:
            point = ball.project(point + step * ball.eps * ball.ascent(self.gradient(climber, point)), x)
        return point

    def _direction(self, generator: torch.Generator, kind: int) -> Tensor:
        """A direction of norm 1 for each image: signs of single pixels, or of squares of them."""
        x = self._x
        if kind == 0 or x.ndim != 4:
            return self._ball.unit(self._random_signs(generator, x.shape))
        height, width = (max(2, min(8, round(size / 3))) for size in x.shape[-2:])
        signs = self._random_signs(generator, (*x.shape[:2], height, width))
        return self._ball.unit(F.interpolate(signs, x.shape[-2:], mode="nearest"))

    def _random_signs(self, generator: torch.Generator, shape: tuple[int, ...] | torch.Size) -> Tensor:
        return onto(torch.randint(0, 2, tuple(shape), generator=generator) * 2.0 - 1, self._x.device).to(self._x.dtype)

    def _generator(self, purpose: int) -> torch.Generator:
        return torch.Generator().manual_seed((self._seed * 1000 + purpose) % 2**63)
