"""Which keys a protocol has, by the annotations of `msa_eval.protocols.schema`, and which contradict each other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Annotated, Any, NamedTuple, get_args, get_origin, get_type_hints

from msa_eval.protocols import checks
from msa_eval.protocols.schema import Protocol

SCHEMA = 1
"""The version of the format of protocols."""

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

BESIDE = ("attack.recombination", "attack.composition")
"""What goes along with attacks, and is none by itself."""

ATTACKS = tuple(dict.fromkeys(
    ".".join(key.split(".")[:2]) for key in KEYS if key.startswith("attack.") and not key.startswith(BESIDE)
))  # fmt: skip
"""The sections that name an attack."""


def contradictions(values: Mapping[str, Any]) -> list[str]:
    """Which keys contradict each other, a sentence each."""
    found = []
    if values.get("schema", SCHEMA) != SCHEMA:
        found.append(f"schema: this release reads schema {SCHEMA}, but got {values['schema']!r}")
    if "samples.fraction" in values and "samples.per_class" in values:
        found.append("samples.fraction and samples.per_class exclude each other")
    if not any(key.startswith(ATTACKS) for key in values):
        found.append(f"no attack: give {', '.join(ATTACKS[:-1])} or {ATTACKS[-1]}")
    found += _too_coarse(values)
    moves = [*_listed(values, "moves"), *(str(run).rpartition(":")[2] for run in _listed(values, "runs"))]
    if "attack.apgd.victim" in values and "companions" not in moves:
        found.append(
            "attack.apgd.victim names the sample whose companions are moved, but no run moves companions; "
            "use a protocol that has such runs (msa), or give attack.apgd.moves"
        )
    for key in ("attack.apgd.passes", "attack.apgd.overtime"):
        if key in values and values.get("attack.apgd.combine") != "cascade":
            found.append(f"{key} ends a cascade; give attack.apgd.combine = 'cascade', or leave it out")
    if "standing" in moves and values.get("attack.apgd.combine") != "cascade":
        found.append(
            "only a cascade knows which samples are unbroken; give attack.apgd.combine = 'cascade', or move the batch"
        )
    if values.get("attack.apgd.combine") == "mean" and set(moves) - {"batch", ""}:
        found.append("surrogates combined by mean move the batch; leave attack.apgd.moves out")
    if "attack.recombination.steps" in values and "attack.recombination.runs" not in values:
        found.append("attack.recombination.steps is of its own runs; give attack.recombination.runs, or leave it out")
    if "attack.recombination.runs" in values and not any(key.startswith("attack.apgd.") for key in values):
        found.append("attack.recombination.runs replace those of attack.apgd in joint; give attack.apgd too")
    if "attack.apgd.runs" in values:
        other = [k for k in ("surrogates", "losses", "restarts", "targets", "moves") if f"attack.apgd.{k}" in values]
        found += [f"attack.apgd.runs names every run, so attack.apgd.{key} has no meaning beside it" for key in other]
        if values.get("attack.apgd.combine") == "mean":
            found.append("attack.apgd.runs can't be combined by mean; give surrogates and losses")
    return found


def _too_coarse(values: Mapping[str, Any]) -> list[str]:
    """Whether no image can be changed by a level within the ball, in which the least change has the norm of one."""
    try:
        eps, levels = checks.number(0, 1000)(values["threat.eps"]), checks.levels(values["threat.levels"])
    except (KeyError, ValueError):  # reported by its own check
        return []
    if eps * (levels - 1) >= 1 - 1e-6:
        return []
    return [
        f"threat.eps is {eps:.4g}, less than one step of threat.levels = {levels} (1/{levels - 1}), so that no image "
        f"could be changed; take a larger threat.eps or more levels"
    ]


def _listed(values: Mapping[str, Any], key: str) -> list[Any]:
    given = values.get(f"attack.apgd.{key}", [])
    return given if isinstance(given, list) else []
