"""``msa-eval doctor``."""

from __future__ import annotations

import shlex
import subprocess
import sys
import textwrap
from collections.abc import Iterable

import click

WIDTH = 26
"""Of the column of names."""


@click.command()
@click.option("--fix", is_flag=True, help="Run the commands that mend the faults, then check again.")
def doctor(fix: bool) -> None:
    """Find faults of this installation and print the command that repairs each.

    Holds the files of robustbench and other peers to their own records, versions to what each package asks for, and
    looks at devices, caches and the packaged reference checkpoints. Exit status 1 if a fault remains.
    """
    from msa_eval.doctor import Finding, examine

    faults: list[Finding] = []
    for finding in examine():
        _show(finding.name, finding.state, finding.said)
        if finding.state == "fault":
            faults.append(finding)
    if not faults:
        click.echo("\nno fault")
        return
    click.echo(f"\n{len(faults)} {'fault' if len(faults) == 1 else 'faults'}; to mend:")
    hand = dict.fromkeys(mend for finding in faults if finding.by_hand for mend in finding.mends)
    mends = dict.fromkeys(mend for finding in faults if not finding.by_hand for mend in finding.mends)
    for command in (*mends, *hand):
        click.echo(f"  {shlex.join(command)}" + ("    (in your own shell)" if command in hand else ""))
    if not fix or not mends:
        sys.exit(1)
    _run(mends)
    click.echo("\nonce more, in a new process")
    sys.exit(subprocess.run([sys.executable, "-P", "-m", "msa_eval", "doctor"], check=False).returncode)


def _show(name: str, state: str, said: str) -> None:
    margin = " " * (WIDTH + 7)
    start = f"{state.upper() if state == 'fault' else state:<5}  {name:<{WIDTH}}"
    lines = textwrap.wrap(said, 96, break_long_words=False, break_on_hyphens=False)
    click.echo("\n".join([start + lines[0], *(margin + line for line in lines[1:])]))


def _run(commands: Iterable[tuple[str, ...]]) -> None:
    for command in commands:
        click.echo(f"\n$ {shlex.join(command)}")
        try:
            status = subprocess.run(command, check=False).returncode
        except OSError as error:
            click.echo(f"Warning: it can't be run ({error})", err=True)
            continue
        if status:
            click.echo(f"Warning: it ended with status {status}", err=True)
