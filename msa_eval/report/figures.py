"""All figures of an evaluation as files for a paper."""

from __future__ import annotations

import warnings
from pathlib import Path

from msa_eval.evidence import gallery
from msa_eval.evidence.folder import FIGURES
from msa_eval.evidence.results import Results
from msa_eval.report.plots.catalog import charts
from msa_eval.report.plots.gallery import draw_gallery
from msa_eval.report.style import save


def write_figures(folder: str | Path, out: str | Path | None = None) -> list[Path]:
    """Write each figure of the results in a folder as PDF and SVG at column width, and its data as CSV.

    Args:
        folder: of the results.
        out: where to; ``figures`` in the folder by default.

    Returns:
        the files.

    Raises:
        ValueError: when there are no complete results.
        OSError: when a file can't be written.
    """
    folder = Path(folder)
    out = folder / FIGURES if out is None else Path(out)
    results = Results.load(folder)
    if out.is_file():
        raise ValueError(f"{out} is a file; choose a folder for the figures")
    if (out / "run.json").exists():
        raise ValueError(f"{out} holds results; choose another folder for the figures")
    written: list[Path] = []
    for chart in charts(results):
        written += save(chart.figure(), out / chart.name)
        chart.data.to_csv(out / f"{chart.name}.csv", index=False, lineterminator="\n")
        written.append(out / f"{chart.name}.csv")
    try:
        shown = gallery.of_results(folder, results.run.get("files", {}))
    except ValueError as error:
        shown = []
        warnings.warn(f"there is no figure of broken samples: {error}", stacklevel=2)
    if shown:
        labels = results.samples.drop_duplicates("index").set_index("index")["label"]
        written += save(draw_gallery(shown, [labels.get(one.index, "") for one in shown]), out / "gallery")
    return written
