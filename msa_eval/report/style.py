"""The one style of all figures: column width, colours told apart by colour-blind readers too, files that repeat."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
from cycler import cycler
from matplotlib.figure import Figure

COLUMN, PAGE = 3.3, 6.9
"""Widths in inches: of a column and of a page with two."""

PALETTE = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe & Ito's (Color Universal Design, 2008), without their yellow, which is pale on paper."""

DASHES = ("-", "--", ":", "-.")
COLOURS = {"defense": PALETTE[0], "fc": PALETTE[1]}
"""Of the two targets, in every figure."""

SEQUENTIAL = "viridis"
"""The colour map of shares; its lightness rises evenly."""

INK, GRID = "#1a1a1a", "#d9d9d9"
NAMES = {"defense": "defence", "fc": "FC head"}
"""Of the two targets, as they are written for readers."""

_RC: dict[str, Any] = {
    "figure.dpi": 100,
    "figure.constrained_layout.h_pad": 0.03,
    "figure.constrained_layout.w_pad": 0.03,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # comes with matplotlib, so that it is everywhere the same
    "font.size": 7,
    "axes.titlesize": 7.5,
    "axes.labelsize": 7,
    "xtick.labelsize": 6.5,
    "ytick.labelsize": 6.5,
    "legend.fontsize": 6.5,
    "legend.frameon": False,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "grid.color": GRID,
    "grid.linewidth": 0.5,
    "lines.linewidth": 1.2,
    "lines.markersize": 4,
    "image.cmap": SEQUENTIAL,
    "pdf.fonttype": 42,  # TrueType, as publishers ask for
    "ps.fonttype": 42,
    "svg.fonttype": "none",  # text stays text: it can be searched, and edited
    "svg.hashsalt": "msa-eval",
}


@contextmanager
def paper_style() -> Iterator[None]:
    """Settings of matplotlib under which figures are made and saved; those from before come back afterwards."""
    with mpl.rc_context():
        mpl.rcdefaults()
        settings: Any = _RC | {"axes.prop_cycle": cycler(color=PALETTE)}
        mpl.rcParams.update(settings)
        yield


def save(figure: Figure, stem: str | Path) -> tuple[Path, Path]:
    """Write a figure as ``stem.pdf`` and ``stem.svg``, fonts embedded in the PDF; the same figure, the same bytes.

    Args:
        figure: made under `paper_style`.
        stem: the files' path without a suffix; its folder is made if need be.

    Returns:
        the two paths.
    """
    stem = Path(stem)
    stem.parent.mkdir(parents=True, exist_ok=True)
    pdf, svg = (stem.with_name(stem.name + suffix) for suffix in (".pdf", ".svg"))
    with paper_style():
        figure.savefig(pdf, metadata={"CreationDate": None, "Creator": None, "Producer": None})
    svg.write_text(to_svg(figure), encoding="utf-8")
    return pdf, svg


def to_svg(figure: Figure, *, transparent: bool = False) -> str:
    """A figure as the text of an SVG file, without a date or a version."""
    buffer = io.StringIO()
    with paper_style(), warnings.catch_warnings():
        # Text stays text, so a letter that this font lacks comes from the reader's.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None}, transparent=transparent)
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines()) + "\n"
