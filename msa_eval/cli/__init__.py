"""The command line: one file a command."""

from __future__ import annotations

import difflib
import importlib
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import click

from msa_eval._version import __version__
from msa_eval.cli import messages
from msa_eval.errors import AttackError

COMMANDS = (
    "ablate",
    "audit",
    "batch-sizes",
    "compare",
    "crosscheck",
    "curve",
    "demo",
    "doctor",
    "entry",
    "evaluate",
    "export",
    "figures",
    "finetune",
    "paper-table",
    "protocols",
    "report",
    "sensitivity",
    "tables",
    "verify",
)
"""Each is the function of its name, with underscores, in the file of that name of this folder, or of one in it."""

OF_RESULTS = ("compare", "entry", "export", "figures", "report", "tables")
"""The commands whose file is in the folder ``results``."""


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
    """Imports a command when it is asked for, and prints a user's mistake in one line.

    The exit status is 2 for bad input, 1 for a failure, 130 for Ctrl-C and 143 for SIGTERM.
    """

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All commands, by name."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of a name; ``None`` where there is none."""
        if cmd_name not in COMMANDS:
            return None
        name = cmd_name.replace("-", "_")
        folder = "msa_eval.cli.results" if cmd_name in OF_RESULTS else "msa_eval.cli"
        command: click.Command = getattr(importlib.import_module(f"{folder}.{name}"), name)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The command of the first word; for one that does not exist, the nearest names."""
        close = [] if args[0] in COMMANDS else difflib.get_close_matches(args[0], COMMANDS, n=1)
        if close:
            ctx.fail(f"No such command {args[0]!r}; did you mean {close[0]!r}?")
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command."""
        if ctx.params.get("debug"):
            return super().invoke(ctx)
        try:
            with _terminable(), messages.warnings_as_notes():
                return super().invoke(ctx)
        except ValueError as error:
            self._stop(str(error), 2)
        except (AttackError, OSError, MemoryError) as error:
            self._stop(str(error) or type(error).__name__, 1)
        except KeyboardInterrupt as stop:
            message = str(stop) or "interrupted; nothing was written, and no earlier results were changed"
            self._stop(message, 143 if isinstance(stop, Terminated) else 130)

    @staticmethod
    def _stop(message: str, status: int) -> None:
        click.echo("Error: " + messages.as_options(" ".join(message.split())), err=True)
        sys.exit(status)


FIRST = """\
Start with one of these; 'msa-eval --help' lists all commands.

  msa-eval demo                                                # a packaged defence on real digits
  msa-eval evaluate models.py:make --data test.npz --out mine  # the model that your make() returns
  msa-eval doctor                                              # what is wrong with the installation
"""


@click.group(cls=_Group, invoke_without_command=True, no_args_is_help=False)
@click.version_option(__version__, prog_name="msa-eval")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.pass_context
def main(ctx: click.Context, debug: bool) -> None:
    """Find out how robust a dynamic, batch-dependent classifier really is."""
    del debug
    if ctx.invoked_subcommand is None:
        click.echo(FIRST, nl=False)
