"""``msa-eval demo``."""

from __future__ import annotations

from pathlib import Path

import click

from msa_eval.cli import options
from msa_eval.cli.evaluate import run


@click.command()
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("results/demo"),
    show_default=True,
    help="Folder for the results.",
)
@click.option(
    "--limit", type=click.IntRange(min=1), help="Evaluate at most this many of the 600 digits, which is faster."
)
@options.quiet
def demo(out: Path, limit: int | None, quiet: bool) -> None:
    """Evaluate the packaged digits defence on 600 real test digits, offline."""
    from msa_eval.references import reference_path

    run(
        options.Chosen(str(reference_path("digits")), {}),
        options.Data("digits"),
        "digits",
        out,
        overrides={} if limit is None else {"samples.limit": limit},
        quiet=quiet,
    )
