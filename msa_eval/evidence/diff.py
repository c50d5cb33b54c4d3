"""What tells two evaluations apart, in words."""

from __future__ import annotations

import contextlib
import tomllib
from collections.abc import Iterator, Mapping
from typing import Any

WORDS = {
    "seed": "the seed",
    "protocol.name": "the protocol",
    "protocol.version": "the protocol's version",
    "data.name": "the data",
    "data.sha256": "what the data hold",
    "data.n": "the number of samples",
    "batches.sha256": "the batch plan",
    "batches.count": "the number of batches",
    "msa_eval": "the release of msa-eval",
    "options.save_adversarial": "save_adversarial",
    "options.gallery": "whether a gallery is kept",
    "options.micro_batch": "micro_batch",
    "options.precision": "precision",
    "options.deterministic": "deterministic",
}
"""What the fields of a ``run.json`` that make up its key are called; those of a protocol go by their own keys."""

OF_TARGET = {
    "type": "the kind of {}",
    "sha256": "the weights of {}",
    "runs": "the runs on {}",
    "clean_sha256": "the answers of {} to its clean batches (other code, machine or number of threads)",
    "surrogates_sha256": "the surrogates of {}",
}
DECISIVE = ("schema_version", "seed", "protocol", "data", "targets", "batches", "msa_eval", "options", "where")
"""What an evaluation depends on; all else in a ``run.json`` tells of it."""

HIDDEN = ("protocol.sha256", "protocol.text", "protocol.modified", "protocol.overrides")
"""What follows from other fields."""

SHOWN = 3
"""So many differences are named, and the others counted."""


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """In what two evaluations differ, by what their ``run.json`` say.

    Args:
        before: one of them; fields may be missing.
        now: the other.

    >>> differences({"seed": 0, "data": {"name": "a"}}, {"seed": 1, "data": {"name": "b"}})
    "the seed (0, now 1) and the data ('a', now 'b')"
    """
    found = list(_different(before, now))
    shown, more = found[:SHOWN], len(found) - SHOWN
    if more > 0:
        shown.append(f"{more} more")
    return " and ".join([", ".join(shown[:-1]), shown[-1]] if shown[1:] else shown)


def _different(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    old, new = _flat(before), _flat(now)
    for name in dict.fromkeys([*new, *old]):
        if old.get(name) != new.get(name) and not name.startswith(HIDDEN):
            yield _words(name) + _values(old.get(name), new.get(name))


def _flat(about: Mapping[str, Any]) -> dict[str, Any]:
    """The fields by dotted names; of the protocol, the keys of its text too."""
    fields = dict(_walk({name: about[name] for name in DECISIVE if name in about}, ""))
    with contextlib.suppress(tomllib.TOMLDecodeError):  # of a damaged text the other fields still tell
        fields |= dict(_walk(tomllib.loads(str(fields.get("protocol.text", ""))), "protocol."))
    return fields


def _walk(value: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, one in value.items():
        if isinstance(one, Mapping):
            yield from _walk(one, f"{prefix}{name}.")
        else:
            yield prefix + name, one


def _words(name: str) -> str:
    kind, _, rest = name.partition(".")
    if kind == "targets":
        target, _, field = rest.rpartition(".")
        return OF_TARGET.get(field, f"{field} of {{}}").format(target)
    return WORDS.get(name, rest if kind in ("protocol", "where") else name)


def _values(old: Any, new: Any) -> str:
    """Both values, where they are short."""
    pair = f" ({'none' if old is None else repr(old)}, now {'none' if new is None else repr(new)})"
    return pair if len(pair) <= 80 else ""
