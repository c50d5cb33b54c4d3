"""What a key of a protocol may hold: each check takes the file's value, and says in a ValueError what it expected."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, get_args

from msa_eval.attacks.ball import Norm
from msa_eval.attacks.external.libraries import library_of
from msa_eval.attacks.losses import MIN_CLASSES
from msa_eval.data.levels import MOST
from msa_eval.quantity import as_number

COMBINATIONS = ("separate", "mean", "cascade")
MOVES = ("batch", "companions", "standing")

NORMS: Mapping[str, str] = {name.lower(): name for name in get_args(Norm)} | {
    "inf": "Linf", "∞": "Linf", "l∞": "Linf", "linfinity": "Linf", "2": "L2", "2.0": "L2", "1": "L1", "1.0": "L1",
}  # fmt: skip
"""How people write the norms."""


def norm_named(value: object) -> str | None:
    """The name of a norm as somebody writes it; ``None`` for what is none.

    >>> norm_named("L-inf"), norm_named(2), norm_named("L0")
    ('Linf', 'L2', None)
    """
    return NORMS.get(str(value).lower().replace("ℓ", "l").translate(dict.fromkeys(map(ord, "-_ "))))


class RunSpec(NamedTuple):
    """A white-box run as a protocol names it: what is attacked, by which loss, and which images move."""

    surrogate: str
    loss: str
    moves: str = "batch"


class ExternalSpec(NamedTuple):
    """A third-party attack as a protocol names it (see `msa_eval.attacks.external`).

    Attributes:
        name: ``library:attack``.
        surrogates: what it is run on; ``target`` for an attack that needs no gradient. Surrogates that the target does
            not have are left out. Default: the target for gradient-free attacks, otherwise ``fc-oracle`` and
            ``soft-hybrid``.
        restarts: number of runs on each surrogate, each with its own seed.
        options: the attack's own options, under the names that its authors gave them.
    """

    name: str
    surrogates: tuple[str, ...] = ()
    restarts: int = 1
    options: Mapping[str, Any] = MappingProxyType({})


def text(value: Any) -> str:
    """A text that holds something."""
    if not isinstance(value, str) or not value:
        raise ValueError("a text")
    return value


def norm(value: Any) -> str:
    """A norm, under its own name."""
    named = norm_named(value)
    if named is None or isinstance(value, bool):
        raise ValueError(f"one of {', '.join(get_args(Norm))}")
    return named


def choice(*choices: str) -> Callable[[Any], str]:
    """One of a few texts."""

    def check(value: Any) -> str:
        if value not in choices:
            raise ValueError(f"one of {', '.join(choices)}")
        return str(value)

    return check


def texts(choices: Collection[str] = ()) -> Callable[[Any], tuple[str, ...]]:
    """A list of different texts, of a few if these are given."""

    def check(value: Any) -> tuple[str, ...]:
        good = isinstance(value, list) and value and all(isinstance(entry, str) and entry for entry in value)
        if not good or len(set(value)) < len(value) or (choices and not set(value) <= set(choices)):
            raise ValueError("a list of different " + (f"names among {', '.join(choices)}" if choices else "names"))
        return tuple(value)

    return check


def runs(value: Any) -> tuple[RunSpec, ...]:
    """Runs, each as ``surrogate:loss`` or ``surrogate:loss:moves``."""
    expected = "a list of 'surrogate:loss' or 'surrogate:loss:moves'"
    if not isinstance(value, list) or not value or not all(isinstance(entry, str) for entry in value):
        raise ValueError(expected)
    found = []
    for entry in value:
        parts = entry.split(":")
        if len(parts) not in (2, 3) or parts[1] not in MIN_CLASSES or (len(parts) == 3 and parts[2] not in MOVES):
            raise ValueError(
                f"{expected}, with a loss among {', '.join(MIN_CLASSES)} and moves among {', '.join(MOVES)}"
            )
        found.append(RunSpec(*parts))
    return tuple(found)


def peers(value: Any) -> tuple[ExternalSpec, ...]:
    """Third-party attacks, a table each."""
    expected = "tables [[attack.peers]], each with a name such as 'autoattack:apgd-t'"
    if not isinstance(value, list) or not value or not all(isinstance(entry, Mapping) for entry in value):
        raise ValueError(expected)
    found = []
    for entry in value:
        options = dict(entry)
        try:
            name = text(options.pop("name", None))
            library_of(name)
            surrogates = texts()(options.pop("surrogates")) if "surrogates" in options else ()
            restarts = whole(1)(options.pop("restarts", 1))
        except ValueError as error:
            raise ValueError(f"{expected} ({error})") from None
        if odd := [key for key, given in options.items() if not isinstance(given, bool | int | float | str)]:
            raise ValueError(f"{expected}, and a number, a text, true or false for {odd[0]}")
        found.append(ExternalSpec(name, surrogates, restarts, options))
    return tuple(found)


def odd(value: Any) -> int:
    """An odd whole number."""
    if (found := whole(1)(value)) % 2 == 0:
        raise ValueError("an odd number, so that there is a majority")
    return found


def levels(value: Any) -> int:
    """A number of even levels of pixels."""
    if (found := whole(2)(value)) > MOST:
        raise ValueError(f"a whole number from 2 to {MOST}, such as 256 for files of 8 bits")
    return found


def whole(low: int) -> Callable[[Any], int]:
    """A whole number from a lowest one."""

    def check(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value < 2**63:
            raise ValueError(f"a whole number, at least {low} and below 2^63")
        return value

    return check


def number(low: float, high: float) -> Callable[[Any], float]:
    """A number or a fraction such as ``8/255``, above one bound and up to another."""

    def check(value: Any) -> float:
        try:
            found = as_number(value)
        except (TypeError, ValueError):
            found = math.nan
        if isinstance(value, bool) or not low < found <= high:
            raise ValueError(f"a number (or a fraction such as '8/255') above {low:g} and up to {high:g}")
        return found

    return check
