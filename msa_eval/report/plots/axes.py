"""What figures share: shares in percent, names, axes."""

from __future__ import annotations

import math

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from msa_eval.report.style import COLUMN, GRID


def percent(value: float) -> str:
    """A share in percent.

    >>> percent(0.0519), percent(float("nan"))
    ('5.2', 'undefined')
    """
    return "undefined" if math.isnan(value) else f"{100 * value:.1f}"


def label(name: object, longest: int = 36) -> str:
    r"""A name as it stands in a figure: not too long, and no formula.

    >>> label("soft-hybrid:apgd-margin:0"), label("x" * 50, 9)
    ('soft-hybrid:apgd-margin:0', 'xxxx…xxxx')
    >>> print(label("$x$"))
    \$x\$
    """
    text = " ".join(str(name).split())
    if len(text) > longest:
        text = f"{text[: longest // 2]}\N{HORIZONTAL ELLIPSIS}{text[-((longest - 1) // 2) :]}"
    return text.replace("$", r"\$")


def draw_ranked(axes: Axes, rows: pd.DataFrame, number: int, colour: str, name: str) -> None:
    """The rows of many classes or batches as a curve, from the lowest up."""
    for metric, dash in (("clean", "--"), ("worst_case", "-")):
        values = rows[metric].sort_values().reset_index(drop=True)
        described = name if metric == "worst_case" else None
        axes.plot(values.index + 1, values, dash, color=colour, linewidth=1.2 - 0.3 * number, label=described)


def stacked_panels(rows: list[int], *, row: float, top: float = 0.6) -> tuple[Figure, list[Axes]]:
    """A figure with one panel above the other, each as high as its number of rows needs."""
    height = top + sum(row * count + 0.25 for count in rows)
    figure = Figure(figsize=(COLUMN, height), layout="constrained")
    panels = figure.subplots(len(rows), 1, squeeze=False, height_ratios=[count + 0.5 for count in rows])
    return figure, list(panels[:, 0])


def percent_axis(axes: Axes, *, across: bool = True) -> None:
    """An axis of shares, labelled in percent; rows run from the top."""
    ticks = [0, 0.25, 0.5, 0.75, 1.0]
    if across:
        axes.set_xlim(0, 1.08)
        axes.set_xticks(ticks, [f"{100 * tick:.0f}" for tick in ticks])
        axes.set_ylim(max(axes.get_ylim()), min(axes.get_ylim()))
    else:
        axes.set_ylim(-0.03, 1.03)
        axes.set_yticks(ticks, [f"{100 * tick:.0f}" for tick in ticks])
    axes.grid(axis="x" if across else "y", color=GRID)


def or_zero(value: float) -> float:
    """The value, or zero where there is none."""
    return 0.0 if math.isnan(value) else value
