"""The keys of a protocol: what each may hold, and which dataclass of `msa_eval.protocols.schema` holds it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Annotated, Any, NamedTuple, get_args, get_origin, get_type_hints

from msa_eval.protocols import checks
from msa_eval.protocols.schema import Protocol

FILE = "file"
"""The part that says something of the file, and is not held by a protocol."""


class Key(NamedTuple):
    """A key of a protocol.

    Attributes:
        check: makes of a file's value the protocol's.
        kind: the dataclass that holds it.
        field: its name there.
        part: which attribute of the protocol that is; empty where the protocol itself holds it.
        default: where a file leaves it out; ``MISSING`` where it can't.
    """

    check: Callable[[Any], Any]
    kind: type
    field: str
    part: str = ""
    default: Any = MISSING


def _marks(kind: type) -> dict[str, tuple[Any, ...]]:
    """Of each annotated field: its type and what is said of it."""
    hints = get_type_hints(kind, include_extras=True)
    return {name: get_args(hint) for name, hint in hints.items() if get_origin(hint) is Annotated}


def _keys() -> Iterator[tuple[str, Key]]:
    yield "schema", Key(checks.whole(1), Protocol, "schema", FILE)
    yield "source", Key(checks.text, Protocol, "source", FILE, default=None)
    for name, (held, *marks) in _marks(Protocol).items():
        place = marks[0] if isinstance(marks[0], str) else name
        if callable(marks[-1]):
            yield place, Key(marks[-1], Protocol, name, default=_default(Protocol, name))
            continue
        kind = next(one for one in (held, *get_args(held)) if isinstance(one, type) and is_dataclass(one))
        inside = marks[1] if len(marks) > 1 else {one: check for one, (_, check) in _marks(kind).items()}
        for one, check in inside.items():
            yield f"{place}.{one}", Key(check, kind, one, name, _default(kind, one))


def _default(kind: Any, name: str) -> Any:
    return next(one.default for one in fields(kind) if one.name == name)


KEYS: Mapping[str, Key] = dict(_keys())
