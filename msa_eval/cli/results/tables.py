"""``msa-eval tables``."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("results", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--format", "style", type=click.Choice(["latex", "markdown", "csv"]), default="markdown", show_default=True
)
def tables(results: tuple[Path, ...], style: str) -> None:
    """Print the numbers of RESULTS as tables for a paper: FC and distance-based rows, differences, best in bold."""
    from msa_eval.report.comparison import load_all
    from msa_eval.report.tables import render_tables

    click.echo(render_tables(load_all(results), style), nl=False)
