"""A protocol: which surrogates, losses and budget, on which samples, in which batches, in which contexts.

A protocol is a TOML file. Every key has a dotted name, which the command line uses to override it; all mistakes of a
file are reported together. What a key may hold stands in the annotation of its field; of the fields of `Protocol`, also
its dotted name or that of its section.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

from msa_eval.attacks.ball import Ball
from msa_eval.attacks.losses import MIN_CLASSES
from msa_eval.defense.contexts import CONTEXTS
from msa_eval.protocols import checks
from msa_eval.protocols.checks import ExternalSpec, RunSpec


@dataclass(frozen=True)
class ApgdBudget:
    """The white-box part of a protocol: every surrogate with every loss, or a list of runs.

    Attributes:
        surrogates: names of surrogates; those that a defence does not have are left out, and ``ste`` is used if none is
            left.
        losses: among ``ce``, ``dlr``, ``margin``, ``probability-margin``, ``dlr-targeted``, ``dlr-malt``.
        steps: gradient steps per run.
        restarts: runs of each surrogate with each untargeted loss, each from its own start.
        targets: runs of each surrogate with a targeted loss, each towards another class: in the order of the logits
            with ``dlr-targeted``; with ``dlr-malt``, those first that a linear model of the logits reaches first.
        runs: the runs in their order, in place of ``surrogates`` and ``losses``. A surrogate that the target does not
            have is replaced by its first one. A run that is listed again gets another start or another target class.
            Where companions can't be moved, a run that would move them attacks the next target class instead. A loss
            that needs more classes than the target has is replaced by the margin. So every target gets the same number
            of runs.
        moves: which images a run moves, in ``joint`` on a batch-dependent target: the whole ``batch``; the
            ``companions`` of an image that stays; or, in a cascade, the ``standing`` (unbroken) images, while broken
            ones stay as they are and cost no more passes.
        combine: ``separate`` runs each attack one surrogate. ``mean`` attacks the mean of the surrogates' losses. In a
            ``cascade`` a run attacks only the samples that are still unbroken, from the best points so far, or from a
            random start if the run is listed again. Where samples are decided independently, a sample leaves the search
            as soon as it is broken.
        passes: in a cascade: no further run starts on a batch after this many forward passes per sample. Default: as
            many as the listed runs take. Samples that break early leave their passes to the unbroken ones.
        overtime: after a cascade, on targets that decide samples independently: this many more passes per sample, all
            spent on the few samples closest to the decision boundary.
        victim: index of the one sample whose companions are moved in order to break it. Default: all samples.
    """

    surrogates: Annotated[tuple[str, ...], checks.texts()] = ("fc-oracle", "soft-hybrid")
    losses: Annotated[tuple[str, ...], checks.texts(MIN_CLASSES)] = ("ce", "dlr")
    steps: Annotated[int, checks.whole(1)] = 40
    restarts: Annotated[int, checks.whole(1)] = 1
    targets: Annotated[int, checks.whole(1)] = 9
    runs: Annotated[tuple[RunSpec, ...], checks.runs] = ()
    moves: Annotated[tuple[str, ...], checks.texts(checks.MOVES)] = ("batch",)
    combine: Annotated[str, checks.choice(*checks.COMBINATIONS)] = "separate"
    passes: Annotated[int | None, checks.whole(1)] = None
    overtime: Annotated[int, checks.whole(0)] = 0
    victim: Annotated[int | None, checks.whole(0)] = None

    @property
    def names(self) -> tuple[str, ...]:
        """The surrogates it names, each once."""
        return tuple(dict.fromkeys(run.surrogate for run in self.runs)) or self.surrogates


@dataclass(frozen=True)
class SquareBudget:
    """The gradient-free part of a protocol, on the hard target.

    Attributes:
        queries: queries per run; AutoAttack's number by default.
        p_init: the share of pixels that the first queries change.
        restarts: number of runs, each with its own random sequence.
    """

    queries: Annotated[int, checks.whole(1)] = 5000
    p_init: Annotated[float, checks.number(0, 1)] = 0.8
    restarts: Annotated[int, checks.whole(1)] = 1


@dataclass(frozen=True)
class SpsaBudget:
    """A second gradient-free part: gradients estimated from the hard target's margins.

    Attributes:
        queries: queries per run.
        samples: random directions per gradient estimate; each takes two queries.
        restarts: number of runs, each with its own directions.
    """

    queries: Annotated[int, checks.whole(3)] = 1000
    samples: Annotated[int, checks.whole(1)] = 8
    restarts: Annotated[int, checks.whole(1)] = 1


@dataclass(frozen=True)
class RecombinationBudget:
    """In ``joint``, on a batch-dependent target: mixtures of the points that the runs found, and pursuits of samples.

    Without a trunk there are no mixtures. Where a decision has no closed form for them, and where there is no trunk,
    pursuits start from other points than mixtures.

    Attributes:
        sweeps: how often each image of the batch is tried at another of its points, for each unbroken sample.
        passes: forward passes per sample for a pursuit, which attacks one sample at a time with the whole batch. 0:
            no pursuit.
        classes: number of classes that every image is first moved towards, out of these passes, so that it has a point
            in each class it can be brought to.
        runs: the runs that gather the points, in place of those of ``attack.apgd``. Default: those of ``attack.apgd``,
            whose points are recombined after the last run.
        steps: gradient steps of each of these runs. Default: as in ``attack.apgd``.
    """

    sweeps: Annotated[int, checks.whole(1)] = 2
    passes: Annotated[int, checks.whole(0)] = 0
    classes: Annotated[int, checks.whole(0)] = 0
    runs: Annotated[tuple[RunSpec, ...], checks.runs] = ()
    steps: Annotated[int | None, checks.whole(1)] = None

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
        pool: number of clean images to choose from, in addition to those of the batch.
        search: ``random`` tries one image in one place at a time; ``greedy`` tries several per place, keeps the best,
            and visits about every place.
        trials: batches tried for each image before the runs, after every third run and after the last; eight times as
            many if the defence has a closed form for them.
    """

    pool: Annotated[int, checks.whole(1)] = 512
    search: Annotated[str, checks.choice("greedy", "random")] = "greedy"
    trials: Annotated[int, checks.whole(1)] = 500


@dataclass(frozen=True)
class StochasticBudget:
    """How a target that answers at random is judged; other targets are asked once.

    Attributes:
        draws: a sample is broken when the majority of this many answers to one batch is wrong, then a clear majority of
            eleven times as many, and after the run a clear majority of 111 times as many (`msa_eval.judging.majority`).
        eot: number of answers that a gradient is averaged over (expectation over transformation, Athalye et al. 2018).
    """

    draws: Annotated[int, checks.odd] = 9
    eot: Annotated[int, checks.whole(1)] = 4


@dataclass(frozen=True)
class Protocol:
    """A protocol, checked.

    Attributes:
        name: the protocol's name.
        version: raised whenever its numbers may change.
        description: one sentence.
        ball: the perturbation set.
        contexts: what the attacker controls: every image of the batch (``joint``), one image among clean companions
            (``solo``), one image in a batch of one (``alone``), one image and the choice of its clean companions
            (``composed``).
        fraction: share of the samples to evaluate, drawn uniformly.
        per_class: number of samples of each class, instead of a fraction.
        limit: evaluate at most this many of these.
        samples_seed: seed that draws the samples.
        batch_size: largest batch; sizes are balanced.
        batches_seed: seed that assigns samples to batches.
        apgd: the white-box part, or ``None``.
        square: the gradient-free part, or ``None``.
        spsa: a second gradient-free part, or ``None``.
        recombination: mixtures of the points found, or ``None``.
        peers: third-party attacks, which run after everything else and start from the clean images.
        composition: the choice of companions in ``composed``.
        stochastic: how a target that answers at random is judged.
        audited: the audit examines at most this many samples, in whole batches; 0: no audit.
        overrides: what was changed with respect to the file, by dotted key.
        values: all keys as given, after overrides.
    """

    name: Annotated[str, checks.text]
    version: Annotated[int, checks.whole(1)]
    description: Annotated[str, checks.text]
    ball: Annotated[Ball, "threat", {"norm": checks.norm, "eps": checks.number(0, 1000), "levels": checks.levels}]
    contexts: Annotated[tuple[str, ...], "threat.contexts", checks.texts(CONTEXTS)] = ("joint",)
    fraction: Annotated[float | None, "samples.fraction", checks.number(0, 1)] = None
    per_class: Annotated[int | None, "samples.per_class", checks.whole(1)] = None
    limit: Annotated[int | None, "samples.limit", checks.whole(1)] = None
    samples_seed: Annotated[int, "samples.seed", checks.whole(0)] = 0
    batch_size: Annotated[int, "batches.size", checks.whole(1)] = 64
    batches_seed: Annotated[int, "batches.seed", checks.whole(0)] = 0
    apgd: Annotated[ApgdBudget | None, "attack.apgd"] = None
    square: Annotated[SquareBudget | None, "attack.square"] = None
    spsa: Annotated[SpsaBudget | None, "attack.spsa"] = None
    recombination: Annotated[RecombinationBudget | None, "attack.recombination"] = None
    peers: Annotated[tuple[ExternalSpec, ...], "attack.peers", checks.peers] = ()
    composition: Annotated[CompositionBudget, "attack.composition"] = CompositionBudget()
    stochastic: Annotated[StochasticBudget, "stochastic"] = StochasticBudget()
    audited: Annotated[int, "audit.samples", checks.whole(0)] = 128
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
    if isinstance(value, float):
        return repr(value)  # JSON has other words for infinity and NaN
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
