"""``msa-eval evaluate``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from msa_eval.cli import options


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("--data", required=True, help="digits, cifar10, cifar100, an .npz file with x and y, or a folder.")
@click.option("--protocol", required=True, help="A shipped protocol (see 'msa-eval protocols') or a .toml file.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder for the results.")
@click.option("--limit", type=click.IntRange(min=1), help="Evaluate at most so many samples, uniformly drawn.")
@click.option("--batch-size", type=click.IntRange(min=1), help="Largest batch.")
@click.option(
    "--set", "assignments", type=options.ASSIGNMENT, multiple=True, metavar="KEY=VALUE", help="Set any protocol key."
)
@options.seed
@options.device
@options.data_root
@options.force
@options.quiet
def evaluate(
    checkpoint: Path,
    data: str,
    protocol: str,
    out: Path,
    limit: int | None,
    batch_size: int | None,
    assignments: tuple[tuple[str, Any], ...],
    **common: Any,
) -> None:
    """Evaluate CHECKPOINT, and the classifier it was built on, under a protocol."""
    overrides = dict(assignments)
    if limit is not None:
        overrides["samples.limit"] = limit
    if batch_size is not None:
        overrides["batches.size"] = batch_size
    run(checkpoint, data, protocol, out, overrides=overrides, **common)


def run(
    checkpoint: Path,
    data: str,
    protocol: str,
    out: Path,
    *,
    overrides: dict[str, Any],
    seed: int,
    device: str,
    data_root: str,
    force: bool,
    quiet: bool,
) -> None:
    """Evaluate a checkpoint, show the table and write the results."""
    from msa_eval.checkpoint import load_checkpoint
    from msa_eval.data import load_samples
    from msa_eval.protocols import evaluate as evaluate_target
    from msa_eval.protocols import load_protocol
    from msa_eval.report import render_table

    loaded = load_protocol(protocol, overrides=overrides)
    model = load_checkpoint(checkpoint).model
    results = evaluate_target(
        model,
        load_samples(data, root=data_root),
        protocol=loaded,
        seed=seed,
        device=device,
        out=out,
        force=force,
        progress=options.bars(quiet),
    )
    click.echo(render_table(results))
    click.echo(f"\nfive CSV tables and run.json in {out}, {results.run['seconds']:.0f} s")
