"""From the clean accuracy to the worst case, a run at a time."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from msa_eval.report.plots.axes import label, or_zero, percent, percent_axis, stacked_panels
from msa_eval.report.style import COLOURS, INK, NAMES, paper_style


def draw_waterfall(data: pd.DataFrame) -> Figure:
    """Clean, what each run newly broke, and the worst case; runs that broke nothing new are folded together."""
    parts = {str(target): _folded(rows) for target, rows in data.groupby("target", sort=False)}
    with paper_style():
        figure, panels = stacked_panels([len(steps) for steps in parts.values()], row=0.16)
        for axes, (target, steps) in zip(panels, parts.items(), strict=True):
            for place, (name, before, after, broken) in enumerate(steps):
                _waterfall_bar(axes, place, name, (before, after), broken, COLOURS[target])
            axes.set_yticks(range(len(steps)), [label(name) for name, *_ in steps])
            axes.set_title(NAMES[target], loc="left", color=COLOURS[target], fontweight="bold")
            percent_axis(axes)
        panels[-1].set_xlabel("accuracy in %")
    return figure


def _waterfall_bar(axes: Axes, place: int, name: str, levels: tuple[float, float], broken: int, colour: str) -> None:
    before, after = levels
    total = name in ("clean", "worst case")
    if total:
        axes.barh(place, after, height=0.7, color=colour)
        axes.text(or_zero(after) + 0.01, place, percent(after), va="center", fontsize=6, fontweight="bold")
        return
    axes.barh(place, before - after, left=after, height=0.7, color=colour, alpha=0.45, linewidth=0)
    axes.plot([after, after], [place - 0.35, place + 0.65], color=INK, linewidth=0.5)
    if broken:
        axes.text(or_zero(before) + 0.01, place, f"\N{MINUS SIGN}{broken}", va="center", fontsize=6)


def _folded(rows: pd.DataFrame) -> list[tuple[str, float, float, int]]:
    """The steps to draw: neighbouring runs that broke nothing new become one."""
    steps: list[tuple[str, float, float, int]] = []
    idle = 0
    for row in rows.to_dict(orient="records"):
        if row["step"] in ("clean", "worst_case") or row["broken"]:
            name = "worst case" if row["step"] == "worst_case" else str(row["step"])
            steps.append((name, row["before"], row["after"], row["broken"]))
            idle = 0
            continue
        idle += 1
        if idle > 1:
            steps.pop()
        name = str(row["step"]) if idle == 1 else f"{idle} runs that broke no more"
        steps.append((name, row["before"], row["after"], 0))
    return steps


def tell_waterfall(data: pd.DataFrame) -> str:
    """The waterfall in words."""
    described = []
    for target, rows in data.groupby("target", sort=False):
        first, *runs, last = rows.to_dict(orient="records")
        steps = [f"{row['step']} breaks {row['broken']} more" for row in runs if row["broken"]]
        described.append(
            f"{NAMES[str(target)]}: clean {percent(first['after'])} %, {', '.join(steps) or 'no run breaks a sample'}, "
            f"worst case {percent(last['after'])} %"
        )
    return "; ".join(described) + "."
