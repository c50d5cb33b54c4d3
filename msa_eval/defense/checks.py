"""What is found out about a target by passing a few images: whether rows are independent, whether companions count."""

from __future__ import annotations

import torch
from torch import Tensor

from msa_eval.defense.contract import Defense, decide


def looks_batch_dependent(defense: Defense, z: Tensor, logits: Tensor) -> bool:
    """Whether a batch is decided differently in another order, or in halves.

    Args:
        defense: a stochastic one, or one that can't take half a batch, counts as dependent.
        z: features of a batch ``(B, ...)``; of a `WholeModel`, the images.
        logits: its logits ``(B, k)``.
    """
    if len(z) < 2:
        return True
    half = len(z) // 2
    try:
        others = (decide(defense, z.flip(0)).flip(0), torch.cat([decide(defense, z[:half]), decide(defense, z[half:])]))
    except (RuntimeError, ValueError, IndexError):
        return True
    top = logits.topk(2, dim=1).values
    tolerance = 1e-3 * float((top[:, 0] - top[:, 1]).median())
    return any(not float((other - logits).abs().max()) <= tolerance for other in others)


def check_trunk(defense: Defense, x: Tensor, z: Tensor) -> None:
    """Check on a clean batch that features come from their own image alone: all caching rests on that.

    Args:
        defense: the target.
        x: images ``(B, C, H, W)``.
        z: their features ``(B, ...)``.

    Raises:
        ValueError: when half the batch has other features.
    """
    with torch.no_grad():
        half = defense.features(x[: (len(x) + 1) // 2])
    drift = float((half - z[: len(half)]).abs().max())
    if not drift <= 1e-3 * float(z.std()) + 1e-12:
        raise ValueError(
            f"features(x) of an image depend on its companions or on chance (they differ by {drift:.3g} in half the "
            f"batch); move that part into logits(z), or pass a module from images to logits"
        )
