"""The page that shows several evaluations of the same samples side by side."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pandas as pd

from msa_eval.report.charts import charts, draw_differences
from msa_eval.report.comparison import Comparison, points, told_p
from msa_eval.report.inline import csv_link, inline_svg
from msa_eval.report.page import MEANINGS, describe, render, write_whole
from msa_eval.report.style import NAMES


def write_comparison(comparison: Comparison, path: str | Path) -> Path:
    """Write the page; the same evidence gives the same bytes.

    Raises:
        OSError: when the file can't be written.
    """
    path = Path(path)
    write_whole(path, render_page(comparison))
    return path


def render_page(comparison: Comparison) -> str:
    """The page as HTML."""
    names = list(comparison.results)
    groups = list(comparison.table.groupby(["target", "context"], sort=False))
    return render(
        "compare.jinja",
        title=" against ".join(reversed(names)) if len(names) == 2 else f"{len(names)} evaluations side by side",
        base=names[0],
        runs=[
            {"name": name, "told": describe(one), "verdict": str(one.run["verdict"]), "run": one.run}
            for name, one in comparison.results.items()
        ],
        notes=comparison.notes,
        differences=[_differences(str(target), str(context), rows, comparison) for (target, context), rows in groups],
        meanings=MEANINGS,
        figures=_figures(comparison),
    )


def _differences(target: str, context: str, rows: pd.DataFrame, comparison: Comparison) -> dict[str, Any]:
    base = next(iter(comparison.results))
    name = f"differences-{target}-{context}"
    paired = rows[rows["name"] != base]
    told = [
        f"{row['name']}, {row['metric']}: {points(row['difference'])} points, from {points(row['difference_low'])} to "
        f"{points(row['difference_high'])}, p {told_p(row['p'])}"
        for row in paired.to_dict(orient="records")
    ]
    right = comparison.right
    wide = right[(right["target"] == target) & (right["context"] == context)]
    title = f"{NAMES[target]}, {context}"
    return {
        "name": name, "title": title, "csv": csv_link(rows),
        "svg": inline_svg(draw_differences(paired), name, f"Paired differences to {base}, {title}. {'; '.join(told)}."),
        "rows": [row | {"other": row["name"] != base} for row in rows.to_dict(orient="records")],
        "samples": csv_link(wide.drop(columns=["target", "context"])),
    }  # fmt: skip


def _figures(comparison: Comparison) -> list[dict[str, Any]]:
    """The figures of a kind and context of all evaluations next to each other, where all have that context."""
    shared = set(comparison.table["context"])
    listed = [
        (number, name, chart)
        for number, (name, results) in enumerate(comparison.results.items())
        for chart in charts(results)
        if chart.context in shared
    ]
    listed.sort(key=lambda entry: _KINDS.index(entry[2].kind))
    sections: list[dict[str, Any]] = []
    for kind, group in itertools.groupby(listed, key=lambda entry: entry[2].kind):
        together = sorted(group, key=lambda entry: entry[2].context)
        drawn = [
            {
                "name": f"{chart.name}-{number + 1}", "title": chart.title, "label": f"{chart.context}: {name}",
                "csv": csv_link(chart.data),
                "svg": inline_svg(chart.figure(), f"{chart.name}-{number + 1}", f"{chart.title}, {name}. {chart.alt}"),
            }
            for number, name, chart in together
        ]  # fmt: skip
        chart = together[0][2]
        sections.append({"kind": kind, "title": chart.title, "caption": chart.caption, "charts": drawn})
    return sections


_KINDS = ("waterfall", "transfer", "spending", "classes", "agreement", "batches")
