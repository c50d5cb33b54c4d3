"""Figures 1, 2 and 3 of the paper, from tables and formulas.

References:
    Sensitivity as a Double-Edged Sword (Wang, 2026), arXiv:2606.01746.
"""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from msa_eval.report.style import COLOURS, COLUMN, INK, PAGE, SEQUENTIAL, paper_style
from msa_eval.sensitivity.analysis import Analysis
from msa_eval.sensitivity.empirical import RESNET50_FC, RESNET50_L2, AngleModel, empirical_cdf, split_angles
from msa_eval.sensitivity.isotropic import isotropic_cdf

DIMENSIONS = (2, 3, 8, 32, 128, 512, 2048)
HEADS = {"fc": ("FC head", COLOURS["fc"]), "l2": ("ℓ2 head", COLOURS["defense"])}
ATTACKS = {"own": ("own gradient, cross-entropy", "-", "o"), "worst_case": ("every run and iterate", "--", "s")}


def figure_1(curves: pd.DataFrame, *, title: str = "") -> Figure:
    """Accuracy against ε of an FC head and an ℓ2 head: under the paper's attack, and under all of them (with 95 %).

    Args:
        curves: of `msa_eval.sensitivity.curves.accuracy_curves`.
        title: above the axes.
    """
    with paper_style():
        figure = Figure(figsize=(COLUMN, 2.4), layout="constrained")
        axes = figure.subplots()
        for head, (name, colour) in HEADS.items():
            for run, (attack, dash, marker) in ATTACKS.items():
                rows = curves[(curves["head"] == head) & (curves["run"] == run)].sort_values("eps")
                at, value = 255 * rows["eps"], 100 * rows["value"]
                axes.plot(at, value, color=colour, linestyle=dash, marker=marker, label=f"{name}, {attack}")
                if run == "worst_case":
                    axes.fill_between(at, 100 * rows["low"], 100 * rows["high"], color=colour, alpha=0.15, linewidth=0)
        axes.set(xlabel="255 ε (ℓ∞)", ylabel="accuracy / %", ylim=(0, 100), xlim=(0, None), title=title)
        axes.grid(axis="y")
        figure.legend(loc="outside lower center", ncols=1)
    return figure


def figure_2(dimensions: Sequence[int] = DIMENSIONS) -> Figure:
    """The CDF of 𝒳 for isotropic features: how often Eq. 8 holds, against |cos γ|.

    Args:
        dimensions: d of each curve, each at least 2.

    Raises:
        ValueError: when there are none.
    """
    if not dimensions:
        raise ValueError("expected at least one number of dimensions")
    x = np.linspace(0, 1, 401)
    with paper_style():
        figure = Figure(figsize=(COLUMN, 2.3), layout="constrained")
        axes = figure.subplots()
        shades = mpl.colormaps[SEQUENTIAL](np.linspace(0, 0.85, len(dimensions)))
        for d, shade in zip(dimensions, shades, strict=True):
            axes.plot(x, isotropic_cdf(x, d), color=shade, label=f"d = {d}")
        axes.set(xlabel="|cos γ|", ylabel="P(|cos θ$_c$| / |sin θ$_d$| ≤ |cos γ|)", xlim=(0, 1), ylim=(0, 1.02))
        axes.grid()
        figure.legend(loc="outside right center")
    return figure


def figure_3(
    fc: AngleModel | None = RESNET50_FC, l2: AngleModel | None = RESNET50_L2, *, measured: Analysis | None = None
) -> Figure:
    """The distributions of θ_c and θ_d, and the CDF of 𝒳 that follows from them (Eq. 13).

    Args:
        fc: the model of θ_c; the paper's ResNet-50 by default, ``None`` to leave it out.
        l2: the model of θ_d.
        measured: whose angles and ratios are drawn beside the models.
    """
    with paper_style():
        figure = Figure(figsize=(PAGE, 2.1), layout="constrained")
        left, middle, right = figure.subplots(1, 3)
        for axes, head, model, symbol in ((left, "fc", fc, "c"), (middle, "l2", l2, "d")):
            split = None
            if measured is not None:
                angles = measured.sensitivity.theta_c if head == "fc" else measured.sensitivity.theta_d
                split = split_angles(angles.numpy(), measured.labels.numpy())
            _angles(axes, model, split)
            axes.set(xlabel=f"θ$_{symbol}$ / °", ylabel="density / (1/°)", title=HEADS[head][0])
        if left.get_legend_handles_labels()[0]:
            left.legend(loc="upper left")
        x = np.linspace(0, 1, 401)
        if measured is not None:
            table = measured.cdf(x)
            right.plot(x, table["measured"], color=INK, label="measured")
        if fc is not None and l2 is not None:
            right.plot(x, empirical_cdf(x, fc, l2), color=COLOURS["defense"], linestyle="--", label="Eq. 13")
        right.set(xlabel="|cos γ|", ylabel="P(|cos θ$_c$| / |sin θ$_d$| ≤ |cos γ|)", xlim=(0, 1), ylim=(0, 1.02))
        right.grid()
        if right.get_legend_handles_labels()[0]:
            right.legend(loc="lower right")
    return figure


def _angles(axes: Axes, model: AngleModel | None, measured: tuple[np.ndarray, np.ndarray] | None) -> None:
    """Own-class and other-class angles, each with an area of 1: other classes would dwarf the one own class."""
    kinds = (("own class", COLOURS["defense"], "-"), ("other classes", COLOURS["fc"], "--"))
    spans = []
    for i, (name, colour, dash) in enumerate(kinds):
        part = None if model is None else (model.own, model.other)[i]
        if measured is not None and len(measured[i]):
            degrees = np.degrees(measured[i])
            low, high = degrees.min(), max(degrees.max(), degrees.min() + 0.1)
            bins, label = np.linspace(low, high, 41).tolist(), name if part is None else None
            axes.hist(degrees, bins=bins, density=True, color=colour, alpha=0.3, linewidth=0, label=label)
            spans += [low, high]
        if part is not None:
            mean, sd = (np.degrees(v) for v in part.moments())
            at = np.clip(np.linspace(mean - 5 * sd, mean + 5 * sd, 301), 0, 180)
            axes.plot(at, part.density(np.radians(at)) * np.pi / 180, color=colour, linestyle=dash, label=name)
            spans += [mean - 4 * sd, mean + 4 * sd]
    if spans:
        axes.set_xlim(max(0, min(spans)), min(180, max(spans)))
    axes.set_ylim(0, 1.2 * axes.get_ylim()[1])  # room for the legend
