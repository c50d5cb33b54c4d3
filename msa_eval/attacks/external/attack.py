"""An attack of another library as a run on a batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from msa_eval.attacks.attacked_batch import AttackedBatch
from msa_eval.attacks.external.adapter import Peer
from msa_eval.attacks.external.batch_model import Seat
from msa_eval.attacks.external.sanitize import meet
from msa_eval.defense.contract import modules_of


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

    def __call__(self, trial: AttackedBatch, generator: torch.Generator) -> Tensor:
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
