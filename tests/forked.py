"""The command line as a process of its own that need not import torch first: it is forked from one that has."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

PRELOADED = ["torch", "pandas", "scipy.stats", "sklearn.datasets", "msa_eval.cli.evaluate", "msa_eval.engine.evaluate",
             "msa_eval.report.page", "forked"]  # fmt: skip


def _run(arguments: list[str], folder: str, log: str) -> None:
    from msa_eval.cli import main

    os.chdir(folder)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(os.open(log, os.O_WRONLY | os.O_APPEND), 2)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
    # A shell may start the tests with SIGINT ignored, which children inherit.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = ["msa-eval", *arguments]
    main()


class Forked:
    """A process that runs a command.

    Args:
        arguments: of ``msa-eval``.
        folder: it is run in.
    """

    def __init__(self, arguments: list[str], folder: Path) -> None:
        self._log = tempfile.NamedTemporaryFile("r", encoding="utf-8", newline="")  # noqa: SIM115
        context: Any = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self._process = context.Process(target=_run, args=(arguments, str(folder), self._log.name))
        self._process.start()

    @property
    def pid(self) -> int:
        """Of the process."""
        return int(self._process.pid)

    @property
    def running(self) -> bool:
        """Whether it has not ended."""
        return self._process.exitcode is None

    def send_signal(self, number: signal.Signals) -> None:
        """Send it a signal, unless it has ended."""
        if self.running:
            os.kill(self.pid, number)

    def finish(self, timeout: float = 300) -> tuple[int, str]:
        """Wait for its end; exit status, negative where a signal ended it, and what it said on stderr."""
        self._process.join(timeout)
        assert not self.running, f"it has not ended after {timeout:g} s"
        message = self._log.read()
        self._log.close()
        return self._process.exitcode, message
