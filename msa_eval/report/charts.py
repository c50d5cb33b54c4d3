"""Charts made from evidence alone."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from html import escape
from typing import Any

import pandas as pd

from msa_eval.protocols.evidence import Results


def spending(results: Results, *, target: str = "defense", context: str = "joint") -> pd.DataFrame:
    """Worst case against spent passes, run after run.

    A pass is a forward pass of one image through the trunk, with or without the way back; within a run they are taken
    to be spent evenly over its iterates.

    Args:
        results: of an evaluation.
        target: ``defense`` or ``fc``.
        context: what the attacker controls.

    Returns:
        ``passes`` a sample, ascending from 0, and the ``worst_case`` then, a share.
    """
    samples, attacks, outcomes = (
        table[(table["target"] == target) & (table["context"] == context)]
        for table in (results.samples, results.attacks, results.outcomes)
    )
    standing = samples.set_index("index")["clean_correct"].astype(bool)
    n, spent = len(standing), 0.0
    rows = [(0.0, float(standing.mean()))]
    for run in attacks.to_dict(orient="records"):
        of_run = outcomes[outcomes["run"] == run["run"]].set_index("index").loc[standing.index]
        broken = standing & of_run["any_broken"].astype(bool)
        cost = run["forwards"] / n
        length = max(float(of_run["first_iterate"].max(skipna=True) or 0), 1.0) + 1
        length = max(length, cost) if run["backwards"] else length
        for iterate, count in of_run.loc[broken, "first_iterate"].value_counts().sort_index().items():
            left = rows[-1][1] - count / n
            rows.append((spent + cost * min((float(iterate) + 1) / length, 1.0), left))
        standing, spent = standing & ~broken, spent + cost
        rows.append((spent, float(standing.mean())))
    return pd.DataFrame(rows, columns=["passes", "worst_case"])


def render_curves(curves: Mapping[str, pd.DataFrame], title: str, *, width: int = 720, height: int = 420) -> str:
    """Curves of worst case against passes as an SVG chart with a logarithmic axis of passes.

    Args:
        curves: by name, each with ``passes`` and ``worst_case`` in order of passes.
        title: above the chart.
        width: in pixels.
        height: in pixels.
    """
    left, right, top, bottom = 50, 210, 40, 40
    most = max(float(curve["passes"].max()) for curve in curves.values())
    low, high = math.log10(5), math.log10(max(most, 10.0))

    def at(passes: float, value: float) -> tuple[float, float]:
        along = (math.log10(max(passes, 5.0)) - low) / (high - low)
        return left + along * (width - left - right), height - bottom - value * (height - top - bottom)

    parts = [f'<text x="8" y="20">{escape(title)}</text>']
    for tick in range(0, 101, 20):
        x, y = at(5, tick / 100)
        parts.append(f'<path d="M{x:.1f} {y:.1f}H{width - right}" stroke="#ddd"/>')
        parts.append(f'<text x="{x - 6:.1f}" y="{y + 4:.1f}" text-anchor="end" font-size="10">{tick}</text>')
    for passes in (10, 30, 100, 300, 1000, 3000, 10000):
        if passes <= most:
            x, y = at(passes, 0)
            parts.append(f'<text x="{x:.1f}" y="{y + 16:.1f}" text-anchor="middle" font-size="10">{passes}</text>')
    parts.append(f'<text x="{left}" y="{height - 6}" font-size="10">passes a sample (logarithmic)</text>')
    ends = []
    for number, (name, curve) in enumerate(curves.items()):
        points = [at(float(p), float(v)) for p, v in zip(curve["passes"], curve["worst_case"], strict=True)]
        steps = [f"M{points[0][0]:.1f} {points[0][1]:.1f}", *(f"H{x:.1f}V{y:.1f}" for x, y in points[1:])]
        colour, dash = PALETTE[number % len(PALETTE)], "" if number < len(PALETTE) else ' stroke-dasharray="4 3"'
        parts.append(f'<path d="{"".join(steps)}" fill="none" stroke="{colour}" stroke-width="1.6"{dash}/>')
        ends.append((points[-1][1], f"{name} {100 * float(curve['worst_case'].iloc[-1]):.1f}", colour))
    place = float(top)
    for y, text, colour in sorted(ends):
        place = max(place + 14, y)
        x = width - right + 6
        parts.append(f'<text x="{x}" y="{place:.1f}" font-size="11" fill="{colour}">{escape(text)}</text>')
    return _svg(width, height, f"worst case against passes: {', '.join(curves)}", parts)


def _svg(width: int, height: int, label: str, parts: list[str]) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'font-family="sans-serif" font-size="12" role="img" aria-label="{escape(label)}">'
        f'<rect width="{width}" height="{height}" fill="white"/>{"".join(parts)}</svg>\n'
    )


PALETTE = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
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
    return _svg(width, height, f"accuracy of {' and '.join(targets)}", parts)


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
