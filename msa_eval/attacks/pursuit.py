"""Recombination and pursuit: every sample that stands gets a batch of its own, mixed from the points found so far.

A pursuit goes on from a mixture: a few steps that move the whole batch against one sample, whose points are mixed
anew.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from msa_eval.attacks.attacked_batch import Attack, AttackedBatch
from msa_eval.attacks.ball import per_image
from msa_eval.attacks.batch import AdversarialBatch
from msa_eval.attacks.companions import FIRST_STEP, LAST_STEP, MOMENTUM
from msa_eval.attacks.losses import by_likelihood, margin_loss
from msa_eval.attacks.mixtures import MixtureSearch
from msa_eval.surrogates.builtin import FC_ORACLE, FROZEN_ASSIGNMENT

STEPS = 10
"""Of a pursuit against one sample, from a mixture of the points found so far."""

GATHERING = 6
"""Steps towards each class, to begin with."""

STALLED = 0.9
"""A pursuit that leaves more than this share of the margin is followed by one from a random start."""

SURE = 1 / 8
"""An image is assigned safely where it leads by this share of the median clean FC margin."""

Rise = Callable[[Tensor, list[Tensor]], Tensor]
"""``(features, the surrogate's answers) -> ()``: what a step is to raise."""


@dataclass(frozen=True)
class PursuitAttack(Attack):
    """Mixtures of the points found so far, and steps from them against one sample at a time.

    Attributes:
        sweeps: how often, at first, each image of the batch is given another of its points, for each sample that
            stands.
        passes: of the whole batch, for steps; 0 for recombination alone.
        classes: towards so many of them, by how many images are near, every image is moved first.
    """

    label = "pursuit"
    from_history = True

    sweeps: int
    passes: int = 0
    classes: int = 0

    def __call__(self, attacked: AttackedBatch, generator: torch.Generator) -> Tensor:
        """Return the starting points; every batch put together is in the batch's record."""
        points, left = list(attacked.found), self.passes
        if FC_ORACLE.applies(attacked.target):
            for number in self._classes(attacked):
                if left >= (GATHERING + 1) * attacked.eot:
                    left -= gather(attacked, number, generator, points.append)
        mixtures = MixtureSearch(attacked, points, generator)
        for _ in range(self.sweeps):
            left -= mixtures.recombine()
        mixtures.narrow()
        pursuit = _Pursuit(mixtures)
        turn, needed = 0, (STEPS + 1) * attacked.eot + 1
        while left >= needed and len(rows := mixtures.nearest_first()):
            for row in rows[: -(-len(rows) // (1 + turn % 2))].tolist():  # every other turn, half of them
                if left >= needed and mixtures.is_unbroken(row):
                    left -= pursuit(row, turn)
            left -= mixtures.recombine()
            turn += 1
        return attacked.start.x

    def _classes(self, attacked: AttackedBatch) -> list[int]:
        """The classes that most images have as their label or next to it."""
        logits, y = attacked.batch.logits, attacked.batch.y
        next_to = logits.scatter(1, y.unsqueeze(1), -torch.inf).argmax(dim=1)
        many = torch.bincount(torch.cat([y, next_to]), minlength=logits.shape[1])
        order: list[int] = many.argsort(descending=True, stable=True).tolist()
        return order[: self.classes]


@dataclass(frozen=True)
class RecombinationAttack(Attack):
    """Mixtures of the points found so far, without passes.

    Attributes:
        sweeps: as in `PursuitAttack`.
    """

    label = "recombination"
    from_history = True

    sweeps: int

    def __call__(self, attacked: AttackedBatch, generator: torch.Generator) -> Tensor:
        """Return the starting points; every batch put together is in the batch's record."""
        return PursuitAttack(self.sweeps)(attacked, generator)


def gather(
    attacked: AttackedBatch, number: int, generator: torch.Generator, keep: Callable[[AdversarialBatch], object]
) -> int:
    """Move every image from a random start to where it is assigned to one class, as surely as may be; passes made."""
    target: Any = attacked.target
    y = torch.full_like(attacked.batch.y, number)
    start = attacked.ball.random(attacked.batch.x, generator)
    return ascend(attacked, start, GATHERING, lambda z, _: -margin_loss(target.fc_logits(z), y).sum(), keep)


class _Pursuit:
    """Steps of the whole batch against one sample at a time, towards one class.

    ``before`` holds what a sample led a class by when it was last pursued from there.
    """

    def __init__(self, mixtures: MixtureSearch) -> None:
        self.mixtures, self.attacked = mixtures, mixtures.attacked
        self.before: dict[tuple[int, int], float] = {}

    def __call__(self, row: int, turn: int) -> int:
        """Move the whole batch against one sample; its points join the others; passes made.

        It starts from the mixture, or at random where the last pursuit from there gained little: mixtures around one
        start end in the same place again and again. Two turns in four every image has a role of its own; the others
        follow the surrogates.
        """
        mixtures, attacked = self.mixtures, self.attacked
        order = mixtures.margin[row].argsort()
        aim = int(order[turn % len(order)])
        toward, margin = int(mixtures.aims[row, aim]), float(mixtures.margin[row, aim])
        anew = margin > STALLED * self.before.get((row, toward), torch.inf)
        self.before[row, toward] = torch.inf if anew else margin
        mixture = mixtures.mixture(row, aim)
        start = attacked.ball.random(attacked.batch.x, mixtures.generator) if anew else mixture.x
        y = int(attacked.batch.y[row])

        def follow(_: Tensor, answers: list[Tensor]) -> Tensor:
            logits = [answer[turn % len(answer)] if answer.ndim == 3 else answer for answer in answers]
            return torch.stack([answer[row, toward] - answer[row, y] for answer in logits]).sum()

        def keep(point: AdversarialBatch) -> bool:
            mixtures.add(point)
            if anew:
                mixtures.chosen[row, aim] = len(mixtures.points) - 1
            return not mixtures.is_unbroken(row)

        cast = turn % 4 < 2 and FC_ORACLE.applies(attacked.target) and FROZEN_ASSIGNMENT.applies(attacked.target)
        rise = roles(attacked, mixture.z, row, toward) if cast else follow
        return ascend(attacked, start, STEPS, rise, keep)


def roles(attacked: AttackedBatch, mixture: Tensor, row: int, toward: int) -> Rise:
    """What each image of a batch is to do against one sample.

    Companions assigned to the class aimed at stay there and draw its prototype to the sample. All others go into the
    label's class and draw its prototype away, each as far as it can without leaving. The sample itself moves against
    the rest of the mixture. Through a softmax the same gradient would hardly reach an image of a third class, and
    nothing would hold one in the class whose prototype it moves.

    Args:
        attacked: of a target that assigns by FC logits.
        mixture: features ``(B, ...)``.
        row: the sample.
        toward: the class aimed at.
    """
    target: Any = attacked.target
    y = int(attacked.batch.y[row])
    sure = SURE * _median_margin(target.fc_logits(attacked.batch.z))
    scale = _median_margin(attacked.batch.logits)
    assigned = target.fc_logits(mixture).argmax(dim=1)
    companion = torch.arange(len(assigned), device=assigned.device) != row

    def rise_of(z: Tensor) -> Tensor:
        logits = FROZEN_ASSIGNMENT.logits(target, z)
        return (logits[row, toward] - logits[row, y]) / scale

    with torch.enable_grad():
        leaf = mixture.detach().requires_grad_()
        (slope,) = torch.autograd.grad(rise_of(leaf), leaf)
    stays = assigned == toward
    classes = torch.where(stays, toward, y)
    # The prototype of a class moves with the mean of those in it, so all of them are drawn the same way.
    pulls = {k: slope[companion & (assigned == k)].sum(dim=0) for k in (y, toward)}
    pull = torch.where(per_image(stays, mixture), pulls[toward], pulls[y])

    def rise(z: Tensor, _: list[Tensor]) -> Tensor:
        inside = -margin_loss(target.fc_logits(z), classes) / sure
        parts = inside.clamp(max=1) + (z * pull).flatten(1).sum(dim=1)
        own = torch.where(per_image(companion, mixture), mixture, z)
        return parts[companion].sum() + rise_of(own)

    return rise


def ascend(
    attacked: AttackedBatch, start: Tensor, steps: int, rise: Rise, keep: Callable[[AdversarialBatch], object]
) -> int:
    """Steps with momentum, their length falling from ε to nearly nothing; passes made.

    Args:
        attacked: the batch under attack.
        start: points ``(B, C, H, W)``.
        steps: how many.
        rise: what to raise.
        keep: called with each point; ends the climb where it returns true.
    """
    ball, point, momentum = attacked.ball, start, torch.zeros_like(start)
    for step in range(steps + 1):
        point = point.detach().requires_grad_(step < steps)
        with torch.set_grad_enabled(step < steps):
            answers = [attacked(point) for _ in range(attacked.eot)]
            climbs = rise(attacked.attached, answers) if step < steps else None
        if keep(attacked.latest) or climbs is None:
            return (step + 1) * attacked.eot
        (gradient,) = torch.autograd.grad(climbs, point)
        momentum = MOMENTUM * momentum + ball.unit(gradient)
        length = ball.eps * (FIRST_STEP + (LAST_STEP - FIRST_STEP) * step / (steps - 1))
        point = ball.project(point.detach() + length * ball.ascent(momentum), attacked.batch.x)
    raise AssertionError("the last step returns")


def _median_margin(logits: Tensor) -> Tensor:
    return margin_loss(logits.float(), logits.argmax(dim=1)).abs().median().clamp(min=torch.finfo(torch.float32).tiny)


@dataclass(frozen=True)
class VictimAttack(Attack):
    """Steps of the whole batch against one sample at a time, towards each class in turn, the lowest margin first.

    They follow a surrogate's gradient and ask nothing else of a target, so they serve where no closed form says what
    another companion would change: for targets without a trunk, and for decisions that can only be asked.

    Attributes:
        passes: of the whole batch.
    """

    label = "pursuit"
    from_history = True

    passes: int

    def __call__(self, attacked: AttackedBatch, generator: torch.Generator) -> Tensor:
        """Return the starting points; every batch is in the batch's record."""
        search = _VictimSearch(attacked, generator)
        left, turn, needed = self.passes, 0, (STEPS + 1) * attacked.eot
        while left >= needed and len(rows := search.nearest_first()):
            for row in rows[: -(-len(rows) // (1 + turn % 2))].tolist():  # every other turn, half of them
                if left >= needed and search.is_unbroken(row):
                    left -= search.climb(row, turn)
            turn += 1
        return attacked.start.x


@dataclass
class _VictimSearch:
    """What is known of the samples of a batch.

    Attributes:
        attacked: the batch.
        generator: draws starts.
        lowest: each sample's lowest margin by the surrogate, seen while any of them was pursued ``(B,)``.
        nearest: the points it was seen at, and the class that came nearest there, by sample.
    """

    attacked: AttackedBatch
    generator: torch.Generator
    lowest: Tensor = field(init=False)
    nearest: dict[int, tuple[Tensor, int]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        batch = self.attacked.batch
        self.lowest = torch.full_like(batch.y, torch.inf, dtype=torch.float32)
        self.classes = by_likelihood(batch.logits, batch.y)

    def is_unbroken(self, row: int) -> bool:
        """Whether a sample is searched for, right and not yet broken."""
        attacked = self.attacked
        return bool((attacked.counted & attacked.batch.correct & ~attacked.broken)[row])

    def nearest_first(self) -> Tensor:
        """The samples of which that holds, the one with the lowest margin so far first."""
        attacked = self.attacked
        rows = (attacked.counted & attacked.batch.correct & ~attacked.broken).nonzero().flatten()
        return rows[attacked.margin[rows].argsort()]

    def climb(self, row: int, turn: int) -> int:
        """Move the whole batch against one sample; passes made.

        From a random start towards the next of the classes, the likeliest first; every third turn from where its margin
        was lowest, towards the class that came nearest there.
        """
        attacked = self.attacked
        y, again = int(attacked.batch.y[row]), turn % 3 == 2 and row in self.nearest
        if again:
            start, toward = self.nearest[row]
        else:
            rank = (turn - turn // 3) % (self.classes.shape[1] - 1)
            start, toward = attacked.ball.random(attacked.batch.x, self.generator), int(self.classes[row, rank])

        def rise(_: Tensor, answers: list[Tensor]) -> Tensor:
            logits = [answer[turn % len(answer)] if answer.ndim == 3 else answer for answer in answers]
            self._look(torch.stack(logits).mean(dim=0))
            return torch.stack([each[row, toward] - each[row, y] for each in logits]).sum()

        def keep(_: AdversarialBatch) -> bool:
            return not self.is_unbroken(row)

        return ascend(attacked, start, STEPS, rise, keep)

    def _look(self, logits: Tensor) -> None:
        """Note where the samples came nearest, by a surrogate's logits ``(B, k)``."""
        logits, y = logits.detach().float(), self.attacked.batch.y
        margin = -margin_loss(logits, y)
        other = logits.scatter(1, y.unsqueeze(1), -torch.inf).argmax(dim=1)
        for row in (margin < self.lowest).nonzero().flatten().tolist():
            self.nearest[row] = self.attacked.latest.x, int(other[row])
        self.lowest = torch.minimum(self.lowest, margin)
