"""The command line: one file a command."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import click

from msa_eval._version import __version__
from msa_eval.cli.ablate import ablate
from msa_eval.cli.audit import audit
from msa_eval.cli.batch_sizes import batch_sizes
from msa_eval.cli.compare import compare
from msa_eval.cli.crosscheck import crosscheck
from msa_eval.cli.demo import demo
from msa_eval.cli.doctor import doctor
from msa_eval.cli.entry import entry
from msa_eval.cli.evaluate import evaluate
from msa_eval.cli.figures import figures
from msa_eval.cli.finetune import finetune
from msa_eval.cli.paper_table import paper_table
from msa_eval.cli.protocols import protocols
from msa_eval.cli.report import report
from msa_eval.cli.sensitivity import sensitivity
from msa_eval.cli.tables import tables
from msa_eval.cli.verify import verify
from msa_eval.protocols import AttackError


class Terminated(KeyboardInterrupt):
    """The process was asked to end, by SIGTERM."""


@contextmanager
def _terminable() -> Iterator[None]:
    """Let SIGTERM stop a command as Ctrl-C does.

    Some libraries, such as Ray, make a bare KeyboardInterrupt of what a handler raises while they wait.
    """
    asked = False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        asked = True
        raise Terminated

    if threading.current_thread() is not threading.main_thread():  # which alone is given signals
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except KeyboardInterrupt as error:
        raise Terminated(*error.args) if asked else error from None
    finally:
        signal.signal(signal.SIGTERM, before)


class _Group(click.Group):
    """Prints a user's mistake in one line.

    The exit status is 2 for bad input, 1 for a failure, 130 for Ctrl-C and 143 for SIGTERM.
    """

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command."""
        if ctx.params.get("debug"):
            return super().invoke(ctx)
        try:
            with _terminable():
                return super().invoke(ctx)
        except ValueError as error:
            self._stop(str(error), 2)
        except (AttackError, OSError, MemoryError) as error:
            self._stop(str(error) or type(error).__name__, 1)
        except KeyboardInterrupt as stop:
            told = str(stop) or "interrupted; nothing was written, and no earlier results were changed"
            self._stop(told, 143 if isinstance(stop, Terminated) else 130)

    @staticmethod
    def _stop(message: str, status: int) -> None:
        click.echo("Error: " + " ".join(message.split()), err=True)
        sys.exit(status)


@click.group(cls=_Group)
@click.version_option(__version__, prog_name="msa-eval")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def main(debug: bool) -> None:
    """Find out how robust a dynamic, batch-dependent classifier really is."""
    del debug


main.add_command(ablate)
main.add_command(audit)
main.add_command(batch_sizes)
main.add_command(compare)
main.add_command(crosscheck)
main.add_command(demo)
main.add_command(doctor)
main.add_command(entry)
main.add_command(evaluate)
main.add_command(figures)
main.add_command(finetune)
main.add_command(paper_table)
main.add_command(protocols)
main.add_command(report)
main.add_command(sensitivity)
main.add_command(tables)
main.add_command(verify)
