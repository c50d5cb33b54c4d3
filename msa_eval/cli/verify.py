"""``msa-eval verify``."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from msa_eval.cli import messages, options

_MARKS = {True: "ok", False: "FAILED", None: "--"}


@click.command()
@click.argument("results", type=click.Path(path_type=Path))
@options.target
@options.data(help="The data that was evaluated, as it was given to 'msa-eval evaluate'.")
@options.device
@options.quiet
def verify(results: Path, target: options.Chosen, data: options.Data, device: str, quiet: bool) -> None:
    """Check RESULTS against TARGET and the data, without attacking anything again.

    Replays the adversarial batches kept by 'msa-eval evaluate --save-adversarial': each must lie in the ball and break
    on the real target what it is said to break. Exit status 0 if all was checked and holds, else 1.
    """
    from msa_eval.verification.verify import LEAST
    from msa_eval.verification.verify import verify as verify_results

    samples = data.load(quiet=quiet)
    found = verify_results(
        results,
        target.load(samples, quiet=quiet),
        samples,
        device=device,
        progress=messages.bars(quiet),
    )
    for check in found.checks:
        click.echo(f"{_MARKS[check.passed]:7} {check.name:9} {messages.as_options(check.detail)}")
    verdict = "verified" if found.passed else "not verified" if found.intact else "FAILED"
    click.echo(
        f"{verdict}: {found.replayed} of {found.claims} broken samples replayed in {found.seconds:.1f} s; {LEAST}"
    )
    if not found.passed:
        sys.exit(1)
