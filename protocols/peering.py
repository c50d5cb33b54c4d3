"""Attacks of others as runs of a protocol."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from msa_eval.attacks.ball import Ball
from msa_eval.defense.contract import Defense, modules_of
from msa_eval.peers import find
from msa_eval.peers.guard import meet
from msa_eval.peers.peer import Peer
from msa_eval.peers.seat import Seat
from msa_eval.protocols.batch import Batch
from msa_eval.protocols.offers import offer
from msa_eval.protocols.runs import OWN, Run
from msa_eval.protocols.spec import ApgdBudget, PeerSpec
from msa_eval.protocols.trial import Trial
from msa_eval.surrogates.registry import Own, Surrogate

TARGET = "target"
"""Among a peer's surrogates, the hard target itself."""


@dataclass(frozen=True)
class PeerAttack:
    """An attack of others on whole batches.

    Where rows are decided apart from each other (in ``solo``, ``alone`` and ``composed``, or by a target that ignores
    companions) it is given the samples searched for, and every row that it shows is answered, and judged, in a batch of
    its own. In ``joint`` it is given the whole batch, and moves all of it.

    Attributes:
        peer: the attack.
        turn: which restart, from 0.
    """

    peer: Peer
    turn: int = 0

    def __call__(self, trial: Trial, generator: torch.Generator) -> Tensor:
        """Return its points, made sound; what had to be mended stands in the trial's ``faults``."""
        batch = trial.batch
        rows = trial.counted.nonzero().flatten() if not trial.rows_interact else torch.arange(len(batch.y))
        seat = Seat(
            trial.ask, batch.x, batch.y, trial.ball, classes=batch.logits.shape[1], rows=rows.to(batch.y.device),
            parts=modules_of(trial.target),
        )  # fmt: skip
        found = meet(self.peer, seat, seed=generator.initial_seed(), turn=self.turn)
        trial.faults += found.faults
        return trial.start.x.index_copy(0, seat.rows, found.x)


def peer_runs(
    peers: Sequence[PeerSpec],
    ball: Ball,
    defense: Defense,
    batch: Batch,
    *,
    num_classes: int,
    own: Mapping[str, Own] | None = None,
) -> list[Run]:
    """The runs of a protocol's peers: each through each of its surrogates, as often as it is restarted.

    Surrogates that a target has not are left out; where none is left, ``ste`` is used.

    Args:
        peers: as the protocol names them.
        ball: the perturbation set.
        defense: the target.
        batch: a clean batch to try surrogates on.
        num_classes: k.
        own: surrogates of the caller's own, for the peers that name them.

    Raises:
        ValueError: when there is no such attack, option or surrogate, a library is not installed, or a gradient is
            asked of the hard target.
    """
    runs: list[Run] = []
    again: dict[tuple[str, str], int] = {}
    for spec in peers:
        peer = find(spec.name, ball, spec.options)
        if spec.restarts > 1 and not peer.starts:
            raise ValueError(f"{spec.name} starts at the clean images and draws nothing; leave its restarts out")
        if num_classes < 4 and spec.name == "autoattack:apgd-t":
            raise ValueError(f"{spec.name} needs at least 4 classes, but the model has {num_classes}; leave it out")
        for surrogate in _attacked(spec, peer, defense, batch, own or {}):
            name = TARGET if surrogate is None else surrogate.name
            first = again.get((spec.name, name), 0)
            again[spec.name, name] = first + spec.restarts
            runs += [
                Run(surrogate, PeerAttack(peer, turn), spec.name, OWN, turn)
                for turn in range(first, first + spec.restarts)
            ]
    return runs


def _attacked(
    spec: PeerSpec, peer: Peer, defense: Defense, batch: Batch, own: Mapping[str, Own]
) -> list[Surrogate | None]:
    """What a peer is run on; ``None`` is the hard target."""
    names = spec.surrogates or ((TARGET,) if peer.gradient_free else ApgdBudget().surrogates)
    if TARGET in names and not peer.gradient_free:
        raise ValueError(
            f"{spec.name} follows gradients, and the hard target has none to give; name surrogates for it, such as ste"
        )
    others = tuple(name for name in names if name != TARGET)
    found: list[Surrogate | None] = [None] if TARGET in names else []
    if others:
        mine = {name: own[name] for name in others if name in own}
        budget = ApgdBudget(surrogates=others)
        found += offer(budget, defense, batch, own=mine).of(budget)
    return found
