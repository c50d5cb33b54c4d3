"""Points on a grid of levels, so that what breaks a sample still does when it was written to a file of images."""

from __future__ import annotations

import torch
from torch import Tensor

from msa_eval.attacks.ball import Ball, per_image
from msa_eval.data.levels import from_level, level_of, onto_levels

SHRINKS = (0.99, 0.97, 0.93, 0.85, 0.7)
"""Of an L2 or L1 ball, a perturbation that rounding brought outside is shortened to such shares, and rounded again."""


class Grid:
    """Rounding to the points of a ball that lie on its grid of levels.

    Args:
        ball: with a number of levels.
        x: clean images ``(B, ...)`` on the grid.
    """

    def __init__(self, ball: Ball, x: Tensor) -> None:
        assert ball.levels is not None
        self._ball, self._x, self._levels = ball, x, ball.levels
        self._reach = int(ball.eps * (ball.levels - 1) + 1e-6)

    def round(self, points: Tensor, rows: Tensor | None = None) -> Tensor:
        """Bring points to the grid, within ball and box; a gradient passes as if they had stayed.

        Args:
            points: inside the ball, of all images or of some rows.
            rows: the places of these ``(n,)``.
        """
        x = self._x if rows is None else self._x.index_select(0, rows)
        found = self._rounded(points.detach(), x)
        return found + (points - points.detach()) if points.requires_grad else found

    def _rounded(self, points: Tensor, x: Tensor) -> Tensor:
        if self._ball.norm == "Linf":
            number, own = level_of(points, self._levels), level_of(x, self._levels)
            number = torch.maximum(torch.minimum(number, own + self._reach), own - self._reach)
            return from_level(number.clamp_(0, self._levels - 1), self._levels)
        found = onto_levels(points.clamp(0, 1), self._levels)
        for share in SHRINKS:
            outside = self._outside(found, x)
            if not bool(outside.any()):
                return found
            shorter = onto_levels((x + share * (points - x)).clamp(0, 1), self._levels)
            found = torch.where(per_image(outside, x), shorter, found)
        # Towards the clean image every number only shrinks.
        numbers, own = points * (self._levels - 1), level_of(x, self._levels)
        towards = from_level((own + (numbers - own).trunc()).clamp_(0, self._levels - 1), self._levels)
        return torch.where(per_image(self._outside(found, x), x), towards, found)

    def _outside(self, points: Tensor, x: Tensor) -> Tensor:
        return self._ball.size(points - x) > self._ball.eps


def off_grid(points: Tensor, levels: int) -> float:
    """How far points ``(B, ...)`` lie from the grid of so many levels at most; exactly 0 on it."""
    return float((points - onto_levels(points, levels)).abs().max()) if points.numel() else 0.0
