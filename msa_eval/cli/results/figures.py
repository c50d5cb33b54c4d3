"""``msa-eval figures``."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("results", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="Folder for the files.  [default: figures in RESULTS]")
def figures(results: Path, out: Path | None) -> None:
    """Write the figures of RESULTS for a paper: PDF and SVG at column width, and the data of each as CSV."""
    from msa_eval.report.figures import write_figures

    written = write_figures(results, out)
    for path in written:
        click.echo(path)
