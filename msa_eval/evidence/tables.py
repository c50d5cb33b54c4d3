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


def _stack(record: TargetRecord, name: str) -> Any:
    return np.stack([getattr(run, name) for run in record.runs])


def _summary(record: TargetRecord) -> pd.DataFrame:
    about = {"target": record.target, "context": record.context}
    return pd.DataFrame([about | {"metric": one.name} | one.of(record)._asdict() for one in METRICS.values()])


def _attacks(record: TargetRecord) -> pd.DataFrame:
    rows = []
    unbroken = record.correct
    with_notes = any(run.notes is not None for run in record.runs)
    for run in record.runs:
        newly = unbroken & run.any_broken
        unbroken = unbroken & ~run.any_broken
        shares = {
            "surrogate_accuracy": float((~run.surrogate_fooled).mean()),
            "final": float((record.correct & ~run.final_broken).mean()),
            "any": float((record.correct & ~run.any_broken).mean()),
        }
        rows.append(
            {
                "target": record.target,
                "context": record.context,
                "run": run.name,
                "surrogate": run.surrogate,
                "attack": run.attack,
                "loss": run.loss,
                "restart": run.restart,
                **(shares if run.whole else dict.fromkeys(shares, np.nan)),
                "newly_broken": int(newly.sum()),
                "forwards": run.forwards,
                "backwards": run.backwards,
                "decisions": run.decisions,
                "seconds": round(run.seconds, 3),
            }
            | ({"notes": "; ".join(run.notes or ())} if with_notes else {})
        )
    return pd.DataFrame(rows)


def _samples(record: TargetRecord) -> pd.DataFrame:
    broken = _stack(record, "any_broken")
    names = np.array([run.name for run in record.runs])
    first_run = broken.argmax(axis=0)
    hit = broken.any(axis=0)
    iterate = _stack(record, "first_iterate")[first_run, np.arange(len(hit))]
    right = record.correct
    broken_by = pd.Series(np.where(right, names[first_run], "clean"), dtype=object)
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
            "robust": right & ~hit,
            "broken_by": broken_by.where(pd.Series(hit | ~right), None),
            "broken_at": _whole_or_missing(iterate, right & hit),
            "min_margin": np.fmin(record.clean_margin, np.fmin.reduce(_stack(record, "min_margin"), axis=0)),
            "committed_right": record.realised,
        }
    )


def _outcomes(record: TargetRecord) -> pd.DataFrame:
    frames = [
        pd.DataFrame(
            {
                "target": record.target,
                "context": record.context,
                "run": run.name,
                "index": record.index,
                "surrogate_fooled": run.surrogate_fooled,
                "final_broken": run.final_broken,
                "any_broken": run.any_broken,
                "first_iterate": _whole_or_missing(run.first_iterate, run.any_broken),
                "min_margin": run.min_margin,
                "perturbation": run.perturbation,
            }
        )
        for run in record.runs
    ]
    return pd.concat(frames, ignore_index=True)
