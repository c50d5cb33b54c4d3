"""One run on one batch: the attack proposes points, the trial counts passes and asks the hard target about each.

An attack sees a trial as the model: called with images it returns the surrogate's logits, and a query attack proposes
and accepts points. Behind both, the features just computed go to the hard target too, so that no attack judges itself
and a verdict costs a decision, not a trunk pass.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property

import torch
from msa_eval.protocols.contexts import NEAR_TIE, AmongOthers, Company, OneAtATime
from msa_eval.protocols.search import EXACT, Search
from msa_eval.protocols.verdict import CONFIRM, CONFIRM_SIGMAS, decide_by_majority
from msa_eval.surrogates import STE, Ensemble, Surrogate
from torch import Tensor

from msa_eval.attacks.ball import Ball
from msa_eval.attacks.losses import margin
from msa_eval.defense import Defense, decide
from msa_eval.peers import Fault


class AttackError(RuntimeError):
    """An attack or a defence failed in a way that must never read as robustness."""


@dataclass(frozen=True)
class Batch:
    """A clean batch and the target's answer to it.

    Attributes:
        number: its place in the plan.
        x: images ``(B, C, H, W)`` in [0, 1].
        y: labels ``(B,)``.
        z: features ``(B, ...)``.
        logits: of the hard target ``(B, k)``.
    """

    number: int
    x: Tensor
    y: Tensor
    z: Tensor
    logits: Tensor

    @cached_property
    def correct(self) -> Tensor:
        """Which samples the target gets right ``(B,)``."""
        return self.logits.argmax(dim=1) == self.y


@dataclass(frozen=True)
class Point:
    """A batch of points ``(B, C, H, W)`` and their features ``(B, ...)``."""

    x: Tensor
    z: Tensor

    def with_rows(self, rows: Tensor, other: Point) -> Point:
        """The same batch with some rows, by their places ``(n,)``, taken from another."""
        return other if len(rows) == len(self.x) else self.with_new(rows, other.x[rows], other.z[rows])

    def with_new(self, rows: Tensor, x: Tensor, z: Tensor) -> Point:
        """The same batch with other points ``(n, C, H, W)`` and features ``(n, ...)`` in some rows."""
        return Point(self.x.index_copy(0, rows, x), self.z.index_copy(0, rows, z))


@dataclass(frozen=True)
class Finding:
    """An adversarial batch that was judged, or several that differ in one row.

    Attributes:
        breaks: the samples it breaks, a mask ``(B,)``.
        x: the batch ``(B, C, H, W)``.
        own: where given, sample i is broken by the batch whose row i is ``own[i]`` ``(B, C, H, W)``.
    """

    breaks: Tensor
    x: Tensor
    own: Tensor | None = None


@dataclass(frozen=True)
class Trace:
    """What a run leaves to later ones and to the proofs: images, which are not kept for the tables.

    Attributes:
        final: the final points.
        best: each sample's own point of the lowest lead.
        best_lead: that lead ``(B,)``.
        company: who sat beside it ``(B, B - 1)``, where the attacker chooses.
        findings: adversarial batches that break samples not broken before, where these are kept.
        trail: the points of every iterate, where these are kept.
    """

    final: Point
    best: Point
    best_lead: Tensor
    company: Tensor | None
    findings: tuple[Finding, ...]
    trail: tuple[Point, ...]


@dataclass(frozen=True)
class Outcome:
    """What a run did to a batch; one entry a sample ``(B,)`` unless said otherwise.

    Attributes:
        surrogate_fooled: the attacked model is wrong on the final batch.
        final_broken: the hard target is wrong on the final batch.
        any_broken: it is wrong on some batch it was shown.
        first_iterate: the first of these, counted from 0; -1 where there is none.
        min_margin: the lowest logit lead of the label over all batches shown.
        perturbation: norm of the final perturbation.
        committed: right on the one shown batch that leaves the fewest right.
        forwards: images passed through the trunk (a number).
        backwards: images passed back through it (a number).
        decisions: rows decided by the hard target (a number).
        faults: of an attack of others, what it did and should not have.
    """

    surrogate_fooled: Tensor
    final_broken: Tensor
    any_broken: Tensor
    first_iterate: Tensor
    min_margin: Tensor
    perturbation: Tensor
    committed: Tensor
    forwards: int
    backwards: int
    decisions: int
    faults: tuple[Fault, ...] = ()

    @classmethod
    def failed(cls, batch: Batch) -> Outcome:
        """Of a run that came to no end: it broke nothing, and what it would have measured is NaN."""
        nothing, unknown = torch.zeros_like(batch.correct), torch.full_like(batch.y, torch.nan, dtype=torch.float32)
        first = torch.full_like(batch.y, -1)
        return cls(nothing, nothing, nothing, first, unknown, unknown, batch.correct, 0, 0, 0)

    def taking_back(self, taken: Tensor, correct: Tensor) -> Outcome:
        """The same run with some of its breaks taken back: these samples count as right on every batch it showed.

        Nothing else is changed, except that the attacker commits to the final batch where that now leaves fewer right.

        Args:
            taken: the samples ``(B,)``, right on the clean batch.
            correct: the samples that are right on it ``(B,)``.
        """
        final_broken, committed = self.final_broken & ~taken, self.committed | taken
        last = correct & ~final_broken
        return dataclasses.replace(
            self,
            final_broken=final_broken,
            any_broken=self.any_broken & ~taken,
            first_iterate=self.first_iterate.masked_fill(taken, -1),
            min_margin=torch.where(taken, self.min_margin.clamp(min=0), self.min_margin),
            committed=last if int(last.sum()) < int(committed.sum()) else committed,
        )


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
        stops_early: whether a sample that is broken is searched for no more.
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
        self._setting = setting
        self._defense = defense
        self._attacked = setting.view or defense
        self._surrogate = surrogate
        self._mixes_rows = mixes_rows
        # Whether iterates come with features of the search's own; without a gradient they are passed as the target is.
        self._rough = setting.search.rough and not (surrogate is not None and surrogate.on_images)
        self._forwards = self._backwards = self._decisions = 0
        # Rows decided apart need no pass unless they are searched for, and none if they are wrong already.
        self._apart = not mixes_rows or isinstance(self._attacked, OneAtATime)
        everyone = batch.correct if self._apart else torch.ones_like(batch.correct)
        self.counted = everyone if setting.counted is None else setting.counted
        self._stays = self._apart or setting.stays
        self.stops_early = self._stays and setting.early_stop and setting.view is None
        self._moving = None if bool(self.counted.all()) or not self._stays else self.counted.nonzero().flatten()

        unbroken = torch.zeros_like(batch.y, dtype=torch.bool)
        self._calls = 0
        self._iterate = -1
        self._broken = unbroken
        self._first = torch.full_like(batch.y, -1)
        self._lead = self._best_lead = -margin(batch.logits, batch.y)
        self._scale = batch.logits.abs().amax(dim=1)
        self._best = self._final = Point(batch.x, batch.z)
        self._committed = batch.correct
        self._finite = torch.ones((), dtype=torch.bool, device=batch.y.device)
        self._excess = torch.zeros((), device=batch.y.device)
        self._company = defense.company_index() if isinstance(defense, OneAtATime) else None
        self._findings: list[Finding] = []
        self._trail: list[Point] = []
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
        return self._broken

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
        return torch.minimum(self._lead, self._best_lead) if self._rough else self._lead

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
            x = torch.where(_per_image(self.counted, x), x, self.start.x)
        z, logits = self._pass(x)
        self.attached = z
        self._calls += 1
        if self._calls % self.eot == 0:
            self._iterate += 1
            self._judge_point(Point(x.detach(), z.detach()), logits.detach())
        return logits

    def ask(self, x: Tensor, rows: Tensor) -> Tensor:
        """Logits ``(B, k)`` as in a call, for attacks of others, whose points may lie anywhere.

        A point outside the ball is judged at its start, so that those beside it are judged all the same; what such a
        batch breaks is confirmed by a pass of its own. The iterates are not kept for a pursuit.

        Args:
            x: a batch of points ``(B, C, H, W)``.
            rows: those whose logits are wanted ``(B,)``; where rows are decided apart, the others cost no pass.
        """
        if self._apart:
            self.search_for(rows)
        z, logits = self._pass(x)
        point = Point(x.detach(), z.detach())
        kept = self.ball.excess(point.x, self.batch.x) <= 0
        if self._apart:
            kept = kept & rows
        whole = bool(kept.all())
        if not whole:
            point = _mixed(kept, point, self.start)
        self._iterate += 1
        if self._surrogate is None:
            self._decisions += len(x)
        if whole and (self._surrogate is None or self._surrogate == STE) and self._setting.draws == 1:
            self._judge(point, logits.detach().float())
        elif bool(kept.any()):
            self._believed(point, kept, confirmed=whole)
        return logits

    def search_for(self, rows: Tensor) -> None:
        """Go on with some rows (a mask ``(B,)``); the others go back to the start, and where they can, cost no pass."""
        self.counted = rows
        self._moving = rows.nonzero().flatten() if self._stays else None

    def clean_logits(self) -> Tensor:
        """Logits of the surrogate on the clean batch, from its cached features."""
        with torch.no_grad():
            return self._surrogate_logits(self.batch.x, self.batch.z)

    def propose(self, points: Tensor, rows: Tensor) -> Tensor:
        """Logits ``(B, k)`` of the kept batch with new points ``(n, C, H, W)`` in some rows (a mask ``(B,)``)."""
        kept, index = self._kept.point, rows.nonzero().flatten()
        self._hold(points, index)
        with torch.no_grad():
            z = self._features(points).to(kept.z)
        point = kept.with_new(index, points, z)
        self._iterate += 1
        self._proposed = self._believed(point, rows, confirmed=len(index) == len(rows), held=True)
        return self._proposed.logits

    def accept(self, rows: Tensor) -> Tensor:
        """Keep these rows of the last proposal; logits ``(B, k)`` of the mixed batch that results."""
        index = rows.nonzero().flatten()
        if not len(index):
            return self._kept.logits
        new, old = self._proposed.point, self._kept.point
        mixed = old.with_rows(index, new)
        if self._mixes_rows:
            self._kept = self._believed(mixed, torch.ones_like(rows), confirmed=False, held=True)
        else:
            # Put together, not decided: the next proposal or the final pass judges a batch that was.
            logits = torch.where(rows.unsqueeze(1), self._proposed.logits, self._kept.logits)
            self._kept = _Answered(mixed, logits)
        return self._kept.logits

    def regroup(self, company: Company) -> Tensor:
        """Logits ``(B, k)`` of the start, each row in other clean company; for the context ``composed``."""
        assert isinstance(self._defense, OneAtATime)
        self._defense = self._attacked = self._defense.beside(company)
        self._iterate += 1
        if self._rough:
            self._judge_rough(self.start)
            return self._decide(self._defense, self.start.z)
        logits = self._decide(self._defense, self.start.z)
        self._judge(self.start, logits)
        return logits

    def judge(self, x: Tensor) -> None:
        """Pass a batch of points and judge it."""
        with torch.no_grad():
            z = self._features(x)
        self._iterate += 1
        self._judge(Point(x, z), self._decide(self._defense, z))

    def finish(self, x: Tensor) -> Outcome:
        """Judge the batch of final points by a fresh pass, and report.

        Raises:
            AttackError: when a point has left the ball or the box, or an output was not finite.
        """
        with torch.no_grad():
            if self.stops_early:
                x = torch.where(_per_image(self.counted, x), x, self.start.x)
            z = self._final_features(x)
            logits = self._surrogate_logits(x, z)
            fooled = (logits.mean(dim=0) if logits.ndim == 3 else logits).argmax(dim=1) != self.batch.y
        hard = self._decide(self._defense, z)
        self._iterate += 1
        self._final = Point(x, z)
        self._judge(self._final, hard)
        if not bool(self._finite):
            raise AttackError("the defence or its surrogate returned logits that are not finite")
        if float(self._excess) > 0:
            raise AttackError(
                f"the attack left the {self.ball.norm} ball of radius {self.ball.eps:.6g} or the [0, 1] box "
                f"by {float(self._excess):.3g}; its points must be projected before they are proposed"
            )
        return Outcome(
            surrogate_fooled=fooled,
            final_broken=hard.argmax(dim=1) != self.batch.y,
            any_broken=self._broken,
            first_iterate=self._first,
            min_margin=self._lead,
            perturbation=self.ball.size(x - self.batch.x),
            committed=self._committed,
            forwards=self._forwards,
            backwards=self._backwards,
            decisions=self._decisions,
            faults=self.faults,
        )

    def trace(self) -> Trace:
        """What later runs may go on from, once the trial is finished."""
        return Trace(
            self._final, self._best, self._best_lead, self._company, tuple(self._findings), tuple(self._trail)
        )  # fmt: skip

    def _features(self, x: Tensor) -> Tensor:
        self._forwards += len(x)
        return self._defense.features(x)

    def _final_features(self, x: Tensor) -> Tensor:
        """Features of the final points; what stopped early, in a batch decided row by row, was passed already."""
        if not self.stops_early or not self._apart or self._setting.draws > 1:
            return self._features(x)
        z, moved = self.start.z, (x != self.start.x).flatten(1).any(dim=1)
        return z.index_put((moved.nonzero().flatten(),), self._features(x[moved])) if bool(moved.any()) else z

    def _pass(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Features of a batch of points and the surrogate's logits; rows that stay at the start cost no pass."""
        rows = self._moving
        if rows is None:
            z = self._trunk(x)
            return z, self._surrogate_logits(x, z)
        part = self._trunk(x[rows])
        z = self.start.z.index_put((rows,), part)
        if self._mixes_rows:
            return z, self._surrogate_logits(x, z)
        logits = self._surrogate_logits(x[rows], part)
        shape = (*logits.shape[:-2], len(x), logits.shape[-1])
        return z, logits.new_zeros(shape).index_copy(-2, rows, logits)

    def _trunk(self, x: Tensor) -> Tensor:
        """Features with a gradient, unless no surrogate has a use for it."""
        if self._surrogate is not None and self._surrogate.on_images:
            with torch.no_grad():
                return self._features(x)
        self._forwards += len(x)
        return self._watched(self._setting.search.features(self._defense, x))

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
        self._finite = self._finite & torch.isfinite(logits.detach()).all()
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

    def _believed(self, point: Point, rows: Tensor, *, confirmed: bool, held: bool = False) -> _Answered:
        """Decide a batch put together from cached features; what it claims is confirmed by a pass of the whole."""
        if self._mixes_rows:
            logits = self._decide(self._defense, point.z)
        else:
            logits = self._decide_some(point.z, rows, self._kept.logits)
        if not confirmed and self._claims(logits):
            point = self._exact(point)
            logits = self._decide(self._defense, point.z)
        self._judge(point, logits, held=held)
        return _Answered(point, logits)

    def _decide_some(self, z: Tensor, rows: Tensor, others: Tensor) -> Tensor:
        """Decide some rows of a target that decides each by itself."""
        logits = others.clone()
        logits[rows] = self._decide(self._defense, z[rows], rows)
        return logits

    def _claims(self, logits: Tensor) -> bool:
        """Whether a batch would add to the record: a sample newly broken, or fewer left right than ever."""
        right = (logits.argmax(dim=1) == self.batch.y) & self.batch.correct
        new = self.batch.correct & ~right & ~self._broken
        return bool(new.any() | (right.sum() < self._committed.sum()))

    def _judge_point(self, point: Point, logits: Tensor) -> None:
        """Judge an iterate of a gradient attack in its batch and, where rows are seen apart, each in its own."""
        setting = self._setting
        self.latest = point
        if setting.trail:
            self._trail.append(point)
        if self._rough:
            self._stop_early(self._judge_rough(point))
            return
        if self._moving is not None and not self._apart:
            self._stop_early(self._believed(point, self.counted, confirmed=False).point)
            return
        # The naive surrogate is the target's own decision on these features: its value is the verdict.
        is_verdict = self._surrogate == STE and setting.view is None and setting.draws == 1 and self._moving is None
        if is_verdict:
            verdict = logits.float()
        elif self._moving is not None and not self._mixes_rows:
            verdict = self._decide_some(point.z, self._moving, self._kept.logits)
            if self._claims(verdict):
                verdict = self._decide(self._defense, point.z)
        else:
            verdict = self._decide(self._defense, point.z)
        self._judge(point, verdict)
        if setting.view is not None:
            self._judge_apart(point, self._decide(setting.view, point.z))
        self._stop_early(point)

    def _stop_early(self, point: Point) -> None:
        """Search no more for what is broken by more than rounding: it stays where it is."""
        if not self.stops_early:
            return
        done = self.counted & self._broken & (self._best_lead < -NEAR_TIE * self._scale)
        if not bool(done.any()):
            return
        self.start = _mixed(done, point, self.start)
        self.search_for(self.counted & ~done)

    def _judge_rough(self, point: Point) -> Point:
        """Judge a batch by features of the search's own: what it seems to break counts once it was passed again.

        Returns:
            the batch, with the target's own features where it was passed again.
        """
        view = self._setting.view
        logits = self._decide(self._defense, point.z)
        if self._apart and self.stops_early:
            return self._judge_each(point, logits)
        if self._claims(logits):
            point = self._exact(point)
            self._judge(point, self._decide(self._defense, point.z))
        else:
            self._hold(point.x)
            self._prefer(point, -margin(logits, self.batch.y), rough=True)
        if view is None:
            return point
        apart = self._decide(view, point.z)
        if bool((self.batch.correct & (apart.argmax(dim=1) != self.batch.y) & ~self._broken).any()):
            point, self.start = self._exact(point), self._exact(self.start)
            exact = view.beside(self.start.z)
            self._judge_apart(point, self._decide(exact, point.z))
        elif not self.among_others:
            self._prefer(point, -margin(apart, self.batch.y), rough=True)
        return point

    def _judge_each(self, point: Point, logits: Tensor) -> Point:
        """The same where rows are decided apart: only what seems broken is passed again."""
        claimed = self.counted & (logits.argmax(dim=1) != self.batch.y)
        seen = torch.where(claimed.unsqueeze(1), self.batch.logits, logits)
        self._prefer(point, -margin(seen, self.batch.y), rough=True)
        if bool(claimed.any()):
            rows = claimed.nonzero().flatten()
            with torch.no_grad():
                z = point.z.index_copy(0, rows, self._features(point.x[rows]).to(point.z))
            point = Point(point.x, z)
            logits = self._decide(self._defense, z)
        # What is searched for on has rounded features: of these nothing is entered.
        entered = claimed | ~self.counted
        self._judge(point, torch.where(entered.unsqueeze(1), logits, self.batch.logits))
        return point

    def _exact(self, point: Point) -> Point:
        """The same points with the target's own features."""
        with torch.no_grad():
            return Point(point.x, self._features(point.x))

    def _hold(self, points: Tensor, rows: Tensor | None = None) -> None:
        """Hold a batch, or the points of some rows (their places ``(n,)``), to the ball and the box."""
        clean = self.batch.x if rows is None else self.batch.x[rows]
        if len(points):
            self._excess = torch.maximum(self._excess, self.ball.excess(points, clean).amax())

    def _judge(self, point: Point, logits: Tensor, *, held: bool = False) -> None:
        """Enter the verdict on a batch, whose points are held to the ball unless they were."""
        lead = -margin(logits, self.batch.y)
        right = ~self._enter(logits, lead, point, None) & self.batch.correct
        self._prefer(point, lead)
        self._committed = torch.where(right.sum() < self._committed.sum(), right, self._committed)
        if not held:
            self._hold(point.x)

    def _judge_apart(self, point: Point, logits: Tensor) -> None:
        """Enter the verdicts on batches that differ in one row: nobody commits to all of these at once."""
        lead = -margin(logits, self.batch.y)
        if self.among_others:
            self._enter(logits, lead, point, self.start.x)
        else:
            self._enter(logits, lead, self.start, point.x)
            self._prefer(point, lead)

    def _enter(self, logits: Tensor, lead: Tensor, companions: Point, own: Tensor | None) -> Tensor:
        """Note which samples are broken for the first time, and by what; the mask ``(B,)`` of those wrong."""
        wrong = logits.argmax(dim=1) != self.batch.y
        new = wrong & ~self._broken
        if self._setting.keep:
            known = self._broken if self._setting.known is None else self._broken | self._setting.known
            if bool((wrong & ~known & self.batch.correct).any()):
                self._find(Finding(wrong & self.batch.correct, companions.x, own))
        self._first = torch.where(new, self._iterate, self._first)
        self._broken = self._broken | wrong
        self._lead = torch.minimum(self._lead, lead)
        self._finite = self._finite & torch.isfinite(logits).all()
        return wrong

    def _find(self, finding: Finding) -> None:
        """Keep a finding, and drop those it makes needless."""
        self._findings = [old for old in self._findings if bool((old.breaks & ~finding.breaks).any())]
        self._findings.append(finding)

    def _prefer(self, point: Point, lead: Tensor, *, rough: bool = False) -> None:
        """Keep each sample's own point of the lowest lead; of a broken one, only a point that was seen to break it."""
        lower = lead < self._best_lead
        if rough:
            lower = lower & (lead > 0)
        rows = lower.nonzero().flatten()
        if not len(rows):
            return
        self._best = self._best.with_rows(rows, point)
        self._best_lead = torch.where(lower, lead, self._best_lead)
        if self._company is not None and isinstance(self._defense, OneAtATime):
            index = self._defense.company_index()
            assert index is not None
            self._company = torch.where(lower.unsqueeze(1), index, self._company)


@dataclass(frozen=True)
class _Answered:
    """A batch of points and the target's logits."""

    point: Point
    logits: Tensor


def _mixed(mask: Tensor, new: Point, old: Point) -> Point:
    """Some rows (a mask ``(B,)``) of one batch among the others of another."""
    return Point(torch.where(_per_image(mask, new.x), new.x, old.x), torch.where(_per_image(mask, new.z), new.z, old.z))


def _per_image(mask: Tensor, like: Tensor) -> Tensor:
    return mask.view(-1, *[1] * (like.ndim - 1))
