"""What was made of a target in one context: read from the units of earlier processes, noted, and added up."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from msa_eval.attacks.batch import Batch
from msa_eval.attacks.external.faults import describe_faults
from msa_eval.attacks.losses import margin_loss
from msa_eval.auditing.state_guard import StateGuard
from msa_eval.engine.batch_runner import BatchRunner
from msa_eval.engine.messages import BatchJob, BatchResult, Failure, Made, RunResult
from msa_eval.engine.schedule import OWN, Run
from msa_eval.engine.state import EvaluationState
from msa_eval.evidence.gallery import Exhibit
from msa_eval.evidence.proof import Proof
from msa_eval.evidence.records import RunRecord, TargetRecord
from msa_eval.judging.exhibits import POOL, Candidate, exhibit
from msa_eval.judging.outcomes import Outcome
from msa_eval.judging.replay import Replay

Tick = Callable[[], None]
"""Called once for each run on a batch that is made."""


class Evaluated(NamedTuple):
    """A target in one context, all runs made.

    Attributes:
        record: what the tables are made of.
        proofs: an adversarial batch for every broken sample, where these are kept; of a target that ignores companions,
            in its first context only.
        exhibits: a few broken samples to be looked at, where these are asked for.
        others: likewise where every other sample came nearest to falling.
        best: each sample's own best point ``(N, C, H, W)``, where these are kept.
    """

    record: TargetRecord
    proofs: list[Proof]
    exhibits: list[Exhibit]
    others: list[Proof]
    best: Tensor | None = None


class _Open:
    """A batch under way: the places of the runs that are still due, and what failed."""

    def __init__(self, due: Iterator[int]) -> None:
        self.due, self.failures = due, list[Failure]()


class Collector:
    """What was made of a series, whoever made it and in whichever order.

    Args:
        runner: the target in a context.
        evaluation: the evaluation that it is part of.
        guard: over the target.
        show: whether to make exhibits.
    """

    def __init__(
        self, runner: BatchRunner, evaluation: EvaluationState, guard: StateGuard, *, show: bool = False
    ) -> None:
        self.runner, self.guard = runner, guard
        self._evaluation, self._show = evaluation, show
        self._open: dict[int, _Open] = {}
        self._done: dict[int, BatchResult] = {}
        self._failures: dict[int, list[Failure]] = {}
        self._noted: dict[int, int] = {}
        self._candidates: list[Candidate] = []
        self._looked = 0

    @property
    def drift(self) -> float:
        """Of a target taken to ignore companions: how much its answers to the points found changed in other batches."""
        return max((one.drift for one in self._done.values()), default=0.0)

    @property
    def total(self) -> int:
        """How many runs on a batch there are."""
        return len(self.runner.clean) * len(self.runner.runs)

    def jobs(self, tick: Tick) -> Iterator[BatchJob]:
        """The batches that are not finished; one is looked up when it is asked for, no sooner."""
        for number in range(len(self.runner.clean)):
            found = self._evaluation.store.read(self._name(number), BatchResult)
            if found is None:
                yield self.job(number)
            else:
                self._finish(number, found, tick)

    def job(self, number: int) -> BatchJob:
        """What is left to do on a batch."""
        places = range(len(self.runner.runs))
        found = {place: self._evaluation.store.read(self._part(number, place), RunResult) for place in places}
        held = {place: step for place, step in found.items() if step is not None}
        self._open[number] = _Open(place for place in places if place not in held)
        return BatchJob(
            number,
            self._evaluation.keep or self._looking,
            held,
            every=self._evaluation.every,
            best=self._evaluation.best,
        )

    def take(self, number: int, made: Made, tick: Tick) -> None:
        """Note what came of a batch.

        What follows a run that failed is not kept as a unit, and neither is the batch: when the evaluation is
        repeated, it is tried again.
        """
        batch, store = self._open[number], self._evaluation.store
        if isinstance(made, BatchResult):
            if not batch.failures:
                store.write(self._name(number), made)
                store.drop(*(self._part(number, place) for place in range(len(self.runner.runs))))
            self._failures[number] = batch.failures
            self._finish(number, made, tick)
            return
        place = next(batch.due)
        if isinstance(made, Failure):
            batch.failures.append(made)
        elif not batch.failures:
            store.write(self._part(number, place), made)
        self._tell(number, place + 1, tick)

    def evaluated(self) -> Evaluated:
        """All of it, when every batch is finished; what failed is noted in the work, batch after batch."""
        self._evaluation.failures += [one for _, failed in sorted(self._failures.items()) for one in failed]
        clean, runs = self.runner.clean, self.runner.runs
        batch_plan, chosen, samples = clean.batch_plan, clean.chosen, clean.samples
        done = [self._done[number] for number in range(len(clean))]

        def placed(values: Sequence[Tensor]) -> Any:
            return _place(values, batch_plan)

        record = TargetRecord(
            target=self.runner.plan.name,
            context=self.runner.context,
            index=chosen.numpy(),
            label=samples.y[chosen].numpy(),
            batch=placed([torch.full((len(indices),), number) for number, indices in enumerate(batch_plan)]),
            position=placed([torch.arange(len(indices)) for indices in batch_plan]),
            clean_prediction=placed([batch.logits.argmax(dim=1) for batch in clean]),
            clean_margin=placed([-margin_loss(batch.logits, batch.y) for batch in clean]),
            committed=placed([searched.committed for searched in done]),
            taken_back=sum(searched.taken_back for searched in done),
            runs=[
                _record(run, [one.outcomes[i] for one in done], batch_plan, sum(one.seconds[i] for one in done))
                for i, run in enumerate(runs)
            ],
        )
        proofs = [proof for searched in done for proof in searched.proofs] if self._evaluation.keep else []
        others = [proof for searched in done for proof in searched.others]
        parts = [searched.best for searched in done if searched.best is not None]
        best = torch.from_numpy(_place(parts, clean.batch_plan)) if parts else None
        return Evaluated(record, proofs, _exhibits(self._candidates, self.runner.plan.replay), others, best)

    @property
    def _looking(self) -> bool:
        """Whether there are too few broken samples to choose exhibits from, in the first batches that are finished."""
        return self._show and len(self._candidates) < POOL

    def _finish(self, number: int, searched: BatchResult, tick: Tick) -> None:
        self._open.pop(number, None)
        self._tell(number, len(self.runner.runs), tick)
        self.guard.remember(searched.changes)
        self._done[number] = searched
        while (found := self._done.get(self._looked)) is not None:  # in the order of the batches, so always the same
            if self._looking:
                made = {run.name: outcome for run, outcome in zip(self.runner.runs, found.outcomes, strict=True)}
                self._candidates += _candidates(found.proofs, self.runner.clean.batch(self._looked), made)
            self._looked += 1

    def _tell(self, number: int, count: int, tick: Tick) -> None:
        """Show that so many runs are made on a batch; those of a batch that is begun again have been shown."""
        for _ in range(self._noted.get(number, 0), count):
            tick()
        self._noted[number] = max(count, self._noted.get(number, 0))

    def _name(self, number: int) -> str:
        return f"{self.runner.plan.name}-{self.runner.context}-{number:06d}"

    def _part(self, number: int, place: int) -> str:
        return f"{self._name(number)}.{place:03d}"


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


def _exhibits(candidates: Sequence[Candidate], replay: Replay) -> list[Exhibit]:
    """Pictures of some of the candidates; where they can't be made, the evaluation is worth no less."""
    try:
        return exhibit(candidates, replay) if candidates else []
    except Exception as error:
        warnings.warn(f"no gallery could be made of what was broken: {error}", stacklevel=2)
        return []


def _record(run: Run, outcomes: Sequence[Outcome], batch_plan: Sequence[Tensor], seconds: float) -> RunRecord:
    def joined(get: Callable[[Outcome], Tensor]) -> Any:
        return _place([get(outcome) for outcome in outcomes], batch_plan)

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
        notes=describe_faults(fault for outcome in outcomes for fault in outcome.faults) if run.loss == OWN else None,
    )


def _place(values: Sequence[Tensor], batch_plan: Sequence[Tensor]) -> Any:
    """Join values a batch into one array ``(N,)``, in the order of the samples."""
    joined = torch.cat([value.cpu() for value in values]).numpy()
    placed = np.empty_like(joined)
    placed[torch.cat(list(batch_plan)).numpy()] = joined
    return placed
