"""The choice of an image's company from what is cached, which costs decisions and no passes.

The search is a coordinate descent: in one place after another, several images are tried, and the one is kept that
leaves the label the smallest lead.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from msa_eval.attacks.attacked_batch import AttackedBatch
from msa_eval.attacks.ball import per_image
from msa_eval.attacks.losses import margin, most_likely_others
from msa_eval.defense.contexts import Company, decide_each, decide_offers
from msa_eval.defense.contract import Defense

Candidates = Callable[[int, Company], Tensor]
"""``(place, company) -> (n, w)``: what each row may put in a place of its company, as places in the pool."""

STEPS, REGROUP_EVERY, OFFERED = 30, 5, 16
"""A pursuit's steps, how often company is chosen anew between them, and from how many images in a place."""

RANKS = 6
"""Pursuits go towards so many classes in turn."""

Sizes = tuple[int | None, int | None]
"""How many images of the label's class, and of the class aimed at, company is to have; ``None`` leaves it to chance."""

ALL = sys.maxsize
STARTS: tuple[Sizes, ...] = ((ALL, None), (0, None), (ALL, 0))
"""The company that pursuits start with, once towards every class, then the next."""

JUMPS: tuple[Sizes, ...] = tuple((label, aim) for label in (0, 1, ALL) for aim in (0, 1, ALL))
"""Whole companies tried before single places are, for no step of one image leads from a crowd to none."""

FOCUS = 0.5
"""Beside the offers from the whole pool, half as many are of the label's class and half as many of the class aimed at:
where classes are many, an offer from all of them seldom matters."""

MOMENTUM = 0.75
FIRST_STEP, LAST_STEP = 1.0, 0.02
"""Lengths of a pursuit's steps, as shares of ε; they fall evenly."""

CHEAPER = 8
"""So many times as many batches are tried where a defence has a closed form for batches that differ in one row."""


def descend(
    defense: Defense,
    z: Tensor,
    y: Tensor,
    company: Company,
    *,
    places: Sequence[int],
    candidates: Candidates,
    toward: Tensor | None = None,
) -> tuple[Company, Tensor]:
    """Lower the lead of each row's label by the choice of its company.

    Args:
        defense: the target.
        z: features of the rows ``(n, ...)``.
        y: their labels ``(n,)``.
        company: who sits beside each at first.
        places: which places of the company to try, in this order.
        candidates: what to try there, beside what is there.
        toward: the class that each row's lead is over ``(n,)``; the likeliest other one by default.

    Returns:
        the company found, and the leads ``(n,)``; with ``toward``, minus infinity where the label leads no more.
    """
    with torch.no_grad():
        lead = _lead(decide_each(defense, z, company), y, toward)
    for place in places:
        offers = candidates(place, company)
        best, found = best_offer(defense, z, y, company, offers, place=place, toward=toward)
        better = found < lead
        index = company.index.clone()
        index[:, place] = torch.where(better, best, index[:, place])
        company, lead = company.seating(index), torch.where(better, found, lead)
    return company, lead


def best_offer(
    defense: Defense,
    z: Tensor,
    y: Tensor,
    company: Company,
    offers: Tensor,
    *,
    place: int | None,
    toward: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Which of the offers ``(n, w)`` for a place leaves each row's label the smallest lead ``(n,)``, and that lead."""
    logits = decide_offers(defense, z, company, offers, place=place)
    width = offers.shape[1]
    aims = None if toward is None else toward.repeat_interleave(width)
    leads = _lead(logits.flatten(0, 1), y.repeat_interleave(width), aims)
    lowest, which = leads.view(-1, width).min(dim=1)
    return offers.gather(1, which.unsqueeze(1)).squeeze(1), lowest


def _lead(logits: Tensor, y: Tensor, toward: Tensor | None) -> Tensor:
    """The lead of each row's label ``(n,)`` over the likeliest other class, or over the one aimed at.

    In the second case nothing is below an answer that is wrong already, whichever class it names.
    """
    lead = -margin(logits.float(), y)
    return lead if toward is None else _lead_over(logits, y, toward).masked_fill(lead < 0, -torch.inf)


def _lead_over(logits: Tensor, y: Tensor, toward: Tensor) -> Tensor:
    logits = logits.float()
    return (logits.gather(1, y.unsqueeze(1)) - logits.gather(1, toward.unsqueeze(1))).squeeze(1)


@dataclass(frozen=True)
class CompositionAttack:
    """The choice of the clean images that sit beside each image of a batch, whose own points stay as they are.

    No image sits twice in a batch.

    Attributes:
        company: the pool, and who sits where at first.
        identity: of each image of the pool ``(P,)``.
        classes: what the target takes each for ``(P,)``.
        own: of the batch's images ``(B,)``.
        trials: batches tried for each image; `CHEAPER` times as many in closed form.
        greedy: whether to compare several images in a place, so that every place is tried about once, or one.
    """

    company: Company
    identity: Tensor
    classes: Tensor
    own: Tensor
    trials: int
    greedy: bool

    def __call__(self, trial: AttackedBatch, generator: torch.Generator) -> Tensor:
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
            return torch.where(
                self._allowed(company.index, drawn, self.own), drawn, company.index[:, place : place + 1]
            )

        found, _ = descend(
            trial.target, trial.start.z, trial.batch.y, self.company, places=places, candidates=candidates
        )
        trial.regroup(found)
        return trial.start.x

    def pursue(self, trial: AttackedBatch, generator: torch.Generator, *, turn: int) -> Tensor:
        """Move each image towards one class, and choose its company towards the same class anew as it moves.

        Chosen in turn, company and image settle where neither alone leads on, so pursuits start from company gathered
        in several ways, and a third of them from random points.

        Args:
            trial: the trial.
            generator: draws starts, places and images.
            turn: from 0; each goes to the next class among the likeliest others, after the last to the first again.

        Returns:
            the last points.
        """
        ball, y, moves = trial.ball, trial.batch.y, per_image(trial.counted, trial.batch.x)
        again, rank = divmod(turn, min(RANKS, trial.batch.logits.shape[1] - 1))
        toward = most_likely_others(trial.regroup(self.company), y, rank)
        gathered = self._gathered(y, toward, self.own, STARTS[again % len(STARTS)], generator)
        company = self.company if gathered is None else self.company.seating(gathered)
        point, momentum = trial.start.x, torch.zeros_like(trial.batch.x)
        if (again + rank) % 3 == 2:
            point = torch.where(moves, ball.random(trial.batch.x, generator), point)
        for step in range(STEPS + 1):
            rows = trial.counted.nonzero().flatten()
            if len(rows) == 0:
                return point
            if step % REGROUP_EVERY == 0:
                if step > 0 or gathered is None:
                    company = self._towards(trial, company, toward, rows, generator)
                trial.regroup(company)
            point = point.detach().requires_grad_(step < STEPS)
            with torch.set_grad_enabled(step < STEPS):
                answers = [trial(point) for _ in range(trial.eot)]
            if step == STEPS:
                return point
            lead = torch.stack([_lead_over(logits, y, toward)[rows].sum() for logits in answers]).sum()
            (gradient,) = torch.autograd.grad(lead, point)
            momentum = MOMENTUM * momentum - ball.unit(gradient)
            length = ball.eps * (FIRST_STEP + (LAST_STEP - FIRST_STEP) * step / (STEPS - 1))
            moved = ball.project(point.detach() + length * ball.ascent(momentum), trial.batch.x)
            point = torch.where(moves, moved, trial.start.x)
        raise AssertionError("the last step returns")

    def _gathered(
        self, y: Tensor, toward: Tensor, own: Tensor, sizes: Sizes, generator: torch.Generator
    ) -> Tensor | None:
        """Company drawn at random ``(n, B - 1)`` but for how many images of two classes it has, as far as there are.

        ``None`` where the pool holds too few images.
        """
        distinct = (self.identity.unsqueeze(1) == self.identity).int().argmax(dim=1)  # where each comes first
        first = distinct == torch.arange(len(distinct), device=distinct.device)
        able = first & (self.identity != own.unsqueeze(1))
        seats = self.company.index.shape[1]
        if int(able.sum(dim=1).min()) < seats:
            return None
        key = torch.rand(able.shape, generator=generator).to(able.device)
        for aim, size in zip((y, toward), sizes, strict=True):
            if size is None:
                continue
            members = able & (self.classes == aim.unsqueeze(1))
            order = key.masked_fill(~members, -1).argsort(dim=1, descending=True).argsort(dim=1)
            key = key + torch.where(order < size, 2, -2) * members
        return key.masked_fill(~able, -torch.inf).topk(seats, dim=1).indices

    def _towards(
        self, trial: AttackedBatch, company: Company, toward: Tensor, rows: Tensor, generator: torch.Generator
    ) -> Company:
        """Choose the company of some rows anew as the images stand: whole, then one image for each place in turn."""
        target, z, y, own = trial.target, trial.latest.z[rows], trial.batch.y[rows], self.own[rows]
        toward = toward[rows]
        mine = Company(company.pool, company.index[rows], company.seats[rows])
        with torch.no_grad():
            lead = _lead(decide_each(target, z, mine), y, toward)
            for sizes in JUMPS:
                index = self._gathered(y, toward, own, sizes, generator)
                if index is None:
                    break
                found = _lead(decide_each(target, z, mine.seating(index)), y, toward)
                mine = mine.seating(torch.where((found < lead).unsqueeze(1), index, mine.index))
                lead = torch.minimum(lead, found)
        offers = self._offers(y, toward, generator)

        def candidates(place: int, now: Company) -> Tensor:
            drawn = offers[:, place]
            return torch.where(self._allowed(now.index, drawn, own), drawn, now.index[:, place : place + 1])

        places = torch.randperm(offers.shape[1], generator=generator).tolist()
        mine, _ = descend(target, z, y, mine, places=places, candidates=candidates, toward=toward)
        return company.seating(company.index.index_copy(0, rows, mine.index))

    def _offers(self, y: Tensor, toward: Tensor, generator: torch.Generator) -> Tensor:
        """Images for every place ``(n, B - 1, OFFERED)``, more of the two classes that a lead is between."""
        seats, size = self.company.index.shape[1], len(self.identity)
        weights = torch.full((len(y), size), 1 / size, device=y.device)
        for aim in (y, toward):
            members = self.classes == aim.unsqueeze(1)
            weights = weights + FOCUS * members / members.sum(dim=1, keepdim=True).clamp(min=1)
        drawn = torch.multinomial(weights.cpu(), seats * OFFERED, replacement=True, generator=generator)
        return drawn.view(len(y), seats, OFFERED).to(self.company.index)

    def _allowed(self, index: Tensor, drawn: Tensor, own: Tensor) -> Tensor:
        """Whether an image drawn for a row ``(n, w)`` is neither its own nor in its company."""
        identity = self.identity[drawn]
        taken = (self.identity[index].unsqueeze(2) == identity.unsqueeze(1)).any(dim=1)
        return ~taken & (identity != own.unsqueeze(1))
