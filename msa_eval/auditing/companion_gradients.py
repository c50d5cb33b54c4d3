"""Whether a gradient reaches an image's companions, where they change its answer."""

from __future__ import annotations

import torch

from msa_eval.auditing.gradient_truth import HardResponse
from msa_eval.randomness import seeded
from msa_eval.surrogates.registry import Surrogate

CHANGED = 1e-3
"""By more than this share of the largest margin an answer has to change."""


def companions_matter(hard: HardResponse) -> bool:
    """Whether margins of every second image change when the others move to the points of a short search."""
    x, reached = hard.points
    moved = x.clone()
    moved[1::2] = reached[1::2]
    before, after = hard.margin_loss(x)[::2], hard.margin_loss(moved)[::2]
    return bool((after - before).abs().max() > CHANGED * before.abs().max())


def reaches_companions(hard: HardResponse, surrogate: Surrogate) -> bool:
    """Whether logits of every second image have a gradient with respect to the others, that is not zero throughout.

    It is asked at the clean images, where every search begins.
    """
    defense, leaf = hard.defense, hard.points[0].detach().clone().requires_grad_()
    with seeded(0), torch.enable_grad():
        try:
            logits = surrogate.logits(defense, leaf if surrogate.on_images else defense.features(leaf))
            (found,) = torch.autograd.grad(logits[::2].float().pow(2).sum(), leaf, allow_unused=True)
        except RuntimeError:
            return False
    return found is not None and bool((found[1::2] != 0).any())
