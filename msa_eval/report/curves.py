"""Curves of worst case against the radius: the figure, the table, and several targets side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from msa_eval.report.plots.axes import label, percent, percent_axis
from msa_eval.report.style import COLUMN, DASHES, GRID, NAMES, PALETTE, paper_style, save
from msa_eval.studies.curve import CURVE, SMALLEST
from msa_eval.untrusted import check_inside

COLUMNS = ("target", "context", "eps", "value", "low", "high", "n")
FIGURE = "curve"


def load_curve(folder: str | Path) -> pd.DataFrame:
    """The table of a curve in a folder.

    Raises:
        ValueError: when there is none.
    """
    path = Path(folder) / CURVE
    if not path.is_file():
        raise ValueError(f"{folder} holds no curve: there is no {CURVE}; make one with 'msa-eval curve'")
    try:
        table = pd.read_csv(check_inside(path, path.parent), dtype={"target": str, "context": str})
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{path} is not a readable table") from error
    numbers = table.reindex(columns=list(COLUMNS)).select_dtypes("number").columns
    if missing := [name for name in COLUMNS if name not in table or (name not in numbers and name in COLUMNS[2:])]:
        raise ValueError(f"{path} has no column of numbers {missing[0]}")
    return table


def draw_curves(tables: Mapping[str, pd.DataFrame]) -> Figure:
    """Worst case against the radius, a panel a context and a line a target; bands are Wilson 95 % intervals.

    Args:
        tables: of curves by name; one alone goes by the names of its targets.
    """
    contexts = list(dict.fromkeys(context for table in tables.values() for context in table["context"]))
    with paper_style():
        figure = Figure(figsize=(COLUMN, 0.5 + 1.7 * len(contexts)), layout="constrained")
        panels = figure.subplots(len(contexts), 1, squeeze=False, sharex=True)[:, 0]
        for axes, context in zip(panels, contexts, strict=True):
            number = 0
            for name, table in tables.items():
                rows = table[table["context"] == context]
                for target, held in rows.groupby("target", sort=True):
                    ours = NAMES.get(str(target), str(target))
                    told = label(ours if len(tables) == 1 else f"{name}, {ours}")
                    colour, dash = PALETTE[number % len(PALETTE)], DASHES[number // len(PALETTE) % len(DASHES)]
                    part = held.sort_values("eps")
                    axes.fill_between(part["eps"], part["low"], part["high"], color=colour, alpha=0.15, linewidth=0)
                    axes.plot(part["eps"], part["value"], f"o{dash}", color=colour, markersize=2.5, label=told)
                    number += 1
            percent_axis(axes, across=False)
            axes.grid(axis="x", color=GRID)
            axes.set_title(context, loc="left", fontweight="bold")
            axes.set_ylabel("worst case in %")
        panels[-1].set_xlabel(r"radius $\epsilon$")
        _name_radii(panels[-1], sorted({eps for table in tables.values() for eps in table["eps"]}))
        handles, names = panels[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside upper center", ncols=1 if len(tables) > 1 else len(names))
    return figure


def _name_radii(axes: object, radii: Sequence[float]) -> None:
    """Ticks at the radii, as 255ths where they are, if there is room for all."""
    if len(radii) > 9:
        return
    in_levels = [255 * eps for eps in radii]
    whole = all(abs(one - round(one, 1)) < 1e-6 for one in in_levels)
    names = [f"{one:.3g}/255" if one else "0" for one in in_levels] if whole else [f"{eps:.3g}" for eps in radii]
    axes.set_xticks(list(radii), names)  # type: ignore[attr-defined]


def write_curve(folder: str | Path) -> list[Path]:
    """Draw the curve of a folder there, as PDF and SVG.

    Raises:
        ValueError: when there is none.
        OSError: when a file can't be written.
    """
    return list(save(draw_curves({"": load_curve(folder)}), Path(folder) / FIGURE))


def compare_curves(folders: Sequence[str | Path]) -> tuple[dict[str, pd.DataFrame], list[str]]:
    """The curves of several folders by name, and what their reader should know.

    Raises:
        ValueError: when one has none, or they are of other samples.
    """
    names = [str(folder) if len({Path(f).name for f in folders}) < len(folders) else Path(folder).name
             for folder in folders]  # fmt: skip
    tables = {name: load_curve(folder) for name, folder in zip(names, folders, strict=True)}
    samples = [pd.read_csv(Path(f) / SMALLEST)[["index", "label"]].drop_duplicates().reset_index(drop=True)
               for f in folders]  # fmt: skip
    notes = [
        f"{name} is of other samples than {names[0]}: differences are not paired"
        for name, other in zip(names, samples, strict=True)
        if not other.equals(samples[0])
    ]
    return tables, notes


def render_curves(tables: Mapping[str, pd.DataFrame]) -> str:
    """Curves as a table of text: one row per radius and context, one column per target, in percent."""
    columns: dict[str, dict[tuple[str, float], str]] = {}
    for name, table in tables.items():
        for row in table.sort_values(["target", "context", "eps"]).to_dict(orient="records"):
            ours = NAMES.get(str(row["target"]), str(row["target"]))
            cells = columns.setdefault(ours if len(tables) == 1 else f"{name}, {ours}", {})
            shown = f"{percent(row['value'])} [{percent(row['low'])}, {percent(row['high'])}]"
            cells[str(row["context"]), float(row["eps"])] = shown
    places = sorted({place for cells in columns.values() for place in cells})
    lines = [_line(["context", "eps"], list(columns), list(columns))]
    lines += [_line([c, f"{e:.6g}"], [cells.get((c, e), "-") for cells in columns.values()], list(columns))
              for c, e in places]  # fmt: skip
    return "\n".join(["worst case in %, with 95 % intervals", "", *lines])


def _line(place: Sequence[str], cells: Sequence[str], names: Sequence[str]) -> str:
    widths = [max(len(name), 18) for name in names]
    shown = "  ".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
    return f"{place[0]:<10} {place[1]:>10}  {shown}"
