"""Counting a table again from its rows, by the definitions of its numbers and without the code that wrote it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from msa_eval.defense.contexts import CONTEXTS
from msa_eval.evidence.metrics import METRICS

Mask = npt.NDArray[np.bool_]

TOLERANCE = 1e-9
"""For shares; a sample counted wrongly moves one by 1/N."""


@dataclass(frozen=True)
class Tables:
    """The five tables as they stand on disk."""

    summary: pd.DataFrame
    attacks: pd.DataFrame
    samples: pd.DataFrame
    outcomes: pd.DataFrame
    batches: pd.DataFrame

    def of(self, table: str, target: str, context: str) -> pd.DataFrame:
        """The rows of a table that are about a target in a context."""
        rows: pd.DataFrame = getattr(self, table)
        return rows[(rows["target"] == target) & (rows["context"] == context)]


def recount(tables: Tables, *, targets: Sequence[str], contexts: Sequence[str], eps: float) -> list[str]:
    """Find all that doesn't follow from the rows.

    Args:
        tables: with columns that were checked.
        targets: that there should be.
        contexts: that there should be.
        eps: the radius of the perturbation set.

    Returns:
        a sentence a fault.
    """
    due = {(target, context) for target in targets for context in contexts}
    faults = []
    for name in ("summary", "attacks", "samples", "outcomes"):
        rows: pd.DataFrame = getattr(tables, name)
        found = set(zip(rows["target"], rows["context"], strict=True))
        faults += [f"{name}.csv has no rows of {t}, {c}" for t, c in sorted(due - found)]
        faults += [f"{name}.csv has rows of {t}, {c}, which was not evaluated" for t, c in sorted(found - due)]
    if faults:
        return faults
    for target, context in sorted(due):
        try:
            count = _Count.of(tables, target, context)
        except ValueError as error:
            faults.append(f"{target}, {context}: {error}")
            continue
        found_here = [*count.samples(), *count.outcomes(eps), *count.attacks(), *count.summary(), *count.laws()]
        faults += [f"{target}, {context}: {fault}" for fault in found_here]
    return faults


@dataclass(frozen=True)
class _Count:
    """One target in one context; masks are ``(N,)`` in the order of samples.csv, by run where it says so."""

    context: str
    rows: pd.DataFrame
    shown: Mapping[str, pd.DataFrame]
    summed: Mapping[str, Mapping[Any, Any]]
    by_run: Mapping[str, pd.DataFrame]

    @classmethod
    def of(cls, tables: Tables, target: str, context: str) -> _Count:
        rows = tables.of("samples", target, context).reset_index(drop=True)
        attacks = tables.of("attacks", target, context)
        summary = tables.of("summary", target, context)
        outcomes = tables.of("outcomes", target, context)
        index = rows["index"].tolist()
        by_run = {str(run): part.reset_index(drop=True) for run, part in outcomes.groupby("run", sort=False)}
        if list(by_run) != attacks["run"].tolist():
            raise ValueError("outcomes.csv and attacks.csv name different runs")
        for run, part in by_run.items():
            if part["index"].tolist() != index:
                raise ValueError(f"outcomes.csv: run {run} is not about the samples of samples.csv, in their order")
        return cls(
            context=context,
            rows=rows,
            shown={str(row["run"].iloc[0]): row for _, row in attacks.groupby("run", sort=False)},
            summed={str(row["metric"]): row for row in summary.to_dict(orient="records")},
            by_run=by_run,
        )

    @property
    def right(self) -> Mask:
        """Right on the clean batch."""
        return _mask(self.rows["clean_prediction"] == self.rows["label"])

    @property
    def ever(self) -> Mask:
        """Wrong in some verified batch."""
        return _mask(np.stack([self.broken(run) for run in self.by_run]).any(axis=0))

    def broken(self, run: str, column: str = "any_broken") -> Mask:
        return _mask(self.by_run[run][column])

    def failed(self, run: str) -> Mask:
        """Where a run failed: it measured nothing."""
        return _mask(self.by_run[run]["min_margin"].isna() & self.by_run[run]["perturbation"].isna())

    def samples(self) -> Iterator[str]:
        """Each sample's row against its outcomes."""
        rows, right, ever = self.rows, self.right, self.ever
        committed, robust = _mask(rows["committed_right"]), right & ~ever
        first = np.stack([self.broken(run) for run in self.by_run]).argmax(axis=0)
        names = list(self.by_run)
        by = [names[f] if e and r else None if r else "clean" for f, e, r in zip(first, ever, right, strict=True)]
        at = [
            self.by_run[names[f]]["first_iterate"].iloc[i] if b not in (None, "clean") else None
            for i, (f, b) in enumerate(zip(first, by, strict=True))
        ]
        yield from self._named("clean_correct is not that prediction and label agree", rows["clean_correct"] != right)
        yield from self._named("robust contradicts outcomes.csv", rows["robust"] != robust)
        yield from self._named("broken_by contradicts outcomes.csv", ~_same(rows["broken_by"], by))
        yield from self._named("broken_at contradicts outcomes.csv", ~_same(rows["broken_at"], at))
        yield from self._named("committed_right, but wrong on its clean batch", committed & ~right)
        yield from self._named("never broken, but not committed_right", robust & ~committed)
        if CONTEXTS[self.context].one_batch_per_sample:
            yield from self._named("committed_right, but broken where it alone is attacked", committed & ~robust)
        yield from self._named("min_margin contradicts robust", self._sign(rows["min_margin"], ever))

    def outcomes(self, eps: float) -> Iterator[str]:
        """Each outcome against itself."""
        for run, part in self.by_run.items():
            ever = self.broken(run)
            kept = ~_mask(part["first_iterate"].isna())
            yield from self._named(f"{run}: final_broken, but not any_broken", self.broken(run, "final_broken") & ~ever)
            yield from self._named(f"{run}: any_broken and first_iterate disagree", kept != ever)
            failed = self.failed(run)
            yield from self._named(f"{run}: it failed, but broke the sample", failed & ever)
            yield from self._named(
                f"{run}: min_margin contradicts any_broken", self._sign(part["min_margin"], ever) & ~failed
            )
            outside = ~(part["perturbation"] <= eps * (1 + 1e-5) + 1e-6) & ~failed
            yield from self._named(f"{run}: the perturbation is larger than {eps:.6g}", outside)

    def attacks(self) -> Iterator[str]:
        """A run's shares against its outcomes."""
        unbroken = self.right
        for run, part in self.by_run.items():
            ever, failed = self.broken(run), bool(self.failed(run).any())
            expected = {
                "surrogate_accuracy": 1 - _mask(part["surrogate_fooled"]).mean(),
                "final": (self.right & ~self.broken(run, "final_broken")).mean(),
                "any": (self.right & ~ever).mean(),
                "newly_broken": (unbroken & ever).sum(),
            }
            unbroken = unbroken & ~ever
            for column, value in expected.items():
                found = float(self.shown[run][column].iloc[0])
                agrees = math.isclose(found, value, rel_tol=0, abs_tol=TOLERANCE)
                if failed and column != "newly_broken":
                    agrees = math.isnan(found)
                if not agrees:
                    yield f"attacks.csv: {column} of {run} is {found:.6g}, but the outcomes make {value:.6g}"

    def summary(self) -> Iterator[str]:
        """The numbers of the table, with their intervals."""
        samples = self.rows.assign(clean_correct=self.right, robust=self.right & ~self.ever)
        outcomes = pd.concat(self.by_run.values())
        for metric, definition in METRICS.items():
            if metric not in self.summed:
                yield f"summary.csv has no {metric}"
                continue
            for name, value in definition.from_rows(samples, outcomes)._asdict().items():
                found = float(self.summed[metric][name])
                if not math.isclose(found, value, rel_tol=0, abs_tol=TOLERANCE):
                    yield f"summary.csv: {name} of {metric} is {found:.6g}, but the rows make {value:.6g}"

    def laws(self) -> Iterator[str]:
        """The order that the numbers have by definition."""
        order = [name for name in reversed(METRICS) if name in self.summed]
        values = [float(self.summed[name]["value"]) for name in order]
        for i, (lower, upper) in enumerate(itertools.pairwise(values)):
            if not lower <= upper + TOLERANCE:
                yield f"summary.csv: {order[i]} ({lower:.6g}) is above {order[i + 1]} ({upper:.6g})"

    def _sign(self, margin: pd.Series[float], ever: Mask) -> Mask:
        """Where a sample that is right on its clean batch has a margin that contradicts whether it was broken."""
        values = margin.to_numpy(dtype=float)
        return self.right & ~np.where(ever, values <= 0, values >= 0)

    def _named(self, fault: str, where: Any) -> Iterator[str]:
        """A sentence for the first sample at fault, and how many more there are."""
        at = self.rows["index"][np.asarray(where, dtype=bool)].tolist()
        if at:
            yield f"sample {at[0]}: {fault}" + (f" (and {len(at) - 1} more samples)" if len(at) > 1 else "")


def _mask(values: Any) -> Mask:
    return np.asarray(values, dtype=bool)


def _same(column: pd.Series[Any], expected: Sequence[Any]) -> Mask:
    """Where a column that may have gaps holds what is expected."""
    pairs = zip(column, expected, strict=True)
    same = [
        pd.isna(found) if due is None else pd.notna(found) and pd.notna(due) and found == due for found, due in pairs
    ]
    return np.array(same, dtype=bool)
