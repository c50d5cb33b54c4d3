"""What a command says while it runs: bars, notes, and the library's advice in the words of the command line."""

from __future__ import annotations

import re
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import click

from msa_eval.progress import Progress, silent

_ARGUMENT = re.compile(
    r"\b(whole|force|random_weights|save_adversarial|weights|head|trunk|device|precision|engine|address|cpus|gpus|format"
    r"|mean|std|resize|crop|classes)"
    r"=(True\b|[^\s,;:)]*)"
)
_OVERRIDE = re.compile(r'overrides=\{"([\w.]+)": (.*?)\}')


def as_options(message: str) -> str:
    """What the library advises in Python, as options of the command line.

    >>> print(as_options("evaluate it whole (whole=True), or use device=cpu"))
    evaluate it whole (--whole), or use --device cpu
    >>> print(as_options("mean=, std= change it; give resize=N, crop=N"))
    --mean, --std change it; give --resize N, --crop N
    """

    def option(found: re.Match[str]) -> str:
        name = {"cpus": "cpus-per-worker", "gpus": "gpus-per-worker"}.get(found[1], found[1].replace("_", "-"))
        if name == "save-adversarial" and found[2] != "True":
            return f"--{name}={found[2]}".replace('"', "")
        return f"--{name}" if found[2] in ("True", "") else f"--{name} {found[2]}"

    return _ARGUMENT.sub(option, _OVERRIDE.sub(r"--set '\1=\2'", message)).replace("the same call", "the same command")


def bars(quiet: bool) -> Progress:
    """Progress bars on stderr, or none."""
    from tqdm import tqdm

    def bar(iterable: Iterable[Any], description: str) -> Iterable[Any]:
        if sys.stderr.isatty():
            return _moving(iterable, description)
        return tqdm(iterable, description, dynamic_ncols=True)

    return silent if quiet else bar


REFRESH = 1.0
"""Seconds between two refreshes of a bar, whose clock moves where one step takes minutes."""


def _moving(iterable: Iterable[Any], description: str) -> Iterator[Any]:
    """A bar on a terminal whose clock goes on while a step takes its time."""
    from tqdm import tqdm

    done = threading.Event()
    with tqdm(iterable, description, dynamic_ncols=True) as shown:

        def refresh() -> None:
            while not done.wait(REFRESH):
                shown.refresh()

        thread = threading.Thread(target=refresh, daemon=True)
        thread.start()
        try:
            yield from shown
        finally:
            done.set()
            thread.join()


@contextmanager
def warnings_as_notes() -> Iterator[None]:
    """Print warnings meant for users as notes, in the words of the command line and without the line of the source."""
    plain = warnings.formatwarning

    def formatted(
        message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
    ) -> str:
        if category is UserWarning:
            return f"note: {as_options(str(message))}\n"
        return plain(message, category, filename, lineno, line)

    warnings.formatwarning = formatted
    try:
        yield
    finally:
        warnings.formatwarning = plain


def notes(quiet: bool) -> Callable[[str], None]:
    """Notes on stderr, or none."""

    def note(text: str) -> None:
        click.echo(f"note: {as_options(text)}", err=True)

    return (lambda _: None) if quiet else note
