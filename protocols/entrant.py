"""A target under a protocol: its runs, made on every batch in every context."""

from __future__ import annotations

import dataclasses
import functools
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from msa_eval.protocols.archive import Proof
from msa_eval.protocols.clean import CleanBatches, Pool, seeded
from msa_eval.protocols.composition import CompositionAttack
from msa_eval.protocols.evidence import RunRecord, TargetRecord
from msa_eval.protocols.gallery import POOL, Candidate, Exhibit, exhibit
from msa_eval.protocols.guard import StateGuard
from msa_eval.protocols.history import History
from msa_eval.protocols.offers import Offers, offer
from msa_eval.protocols.packing import RECORDS
from msa_eval.protocols.peering import peer_runs
from msa_eval.protocols.pursuit import PursuitAttack
from msa_eval.protocols.replay import Replay
from msa_eval.protocols.runs import OWN, Attack, Run, plan_runs
from msa_eval.protocols.search import EXACT, Search
from msa_eval.protocols.spec import Protocol
from msa_eval.protocols.trial import AttackError, Batch, Outcome, Trace, Trial
from msa_eval.protocols.units import Units
from msa_eval.surrogates.registry import Own
from torch import Tensor

from msa_eval.attacks.losses import margin
from msa_eval.defense import Defense, WholeModel
from msa_eval.memory import fitting, plain
from msa_eval.peers import told
from msa_eval.progress import Progress, ticking


class Evaluated(NamedTuple):
    """A target in one context, all runs made.

    Attributes:
        record: what the tables are made of.
        proofs: an adversarial batch for every broken sample, where these are kept; of a target that ignores companions,
            in its first context only.
        exhibits: a few broken samples to be looked at, where these are asked for.
    """

    record: TargetRecord
    proofs: list[Proof]
    exhibits: list[Exhibit]


@dataclass(frozen=True)
class Step:
    """A run on a batch, made: what it did, and what it leaves in the batch's history.

    Attributes:
        outcome: for the tables.
        trace: for later runs.
        upheld: of a stochastic target, the proofs that hold.
        taken_back: the samples of which some break did not hold ``(B,)``.
        seconds: that it took.
    """

    outcome: Outcome
    trace: Trace
    upheld: tuple[Proof, ...]
    taken_back: Tensor
    seconds: float = 0.0


@dataclass(frozen=True)
class Searched:
    """A batch, all runs made.

    Attributes:
        outcomes: a run each, in their order.
        seconds: likewise.
        committed: right on the one adversarial batch that leaves the fewest right ``(B,)``.
        taken_back: how many samples were called broken, and did not stay so.
        proofs: an adversarial batch for every broken sample, where these were asked for.
        changes: what had changed in the target by then (see `StateGuard`), where that was asked for.
    """

    outcomes: tuple[Outcome, ...]
    seconds: tuple[float, ...]
    committed: Tensor
    taken_back: int
    proofs: tuple[Proof, ...]
    changes: tuple[str, ...]


RECORDS |= {"Step": Step, "Searched": Searched}


class Failure(NamedTuple):
    """A run that failed on a batch, or another part of the evaluation that belongs to no batch, and why."""

    target: str
    context: str
    batch: int | None
    run: str
    error: str

    @property
    def text(self) -> str:
        """In a line."""
        where = "" if self.batch is None else f" on batch {self.batch}, {self.context}"
        return f"{self.run}{where}: {self.error}"


@dataclass
class Work:
    """An evaluation under way.

    Attributes:
        progress: shows how far each context has come.
        units: what is finished, and is not made again.
        keep: whether to keep an adversarial batch for every broken sample.
        failures: what failed so far.
    """

    progress: Progress
    units: Units
    keep: bool = False
    failures: list[Failure] = field(default_factory=list)

    def fail(
        self, target: str, run: str, error: BaseException, *, context: str = "", batch: int | None = None
    ) -> None:  # fmt: skip
        """Note what failed."""
        told = " ".join(str(error).split())[:300] or type(error).__name__
        self.failures.append(Failure(target, context, batch, run, told))


@dataclass(frozen=True)
class Entrant:
    """A target ready for its runs."""

    name: str
    defense: Defense
    clean: CleanBatches
    runs: Mapping[str, Sequence[Run]]
    offers: Offers
    protocol: Protocol
    seed: int
    search: Search = EXACT

    @classmethod
    def enter(
        cls,
        name: str,
        defense: Defense,
        clean: CleanBatches,
        *,
        protocol: Protocol,
        own: Mapping[str, Own],
        seed: int,
    ) -> Entrant:
        """Plan the runs of a target; the caller's own surrogates are the defence's."""
        offers = Offers((), (), "")
        if protocol.apgd is not None:
            look = functools.partial(
                offer, protocol.apgd, defense, batch := next(iter(clean)), own=own, use_own=name == "defense",
                batch_dependent=clean.batch_dependent, recombination=protocol.recombination,
            )  # fmt: skip
            with seeded(seed):
                offers = fitting(defense, len(batch.x), look)
        companions = clean.batch_dependent and max(map(len, clean.seats)) > 1
        runs = {
            context: plan_runs(
                protocol, offers, num_classes=clean.num_classes, context=context,
                batch_dependent=companions, caches=not isinstance(defense, WholeModel),
                exchanges=hasattr(defense, "logits_with"),
            )
            for context in protocol.contexts
        }  # fmt: skip
        if protocol.peers:
            # After all others, so that they change nothing in our own runs.
            with seeded(seed):
                more = peer_runs(
                    protocol.peers, protocol.ball, defense, next(iter(clean)), num_classes=clean.num_classes,
                    own=own if name == "defense" else {},
                )  # fmt: skip
            runs = {context: [*made, *more] for context, made in runs.items()}
        if isinstance(defense, WholeModel) and clean.batch_dependent and set(protocol.contexts) - {"joint"}:
            warnings.warn(
                f"the {name} has no trunk, so solo, alone and composed ask it once a sample: every pass costs as many "
                f"passes of a batch as the batch has images (up to {protocol.batch_size})",
                stacklevel=2,
            )
        return cls(name, defense, clean, runs, offers, protocol, seed)

    @functools.cached_property
    def replay(self) -> Replay:
        """The target as it answers for proofs."""
        clean = self.clean
        batches = [clean.chosen[seat] for seat in clean.seats]
        return Replay(self.defense, clean.samples, batches, device=clean.device, draws=clean.draws)

    @property
    def searched(self) -> Sequence[str]:
        """The contexts in which runs are made; in the others a target that ignores its companions answers the same."""
        return self.protocol.contexts if self.clean.batch_dependent else self.protocol.contexts[:1]

    def evaluate(self, work: Work, guard: StateGuard, *, show: bool = False) -> Iterator[Evaluated]:
        """Make every run in every context; a target that ignores its companions answers the same in all.

        Args:
            work: the evaluation that it is part of.
            guard: over the target.
            show: whether to make exhibits, in the first context.
        """
        first, *others = self.protocol.contexts
        done = self._evaluate(first, work, guard, show=show)
        yield done
        for context in others:
            if self.clean.batch_dependent:
                yield self._evaluate(context, work, guard)
            else:
                yield Evaluated(dataclasses.replace(done.record, context=context), [], [])

    def _evaluate(self, context: str, work: Work, guard: StateGuard, *, show: bool = False) -> Evaluated:
        """Make every run on every batch, batch after batch."""
        clean = self.clean.seen_in(context)
        seats, chosen, samples = clean.seats, clean.chosen, clean.samples
        runs = self.runs[context]
        pool = clean.pool(self.protocol.composition) if context == "composed" and clean.batch_dependent else None
        candidates: list[Candidate] = []
        done: list[Searched] = []
        with ticking(work.progress, len(clean) * len(runs), f"{self.name} {context}") as tick:
            for batch in clean:
                looking = show and len(candidates) < POOL
                searched = self._search(context, batch, pool, work, guard, keep=work.keep or looking, tick=tick)
                done.append(searched)
                if looking:
                    made = {run.name: outcome for run, outcome in zip(runs, searched.outcomes, strict=True)}
                    candidates += _candidates(searched.proofs, batch, made)
        proofs = [proof for searched in done for proof in searched.proofs] if work.keep else []

        def placed(values: Sequence[Tensor]) -> Any:
            return _place(values, seats)

        record = TargetRecord(
            target=self.name,
            context=context,
            index=chosen.numpy(),
            label=samples.y[chosen].numpy(),
            batch=placed([torch.full((len(seat),), number) for number, seat in enumerate(seats)]),
            position=placed([torch.arange(len(seat)) for seat in seats]),
            clean_prediction=placed([batch.logits.argmax(dim=1) for batch in clean]),
            clean_margin=placed([-margin(batch.logits, batch.y) for batch in clean]),
            committed=placed([searched.committed for searched in done]),
            taken_back=sum(searched.taken_back for searched in done),
            runs=[
                _record(run, [one.outcomes[i] for one in done], seats, sum(one.seconds[i] for one in done))
                for i, run in enumerate(runs)
            ],
        )
        return Evaluated(record, proofs, self._exhibits(candidates))

    def _search(
        self,
        context: str,
        batch: Batch,
        pool: Pool | None,
        work: Work,
        guard: StateGuard,
        *,
        keep: bool,
        tick: Callable[[], None],
    ) -> Searched:
        """Make every run on a batch that is not finished yet; a run may go on from what earlier ones found.

        A run that fails leaves nothing to the later ones, and what follows it is not kept as a unit: when the
        evaluation is repeated, it is tried again.
        """
        runs, name = self.runs[context], f"{self.name}-{context}-{batch.number:06d}"
        found = work.units.read(name, Searched)
        if found is not None:
            for _ in runs:
                tick()
            guard.remember(found.changes)
            return found
        history = History(batch, None if pool is None else self.clean.own_company(batch, pool))
        outcomes, seconds, whole = [], [], True
        parts = [f"{name}.{place:03d}" for place in range(len(runs))]
        for run, part in zip(runs, parts, strict=True):
            tick()
            step = work.units.read(part, Step)
            if step is None:
                started = time.perf_counter()
                try:
                    step = self._attempt(run, batch, context, history, pool, keep=keep)
                except AttackError as error:
                    work.fail(self.name, run.name, error.__cause__ or error, context=context, batch=batch.number)
                    outcomes.append(Outcome.failed(batch))
                    seconds.append(time.perf_counter() - started)
                    whole = False
                    continue
                step = dataclasses.replace(step, seconds=time.perf_counter() - started)
                if whole:
                    work.units.write(part, step)
            history.add(step.outcome, step.trace)
            history.upheld += step.upheld
            history.taken_back = history.taken_back | step.taken_back
            outcomes.append(step.outcome)
            seconds.append(step.seconds)
        searched = Searched(
            tuple(outcomes),
            tuple(seconds),
            history.committed,
            int((history.taken_back & ~history.broken).sum()),
            tuple(self._proofs(context, batch, history, pool)) if keep else (),
            guard.so_far() if work.units.folder is not None else (),
        )
        if whole:
            work.units.write(name, searched)
            work.units.drop(*parts)
        return searched

    def _exhibits(self, candidates: Sequence[Candidate]) -> list[Exhibit]:
        """Pictures of some of the candidates; where they can't be made, the evaluation is worth no less."""
        try:
            return exhibit(candidates, self.replay) if candidates else []
        except Exception as error:
            warnings.warn(f"no gallery could be made of what was broken: {error}", stacklevel=2)
            return []

    def _proofs(self, context: str, batch: Batch, history: History, pool: Pool | None) -> list[Proof]:
        own = self.clean.chosen[self.clean.seats[batch.number]]
        return history.proofs(
            self.name, context, batch.number, rows_interact=self.clean.batch_dependent,
            pool=own if pool is None else torch.cat([own, pool.indices]),
        )  # fmt: skip

    def _attempt(
        self, run: Run, batch: Batch, context: str, history: History, pool: Pool | None, *, keep: bool
    ) -> Step:
        """Make one run on one batch; where memory is short, again and again with a trunk that takes smaller parts.

        Raises:
            AttackError: when it fails.
        """
        try:
            return fitting(
                self.defense, len(batch.x), lambda: self._step(run, batch, context, history, pool, keep=keep)
            )
        except Exception as error:
            raise AttackError(f"{self.name}, run {run.name}, batch {batch.number}: {error}") from error

    def _step(self, run: Run, batch: Batch, context: str, history: History, pool: Pool | None, *, keep: bool) -> Step:
        clean = self.clean
        target = clean.view(context, batch, history.company)
        setting = run.setting(target, history, victim=self._victim(batch))
        keep = (keep or clean.draws > 1) and context == "joint" and clean.batch_dependent
        trail = context == "joint" and run.attack is not None and any(o.label == "pursuit" for o in self.runs[context])
        # Attacks of others are shown the target's own features; without a trunk a search has no others.
        search = EXACT if run.loss == OWN or isinstance(plain(self.defense), WholeModel) else self.search
        setting = dataclasses.replace(
            setting, draws=clean.draws, eot=clean.eot, keep=keep, trail=trail, search=search
        )  # fmt: skip
        trial = Trial(
            target, run.surrogate, batch, self.protocol.ball, mixes_rows=clean.batch_dependent, setting=setting
        )
        generator = run.generator(self.seed, self.name, context, batch.number)
        attack = run.attack or self._choice(run, batch, history, pool)
        # A stochastic target draws from the global generators: seeded here, so that the evidence can be made again.
        with seeded(generator.initial_seed()):
            points = attack(trial, generator) if bool(trial.counted.any()) else trial.start.x
            outcome, trace = trial.finish(points), trial.trace()
            if clean.draws > 1:
                return self._upheld(outcome, trace, context, batch, history, pool)
        return Step(outcome, trace, (), torch.zeros_like(history.taken_back))

    def _upheld(
        self, outcome: Outcome, trace: Trace, context: str, batch: Batch, history: History, pool: Pool | None
    ) -> Step:
        """Judge once more, on the batches that will prove it, what a run on a stochastic target was the first to break.

        What does not hold is taken back: the sample counts as unbroken in this run and stands for the next, which may
        find a better batch. No second batch of the same run is tried, for each is one more chance to pass by luck. A
        sample that a proof has broken needs no other, so what later runs say of it stays as it is.
        """
        run = History(batch, history.company)
        run.add(dataclasses.replace(outcome, any_broken=outcome.any_broken & ~history.broken), trace)
        taken, upheld = torch.zeros_like(history.taken_back), []
        for proof in self._proofs(context, batch, run, pool):
            holds = self.replay.clearly_breaks(proof).cpu()
            taken[proof.positions[~holds].to(taken.device)] = True
            if bool(holds.any()):
                upheld.append(proof.only(holds))
        return Step(outcome.taking_back(taken, batch.correct), trace, tuple(upheld), taken)

    def _victim(self, batch: Batch) -> Tensor | None:
        """The one sample ``(B,)`` whose companions are moved, where the protocol names one."""
        if self.protocol.apgd is None or self.protocol.apgd.victim is None:
            return None
        return (self.clean.chosen[self.clean.seats[batch.number]] == self.protocol.apgd.victim).to(batch.y.device)

    def _choice(self, run: Run, batch: Batch, history: History, pool: Pool | None) -> Attack:
        """An attack that chooses from what is cached."""
        if pool is None:
            budget = self.protocol.recombination
            assert budget is not None
            passes = budget.passes if run.surrogate is not None else 0
            return PursuitAttack(history.points, budget.sweeps, passes, budget.classes)
        assert history.company is not None
        own = self.clean.chosen[self.clean.seats[batch.number]].to(batch.y.device)
        choice = self.protocol.composition
        identity = torch.cat([own, pool.indices.to(own.device)])
        composition = CompositionAttack(history.company, identity, own, choice.trials, choice.search == "greedy")
        return functools.partial(composition.pursue, turn=run.restart) if run.label == "pursuit" else composition


def _candidates(proofs: Sequence[Proof], batch: Batch, outcomes: Mapping[str, Outcome]) -> list[Candidate]:
    """The samples of a batch that are broken, in batch order, each with the first run that broke it."""
    first: dict[int, str] = {}
    for run, outcome in reversed(list(outcomes.items())):
        first |= dict.fromkeys(outcome.any_broken.nonzero().flatten().tolist(), run)
    single = {int(at): proof.only(proof.positions == at) for proof in proofs for at in proof.positions}
    return [
        Candidate(proof, int(batch.y[at]), first[at], batch.x[at], batch.logits[at])
        for at, proof in sorted(single.items())
        if at in first
    ]


def _record(run: Run, outcomes: Sequence[Outcome], seats: Sequence[Tensor], seconds: float) -> RunRecord:
    def joined(get: Callable[[Outcome], Tensor]) -> Any:
        return _place([get(outcome) for outcome in outcomes], seats)

    return RunRecord(
        name=run.name,
        surrogate=run.surrogate_name,
        attack=run.attack_name,
        loss=run.loss,
        restart=run.restart,
        surrogate_fooled=joined(lambda outcome: outcome.surrogate_fooled),
        final_broken=joined(lambda outcome: outcome.final_broken),
        any_broken=joined(lambda outcome: outcome.any_broken),
        first_iterate=joined(lambda outcome: outcome.first_iterate),
        min_margin=joined(lambda outcome: outcome.min_margin),
        perturbation=joined(lambda outcome: outcome.perturbation),
        forwards=sum(outcome.forwards for outcome in outcomes),
        backwards=sum(outcome.backwards for outcome in outcomes),
        decisions=sum(outcome.decisions for outcome in outcomes),
        seconds=seconds,
        notes=told(fault for outcome in outcomes for fault in outcome.faults) if run.loss == OWN else None,
    )


def _place(values: Sequence[Tensor], seats: Sequence[Tensor]) -> Any:
    """Join values a batch into one array ``(N,)``, in the order of the samples."""
    joined = torch.cat([value.cpu() for value in values]).numpy()
    placed = np.empty_like(joined)
    placed[torch.cat(list(seats)).numpy()] = joined
    return placed
