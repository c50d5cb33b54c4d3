"""How a long loop shows how far it has come, without the library printing anything itself."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

Progress = Callable[[Iterable[Any], str], Iterable[Any]]
"""``(iterable, description) -> iterable``."""


def silent(iterable: Iterable[Any], description: str) -> Iterable[Any]:
    """Show nothing."""
    del description
    return iterable


@contextmanager
def ticking(progress: Progress, total: int, description: str) -> Iterator[Callable[[], None]]:
    """Show how far nested loops have come: the function given is called once for each of ``total`` parts.

    What shows it is closed in the end, also when an error or an interrupt ends the loops.
    """
    bar = iter(progress(range(total), description))
    try:
        yield lambda: next(bar, None)
        next(bar, None)
    finally:
        close = getattr(bar, "close", None)
        if close is not None:
            close()


Notify = Callable[[str], None]
"""Told of what a user should know: where an evaluation goes on, what was found damaged."""


def warn(text: str) -> None:
    """Tell it as a warning."""
    warnings.warn(text, stacklevel=3)
