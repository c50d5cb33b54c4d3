"""What a run goes by on a batch: how it was set up, and where its search stands."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from msa_eval.attacks.batch import AdversarialBatch, Batch, CompanionPool, PartialBatch
from msa_eval.defense.contexts import AmongOthers, OneAtATime
from msa_eval.defense.contract import Defense
from msa_eval.defense.precision import EXACT, SearchPrecision
from msa_eval.surrogates.ensemble import Ensemble
from msa_eval.surrogates.registry import Surrogate


@dataclass(frozen=True)
class Setting:
    """How a run meets a batch; the defaults are a run of its own on the clean batch.

    Attributes:
        start: the points that later steps may start from, and that samples not searched for stay at.
        counted: the samples searched for ``(B,)``, which the attack's loss counts; the rest only are their companions.
            Without it all are, but where rows are decided apart only those that are right on the clean batch.
        stays: whether the rest stay where they are also where rows are decided together, and so cost no pass.
        early_stop: whether a sample stays where it broke from there on; for rows decided apart, or with ``stays``.
        known: the samples broken before ``(B,)``, of which no finding is due.
        view: in ``joint``, the target seen by each row that stays while its companions move: what the surrogate
            attacks, judged beside the batch.
        draws: verdicts of a stochastic target are by the majority of so many, an odd number, and a break by a clear one
            of `CONFIRM` times as many more.
        eot: the attack asks for each point so many times, for an expectation over a stochastic target's draws.
        keep: whether findings are kept.
        nearest: whether the batches in which each sample comes nearest to falling are kept.
        trail: whether the points of every iterate are kept, for a pursuit to mix.
        search: how the search passes its points; what it seems to break is passed again, as the target is.
        ranking: the classes of each sample, nearest first ``(B, k)``, where an earlier run ranked them.
        found: the clean batch, where earlier runs ended, and their best points.
        pool: the images that companions are chosen from, where the attacker chooses them.
    """

    start: AdversarialBatch | None = None
    counted: Tensor | None = None
    stays: bool = False
    early_stop: bool = False
    known: Tensor | None = None
    view: AmongOthers | None = None
    draws: int = 1
    eot: int = 1
    keep: bool = False
    nearest: bool = False
    trail: bool = False
    search: SearchPrecision = EXACT
    ranking: Tensor | None = None
    found: Sequence[AdversarialBatch] = ()
    pool: CompanionPool | None = None


@dataclass(frozen=True)
class Answered:
    """A batch of points and the target's logits."""

    point: AdversarialBatch | PartialBatch
    logits: Tensor


class SearchState:
    """Where a search stands. The judged batch changes it; passes and verdicts go by it.

    Args:
        defense: the hard target.
        surrogate: what a gradient attack attacks; ``None`` for an attack on the target itself.
        batch: the clean batch.
        setting: how the run meets it.
        mixes_rows: whether the target's decision may look at the whole batch.

    Attributes:
        target: the hard target, among the companions that the attacker chose last.
        view: in ``joint``, the target seen by each row that stays while its companions move, judged beside the batch.
        attacked: what the surrogate stands for: the view, or the target.
        apart: whether rows are decided apart from each other.
        rough: whether points come with features of the search's own, which no verdict may rest on.
        stays: whether what is not searched for stays at the start, and costs no pass.
        stops_early: whether a sample that is broken is searched for no more.
        start: the points that the search starts from, and that all others stay at.
        counted: the samples searched for by now ``(B,)``.
        rows: their places ``(n,)``.
        moving: the same where the others cost no pass; else ``None``, and all rows are passed.
        passed: the samples searched for in the latest pass ``(B,)``.
        kept: the batch that proposals are made from, and the target's answer to it.
        iterate: the number of the latest batch shown, from 0.
    """

    def __init__(
        self,
        defense: Defense,
        surrogate: Surrogate | Ensemble | None,
        batch: Batch,
        setting: Setting,
        *,
        mixes_rows: bool,
    ) -> None:
        self.target = defense
        self.view = setting.view
        self.attacked: Defense = setting.view or defense
        self.mixes_rows = mixes_rows
        # A surrogate on images has no use for rounded features.
        self.rough = setting.search.rough and not (surrogate is not None and surrogate.on_images)
        # Rows decided apart need no pass unless they are searched for, and none if they are wrong already.
        self.apart = not mixes_rows or isinstance(self.attacked, OneAtATime)
        everyone = batch.correct if self.apart else torch.ones_like(batch.correct)
        self.counted = everyone if setting.counted is None else setting.counted
        self.stays = self.apart or setting.stays
        self.stops_early = self.stays and setting.early_stop and self.view is None
        self.rows = self.counted.nonzero().flatten()
        self.moving = self.rows if self.stays and len(self.rows) < len(batch.y) else None
        self.passed = self.counted
        self.start = setting.start or AdversarialBatch(batch.x, batch.z)
        self.kept = Answered(self.start, batch.logits)
        self.iterate = -1

    @property
    def among_others(self) -> bool:
        """Whether companions move and each row counted stays as it is."""
        return isinstance(self.attacked, AmongOthers)

    def search_for(self, counted: Tensor) -> None:
        """Go on with some rows (a mask ``(B,)``); the others go back to the start."""
        self.counted = counted
        self.rows = counted.nonzero().flatten()
        self.moving = self.rows if self.stays else None

    def among_companions(self, target: Defense) -> None:
        """Go on with the target among other companions."""
        self.target = self.attacked = target
