"""The choice of an image's company from what is cached, which costs decisions and no passes.

The search is a coordinate descent: in one place after another, several images are tried, and the one is kept that
leaves the label the smallest lead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from msa_eval.protocols.contexts import Company, decide_each, decide_offers
from msa_eval.protocols.trial import Trial
from torch import Tensor

from msa_eval.attacks.losses import margin
from msa_eval.defense import Defense

Candidates = Callable[[int, Company], Tensor]
"""``(place, company) -> (n, w)``: what each row may put in a place of its company, as places in the pool."""

CHEAPER = 8
"""So many times as many batches are tried where a defence has a closed form for batches that differ in one row."""


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
    with torch.no_grad():
        lead = -margin(decide_each(defense, z, company).float(), y)
    for place in places:
        offers = candidates(place, company)
        best, found = best_offer(defense, z, y, company, offers, place=place)
        better = found < lead
        index = company.index.clone()
        index[:, place] = torch.where(better, best, index[:, place])
        company, lead = company.seating(index), torch.where(better, found, lead)
    return company, lead


def best_offer(
    defense: Defense, z: Tensor, y: Tensor, company: Company, offers: Tensor, *, place: int | None
) -> tuple[Tensor, Tensor]:
    """Which of the offers ``(n, w)`` for a place leaves each row's label the smallest lead ``(n,)``, and that lead."""
    logits = decide_offers(defense, z, company, offers, place=place)
    width = offers.shape[1]
    leads = -margin(logits.flatten(0, 1).float(), y.repeat_interleave(width))
    lowest, which = leads.view(-1, width).min(dim=1)
    return offers.gather(1, which.unsqueeze(1)).squeeze(1), lowest


@dataclass(frozen=True)
class CompositionAttack:
    """The choice of the clean images that sit beside each image of a batch, whose own points stay as they are.

    No image sits twice in a batch.

    Attributes:
        company: the pool, and who sits where at first.
        identity: of each image of the pool ``(P,)``.
        own: of the batch's images ``(B,)``.
        trials: batches tried for each image; `CHEAPER` times as many in closed form.
        greedy: whether to compare several images in a place, so that every place is tried about once, or one.
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
        trials = self.trials * (CHEAPER if hasattr(trial.target, "logits_with") else 1)
        width = -(-trials // seats) if self.greedy else 1
        places = torch.randint(seats, (-(-trials // width),), generator=generator).tolist()

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
