"""One run on one batch: the attack proposes points, the trial counts passes and asks the hard target about each.

An attack sees a trial as the model: called with images it returns the surrogate's logits, and a query attack proposes
and accepts points. Behind both, the features just computed go to the hard target too, so that no attack judges itself
and a verdict costs a decision, not a trunk pass.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from msa_eval.surrogates import STE, Surrogate
from torch import Tensor

from msa_eval.attacks.ball import Ball
from msa_eval.attacks.losses import margin
from msa_eval.defense import Defense, decide


class AttackError(RuntimeError):
    """An attack or a defence failed in a way that must never read as robustness."""


@dataclass(frozen=True)
class Batch:
    """A clean batch and the target's answer to it.

    Attributes:
        number: its place in the plan.
        x: images ``(B, C, H, W)`` in [0, 1].
        y: labels ``(B,)``.
        z: features ``(B, ...)``.
        logits: of the hard target ``(B, k)``.
    """

    number: int
    x: Tensor
    y: Tensor
    z: Tensor
    logits: Tensor

    @property
    def correct(self) -> Tensor:
        """Which samples the target gets right ``(B,)``."""
        return self.logits.argmax(dim=1) == self.y


@dataclass(frozen=True)
class Outcome:
    """What a run did to a batch; one entry a sample ``(B,)`` unless said otherwise.

    Attributes:
        surrogate_fooled: the attacked model is wrong on the final batch.
        final_broken: the hard target is wrong on the final batch.
        any_broken: it is wrong on some batch it was shown.
        first_iterate: the first of these, counted from 0; -1 where there is none.
        min_margin: the lowest logit lead of the label over all batches shown.
        perturbation: norm of the final perturbation.
        committed: right on the one shown batch that leaves the fewest right.
        forwards: images passed through the trunk (a number).
        backwards: images passed back through it (a number).
        decisions: rows decided by the hard target (a number).
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


class Trial:
    """One run on one batch.

    Args:
        defense: the target.
        surrogate: what a gradient attack attacks; ``None`` for an attack on the target itself.
        batch: the clean batch.
        ball: the perturbation set, which every point is held to.
        mixes_rows: whether the target's decision may look at the whole batch.
    """

    def __init__(
        self, defense: Defense, surrogate: Surrogate | None, batch: Batch, ball: Ball, *, mixes_rows: bool = True
    ) -> None:
        self.batch = batch
        self.ball = ball
        self._defense = defense
        self._surrogate = surrogate
        self._mixes_rows = mixes_rows
        self._forwards = self._backwards = self._decisions = 0
        self._kept = self._proposed = _Point(batch.x, batch.z, batch.logits)

        unbroken = torch.zeros_like(batch.y, dtype=torch.bool)
        self._iterate = -1
        self._broken = unbroken
        self._first = torch.full_like(batch.y, -1)
        self._lead = -margin(batch.logits, batch.y)
        self._committed = batch.correct
        self._finite = torch.ones((), dtype=torch.bool, device=batch.y.device)
        self._excess = torch.zeros((), device=batch.y.device)

    def __call__(self, x: Tensor) -> Tensor:
        """Logits ``(B, k)`` of the surrogate on a batch of points; the hard target sees the same features."""
        z = self._trunk(x)
        logits = self._surrogate_logits(x, z)
        self._iterate += 1
        # The naive surrogate is the target's own decision on these features: its value is the verdict.
        verdict = logits.detach().float() if self._surrogate is STE else self._decide(z.detach())
        self._judge(x.detach(), verdict)
        return logits

    def clean_logits(self) -> Tensor:
        """Logits ``(B, k)`` of the surrogate on the clean batch, from its cached features."""
        with torch.no_grad():
            return self._surrogate_logits(self.batch.x, self.batch.z)

    def propose(self, points: Tensor, rows: Tensor) -> Tensor:
        """Logits ``(B, k)`` of the kept batch with the given rows (a mask ``(B,)``) taken from ``points``."""
        with torch.no_grad():
            new = self._features(points[rows])
        z = self._kept.z.clone()
        z[rows] = new.to(z)
        x = torch.where(_per_image(rows, points), points, self._kept.x)
        self._iterate += 1
        self._proposed = self._believed(x, z, rows, confirmed=bool(rows.all()))
        return self._proposed.logits

    def accept(self, rows: Tensor) -> Tensor:
        """Keep these rows of the last proposal; logits ``(B, k)`` of the mixed batch that results."""
        if not bool(rows.any()):
            return self._kept.logits
        new, old = self._proposed, self._kept
        x = torch.where(_per_image(rows, new.x), new.x, old.x)
        z = torch.where(_per_image(rows, new.z), new.z, old.z)
        if self._mixes_rows:
            self._kept = self._believed(x, z, torch.ones_like(rows), confirmed=False)
        else:
            # Put together, not decided: the next proposal or the final pass judges a batch that was.
            self._kept = _Point(x, z, torch.where(rows.unsqueeze(1), new.logits, old.logits))
        return self._kept.logits

    def finish(self, x: Tensor) -> Outcome:
        """Judge the batch of final points by a fresh pass, and report.

        Raises:
            AttackError: when a point has left the ball or the box, or an output was not finite.
        """
        with torch.no_grad():
            z = self._features(x)
            fooled = self._surrogate_logits(x, z).argmax(dim=1) != self.batch.y
        hard = self._decide(z)
        self._iterate += 1
        self._judge(x, hard)
        if not bool(self._finite):
            raise AttackError("the defence or its surrogate returned logits that are not finite")
        if float(self._excess) > 0:
            raise AttackError(
                f"the attack left the {self.ball.norm} ball of radius {self.ball.eps:.6g} or the [0, 1] box "
                f"by {float(self._excess):.3g}; its points must be projected before they are proposed"
            )
        return Outcome(
            surrogate_fooled=fooled,
            final_broken=hard.argmax(dim=1) != self.batch.y,
            any_broken=self._broken,
            first_iterate=self._first,
            min_margin=self._lead,
            perturbation=self.ball.size(x - self.batch.x),
            committed=self._committed,
            forwards=self._forwards,
            backwards=self._backwards,
            decisions=self._decisions,
        )

    def _features(self, x: Tensor) -> Tensor:
        self._forwards += len(x)
        return self._defense.features(x)

    def _trunk(self, x: Tensor) -> Tensor:
        """Features with a gradient, unless the surrogate has a trunk of its own to send it through."""
        if self._surrogate is not None and self._surrogate.on_images:
            with torch.no_grad():
                return self._features(x)
        return self._watched(self._features(x))

    def _watched(self, values: Tensor) -> Tensor:
        """Count the images that a gradient passes back through."""
        if values.requires_grad:
            values = values.view_as(values)  # a node of our own, also where these are the images themselves
            values.register_hook(self._count_backward)
        return values

    def _count_backward(self, gradient: Tensor) -> None:
        self._backwards += len(gradient)

    def _surrogate_logits(self, x: Tensor, z: Tensor) -> Tensor:
        if self._surrogate is None:
            return decide(self._defense, z)
        if self._surrogate.on_images:
            self._forwards += len(x)
            logits = self._watched(self._surrogate.logits(self._defense, x))
        else:
            logits = self._surrogate.logits(self._defense, z)
        if logits.shape != self.batch.logits.shape:
            raise AttackError(
                f"surrogate {self._surrogate.name!r} returned logits of shape {tuple(logits.shape)} "
                f"where the target returns {tuple(self.batch.logits.shape)}"
            )
        self._finite = self._finite & torch.isfinite(logits.detach()).all()
        return logits

    def _decide(self, z: Tensor) -> Tensor:
        self._decisions += len(z)
        return decide(self._defense, z)

    def _believed(self, x: Tensor, z: Tensor, rows: Tensor, *, confirmed: bool) -> _Point:
        """Decide a batch put together from cached features; what it claims is confirmed by a pass of the whole."""
        if self._mixes_rows:
            logits = self._decide(z)
        else:
            logits = self._kept.logits.clone()
            logits[rows] = self._decide(z[rows])
        if not confirmed and self._claims(logits):
            with torch.no_grad():
                z = self._features(x)
            logits = self._decide(z)
        self._judge(x, logits)
        return _Point(x, z, logits)

    def _claims(self, logits: Tensor) -> bool:
        """Whether a batch would add to the record: a sample newly broken, or fewer left right than ever."""
        right = (logits.argmax(dim=1) == self.batch.y) & self.batch.correct
        new = self.batch.correct & ~right & ~self._broken
        return bool(new.any() | (right.sum() < self._committed.sum()))

    def _judge(self, x: Tensor, logits: Tensor) -> None:
        y, correct = self.batch.y, self.batch.correct
        right = logits.argmax(dim=1) == y
        self._first = torch.where(~right & ~self._broken, self._iterate, self._first)
        self._broken = self._broken | ~right
        self._lead = torch.minimum(self._lead, -margin(logits, y))
        fewer = (right & correct).sum() < self._committed.sum()
        self._committed = torch.where(fewer, right & correct, self._committed)
        self._finite = self._finite & torch.isfinite(logits).all()
        self._excess = torch.maximum(self._excess, self.ball.excess(x, self.batch.x).amax())


@dataclass(frozen=True)
class _Point:
    """A batch of points, their features and the target's logits."""

    x: Tensor
    z: Tensor
    logits: Tensor


def _per_image(mask: Tensor, like: Tensor) -> Tensor:
    return mask.view(-1, *[1] * (like.ndim - 1))
