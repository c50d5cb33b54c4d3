"""What a run has shown of a batch: which samples are broken, by what, and how near the others came."""

from __future__ import annotations

import torch
from msa_eval.protocols.batch import Batch, Finding, Point
from msa_eval.protocols.later import Later
from torch import Tensor

from msa_eval.attacks.ball import Ball
from msa_eval.attacks.losses import margin


class Record:
    """Verdicts on the batches that a run showed the hard target.

    Args:
        batch: the clean batch.
        ball: the perturbation set, which every point is held to.
        later: for what depends on the verdicts' values.
        known: the samples broken before ``(B,)``, of which no finding is due.
        keep: whether findings are kept.
        company: who sits beside each clean image ``(B, B - 1)``, where that is a choice.

    Attributes:
        broken: the samples broken so far ``(B,)``.
        first: by which iterate, -1 where by none ``(B,)``.
        lead: the lowest lead of each label over all batches shown, the clean one's included ``(B,)``.
        best: each sample's own point of the lowest lead, as the search sees it.
        best_lead: that lead ``(B,)``.
        company: who sat beside it.
        committed: right on the one batch shown that leaves the fewest right ``(B,)``.
        findings: adversarial batches that together break all that are broken and not known, where these are kept.
        finite: whether all logits were ``()``.
        excess: how far a point left the ball or the box, 0 where none did ``()``.
    """

    def __init__(
        self, batch: Batch, ball: Ball, later: Later, *, known: Tensor | None, keep: bool, company: Tensor | None
    ) -> None:
        self._batch, self._ball, self._later, self._known, self._keep = batch, ball, later, known, keep
        self.broken = torch.zeros_like(batch.y, dtype=torch.bool)
        self.first = torch.full_like(batch.y, -1)
        self.lead = self.best_lead = self._lead_of(batch.logits)
        self.best = Point(batch.x, batch.z)
        self.company = company
        self.committed = batch.correct
        self.findings: list[Finding] = []
        self.finite = torch.ones((), dtype=torch.bool, device=batch.y.device)
        self.excess = torch.zeros((), device=batch.y.device)

    def claims(self, logits: Tensor) -> Tensor:
        """Whether a batch would add to the record ``()``: a sample newly broken, or fewer left right than ever."""
        right = (logits.argmax(dim=1) == self._batch.y) & self._batch.correct
        return self.newly_broken(logits).any() | (right.sum() < self.committed.sum())

    def newly_broken(self, logits: Tensor) -> Tensor:
        """The samples that logits ``(B, k)`` would break, right on the clean batch and not broken yet ``(B,)``."""
        return self._batch.correct & (logits.argmax(dim=1) != self._batch.y) & ~self.broken

    def hold(self, points: Tensor, rows: Tensor | None = None) -> None:
        """Hold a batch, or the points of some rows, by place ``(n,)``, to the ball and the box."""
        clean = self._batch.x if rows is None else self._batch.x[rows]
        if len(points):
            self.excess = torch.maximum(self.excess, self._ball.excess(points, clean).amax())

    def enter(self, iterate: int, point: Point, logits: Tensor, company: Tensor | None) -> None:
        """Enter the verdict on a batch.

        Args:
            iterate: its number.
            point: the batch.
            logits: the hard target's ``(B, k)``.
            company: who sat beside each row ``(B, B - 1)``, where that is a choice.
        """
        lead = self._lead_of(logits)
        right = ~self._enter(iterate, logits, lead, point.x, None) & self._batch.correct
        self._prefer(point, lead, lead < self.best_lead, company)
        self.committed = torch.where(right.sum() < self.committed.sum(), right, self.committed)

    def enter_apart(self, iterate: int, point: Point, logits: Tensor, companions: Tensor) -> None:
        """Enter the verdicts on batches that differ in one row: nobody commits to all of these at once.

        Args:
            iterate: their number.
            point: row i is the row of the i-th that is its own.
            logits: the hard target's, row i on the i-th ``(B, k)``.
            companions: what the i-th has in all rows but i ``(B, C, H, W)``.
        """
        lead = self._lead_of(logits)
        self._enter(iterate, logits, lead, companions, point.x)
        self._prefer(point, lead, lead < self.best_lead, None)

    def enter_companions(self, iterate: int, point: Point, logits: Tensor, own: Tensor) -> None:
        """The same where it is the companions that moved, to ``point``, and the rows of their own that stay."""
        self._enter(iterate, logits, self._lead_of(logits), point.x, own)

    def prefer(self, point: Point, logits: Tensor, company: Tensor | None = None) -> None:
        """Keep each sample's point of the lowest lead by logits that are no verdict: one that seems broken is not."""
        lead = self._lead_of(logits)
        self._prefer(point, lead, (lead < self.best_lead) & (lead > 0), company)

    def _lead_of(self, logits: Tensor) -> Tensor:
        return -margin(logits, self._batch.y)

    def _enter(self, iterate: int, logits: Tensor, lead: Tensor, x: Tensor, own: Tensor | None) -> Tensor:
        """Note which samples are broken for the first time, and by what; the mask ``(B,)`` of those wrong."""
        wrong = logits.argmax(dim=1) != self._batch.y
        if self._keep:
            known = self.broken if self._known is None else self.broken | self._known
            breaks = wrong & self._batch.correct
            self._later.when((breaks & ~known).any(), lambda: self._find(Finding(breaks, x, own)))
        self.first = torch.where(wrong & ~self.broken, iterate, self.first)
        self.broken = self.broken | wrong
        self.lead = torch.minimum(self.lead, lead)
        self.finite = self.finite & torch.isfinite(logits).all()
        return wrong

    def _find(self, finding: Finding) -> None:
        """Keep a finding, and drop those it makes needless."""
        self.findings = [old for old in self.findings if bool((old.breaks & ~finding.breaks).any())]
        self.findings.append(finding)

    def _prefer(self, point: Point, lead: Tensor, lower: Tensor, company: Tensor | None) -> None:
        """Keep each sample's own point of the lowest lead; of a broken one, only a point that was seen to break it."""
        self.best_lead = torch.where(lower, lead, self.best_lead)
        self._later.when(lower.any(), lambda: self._take(point, lower, company))

    def _take(self, point: Point, lower: Tensor, company: Tensor | None) -> None:
        self.best = self.best.with_rows(lower, point)
        if company is not None and self.company is not None:
            self.company = torch.where(lower.unsqueeze(1), company, self.company)
