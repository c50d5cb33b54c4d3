"""What a run did to a batch: for the tables, and for later runs."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from msa_eval.attacks.batch import AdversarialBatch, Batch
from msa_eval.attacks.external.faults import Fault
from msa_eval.evidence.proof import Proof


@dataclass(frozen=True)
class BreakingBatch:
    """An adversarial batch that was judged, or several that differ in one row.

    Attributes:
        breaks: the samples it breaks, a mask ``(B,)``.
        x: the batch ``(B, C, H, W)``.
        own: where given, sample i is broken by the batch whose row i is ``own[i]`` ``(B, C, H, W)``.
        run: that showed it.
    """

    breaks: Tensor
    x: Tensor
    own: Tensor | None = None
    run: str = ""


@dataclass(frozen=True)
class Nearest:
    """An adversarial batch, or several, in which some samples came nearer to falling than in any other.

    Attributes:
        rows: the samples of which that holds, a mask ``(B,)``.
        margin: of each label there ``(B,)``.
        x: the batch ``(B, C, H, W)``.
        own: as in `BreakingBatch`.
        run: that showed it.
    """

    rows: Tensor
    margin: Tensor
    x: Tensor
    own: Tensor | None = None
    run: str = ""


@dataclass(frozen=True)
class Trace:
    """What a run leaves to later ones and to the proofs: images, which are not kept for the tables.

    Attributes:
        final: the final points.
        best: each sample's own point of the lowest margin.
        best_margin: that margin ``(B,)``.
        companions: who sat beside it ``(B, B - 1)``, where the attacker chooses.
        findings: adversarial batches that break samples not broken before, where these are kept.
        trail: the points of every iterate, where these are kept.
        ranking: the classes of each sample, nearest first ``(B, k)``, where a run ranked them.
        nearest: the batches in which each sample came nearest to falling, where these are kept.
    """

    final: AdversarialBatch
    best: AdversarialBatch
    best_margin: Tensor
    companions: Tensor | None
    findings: tuple[BreakingBatch, ...]
    trail: tuple[AdversarialBatch, ...]
    ranking: Tensor | None = None
    nearest: tuple[Nearest, ...] = ()


@dataclass(frozen=True)
class RunResult:
    """What a run did to a batch; one entry a sample ``(B,)`` unless said otherwise.

    Attributes:
        surrogate_fooled: the attacked model is wrong on the final batch.
        final_broken: the hard target is wrong on the final batch.
        any_broken: it is wrong on some batch it was shown.
        first_iterate: the first of these, counted from 0; -1 where there is none.
        min_margin: the lowest logit margin of the label over all batches shown.
        perturbation: norm of the final perturbation.
        committed: right on the one shown batch that leaves the fewest right.
        forwards: images passed through the trunk (a number).
        backwards: images passed back through it (a number).
        decisions: rows decided by the hard target (a number).
        taken_back: of a stochastic target, some break did not hold.
        trace: what it leaves to later runs; ``None`` once all of them are made.
        upheld: of a stochastic target, the proofs that hold.
        faults: of an attack of other libraries, what it did and should not have.
        run: its name.
        seconds: that it took.
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
    taken_back: Tensor
    trace: Trace | None = None
    upheld: tuple[Proof, ...] = ()
    faults: tuple[Fault, ...] = ()
    run: str = ""
    seconds: float = 0.0

    @classmethod
    def failed(cls, run: str, batch: Batch, seconds: float) -> RunResult:
        """Of a run that came to no end: it broke nothing, and what it would have measured is NaN."""
        nothing, unknown = torch.zeros_like(batch.correct), torch.full_like(batch.y, torch.nan, dtype=torch.float32)
        first = torch.full_like(batch.y, -1)
        return cls(
            nothing, nothing, nothing, first, unknown, unknown, batch.correct, 0, 0, 0, nothing, run=run,
            seconds=seconds,
        )  # fmt: skip

    def taking_back(self, taken: Tensor, correct: Tensor) -> RunResult:
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
            taken_back=taken,
        )

    def without_images(self) -> RunResult:
        """What the tables need of it."""
        return dataclasses.replace(self, trace=None, upheld=())
