"""Differences between evaluations of the same samples."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from msa_eval.report.plots.axes import label
from msa_eval.report.style import COLUMN, INK, PALETTE, paper_style


def draw_differences(data: pd.DataFrame) -> Figure:
    """Paired differences of accuracy with their 95 % intervals, one row per number and evaluation.

    Args:
        data: ``metric``, ``name``, ``difference``, ``difference_low`` and ``difference_high``.
    """
    names, metrics = list(dict.fromkeys(data["name"])), list(dict.fromkeys(data["metric"]))
    with paper_style():
        height = 0.75 + 0.16 * len(metrics) * (len(names) + 0.5) + 0.12 * len(names)
        figure = Figure(figsize=(COLUMN, height), layout="constrained")
        axes = figure.subplots()
        for number, name in enumerate(names):
            rows = data[data["name"] == name]
            y = [metrics.index(metric) + (number + 0.5) / len(names) * 0.7 - 0.35 for metric in rows["metric"]]
            colour = PALETTE[(number + 2) % len(PALETTE)]
            axes.hlines(y, 100 * rows["difference_low"], 100 * rows["difference_high"], color=colour, linewidth=0.9)
            axes.plot(
                100 * rows["difference"], y, "os^vD"[number % 5], color=colour, markersize=4, label=label(name, 40)
            )
        axes.axvline(0, color=INK, linewidth=0.6)
        axes.set_yticks(range(len(metrics)), [metric.replace("_", " ") for metric in metrics])
        axes.set_ylim(len(metrics) - 0.5, -0.5)
        axes.grid(axis="x")
        axes.set_xlabel("difference in points")
        figure.legend(loc="outside upper center", ncols=1)
    return figure
