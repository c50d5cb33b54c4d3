"""How many samples each run breaks, and how many it alone."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from msa_eval.report.plots.axes import label, stacked_panels
from msa_eval.report.style import COLOURS, NAMES, paper_style


def draw_agreement(data: pd.DataFrame) -> Figure:
    """How many samples each run broke, and how many of them no other run did."""
    parts = [(str(target), rows) for target, rows in data.groupby("target", sort=False)]
    most = max(int(data["broken"].max()), 1) if len(data) else 1
    with paper_style():
        figure, panels = stacked_panels([len(rows) for _, rows in parts], row=0.16)
        for axes, (target, rows) in zip(panels, parts, strict=True):
            y = range(len(rows))
            axes.barh(y, rows["broken"], height=0.7, color=COLOURS[target], alpha=0.45, linewidth=0)
            axes.barh(y, rows["only"], height=0.7, color=COLOURS[target])
            for place, row in enumerate(rows.to_dict(orient="records")):
                described = f"{row['broken']}" + (f" ({row['only']} alone)" if row["only"] else "")
                axes.text(row["broken"] + 0.01 * most, place, described, va="center", fontsize=6)
            axes.set_yticks(y, [label(run) for run in rows["run"]])
            axes.set_ylim(len(rows) - 0.4, -0.6)
            axes.set_xlim(0, 1.25 * most)
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
            axes.grid(axis="x")
            axes.set_title(NAMES[target], loc="left", color=COLOURS[target], fontweight="bold")
        panels[-1].set_xlabel("samples broken (dark: alone)")
    return figure


def tell_agreement(data: pd.DataFrame) -> str:
    """The runs in words."""
    described = [
        f"{NAMES[row['target']]}, {row['run']}: broke {row['broken']}, {row['only']} of them alone"
        for row in data.to_dict(orient="records")
    ]
    return "; ".join(described) + "."
