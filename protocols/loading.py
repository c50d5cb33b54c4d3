"""Protocols from files, and from what overrides them."""

from __future__ import annotations

import dataclasses
import difflib
import tomllib
from collections.abc import Mapping
from dataclasses import MISSING
from importlib import resources
from pathlib import Path
from typing import Any

from msa_eval.protocols.checks import norm_named
from msa_eval.protocols.schema import Protocol
from msa_eval.protocols.validation import FILE, KEYS, contradictions
from msa_eval.untrusted import printable

CLOSE = 0.75
"""How like a key that there is an unknown one must be, of 1, for it to be what was meant."""


def shipped() -> dict[str, Path]:
    """The protocols that come with the toolkit: name to file.

    >>> sorted(shipped())
    ['black-box', 'digits', 'msa', 'paper-cifar10', 'paper-cifar100', 'paper-imagenet', 'quick']
    """
    folder = Path(str(resources.files("msa_eval.protocols")))
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


MISTAKES = 20
"""So many mistakes in a protocol are listed; the others are counted."""


def load_protocol(source: str | Path, *, overrides: Mapping[str, Any] | None = None) -> Protocol:
    """Read a protocol.

    Args:
        source: the name of a shipped one, or a TOML file.
        overrides: values to put in place, by dotted key such as ``attack.square.queries``.

    Raises:
        ValueError: when it can't be found or read, or with every mistake in it.

    >>> load_protocol("quick", overrides={"threat.eps": "2/255"}).modified
    True
    """
    path = shipped().get(str(source), Path(source))
    if not path.is_file():
        close = difflib.get_close_matches(str(source), shipped(), n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ValueError(
            f"there is no protocol {str(source)!r}; {hint}available: {', '.join(shipped())}, or a .toml file"
        )
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise ValueError(f"{path} is not a readable TOML file: {printable(error)}") from error
    return make_protocol(content, overrides=overrides, source=str(source))


def _like(key: str) -> list[str]:
    """The keys that an unknown one may stand for: by its last part, or by all of it.

    >>> _like("epsilon"), _like("restart"), _like("threat.targeted")
    (['threat.eps'], ['attack.apgd.restarts', 'attack.square.restarts', 'attack.spsa.restarts'], [])
    """
    if "." in key:
        return difflib.get_close_matches(key, KEYS, n=1, cutoff=CLOSE)
    if found := [name for name in KEYS if key.startswith(name.rpartition(".")[2])]:
        return found
    lasts = difflib.get_close_matches(key, {name.rpartition(".")[2] for name in KEYS}, n=1, cutoff=CLOSE)
    return [name for name in KEYS if lasts and name.endswith(f".{lasts[0]}")]


def make_protocol(
    content: Mapping[str, Any], *, overrides: Mapping[str, Any] | None = None, source: str = "protocol"
) -> Protocol:
    """Check the content of a protocol file, nested or with dotted keys.

    Raises:
        ValueError: with every mistake in it.
    """
    given = {key: _plain(key, value) for key, value in _flatten(content).items()}
    wanted = {key: _plain(key, value) for key, value in _flatten(overrides or {}).items()}
    changed = {key: value for key, value in wanted.items() if given.get(key) != value}
    values = dict(sorted((given | changed).items()))
    parsed: dict[str, Any] = {}
    mistakes = [f"{key} is missing" for key in KEYS if KEYS[key].default is MISSING and key not in values]
    for key, value in values.items():
        if value == {}:
            mistakes.append(f"the table [{printable(key)}] is empty; give at least one of its keys, or leave it out")
            continue
        if key not in KEYS:
            close = _like(key)
            hint = f" (did you mean {' or '.join(close[:3])}?)" if close else ""
            mistakes.append(f"unknown key {printable(key)}{hint}")
            continue
        try:
            parsed[key] = KEYS[key].check(value)
        except ValueError as error:
            mistakes.append(f"{key}: expected {error}, but got {printable(repr(value))}")
    mistakes += contradictions(values)
    if mistakes:
        more = f"; and {len(mistakes) - MISTAKES} more" if len(mistakes) > MISTAKES else ""
        raise ValueError(f"{source}: " + "; ".join(mistakes[:MISTAKES]) + more)
    parts: dict[str, dict[str, Any]] = {"": {}}
    for key, value in parsed.items():
        parts.setdefault(KEYS[key].part, {})[KEYS[key].field] = value
    parts.pop(FILE, None)
    kinds = {key.part: key.kind for key in KEYS.values()}
    sections = {part: kinds[part](**given) for part, given in parts.items() if part}
    return Protocol(**parts[""], **sections, overrides=changed, values=values)


def varied(protocol: Protocol, overrides: Mapping[str, Any]) -> Protocol:
    """A protocol with values in place of its own, by dotted key, besides those that were changed before.

    Raises:
        ValueError: when they don't fit.

    >>> varied(load_protocol("quick", overrides={"samples.limit": 8}), {"batches.size": 4}).overrides
    {'samples.limit': 8, 'batches.size': 4}
    """
    made = make_protocol(protocol.values, overrides=overrides, source=protocol.name)
    return dataclasses.replace(made, overrides={**protocol.overrides, **made.overrides})


def _flatten(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in content.items():
        if isinstance(value, Mapping) and value:
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _plain(key: str, value: Any) -> Any:
    """A value as TOML has it: NumPy's and torch's scalars as numbers, tuples as lists, norms by their own names."""
    if key == "threat.norm":
        return norm_named(value) or value
    if isinstance(value, tuple):
        return list(value)
    return value.tolist() if hasattr(value, "tolist") else value
