"""A sign that a figure should not be believed, and the verdict that signs add up to."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import Tensor

Severity = Literal["note", "suspect", "unreliable"]


@dataclass(frozen=True)
class Sign:
    """One sign.

    Attributes:
        name: what was looked at.
        fired: whether it was seen.
        severity: what it counts for when it fires.
        value: what was measured.
        threshold: above (or, where the reason says so, below) which it fires.
        reason: one sentence: what was seen, and what to do about it.
    """

    name: str
    fired: bool
    severity: Severity
    value: float
    threshold: float
    reason: str


@dataclass(frozen=True)
class Verdict:
    """Whether a figure can be believed.

    Attributes:
        verdict: ``sound``, ``suspect`` or ``unreliable``; of an evaluation in which something failed, ``incomplete``.
        reasons: what failed, and the signs that made it so, the gravest first.
    """

    verdict: Literal["sound", "suspect", "unreliable", "incomplete"]
    reasons: tuple[str, ...]


def verdict_of(signs: Iterable[Sign]) -> Verdict:
    """Add signs up: the gravest that fired decides, and notes never do.

    >>> verdict_of([Sign("large_eps", True, "unreliable", 0.3, 0.05, "30 % are left.")])
    Verdict(verdict='unreliable', reasons=('30 % are left.',))
    >>> verdict_of([Sign("randomness", True, "note", 0.1, 1e-5, "It draws.")])
    Verdict(verdict='sound', reasons=())
    """
    fired = [sign for sign in signs if sign.fired]
    grave = [sign.reason for sign in fired if sign.severity == "unreliable"]
    doubtful = [sign.reason for sign in fired if sign.severity == "suspect"]
    return Verdict("unreliable" if grave else "suspect" if doubtful else "sound", (*grave, *doubtful))


class Change(NamedTuple):
    """How two answers to the same images differ.

    Attributes:
        drift: the largest difference of a logit, as a share of the range of all logits.
        mean: the mean difference.
        flips: the share of samples whose class differs.
    """

    drift: float
    mean: float
    flips: float


NO_ANSWER = Change(1.0, 1.0, 1.0)
"""What counts as the change to no answer at all, or to one that is not finite."""


def change(before: Tensor, after: Tensor) -> Change:
    """Compare two answers ``(B, k)``.

    >>> import torch
    >>> change(torch.tensor([[0.0, 4.0]]), torch.tensor([[0.0, 3.0]]))
    Change(drift=0.25, mean=0.125, flips=0.0)
    """
    if not bool(after.isfinite().all()):
        return NO_ANSWER
    scale = max(float(before.max() - before.min()), 1e-12)
    difference = (after - before).abs() / scale
    flips = (after.argmax(dim=1) != before.argmax(dim=1)).float().mean()
    return Change(float(difference.max()), float(difference.mean()), float(flips))
