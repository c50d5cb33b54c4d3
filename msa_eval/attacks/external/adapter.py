"""An attack of other libraries, and how its options are read from a protocol."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from torch import Tensor, nn

Search = Callable[[nn.Module, Tensor, Tensor, int, int], Tensor]
"""``(model, x, y, seed, turn) -> points``, all of a batch at once; ``turn`` counts its restarts from 0."""


@dataclass(frozen=True)
class LibraryAttack:
    """An attack of other libraries.

    Attributes:
        name: ``library:attack``.
        search: runs it once.
        gradient_free: whether it needs no gradient, so that it can be run on the hard target itself.
        starts: whether another seed, or turn, gives another result.
        options: all that it takes, as they are set.
    """

    name: str
    search: Search
    gradient_free: bool = False
    starts: bool = True
    options: Mapping[str, Any] = field(default_factory=dict)


def chosen(name: str, known: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The options of an external attack: those given, checked, and what it takes otherwise.

    Args:
        name: of the external attack.
        known: its options and their defaults; ``None`` stands for one that takes anything.
        given: by the protocol; a number may be a fraction such as ``"8/255"``.

    Raises:
        ValueError: when there is no such option, or its value is of another kind than the default.

    >>> chosen("autoattack:apgd-ce", {"steps": 100}, {"steps": 40})
    {'steps': 40}
    >>> chosen("autoattack:apgd-ce", {"steps": 100}, {"step": 40})
    Traceback (most recent call last):
    ValueError: autoattack:apgd-ce has no option 'step' (did you mean 'steps'?); it takes: steps
    """
    for option in given:
        if option not in known:
            close = difflib.get_close_matches(option, known, n=1)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            raise ValueError(f"{name} has no option {option!r}{hint}; it takes: {', '.join(known) or 'none'}")
    return {**known, **{option: _read(name, option, value, known[option]) for option, value in given.items()}}


def _read(name: str, option: str, value: Any, default: Any) -> Any:
    if default is None or type(value) is type(default):
        return value
    if isinstance(default, float) and not isinstance(value, bool):
        try:
            return float(Fraction(value)) if isinstance(value, str) else float(value)
        except (TypeError, ValueError, ZeroDivisionError):
            pass
    kind = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}.get(type(default))
    raise ValueError(f"{name}: expected {option} to be {kind or f'like {default!r}'}, but got {value!r}")


def options_of(kind: Callable[..., Any], *, without: Iterable[str]) -> dict[str, Any]:
    """The keyword parameters of a class and their defaults; ``inspect.Parameter.empty`` for one that it needs."""
    found = inspect.signature(kind).parameters.values()
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {one.name: one.default for one in found if one.kind in named and one.name not in set(without)}


def pick(library: str, name: str, known: Iterable[str]) -> str:
    """Check that a library has an attack.

    Raises:
        ValueError: when it has none of that name.
    """
    names = sorted(known)
    if name in names:
        return name
    folded = {other.lower(): other for other in names}
    close = difflib.get_close_matches(name.lower(), folded, n=1)
    hint = f" did you mean {folded[close[0]]!r}?" if close else ""
    raise ValueError(f"{library} has no attack {name!r};{hint} it has: {', '.join(names)}")
