"""The verdict on a target that may answer at random: by the majority of several answers."""

from __future__ import annotations

import torch
from torch import Tensor

from msa_eval.attacks.losses import margin
from msa_eval.defense import Defense, decide


def decide_by_majority(defense: Defense, z: Tensor, y: Tensor, *, draws: int) -> Tensor:
    """Ask a target an odd number of times; each sample's verdict is the answer of the median lead.

    Args:
        defense: the target.
        z: features of the whole batch ``(B, ...)``.
        y: labels ``(B,)``.
        draws: how many times to ask.

    Returns:
        logits ``(B, k)``: wrong exactly where the majority of the answers are.
    """
    if draws == 1:
        return decide(defense, z)
    return median_draw(torch.stack([decide(defense, z) for _ in range(draws)]), y)


def median_draw(drawn: Tensor, y: Tensor) -> Tensor:
    """Of several answers, each sample's own with the median lead of its label.

    Args:
        drawn: logits ``(r, B, k)``, r an odd number.
        y: labels ``(B,)``.

    Returns:
        logits ``(B, k)``: right exactly where the majority of the draws are.

    >>> median_draw(torch.tensor([[[1.0, 0.0]], [[0.0, 2.0]], [[3.0, 0.0]]]), torch.tensor([0]))
    tensor([[1., 0.]])
    """
    leads = torch.stack([-margin(answer, y) for answer in drawn])
    # Sorted by lead, and at equal leads the wrong ones first, so that the middle one tells the majority even in a tie.
    right = drawn.argmax(dim=2) == y
    by_right = right.long().argsort(dim=0, stable=True)
    order = by_right.gather(0, leads.gather(0, by_right).argsort(dim=0, stable=True))
    return drawn[order[len(drawn) // 2], torch.arange(len(y), device=y.device)]
