"""The perturbation set: a norm ball around each image, cut with the [0, 1] box."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor

from msa_eval.attacks.l1 import FIRST_SHARE, onto_l1, sparse_signs
from msa_eval.device import onto

Norm = Literal["Linf", "L2", "L1"]


@dataclass(frozen=True)
class Ball:
    """All perturbations an attacker may use.

    Args:
        norm: ``Linf``, ``L2`` or ``L1``.
        eps: the radius, in [0, 1] pixel units (for L2 and L1, of the whole image).
        levels: points are rounded to this many even levels before they are judged (see `Grid`); ``None``: no rounding.
            Seeds do not depend on it.

    Raises:
        ValueError: when the norm is unknown or the radius is not a finite, non-negative number.
    """

    norm: Norm
    eps: float
    levels: int | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.norm not in get_args(Norm):
            raise ValueError(f"expected norm to be one of {', '.join(get_args(Norm))}, but got {self.norm!r}")
        if not 0 <= self.eps < float("inf"):
            raise ValueError(f"expected eps to be a non-negative number, but got {self.eps}")

    def check_radius(self, pixels: int) -> None:
        """Check that the ball does not reach so far that every image can be erased.

        Around each image in [0, 1] a ball of radius 0.5 (L2: 0.5 √d, L1: 0.5 d) holds the same grey one, and whoever
        can make all images the same brings every classifier down to chance: nothing of it is measured.

        Args:
            pixels: d, the numbers an image has, channels included.

        Raises:
            ValueError: when it does.

        >>> Ball("Linf", 8 / 255).check_radius(3072)
        """
        erasing = self.erasing(pixels)
        if self.eps < erasing:
            return
        in_levels = self.eps >= 1 and self.eps / 255 < erasing
        meant = f"did you mean {self.eps:g}/255?" if in_levels else "take a smaller one"
        raise ValueError(
            f"threat.eps is {self.eps:g} in pixels from 0 to 1, but from {self.norm} {erasing:.4g} on "
            f"every image can be made the same grey one, and no classifier withstands that; {meant}"
        )

    def erasing(self, pixels: int) -> float:
        """The radius from which on a ball around any image holds the grey one.

        >>> Ball("L1", 1.0).erasing(100), Ball("L2", 1.0).erasing(100), Ball("Linf", 0.1).erasing(100)
        (50.0, 5.0, 0.5)
        """
        return 0.5 * {"Linf": 1.0, "L2": math.sqrt(pixels), "L1": float(pixels)}[self.norm]

    def size(self, delta: Tensor) -> Tensor:
        """The norm of each perturbation ``(B, ...)``: ``(B,)``.

        >>> Ball("L2", 1.0).size(torch.tensor([[3.0, 4.0]]))
        tensor([5.])
        """
        flat = delta.flatten(1)
        if self.norm == "Linf":
            return torch.maximum(flat.amax(dim=1), -flat.amin(dim=1))
        if self.norm == "L1":
            return flat.abs().sum(dim=1)
        return flat.pow(2).sum(dim=1).sqrt()

    def unit(self, delta: Tensor) -> Tensor:
        """Scale each perturbation ``(B, ...)`` to norm 1 (zero stays zero)."""
        return delta / (per_image(self.size(delta), delta) + 1e-12)

    def ascent(self, gradient: Tensor) -> Tensor:
        """The direction of norm 1 that raises a loss of this gradient ``(B, ...)`` fastest; a tensor of its own.

        For L1 that would be one number of the image; a fifth of them, the largest, get further within the box.
        """
        if self.norm == "L1":
            return sparse_signs(gradient, torch.full_like(gradient.flatten(1)[:, 0], FIRST_SHARE))
        return gradient.sign() if self.norm == "Linf" else self.unit(gradient)

    def project(self, points: Tensor, x: Tensor) -> Tensor:
        """Bring points ``(B, ...)`` back into the ball around ``x`` and into [0, 1].

        Clipping to the box moves towards ``x``, which lies in it, so it never leaves the ball again.

        >>> Ball("Linf", 0.25).project(torch.tensor([[1.0]]), torch.tensor([[0.5]]))
        tensor([[0.7500]])
        """
        return self.projection(x)(points.clone())

    def projection(self, x: Tensor) -> Callable[[Tensor], Tensor]:
        """`project` for many points around the same images ``(B, ...)``; it may write over the points it is given."""
        if self.norm == "Linf":
            low, high = (x - self.eps).clamp_(min=0), (x + self.eps).clamp_(max=1)
            return lambda points: points.clamp_(low, high)

        if self.norm == "L1":
            below, above = x.flatten(1), 1 - x.flatten(1)

            def within(points: Tensor) -> Tensor:
                delta = points.sub_(x).flatten(1)
                room = torch.where(delta > 0, above, below)
                return onto_l1(delta, room, self.eps * (1 - 1e-6)).view_as(x).add(x).clamp_(0, 1)

            return within

        def onto(points: Tensor) -> Tensor:
            delta = points.sub_(x)
            size = per_image(self.size(delta), delta)
            return (delta / (size + 1e-12) * size.clamp(max=self.eps)).add_(x).clamp_(0, 1)

        return onto

    def random(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Random points on the ball's surface around ``x`` ``(B, ...)``, clipped to [0, 1].

        As in AutoAttack, Linf noise is uniform and then scaled so that its largest entry reaches the surface, and L1
        noise is Gaussian and projected.
        """
        shape = x.shape
        if self.norm == "Linf":
            noise = 2 * torch.rand(shape, generator=generator, device=generator.device) - 1
        else:
            noise = torch.randn(shape, generator=generator, device=generator.device)
        noise = onto(noise, x.device).to(x)
        if self.norm == "L1":
            return self.project(x + noise, x)
        return (x + self.eps * self.unit(noise)).clamp(0, 1)

    def excess(self, points: Tensor, x: Tensor) -> Tensor:
        """How far each point ``(B, ...)`` lies outside the ball or the box, in pixel units: ``(B,)``; 0 inside.

        What rounding in float32 can cause is not counted; a NaN is infinitely far outside.
        """
        flat = points.flatten(1)
        return self.beyond(self.size(points - x), flat.amin(dim=1), flat.amax(dim=1))

    def beyond(self, size: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """`excess` of points whose perturbations have such norms, and whose pixels such bounds: as they are shaped."""
        tolerance = 1e-6 + 1e-5 * (0.0 if self.norm == "Linf" else self.eps)
        outside = torch.maximum(size - self.eps - tolerance, torch.maximum(-low, high - 1))
        return outside.nan_to_num(nan=float("inf")).clamp(min=0)


def per_image(values: Tensor, images: Tensor) -> Tensor:
    """Shape one value a sample ``(B,)`` so that it broadcasts over images ``(B, ...)``."""
    return values.view(-1, *[1] * (images.ndim - 1))
