"""Verdicts on the batches of a run: the hard target decides, and what it seems to break is confirmed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from msa_eval.attacks.batch import AdversarialBatch, Batch, PartialBatch
from msa_eval.defense.contexts import AmongOthers, OneAtATime
from msa_eval.defense.contract import Defense
from msa_eval.judging.break_record import BreakRecord
from msa_eval.judging.deferred import Deferred
from msa_eval.judging.majority import CONFIRM, CONFIRM_SIGMAS, decide_by_majority
from msa_eval.judging.passes import Passes
from msa_eval.judging.search_state import Answered, SearchState, Setting
from msa_eval.surrogates.builtin import STE
from msa_eval.surrogates.ensemble import Ensemble
from msa_eval.surrogates.registry import Surrogate


class Judge:
    """The verdicts of the hard target.

    Args:
        surrogate: what a gradient attack attacks; ``None`` for an attack on the target itself.
        batch: the clean batch.
        setting: how the run meets it.
        state: where the search stands.
        passes: make features again where a verdict needs the target's own.
        record: is given all verdicts.
        later: for what depends on their values.
        judged: is called with each batch of points whose verdict was entered.

    Attributes:
        decisions: rows decided by the hard target so far.
    """

    def __init__(
        self,
        surrogate: Surrogate | Ensemble | None,
        batch: Batch,
        setting: Setting,
        state: SearchState,
        passes: Passes,
        record: BreakRecord,
        later: Deferred,
        judged: Callable[[AdversarialBatch], None],
    ) -> None:
        self._surrogate, self.batch, self.setting, self.state = surrogate, batch, setting, state
        self._passes, self._record, self._later, self._judged = passes, record, later, judged
        self.decisions = 0

    def decide(self, target: Defense, z: Tensor, rows: Tensor | None = None) -> Tensor:
        """Ask the hard target; a stochastic one is asked again, and more often, before a break is believed."""
        draws = self.setting.draws
        y, doubt = self.batch.y, self.batch.correct
        if rows is not None:
            y, doubt = y[rows], doubt[rows]
        self.decisions += len(z) * draws
        logits = decide_by_majority(target, z, y, draws=draws)
        if draws > 1 and bool((claimed := doubt & (logits.argmax(dim=1) != y)).any()):
            self.decisions += len(z) * draws * CONFIRM
            again = decide_by_majority(target, z, y, draws=draws * CONFIRM, sigmas=CONFIRM_SIGMAS)
            logits = torch.where(claimed.unsqueeze(1), again, logits)
        return logits

    def believed(
        self, point: AdversarialBatch | PartialBatch, rows: Tensor, *, confirmed: bool, copied: bool = False
    ) -> Answered:
        """Decide a batch put together from cached features; what it claims is confirmed by a pass of the whole.

        Args:
            point: the batch.
            rows: those that are new in it ``(B,)``.
            confirmed: whether all its features are the target's own, made in one pass.
            copied: whether its images are written over later.
        """
        if self.state.mixes_rows:
            logits = self.decide(self.state.target, point.z)
        else:
            logits = self._decide_some(point.z, rows, self.state.kept.logits)
        claimed = not confirmed and bool(self._record.claims(logits))
        if claimed:
            point = self._passes.exact(point, copied=copied)
            logits = self.decide(self.state.target, point.z)
        if claimed or not self.state.rough:
            self.enter(point, logits, claims=claimed or confirmed)
        else:
            self._record.prefer(point, logits, companions_of(self.state.target))
        return Answered(point, logits)

    def iterate(self, point: AdversarialBatch, logits: Tensor) -> None:
        """Judge an iterate of a gradient attack in its batch and, where companions move, beside each row that stays.

        Args:
            point: the batch.
            logits: the surrogate's.
        """
        state = self.state
        if state.rough:
            self.rough(point)
            return
        # The naive surrogate is the target's own decision on these features: its value is the verdict.
        if self._surrogate == STE and state.view is None and self.setting.draws == 1 and state.moving is None:
            verdict = logits.float()
        elif state.moving is None or (state.mixes_rows and state.apart):
            verdict = self.decide(state.target, point.z)
        else:
            self._moved(point, state.moving)
            return
        self.enter(point, verdict)
        if state.view is not None:
            self.enter_companions(point, self.decide(state.view, point.z))
        self._judged(point)

    def rough(self, point: AdversarialBatch) -> None:
        """Judge a batch by features of the search's own: what it seems to break counts once it was passed again."""
        state = self.state
        logits = self.decide(state.target, point.z)
        if state.apart and state.stops_early:
            self._rough_each(point, logits)
            return
        iterate, view = state.iterate, state.view

        def confirm() -> None:
            exact = self._passes.exact(point)
            self.enter(exact, self.decide(state.target, exact.z), iterate=iterate)
            go_on(exact)

        def prefer() -> None:
            self._record.prefer(point, logits, companions_of(state.target))
            go_on(point)

        def go_on(point: AdversarialBatch) -> None:
            if view is None:
                self._judged(point)
            else:
                self._rough_companions(point, view, iterate)

        self._later.when(self._record.claims(logits), confirm, prefer)

    def enter(
        self, point: AdversarialBatch | PartialBatch, logits: Tensor, *, iterate: int | None = None, claims: bool = True
    ) -> None:  # fmt: skip
        """Enter the verdict on a batch, by default the latest iterate."""
        number = self.state.iterate if iterate is None else iterate
        self._record.enter(number, point, logits, companions_of(self.state.target), claims=claims)

    def enter_companions(self, point: AdversarialBatch, logits: Tensor, *, iterate: int | None = None) -> None:
        """Enter the verdicts on batches of companions that moved, each beside one row that stays."""
        number = self.state.iterate if iterate is None else iterate
        self._record.enter_companions(number, point, logits, self.state.start.x)

    def _decide_some(self, z: Tensor, rows: Tensor, others: Tensor) -> Tensor:
        """Decide some rows of a target that decides each by itself."""
        logits = others.clone()
        logits[rows] = self.decide(self.state.target, z[rows], rows)
        return logits

    def _moved(self, point: AdversarialBatch, moving: Tensor) -> None:
        """Judge a batch of which only some rows moved: the features of the others are kept from before."""
        state = self.state
        iterate = state.iterate
        if state.apart:
            verdict = self._decide_some(point.z, moving, state.kept.logits)
        else:
            verdict = self.decide(state.target, point.z)

        def confirm() -> None:
            whole = point if state.apart else self._passes.exact(point)
            self.enter(whole, self.decide(state.target, whole.z), iterate=iterate)
            self._judged(whole)

        def enter() -> None:
            self.enter(point, verdict, iterate=iterate)
            self._judged(point)

        self._later.when(self._record.claims(verdict), confirm, enter)

    def _rough_companions(self, point: AdversarialBatch, view: AmongOthers, iterate: int) -> None:
        """As `rough`, on batches of companions that moved."""
        state = self.state
        logits = self.decide(view, point.z)

        def confirm() -> None:
            exact = self._passes.exact(point)
            if state.start.rounded is not None:
                state.start = self._passes.exact(state.start)
            self.enter_companions(exact, self.decide(view.beside(state.start.z), exact.z), iterate=iterate)

        self._later.when(self._record.newly_broken(logits).any(), confirm)

    def _rough_each(self, point: AdversarialBatch, logits: Tensor) -> None:
        """As `rough`, where rows are decided apart: only what seems broken is passed again."""
        iterate, rounded = self.state.iterate, point.marked()
        # What stays where it was is not passed again: among the same companions it can't have come to seem broken.
        claimed = self.state.passed & rounded & (logits.argmax(dim=1) != self.batch.y)
        seen = torch.where(claimed.unsqueeze(1), self.batch.logits, logits)
        self._record.prefer(point, seen, companions_of(self.state.target))

        def confirm() -> None:
            rows = claimed.nonzero().flatten()
            with torch.no_grad():
                z = point.z.index_copy(0, rows, self._passes.features(point.x[rows]).to(point.z))
            enter(AdversarialBatch(point.x, z, rounded & ~claimed), self.decide(self.state.target, z))

        def enter(point: AdversarialBatch, logits: Tensor) -> None:
            verdict = torch.where(point.marked().unsqueeze(1), self.batch.logits, logits)
            self.enter(point, verdict, iterate=iterate)
            self._judged(point)

        self._later.when(claimed.any(), confirm, lambda: enter(point, logits))


def companions_of(target: Defense) -> Tensor | None:
    """Who sits beside each image ``(B, B - 1)``, where that is a choice."""
    return target.companion_index() if isinstance(target, OneAtATime) else None
