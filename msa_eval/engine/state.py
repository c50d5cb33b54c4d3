"""An evaluation under way: what is finished, and what failed."""

from __future__ import annotations

from dataclasses import dataclass, field

from msa_eval.engine.messages import Failure
from msa_eval.engine.resume import ResumeStore
from msa_eval.progress import Progress


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
