"""Accuracy of the target and of the surrogate, by surrogate and loss."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import matplotlib as mpl
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from msa_eval.report.plots.axes import label, or_zero, percent, stacked_panels
from msa_eval.report.style import COLOURS, NAMES, SEQUENTIAL, paper_style


def draw_transfer(data: pd.DataFrame) -> Figure:
    """The surrogate × loss matrix: the target's accuracy (large) over the surrogate's (small)."""
    parts = [(str(target), rows) for target, rows in data.groupby("target", sort=False)]
    losses = list(dict.fromkeys(_loss(row) for row in data.to_dict(orient="records")))
    with paper_style():
        rows_of = [rows["surrogate"].nunique() for _, rows in parts]
        figure, panels = stacked_panels(rows_of, row=0.27, top=0.9)
        for place, (axes, (target, rows)) in enumerate(zip(panels, parts, strict=True)):
            surrogates = list(dict.fromkeys(rows["surrogate"]))
            for row in rows.to_dict(orient="records"):
                _transfer_cell(axes, losses.index(_loss(row)), surrogates.index(row["surrogate"]), row)
            axes.set_xlim(-0.5, len(losses) - 0.5)
            axes.set_ylim(len(surrogates) - 0.5, -0.5)
            axes.set_yticks(range(len(surrogates)), [label(name, 24) for name in surrogates])
            axes.set_xticks(
                range(len(losses)),
                [label(name, 24) for name in losses],
                rotation=30,
                ha="right",
                rotation_mode="anchor",
            )
            axes.tick_params(length=0, labelbottom=place == len(parts) - 1)
            axes.spines[:].set_visible(False)
            axes.set_title(NAMES[target], loc="left", color=COLOURS[target], fontweight="bold")
    return figure


def _transfer_cell(axes: Axes, x: int, y: int, row: Mapping[Hashable, Any]) -> None:
    value = row["target_accuracy"]
    shade = mpl.colormaps[SEQUENTIAL](or_zero(value))
    ink = "#000000" if 0.3 * shade[0] + 0.59 * shade[1] + 0.11 * shade[2] > 0.5 else "#ffffff"
    axes.add_patch(mpl.patches.Rectangle((x - 0.48, y - 0.46), 0.96, 0.92, color=shade, linewidth=0))
    axes.text(x, y - 0.13, percent(value), ha="center", va="center", color=ink, fontsize=6.5, fontweight="bold")
    axes.text(x, y + 0.26, percent(row["surrogate_accuracy"]), ha="center", va="center", color=ink, fontsize=5)


def _loss(row: Mapping[Hashable, Any]) -> str:
    return f"{row['attack']}, {row['loss']}"


def tell_transfer(data: pd.DataFrame) -> str:
    """The matrix in words."""
    described = [
        f"{NAMES[row['target']]}, {row['surrogate']} with {_loss(row)}: target {percent(row['target_accuracy'])} %, "
        f"surrogate {percent(row['surrogate_accuracy'])} %"
        for row in data.to_dict(orient="records")
    ]
    return "; ".join(described) + "."
