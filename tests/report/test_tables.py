"""Tables for a paper: the numbers of the summary, differences to the FC head, and text that compiles."""

from __future__ import annotations

import dataclasses
import io
import re
import shutil
import subprocess
from pathlib import Path

import pandas as pd
import pytest
from records import RUNS, make_results

from msa_eval.report.tables import escape_latex, render_tables

HOSTILE = r"100%_of $x^2$ & {a}~#1 \input{/etc/passwd} |*<script>*|"


def test_markdown_shows_values_differences_and_the_best() -> None:
    results = make_results()
    lines = render_tables({"mine": results}, "markdown").splitlines()
    head = [cell.strip() for cell in lines[2].split("|")[1:-1]]
    assert head == ["", "clean", *(run for run, *_ in RUNS), "paper", "realised", "worst case"]
    fc, hpm = (
        [cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("| mine")
    )  # fmt: skip
    assert (fc[0], hpm[0]) == ("mine, FC", "mine, HPM")
    assert lines.index(next(line for line in lines if "*Fully" in line)) < lines.index(
        next(line for line in lines if "*Distance" in line)
    )
    value = results.summary.set_index(["metric", "target"])["value"]
    finals = results.attacks.set_index(["run", "target"])["final"]
    for at, name in enumerate(head[1:], start=1):
        key = name.replace(" ", "_")
        plain, mine = (float((value if key in value else finals)[key, target]) for target in ("fc", "defense"))
        points = round(100 * (mine - plain), 1)
        shown = f"+{points}" if points > 0 else f"\N{MINUS SIGN}{-points}" if points < 0 else "\N{PLUS-MINUS SIGN}0.0"
        left, right = f"{100 * plain:.1f}", f"{100 * mine:.1f}"
        left = f"**{left}**" if plain > mine else left
        right = f"**{right}**" if mine > plain else right
        assert (fc[at], hpm[at]) == (left, f"{right} ({shown})")


def test_csv_holds_the_same_unrounded() -> None:
    results = make_results(contexts=("joint", "solo"))
    table = pd.read_csv(io.StringIO(render_tables({"mine": results}, "csv")))
    for row in results.summary.to_dict(orient="records"):
        column = row["metric"].replace("_", " ")
        mine = table[(table["target"] == row["target"]) & (table["context"] == row["context"])].set_index("column")
        assert mine.loc[column, "value"] == row["value"]


def test_several_results_and_contexts_have_their_rows() -> None:
    named = {"a": make_results(contexts=("joint", "solo")), "b": make_results(targets=("defense",))}
    text = render_tables(named, "markdown")
    joint, solo = text.split("Accuracy in %, ")[1:]
    assert [line.split("|")[1].strip() for line in joint.splitlines() if re.match(r"\| [ab],", line)] == [
        "a, FC", "a, HPM", "b, HPM",
    ]  # fmt: skip
    assert "| b," not in solo
    assert "**" not in next(line for line in joint.splitlines() if line.startswith("| b, HPM"))


def test_many_runs_share_a_column_by_surrogate() -> None:
    runs = [(f"s{i % 3}:apgd-ce:{i}", f"s{i % 3}", "apgd", "ce", i) for i in range(12)]
    results = make_results(runs=runs)
    table = pd.read_csv(io.StringIO(render_tables({"mine": results}, "csv")))
    lowest = results.attacks.groupby(["target", "surrogate"])["final"].min()
    for (target, surrogate), value in lowest.items():
        mine = table[(table["target"] == target) & (table["column"] == f"{surrogate} (lowest)")]
        assert mine["value"].tolist() == [value]
    assert "Of a surrogate the lowest final" in render_tables({"mine": results}, "latex")


def test_a_cascade_is_told_and_what_searches_among_found_points_has_no_column() -> None:
    runs = [*RUNS, ("pursued:pursuit-margin:0", "pursued", "pursuit", "margin", 0)]
    results = make_results(runs=runs)
    plain = render_tables({"mine": results}, "markdown")
    assert "pursued" not in plain
    assert "cascade" not in plain
    protocol = dict(results.run["protocol"]) | {"text": '[attack.apgd]\ncombine = "cascade"\n'}
    chained = dataclasses.replace(results, run=dict(results.run) | {"protocol": protocol})
    for style in ("markdown", "latex"):
        assert "the final of a run includes what earlier runs broke" in render_tables({"mine": chained}, style)


def test_a_tie_is_nobodys() -> None:
    results = make_results(broken=0.0, clean=1.0)
    assert "**" not in render_tables({"mine": results}, "markdown")
    assert "\\textbf" not in render_tables({"mine": results}, "latex")


def test_another_format_is_refused() -> None:
    with pytest.raises(ValueError, match="latex, markdown, csv"):
        render_tables({"mine": make_results()}, "word")
    with pytest.raises(ValueError, match="no results"):
        render_tables({}, "csv")


def test_latex_is_escaped() -> None:
    text = render_tables({HOSTILE: make_results()}, "latex")
    body = [line for line in text.splitlines() if not line.startswith("%")]
    assert not any("\\input" in line for line in body)
    (columns,) = re.findall(r"\\begin\{tabular\}\{(lr+)\}", text)
    for line in body:
        if line.endswith("\\\\") and "multicolumn" not in line:
            assert len(re.findall(r"(?<!\\)&", line)) == len(columns) - 1
    assert escape_latex("a\nb") == "a b"


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="there is no pdflatex here")
def test_latex_compiles(tmp_path: Path) -> None:
    table = render_tables(
        {HOSTILE: make_results(contexts=("joint", "solo")), "b": make_results(targets=("defense",))}, "latex"
    )
    document = (
        "\\documentclass{article}\\usepackage[T1]{fontenc}\\usepackage{booktabs}\\begin{document}\n"
        f"{table}\\end{{document}}\n"
    )
    (tmp_path / "t.tex").write_text(document, encoding="utf-8")
    command = ["pdflatex", "-halt-on-error", "-interaction=nonstopmode", "-no-shell-escape", "t.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:]
