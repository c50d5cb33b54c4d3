"""The numbers a table shows, from per-sample outcomes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd

from msa_eval.defense.contexts import Context
from msa_eval.evidence.records import TargetRecord

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


@dataclass(frozen=True)
class Metric:
    """A number of a table: the share of samples that count as right.

    It is defined twice: by what was recorded, which makes the table, and by rows of tables, which counts it again.

    Attributes:
        name: in tables.
        meaning: when a sample counts as right, in words.
        right: the samples of a record that count as right ``(N,)``.
        right_rows: the same ``(N,)`` from the rows of ``samples`` and of ``outcomes``, those of one target and context.
        needs_outcomes: whether the rows of ``outcomes`` are looked at.
        meaning_apart: the meaning where each sample has adversarial batches of its own, if it is another.
    """

    name: str
    meaning: str
    right: Callable[[TargetRecord], Mask]
    right_rows: Callable[[pd.DataFrame, pd.DataFrame], Mask]
    needs_outcomes: bool = False
    meaning_apart: str | None = None

    def of(self, record: TargetRecord) -> Rate:
        """The number by what was recorded."""
        return _share(self.right(record))

    def from_rows(self, samples: pd.DataFrame, outcomes: pd.DataFrame) -> Rate:
        """The number by rows of the tables."""
        return _share(self.right_rows(samples, outcomes))

    def meaning_in(self, context: Context) -> str:
        """When a sample counts as right in a context."""
        return self.meaning_apart if self.meaning_apart and context.one_batch_per_sample else self.meaning


def _share(right: Mask) -> Rate:
    return rate(int(right.sum()), len(right))


def _column(name: str) -> Callable[[pd.DataFrame, pd.DataFrame], Mask]:
    return lambda samples, _: samples[name].to_numpy(dtype=bool)


def _right_in_lowest(record: TargetRecord) -> Mask:
    finals = record.correct & ~record.final_broken
    lowest: Mask = finals[finals.sum(axis=1).argmin()]
    return lowest


def _right_in_lowest_rows(samples: pd.DataFrame, outcomes: pd.DataFrame) -> Mask:
    correct = samples["clean_correct"].to_numpy(dtype=bool)
    finals = [
        correct & ~rows.set_index("index")["final_broken"].reindex(samples["index"]).to_numpy(dtype=bool)
        for _, rows in outcomes.groupby("run", sort=False)
    ]
    return min(finals, key=np.sum)


CLEAN = Metric("clean", "on the clean batch", lambda record: record.correct, _column("clean_correct"))


PAPER = Metric(
    "paper", "on the final batch of the run that leaves the fewest right: the paper's number",
    _right_in_lowest, _right_in_lowest_rows, needs_outcomes=True,
)  # fmt: skip


REALISED = Metric(
    "realised", "on the one adversarial batch that leaves the fewest of its batch right",
    lambda record: record.realised, _column("committed_right"),
    meaning_apart="in every verified batch: each sample has its own",
)  # fmt: skip


WORST_CASE = Metric("worst_case", "in every verified batch", lambda record: record.unbroken, _column("robust"))


METRICS = {metric.name: metric for metric in (CLEAN, PAPER, REALISED, WORST_CASE)}
"""By name; by definition none is above one that stands before it."""
