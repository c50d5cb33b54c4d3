"""What was made of a target in one context: read from the units of earlier processes, noted, and added up."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from msa_eval.attacks.batch import Batch
from msa_eval.attacks.external.faults import describe_faults
from msa_eval.attacks.losses import margin_loss
from msa_eval.auditing.state_guard import StateGuard
from msa_eval.engine.batch_runner import BatchRunner
from msa_eval.engine.messages import BatchJob, BatchResult, EvaluationState, Failure, Made
from msa_eval.engine.schedule import OWN, Run
from msa_eval.evidence.gallery import Exhibit
from msa_eval.evidence.proof import Proof
from msa_eval.evidence.records import TargetRecord
from msa_eval.judging.exhibits import POOL, Candidate, exhibit
from msa_eval.judging.outcomes import RunResult

Tick = Callable[[], None]
"""Called once for each run on a batch that is made."""

OF_RUNS = ("surrogate_fooled", "final_broken", "any_broken", "first_iterate", "min_margin", "perturbation")
"""What the tables hold of every run on every sample."""


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
        self._places = {run.name: place for place, run in enumerate(runner.runs)}
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
        found = (self._evaluation.store.read(self._part(number, run), RunResult) for run in self._places)
        held = {made.run: made for made in found if made is not None}
        self._failures[number] = []
        keep, asked = self._evaluation.keep or self._looking, self._evaluation
        return BatchJob(number, keep, held, every=asked.every, best=asked.best)

    def take(self, number: int, made: Made, tick: Tick) -> None:
        """Note what came of a batch.

        What follows a run that failed is not kept as a unit, and neither is the batch: when the evaluation is
        repeated, it is tried again.
        """
        failures, store = self._failures[number], self._evaluation.store
        if isinstance(made, BatchResult):
            if not failures:
                store.write(self._name(number), made)
                store.drop(*(self._part(number, run) for run in self._places))
            self._finish(number, made, tick)
            return
        if isinstance(made, Failure):
            failures.append(made)
        elif not failures:
            store.write(self._part(number, made.run), made)
        self._tell(number, self._places[made.run] + 1, tick)

    @property
    def failures(self) -> list[Failure]:
        """What failed, batch after batch."""
        return [one for _, failed in sorted(self._failures.items()) for one in failed]

    @property
    def proofs(self) -> list[Proof]:
        """An adversarial batch for every broken sample, where these are kept."""
        return [proof for one in self._in_order() for proof in one.proofs] if self._evaluation.keep else []

    @property
    def best(self) -> Tensor | None:
        """Each sample's own best point ``(N, C, H, W)``, where these are kept."""
        parts = [one.best for one in self._in_order() if one.best is not None]
        if not parts:
            return None
        joined = torch.cat(parts)
        return torch.empty_like(joined).index_copy(0, torch.cat(list(self.runner.clean.batch_plan)), joined)

    @property
    def others(self) -> list[Proof]:
        """Where every other sample came nearest to falling; ``None`` where that is not kept."""
        return [proof for one in self._in_order() for proof in one.others]

    def exhibits(self) -> list[Exhibit]:
        """A few broken samples to be looked at; where they can't be made, the evaluation is worth no less."""
        try:
            return exhibit(self._candidates, self.runner.plan.replay) if self._candidates else []
        except Exception as error:
            warnings.warn(f"no gallery could be made of what was broken: {error}", stacklevel=2)
            return []

    def record(self) -> TargetRecord:
        """What the tables are made of, when every batch is finished."""
        clean, done = self.runner.clean, self._in_order()
        order = torch.cat(list(clean.batch_plan))

        def joined(parts: Iterable[Tensor]) -> Any:
            """Values of each batch ``(..., B)`` as one array ``(..., N)``, in the order of the samples."""
            values = torch.cat([part.cpu() for part in parts], dim=-1)
            return torch.empty_like(values).index_copy(-1, order, values).numpy()

        def of_runs(name: str) -> Any:
            return joined(torch.stack([getattr(made, name) for made in one.runs]) for one in done)

        return TargetRecord(
            target=self.runner.plan.name,
            context=self.runner.context,
            index=clean.chosen.numpy(),
            label=clean.samples.y[clean.chosen].numpy(),
            batch=joined(torch.full((len(indices),), number) for number, indices in enumerate(clean.batch_plan)),
            position=joined(torch.arange(len(indices)) for indices in clean.batch_plan),
            clean_prediction=joined(batch.logits.argmax(dim=1) for batch in clean),
            clean_margin=joined(-margin_loss(batch.logits, batch.y) for batch in clean),
            committed=joined(one.committed for one in done),
            taken_back=sum(one.taken_back for one in done),
            runs=pd.DataFrame([_about(run, [one.runs[i] for one in done]) for i, run in enumerate(self.runner.runs)]),
            **{name: of_runs(name) for name in OF_RUNS},
        )

    def _in_order(self) -> list[BatchResult]:
        return [self._done[number] for number in range(len(self.runner.clean))]

    @property
    def _looking(self) -> bool:
        """Whether there are too few broken samples to choose exhibits from, in the first batches that are finished."""
        return self._show and len(self._candidates) < POOL

    def _finish(self, number: int, searched: BatchResult, tick: Tick) -> None:
        self._tell(number, len(self.runner.runs), tick)
        self.guard.remember(searched.changes)
        self._done[number] = searched
        while (found := self._done.get(self._looked)) is not None:  # in the order of the batches, so always the same
            if self._looking:
                self._candidates += _candidates(found, self.runner.clean.batch(self._looked))
            self._looked += 1

    def _tell(self, number: int, count: int, tick: Tick) -> None:
        """Show that so many runs are made on a batch; those of a batch that is begun again have been shown."""
        for _ in range(self._noted.get(number, 0), count):
            tick()
        self._noted[number] = max(count, self._noted.get(number, 0))

    def _name(self, number: int) -> str:
        return f"{self.runner.plan.name}-{self.runner.context}-{number:06d}"

    def _part(self, number: int, run: str) -> str:
        return f"{self._name(number)}.{self._places[run]:03d}"


def _candidates(made: BatchResult, batch: Batch) -> list[Candidate]:
    """The samples of a batch that are broken, in batch order, each with the first run that broke it."""
    first: dict[int, str] = {}
    for one in reversed(made.runs):
        first |= dict.fromkeys(one.any_broken.nonzero().flatten().tolist(), one.run)
    single = {int(at): proof.only(proof.positions == at) for proof in made.proofs for at in proof.positions}
    return [
        Candidate(proof, int(batch.y[at]), first[at], batch.x[at], batch.logits[at])
        for at, proof in sorted(single.items())
        if at in first
    ]


def _about(run: Run, made: Sequence[RunResult]) -> dict[str, Any]:
    """A row on a run: what it was, and what it took on all batches."""
    faults = describe_faults(fault for one in made for fault in one.faults)
    return {
        "run": run.name,
        "surrogate": run.surrogate_name,
        "attack": run.attack_name,
        "loss": run.loss,
        "restart": run.restart,
        "forwards": sum(one.forwards for one in made),
        "backwards": sum(one.backwards for one in made),
        "decisions": sum(one.decisions for one in made),
        "seconds": round(sum(one.seconds for one in made), 3),
        "notes": "; ".join(faults) if run.loss == OWN else None,
    }
