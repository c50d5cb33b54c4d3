"""Attacks of other libraries as runs of a protocol."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from msa_eval.attacks.ball import Ball
from msa_eval.attacks.batch import Batch
from msa_eval.attacks.external.adapter import LibraryAttack
from msa_eval.attacks.external.attack import ExternalAttack
from msa_eval.attacks.external.libraries import find
from msa_eval.defense.contract import Defense
from msa_eval.engine.schedule import OWN, Run
from msa_eval.judging.usable_surrogates import select_surrogates
from msa_eval.protocols.checks import ExternalSpec
from msa_eval.protocols.schema import ApgdBudget
from msa_eval.surrogates.registry import Surrogate, SurrogateLike, get

TARGET = "target"
"""Among an external attack's surrogates, the hard target itself."""


def external_runs(
    peers: Sequence[ExternalSpec],
    ball: Ball,
    defense: Defense,
    batch: Batch,
    *,
    num_classes: int,
    own: Mapping[str, SurrogateLike] | None = None,
    use_own: bool = True,
) -> list[Run]:
    """The runs of a protocol's peers: each through each of its surrogates, as often as it is restarted.

    Surrogates that a target has not are left out; where none is left, ``ste`` is used.

    Args:
        peers: as the protocol names them.
        ball: the perturbation set.
        defense: the target.
        batch: a clean batch to try surrogates on.
        num_classes: k.
        own: surrogates of the caller's own, for the external attacks that name them.
        use_own: whether they are for this target; one that they are not for is attacked through the others.

    Raises:
        ValueError: when there is no such attack, option or surrogate, a library is not installed, or a gradient is
            asked of the hard target.
    """
    runs: list[Run] = []
    again: dict[tuple[str, str], int] = {}
    for spec in peers:
        library_attack = find(spec.name, ball, spec.options)
        if spec.restarts > 1 and not library_attack.starts:
            raise ValueError(f"{spec.name} starts at the clean images and draws nothing; leave its restarts out")
        if num_classes < 4 and spec.name == "autoattack:apgd-t":
            raise ValueError(f"{spec.name} needs at least 4 classes, but the model has {num_classes}; leave it out")
        for surrogate in _attacked(spec, library_attack, defense, batch, own or {}, use_own):
            name = TARGET if surrogate is None else surrogate.name
            first = again.get((spec.name, name), 0)
            again[spec.name, name] = first + spec.restarts
            runs += [
                Run(surrogate, ExternalAttack(library_attack, turn), OWN, turn)
                for turn in range(first, first + spec.restarts)
            ]
    return runs


def _attacked(
    spec: ExternalSpec,
    library_attack: LibraryAttack,
    defense: Defense,
    batch: Batch,
    own: Mapping[str, SurrogateLike],
    use_own: bool,
) -> list[Surrogate | None]:
    """What an external attack is run on; ``None`` is the hard target."""
    names = spec.surrogates or ((TARGET,) if library_attack.gradient_free else ApgdBudget().surrogates)
    if TARGET in names and not library_attack.gradient_free:
        raise ValueError(
            f"{spec.name} follows gradients, and the hard target has none to give; name surrogates for it, such as ste"
        )
    others = tuple(name for name in names if name != TARGET)
    found: list[Surrogate | None] = [None] if TARGET in names else []
    if others:
        for name in others:
            get(name, own)  # which says what there is where it is unknown
        mine = {name: own[name] for name in others if name in own}
        budget = ApgdBudget(surrogates=others)
        found += select_surrogates(budget, defense, batch, own=mine, use_own=use_own).of(budget)
    return found
