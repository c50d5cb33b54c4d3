"""The composition attack: which clean images beside an image make the target wrong on it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from msa_eval.protocols.contexts import Company
from msa_eval.protocols.trial import Trial
from torch import Tensor

from msa_eval.attacks.losses import margin

WIDTH = 8
"""Images that a greedy search compares in one place."""


@dataclass(frozen=True)
class CompositionAttack:
    """A search over the company of every image of a batch, whose own points stay as they are.

    A random search puts one image of the pool in one place at a time and keeps it where the lead of the label falls; a
    greedy one compares several in that place and keeps the best. No image sits twice in a batch.

    Args:
        company: the pool and who sits where at first.
        identity: of each image of the pool ``(P,)``, so that none is taken twice.
        own: identity of the batch's images ``(B,)``.
        trials: batches tried for each image.
        greedy: whether to compare several images in a place.
    """

    company: Company
    identity: Tensor
    own: Tensor
    trials: int
    greedy: bool

    def __call__(self, trial: Trial, generator: torch.Generator) -> Tensor:
        """Return the points, unchanged; the company found is in the trial's record."""
        index = self.company.index
        lead = -margin(trial.regroup(self.company), trial.batch.y)
        if index.shape[1] == 0:
            return trial.start.x
        width = WIDTH if self.greedy else 1
        place = index.new_zeros(len(index))
        for attempt in range(self.trials):
            if attempt % width == 0:
                place = torch.randint(index.shape[1], (len(index),), generator=generator).to(index)
            drawn = torch.randint(len(self.identity), (len(index),), generator=generator).to(index)
            proposed = index.scatter(1, place.unsqueeze(1), drawn.unsqueeze(1))
            proposed = torch.where(self._allowed(index, drawn).unsqueeze(1), proposed, index)
            found = -margin(trial.regroup(Company(self.company.pool, proposed)), trial.batch.y)
            lower = found < lead
            index, lead = torch.where(lower.unsqueeze(1), proposed, index), torch.minimum(found, lead)
        trial.regroup(Company(self.company.pool, index))
        return trial.start.x

    def _allowed(self, index: Tensor, drawn: Tensor) -> Tensor:
        """Whether the image drawn for each row is neither its own nor in its company ``(B,)``."""
        drawn_identity = self.identity[drawn].unsqueeze(1)
        taken = (self.identity[index] == drawn_identity).any(dim=1)
        return ~taken & (drawn_identity.squeeze(1) != self.own)
