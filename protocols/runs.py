"""The runs of a protocol against one target: surrogate × loss × restart, then the query attack."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol as Interface

import torch
from msa_eval.protocols.spec import ApgdBudget, Protocol, SquareBudget
from msa_eval.protocols.trial import Trial
from msa_eval.surrogates import STE, Surrogate, get
from msa_eval.surrogates.registry import Decision
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


def applicable(
    budget: ApgdBudget, defense: Defense, own: Mapping[str, Decision | Surrogate]
) -> tuple[list[Surrogate], list[str]]:
    """The surrogates of a protocol that a defence can offer, and the names of those it can't.

    The caller's own come after the protocol's. Where none is left, ``ste``, which every defence has.

    Raises:
        ValueError: when a name is unknown.
    """
    names = [*budget.surrogates, *(name for name in own if name not in budget.surrogates)]
    known = [get(name, own) for name in names]
    usable = [surrogate for surrogate in known if surrogate.applies(defense)]
    missing = [surrogate.name for surrogate in known if not surrogate.applies(defense)]
    return usable or [STE], missing


def plan_runs(protocol: Protocol, surrogates: list[Surrogate], *, num_classes: int) -> list[Run]:
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
