"""The choice of an image's companions from what is cached, which costs decisions and no passes.

The search is a coordinate descent: in one place after another, several images are tried, and the one is kept that
leaves the label the smallest margin.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from msa_eval.attacks.attacked_batch import Attack, AttackedBatch
from msa_eval.attacks.ball import per_image
from msa_eval.attacks.batch import CompanionPool
from msa_eval.attacks.losses import margin_loss, most_likely_others
from msa_eval.defense.contexts import Companions, decide_each, decide_offers
from msa_eval.defense.contract import Defense

Candidates = Callable[[int, Companions], Tensor]
"""``(place, companions) -> (n, w)``: what each row may put in a place of its companions, as places in the pool."""

STEPS, REGROUP_EVERY, OFFERED = 30, 5, 16
"""A pursuit's steps, how often companions are chosen anew between them, and from how many images in a place."""

RANKS = 6
"""Pursuits go towards so many classes in turn."""

Sizes = tuple[int | None, int | None]
"""How many images of the label's class, and of the class aimed at, are to be companions; ``None`` leaves that open."""

ALL = sys.maxsize
STARTS: tuple[Sizes, ...] = ((ALL, None), (0, None), (ALL, 0))
"""The companions that pursuits start with, once towards every class, then the next."""

JUMPS: tuple[Sizes, ...] = tuple((label, aim) for label in (0, 1, ALL) for aim in (0, 1, ALL))
"""Whole sets of companions tried before single places are, for no step of one image leads from a crowd to none."""

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
    companions: Companions,
    *,
    places: Sequence[int],
    candidates: Candidates,
    toward: Tensor | None = None,
) -> tuple[Companions, Tensor]:
    """Lower the margin of each row's label by the choice of its companions.

    Args:
        defense: the target.
        z: features of the rows ``(n, ...)``.
        y: their labels ``(n,)``.
        companions: who sits beside each at first.
        places: which places of the companions to try, in this order.
        candidates: what to try there, beside what is there.
        toward: the class that each row's margin is over ``(n,)``; the likeliest other one by default.

    Returns:
        the companions found, and the margins ``(n,)``; with ``toward``, minus infinity where the label leads no more.
    """
    with torch.no_grad():
        margin = _margin(decide_each(defense, z, companions), y, toward)
    for place in places:
        offers = candidates(place, companions)
        best, found = best_offer(defense, z, y, companions, offers, place=place, toward=toward)
        better = found < margin
        index = companions.index.clone()
        index[:, place] = torch.where(better, best, index[:, place])
        companions, margin = companions.with_companions(index), torch.where(better, found, margin)
    return companions, margin


def best_offer(
    defense: Defense,
    z: Tensor,
    y: Tensor,
    companions: Companions,
    offers: Tensor,
    *,
    place: int | None,
    toward: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Which of the offers ``(n, w)`` for a place leaves each row's label the smallest margin ``(n,)``, and this."""
    logits = decide_offers(defense, z, companions, offers, place=place)
    width = offers.shape[1]
    aims = None if toward is None else toward.repeat_interleave(width)
    margins = _margin(logits.flatten(0, 1), y.repeat_interleave(width), aims)
    lowest, which = margins.view(-1, width).min(dim=1)
    return offers.gather(1, which.unsqueeze(1)).squeeze(1), lowest


def _margin(logits: Tensor, y: Tensor, toward: Tensor | None) -> Tensor:
    """The lead of each row's label ``(n,)`` over the likeliest other class, or over the one aimed at.

    In the second case nothing is below an answer that is wrong already, whichever class it names.
    """
    margin = -margin_loss(logits.float(), y)
    return margin if toward is None else _margin_over(logits, y, toward).masked_fill(margin < 0, -torch.inf)


def _margin_over(logits: Tensor, y: Tensor, toward: Tensor) -> Tensor:
    logits = logits.float()
    return (logits.gather(1, y.unsqueeze(1)) - logits.gather(1, toward.unsqueeze(1))).squeeze(1)


@dataclass(frozen=True)
class CompositionAttack(Attack):
    """The choice of the clean images that sit beside each image of a batch, whose own points stay as they are.

    Attributes:
        trials: batches tried for each image; `CHEAPER` times as many in closed form.
        greedy: whether to compare several images in a place, so that every place is tried about once, or one.
    """

    label = "composition"
    from_history = True

    trials: int
    greedy: bool

    def __call__(self, attacked: AttackedBatch, generator: torch.Generator) -> Tensor:
        """Return the points, unchanged; the companions found are in the batch's record."""
        assert attacked.pool is not None
        return CompanionSearch(attacked.pool, self.trials, self.greedy).choose(attacked, generator)


@dataclass(frozen=True)
class CompanionPursuit(Attack):
    """Each image moved towards one class, its companions chosen towards the same class anew as it moves.

    Attributes:
        turn: from 0; each goes to the next class among the likeliest others, after the last to the first again.
    """

    label = "pursuit"
    from_history = True

    turn: int

    def __call__(self, attacked: AttackedBatch, generator: torch.Generator) -> Tensor:
        """Return the last points."""
        assert attacked.pool is not None
        return CompanionSearch(attacked.pool).pursue(attacked, generator, turn=self.turn)


@dataclass(frozen=True)
class CompanionSearch:
    """The choice of the clean images that sit beside each image of a batch, whose own points stay as they are.

    No image sits twice in a batch.

    Attributes:
        pool: the images to choose from, and who sits where at first.
        trials: batches tried for each image; `CHEAPER` times as many in closed form.
        greedy: whether to compare several images in a place, so that every place is tried about once, or one.
    """

    pool: CompanionPool
    trials: int = 0
    greedy: bool = True

    def choose(self, attacked: AttackedBatch, generator: torch.Generator) -> Tensor:
        """Return the points, unchanged; the companions found are in the batch's record."""
        attacked.regroup(self.pool.companions)
        seats = self.pool.companions.index.shape[1]
        if seats == 0:
            return attacked.start.x
        trials = self.trials * (CHEAPER if hasattr(attacked.target, "logits_with") else 1)
        width = -(-trials // seats) if self.greedy else 1
        places = torch.randint(seats, (-(-trials // width),), generator=generator).tolist()

        def candidates(place: int, companions: Companions) -> Tensor:
            shape = len(self.pool.own), width
            drawn = torch.randint(len(self.pool.identity), shape, generator=generator).to(companions.index)
            allowed = self._allowed(companions.index, drawn, self.pool.own)
            return torch.where(allowed, drawn, companions.index[:, place : place + 1])

        found, _ = descend(
            attacked.target,
            attacked.start.z,
            attacked.batch.y,
            self.pool.companions,
            places=places,
            candidates=candidates,
        )
        attacked.regroup(found)
        return attacked.start.x

    def pursue(self, attacked: AttackedBatch, generator: torch.Generator, *, turn: int) -> Tensor:
        """Move each image towards one class, and choose its companions towards the same class anew as it moves.

        Chosen in turn, companions and image settle where neither alone leads on, so pursuits start from companions
        gathered in several ways, and a third of them from random points.

        Args:
            attacked: the batch under attack.
            generator: draws starts, places and images.
            turn: from 0; each goes to the next class among the likeliest others, after the last to the first again.

        Returns:
            the last points.
        """
        ball, y, moves = attacked.ball, attacked.batch.y, per_image(attacked.counted, attacked.batch.x)
        again, rank = divmod(turn, min(RANKS, attacked.batch.logits.shape[1] - 1))
        toward = most_likely_others(attacked.regroup(self.pool.companions), y, rank)
        gathered = self._gathered(y, toward, self.pool.own, STARTS[again % len(STARTS)], generator)
        companions = self.pool.companions if gathered is None else self.pool.companions.with_companions(gathered)
        point, momentum = attacked.start.x, torch.zeros_like(attacked.batch.x)
        if (again + rank) % 3 == 2:
            point = torch.where(moves, ball.random(attacked.batch.x, generator), point)
        for step in range(STEPS + 1):
            rows = attacked.counted.nonzero().flatten()
            if len(rows) == 0:
                return point
            if step % REGROUP_EVERY == 0:
                if step > 0 or gathered is None:
                    companions = self._towards(attacked, companions, toward, rows, generator)
                attacked.regroup(companions)
            point = point.detach().requires_grad_(step < STEPS)
            with torch.set_grad_enabled(step < STEPS):
                answers = [attacked(point) for _ in range(attacked.eot)]
            if step == STEPS:
                return point
            margin = torch.stack([_margin_over(logits, y, toward)[rows].sum() for logits in answers]).sum()
            (gradient,) = torch.autograd.grad(margin, point)
            momentum = MOMENTUM * momentum - ball.unit(gradient)
            length = ball.eps * (FIRST_STEP + (LAST_STEP - FIRST_STEP) * step / (STEPS - 1))
            moved = ball.project(point.detach() + length * ball.ascent(momentum), attacked.batch.x)
            point = torch.where(moves, moved, attacked.start.x)
        raise AssertionError("the last step returns")

    def _gathered(
        self, y: Tensor, toward: Tensor, own: Tensor, sizes: Sizes, generator: torch.Generator
    ) -> Tensor | None:
        """Companions drawn at random ``(n, B - 1)`` but for how many images of two classes it has, as far as there are.

        ``None`` where the pool holds too few images.
        """
        distinct = (self.pool.identity.unsqueeze(1) == self.pool.identity).int().argmax(dim=1)  # where each comes first
        first = distinct == torch.arange(len(distinct), device=distinct.device)
        able = first & (self.pool.identity != own.unsqueeze(1))
        seats = self.pool.companions.index.shape[1]
        if int(able.sum(dim=1).min()) < seats:
            return None
        key = torch.rand(able.shape, generator=generator).to(able.device)
        for aim, size in zip((y, toward), sizes, strict=True):
            if size is None:
                continue
            members = able & (self.pool.classes == aim.unsqueeze(1))
            order = key.masked_fill(~members, -1).argsort(dim=1, descending=True).argsort(dim=1)
            key = key + torch.where(order < size, 2, -2) * members
        return key.masked_fill(~able, -torch.inf).topk(seats, dim=1).indices

    def _towards(
        self, attacked: AttackedBatch, companions: Companions, toward: Tensor, rows: Tensor, generator: torch.Generator
    ) -> Companions:
        """Choose the companions of some rows anew as the images stand: whole, then one image for each place in turn."""
        target, z, y, own = attacked.target, attacked.latest.z[rows], attacked.batch.y[rows], self.pool.own[rows]
        toward = toward[rows]
        mine = Companions(companions.pool, companions.index[rows], companions.seats[rows])
        with torch.no_grad():
            margin = _margin(decide_each(target, z, mine), y, toward)
            for sizes in JUMPS:
                index = self._gathered(y, toward, own, sizes, generator)
                if index is None:
                    break
                found = _margin(decide_each(target, z, mine.with_companions(index)), y, toward)
                mine = mine.with_companions(torch.where((found < margin).unsqueeze(1), index, mine.index))
                margin = torch.minimum(margin, found)
        offers = self._offers(y, toward, generator)

        def candidates(place: int, now: Companions) -> Tensor:
            drawn = offers[:, place]
            return torch.where(self._allowed(now.index, drawn, own), drawn, now.index[:, place : place + 1])

        places = torch.randperm(offers.shape[1], generator=generator).tolist()
        mine, _ = descend(target, z, y, mine, places=places, candidates=candidates, toward=toward)
        return companions.with_companions(companions.index.index_copy(0, rows, mine.index))

    def _offers(self, y: Tensor, toward: Tensor, generator: torch.Generator) -> Tensor:
        """Images for every place ``(n, B - 1, OFFERED)``, more of the two classes that a margin is between."""
        seats, size = self.pool.companions.index.shape[1], len(self.pool.identity)
        weights = torch.full((len(y), size), 1 / size, device=y.device)
        for aim in (y, toward):
            members = self.pool.classes == aim.unsqueeze(1)
            weights = weights + FOCUS * members / members.sum(dim=1, keepdim=True).clamp(min=1)
        drawn = torch.multinomial(weights.cpu(), seats * OFFERED, replacement=True, generator=generator)
        return drawn.view(len(y), seats, OFFERED).to(self.pool.companions.index)

    def _allowed(self, index: Tensor, drawn: Tensor, own: Tensor) -> Tensor:
        """Whether an image drawn for a row ``(n, w)`` is neither its own nor among its companions."""
        identity = self.pool.identity[drawn]
        taken = (self.pool.identity[index].unsqueeze(2) == identity.unsqueeze(1)).any(dim=1)
        return ~taken & (identity != own.unsqueeze(1))
