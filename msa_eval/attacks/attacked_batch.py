"""The batch under attack, as an attack sees it. Whoever writes an attack needs this page alone.

An attack is a search: it is given an `AttackedBatch` and a generator, asks the batch about points, and returns its
final ones. It judges nothing. The batch counts the passes, shows every point to the hard target in the batch it belongs
to, and holds it to the ball and the box.

>>> from msa_eval.attacks.ball import Ball
>>> def one_step(attacked: AttackedBatch, generator: torch.Generator) -> Tensor:
...     x = attacked.start.x.clone().requires_grad_()
...     other = attacked(x).scatter(1, attacked.batch.y.unsqueeze(1), -torch.inf).amax(dim=1)
...     own = attacked(x).gather(1, attacked.batch.y.unsqueeze(1)).squeeze(1)
...     (gradient,) = torch.autograd.grad((other - own).sum(), x)
...     step = attacked.ball.eps * attacked.ball.ascent(gradient)
...     return attacked.ball.project(x.detach() + step, attacked.batch.x)
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ClassVar
from typing import Protocol as Interface

import torch
from torch import Tensor

from msa_eval.attacks.ball import Ball
from msa_eval.attacks.batch import AdversarialBatch, Batch, CompanionPool
from msa_eval.attacks.external.faults import Fault
from msa_eval.defense.contexts import Companions
from msa_eval.defense.contract import Defense


class AttackedBatch(Interface):
    """A batch under attack. B images, of which some are searched for; k classes.

    Attributes:
        batch: the clean batch: images, labels, features, the hard target's logits.
        ball: the perturbation set.
        eot: ask for each point so many times, and average: the target answers at random where this is above 1.
        latest: the points asked about last, with their features.
        attached: their features ``(B, ...)``, with the gradient's way back to the images.
        ranking: the classes of each sample, nearest first ``(B, k)``, once they are ranked; later runs are given it.
        faults: of a third-party attack, what it did and should not have.
        found: the clean batch, where earlier runs ended, and their best points.
        pool: the images that companions are chosen from, where the attacker chooses them.
    """

    batch: Batch
    ball: Ball
    eot: int
    latest: AdversarialBatch
    attached: Tensor
    ranking: Tensor | None
    faults: tuple[Fault, ...]
    found: Sequence[AdversarialBatch]
    pool: CompanionPool | None

    @property
    def start(self) -> AdversarialBatch:
        """The points to start from; samples that are not searched for stay there."""
        ...

    @property
    def counted(self) -> Tensor:
        """The samples searched for by now ``(B,)``: the loss counts these alone."""
        ...

    @property
    def rows(self) -> Tensor:
        """Their places ``(n,)``."""
        ...

    @property
    def searching(self) -> bool:
        """Whether any sample is left to search for."""
        ...

    @property
    def stops_early(self) -> bool:
        """Whether a sample that is broken is searched for no more."""
        ...

    @property
    def rows_interact(self) -> bool:
        """Whether a row's loss may depend on other rows of the batch."""
        ...

    @property
    def among_others(self) -> bool:
        """Whether companions move, and each row counted stays as it is."""
        ...

    @property
    def ensemble(self) -> bool:
        """Whether several surrogates are attacked at once; logits are ``(S, B, k)`` then."""
        ...

    @property
    def target(self) -> Defense:
        """The hard target, to choose among cached features; what is chosen is judged by `judge`."""
        ...

    @property
    def broken(self) -> Tensor:
        """The samples broken so far ``(B,)``."""
        ...

    @property
    def margin(self) -> Tensor:
        """The lowest margin of each label so far ``(B,)``, in units of logits."""
        ...

    @property
    def forwards(self) -> int:
        """Images passed through the trunk so far."""
        ...

    def __call__(self, x: Tensor) -> Tensor:
        """The surrogate's logits ``(B, k)`` of points ``(B, C, H, W)``, with a gradient; the hard target sees them."""
        ...

    @property
    def has_copies(self) -> bool:
        """Whether several points of one row can be asked about at once."""
        ...

    def of_rows(self, places: Tensor | None = None) -> Callable[[Tensor], Tensor]:
        """The same for only the rows that are searched for, where each row is decided by itself.

        Args:
            places: those of the points ``(n,)``, where a row has several; the hard target sees all of them.
        """
        ...

    def clean_logits(self) -> Tensor:
        """The surrogate's logits of the clean batch; they cost no pass."""
        ...

    def propose(self, points: Tensor, rows: Tensor) -> Tensor:
        """Ask the hard target about new points ``(n, C, H, W)`` in some rows (a mask ``(B,)``): logits ``(B, k)``."""
        ...

    def accept(self, rows: Tensor) -> Tensor:
        """Keep these rows of the last proposal: the mixed batch's logits ``(B, k)``."""
        ...

    def regroup(self, companions: Companions) -> Tensor:
        """Seat other clean companions beside each row: the start's logits ``(B, k)`` among them."""
        ...

    def judge(self, x: Tensor) -> None:
        """Pass a batch of points ``(B, C, H, W)`` and judge it."""
        ...

    def search_for(self, rows: Tensor) -> None:
        """Go on with some rows (a mask ``(B,)``) alone."""
        ...

    def ask(self, x: Tensor, rows: Tensor) -> Tensor:
        """Logits ``(B, k)`` for a third-party attack, whose points may lie anywhere."""
        ...


class Attack(ABC):
    """A search on one batch: it returns its final points ``(B, C, H, W)`` and judges nothing.

    Attributes:
        label: what ``attacks.csv`` calls it.
        gradient_free: whether it follows no gradient, and asks the hard target alone.
        from_history: whether it searches among, or from, what earlier runs found, even where runs are separate.
    """

    label: ClassVar[str] = ""
    gradient_free: ClassVar[bool] = False
    from_history: ClassVar[bool] = False

    @property
    def name(self) -> str:
        """What the run is called by; a third-party attack's own name."""
        return self.label

    @abstractmethod
    def __call__(self, attacked: AttackedBatch, generator: torch.Generator, /) -> Tensor:
        """Search."""


@functools.cache
def _kinds() -> tuple[type[Attack], ...]:
    """The attacks of this folder that have a label."""
    for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
        importlib.import_module(f"{__package__}.{module.name}")
    return tuple(
        kind for kind in Attack.__subclasses__() if kind.label and kind.__module__.startswith(f"{__package__}.")
    )


def gradient_free() -> frozenset[str]:
    """The labels of attacks that follow no gradient.

    >>> sorted(gradient_free())
    ['spsa', 'square']
    """
    return frozenset(kind.label for kind in _kinds() if kind.gradient_free)


def from_history() -> frozenset[str]:
    """The labels of attacks that search among, or from, what earlier runs found.

    >>> sorted(from_history())
    ['composition', 'odds', 'overtime', 'pursuit', 'recombination']
    """
    return frozenset(kind.label for kind in _kinds() if kind.from_history)
