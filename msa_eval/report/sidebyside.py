"""The page that shows several evaluations of the same samples side by side."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from msa_eval.evidence.metrics import METRICS
from msa_eval.evidence.results import Results
from msa_eval.files import write_whole
from msa_eval.report import frames
from msa_eval.report.comparison import Comparison, only_one, points, told_p
from msa_eval.report.exhibits import NONE, Pictures, exhibits
from msa_eval.report.inline import csv_link, inline_svg
from msa_eval.report.page import SECTIONS, describe, evaluation, listed, render, together
from msa_eval.report.plots.differences import draw_differences
from msa_eval.report.style import NAMES

EXHIBITS = 16
"""So many broken samples are shown, each evaluation's share of them and at least two."""


def write_comparison(
    comparison: Comparison, path: str | Path, pictures: Mapping[str, Pictures] | None = None
) -> Path:  # fmt: skip
    """Write the page; the same evidence gives the same bytes.

    Args:
        comparison: of evaluations.
        path: of the file.
        pictures: by evaluation, of broken samples, or why there are none.

    Raises:
        OSError: when the file can't be written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, render_page(comparison, pictures).encode())
    return path


def render_page(comparison: Comparison, pictures: Mapping[str, Pictures] | None = None) -> str:
    """The page as HTML."""
    names, table = list(comparison.results), comparison.table
    groups = [(str(target), str(context), rows) for (target, context), rows in
              table.groupby(["target", "context"], sort=False)]  # fmt: skip
    targets, contexts = ([str(name) for name in table[column].unique()] for column in ("target", "context"))
    return render(
        "compare.jinja",
        title=" against ".join(reversed(names)) if len(names) == 2 else f"{len(names)} evaluations side by side",
        subtitle="",
        sections=[("runs", "Evaluations"), ("differences", "Differences"), *SECTIONS[1:]],
        base=names[0],
        runs=[
            _evaluation(comparison.results, name, number, contexts, (pictures or {}).get(name, NONE))
            for number, name in enumerate(names, 1)
        ],
        notes=comparison.notes,
        differences=[_differences(target, context, rows, comparison) for target, context, rows in groups],
        meanings={name: metric.meaning for name, metric in METRICS.items()},
        **together(
            comparison.results, targets, contexts, seat=("index", "label"), each=("fate", "by", "margin")
        ),
    )  # fmt: skip


def _evaluation(
    named: Mapping[str, Results], name: str, number: int, contexts: list[str], pictures: Pictures
) -> dict[str, Any]:
    """One of several: its pictures are fewer, and say what became of the same sample in the others."""
    results, limit = named[name], max(EXHIBITS // len(named), 2)
    others = {other: one for other, one in named.items() if other != name}
    return evaluation(results, contexts) | {
        "name": name, "suffix": f"-{number}", "sentence": describe(results),
        "gallery": exhibits(results, pictures, limit=limit, others=others),
    }  # fmt: skip


def _differences(target: str, context: str, rows: pd.DataFrame, comparison: Comparison) -> dict[str, Any]:
    base = next(iter(comparison.results))
    name = f"differences-{target}-{context}"
    paired = rows[rows["difference"].notna()]
    described = [
        f"{row['name']}, {row['metric']}: {points(row['difference'])} points, from {points(row['difference_low'])} to "
        f"{points(row['difference_high'])}, p {told_p(row['p'])}"
        for row in paired.to_dict(orient="records")
    ]
    title = f"{NAMES[target]}, {context}"
    alone = only_one(comparison, target, context)
    return {
        "name": name, "title": title, "csv": csv_link(rows),
        "svg": inline_svg(
            draw_differences(paired), name, f"Paired differences to {base}, {title}. {'; '.join(described)}."
        ),
        "rows": [row | {"other": row["name"] != base, "paired": row["difference"] == row["difference"]}
                 for row in rows.to_dict(orient="records")],
        "samples": csv_link(_differing(comparison, target, context)),
        "alone": {
            "count": len(alone), "csv": csv_link(alone),
            "groups": listed((str(own), held) for own, held in alone.groupby("results", sort=False)),
        },
    }  # fmt: skip


def _differing(comparison: Comparison, target: str, context: str) -> pd.DataFrame:
    """The samples on which evaluations differ in some number: a column a number and name, 1 where right."""
    right, names = frames.pick(comparison.right, target, context), list(comparison.results)
    wide = pd.DataFrame(
        {
            f"{metric}: {name}": rows.set_index("index")[name].astype("Int8")
            for metric, rows in right.groupby("metric", sort=False) for name in names
        }
    )  # fmt: skip
    differing = right.loc[right[names].nunique(axis=1) > 1, "index"]
    return wide[wide.index.isin(differing)].reset_index()
