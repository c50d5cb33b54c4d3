"""Several surrogates attacked at once, on one trunk pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from msa_eval.defense.contract import Defense
from msa_eval.surrogates.registry import Surrogate


@dataclass(frozen=True)
class Ensemble:
    """Several surrogates, each with its logits brought to one scale.

    Attributes:
        name: as tables call it.
        members: at least two.
        scales: the spread of each member's clean logits ``(S, 1, 1)``, by which they are divided.
    """

    name: str
    members: tuple[Surrogate, ...]
    scales: Tensor

    @property
    def on_images(self) -> bool:
        """Whether no member sends a gradient through the defence's own trunk."""
        return all(member.on_images for member in self.members)


def ensemble(name: str, members: Sequence[Surrogate], defense: Defense, x: Tensor, z: Tensor) -> Ensemble:
    """Bring surrogates together.

    A distance and an FC logit differ in size by an order of magnitude; without a common scale one loss would drown
    the others.

    Args:
        name: as tables call it.
        members: the surrogates.
        defense: the target.
        x: a clean batch of images ``(B, C, H, W)``.
        z: its features ``(B, ...)``.
    """
    with torch.no_grad():
        scales = [_spread(member.logits(defense, x if member.on_images else z)) for member in members]
    return Ensemble(name, tuple(members), torch.stack(scales).view(-1, 1, 1))


def _spread(logits: Tensor) -> Tensor:
    """Root mean square of the logits ``(B, k)`` around each row's mean; 1 where they are all equal."""
    spread = (logits - logits.mean(dim=1, keepdim=True)).pow(2).mean().sqrt()
    return torch.where(spread > 0, spread, torch.ones_like(spread))
