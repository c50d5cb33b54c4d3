"""``msa-eval evaluate``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from msa_eval.cli import messages, options

if TYPE_CHECKING:
    from msa_eval.engine.executors import Executor


class _Evaluate(click.Command):
    """Lets ``--save-adversarial`` stand alone, as a flag, or with ``=all``."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Read the arguments."""
        return super().parse_args(ctx, ["--save-all" if arg == "--save-adversarial=all" else arg for arg in args])


@click.command(cls=_Evaluate)
@options.target
@options.data()
@options.protocol
@options.out
@options.limit
@click.option("--batch-size", type=click.IntRange(min=1), help="Largest batch.")
@options.context
@click.option(
    "--victim",
    type=click.IntRange(min=0),
    help="Evaluate the batch of this sample only (its index in the data), and move its companions to break it.",
)
@options.assignments
@click.option(
    "--save-adversarial",
    is_flag=True,
    help="Keep a verified adversarial batch for every broken sample; --save-adversarial=all keeps every other sample's "
    "best point too, for 'msa-eval export'.",
)
@click.option("--save-all", is_flag=True, hidden=True)
@click.option(
    "--no-gallery", is_flag=True, help="Keep no pictures of broken samples (by default twelve, for the page)."
)
@click.option("--all-runs", is_flag=True, help="List every run in the table, also those that broke no new sample.")
@click.option("--strict", is_flag=True, help="Exit with status 3 unless the verdict is 'sound'.")
@options.found_surrogates
@options.seed
@options.device
@click.option(
    "--micro-batch",
    type=click.IntRange(min=1),
    help="Pass at most this many images through the trunk at once; decisions are still made on whole batches.",
)
@options.precision
@options.deterministic
@options.engine
@options.anew
@options.quiet
def evaluate(
    target: options.Chosen,
    data: options.Data,
    protocol: str,
    out: Path,
    limit: int | None,
    batch_size: int | None,
    context: tuple[str, ...],
    victim: int | None,
    assignments: tuple[tuple[str, Any], ...],
    save_adversarial: bool,
    save_all: bool,
    no_gallery: bool,
    no_found_surrogates: bool,
    engine: Executor | None,
    **common: Any,
) -> None:
    """Evaluate TARGET, and the classifier it was built on, under a protocol.

    TARGET is a checkpoint of msa-eval, your own code as module:callable or path/to/file.py:callable, or a third-party
    model as robustbench:NAME@dataset/norm, torchvision:NAME@WEIGHTS, timm:NAME.TAG (all after NAME is optional) or
    hf:NAME_OR_FOLDER.
    """
    chosen = options.overrides(assignments, context=context, limit=limit, batch_size=batch_size, victim=victim)
    run(
        target, data, protocol, out, overrides=chosen, save_adversarial="all" if save_all else save_adversarial,
        save_gallery=not no_gallery, found_surrogates=not no_found_surrogates, engine=engine or "local", **common,
    )  # fmt: skip


def run(
    target: options.Chosen,
    data: options.Data,
    protocol: str,
    out: Path,
    *,
    overrides: dict[str, Any],
    quiet: bool,
    device: str = "cpu",
    strict: bool = False,
    all_runs: bool = False,
    **common: Any,
) -> None:
    """Evaluate a target, show the table and write the results; what is common goes to `evaluate`."""
    from msa_eval.engine.evaluate import evaluate as evaluate_target
    from msa_eval.protocols.loading import load_protocol
    from msa_eval.report.text import render_sample, render_table

    loaded = load_protocol(protocol, overrides=overrides)
    samples = data.load(quiet=quiet)
    results = evaluate_target(
        target.load(samples, quiet=quiet), samples, protocol=loaded, out=out, device=device,
        progress=messages.bars(quiet), notify=messages.notes(quiet), **common,
    )  # fmt: skip
    click.echo(render_table(results, all_runs=all_runs))
    if loaded.apgd is not None and loaded.apgd.victim is not None:
        click.echo("\n" + render_sample(results, loaded.apgd.victim))
    click.echo(f"\nCSV tables and run.json in {out}, {results.run['seconds']:.0f} s on {device}")
    write_report(out)
    options.check_complete(results.summary, "target")
    if strict and results.run["verdict"] != "sound":
        sys.exit(options.NOT_SOUND)


def write_report(out: Path) -> None:
    """Write the page. The results are safe by now, so whatever goes wrong here is only reported."""
    from msa_eval.report.page import write_page

    try:
        click.echo(f"page in {write_page(out)}")
    except (Exception, KeyboardInterrupt) as error:
        described = " ".join(str(error).split()) or type(error).__name__
        click.echo(f"Warning: no page was written ({described}); try again with 'msa-eval report {out}'", err=True)
