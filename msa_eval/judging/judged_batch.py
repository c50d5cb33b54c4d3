"""One run on one batch: the attack proposes points, and the hard target is asked about each.

An attack sees a judged batch as the model (see `AttackedBatch`): called with images it returns the surrogate's logits,
and a query attack proposes and accepts points. Behind both, the features just computed go to the hard target too, so
that no attack judges itself and a verdict costs a decision, not a trunk pass.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from msa_eval.attacks.ball import Ball, per_image
from msa_eval.attacks.batch import AdversarialBatch, Batch, lowest_of_each
from msa_eval.attacks.external.faults import Fault
from msa_eval.attacks.grid import Grid
from msa_eval.attacks.losses import margin_loss
from msa_eval.defense.contexts import NEAR_TIE, Companions, OneAtATime
from msa_eval.defense.contract import Defense, decide
from msa_eval.device import asynchronous
from msa_eval.errors import AttackError
from msa_eval.judging.break_record import BreakRecord
from msa_eval.judging.deferred import Deferred
from msa_eval.judging.judge import Judge, companions_of
from msa_eval.judging.outcomes import RunResult, Trace
from msa_eval.judging.passes import Passes
from msa_eval.judging.search_state import Answered, SearchState, Setting
from msa_eval.surrogates.builtin import STE
from msa_eval.surrogates.ensemble import Ensemble
from msa_eval.surrogates.registry import Surrogate


class JudgedBatch:
    """One run on one batch; what attacks see of it is described in `AttackedBatch`.

    Args:
        defense: the target.
        surrogate: what a gradient attack attacks; ``None`` for an attack on the target itself.
        batch: the clean batch.
        ball: the perturbation set, which every point is held to.
        mixes_rows: whether the target's decision may look at the whole batch.
        setting: how the run meets the batch.
    """

    def __init__(
        self,
        defense: Defense,
        surrogate: Surrogate | Ensemble | None,
        batch: Batch,
        ball: Ball,
        *,
        mixes_rows: bool = True,
        setting: Setting | None = None,
    ) -> None:
        setting = setting or Setting()
        self.batch, self.ball, self.eot = batch, ball, setting.eot
        self.faults: tuple[Fault, ...] = ()
        self.ranking, self.found, self.pool = setting.ranking, setting.found, setting.pool
        self._setting, self._surrogate = setting, surrogate
        self._grid = None if ball.levels is None else Grid(ball, batch.x)
        self._calls = 0
        self._later = Deferred()
        self._record = BreakRecord(
            batch, ball, self._later, known=setting.known, keep=setting.keep, near=setting.nearest,
            companions=companions_of(defense),
        )  # fmt: skip
        self._state = state = SearchState(defense, surrogate, batch, setting, mixes_rows=mixes_rows)
        self._passes = Passes(surrogate, batch, state, self._record, setting.search)
        self._judge = Judge(
            surrogate, batch, setting, state, self._passes, self._record, self._later, self._stop_early
        )  # fmt: skip
        self._scale = batch.logits.abs().amax(dim=1)
        self._final = AdversarialBatch(batch.x, batch.z)
        self._trail: list[AdversarialBatch] = []
        self._held: Tensor | None = None
        if not state.rough and state.start.rounded is not None:
            # Another run searched in bfloat16, and this one doesn't.
            state.start = self._passes.exact(state.start)
            if state.view is not None:
                state.attacked = state.view = state.view.beside(state.start.z)
        self.latest = state.start
        self.attached = state.start.z
        kept = batch.logits if setting.start is None else self._judge.decide(defense, state.start.z)
        state.kept = self._proposed = Answered(state.start, kept)

    @property
    def start(self) -> AdversarialBatch:
        """The points that later steps may start from, and that samples not searched for stay at."""
        return self._state.start

    @property
    def counted(self) -> Tensor:
        """The samples searched for by now ``(B,)``."""
        return self._state.counted

    @property
    def rows(self) -> Tensor:
        """Their places ``(n,)``."""
        return self._state.rows

    @property
    def stops_early(self) -> bool:
        """Whether a sample that is broken is searched for no more."""
        return self._state.stops_early

    @property
    def target(self) -> Defense:
        """The hard target, for attacks that choose among cached features; what they choose is judged here."""
        return self._state.target

    @property
    def broken(self) -> Tensor:
        """The samples broken so far ``(B,)``."""
        self._later.finish()
        return self._record.broken

    @property
    def searching(self) -> bool:
        """Whether any sample is left to search for."""
        return self._state.moving is None or len(self._state.moving) > 0

    @property
    def forwards(self) -> int:
        """Images passed through the trunk so far."""
        return self._passes.forwards

    @property
    def margin(self) -> Tensor:
        """The lowest margin of each label so far ``(B,)``, the clean batch's included, as the search sees it."""
        self._later.finish()
        seen = self._record
        return torch.minimum(seen.margin, seen.best_margin) if self._state.rough else seen.margin

    @property
    def ensemble(self) -> bool:
        """Whether several surrogates are attacked at once."""
        return isinstance(self._surrogate, Ensemble)

    @property
    def among_others(self) -> bool:
        """Whether companions move and each row counted stays as it is."""
        return self._state.among_others

    @property
    def rows_interact(self) -> bool:
        """Whether a row's loss may depend on other rows of the batch."""
        return not self._state.apart

    def __call__(self, x: Tensor) -> Tensor:
        """Logits ``(B, k)`` of the surrogate on a batch of points; the hard target sees the same features.

        Those of an ensemble are ``(S, B, k)``, a slice a member.
        """
        if self.stops_early:
            x = torch.where(per_image(self.counted, x), x, self.start.x)
        return self._answer(self._held_to(x))

    @property
    def has_copies(self) -> bool:
        """Whether several points of one row can be asked about at once: where nothing else decides about a row."""
        return self._state.stays and not self._state.mixes_rows and self.eot == self._setting.draws == 1

    def of_rows(self, places: Tensor | None = None) -> Callable[[Tensor], Tensor]:
        """The batch as a model of only the rows that are searched for, where each row is decided by itself.

        It takes their points ``(n, C, H, W)`` and returns their logits ``(n, k)``; the others stay at the start.
        Where a row has several points, ``places`` are theirs ``(n,)``.
        """
        first = self.rows if places is None else places
        searched, left, known = self.rows, torch.arange(len(first), device=first.device), first
        on_images = self._surrogate is not None and self._surrogate.on_images

        def logits(points: Tensor) -> Tensor:
            nonlocal searched, left, known
            if self.rows is not searched:
                searched = self.rows
                left = torch.isin(first, searched).nonzero().flatten()
                known = first[left]
            moved = self._held_to(points if len(left) == len(first) else points[left], known)
            if places is not None:
                found = self._answer_copies(moved, known)
                return found.new_zeros((len(first), found.shape[-1])).index_copy(0, left, found)
            x = self.start.x.index_copy(0, known, moved if on_images else moved.detach())
            return self._answer(x, moved)[..., first, :]

        return logits

    def _held_to(self, points: Tensor, rows: Tensor | None = None) -> Tensor:
        """Hold points to the ball and the box and, where the protocol has levels, round them: what is judged is so.

        Args:
            points: a batch, or the points of some rows.
            rows: the places of these ``(n,)``.
        """
        self._record.hold(points.detach(), rows)
        return points if self._grid is None else self._grid.round(points, rows)

    def _answer(self, x: Tensor, moved: Tensor | None = None) -> Tensor:
        """Pass a batch, or of one that else stays at the start the rows that moved, and judge it."""
        self._state.passed = self._state.counted
        z, logits = self._passes.of_batch(x, moved)
        self._later.settle()
        self.attached = z
        self._calls += 1
        if self._calls % self.eot == 0:
            self._show(x, z, logits)
        return logits

    def _answer_copies(self, points: Tensor, places: Tensor) -> Tensor:
        """Pass points of rows ``(n,)``, of which a row may have several; of each row the nearest to falling is judged.

        A row is decided by itself, so where one of its points breaks it, the one of the lowest margin does.
        """
        state = self._state
        state.passed = state.counted
        z = self._passes.trunk(points)
        logits = self._passes.surrogate_logits(points, z)
        self._later.settle()
        with torch.no_grad():
            margin = -margin_loss(decide(state.target, z), self.batch.y[places]).nan_to_num(-torch.inf)
        best = lowest_of_each(margin, places, len(self.batch.y))[state.rows]
        x = state.start.x.index_copy(0, state.rows, points.detach()[best])
        self.attached = state.start.z.index_put((state.rows,), z[best])
        self._show(x, self.attached, logits)
        return logits

    def _show(self, x: Tensor, z: Tensor, logits: Tensor) -> None:
        """Have an iterate judged."""
        self._state.iterate += 1
        self.latest = AdversarialBatch(x.detach(), z.detach(), self._passes.rounded())
        if self._setting.trail:
            self._trail.append(self.latest)
        self._judge.iterate(self.latest, logits.detach())

    def ask(self, x: Tensor, rows: Tensor) -> Tensor:
        """Logits ``(B, k)`` as in a call, for third-party attacks, whose points may lie anywhere.

        A point outside the ball is judged at its start, so that those beside it are judged all the same; what such a
        batch breaks is confirmed by a pass of its own. The iterates are not kept for a pursuit.

        Args:
            x: a batch of points ``(B, C, H, W)``.
            rows: those whose logits are wanted ``(B,)``; where rows are decided apart, the others cost no pass.
        """
        self._later.settle()
        if self._state.apart:
            self.search_for(rows)
        kept = self.ball.excess(x.detach(), self.batch.x) <= 0
        if self._grid is not None:
            x = torch.where(per_image(kept, x), self._grid.round(x), x)
        z, logits = self._passes.of_batch(x)
        point = AdversarialBatch(x.detach(), z.detach())
        if self._state.apart:
            kept = kept & rows
        whole = bool(kept.all())
        if not whole:
            point = self.start.with_rows(kept, point)
        self._record.hold(point.x)
        self._state.iterate += 1
        if self._surrogate is None:
            self._judge.decisions += len(x)
        if whole and (self._surrogate is None or self._surrogate == STE) and self._setting.draws == 1:
            self._judge.enter(point, logits.detach().float())
        elif bool(kept.any()):
            self._judge.believed(point, kept, confirmed=whole)
        return logits

    def search_for(self, rows: Tensor) -> None:
        """Go on with some rows (a mask ``(B,)``); the others go back to the start, and where they can, cost no pass."""
        self._state.search_for(rows)

    def clean_logits(self) -> Tensor:
        """Logits of the surrogate on the clean batch, from its cached features."""
        with torch.no_grad():
            return self._passes.surrogate_logits(self.batch.x, self.batch.z)

    def propose(self, points: Tensor, rows: Tensor) -> Tensor:
        """Logits ``(B, k)`` of the kept batch with new points ``(n, C, H, W)`` in some rows (a mask ``(B,)``)."""
        self._later.settle()
        kept, index = self._state.kept.point, rows.nonzero().flatten()
        assert isinstance(kept, AdversarialBatch)
        points = self._held_to(points, index)
        with torch.no_grad():
            z = self._passes.trunk(points)
        point = kept.placing(index, points, z, rounded=self._state.rough)
        self._state.iterate += 1
        confirmed = len(index) == len(rows) and not self._state.rough
        self._proposed = self._judge.believed(point, rows, confirmed=confirmed)
        return self._proposed.logits

    def accept(self, rows: Tensor) -> Tensor:
        """Keep these rows of the last proposal; logits ``(B, k)`` of the mixed batch that results."""
        state = self._state
        if not bool(rows.any()):
            return state.kept.logits
        kept = state.kept.point
        if self._held is None or asynchronous(rows):  # where things are done late, what they look at must not change
            self._held = kept.x.clone()
        mixed = AdversarialBatch(self._held, kept.z.clone(), kept.rounded).take(rows, self._proposed.point)
        if state.mixes_rows:
            state.kept = self._judge.believed(mixed, torch.ones_like(rows), confirmed=False, copied=True)
        else:
            # Put together, not decided: the next proposal or the final pass judges a batch that was.
            logits = torch.where(rows.unsqueeze(1), self._proposed.logits, state.kept.logits)
            state.kept = Answered(mixed, logits)
        self._proposed = state.kept
        return state.kept.logits

    def regroup(self, companions: Companions) -> Tensor:
        """Logits ``(B, k)`` of the start, each row among other clean companions; for the context ``composed``."""
        assert isinstance(self.target, OneAtATime)
        self._later.finish()
        self._state.among_companions(self.target.beside(companions))
        self._state.iterate += 1
        if self._state.rough:
            self._judge.rough(self.start)
            self._later.finish()
            return self._judge.decide(self.target, self.start.z)
        logits = self._judge.decide(self.target, self.start.z)
        self._judge.enter(self.start, logits)
        return logits

    def judge(self, x: Tensor) -> None:
        """Pass a batch of points and judge it."""
        self._later.settle()
        x = self._held_to(x)
        with torch.no_grad():
            z = self._passes.features(x)
        self._state.iterate += 1
        self._judge.enter(AdversarialBatch(x, z), self._judge.decide(self.target, z))

    def finish(self, x: Tensor) -> RunResult:
        """Judge the batch of final points by a fresh pass, and report.

        Raises:
            AttackError: when a point has left the ball or the box, or an output was not finite.
        """
        self._later.finish()
        with torch.no_grad():
            if self.stops_early:
                x = torch.where(per_image(self.counted, x), x, self.start.x)
            x = self._held_to(x)
            z = self._passes.final_features(x, whole=self._setting.draws > 1)
            logits = self._passes.surrogate_logits(x, z)
            fooled = (logits.mean(dim=0) if logits.ndim == 3 else logits).argmax(dim=1) != self.batch.y
        hard = self._judge.decide(self.target, z)
        self._state.iterate += 1
        self._final = AdversarialBatch(x, z)
        self._judge.enter(self._final, hard)
        self._later.finish()
        record = self._record
        if not bool(record.finite):
            raise AttackError(
                "the defence or its surrogate returned logits that are NaN or infinite for an image of the ball; make "
                "it return finite numbers there, such as -1e9 for -inf, and 0 / 1e-12 for 0 / 0"
            )
        if float(record.excess) > 0:
            raise AttackError(
                f"the attack left the {self.ball.norm} ball of radius {self.ball.eps:.6g} or the [0, 1] box "
                f"by {float(record.excess):.3g}; its points must be projected before they are proposed"
            )
        return RunResult(
            surrogate_fooled=fooled,
            final_broken=hard.argmax(dim=1) != self.batch.y,
            any_broken=record.broken,
            first_iterate=record.first,
            min_margin=record.margin,
            perturbation=self.ball.size(x - self.batch.x),
            committed=record.committed,
            forwards=self._passes.forwards,
            backwards=self._passes.backwards,
            decisions=self._judge.decisions,
            taken_back=torch.zeros_like(record.broken),
            trace=self.trace(),
            faults=self.faults,
        )

    def trace(self) -> Trace:
        """What later runs may go on from, once the run is finished."""
        seen = self._record
        return Trace(
            self._final, seen.best, seen.best_margin, seen.companions, tuple(seen.findings), tuple(self._trail),
            self.ranking, tuple(seen.nearest),
        )  # fmt: skip

    def _stop_early(self, point: AdversarialBatch) -> None:
        """Search no more for what is broken by more than rounding: it stays where it is."""
        if not self.stops_early:
            return
        state, seen = self._state, self._record
        done = state.counted & seen.broken & (seen.best_margin < -NEAR_TIE * self._scale)

        def leave() -> None:
            state.start = state.start.with_rows(done, point)
            state.search_for(state.counted & ~done)

        self._later.when(done.any(), leave)
