"""The sample table of a page: one row per sample, target and context, and what became of it in each evaluation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pandas as pd

from msa_eval.evidence.results import Results
from msa_eval.report import frames

FATES = ("robust", "broken", "wrong on clean")
SEAT = {"index": "Sample", "label": "Label", "batch": "Batch", "position": "Place"}
"""Columns of the sample itself."""

EACH = {
    "prediction": "Clean answer", "fate": "Fate", "by": "Broken first by", "at": "Iterate",
    "runs": "Runs that broke it", "margin": "Smallest lead",
}  # fmt: skip
"""Columns of each evaluation."""


def sample_table(
    named: Mapping[str, Results], targets: Sequence[str], contexts: Sequence[str],
    *, seat: Sequence[str] = tuple(SEAT), each: Sequence[str] = tuple(EACH),
) -> dict[str, Any]:  # fmt: skip
    """What the table's script needs, compactly: what is the same for all targets and contexts stands once.

    Args:
        named: evaluations of the same samples by name.
        targets: which are shown.
        contexts: which are shown; all evaluations have them.
        seat: columns of the sample, of `SEAT`.
        each: columns of an evaluation, of `EACH`.
    """
    first = next(iter(named.values()))
    seats = first.samples.drop_duplicates("index").reset_index(drop=True)
    everybody = list(seats["index"])
    place = {index: at for at, index in enumerate(everybody)}
    names: dict[str, int] = {}
    parts: list[dict[str, Any]] = []
    for target, context in ((target, context) for target in targets for context in contexts):
        order = list(frames.pick(first.samples, target, context)["index"])
        held = []
        for results in named.values():
            rows = frames.pick(results.samples, target, context).set_index("index").loc[order]
            held.append({name: _COLUMNS[name](rows, results, names) for name in each})
        where = None if order == everybody else [place[index] for index in order]
        parts.append({"target": target, "context": context, "place": where, "each": held})
    columns: dict[str, Any] = {name: seats[name].tolist() for name in seat}
    titles = {"seat": [[name, SEAT[name]] for name in seat], "each": [[name, EACH[name]] for name in each]}
    return columns | {"fates": FATES, "names": list(names), "columns": titles, "results": list(named), "parts": parts}


def _fate(rows: pd.DataFrame, _: Results, __: dict[str, int]) -> str:
    """A digit a sample, its place in `FATES`."""
    right, robust = rows["clean_correct"].astype(bool), rows["robust"].astype(bool)
    return "".join("2" if not ok else "10"[holds] for ok, holds in zip(right, robust, strict=True))


def _by(rows: pd.DataFrame, _: Results, names: dict[str, int]) -> list[int]:
    """The place of the run's name, which is added where it is new; -1 where there is none."""
    by = [None if pd.isna(name) or name == "clean" else str(name) for name in rows["broken_by"]]
    return [-1 if name is None else names.setdefault(name, len(names)) for name in by]


def _runs(rows: pd.DataFrame, results: Results, _: dict[str, int]) -> list[int | None]:
    """How many runs broke each sample; none where it was wrong already, or the evidence does not say."""
    target, context = str(rows["target"].iloc[0]), str(rows["context"].iloc[0])
    if frames.lacking(results, context, "attacks", "outcomes"):
        return [None] * len(rows)
    counts = frames.breakers(results, target, context).sum(axis=1)
    return [int(counts[index]) if index in counts.index else None for index in rows.index]


_COLUMNS: Mapping[str, Callable[[pd.DataFrame, Results, dict[str, int]], Any]] = {
    "prediction": lambda rows, *_: [int(value) for value in rows["clean_prediction"]],
    "fate": _fate,
    "by": _by,
    "at": lambda rows, *_: [None if pd.isna(value) else int(value) for value in rows["broken_at"]],
    "runs": _runs,
    "margin": lambda rows, *_: [float(f"{value:.3g}") for value in rows["min_margin"]],
}
