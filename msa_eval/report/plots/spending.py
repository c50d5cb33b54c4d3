"""The worst case against the passes spent."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from msa_eval.report.plots.axes import label, percent
from msa_eval.report.style import COLOURS, COLUMN, DASHES, NAMES, PAGE, PALETTE, paper_style


def draw_spending(data: pd.DataFrame) -> Figure:
    """Worst case against passes, a step curve a target."""
    curves = {str(target): rows for target, rows in data.groupby("target", sort=False)}
    with paper_style():
        figure = Figure(figsize=(COLUMN, 2.2), layout="constrained")
        axes = figure.subplots()
        _draw_curves(axes, curves, {target: COLOURS[target] for target in curves})
        axes.legend([NAMES[target] for target in curves])
    return figure


def draw_curves(curves: Mapping[str, pd.DataFrame], title: str) -> Figure:
    """Curves of worst case against passes of many contenders, named beside their ends, at page width.

    Args:
        curves: by name, each with ``passes`` and ``worst_case`` in order of passes.
        title: above the chart.
    """
    colours = {name: PALETTE[number % len(PALETTE)] for number, name in enumerate(curves)}
    with paper_style():
        figure = Figure(figsize=(PAGE, 4), layout="constrained")
        axes = figure.subplots()
        _draw_curves(axes, curves, colours, least=5)
        axes.set_title(title, loc="left")
        ends = sorted((float(curve["worst_case"].iloc[-1]), name) for name, curve in curves.items())
        place = -math.inf
        for value, name in ends:
            place = max(place + 0.04, value)
            axes.text(
                1.02, place, f"{label(name)} {percent(value)}", transform=axes.get_yaxis_transform(), va="center",
                color=colours[name], fontsize=6.5,
            )  # fmt: skip
    return figure


def _draw_curves(
    axes: Axes, curves: Mapping[str, pd.DataFrame], colours: Mapping[str, str], *, least: float = 1
) -> None:
    """Step curves on a logarithmic axis of forward passes, from the smallest number to the largest."""
    for number, (name, curve) in enumerate(curves.items()):
        dash = DASHES[number // len(PALETTE) % len(DASHES)] if len(curves) > 2 else DASHES[number]
        axes.step(
            curve["passes"].clip(lower=least), curve["worst_case"], where="post", color=colours[name], linestyle=dash
        )
    axes.set_xscale("log")
    axes.set_ylim(0, 1)
    axes.set_yticks([0, 0.2, 0.4, 0.6, 0.8, 1], ["0", "20", "40", "60", "80", "100"])
    axes.grid(axis="y")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("forward passes per sample (logarithmic)")
    axes.set_ylabel("worst case in %")


def tell_spending(data: pd.DataFrame) -> str:
    """The curves in words."""
    described = []
    for target, rows in data.groupby("target", sort=False):
        first, last = rows.iloc[0], rows.iloc[-1]
        half = rows[rows["worst_case"] <= (first["worst_case"] + last["worst_case"]) / 2]
        halfway = f", half of the fall by {half['passes'].iloc[0]:.0f} passes" if len(half) else ""
        described.append(
            f"{NAMES[str(target)]}: from {percent(first['worst_case'])} % to {percent(last['worst_case'])} % after "
            f"{last['passes']:.0f} forward passes per sample{halfway}"
        )
    return "; ".join(described) + "."
