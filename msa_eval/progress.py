"""How a long loop shows how far it has come, without the library printing anything itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

Progress = Callable[[Iterable[Any], str], Iterable[Any]]
"""``(iterable, description) -> iterable``."""


def silent(iterable: Iterable[Any], description: str) -> Iterable[Any]:
    """Show nothing."""
    del description
    return iterable
