"""Batches put together from points known beforehand, one row exchanged at a time, and what labels lead by there.

HPM's prototypes are linear in the sums of the rows assigned to each class, and its logits are functions of inner
products. So what a row's label leads a class by, when one image of its batch moves to any of its points, comes from
sums that are carried along and one product of matrices for all rows and points: nothing is assigned or mixed twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

NORM = 1e-12
"""The least norm that a cosine divides by, as in torch."""


class Known(NamedTuple):
    """Features of the points of each image, and what they do to prototypes.

    Attributes:
        z: features ``(..., d)``.
        assigned: the class that each is assigned to ``(...)``.
        moved: what each adds to the prototype of its class, but for the division by their number ``(..., d)``.
        squared: the inner product of that with itself ``(...)``.
    """

    z: Tensor
    assigned: Tensor
    moved: Tensor
    squared: Tensor


@dataclass(frozen=True)
class Exchange:
    """A decision by prototypes ``anchor + matrix @ mean``, as the mixtures of points need it.

    All is in float64, so that what is carried along stays as exact as what is computed anew.

    Attributes:
        anchor: what the prototypes are without a batch ``(k, d)``.
        matrix: ``(d, d)``.
        kind: of comparison, as in `msa_eval.hpm.model.similarity`.
        epsilon: that is added to the number of rows in a class.
        assign: maps features ``(B, d)`` to the logits ``(B, k)`` that assign.
    """

    anchor: Tensor
    matrix: Tensor
    kind: str
    epsilon: float
    assign: Callable[[Tensor], Tensor]

    def know(self, z: Tensor) -> Known:
        """What is to be known of a batch of points, from its features ``(B, d)``."""
        with torch.no_grad():
            exact = z.double()
            moved = exact @ self.matrix.T
            return Known(exact, self.assign(z).argmax(dim=1), moved, moved.pow(2).sum(dim=1))

    def table(self, points: Sequence[Known]) -> Known:
        """The same of P batches of points, image by image: ``(B, P, ...)``."""
        return Known(*(torch.stack(parts, dim=1) for parts in zip(*points, strict=True)))

    def compare(self, zz: Tensor, zv: Tensor, vv: Tensor) -> Tensor:
        """Logits from the inner products of features and prototypes with themselves and with each other."""
        if self.kind == "inner":
            return zv
        if self.kind == "cosine":
            return zv / (zz.sqrt().clamp(min=NORM) * vv.sqrt().clamp(min=NORM))
        return -(zz - 2 * zv + vv).clamp(min=0).sqrt()
