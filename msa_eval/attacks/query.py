"""Runs of the gradient-free attacks, which ask the target itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from msa_eval.attacks.attacked_batch import Attack, AttackedBatch
from msa_eval.attacks.ball import per_image
from msa_eval.attacks.spsa import spsa
from msa_eval.attacks.square import square


@dataclass(frozen=True)
class SquareAttack(Attack):
    """Square on the hard target, for the samples it gets right."""

    label = "square"
    gradient_free = True

    queries: int
    p_init: float

    def __call__(self, attacked: AttackedBatch, generator: torch.Generator) -> Tensor:
        """Return the points kept last."""
        return _query(attacked, square, queries=self.queries, p_init=self.p_init, generator=generator)


@dataclass(frozen=True)
class SpsaAttack(Attack):
    """SPSA on the hard target, for the samples it gets right."""

    label = "spsa"
    gradient_free = True

    queries: int
    samples: int

    def __call__(self, attacked: AttackedBatch, generator: torch.Generator) -> Tensor:
        """Return the points kept last."""
        return _query(attacked, spsa, queries=self.queries, samples=self.samples, generator=generator)


def _query(attacked: AttackedBatch, search: Callable[..., Tensor], **budget: Any) -> Tensor:
    """Search for the samples counted that are right; the others stay at their start."""
    batch = attacked.batch
    searched = batch.correct & attacked.counted
    found = search(attacked, batch.x, batch.y, attacked=searched, ball=attacked.ball, **budget)
    return torch.where(per_image(searched, found), found, attacked.start.x)
