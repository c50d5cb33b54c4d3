"""The tables of docs/research/speed.md and overhead.md, made of the CSV files alone.

    python -m tests.benchmarks tables

puts each between its two marks, so that a rerun of a measurement needs no typing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import pandas as pd

PAGES = (Path("docs/research/speed.md"), Path("docs/research/overhead.md"))


class Column(NamedTuple):
    """A figure as a column: its name in the file, and how it is written."""

    figure: str
    form: str = "{:.2f}"
    times: float = 1.0


class Table(NamedTuple):
    """How a file becomes a table.

    Attributes:
        keys: columns that name a row, by the heading they get.
        columns: figures, by heading.
        rows: which rows of the file are shown.
    """

    keys: Mapping[str, str]
    columns: Mapping[str, Column]
    rows: Callable[[pd.DataFrame], pd.Series] = lambda table: pd.Series(True, index=table.index)


SHARE, COUNT, SECONDS = ("{:.1f}", 100.0), "{:.1f}", "{:.1f}"
RIVALRY = {
    "images": Column("samples", "{:.0f}"),
    "CPU s": Column("cpu", SECONDS),
    "ours over it, CPU": Column("cpu, ours over it"),
    "wall": Column("wall, ours over it"),
    "forwards": Column("forwards", COUNT),
    "backwards": Column("backwards", COUNT),
}
TABLES: Mapping[str, Table] = {
    "paper": Table(
        {"of": "of", "queries": "queries", "precision": "precision", "contender": "contender"},
        RIVALRY
        | {"staying over it": Column("cpu, staying over it")}
        | {"decisions": Column("decisions", COUNT), "clean": Column("clean", *SHARE)}
        | {"`msa` until there over it": Column("cpu, msa until there over it", "{:.3f}")}
        | {"`paper`": Column("paper", *SHARE), "worst case": Column("worst_case", *SHARE)},
        lambda table: table["run"] == "all",
    ),
    "standard": Table(
        {"model": "model", "target": "target", "precision": "precision", "contender": "contender"},
        RIVALRY
        | {"ours until there over it": Column("cpu, ours until there over it", "{:.3f}")}
        | {"worst case": Column("worst_case", *SHARE), "own count": Column("own_count", *SHARE)},
    ),
    "static": Table(
        {"model": "model", "steps": "steps", "precision": "precision", "contender": "contender"},
        RIVALRY | {"final": Column("final", *SHARE), "worst case": Column("worst_case", *SHARE)},
    ),
    "overhead": Table(
        {"model": "model", "steps": "steps", "surrogate": "surrogate", "loss": "loss", "contender": "contender"},
        {
            "paced": Column("paced over bare", "{:.3f}"),
            "CPU": Column("cpu over bare", "{:.3f}"),
            "forwards": Column("forwards", "{:.0f}"),
            "backwards": Column("backwards", "{:.0f}"),
        },
    ),
    "limit": Table(
        {"model": "model", "steps": "steps", "repeat": "repeat"},
        {
            "of the limit": Column("of the limit"),
            "inside the trunk": Column("inside the trunk", "{:.3f}"),
            "10⁹ multiply-adds a CPU second": Column("gigamultiplications a second", "{:.1f}"),
            "layers alone": Column("gigamultiplications a second, layers alone", "{:.1f}"),
        },
    ),
    "growth": Table(
        {"varied": "varied", "samples": "samples", "classes": "classes", "dim": "d", "batch": "batch",
         "context": "context"},
        {
            "CPU s": Column("cpu", "{:.2f}"),
            "CPU ms a sample": Column("cpu a sample", "{:.2f}", 1000.0),
            "peak MiB": Column("peak MiB", "{:.0f}"),
            "after warming up": Column("more MiB", "{:+.0f}"),
        },
    ),
}  # fmt: skip


def render(name: str, table: pd.DataFrame) -> str:
    """A table of Markdown from the rows of a file."""
    how = TABLES[name]
    chosen = table[how.rows(table)]
    found: dict[tuple[str, ...], dict[str, float]] = {}
    for row in chosen.to_dict(orient="records"):
        found.setdefault(tuple(str(row[key]) for key in how.keys), {})[str(row["figure"])] = float(row["value"])
    lines = [[*how.keys.values(), *how.columns], ["---"] * (len(how.keys) + len(how.columns))]
    for keys, figures in found.items():
        cells = [
            column.form.format(column.times * figures[column.figure]) if column.figure in figures else ""
            for column in how.columns.values()
        ]
        lines.append([*keys, *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def fill(page: str, folder: Path) -> str:
    """A page with every table whose file is there put between its marks.

    >>> fill("no marks", Path())
    'no marks'
    """
    for name in TABLES:
        path = folder / f"{name}.csv"
        if path.exists():
            text = f"<!-- {name} -->\n\n{render(name, pd.read_csv(path))}\n\n<!-- /{name} -->"
            page = re.sub(f"<!-- {name} -->.*?<!-- /{name} -->", lambda _, text=text: text, page, flags=re.DOTALL)  # type: ignore[misc]
    return page


def run(*, out: Path, pages: Sequence[Path] = PAGES) -> None:
    """Fill the pages from the files of a folder."""
    for page in pages:
        page.write_text(fill(page.read_text(encoding="utf-8"), out), encoding="utf-8")
