"""``msa-eval export``."""

from __future__ import annotations

from pathlib import Path

import click

from msa_eval.cli.messages import as_options


@click.command()
@click.argument("results", type=click.Path(path_type=Path))
@click.option(
    "--format", "style", type=click.Choice(["npz", "png"]), default="npz", show_default=True,
    help="One NumPy archive, or one picture per point.",
)  # fmt: skip
@click.option("--target", default="defense", show_default=True, help="Target whose points are written: defense or fc.")
@click.option("--context", default="joint", show_default=True, help="Context whose points are written.")
@click.option(
    "--out", type=click.Path(path_type=Path),
    help="Folder for the files, in a subfolder per target and context.  [default: export in RESULTS]",
)  # fmt: skip
def export(results: Path, style: str, target: str, context: str, out: Path | None) -> None:
    """Write every sample's best point in RESULTS, broken or not, with labels and a manifest.

    RESULTS are those of 'msa-eval evaluate --save-adversarial=all'. In joint a point lives in its adversarial batch,
    which is written too.
    """
    from msa_eval.report.export import export as export_points

    place, notes = export_points(results, format=style, target=target, context=context, out=out)
    for note in notes:
        click.echo(f"note: {as_options(note)}", err=True)
    click.echo(f"points and manifest.csv in {place}")
