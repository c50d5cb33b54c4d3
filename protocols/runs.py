"""The runs of a protocol against one target: surrogate × loss × restart, then the query attack."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol as Interface

import torch
from msa_eval.protocols.spec import ApgdBudget, Protocol, SquareBudget
from msa_eval.protocols.trial import Batch, Trial
from msa_eval.surrogates import STE, Surrogate, get
from msa_eval.surrogates.registry import Own
from torch import Tensor

from msa_eval.attacks.apgd import apgd
from msa_eval.attacks.losses import LOSSES, MIN_CLASSES, TARGETED, most_likely_others, targeted_dlr
from msa_eval.attacks.square import square
from msa_eval.defense import Defense


class Attack(Interface):
    """A search on one trial: it returns its final points ``(B, C, H, W)`` and judges nothing."""

    def __call__(self, trial: Trial, generator: torch.Generator) -> Tensor:
        """Search."""
        ...


@dataclass(frozen=True)
class ApgdAttack:
    """APGD with one loss; ``target`` is the rank of the class a targeted loss pushes towards."""

    loss: str
    steps: int
    target: int = 0

    def __call__(self, trial: Trial, generator: torch.Generator) -> Tensor:
        """Return the points of highest surrogate loss."""
        batch = trial.batch
        if self.loss == TARGETED:
            loss = targeted_dlr(most_likely_others(trial.clean_logits(), batch.y, self.target))
        else:
            loss = LOSSES[self.loss]
        return apgd(
            trial, batch.x, batch.y, loss=loss, ball=trial.ball, steps=self.steps, generator=generator
        ).x  # fmt: skip


@dataclass(frozen=True)
class SquareAttack:
    """Square on the hard target, for the samples it gets right."""

    queries: int
    p_init: float

    def __call__(self, trial: Trial, generator: torch.Generator) -> Tensor:
        """Return the points kept last."""
        batch = trial.batch
        return square(
            trial,
            batch.x,
            batch.y,
            attacked=batch.correct,
            ball=trial.ball,
            queries=self.queries,
            p_init=self.p_init,
            generator=generator,
        )


@dataclass(frozen=True)
class Run:
    """One run: what is attacked, by what, from which start.

    Attributes:
        surrogate: what is attacked; ``None`` is the hard target itself.
        attack: the search.
        label: the attack's name, ``apgd`` or ``square``.
        loss: the loss's name.
        restart: which start, or which target class, from 0.
    """

    surrogate: Surrogate | None
    attack: Attack
    label: str
    loss: str
    restart: int

    @property
    def surrogate_name(self) -> str:
        """The surrogate's name, or ``target``."""
        return "target" if self.surrogate is None else self.surrogate.name

    @property
    def name(self) -> str:
        """Unique among the runs of a target."""
        return f"{self.surrogate_name}:{self.label}-{self.loss}:{self.restart}"

    def generator(self, *key: object) -> torch.Generator:
        """A generator of this run's own, the same whatever ran before it.

        Args:
            key: seed, target, context and batch.
        """
        text = "/".join(map(str, (*key, self.name)))
        seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
        return torch.Generator().manual_seed(seed)


@dataclass(frozen=True)
class Offers:
    """Which surrogates of a protocol a target has.

    Attributes:
        usable: those it has, in order.
        missing: the names of those it has not.
        sha256: over the usable ones' answers on a clean batch, so that a changed function is noticed.
    """

    usable: Sequence[Surrogate]
    missing: Sequence[str]
    sha256: str


def offer(
    budget: ApgdBudget, defense: Defense, batch: Batch, *, own: Mapping[str, Own], use_own: bool = True
) -> Offers:
    """Find the surrogates of a protocol that a defence can offer.

    A surrogate is offered when the defence has what it needs and a gradient reaches the images: a decision through a
    hard argmax has none. The caller's own come after the protocol's. Where none is left, ``ste`` is tried.

    Args:
        budget: names them.
        defense: the target.
        batch: a clean batch to try them on.
        own: the caller's own.
        use_own: whether they are for this target.

    Raises:
        ValueError: when a name is unknown, one of the caller's own has no gradient, or none is left.
    """
    names = [*budget.surrogates, *(name for name in own if name not in budget.surrogates)]
    known = [get(name, own) for name in names if use_own or name not in own]
    answers = {s.name: _answer(s, defense, batch) for s in known if s.applies(defense)}
    usable = [s for s in known if answers.get(s.name) is not None]
    if dull := [s.name for s in known if s.name in own and s not in usable]:
        raise ValueError(f"surrogate {dull[0]!r} has no gradient with respect to the images, so it can't be attacked")
    if not usable:
        answers["ste"] = _answer(STE, defense, batch)
        usable = [STE]
    if answers[usable[0].name] is None:
        raise ValueError(
            "no surrogate of the protocol has a gradient with respect to the images; give a differentiable one of "
            "your own (surrogates={...}), or a protocol with attack.square alone"
        )
    digest = hashlib.sha256()
    for surrogate in usable:
        answer = answers[surrogate.name]
        assert answer is not None
        digest.update(answer.float().cpu().contiguous().numpy().tobytes())
    return Offers(usable, [s.name for s in known if s not in usable], digest.hexdigest())


def _answer(surrogate: Surrogate, defense: Defense, batch: Batch) -> Tensor | None:
    """The surrogate's logits on a clean batch, or ``None`` where no gradient leads back to the images."""
    x = batch.x.detach().requires_grad_()
    logits = surrogate.logits(defense, x if surrogate.on_images else defense.features(x))
    if not logits.requires_grad:
        return None
    (gradient,) = torch.autograd.grad(logits.sum(), x, allow_unused=True)
    return None if gradient is None else logits.detach()


def plan_runs(protocol: Protocol, surrogates: Sequence[Surrogate], *, num_classes: int) -> list[Run]:
    """All runs of a protocol against one target, in the order they are made.

    Args:
        protocol: names losses and budgets.
        surrogates: those that the target offers.
        num_classes: k, which some losses need to be high enough.

    Raises:
        ValueError: when a loss needs more classes.
    """
    runs: list[Run] = []
    if protocol.apgd is not None:
        for loss in protocol.apgd.losses:
            if num_classes < MIN_CLASSES[loss]:
                raise ValueError(
                    f"the {loss} loss needs at least {MIN_CLASSES[loss]} classes, but the model has {num_classes}; "
                    f'use --set \'attack.apgd.losses=["ce", "margin"]\''
                )
        for surrogate in surrogates:
            runs += _apgd_runs(protocol.apgd, surrogate, num_classes)
    if protocol.square is not None:
        runs += _square_runs(protocol.square)
    return runs


def _apgd_runs(budget: ApgdBudget, surrogate: Surrogate, num_classes: int) -> list[Run]:
    runs = []
    for loss in budget.losses:
        count = min(budget.targets, num_classes - 1) if loss == TARGETED else budget.restarts
        for i in range(count):
            attack = ApgdAttack(loss, budget.steps, target=i)
            runs.append(Run(surrogate, attack, "apgd", loss, i))
    return runs


def _square_runs(budget: SquareBudget) -> list[Run]:
    attack = SquareAttack(budget.queries, budget.p_init)
    return [Run(None, attack, "square", "margin", i) for i in range(budget.restarts)]
