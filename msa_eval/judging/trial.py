"""One run on one batch: the attack proposes points, the trial counts passes and asks the hard target about each.

An attack sees a trial as the model: called with images it returns the surrogate's logits, and a query attack proposes
and accepts points. Behind both, the features just computed go to the hard target too, so that no attack judges itself
and a verdict costs a decision, not a trunk pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from msa_eval.attacks.ball import Ball, per_image
from msa_eval.attacks.batch import Batch, Placed, Point
from msa_eval.attacks.external.faults import Fault
from msa_eval.defense.contexts import NEAR_TIE, AmongOthers, Company, OneAtATime
from msa_eval.defense.contract import Defense, decide
from msa_eval.defense.precision import EXACT, Search
from msa_eval.device import asynchronous
from msa_eval.errors import AttackError
from msa_eval.judging.break_record import Record
from msa_eval.judging.deferred import Later
from msa_eval.judging.majority import CONFIRM, CONFIRM_SIGMAS, decide_by_majority
from msa_eval.judging.outcomes import Outcome, Trace
from msa_eval.surrogates.builtin import STE
from msa_eval.surrogates.ensemble import Ensemble
from msa_eval.surrogates.registry import Surrogate


@dataclass(frozen=True)
class Setting:
    """How a run meets a batch; the defaults are a run of its own on the clean batch.

    Attributes:
        start: the points that later steps may start from, and that samples not searched for stay at.
        counted: the samples searched for ``(B,)``, which the attack's loss counts; the rest only keep them company.
            Without it all are, but where rows are decided apart only those that are right on the clean batch.
        stays: whether the rest stay where they are also where rows are decided together, and so cost no pass.
        early_stop: whether a sample stays where it broke from there on; for rows decided apart, or with ``stays``.
        known: the samples broken before ``(B,)``, of which no finding is due.
        view: in ``joint``, the target seen one row at a time: what the surrogate attacks, judged beside the batch.
        draws: verdicts of a stochastic target are by the majority of so many, an odd number, and a break by a clear one
            of `CONFIRM` times as many more.
        eot: the attack asks for each point so many times, for an expectation over a stochastic target's draws.
        keep: whether findings are kept.
        trail: whether the points of every iterate are kept, for a pursuit to mix.
        search: how the search passes its points; what it seems to break is passed again, as the target is.
        ranking: the classes of each sample, nearest first ``(B, k)``, where an earlier run ranked them.
    """

    start: Point | None = None
    counted: Tensor | None = None
    stays: bool = False
    early_stop: bool = False
    known: Tensor | None = None
    view: OneAtATime | AmongOthers | None = None
    draws: int = 1
    eot: int = 1
    keep: bool = False
    trail: bool = False
    search: Search = EXACT
    ranking: Tensor | None = None


class Trial:
    """One run on one batch.

    Args:
        defense: the target.
        surrogate: what a gradient attack attacks; ``None`` for an attack on the target itself.
        batch: the clean batch.
        ball: the perturbation set, which every point is held to.
        mixes_rows: whether the target's decision may look at the whole batch.
        setting: how the run meets the batch.

    Attributes:
        counted: the samples searched for by now ``(B,)``.
        rows: their places ``(n,)``.
        stops_early: whether a sample that is broken is searched for no more.
        ranking: the classes of each sample, nearest first ``(B, k)``, once they are ranked.
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
        self.batch = batch
        self.ball = ball
        self.start = setting.start or Point(batch.x, batch.z)
        self.faults: tuple[Fault, ...] = ()
        self.eot = setting.eot
        self.ranking = setting.ranking
        self._setting = setting
        self._defense = defense
        self._view = setting.view
        self._attacked = setting.view or defense
        self._surrogate = surrogate
        self._mixes_rows = mixes_rows
        # Whether points come with features of the search's own. A surrogate on images has no use for such.
        self._rough = setting.search.rough and not (surrogate is not None and surrogate.on_images)
        self._forwards = self._backwards = self._decisions = 0
        # Rows decided apart need no pass unless they are searched for, and none if they are wrong already.
        self._apart = not mixes_rows or isinstance(self._attacked, OneAtATime)
        everyone = batch.correct if self._apart else torch.ones_like(batch.correct)
        self.counted = everyone if setting.counted is None else setting.counted
        self._stays = self._apart or setting.stays
        self.stops_early = self._stays and setting.early_stop and self._view is None
        self.rows = self.counted.nonzero().flatten()
        self._moving = self.rows if self._stays and len(self.rows) < len(batch.y) else None
        self._passed = self.counted

        self._calls = 0
        self._iterate = -1
        self._later = Later()
        self._record = Record(
            batch, ball, self._later, known=setting.known, keep=setting.keep, company=self._company(defense)
        )
        self._scale = batch.logits.abs().amax(dim=1)
        self._final = Point(batch.x, batch.z)
        self._trail: list[Point] = []
        self._held: Tensor | None = None
        if not self._rough and self.start.rounded is not None:  # another run searched in bfloat16, and this one doesn't
            self.start = self._exact(self.start)
            if self._view is not None:
                self._attacked = self._view = self._view.beside(self.start.z)
        self.latest = self.start
        self.attached = self.start.z
        kept = batch.logits if setting.start is None else self._decide(defense, self.start.z)
        self._kept = self._proposed = _Answered(self.start, kept)

    @property
    def target(self) -> Defense:
        """The hard target, for attacks that choose among cached features; what they choose is judged here."""
        return self._defense

    @property
    def broken(self) -> Tensor:
        """The samples broken so far ``(B,)``."""
        self._later.finish()
        return self._record.broken

    @property
    def searching(self) -> bool:
        """Whether any sample is left to search for."""
        return self._moving is None or len(self._moving) > 0

    @property
    def forwards(self) -> int:
        """Images passed through the trunk so far."""
        return self._forwards

    @property
    def lead(self) -> Tensor:
        """The lowest lead of each label so far ``(B,)``, the clean batch's included, as the search sees it."""
        self._later.finish()
        return torch.minimum(self._record.lead, self._record.best_lead) if self._rough else self._record.lead

    @property
    def ensemble(self) -> bool:
        """Whether several surrogates are attacked at once."""
        return isinstance(self._surrogate, Ensemble)

    @property
    def among_others(self) -> bool:
        """Whether companions move and each row counted stays as it is."""
        return isinstance(self._attacked, AmongOthers)

    @property
    def rows_interact(self) -> bool:
        """Whether a row's loss may depend on other rows of the batch."""
        return not self._apart

    def __call__(self, x: Tensor) -> Tensor:
        """Logits ``(B, k)`` of the surrogate on a batch of points; the hard target sees the same features.

        Those of an ensemble are ``(S, B, k)``, a slice a member.
        """
        if self.stops_early:
            x = torch.where(per_image(self.counted, x), x, self.start.x)
        self._record.hold(x.detach())
        return self._answer(x)

    def of_rows(self) -> Callable[[Tensor], Tensor]:
        """The trial as a model of those rows alone that are searched for now, where rows are decided apart.

        It takes their points ``(n, C, H, W)`` and returns their logits ``(n, k)``; the others stay at the start.
        """
        first = known = self.rows
        left: Tensor | None = None
        on_images = self._surrogate is not None and self._surrogate.on_images

        def logits(points: Tensor) -> Tensor:
            nonlocal known, left
            if self.rows is not known:
                known = self.rows
                left = torch.isin(first, known).nonzero().flatten()
            moved = points if left is None else points[left]
            self._record.hold(moved.detach(), known)
            x = self.start.x.index_copy(0, known, moved if on_images else moved.detach())
            return self._answer(x, moved)[..., first, :]

        return logits

    def _answer(self, x: Tensor, moved: Tensor | None = None) -> Tensor:
        """Pass a batch, or of one that else stays at the start the rows that moved, and judge it."""
        self._passed = self.counted
        z, logits = self._pass(x, moved)
        self._later.settle()
        self.attached = z
        self._calls += 1
        if self._calls % self.eot == 0:
            self._iterate += 1
            self._judge_point(Point(x.detach(), z.detach(), self._rounded()), logits.detach())
        return logits

    def ask(self, x: Tensor, rows: Tensor) -> Tensor:
        """Logits ``(B, k)`` as in a call, for attacks of others, whose points may lie anywhere.

        A point outside the ball is judged at its start, so that those beside it are judged all the same; what such a
        batch breaks is confirmed by a pass of its own. The iterates are not kept for a pursuit.

        Args:
            x: a batch of points ``(B, C, H, W)``.
            rows: those whose logits are wanted ``(B,)``; where rows are decided apart, the others cost no pass.
        """
        self._later.settle()
        if self._apart:
            self.search_for(rows)
        z, logits = self._pass(x)
        point = Point(x.detach(), z.detach())
        kept = self.ball.excess(point.x, self.batch.x) <= 0
        if self._apart:
            kept = kept & rows
        whole = bool(kept.all())
        if not whole:
            point = self.start.with_rows(kept, point)
        self._record.hold(point.x)
        self._iterate += 1
        if self._surrogate is None:
            self._decisions += len(x)
        if whole and (self._surrogate is None or self._surrogate == STE) and self._setting.draws == 1:
            self._enter(point, logits.detach().float())
        elif bool(kept.any()):
            self._believed(point, kept, confirmed=whole)
        return logits

    def search_for(self, rows: Tensor) -> None:
        """Go on with some rows (a mask ``(B,)``); the others go back to the start, and where they can, cost no pass."""
        self.counted = rows
        self.rows = rows.nonzero().flatten()
        self._moving = self.rows if self._stays else None

    def clean_logits(self) -> Tensor:
        """Logits of the surrogate on the clean batch, from its cached features."""
        with torch.no_grad():
            return self._surrogate_logits(self.batch.x, self.batch.z)

    def propose(self, points: Tensor, rows: Tensor) -> Tensor:
        """Logits ``(B, k)`` of the kept batch with new points ``(n, C, H, W)`` in some rows (a mask ``(B,)``)."""
        self._later.settle()
        kept, index = self._kept.point, rows.nonzero().flatten()
        assert isinstance(kept, Point)
        self._record.hold(points, index)
        with torch.no_grad():
            z = self._trunk(points)
        point = kept.placing(index, points, z, rounded=self._rough)
        self._iterate += 1
        self._proposed = self._believed(point, rows, confirmed=len(index) == len(rows) and not self._rough)
        return self._proposed.logits

    def accept(self, rows: Tensor) -> Tensor:
        """Keep these rows of the last proposal; logits ``(B, k)`` of the mixed batch that results."""
        if not bool(rows.any()):
            return self._kept.logits
        kept = self._kept.point
        if self._held is None or asynchronous(rows):  # where things are done late, what they look at must not change
            self._held = kept.x.clone()
        mixed = Point(self._held, kept.z.clone(), kept.rounded).take(rows, self._proposed.point)
        if self._mixes_rows:
            self._kept = self._believed(mixed, torch.ones_like(rows), confirmed=False)
        else:
            # Put together, not decided: the next proposal or the final pass judges a batch that was.
            logits = torch.where(rows.unsqueeze(1), self._proposed.logits, self._kept.logits)
            self._kept = _Answered(mixed, logits)
        self._proposed = self._kept
        return self._kept.logits

    def regroup(self, company: Company) -> Tensor:
        """Logits ``(B, k)`` of the start, each row in other clean company; for the context ``composed``."""
        assert isinstance(self._defense, OneAtATime)
        self._later.finish()
        self._defense = self._attacked = self._defense.beside(company)
        self._iterate += 1
        if self._rough:
            self._judge_rough(self.start)
            self._later.finish()
            return self._decide(self._defense, self.start.z)
        logits = self._decide(self._defense, self.start.z)
        self._enter(self.start, logits)
        return logits

    def judge(self, x: Tensor) -> None:
        """Pass a batch of points and judge it."""
        self._later.settle()
        with torch.no_grad():
            z = self._features(x)
        self._iterate += 1
        self._record.hold(x)
        self._enter(Point(x, z), self._decide(self._defense, z))

    def finish(self, x: Tensor) -> Outcome:
        """Judge the batch of final points by a fresh pass, and report.

        Raises:
            AttackError: when a point has left the ball or the box, or an output was not finite.
        """
        self._later.finish()
        with torch.no_grad():
            if self.stops_early:
                x = torch.where(per_image(self.counted, x), x, self.start.x)
            z = self._final_features(x)
            logits = self._surrogate_logits(x, z)
            fooled = (logits.mean(dim=0) if logits.ndim == 3 else logits).argmax(dim=1) != self.batch.y
        hard = self._decide(self._defense, z)
        self._iterate += 1
        self._final = Point(x, z)
        self._record.hold(x)
        self._enter(self._final, hard)
        self._later.finish()
        record = self._record
        if not bool(record.finite):
            raise AttackError("the defence or its surrogate returned logits that are not finite")
        if float(record.excess) > 0:
            raise AttackError(
                f"the attack left the {self.ball.norm} ball of radius {self.ball.eps:.6g} or the [0, 1] box "
                f"by {float(record.excess):.3g}; its points must be projected before they are proposed"
            )
        return Outcome(
            surrogate_fooled=fooled,
            final_broken=hard.argmax(dim=1) != self.batch.y,
            any_broken=record.broken,
            first_iterate=record.first,
            min_margin=record.lead,
            perturbation=self.ball.size(x - self.batch.x),
            committed=record.committed,
            forwards=self._forwards,
            backwards=self._backwards,
            decisions=self._decisions,
            faults=self.faults,
        )

    def trace(self) -> Trace:
        """What later runs may go on from, once the trial is finished."""
        seen = self._record
        return Trace(
            self._final, seen.best, seen.best_lead, seen.company, tuple(seen.findings), tuple(self._trail), self.ranking
        )

    def _features(self, x: Tensor) -> Tensor:
        self._forwards += len(x)
        return self._defense.features(x)

    def _final_features(self, x: Tensor) -> Tensor:
        """Features of the final points; what stopped early, in a batch decided row by row, was passed already."""
        if not self.stops_early or not self._apart or self._setting.draws > 1:
            return self._features(x)
        z, moved = self.start.z, (x != self.start.x).flatten(1).any(dim=1)
        if self.start.rounded is not None:
            moved = moved | self.start.rounded
        return z.index_put((moved.nonzero().flatten(),), self._features(x[moved])) if bool(moved.any()) else z

    def _pass(self, x: Tensor, moved: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Features of a batch of points and the surrogate's logits; rows that stay at the start cost no pass.

        Args:
            x: the batch.
            moved: its rows that don't stay, if the caller has them.
        """
        rows = self._moving
        if rows is None:
            z = self._trunk(x)
            return z, self._surrogate_logits(x, z)
        moved = x[rows] if moved is None else moved
        part = self._trunk(moved)
        z = self.start.z.index_put((rows,), part)
        if self._mixes_rows:
            return z, self._surrogate_logits(x, z)
        logits = self._surrogate_logits(moved, part)
        shape = (*logits.shape[:-2], len(x), logits.shape[-1])
        return z, logits.new_zeros(shape).index_copy(-2, rows, logits)

    def _trunk(self, x: Tensor) -> Tensor:
        """Features with a gradient, unless no surrogate has a use for it."""
        if self._surrogate is not None and self._surrogate.on_images:
            with torch.no_grad():
                return self._features(x)
        self._forwards += len(x)
        z = self._setting.search.features(self._defense, x)
        return self._watched(z.to(self.batch.z.dtype) if self._rough else z)

    def _rounded(self) -> Tensor | None:
        """The rows of the batch just passed that have rounded features ``(B,)``."""
        if not self._rough:
            return None
        if self._moving is None:
            return torch.ones_like(self._passed)
        return self._passed if self.start.rounded is None else self._passed | self.start.rounded

    def _watched(self, values: Tensor) -> Tensor:
        """Count the images that a gradient passes back through."""
        if values.requires_grad:
            values = values.view_as(values)  # a node of our own, also where these are the images themselves
            values.register_hook(self._count_backward)
        return values

    def _count_backward(self, gradient: Tensor) -> None:
        self._backwards += len(gradient)

    def _surrogate_logits(self, x: Tensor, z: Tensor) -> Tensor:
        if self._surrogate is None:
            return decide(self._defense, z)
        if isinstance(self._surrogate, Ensemble):
            logits = torch.stack([self._member_logits(member, x, z) for member in self._surrogate.members])
            return logits / self._surrogate.scales
        return self._member_logits(self._surrogate, x, z)

    def _member_logits(self, surrogate: Surrogate, x: Tensor, z: Tensor) -> Tensor:
        if surrogate.on_images:
            self._forwards += len(x)
            logits = self._watched(surrogate.logits(self._attacked, x))
        else:
            logits = surrogate.logits(self._attacked, z)
        if logits.shape != (len(x), self.batch.logits.shape[1]):
            raise AttackError(
                f"surrogate {surrogate.name!r} returned logits of shape {tuple(logits.shape)} "
                f"where the target returns {(len(x), self.batch.logits.shape[1])}"
            )
        self._record.watch(logits.detach())
        return logits

    def _decide(self, target: Defense, z: Tensor, rows: Tensor | None = None) -> Tensor:
        """Ask the hard target; a stochastic one is asked again, and more often, before a break is believed."""
        draws = self._setting.draws
        y, doubt = self.batch.y, self.batch.correct
        if rows is not None:
            y, doubt = y[rows], doubt[rows]
        self._decisions += len(z) * draws
        logits = decide_by_majority(target, z, y, draws=draws)
        if draws > 1 and bool((claimed := doubt & (logits.argmax(dim=1) != y)).any()):
            self._decisions += len(z) * draws * CONFIRM
            again = decide_by_majority(target, z, y, draws=draws * CONFIRM, sigmas=CONFIRM_SIGMAS)
            logits = torch.where(claimed.unsqueeze(1), again, logits)
        return logits

    def _decide_some(self, z: Tensor, rows: Tensor, others: Tensor) -> Tensor:
        """Decide some rows of a target that decides each by itself."""
        logits = others.clone()
        logits[rows] = self._decide(self._defense, z[rows], rows)
        return logits

    def _believed(self, point: Point | Placed, rows: Tensor, *, confirmed: bool) -> _Answered:
        """Decide a batch put together from cached features; what it claims is confirmed by a pass of the whole."""
        if self._mixes_rows:
            logits = self._decide(self._defense, point.z)
        else:
            logits = self._decide_some(point.z, rows, self._kept.logits)
        claimed = not confirmed and bool(self._record.claims(logits))
        if claimed:
            point = self._exact(point)
            logits = self._decide(self._defense, point.z)
        if claimed or not self._rough:
            self._enter(point, logits, claims=claimed or confirmed)
        else:
            self._record.prefer(point, logits, self._company(self._defense))
        return _Answered(point, logits)

    def _judge_point(self, point: Point, logits: Tensor) -> None:
        """Judge an iterate of a gradient attack in its batch and, where rows are seen apart, each in its own."""
        setting = self._setting
        self.latest = point
        if setting.trail:
            self._trail.append(point)
        if self._rough:
            self._judge_rough(point)
            return
        # The naive surrogate is the target's own decision on these features: its value is the verdict.
        if self._surrogate == STE and self._view is None and setting.draws == 1 and self._moving is None:
            verdict = logits.float()
        elif self._moving is None or (self._mixes_rows and self._apart):
            verdict = self._decide(self._defense, point.z)
        else:
            self._judge_moved(point, self._moving)
            return
        self._enter(point, verdict)
        if self._view is not None:
            self._enter_apart(point, self._decide(self._view, point.z))
        self._stop_early(point)

    def _judge_moved(self, point: Point, moving: Tensor) -> None:
        """Judge a batch of which only some rows moved: the features of the others are kept from before."""
        iterate = self._iterate
        if self._apart:
            verdict = self._decide_some(point.z, moving, self._kept.logits)
        else:
            verdict = self._decide(self._defense, point.z)

        def confirm() -> None:
            whole = point if self._apart else self._exact(point)
            self._enter(whole, self._decide(self._defense, whole.z), iterate=iterate)
            self._stop_early(whole)

        def enter() -> None:
            self._enter(point, verdict, iterate=iterate)
            self._stop_early(point)

        self._later.when(self._record.claims(verdict), confirm, enter)

    def _judge_rough(self, point: Point) -> None:
        """Judge a batch by features of the search's own: what it seems to break counts once it was passed again."""
        logits = self._decide(self._defense, point.z)
        if self._apart and self.stops_early:
            self._judge_each(point, logits)
            return
        iterate, view = self._iterate, self._view

        def confirm() -> None:
            exact = self._exact(point)
            self._enter(exact, self._decide(self._defense, exact.z), iterate=iterate)
            go_on(exact)

        def prefer() -> None:
            self._record.prefer(point, logits, self._company(self._defense))
            go_on(point)

        def go_on(point: Point) -> None:
            if view is None:
                self._stop_early(point)
            else:
                self._judge_rough_apart(point, view, iterate)

        self._later.when(self._record.claims(logits), confirm, prefer)

    def _judge_rough_apart(self, point: Point, view: OneAtATime | AmongOthers, iterate: int) -> None:
        """The same of batches that differ in one row."""
        logits = self._decide(view, point.z)

        def confirm() -> None:
            exact = self._exact(point)
            if self.start.rounded is not None:
                self.start = self._exact(self.start)
            self._enter_apart(exact, self._decide(view.beside(self.start.z), exact.z), iterate=iterate)

        def prefer() -> None:
            if not self.among_others:
                self._record.prefer(point, logits)

        self._later.when(self._record.newly_broken(logits).any(), confirm, prefer)

    def _judge_each(self, point: Point, logits: Tensor) -> None:
        """The same where rows are decided apart: only what seems broken is passed again."""
        iterate, rounded = self._iterate, point.marked()
        # What stays where it was is not passed again for it: in the same company it can't have come to seem broken.
        claimed = self._passed & rounded & (logits.argmax(dim=1) != self.batch.y)
        seen = torch.where(claimed.unsqueeze(1), self.batch.logits, logits)
        self._record.prefer(point, seen, self._company(self._defense))

        def confirm() -> None:
            rows = claimed.nonzero().flatten()
            with torch.no_grad():
                z = point.z.index_copy(0, rows, self._features(point.x[rows]).to(point.z))
            enter(Point(point.x, z, rounded & ~claimed), self._decide(self._defense, z))

        def enter(point: Point, logits: Tensor) -> None:
            verdict = torch.where(point.marked().unsqueeze(1), self.batch.logits, logits)
            self._enter(point, verdict, iterate=iterate)
            self._stop_early(point)

        self._later.when(claimed.any(), confirm, lambda: enter(point, logits))

    def _stop_early(self, point: Point) -> None:
        """Search no more for what is broken by more than rounding: it stays where it is."""
        if not self.stops_early:
            return
        seen = self._record
        done = self.counted & seen.broken & (seen.best_lead < -NEAR_TIE * self._scale)

        def leave() -> None:
            self.start = self.start.with_rows(done, point)
            self.search_for(self.counted & ~done)

        self._later.when(done.any(), leave)

    def _exact(self, point: Point | Placed) -> Point:
        """The same points with the target's own features."""
        x = point.x.clone() if point.x is self._held else point.x
        with torch.no_grad():
            return Point(x, self._features(x))

    def _enter(
        self, point: Point | Placed, logits: Tensor, *, iterate: int | None = None, claims: bool = True
    ) -> None:  # fmt: skip
        """Enter the verdict on a batch, by default the latest iterate."""
        number = self._iterate if iterate is None else iterate
        self._record.enter(number, point, logits, self._company(self._defense), claims=claims)

    def _enter_apart(self, point: Point, logits: Tensor, *, iterate: int | None = None) -> None:
        """Enter the verdicts on batches that differ in one row."""
        number = self._iterate if iterate is None else iterate
        if self.among_others:
            self._record.enter_companions(number, point, logits, self.start.x)
        else:
            self._record.enter_apart(number, point, logits, self.start.x)

    @staticmethod
    def _company(defense: Defense) -> Tensor | None:
        return defense.company_index() if isinstance(defense, OneAtATime) else None


@dataclass(frozen=True)
class _Answered:
    """A batch of points and the target's logits."""

    point: Point | Placed
    logits: Tensor
