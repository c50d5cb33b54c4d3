"""``msa-eval paper-table``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from msa_eval.cli import messages, options


@click.command("paper-table")
@click.argument("dataset", type=click.Choice(["cifar10", "cifar100", "imagenet"]))
@options.data(required=False, help="The test set, as for 'msa-eval evaluate'; the data set itself by default.")
@options.out
@click.option(
    "--models", default="models", show_default=True, type=click.Path(path_type=Path),
    help="Folder of robustbench's weights, and of HPM heads as DATASET/Linf/NAME-hpm.safetensors.",
)  # fmt: skip
@click.option("--random-weights", is_flag=True, help="Use randomly initialised models, to try the pipeline.")
@options.limit
@options.assignments
@options.seed
@options.device
@options.anew
@options.quiet
def paper_table(
    dataset: str,
    data: options.Data,
    out: Path,
    limit: int | None,
    assignments: tuple[tuple[str, Any], ...],
    quiet: bool,
    **common: Any,
) -> None:
    """Run the paper's protocol over the paper's models, and print its numbers next to the measured ones.

    Rows whose weights are not to be had say so. What fails otherwise is named, and the exit status is then 4.
    """
    from msa_eval.report.text import render_paper_table
    from msa_eval.studies.paper_tables import paper_table as measure

    samples = data.like(data.source or dataset, split="test", quiet=quiet)
    table = measure(
        dataset, samples, overrides=options.overrides(assignments, limit=limit), out=out,
        progress=messages.bars(quiet), notify=messages.notes(quiet), **common,
    )  # fmt: skip
    click.echo(render_paper_table(table, dataset=dataset))
    click.echo(f"\npaper_table.csv and the results of every model in {out}")
    options.check_complete(table, "model")
