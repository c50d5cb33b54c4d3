"""``msa-eval batch-sizes``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from msa_eval.cli import messages, options


class _Sizes(click.ParamType[tuple[int, ...]]):
    name = "sizes"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        """Read ``1,8,64``."""
        if isinstance(value, tuple):
            return value
        try:
            return tuple(int(part) for part in str(value).split(","))
        except ValueError:
            self.fail(f"{value!r} is not a list of whole numbers such as 1,8,64", param, ctx)


@click.command("batch-sizes")
@options.target
@options.data()
@options.protocol
@options.out
@click.option("--sizes", type=_Sizes(), default="1,8,64,256", show_default=True, help="Batch sizes to evaluate at.")
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
