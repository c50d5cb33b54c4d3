"""Tables for a paper: the FC head's rows above the distance-based ones, differences in parentheses, best in bold."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import pandas as pd

from msa_eval.evidence.metrics import METRICS
from msa_eval.evidence.results import Results
from msa_eval.report import frames

FORMATS = ("latex", "markdown", "csv")
MOST_RUNS = 8
"""More runs than these share a column by surrogate, which shows the lowest final of each."""

LOWEST = " (lowest)"
HEADS = {name: name.replace("_", " ") for name in METRICS}


class Cell(NamedTuple):
    """A number of a table.

    Attributes:
        value: a share; NaN where there is none.
        difference: to the FC head's; NaN in its own row and where it has none.
        best: whether no other row of the same results has more, and some row has less.
    """

    value: float
    difference: float
    best: bool


class Row(NamedTuple):
    """A target of some results in a context; ``cells`` by column."""

    results: str
    context: str
    target: str
    method: str
    cells: Mapping[str, Cell]
    cascade: bool = False


def render_tables(named: Mapping[str, Results], style: str) -> str:
    """The tables of several evaluations as text, one table a context.

    Args:
        named: results by the name they are to have.
        style: ``latex``, ``markdown`` or ``csv``.

    Raises:
        ValueError: when there are no results, or the format is another.
    """
    if style not in FORMATS:
        raise ValueError(f"unknown format {style!r}; choose one of {', '.join(FORMATS)}")
    if not named:
        raise ValueError("there are no results to make a table of")
    rows = [row for name, results in named.items() for row in rows_of(name, results)]
    if style == "csv":
        return _csv(rows)
    render = _latex if style == "latex" else _markdown
    contexts = list(dict.fromkeys(row.context for row in rows))
    return "\n".join(render(context, [row for row in rows if row.context == context]) for context in contexts)


def rows_of(name: str, results: Results) -> list[Row]:
    """The rows of an evaluation: in each context the FC head's, where there is one, and the defence's."""
    made = []
    cascade = frames.cascades(results)
    for context in frames.contexts_of(results):
        values = {target: _values(results, target, context) for target in frames.targets_of(results)}
        columns = list(dict.fromkeys(column for numbers in values.values() for column in numbers))
        for target, numbers in values.items():
            cells = {}
            for column in columns:
                value, plain = numbers.get(column, math.nan), values.get("fc", {}).get(column, math.nan)
                others = [held[column] for held in values.values() if column in held]
                best = len(others) > 1 and value == max(others) > min(others)
                cells[column] = Cell(value, math.nan if target == "fc" else value - plain, best)
            kind = results.run["targets"].get(target, {}).get("type", target)
            made.append(Row(name, context, target, "FC" if target == "fc" else str(kind), cells, cascade))
    return made


def _values(results: Results, target: str, context: str) -> dict[str, float]:
    """The numbers of a row by column: clean, the finals of runs with a surrogate, and the three that sum them up."""
    listed = results.attacks[~frames.among_found(results.attacks)]
    attacks = frames.pick(listed, target, context)
    all_runs = listed[listed["context"] == context]["run"].unique()
    if len(all_runs) <= MOST_RUNS:
        finals = dict(zip(attacks["run"], attacks["final"], strict=True))
    else:
        lowest = attacks.groupby("surrogate", sort=False)["final"].min()
        finals = {f"{surrogate}{LOWEST}": float(value) for surrogate, value in lowest.items()}
    clean, *others = ((m, float(frames.number(results, target, context, m)["value"])) for m in HEADS)
    return dict([clean, *((f"run:{run}", float(value)) for run, value in finals.items()), *others])


def _columns(rows: Sequence[Row]) -> list[str]:
    """All columns: clean, runs in the order they come up, and the other numbers."""
    runs = [column for row in rows for column in row.cells if column.startswith("run:")]
    clean, *others = HEADS
    return [clean, *dict.fromkeys(runs), *others]


def _head(column: str) -> str:
    return HEADS.get(column, column.removeprefix("run:"))


def _groups(rows: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    groups = [
        ("Fully connected classifier", [row for row in rows if row.target == "fc"]),
        ("Distance-based classifier", [row for row in rows if row.target != "fc" and row.method == "HPM"]),
        ("Other defence", [row for row in rows if row.target != "fc" and row.method != "HPM"]),
    ]
    return [(title, held) for title, held in groups if held]


def _caption(context: str, columns: Sequence[str], rows: Sequence[Row]) -> str:
    few = " Of a surrogate the lowest final of its runs." if any(c.endswith(LOWEST) for c in columns) else ""
    cascade = (
        " In a cascade the final of a run includes what earlier runs broke." if any(r.cascade for r in rows) else ""
    )
    return (
        f"Accuracy in %, {context}; difference to the FC head in parentheses, the better of the two in bold."
        f"{few}{cascade}"
    )


def _cell(cell: Cell | None, bold: Callable[[str], str], minus: str) -> str:
    if cell is None or math.isnan(cell.value):
        return "--"
    text = f"{100 * cell.value:.1f}"
    text = bold(text) if cell.best else text
    if math.isnan(cell.difference):
        return text
    points = round(100 * cell.difference, 1)
    sign = "+" if points > 0 else minus if points < 0 else "\N{PLUS-MINUS SIGN}" if minus != "$-$" else "$\\pm$"
    return f"{text} ({sign}{abs(points):.1f})"


def _markdown(context: str, rows: Sequence[Row]) -> str:
    columns = _columns(rows)
    lines = [
        _caption(context, columns, rows),
        "",
        "| | " + " | ".join(escape_markdown(_head(column)) for column in columns) + " |",
        "| --- |" + " ---: |" * len(columns),
    ]
    for title, held in _groups(rows):
        lines.append(f"| *{title}* |" + " |" * len(columns))
        for row in held:
            cells = [_cell(row.cells.get(column), "**{}**".format, "\N{MINUS SIGN}") for column in columns]
            lines.append(
                f"| {escape_markdown(row.results)}, {escape_markdown(row.method)} | " + " | ".join(cells) + " |"
            )
    return "\n".join(lines) + "\n"


def _latex(context: str, rows: Sequence[Row]) -> str:
    columns = _columns(rows)
    lines = [
        "% " + _caption(context, columns, rows),
        "% Needs \\usepackage{booktabs}.",
        f"\\begin{{tabular}}{{l{'r' * len(columns)}}}",
        "\\toprule",
        " & ".join(["", *(escape_latex(_head(column)) for column in columns)]) + r" \\",
    ]
    for title, held in _groups(rows):
        lines += ["\\midrule", f"\\multicolumn{{{len(columns) + 1}}}{{l}}{{\\textit{{{title}}}}} \\\\"]
        for row in held:
            cells = [_cell(row.cells.get(column), "\\textbf{{{}}}".format, "$-$") for column in columns]
            lines.append(" & ".join([escape_latex(f"{row.results}, {row.method}"), *cells]) + r" \\")
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}"]) + "\n"


def _csv(rows: Sequence[Row]) -> str:
    table = [
        {"results": row.results, "context": row.context, "target": row.target, "method": row.method,
         "column": _head(column), **cell._asdict()}
        for row in rows for column, cell in row.cells.items() if not math.isnan(cell.value)
    ]  # fmt: skip
    return pd.DataFrame(table).to_csv(index=False, lineterminator="\n")


_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", '"': r"\textquotedbl{}",
}  # fmt: skip


def escape_latex(text: str) -> str:
    r"""Text that LaTeX prints as it stands; line breaks become spaces.

    >>> print(escape_latex("100 % of a_b & {c}\\"))
    100 \% of a\_b \& \{c\}\textbackslash{}
    """
    return "".join(_LATEX.get(letter, letter) for letter in " ".join(text.split()))


def escape_markdown(text: str) -> str:
    r"""Text that a Markdown table shows as it stands.

    >>> print(escape_markdown("a|b *c* <d>"))
    a\|b \*c\* &lt;d>
    """
    text = " ".join(text.split())
    for letter in "\\|*_`[]":
        text = text.replace(letter, "\\" + letter)
    return text.replace("&", "&amp;").replace("<", "&lt;")
