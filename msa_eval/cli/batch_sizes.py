"""``msa-eval batch-sizes``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from msa_eval.cli import messages, options
from msa_eval.cli.lists import ListOf


@click.command("batch-sizes")
@options.target
@options.data()
@options.protocol
@options.out
@click.option(
    "--sizes",
    type=ListOf(int, "sizes", "whole numbers such as 1,8,64"),
    default="1,8,64,256",
    show_default=True,
    help="Batch sizes to evaluate at.",
)
@options.limit
@options.context
@options.assignments
@options.seed
@options.device
@options.anew
@options.quiet
def batch_sizes(
    target: options.Chosen,
    data: options.Data,
    protocol: str,
    out: Path,
    sizes: tuple[int, ...],
    limit: int | None,
    context: tuple[str, ...],
    assignments: tuple[tuple[str, Any], ...],
    quiet: bool,
    **common: Any,
) -> None:
    """Show how the accuracy of TARGET depends on the batch size."""
    from msa_eval.protocols.loading import load_protocol
    from msa_eval.report.text import render_sizes
    from msa_eval.studies.batch_sizes import batch_size_report

    samples = data.load(quiet=quiet)
    report = batch_size_report(
        target.load(samples, quiet=quiet),
        samples,
        protocol=load_protocol(protocol, overrides=options.overrides(assignments, limit=limit, context=context)),
        sizes=sizes,
        out=out,
        progress=messages.bars(quiet),
        notify=messages.notes(quiet),
        **common,
    )
    click.echo(render_sizes(report.table))
    click.echo(f"\nbatch_sizes.csv and the results of every size in {out}")
    options.check_complete(report.table, "batch_size")
