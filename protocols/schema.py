"""A protocol: which surrogates, losses and budget, on which samples, in which batches, in which contexts.

A protocol is a TOML file. Every key is known by its dotted name, which is also how the command line overrides it; all
mistakes of a file are reported together.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, NamedTuple, get_args

from msa_eval.attacks.ball import Ball, Norm

NORMS: Mapping[str, str] = {name.lower(): name for name in get_args(Norm)} | {
    "inf": "Linf", "∞": "Linf", "l∞": "Linf", "linfinity": "Linf", "2": "L2", "2.0": "L2", "1": "L1", "1.0": "L1",
}  # fmt: skip
"""How people write the norms."""


class RunSpec(NamedTuple):
    """A white-box run as a protocol names it: what is attacked, by which loss, and which images move."""

    surrogate: str
    loss: str
    moves: str = "batch"


class ExternalSpec(NamedTuple):
    """An attack of other libraries as a protocol names it (see `msa_eval.attacks.external`).

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
        losses: among ``ce``, ``dlr``, ``margin``, ``probability-margin``, ``dlr-targeted``, ``dlr-malt``.
        steps: gradient steps a run.
        restarts: runs of each surrogate and untargeted loss, each from a start of its own.
        targets: runs of each surrogate with a targeted loss, towards the other classes in turn: the likeliest first
            with ``dlr-targeted``, with ``dlr-malt`` those that a linear model of the logits reaches first.
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
    """In ``joint``, on a batch-dependent target: mixtures of the points that the runs found, and pursuits of samples.

    Without a trunk there are no mixtures. Where a decision has no closed form for them, and where there is no trunk,
    pursuits start from other points than mixtures.

    Attributes:
        sweeps: how often each image of the batch is given another of its points, for each sample that stands.
        passes: of a batch, for a pursuit: steps against one sample at a time. 0 for none.
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
        peers: attacks of other libraries, run after all else and each from the clean images.
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
    peers: tuple[ExternalSpec, ...] = ()
    composition: CompositionBudget = CompositionBudget()
    stochastic: StochasticBudget = StochasticBudget()
    audited: int = 128
    overrides: Mapping[str, Any] = field(default_factory=dict)
    values: Mapping[str, Any] = field(default_factory=dict)

    @property
    def modified(self) -> bool:
        """Whether it differs from the file it was read from."""
        return bool(self.overrides)

    @property
    def follows_gradients(self) -> bool:
        """Whether some attack of it does."""
        return self.apgd is not None or bool(self.peers)

    def text(self) -> str:
        """The protocol as TOML, overrides included."""
        return _dump(self.values)

    def digest(self) -> str:
        """SHA-256 over all keys and values."""
        return hashlib.sha256(json.dumps(dict(self.values), sort_keys=True).encode()).hexdigest()


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
