"""What all runs so far did to one batch: the runs of a cascade start from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from msa_eval.attacks.batch import AdversarialBatch, Batch, capacity
from msa_eval.attacks.losses import margin_loss
from msa_eval.defense.contexts import CONTEXTS, Companions, own_companions
from msa_eval.evidence.proof import Proof, cover
from msa_eval.judging.outcomes import BreakingBatch, Nearest, RunResult

POINTS = 144
"""So many points of each image are kept at most, the latest."""


class BatchHistory:
    """The record of one batch over all runs.

    Args:
        batch: the clean batch.
        companions: who sits beside each image at first, where the attacker chooses.

    Attributes:
        correct: the samples right on the clean batch ``(B,)``.
        clean: the clean batch as points.
        best: each sample's own point of the lowest margin, at first its clean image.
        broken: the samples some run broke ``(B,)``.
        committed: right on the one adversarial batch that leaves the fewest right ``(B,)``.
        companions: who sits beside each image, where the attacker chooses.
        points: where the runs ended, and each sample's best, for recombination.
        findings: adversarial batches that together break all samples broken, where these are kept.
        passes: images passed through the trunk for it.
        upheld: of a stochastic target, the proofs that its breaks were judged on once more, and that held.
        taken_back: the samples of which some break did not hold ``(B,)``.
        ranking: the classes of each sample, nearest first ``(B, k)``, once a run ranked them.
        nearest: the batches in which each sample came nearest to falling, where these are kept; first the clean one.
        runs: of each sample, the run that found its best point; ``clean`` at first.
    """

    def __init__(self, batch: Batch, companions: Companions | None = None) -> None:
        self.correct = batch.correct
        self._margin = -margin_loss(batch.logits, batch.y)
        self.best = self.clean = AdversarialBatch(batch.x, batch.z)
        self.broken = torch.zeros_like(batch.correct)
        self.committed = batch.correct
        self.companions = companions
        self.points = [self.clean]
        self.findings: list[BreakingBatch] = []
        self.passes = 0
        self.upheld: list[Proof] = []
        self.taken_back = torch.zeros_like(batch.correct)
        self.ranking: Tensor | None = None
        self._least = self._margin
        self.nearest = [Nearest(torch.ones_like(batch.correct), self._margin, batch.x, run="clean")]
        self.runs = ["clean"] * len(batch.y)

    @property
    def unbroken(self) -> Tensor:
        """The samples that are right on the clean batch and that nothing has broken ``(B,)``."""
        return self.correct & ~self.broken

    def add(self, made: RunResult) -> None:
        """Enter what a run did, and what it leaves."""
        trace, run = made.trace, made.run
        assert trace is not None
        lower = trace.best_margin < self._margin
        self.runs = [run if better else before for better, before in zip(lower.tolist(), self.runs, strict=True)]
        self.best = self.best.with_rows(lower, trace.best)
        self._margin = torch.minimum(self._margin, trace.best_margin)
        if self.companions is not None and trace.companions is not None:
            index = torch.where(lower.unsqueeze(1), trace.companions, self.companions.index)
            self.companions = self.companions.with_companions(index)
        self.broken = self.broken | made.any_broken
        self.upheld += made.upheld
        self.taken_back = self.taken_back | made.taken_back
        self.passes += made.forwards
        if int(made.committed.sum()) < int(self.committed.sum()):
            self.committed = made.committed
        self.points = [*self.points, *trace.trail, trace.final, trace.best]
        self.points = self.points[-min(POINTS, capacity(self.clean.x)) :]
        self.findings += [replace(finding, run=run) for finding in trace.findings]
        self.ranking = trace.ranking
        for one in trace.nearest:
            self._come_nearer(replace(one, run=run))

    def proofs(self, target: str, context: str, number: int, *, rows_interact: bool, pool: Tensor) -> list[Proof]:
        """Adversarial batches that together break all samples broken, few of them, on the CPU.

        Of a stochastic target they are those upheld: what was not judged proves nothing.

        Args:
            target: ``defense`` or ``fc``.
            context: what the attacker controls.
            number: of the batch.
            rows_interact: whether the target looks at companions.
            pool: indices into the data set of the images that companions are chosen from ``(P,)``.
        """
        if self.upheld:
            return self.upheld
        broken = self.broken & self.correct
        if not bool(broken.any()):
            return []
        if rows_interact and not CONTEXTS[context].one_batch_per_sample:
            covered = cover([(finding.breaks & broken, finding) for finding in self.findings])
            return [_proof(finding, mask, target, context, number) for mask, finding in covered]
        return [self._rows(broken, target, context, number, pool)]

    def others(
        self, proofs: Sequence[Proof], target: str, context: str, number: int, *, rows_interact: bool, pool: Tensor
    ) -> list[Proof]:
        """Of the samples that no proof is about, where each came nearest to falling: batches that prove nothing.

        Args:
            proofs: of the others; what follows is as in `proofs`.
            target: ``defense`` or ``fc``.
            context: what the attacker controls.
            number: of the batch.
            rows_interact: whether the target looks at companions.
            pool: indices into the data set of the images that companions are chosen from ``(P,)``.
        """
        left = torch.ones_like(self.broken)
        for proof in proofs:
            left[proof.positions.to(left.device)] = False
        if not bool(left.any()):
            return []
        if rows_interact and not CONTEXTS[context].one_batch_per_sample:
            near = [(one, one.rows & left) for one in self.nearest]
            return [_proof(one, mask, target, context, number) for one, mask in near if bool(mask.any())]
        return [self._rows(left, target, context, number, pool)]

    def _rows(self, mask: Tensor, target: str, context: str, number: int, pool: Tensor) -> Proof:
        """The best points of some samples ``(B,)``, each in a batch of its own."""
        positions = mask.nonzero().flatten().cpu()
        companions = pool[self.with_companions().cpu()][positions] if CONTEXTS[context].chooses_companions else None
        runs = tuple(self.runs[place] for place in positions.tolist())
        x = self.best.x[mask].cpu()
        return Proof(target, context, number, "rows", positions, x, companions=companions, runs=runs)

    def _come_nearer(self, one: Nearest) -> None:
        lower = one.rows & (one.margin < self._least)
        self._least = torch.where(lower, one.margin, self._least)
        left = [replace(old, rows=old.rows & ~lower) for old in self.nearest]
        self.nearest = [old for old in [*left, replace(one, rows=lower)] if bool(old.rows.any())]

    def with_companions(self) -> Tensor:
        """Who sits beside each image ``(B, B - 1)``, as places in the pool: at first the batch itself."""
        if self.companions is not None:
            return self.companions.index
        return own_companions(len(self.broken)).to(self.broken.device)


def _proof(finding: BreakingBatch | Nearest, mask: Tensor, target: str, context: str, number: int) -> Proof:
    own = None if finding.own is None else finding.own[mask].cpu()
    kind = "batch" if own is None else "victims"
    positions = mask.nonzero().flatten().cpu()
    runs = (finding.run,) * len(positions)
    return Proof(target, context, number, kind, positions, finding.x.cpu(), own=own, runs=runs)
