"""Engines: where the runs are made, in this process or elsewhere. The evidence is the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, runtime_checkable
from typing import Protocol as Interface

from msa_eval.engine.collector import Collector
from msa_eval.engine.messages import EvaluationState
from msa_eval.progress import ticking

ENGINES = ("local", "ray")


@runtime_checkable
class Executor(Interface):
    """Makes the runs of an evaluation, which it is entered and left with."""

    def check(self, device: str) -> None:
        """Check that runs can be made on a device.

        Raises:
            ValueError: when they can't.
        """
        ...

    def __enter__(self) -> Executor:
        """Get ready, before anything is computed."""
        ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Leave."""
        ...

    def make(self, collectors: Sequence[Collector], evaluation: EvaluationState) -> None:
        """Make every job of the ledgers, and give them what came of it: of each batch in order, the batches in any."""
        ...


class LocalExecutor:
    """Makes them in this process, one after another."""

    def check(self, device: str) -> None:
        """Any will do that `msa_eval.device` lets pass."""

    def __enter__(self) -> LocalExecutor:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        pass

    def make(self, collectors: Sequence[Collector], evaluation: EvaluationState) -> None:
        """Make them, with a progress bar for each target in each context."""
        for collector in collectors:
            guard = collector.guard if evaluation.store.folder is not None else None
            with ticking(evaluation.progress, collector.total, collector.runner.title) as tick:
                for job in collector.jobs(tick):
                    for made in collector.runner.search(job, guard):
                        collector.take(job.number, made, tick)


def executor_of(engine: str | Executor, device: str) -> Executor:
    """The engine of a name, or one that was given.

    Raises:
        ValueError: when there is none of that name, or it can't compute on the device.

    >>> type(executor_of("local", "cpu")).__name__
    'LocalExecutor'
    """
    if engine == "local":
        engine = LocalExecutor()
    elif engine == "ray":
        from msa_eval.engine.ray_executor import RayEngine

        engine = RayEngine()
    if not isinstance(engine, Executor):
        raise ValueError(f"there is no engine {engine!r}; expected {' or '.join(ENGINES)}, or an engine")
    engine.check(device)
    return engine


@dataclass(frozen=True)
class Execution:
    """How an evaluation is carried out; `evaluate` describes each.

    Attributes:
        device: where to compute.
        micro_batch: how many images go through the trunk at once; ``None``: as many as fit.
        precision: that a search passes its points in.
        deterministic: whether only deterministic algorithms are used.
        executor: makes the runs.
    """

    device: str
    micro_batch: int | None
    precision: str
    deterministic: bool
    executor: Executor

    def about(self) -> dict[str, Any]:
        """What an unfinished evaluation has to share with the one that goes on from it."""
        return {
            "micro_batch": self.micro_batch, "precision": self.precision, "deterministic": self.deterministic,
        }  # fmt: skip
