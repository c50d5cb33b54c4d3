"""An attack of another library as a run on a batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from msa_eval.attacks.attacked_batch import Attack, AttackedBatch
from msa_eval.attacks.external.adapter import LibraryAttack
from msa_eval.attacks.external.batch_model import BatchModel
from msa_eval.attacks.external.sanitize import run_guarded
from msa_eval.defense.contract import modules_of


@dataclass(frozen=True)
class ExternalAttack(Attack):
    """An attack of other libraries on whole batches.

    Where rows are decided apart from each other (in ``solo``, ``alone`` and ``composed``, or by a target that ignores
    companions) it is given the samples searched for, and every row that it shows is answered, and judged, in a batch of
    its own. In ``joint`` it is given the whole batch, and moves all of it.

    Attributes:
        library_attack: the attack.
        turn: which restart, from 0.
    """

    library_attack: LibraryAttack
    turn: int = 0

    @property
    def name(self) -> str:
        """``library:attack``."""
        return self.library_attack.name

    def __call__(self, attacked: AttackedBatch, generator: torch.Generator) -> Tensor:
        """Return its points, made sound; what had to be mended stands in the batch's ``faults``."""
        batch = attacked.batch
        rows = attacked.counted.nonzero().flatten() if not attacked.rows_interact else torch.arange(len(batch.y))
        batch_model = BatchModel(
            attacked.ask, batch.x, batch.y, attacked.ball, classes=batch.logits.shape[1], rows=rows.to(batch.y.device),
            parts=modules_of(attacked.target),
        )  # fmt: skip
        found = run_guarded(self.library_attack, batch_model, seed=generator.initial_seed(), turn=self.turn)
        attacked.faults += found.faults
        return attacked.start.x.index_copy(0, batch_model.rows, found.x)
