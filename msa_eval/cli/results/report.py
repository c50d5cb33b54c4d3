"""``msa-eval report``."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("results", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="The file to write.  [default: report.html in RESULTS]")
def report(results: Path, out: Path | None) -> None:
    """Write the page of RESULTS from their evidence alone: one HTML file that needs no network and no model."""
    from msa_eval.report.page import write_page

    path = write_page(results, out)
    click.echo(f"page in {path}, {path.stat().st_size / 1000:.0f} kB")
