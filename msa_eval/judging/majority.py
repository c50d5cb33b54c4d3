"""The verdict on a target that may answer at random: by the majority of several answers.

An attack shows such a target hundreds of batches, and chance alone would break what is wrong in four answers out of
ten. So a break is asked about three times, each time with fresh and more answers:

- at every look, `StochasticBudget.draws` of them: most must be wrong;
- at every look that found most of them wrong, `CONFIRM` times as many: clearly most must be wrong, by two standard
  errors, or a search would be content with a batch that is as good as a coin, and stop there;
- after the run, `JUDGE` times as many, on the very batch that will prove the break: clearly most, by four standard
  errors. What fails is taken back.

With 9 draws that is 5 of 9, 60 of 99, and 563 of 999. A sample whose answers on that batch are wrong half of the time
passes the last in 1 of 30,000 cases. Whatever its chance, it passes and then fails a replay with as many fresh draws,
where a plain majority counts, in 1 of 1,900 at the most. The price: what is wrong in 50 to 56 % of the answers is
mostly taken back, though a majority is wrong.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from msa_eval.attacks.losses import margin_loss
from msa_eval.defense.contexts import decide_draws
from msa_eval.defense.contract import Defense, decide

CONFIRM, CONFIRM_SIGMAS = 11, 2.0
"""A break is confirmed at once by so many times the draws of a verdict, and this clearly."""
JUDGE, JUDGE_SIGMAS = 111, 4.0
"""A broken sample is judged once more, after the run, by so many times the draws, and this clearly."""


def clear_majority(draws: int, sigmas: float = 0.0) -> int:
    """How many of so many answers are most of them, clearly so.

    The lower end of the Wilson interval of so many standard errors around their share is above one half.

    >>> clear_majority(9), clear_majority(99, CONFIRM_SIGMAS), clear_majority(999, JUDGE_SIGMAS)
    (5, 60, 563)
    """
    return math.floor((draws + sigmas * math.sqrt(draws)) / 2) + 1


def decide_by_majority(defense: Defense, z: Tensor, y: Tensor, *, draws: int, sigmas: float = 0.0) -> Tensor:
    """Ask a target an odd number of times; each sample's verdict is the answer that tells of the majority.

    Args:
        defense: the target.
        z: features of the whole batch ``(B, ...)``.
        y: labels ``(B,)``.
        draws: how many times to ask.
        sigmas: how clear a majority of wrong answers must be, in standard errors.

    Returns:
        logits ``(B, k)``: wrong exactly where such a majority of the answers are.
    """
    if draws == 1:
        return decide(defense, z)
    return telling_draw(decide_draws(defense, z, draws), y, sigmas=sigmas)


def telling_draw(drawn: Tensor, y: Tensor, *, sigmas: float = 0.0) -> Tensor:
    """Of several answers, each sample's own that tells of the majority: by default, that of its label's median margin.

    Args:
        drawn: logits ``(r, B, k)``, r an odd number.
        y: labels ``(B,)``.
        sigmas: how clear a majority of wrong draws must be, in standard errors.

    Returns:
        logits ``(B, k)``: wrong exactly where such a majority of the draws are.

    >>> telling_draw(torch.tensor([[[1.0, 0.0]], [[0.0, 2.0]], [[3.0, 0.0]]]), torch.tensor([0]))
    tensor([[1., 0.]])
    """
    margins = torch.stack([-margin_loss(answer, y) for answer in drawn])
    # Sorted by margin, and at equal margins the wrong ones first: so the telling one tells the majority even in a tie.
    right = drawn.argmax(dim=2) == y
    by_right = right.long().argsort(dim=0, stable=True)
    order = by_right.gather(0, margins.gather(0, by_right).argsort(dim=0, stable=True))
    return drawn[order[clear_majority(len(drawn), sigmas) - 1], torch.arange(len(y), device=y.device)]
