"""The tables of an evaluation, made from its records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from msa_eval.evidence.metrics import METRICS
from msa_eval.evidence.records import TargetRecord
from msa_eval.evidence.results import Results


def tabulate(records: Sequence[TargetRecord], run: Mapping[str, Any]) -> Results:
    """Make the tables from the records of all targets and contexts."""
    first = records[0]
    seats = pd.DataFrame({"batch": first.batch, "position": first.position, "index": first.index})
    return Results(
        summary=pd.concat([_summary(record) for record in records], ignore_index=True),
        attacks=pd.concat([_attacks(record) for record in records], ignore_index=True),
        samples=pd.concat([_samples(record) for record in records], ignore_index=True),
        outcomes=pd.concat([_outcomes(record) for record in records], ignore_index=True),
        batches=seats.sort_values(["batch", "position"], ignore_index=True),
        run=run,
    )


def _whole_or_missing(values: npt.NDArray[np.int64], present: npt.NDArray[np.bool_]) -> pd.Series[int]:
    return pd.Series(values, dtype="Int64").where(pd.Series(present))


def _summary(record: TargetRecord) -> pd.DataFrame:
    about = {"target": record.target, "context": record.context}
    return pd.DataFrame([about | {"metric": one.name} | one.of(record)._asdict() for one in METRICS.values()])


def _attacks(record: TargetRecord) -> pd.DataFrame:
    left = record.correct & ~np.logical_or.accumulate(record.any_broken, axis=0)
    newly = record.correct.sum() - left.sum(axis=1)
    shares = {
        "surrogate_accuracy": ~record.surrogate_fooled,
        "final": record.correct & ~record.final_broken,
        "any": record.correct & ~record.any_broken,
    }
    runs = record.runs
    table = runs[["run", "surrogate", "attack", "loss", "restart"]].copy()
    table.insert(0, "target", record.target)
    table.insert(1, "context", record.context)
    for name, right in shares.items():
        table[name] = np.where(record.complete, right.mean(axis=1), np.nan)
    table["newly_broken"] = np.diff(newly, prepend=0)
    table = pd.concat([table, runs[["forwards", "backwards", "decisions", "seconds"]]], axis=1)
    return table.assign(notes=runs["notes"].fillna("")) if runs["notes"].notna().any() else table


def _samples(record: TargetRecord) -> pd.DataFrame:
    first_run = record.any_broken.argmax(axis=0)
    hit, right = record.any_broken.any(axis=0), record.correct
    iterate = record.first_iterate[first_run, np.arange(len(right))]
    broken_by = pd.Series(np.where(right, record.runs["run"].to_numpy()[first_run], "clean"), dtype=object)
    return pd.DataFrame(
        {
            "target": record.target,
            "context": record.context,
            "index": record.index,
            "label": record.label,
            "batch": record.batch,
            "position": record.position,
            "clean_prediction": record.clean_prediction,
            "clean_correct": right,
            "robust": record.unbroken,
            "broken_by": broken_by.where(pd.Series(hit | ~right), None),
            "broken_at": _whole_or_missing(iterate, right & hit),
            "min_margin": np.fmin(record.clean_margin, np.fmin.reduce(record.min_margin, axis=0)),
            "committed_right": record.realised,
        }
    )


def _outcomes(record: TargetRecord) -> pd.DataFrame:
    count, size = record.any_broken.shape
    return pd.DataFrame(
        {
            "target": record.target,
            "context": record.context,
            "run": record.runs["run"].to_numpy().repeat(size),
            "index": np.tile(record.index, count),
            "surrogate_fooled": record.surrogate_fooled.ravel(),
            "final_broken": record.final_broken.ravel(),
            "any_broken": record.any_broken.ravel(),
            "first_iterate": _whole_or_missing(record.first_iterate.ravel(), record.any_broken.ravel()),
            "min_margin": record.min_margin.ravel(),
            "perturbation": record.perturbation.ravel(),
        }
    )
