"""The numbers a table shows, from per-sample outcomes."""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Mask = npt.NDArray[np.bool_]


Z_95 = NormalDist().inv_cdf(0.975)


class Rate(NamedTuple):
    """A share of samples with its Wilson 95 % interval.

    Attributes:
        value: in [0, 1]; NaN where there are no samples.
        low: the interval's lower end.
        high: its upper end.
        n: how many samples.
    """

    value: float
    low: float
    high: float
    n: int


def rate(right: int, n: int) -> Rate:
    """A share and its Wilson score interval (Wilson 1927).

    >>> [round(value, 4) for value in rate(50, 100)]
    [0.5, 0.4038, 0.5962, 100]
    """
    if not n:
        return Rate(math.nan, math.nan, math.nan, 0)
    p = right / n
    spread = Z_95 * math.sqrt(p * (1 - p) / n + Z_95**2 / (4 * n**2))
    centre = p + Z_95**2 / (2 * n)
    scale = 1 + Z_95**2 / n
    # Clipping against p as well undoes rounding at 0 and n right.
    return Rate(p, max(0.0, min(p, (centre - spread) / scale)), min(1.0, max(p, (centre + spread) / scale)), n)


def clean(correct: Mask) -> Rate:
    """Right on clean batches."""
    return rate(int(correct.sum()), len(correct))


def paper(correct: Mask, final_broken: Mask) -> Rate:
    """The lowest accuracy over all runs on their final batches (the paper's "minimum accuracy across the suite").

    Args:
        correct: right on the clean batch ``(N,)``.
        final_broken: wrong on the final batch ``(runs, N)``.
    """
    return rate(int((correct & ~final_broken).sum(axis=1).min()), len(correct))


def realised(committed: Mask) -> Rate:
    """What an attacker who commits to one adversarial batch for each batch leaves right.

    Args:
        committed: right on that batch, and on the clean one ``(N,)``.
    """
    return rate(int(committed.sum()), len(committed))


def worst_case(correct: Mask, any_broken: Mask) -> Rate:
    """Never broken in any verified batch: a union over different adversarial batches.

    Args:
        correct: right on the clean batch ``(N,)``.
        any_broken: wrong on some batch of the run ``(runs, N)``.
    """
    return rate(int((correct & ~any_broken.any(axis=0)).sum()), len(correct))


METRICS = ("clean", "paper", "realised", "worst_case")
