"""Averages over noise: for a target whose gradient is true at no point, but on average.

References:
    Obfuscated Gradients Give a False Sense of Security (Athalye, Carlini & Wagner, 2018), arXiv:1802.00420, section 4.2
    (expectation over transformation); Black-box Adversarial Attacks with Limited Queries and Information (Ilyas et al.,
    2018), arXiv:1804.08598, section 2.1 (NES).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from msa_eval.device import in_float64, onto
from msa_eval.surrogates.registry import Surrogate

DRAWS, PAIRS = 8, 12
"""Noisy images that a surrogate is averaged over, and pairs of steps that a gradient is estimated from."""


@dataclass(frozen=True)
class Averaged:
    """The mean of a surrogate's logits over noise on the images, the same noise for every batch of a shape.

    Attributes:
        surrogate: what is averaged.
        sigma: the noise's standard deviation, in pixel units.
        draws: how many noisy images.
    """

    surrogate: Surrogate
    sigma: float
    draws: int = DRAWS

    def __call__(self, defense: Any, x: Tensor) -> Tensor:
        """Logits ``(B, k)`` of images ``(B, C, H, W)``."""
        generator = torch.Generator().manual_seed(x.shape[-1])
        total: Tensor | None = None
        for _ in range(self.draws):
            noise = onto(torch.randn(x.shape, generator=generator), x.device).to(x)
            noisy = (x + self.sigma * noise).clamp(0, 1)
            given = noisy if self.surrogate.on_images else defense.features(noisy)
            logits = self.surrogate.logits(defense, given)
            total = logits if total is None else total + logits
        assert total is not None
        return total / self.draws


@dataclass(frozen=True)
class Estimated:
    """The target's own logits, with a gradient estimated from its answers to steps: for code that leaves torch.

    Attributes:
        step: the size of a step, in pixel units.
        pairs: of steps, forth and back, an estimate.
    """

    step: float
    pairs: int = PAIRS

    def __call__(self, defense: Any, x: Tensor) -> Tensor:
        """Logits ``(B, k)`` of images ``(B, C, H, W)``."""
        out: Tensor = _Estimate.apply(x, defense, self.step, self.pairs)  # type: ignore[no-untyped-call]
        return out


class _Estimate(torch.autograd.Function):
    """A decision whose gradient is estimated; rows are taken to be decided apart."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, defense: Any, step: float, pairs: int) -> Tensor:
        ctx.save_for_backward(x)
        ctx.printable = defense, step, pairs
        return _answer(defense, x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        defense, step, pairs = ctx.printable
        # The directions follow from the point, so that a search meets new ones at each of its points.
        seed = int(in_float64(x.detach()).abs().sum().mul(1e6).item()) % 2**31
        generator = torch.Generator().manual_seed(seed)
        found = torch.zeros_like(x)
        for number in range(pairs):
            direction = _direction(x, generator, fine=number % 2 == 0)
            forth, back = (x + step * direction).clamp(0, 1), (x - step * direction).clamp(0, 1)
            with torch.no_grad():
                change = ((_answer(defense, forth) - _answer(defense, back)) * gradients[0]).sum(dim=1)
            found += change.view(-1, *[1] * (x.ndim - 1)) * direction
        return found / (2 * step * pairs), None, None, None


def _answer(defense: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        out: Tensor = defense.logits(defense.features(x))
    return out.detach().float()


def _direction(x: Tensor, generator: torch.Generator, *, fine: bool) -> Tensor:
    """Random signs: of single pixels, or of squares a few pixels wide."""
    if fine or x.ndim != 4:
        return onto(torch.randint(0, 2, x.shape, generator=generator) * 2.0 - 1, x.device).to(x)
    height, width = (max(1, round(size / 4)) for size in x.shape[-2:])
    signs = torch.randint(0, 2, (*x.shape[:2], height, width), generator=generator) * 2.0 - 1
    return onto(F.interpolate(signs, x.shape[-2:], mode="nearest"), x.device).to(x)
