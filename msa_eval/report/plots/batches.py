"""Accuracy batch by batch."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from msa_eval.report.plots.axes import draw_ranked, percent, percent_axis
from msa_eval.report.style import COLOURS, COLUMN, NAMES, paper_style

FEW_BATCHES = 200
"""Up to so many batches are drawn one by one; more as a curve."""


def draw_batches(data: pd.DataFrame) -> Figure:
    """Clean (hollow) and worst case (filled) batch by batch; of many batches, in order of it."""
    few = data["batch"].nunique() <= FEW_BATCHES
    with paper_style():
        figure = Figure(figsize=(COLUMN, 1.9), layout="constrained")
        axes = figure.subplots()
        for number, (target, rows) in enumerate(data.groupby("target", sort=False)):
            colour, mark = COLOURS[str(target)], "os"[number]
            if not few:
                draw_ranked(axes, rows, number, colour, NAMES[str(target)])
                continue
            axes.plot(rows["batch"], rows["clean"], mark, color=colour, markersize=3, markerfacecolor="none")
            axes.plot(rows["batch"], rows["worst_case"], mark, color=colour, markersize=3, label=NAMES[str(target)])
        percent_axis(axes, across=False)
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        axes.set_xlabel("batch (hollow: clean, filled: worst case)" if few else "batches, in order of their accuracy")
        axes.set_ylabel("accuracy in %" if few else "accuracy in % (dashed: clean)")
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.14), ncols=2, borderaxespad=0)
    return figure


def tell_batches(data: pd.DataFrame) -> str:
    """The batches in words."""
    described = []
    for target, rows in data.groupby("target", sort=False):
        low, high = rows["worst_case"].min(), rows["worst_case"].max()
        described.append(
            f"{NAMES[str(target)]}: worst case between {percent(low)} % and {percent(high)} % over {len(rows)} batches"
        )
    return "; ".join(described) + "."
