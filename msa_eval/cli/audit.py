"""``msa-eval audit``."""

from __future__ import annotations

import sys
import textwrap
from typing import TYPE_CHECKING, Any

import click

from msa_eval.cli import messages, options

if TYPE_CHECKING:
    from msa_eval.auditing.audit import AuditReport
    from msa_eval.auditing.sign import Sign

WIDTH = 100


@click.command()
@options.target
@options.data()
@options.protocol
@click.option(
    "--limit", type=click.IntRange(min=1), default=128, show_default=True, help="Audit at most this many samples."
)
@options.assignments
@click.option("--strict", is_flag=True, help=f"Exit with status {options.NOT_SOUND} unless the verdict is sound.")
@options.found_surrogates
@options.seed
@options.device
@options.quiet
def audit(
    target: options.Chosen,
    data: options.Data,
    protocol: str,
    limit: int,
    assignments: tuple[tuple[str, Any], ...],
    strict: bool,
    no_found_surrogates: bool,
    seed: int,
    device: str,
    quiet: bool,
) -> None:
    """Look for signs that a robustness figure of TARGET should not be believed.

    A short look at the first batches of a protocol, no evaluation: randomness, state, batch dependence, vanishing
    gradients, and attacks that do better or worse than they should.
    """
    from msa_eval.auditing.audit import audit as audit_target

    samples = data.load(quiet=quiet)
    loaded = target.load(samples, quiet=quiet)
    report = audit_target(
        loaded,
        samples,
        protocol=protocol,
        overrides=dict(assignments),
        found_surrogates=not no_found_surrogates,
        seed=seed,
        device=device,
        limit=limit,
        progress=messages.bars(quiet),
    )
    click.echo(render(report, name=loaded.word, protocol=protocol))
    if strict and report.verdict.verdict != "sound":
        sys.exit(options.NOT_SOUND)


def render(report: AuditReport, *, name: str, protocol: str) -> str:
    """The table of signs and the verdict, in lines of at most 100 characters.

    Args:
        report: what an audit found.
        name: of the target.
        protocol: whose figures are in question.
    """
    wide = max(len(sign.name) for sign in report.signs)
    verdict = report.verdict
    title = f"audit of {name} under {protocol}: {report.n} samples, {report.seconds:.0f} s"
    head = f"{'sign':{wide}}  {'fired':10}  {'value':>7}  what it means"
    last = [f"verdict: {verdict.verdict}"]
    for reason in verdict.reasons:
        last += _wrapped(reason, "- ", "  ")
    return "\n".join([title, "", head, *(line for sign in report.signs for line in _row(sign, wide)), "", *last])


def _row(sign: Sign, wide: int) -> list[str]:
    start = f"{sign.name:{wide}}  {sign.severity if sign.fired else '-':10}  {sign.value:>7.2g}  "
    return _wrapped(sign.reason, start, " " * len(start))


def _wrapped(text: str, first: str, others: str) -> list[str]:
    """Lines of at most 100 characters, a number and its percent sign on one."""
    joined = text.replace(" %", "\u00a0%")
    lines = textwrap.wrap(joined, WIDTH, initial_indent=first, subsequent_indent=others)
    return [line.replace("\u00a0", " ") for line in lines]
