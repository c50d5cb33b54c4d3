"""Options that hold several numbers, such as ``1,8,64``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

import click

T = TypeVar("T")


class ListOf(click.ParamType[tuple[T, ...]], Generic[T]):
    """Values separated by commas.

    Args:
        one: reads a value, or raises a ValueError.
        name: of such an option's value in help texts.
        several: what they are, with an example.
    """

    def __init__(self, one: Callable[[str], T], name: str, several: str) -> None:
        self._one, self.name, self._several = one, name, several

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[T, ...]:
        """Read them."""
        if isinstance(value, tuple):
            return value
        try:
            return tuple(self._one(part.strip()) for part in str(value).split(","))
        except ValueError:
            self.fail(f"{value!r} is not a list of {self._several}", param, ctx)
