"""Where a search with gradients ended."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Found(NamedTuple):
    """Where a search ended.

    Attributes:
        x: the point of highest loss of every sample ``(B, ...)``, fooled or not.
        loss: that loss ``(B,)``.
    """

    x: Tensor
    loss: Tensor
