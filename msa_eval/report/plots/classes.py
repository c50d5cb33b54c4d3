"""Accuracy class by class."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from msa_eval.report.plots.axes import draw_ranked, label, percent, percent_axis
from msa_eval.report.style import COLOURS, COLUMN, NAMES, paper_style

FEW_CLASSES = 20
"""Up to so many classes have a row each; more are drawn as a curve."""


def draw_classes(data: pd.DataFrame) -> Figure:
    """Clean (hollow) and worst case (filled, with its interval) of each class; of many classes, in order of it."""
    targets = list(dict.fromkeys(data["target"]))
    labels = sorted(data["label"].unique())
    few = len(labels) <= FEW_CLASSES
    with paper_style():
        height = 0.7 + 0.2 * len(labels) if few else 2.2
        figure = Figure(figsize=(COLUMN, height), layout="constrained")
        axes = figure.subplots()
        for number, target in enumerate(targets):
            rows = data[data["target"] == target]
            (_draw_dumbbells if few else draw_ranked)(axes, rows, number, COLOURS[target], NAMES[target])
        percent_axis(axes, across=few)
        if few:
            axes.set_yticks(range(len(labels)), [label(name, 16) for name in labels])
            axes.set_ylim(len(labels) - 0.4, -0.6)
            axes.set_ylabel("class")
            axes.set_xlabel("accuracy in % (hollow: clean, filled: worst case)")
        else:
            axes.set_xlabel("classes, in order of their accuracy")
            axes.set_ylabel("accuracy in % (dashed: clean)")
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.0 + 0.25 / height), ncols=2, borderaxespad=0)
    return figure


def _draw_dumbbells(axes: Axes, rows: pd.DataFrame, number: int, colour: str, name: str) -> None:
    labels = sorted(rows["label"])
    y = [labels.index(one) + (number - 0.5) * 0.36 for one in rows["label"]]
    axes.hlines(y, rows["worst_case_low"], rows["worst_case_high"], color=colour, linewidth=0.7)
    axes.plot(rows["worst_case"], y, "os"[number], color=colour, markersize=3.5, label=name)
    axes.plot(rows["clean"], y, "os"[number], color=colour, markersize=3.5, markerfacecolor="none", markeredgewidth=0.7)


def tell_classes(data: pd.DataFrame) -> str:
    """The classes in words: all of a few, the ends of many."""
    described = []
    for target, rows in data.groupby("target", sort=False):
        ranked = rows.sort_values("worst_case", kind="stable")
        if len(rows) > FEW_CLASSES:
            ranked = pd.concat([ranked.head(3), ranked.tail(3)])
        each = [
            f"class {row['label']} clean {percent(row['clean'])} %, worst case {percent(row['worst_case'])} %"
            for row in ranked.to_dict(orient="records")
        ]
        described.append(f"{NAMES[str(target)]}, from the weakest: {'; '.join(each)}")
    return ". ".join(described) + "."
