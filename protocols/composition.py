"""The choice of an image's company from what is cached, which costs decisions and no passes.

The search is a coordinate descent: in one place after another, several images are tried, and the one is kept that
leaves the label the smallest lead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from msa_eval.protocols.contexts import Company, decide_each
from msa_eval.protocols.trial import Trial
from torch import Tensor

from msa_eval.attacks.losses import margin
from msa_eval.defense import Defense

Candidates = Callable[[int, Company], Tensor]
"""``(place, company) -> (n, w)``: what each row may put in a place of its company, as places in the pool."""

WIDTH = 8
"""Images that a greedy composition compares in one place."""


def descend(
    defense: Defense, z: Tensor, y: Tensor, company: Company, *, places: Sequence[int], candidates: Candidates
) -> tuple[Company, Tensor]:
    """Lower the lead of each row's label by the choice of its company.

    Args:
        defense: the target.
        z: features of the rows ``(n, ...)``.
        y: their labels ``(n,)``.
        company: who sits beside each at first.
        places: which places of the company to try, in this order.
        candidates: what to try there, beside what is there.

    Returns:
        the company found, and the leads ``(n,)``.
    """

    def leads(index: Tensor, times: int) -> Tensor:
        shape = (times, *[1] * (z.ndim - 1))
        seats = company.seats.repeat(times)
        with torch.no_grad():
            logits = decide_each(defense, z.repeat(*shape), Company(company.pool, index, seats))
        return -margin(logits.float(), y.repeat(times))

    lead = leads(company.index, 1)
    for place in places:
        drawn = candidates(place, company)
        width = drawn.shape[1]
        index = company.index.repeat(width, 1)
        index[:, place] = drawn.T.flatten()
        found, which = leads(index, width).view(width, -1).min(dim=0)
        best = index.view(width, len(z), -1)[which, torch.arange(len(z), device=z.device)]
        company = company.seating(torch.where((found < lead).unsqueeze(1), best, company.index))
        lead = torch.minimum(found, lead)
    return company, lead


@dataclass(frozen=True)
class CompositionAttack:
    """The choice of the clean images that sit beside each image of a batch, whose own points stay as they are.

    No image sits twice in a batch.

    Attributes:
        company: the pool, and who sits where at first.
        identity: of each image of the pool ``(P,)``.
        own: of the batch's images ``(B,)``.
        trials: batches tried for each image.
        greedy: whether to compare several images in a place, or one.
    """

    company: Company
    identity: Tensor
    own: Tensor
    trials: int
    greedy: bool

    def __call__(self, trial: Trial, generator: torch.Generator) -> Tensor:
        """Return the points, unchanged; the company found is in the trial's record."""
        trial.regroup(self.company)
        seats = self.company.index.shape[1]
        if seats == 0:
            return trial.start.x
        width = WIDTH if self.greedy else 1
        places = torch.randint(seats, (-(-self.trials // width),), generator=generator).tolist()

        def candidates(place: int, company: Company) -> Tensor:
            drawn = torch.randint(len(self.identity), (len(self.own), width), generator=generator).to(company.index)
            return torch.where(self._allowed(company.index, drawn), drawn, company.index[:, place : place + 1])

        found, _ = descend(
            trial.target, trial.start.z, trial.batch.y, self.company, places=places, candidates=candidates
        )
        trial.regroup(found)
        return trial.start.x

    def _allowed(self, index: Tensor, drawn: Tensor) -> Tensor:
        """Whether an image drawn for a row ``(n, w)`` is neither its own nor in its company."""
        identity = self.identity[drawn]
        taken = (self.identity[index].unsqueeze(2) == identity.unsqueeze(1)).any(dim=1)
        return ~taken & (identity != self.own.unsqueeze(1))
