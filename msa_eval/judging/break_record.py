"""What a run has shown of a batch: which samples are broken, by what, and how near the others came."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from msa_eval.attacks.ball import Ball
from msa_eval.attacks.batch import AdversarialBatch, Batch, PartialBatch
from msa_eval.attacks.losses import margin_loss
from msa_eval.device import asynchronous
from msa_eval.judging.deferred import Deferred
from msa_eval.judging.outcomes import BreakingBatch, Nearest


class BreakRecord:
    """Verdicts on the batches that a run showed the hard target.

    Args:
        batch: the clean batch.
        ball: the perturbation set, which every point is held to.
        later: for what depends on the verdicts' values.
        known: the samples broken before ``(B,)``, of which no finding is due.
        keep: whether findings are kept.
        near: whether the batches in which each sample came nearest to falling are kept.
        companions: who sits beside each clean image ``(B, B - 1)``, where that is a choice.

    Attributes:
        broken: the samples broken so far ``(B,)``.
        first: by which iterate, -1 where by none ``(B,)``.
        margin: the lowest margin of each label over all batches shown, the clean one's included ``(B,)``.
        best: each sample's own point of the lowest margin, as the search sees it.
        best_margin: that margin ``(B,)``.
        companions: who sat beside it.
        committed: right on the one batch shown that leaves the fewest right ``(B,)``.
        findings: adversarial batches that together break all that are broken and not known, where these are kept.
        nearest: the batches in which each sample came nearest to falling, where these are kept.
    """

    def __init__(
        self,
        batch: Batch,
        ball: Ball,
        later: Deferred,
        *,
        known: Tensor | None,
        keep: bool,
        near: bool,
        companions: Tensor | None,
    ) -> None:
        self._batch, self._ball, self._later, self._known, self._keep = batch, ball, later, known, keep
        self._near = near
        self._answer: tuple[Tensor, Tensor, Tensor] | None = None
        self.broken = torch.zeros_like(batch.y, dtype=torch.bool)
        self.first = torch.full_like(batch.y, -1)
        self.margin = self.best_margin = self._read(batch.logits)[1]
        self.best, self._owned = AdversarialBatch(batch.x, batch.z), False
        self.companions = companions
        self.committed, self._left = batch.correct, batch.correct.sum()
        self.findings: list[BreakingBatch] = []
        self.nearest: list[Nearest] = []
        self.finite = torch.ones((), dtype=torch.bool, device=batch.y.device)
        self._far = self._low = self._high = torch.zeros((), device=batch.y.device)

    def claims(self, logits: Tensor) -> Tensor:
        """Whether a batch would add to the record ``()``: a sample newly broken, or fewer left right than ever."""
        wrong = self._read(logits)[0]
        right = self._batch.correct & ~wrong
        return (self._batch.correct & wrong & ~self.broken).any() | (right.sum() < self._left)

    def newly_broken(self, logits: Tensor) -> Tensor:
        """The samples that logits ``(B, k)`` would break, right on the clean batch and not broken yet ``(B,)``."""
        return self._batch.correct & self._read(logits)[0] & ~self.broken

    def hold(self, points: Tensor, rows: Tensor | None = None) -> None:
        """Hold a batch, or the points of some rows, by place ``(n,)``, to the ball and the box."""
        clean = self._batch.x if rows is None else self._batch.x.index_select(0, rows)
        if len(points):
            self._far = torch.maximum(self._far, self._ball.size(points - clean).amax())
            self._low, self._high = torch.minimum(self._low, points.amin()), torch.maximum(self._high, points.amax())

    def watch(self, logits: Tensor) -> None:
        """Watch out for logits ``(B, k)`` that are not finite, a surrogate's too."""
        self.finite = self.finite & torch.isfinite(logits).all()

    @property
    def excess(self) -> Tensor:
        """How far a point left the ball or the box, 0 where none did ``()``."""
        return self._ball.beyond(self._far, self._low, self._high)

    def enter(
        self,
        iterate: int,
        point: AdversarialBatch | PartialBatch,
        logits: Tensor,
        companions: Tensor | None,
        *,
        claims: bool = True,
    ) -> None:
        """Enter the verdict on a batch.

        Args:
            iterate: its number.
            point: the batch.
            logits: the hard target's ``(B, k)``.
            companions: who sat beside each row ``(B, B - 1)``, where that is a choice.
            claims: whether it may add to the record, as `claims` tells; if not, only margins are lowered by it.
        """
        wrong, margin = self._read(logits)
        self._enter(iterate, logits, point, None, claims=claims)
        self._prefer(point, margin, margin < self.best_margin, companions)
        if not claims:
            return
        right = ~wrong & self._batch.correct
        left = right.sum()
        self.committed = torch.where(left < self._left, right, self.committed)
        self._left = torch.minimum(left, self._left)

    def enter_companions(self, iterate: int, point: AdversarialBatch, logits: Tensor, own: Tensor) -> None:
        """Enter the verdicts on batches of companions that moved: nobody commits to all of these at once.

        Args:
            iterate: their number.
            point: the companions of all rows.
            logits: the hard target's, row i on the batch in which row i stays ``(B, k)``.
            own: row i of the i-th batch ``(B, C, H, W)``.
        """
        self._enter(iterate, logits, point, own)

    def prefer(self, point: AdversarialBatch | PartialBatch, logits: Tensor, companions: Tensor | None = None) -> None:
        """Keep each sample's point of the lowest lead by logits that are no verdict: one that seems broken is not."""
        margin = self._read(logits)[1]
        self._prefer(point, margin, (margin < self.best_margin) & (margin > 0), companions)

    def _read(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Which samples logits ``(B, k)`` get wrong, and by how much their labels lead ``(B,)``."""
        if self._answer is None or self._answer[0] is not logits:
            self._answer = logits, logits.argmax(dim=1) != self._batch.y, -margin_loss(logits, self._batch.y)
        return self._answer[1:]

    def _enter(
        self,
        iterate: int,
        logits: Tensor,
        shown: AdversarialBatch | PartialBatch,
        own: Tensor | None,
        *,
        claims: bool = True,
    ) -> None:
        """Note which samples are broken for the first time, and by what, if by anything."""
        wrong, margin = self._read(logits)
        if self._near and bool((lower := margin < self.margin).any()):
            # What claims nothing may be written over later.
            x = shown.x if claims else shown.x.clone()
            left = [replace(old, rows=old.rows & ~lower) for old in self.nearest]
            self.nearest = [*(old for old in left if bool(old.rows.any())), Nearest(lower, margin, x, own)]
        if self._keep and claims:
            known = self.broken if self._known is None else self.broken | self._known
            breaks = wrong & self._batch.correct
            self._later.when((breaks & ~known).any(), lambda: self._find(BreakingBatch(breaks, shown.x, own)))
        self.first = torch.where(wrong & ~self.broken, iterate, self.first)
        self.broken = self.broken | wrong
        self.margin = torch.minimum(self.margin, margin)
        self.watch(logits)

    def _find(self, finding: BreakingBatch) -> None:
        """Keep a finding, and drop those it makes needless."""
        self.findings = [old for old in self.findings if bool((old.breaks & ~finding.breaks).any())]
        self.findings.append(finding)

    def _prefer(
        self, point: AdversarialBatch | PartialBatch, margin: Tensor, lower: Tensor, companions: Tensor | None
    ) -> None:
        """Keep each sample's own point of the lowest margin; of a broken one, only a point seen to break it."""
        self.best_margin = torch.where(lower, margin, self.best_margin)
        if asynchronous(lower):  # cheaper than to know whether there is any
            self.best = self.best.with_rows(lower, AdversarialBatch(point.x, point.z, point.rounded))
        elif bool(lower.any()):
            if not self._owned:
                self.best, self._owned = (
                    AdversarialBatch(self.best.x.clone(), self.best.z.clone(), self.best.rounded),
                    True,
                )
            self.best = self.best.take(lower, point)
        else:
            return
        if companions is not None and self.companions is not None:
            self.companions = torch.where(lower.unsqueeze(1), companions, self.companions)
