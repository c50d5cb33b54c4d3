"""What each key of a protocol may hold, and which keys contradict each other."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, get_args

from msa_eval.attacks.ball import Norm
from msa_eval.attacks.external.libraries import library_of
from msa_eval.attacks.losses import MIN_CLASSES
from msa_eval.data.levels import MOST
from msa_eval.defense.contexts import CONTEXTS
from msa_eval.protocols.schema import NORMS, ExternalSpec, RunSpec
from msa_eval.quantity import as_number

SCHEMA = 1


COMBINATIONS = ("separate", "mean", "cascade")


MOVES = ("batch", "companions", "standing")


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError("a text")
    return value


def _norm(value: Any) -> str:
    if NORMS.get(str(value).lower()) is None or isinstance(value, bool):
        raise ValueError(f"one of {', '.join(get_args(Norm))}")
    return NORMS[str(value).lower()]


def _choice(*choices: str) -> Callable[[Any], str]:
    def check(value: Any) -> str:
        if value not in choices:
            raise ValueError(f"one of {', '.join(choices)}")
        return str(value)

    return check


def _texts(choices: tuple[str, ...] | None = None) -> Callable[[Any], tuple[str, ...]]:
    def check(value: Any) -> tuple[str, ...]:
        good = isinstance(value, list) and value and all(isinstance(entry, str) and entry for entry in value)
        if not good or len(set(value)) < len(value) or (choices and not set(value) <= set(choices)):
            raise ValueError("a list of different " + (f"names among {', '.join(choices)}" if choices else "names"))
        return tuple(value)

    return check


def _runs(value: Any) -> tuple[RunSpec, ...]:
    expected = "a list of 'surrogate:loss' or 'surrogate:loss:moves'"
    if not isinstance(value, list) or not value or not all(isinstance(entry, str) for entry in value):
        raise ValueError(expected)
    runs = []
    for entry in value:
        parts = entry.split(":")
        if len(parts) not in (2, 3) or parts[1] not in MIN_CLASSES or (len(parts) == 3 and parts[2] not in MOVES):
            raise ValueError(
                f"{expected}, with a loss among {', '.join(MIN_CLASSES)} and moves among {', '.join(MOVES)}"
            )
        runs.append(RunSpec(*parts))
    return tuple(runs)


def _peers(value: Any) -> tuple[ExternalSpec, ...]:
    expected = "tables [[attack.peers]], each with a name such as 'autoattack:apgd-t'"
    if not isinstance(value, list) or not value or not all(isinstance(entry, Mapping) for entry in value):
        raise ValueError(expected)
    peers = []
    for entry in value:
        options = dict(entry)
        try:
            name = _text(options.pop("name", None))
            library_of(name)
            surrogates = _texts()(options.pop("surrogates")) if "surrogates" in options else ()
            restarts = _whole(1)(options.pop("restarts", 1))
        except ValueError as error:
            raise ValueError(f"{expected} ({error})") from None
        if odd := [key for key, given in options.items() if not isinstance(given, bool | int | float | str)]:
            raise ValueError(f"{expected}, and a number, a text, true or false for {odd[0]}")
        peers.append(ExternalSpec(name, surrogates, restarts, options))
    return tuple(peers)


def _odd(value: Any) -> int:
    number = _whole(1)(value)
    if number % 2 == 0:
        raise ValueError("an odd number, so that there is a majority")
    return number


def _levels(value: Any) -> int:
    if (number := _whole(2)(value)) > MOST:
        raise ValueError(f"a whole number from 2 to {MOST}, such as 256 for files of 8 bits")
    return number


def _whole(low: int) -> Callable[[Any], int]:
    def check(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value < 2**63:
            raise ValueError(f"a whole number, at least {low} and below 2^63")
        return value

    return check


def _number(low: float, high: float) -> Callable[[Any], float]:
    def check(value: Any) -> float:
        try:
            number = as_number(value)
        except (TypeError, ValueError):
            number = math.nan
        if isinstance(value, bool) or not low < number <= high:
            raise ValueError(f"a number (or a fraction such as '8/255') above {low:g} and up to {high:g}")
        return number

    return check


KEYS: Mapping[str, Callable[[Any], Any]] = {
    "schema": _whole(1),
    "name": _text,
    "version": _whole(1),
    "description": _text,
    "source": _text,
    "threat.norm": _norm,
    "threat.eps": _number(0, 1000),
    "threat.levels": _levels,
    "threat.contexts": _texts(tuple(CONTEXTS)),
    "samples.fraction": _number(0, 1),
    "samples.per_class": _whole(1),
    "samples.limit": _whole(1),
    "samples.seed": _whole(0),
    "batches.size": _whole(1),
    "batches.seed": _whole(0),
    "attack.apgd.surrogates": _texts(),
    "attack.apgd.losses": _texts(tuple(MIN_CLASSES)),
    "attack.apgd.steps": _whole(1),
    "attack.apgd.restarts": _whole(1),
    "attack.apgd.targets": _whole(1),
    "attack.apgd.runs": _runs,
    "attack.apgd.moves": _texts(MOVES),
    "attack.apgd.combine": _choice(*COMBINATIONS),
    "attack.apgd.passes": _whole(1),
    "attack.apgd.overtime": _whole(0),
    "attack.apgd.victim": _whole(0),
    "attack.square.queries": _whole(1),
    "attack.square.p_init": _number(0, 1),
    "attack.square.restarts": _whole(1),
    "attack.spsa.queries": _whole(3),
    "attack.spsa.samples": _whole(1),
    "attack.spsa.restarts": _whole(1),
    "attack.recombination.sweeps": _whole(1),
    "attack.recombination.passes": _whole(0),
    "attack.recombination.classes": _whole(0),
    "attack.recombination.runs": _runs,
    "attack.recombination.steps": _whole(1),
    "attack.peers": _peers,
    "attack.composition.pool": _whole(1),
    "attack.composition.search": _choice("greedy", "random"),
    "attack.composition.trials": _whole(1),
    "audit.samples": _whole(0),
    "stochastic.draws": _odd,
    "stochastic.eot": _whole(1),
}


REQUIRED = ("schema", "name", "version", "description", "threat.norm", "threat.eps")


def contradictions(values: Mapping[str, Any]) -> list[str]:
    """Which keys contradict each other, a sentence each."""
    found = []
    if values.get("schema", SCHEMA) != SCHEMA:
        found.append(f"schema: this release reads schema {SCHEMA}, but got {values['schema']!r}")
    if "samples.fraction" in values and "samples.per_class" in values:
        found.append("samples.fraction and samples.per_class exclude each other")
    if not any(key.startswith(("attack.apgd.", "attack.square.", "attack.spsa.", "attack.peers")) for key in values):
        found.append("no attack: give attack.apgd, attack.square, attack.spsa or attack.peers")
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
        found.append("only a cascade knows what stands; give attack.apgd.combine = 'cascade', or move the batch")
    if values.get("attack.apgd.combine") == "mean" and set(moves) - {"batch", ""}:
        found.append("surrogates combined by mean move the batch; leave attack.apgd.moves out")
    if "attack.recombination.steps" in values and "attack.recombination.runs" not in values:
        found.append("attack.recombination.steps is of its own runs; give attack.recombination.runs, or leave it out")
    if "attack.recombination.runs" in values and not any(key.startswith("attack.apgd.") for key in values):
        found.append("attack.recombination.runs stand in for those of attack.apgd in joint; give attack.apgd too")
    if "attack.apgd.runs" in values:
        other = [k for k in ("surrogates", "losses", "restarts", "targets", "moves") if f"attack.apgd.{k}" in values]
        found += [f"attack.apgd.runs names every run, so attack.apgd.{key} has no meaning beside it" for key in other]
        if values.get("attack.apgd.combine") == "mean":
            found.append("attack.apgd.runs can't be combined by mean; give surrogates and losses")
    return found


def _too_coarse(values: Mapping[str, Any]) -> list[str]:
    """Whether no image can be changed by a level within the ball, in which the least change has the norm of one."""
    try:
        eps, levels = _number(0, 1000)(values["threat.eps"]), _levels(values["threat.levels"])
    except (KeyError, ValueError):  # told of by its own check
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
