"""An evaluation under way: what is to be made of a batch, what was made of it, and what failed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor

from msa_eval.evidence.proof import Proof
from msa_eval.judging.outcomes import RunResult
from msa_eval.progress import Progress

if TYPE_CHECKING:
    from msa_eval.engine.resume import ResumeStore


@dataclass(frozen=True)
class Failure:
    """A run that failed on a batch, or another part of the evaluation that belongs to no batch, and why."""

    target: str
    context: str
    batch: int | None
    run: str
    error: str

    @classmethod
    def of(
        cls, target: str, run: str, error: BaseException, *, context: str = "", batch: int | None = None
    ) -> Failure:  # fmt: skip
        """What an error makes of a run."""
        return cls(target, context, batch, run, " ".join(str(error).split())[:300] or type(error).__name__)

    @property
    def text(self) -> str:
        """In a line."""
        where = "" if self.batch is None else f" on batch {self.batch}, {self.context}"
        return f"{self.run}{where}: {self.error}"


@dataclass(frozen=True)
class BatchResult:
    """A batch, all runs made.

    Attributes:
        runs: what each run did, in their order, without images.
        committed: right on the one adversarial batch that leaves the fewest right ``(B,)``.
        taken_back: how many samples were called broken, and did not stay so.
        proofs: an adversarial batch for every broken sample, where these were asked for.
        changes: what had changed in the target by then (see `StateGuard`), where that was asked for.
        drift: of a target taken to ignore companions: how much its answers to the points found change in other batches,
            as a share of the logits' range.
        best: each sample's own best point ``(B, C, H, W)``, where that was asked for.
        others: of the samples that no proof is about, where each came nearest to falling, where that was asked for.
    """

    runs: tuple[RunResult, ...]
    committed: Tensor
    taken_back: int
    proofs: tuple[Proof, ...]
    changes: tuple[str, ...]
    drift: float = 0.0
    others: tuple[Proof, ...] = ()
    best: Tensor | None = None


Made = RunResult | Failure | BatchResult
"""What comes of a batch: each run that is made or fails, in their order, and at the end the whole."""


@dataclass(frozen=True)
class BatchJob:
    """A batch on which runs are to be made.

    Attributes:
        number: of the batch.
        keep: whether an adversarial batch is kept for every broken sample.
        held: the runs that are made already, by name.
        lost: why the others can't be made, if so.
        every: whether the best point of every other sample is kept too.
        best: whether each sample's own best point is kept for an evaluation that goes on from there.
    """

    number: int
    keep: bool
    held: Mapping[str, RunResult]
    lost: str | None = None
    every: bool = False
    best: bool = False


@dataclass
class EvaluationState:
    """An evaluation under way.

    Attributes:
        progress: shows how far each context has come.
        store: what is finished, and is not made again.
        keep: whether to keep an adversarial batch for every broken sample.
        every: whether to keep every other sample's best point too.
        best: whether to keep each sample's own best point for an evaluation that goes on from there.
        failures: what failed so far.
    """

    progress: Progress
    store: ResumeStore
    keep: bool = False
    every: bool = False
    best: bool = False
    failures: list[Failure] = field(default_factory=list)

    def fail(self, target: str, run: str, error: BaseException) -> None:
        """Note what failed that belongs to no batch."""
        self.failures.append(Failure.of(target, run, error))
