"""``msa-eval curve``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from msa_eval.cli import messages, options
from msa_eval.cli.lists import ListOf
from msa_eval.quantity import as_number


@click.command()
@options.target
@options.data()
@options.protocol
@options.out
@click.option(
    "--eps",
    type=ListOf(as_number, "radii", "radii such as 0,1/255,2/255"),
    required=True,
    help="Radii to evaluate at, such as 0,1/255,2/255.",
)
@options.limit
@options.context
@click.option("--norm", help="Of the perturbations: Linf, L2 or L1.")
@click.option(
    "--set", "assignments", type=options.ASSIGNMENT, multiple=True, metavar="KEY=VALUE", help="Set any protocol key."
)
@options.seed
@options.device
@options.engine
@options.anew
@options.quiet
def curve(
    target: options.Chosen,
    data: options.Data,
    protocol: str,
    out: Path,
    eps: tuple[float, ...],
    limit: int | None,
    context: tuple[str, ...],
    norm: str | None,
    assignments: tuple[tuple[str, Any], ...],
    quiet: bool,
    engine: Any,
    **common: Any,
) -> None:
    """Draw the worst case of TARGET against the radius of the perturbations.

    The whole protocol is run at each radius, from the smallest up; what falls at one counts at the larger ones, and one
    more run goes on from the points before. The same command goes on where one was stopped. Put curves of several
    targets side by side with 'msa-eval compare'.
    """
    from msa_eval.protocols.loading import load_protocol
    from msa_eval.report.curves import load_curve, render_curves, write_curve
    from msa_eval.studies.curve import CURVE, SMALLEST
    from msa_eval.studies.curve import curve as measure

    samples = data.load(quiet=quiet)
    set_keys = options.overrides(assignments, limit=limit, context=context) | ({"threat.norm": norm} if norm else {})
    found = measure(
        target.load(samples, quiet=quiet),
        samples,
        eps=eps,
        protocol=load_protocol(protocol, overrides=set_keys),
        out=out,
        engine=engine or "local",
        progress=messages.bars(quiet),
        notify=messages.notes(quiet),
        **common,
    )
    click.echo(render_curves({"": load_curve(out)}))
    click.echo(f"\n{CURVE}, {SMALLEST} and the results at every radius in {out}")
    for path in write_curve(out):
        click.echo(path)
    options.check_complete(found.table, "eps")
