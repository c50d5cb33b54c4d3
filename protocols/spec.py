"""A protocol: which surrogates, losses and budget, on which samples, in which batches, in which contexts.

A protocol is a TOML file. Every key is known by its dotted name, which is also how the command line overrides it; all
mistakes of a file are reported together.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar, cast, get_args

from msa_eval.attacks.ball import Ball, Norm
from msa_eval.attacks.external.libraries import library_of
from msa_eval.attacks.losses import MIN_CLASSES
from msa_eval.quantity import as_number
from msa_eval.untrusted import told

T = TypeVar("T")

SCHEMA = 1
CONTEXTS = ("joint", "solo", "alone", "composed")
COMBINATIONS = ("separate", "mean", "alternate", "cascade")
MOVES = ("batch", "image", "companions", "standing")

_NORMS: Mapping[str, str] = {name.lower(): name for name in get_args(Norm)} | {
    "inf": "Linf", "∞": "Linf", "l∞": "Linf", "linfinity": "Linf", "2": "L2", "2.0": "L2",
}  # fmt: skip
"""How people write the norms."""


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError("a text")
    return value


def _norm(value: Any) -> str:
    if _NORMS.get(str(value).lower()) is None or isinstance(value, bool):
        raise ValueError(f"one of {', '.join(get_args(Norm))}")
    return _NORMS[str(value).lower()]


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


def _peers(value: Any) -> tuple[PeerSpec, ...]:
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
        peers.append(PeerSpec(name, surrogates, restarts, options))
    return tuple(peers)


def _odd(value: Any) -> int:
    number = _whole(1)(value)
    if number % 2 == 0:
        raise ValueError("an odd number, so that there is a majority")
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


_KEYS: Mapping[str, Callable[[Any], Any]] = {
    "schema": _whole(1),
    "name": _text,
    "version": _whole(1),
    "description": _text,
    "source": _text,
    "threat.norm": _norm,
    "threat.eps": _number(0, 1000),
    "threat.contexts": _texts(CONTEXTS),
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
_REQUIRED = ("schema", "name", "version", "description", "threat.norm", "threat.eps")


class RunSpec(NamedTuple):
    """A white-box run as a protocol names it: what is attacked, by which loss, and which images move."""

    surrogate: str
    loss: str
    moves: str = "batch"


class PeerSpec(NamedTuple):
    """An attack of others as a protocol names it (see `msa_eval.attacks.external`).

    Attributes:
        name: ``library:attack``.
        surrogates: what it is run on, ``target`` among them for one that needs no gradient; those that a target can't
            offer are left out. By default the target for such a one, ``fc-oracle`` and ``soft-hybrid`` for others.
        restarts: runs of each, with a seed of its own.
        options: more of its own, by the names that its authors gave them.
    """

    name: str
    surrogates: tuple[str, ...] = ()
    restarts: int = 1
    options: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True)
class ApgdBudget:
    """The white-box part of a protocol: every surrogate with every loss, or a list of runs.

    Attributes:
        surrogates: their names; those that a defence can't offer are left out, and ``ste`` is used if none is left.
        losses: among ``ce``, ``dlr``, ``margin``, ``dlr-targeted``.
        steps: gradient steps a run.
        restarts: runs of each surrogate and untargeted loss, each from a start of its own.
        targets: runs of each surrogate with ``dlr-targeted``, towards the likeliest other classes in turn.
        runs: the runs in their order, instead of surrogates and losses. A surrogate that a target has not is replaced
            by its first, and a run named again has another start, or another target class. Where no companions can be
            moved, a run that would move them goes to the next target class instead, and a loss that needs more classes
            than there are gives way to the margin: so every target is given the same number of runs.
        moves: in ``joint``, on a batch-dependent target, which images a run moves: all of the ``batch`` at once; each
            ``image`` among companions that stay; the ``companions`` of an image that stays; or, in a cascade, all that
            are ``standing``, where what is broken stays as it broke and costs no more passes.
        combine: ``separate`` runs are each surrogate's own. ``mean`` attacks the mean of the surrogates' losses, and
            ``alternate`` one surrogate a step in turn. In a ``cascade`` a run searches only for the samples that still
            stand, from the best points so far and, where it is named again, from a random start. Where each sample is
            decided apart from the others, it is searched for no more as soon as it is broken.
        passes: in a cascade, no further run searches a batch on which so many passes a sample were made; as many runs
            as are listed by default. So what is soon broken leaves its passes to what stands.
        overtime: after a cascade, so many more passes a sample, all for the few that are nearest to falling; where a
            sample is decided apart from the others.
        victim: the one sample (its index in the data set) whose companions are moved to break it; all by default.
    """

    surrogates: tuple[str, ...] = ("fc-oracle", "soft-hybrid")
    losses: tuple[str, ...] = ("ce", "dlr")
    steps: int = 40
    restarts: int = 1
    targets: int = 9
    runs: tuple[RunSpec, ...] = ()
    moves: tuple[str, ...] = ("batch",)
    combine: str = "separate"
    passes: int | None = None
    overtime: int = 0
    victim: int | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The surrogates it names, each once."""
        return tuple(dict.fromkeys(run.surrogate for run in self.runs)) or self.surrogates


@dataclass(frozen=True)
class SquareBudget:
    """The gradient-free part of a protocol, on the hard target.

    Attributes:
        queries: proposals a run; AutoAttack's number by default.
        p_init: the share of pixels changed at first.
        restarts: runs, each with a random sequence of its own.
    """

    queries: int = 5000
    p_init: float = 0.8
    restarts: int = 1


@dataclass(frozen=True)
class SpsaBudget:
    """A second gradient-free part: gradients estimated from the hard target's margins.

    Attributes:
        queries: proposals a run.
        samples: random directions an estimate; each takes two queries.
        restarts: runs, each with directions of its own.
    """

    queries: int = 1000
    samples: int = 8
    restarts: int = 1


@dataclass(frozen=True)
class RecombinationBudget:
    """In ``joint``, on a batch-dependent target with a trunk: mixtures of the points that the runs found.

    Attributes:
        sweeps: how often each image of the batch is given another of its points, for each sample that stands.
        passes: of a batch, for a pursuit: steps from a mixture against one sample at a time. 0 for none.
        classes: towards so many of them every image is moved first, from these passes, to be assigned there.
        runs: what gathers the points, each run on its own, in place of those of ``attack.apgd``; by default those
            are made, and recombined after the last.
        steps: of each of these runs; by default as many as in ``attack.apgd``.
    """

    sweeps: int = 2
    passes: int = 0
    classes: int = 0
    runs: tuple[RunSpec, ...] = ()
    steps: int | None = None

    def gathering(self, budget: ApgdBudget) -> ApgdBudget:
        """The white-box runs that gather the points."""
        if not self.runs:
            return budget
        return replace(
            budget, runs=self.runs, steps=self.steps or budget.steps, combine="separate", passes=None, overtime=0
        )


@dataclass(frozen=True)
class CompositionBudget:
    """In the context ``composed``, the search for the clean images that sit beside each image.

    Attributes:
        pool: how many images there are to choose from, beside those of the batch.
        search: ``random`` tries one image in one place at a time, ``greedy`` keeps the best
            of several in a place, and tries about every place.
        trials: batches tried for each image, before the runs, after every third and after the last; eight times as
            many by a defence with a closed form for them.
    """

    pool: int = 512
    search: str = "greedy"
    trials: int = 500


@dataclass(frozen=True)
class StochasticBudget:
    """What is done about a target that answers at random; others are asked once.

    Attributes:
        draws: a sample is broken when the majority of so many answers to one batch are wrong, then a clear one of
            eleven times as many more, and after the run a clear one of 111 times as many (see `verdict`).
        eot: answers a gradient is averaged over (expectation over transformation, Athalye et al. 2018).
    """

    draws: int = 9
    eot: int = 4


@dataclass(frozen=True)
class Protocol:
    """A protocol, checked.

    Attributes:
        name: of the file.
        version: of its content.
        description: in a sentence.
        ball: the perturbation set.
        contexts: what the attacker controls: every image of the batch (``joint``), one image among clean companions
            (``solo``), one image in a batch of one (``alone``), one image and the choice of its clean companions
            (``composed``).
        fraction: the share of samples to evaluate, uniformly drawn.
        per_class: or how many of each class.
        limit: at most so many of these.
        samples_seed: draws them.
        batch_size: the largest batch; sizes are balanced.
        batches_seed: draws who sits together.
        apgd: the white-box part, or ``None``.
        square: the gradient-free part, or ``None``.
        spsa: a second gradient-free part, or ``None``.
        recombination: of the points found, or ``None``.
        peers: attacks of others, run after all else and each from the clean images.
        composition: the choice of companions in ``composed``.
        stochastic: what is done about a target that answers at random.
        audited: at most so many samples, in whole batches, are looked at for the signs of the audit; 0 for none.
        overrides: what was changed against the file, by dotted key.
        values: all keys as given, after overrides.
    """

    name: str
    version: int
    description: str
    ball: Ball
    contexts: tuple[str, ...] = ("joint",)
    fraction: float | None = None
    per_class: int | None = None
    limit: int | None = None
    samples_seed: int = 0
    batch_size: int = 64
    batches_seed: int = 0
    apgd: ApgdBudget | None = None
    square: SquareBudget | None = None
    spsa: SpsaBudget | None = None
    recombination: RecombinationBudget | None = None
    peers: tuple[PeerSpec, ...] = ()
    composition: CompositionBudget = CompositionBudget()
    stochastic: StochasticBudget = StochasticBudget()
    audited: int = 128
    overrides: Mapping[str, Any] = field(default_factory=dict)
    values: Mapping[str, Any] = field(default_factory=dict)

    @property
    def modified(self) -> bool:
        """Whether it differs from the file it was read from."""
        return bool(self.overrides)

    def text(self) -> str:
        """The protocol as TOML, overrides included."""
        return _dump(self.values)

    def digest(self) -> str:
        """SHA-256 over all keys and values."""
        return hashlib.sha256(json.dumps(dict(self.values), sort_keys=True).encode()).hexdigest()


def shipped() -> dict[str, Path]:
    """The protocols that come with the toolkit: name to file.

    >>> sorted(shipped())
    ['digits', 'msa', 'paper-cifar10', 'paper-cifar100', 'paper-imagenet', 'quick']
    """
    folder = Path(str(resources.files("msa_eval.protocols")))
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


MISTAKES = 20
"""So many mistakes in a protocol are told; the others are counted."""


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
        raise ValueError(f"{path} is not a readable TOML file: {told(error)}") from error
    return make_protocol(content, overrides=overrides, source=str(source))


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
    mistakes = [f"{key} is missing" for key in _REQUIRED if key not in values]
    for key, value in values.items():
        if value == {}:
            mistakes.append(f"the table [{told(key)}] is empty; give at least one of its keys, or leave it out")
            continue
        if key not in _KEYS:
            close = [name for name in _KEYS if name.endswith(f".{key}")] or difflib.get_close_matches(key, _KEYS, n=1)
            hint = f" (did you mean {' or '.join(close[:3])}?)" if close else ""
            mistakes.append(f"unknown key {told(key)}{hint}")
            continue
        try:
            parsed[key] = _KEYS[key](value)
        except ValueError as error:
            mistakes.append(f"{key}: expected {error}, but got {told(repr(value))}")
    mistakes += _contradictions(values)
    if mistakes:
        more = f"; and {len(mistakes) - MISTAKES} more" if len(mistakes) > MISTAKES else ""
        raise ValueError(f"{source}: " + "; ".join(mistakes[:MISTAKES]) + more)
    return Protocol(
        name=parsed["name"],
        version=parsed["version"],
        description=parsed["description"],
        ball=Ball(cast(Norm, parsed["threat.norm"]), parsed["threat.eps"]),
        apgd=_section(ApgdBudget, "attack.apgd.", parsed),
        square=_section(SquareBudget, "attack.square.", parsed),
        spsa=_section(SpsaBudget, "attack.spsa.", parsed),
        recombination=_section(RecombinationBudget, "attack.recombination.", parsed),
        composition=_section(CompositionBudget, "attack.composition.", parsed) or CompositionBudget(),
        stochastic=_section(StochasticBudget, "stochastic.", parsed) or StochasticBudget(),
        overrides=changed,
        values=values,
        **{
            name: parsed[key]
            for name, key in {
                "contexts": "threat.contexts",
                "fraction": "samples.fraction",
                "per_class": "samples.per_class",
                "limit": "samples.limit",
                "samples_seed": "samples.seed",
                "batch_size": "batches.size",
                "batches_seed": "batches.seed",
                "audited": "audit.samples",
                "peers": "attack.peers",
            }.items()
            if key in parsed
        },
    )


def _contradictions(values: Mapping[str, Any]) -> list[str]:
    found = []
    if values.get("schema", SCHEMA) != SCHEMA:
        found.append(f"schema: this release reads schema {SCHEMA}, but got {values['schema']!r}")
    if "samples.fraction" in values and "samples.per_class" in values:
        found.append("samples.fraction and samples.per_class exclude each other")
    if not any(key.startswith(("attack.apgd.", "attack.square.", "attack.spsa.", "attack.peers")) for key in values):
        found.append("no attack: give attack.apgd, attack.square, attack.spsa or attack.peers")
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
    if values.get("attack.apgd.combine") in ("mean", "alternate") and set(moves) - {"batch", ""}:
        found.append("surrogates combined by mean or alternate move the batch; leave attack.apgd.moves out")
    if "attack.recombination.steps" in values and "attack.recombination.runs" not in values:
        found.append("attack.recombination.steps is of its own runs; give attack.recombination.runs, or leave it out")
    if "attack.recombination.runs" in values and not any(key.startswith("attack.apgd.") for key in values):
        found.append("attack.recombination.runs stand in for those of attack.apgd in joint; give attack.apgd too")
    if "attack.apgd.runs" in values:
        other = [k for k in ("surrogates", "losses", "restarts", "targets", "moves") if f"attack.apgd.{k}" in values]
        found += [f"attack.apgd.runs names every run, so attack.apgd.{key} has no meaning beside it" for key in other]
        if values.get("attack.apgd.combine") in ("mean", "alternate"):
            found.append("attack.apgd.runs can't be combined by mean or alternate; give surrogates and losses")
    return found


def _listed(values: Mapping[str, Any], key: str) -> list[Any]:
    given = values.get(f"attack.apgd.{key}", [])
    return given if isinstance(given, list) else []


def _section(kind: Callable[..., T], prefix: str, parsed: Mapping[str, Any]) -> T | None:
    """Build a section from its keys; ``None`` where it has none at all."""
    given = {key.removeprefix(prefix): value for key, value in parsed.items() if key.startswith(prefix)}
    return kind(**given) if given else None


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
        return _NORMS.get(str(value).lower(), value)
    if isinstance(value, tuple):
        return list(value)
    return value.tolist() if hasattr(value, "tolist") else value


def _dump(values: Mapping[str, Any]) -> str:
    """Write flat values as TOML."""
    tables: dict[str, list[str]] = {}
    for key, value in values.items():
        table, _, name = key.rpartition(".")
        tables.setdefault(table, []).append(f"{name} = {_toml(value)}")
    blocks = ["\n".join(([f"[{table}]"] if table else []) + lines) for table, lines in sorted(tables.items())]
    return "\n\n".join(blocks) + "\n"


def _toml(value: Any) -> str:
    """A value as TOML: strings and numbers are the same as in JSON, tables stand in line."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{json.dumps(key)} = {_toml(entry)}" for key, entry in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(_toml(entry) for entry in value) + "]"
    return json.dumps(value, ensure_ascii=False)
