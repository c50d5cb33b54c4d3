"""A table and a chart for people, made from evidence alone."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from html import escape
from typing import Any

import pandas as pd

from msa_eval.protocols.evidence import Results

METRICS = ("clean", "paper", "realised", "worst_case")


def render_table(results: Results) -> str:
    """The table of an evaluation as text: the FC head's column beside the defence's, in percent.

    Runs show ``final (any)``: right on the final batch, and on every iterate. The numbers below them come with their
    Wilson 95 % interval.
    """
    targets = sorted(results.summary["target"].unique(), key=["fc", "defense"].index)
    contexts = list(results.summary["context"].unique())
    return "\n\n".join([_title(results), *(_context_table(results, context, targets) for context in contexts)])


def _title(results: Results) -> str:
    run = results.run
    protocol = run["protocol"]
    changed = " (modified: " + ", ".join(f"{k}={v}" for k, v in protocol["overrides"].items()) + ")"
    return (
        f"protocol {protocol['name']} v{protocol['version']}{changed if protocol['modified'] else ''}, "
        f"{run['data']['name']}: {run['data']['n']} samples in {run['batches']['count']} batches, seed {run['seed']}"
    )


def _context_table(results: Results, context: str, targets: list[str]) -> str:
    summary = {
        (row["target"], row["metric"]): row
        for row in results.summary.to_dict(orient="records")
        if row["context"] == context
    }
    attacks = {
        (row["target"], row["run"]): row
        for row in results.attacks.to_dict(orient="records")
        if row["context"] == context
    }

    def number(target: str, metric: str) -> str:
        row = summary[target, metric]
        return f"{100 * row['value']:.1f} [{100 * row['low']:.1f}, {100 * row['high']:.1f}]"

    def shown(target: str, name: str) -> str:
        if (target, name) not in attacks:
            return "-"
        row = attacks[target, name]
        return f"{100 * row['final']:.1f} ({100 * row['any']:.1f})"

    rows = {"clean": [number(target, "clean") for target in targets]}
    for name in dict.fromkeys(run for _, run in attacks):
        rows[name] = [shown(target, name) for target in targets]
    for metric in ("paper", "realised", "worst_case"):
        rows[metric] = [number(target, metric) for target in targets]
    frame = pd.DataFrame.from_dict(rows, orient="index", columns=targets)
    return f"{context}: accuracy in %, runs as final (any), numbers with their 95 % interval\n{frame.to_string()}"


def render_sizes(table: pd.DataFrame) -> str:
    """Batch-size dependence as text: a row a batch size, in percent with 95 % intervals.

    Args:
        table: of a `msa_eval.protocols.sizes.SizeReport`.
    """
    cells = [
        f"{100 * row['value']:.1f} [{100 * row['low']:.1f}, {100 * row['high']:.1f}]"
        for row in table.to_dict(orient="records")
    ]
    wide = table.assign(cell=cells).pivot_table(
        index=["context", "batch_size"], columns="metric", values="cell", aggfunc="first", sort=False
    )  # fmt: skip
    return "accuracy in % by batch size, with 95 % intervals\n" + wide[list(METRICS)].to_string()


BAR, ROW, LEFT, RIGHT = 9, 30, 190, 60
COLOURS = {"fc": "#0072B2", "defense": "#D55E00"}  # Okabe & Ito's, told apart by colour-blind readers too


def render_bars(results: Results, *, width: int = 720) -> str:
    """The numbers of the first context as an SVG bar chart: from clean through each run's final to the worst case.

    Args:
        results: of an evaluation, or loaded from its folder.
        width: in pixels.

    Returns:
        the SVG; whiskers are Wilson 95 % intervals.
    """
    context = results.summary["context"].iloc[0]
    targets = sorted(results.summary["target"].unique(), key=["fc", "defense"].index)
    summary = results.summary[results.summary["context"] == context]
    attacks = results.attacks[results.attacks["context"] == context]
    values = {(row["metric"], row["target"]): row for row in summary.to_dict(orient="records")}
    values |= {(row["run"], row["target"]): row | {"value": row["final"]} for row in attacks.to_dict(orient="records")}
    names = ["clean", *attacks["run"].unique(), "paper", "realised", "worst_case"]
    height = ROW * len(names) + 40
    scale = width - LEFT - RIGHT
    parts = [_legend(targets, f"{results.run['protocol']['name']}, {results.run['data']['n']} samples, {context}")]
    for i, name in enumerate(names):
        top = 40 + ROW * i
        weight = ' font-weight="bold"' if name == "worst_case" else ""
        parts.append(f'<text x="{LEFT - 8}" y="{top + 14}" text-anchor="end"{weight}>{escape(str(name))}</text>')
        for j, target in enumerate(targets):
            if (name, target) in values:
                parts.append(_bar(values[name, target], top + 2 + j * (BAR + 2), scale, COLOURS[target]))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'font-family="sans-serif" font-size="12" role="img" aria-label="accuracy of {" and ".join(targets)}">'
        f'<rect width="{width}" height="{height}" fill="white"/>{"".join(parts)}</svg>\n'
    )


def _legend(targets: list[str], title: str) -> str:
    parts = [f'<text x="8" y="20">{escape(title)}: accuracy in %</text>']
    for j, target in enumerate(targets):
        x = 480 + 90 * j
        parts.append(f'<rect x="{x}" y="11" width="{BAR}" height="{BAR}" fill="{COLOURS[target]}"/>')
        parts.append(f'<text x="{x + 14}" y="20">{escape(target)}</text>')
    return "".join(parts)


def _bar(row: Mapping[Hashable, Any], top: int, scale: int, colour: str) -> str:
    end = LEFT + scale * row["value"]
    parts = [f'<rect x="{LEFT}" y="{top}" width="{end - LEFT:.1f}" height="{BAR}" fill="{colour}"/>']
    if "low" in row:
        low, high, middle = LEFT + scale * row["low"], LEFT + scale * row["high"], top + BAR / 2
        parts.append(f'<path d="M{low:.1f} {middle}H{high:.1f}" stroke="black" stroke-width="1"/>')
        end = max(end, high)
    parts.append(f'<text x="{end + 4:.1f}" y="{top + BAR}" font-size="10">{100 * row["value"]:.1f}</text>')
    return "".join(parts)
