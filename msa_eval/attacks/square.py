"""Square Attack: gradient-free random search with square-shaped changes.

References:
    Square Attack: a query-efficient black-box adversarial attack via random search
    (Andriushchenko, Croce, Flammarion & Hein, 2020), arXiv:1912.00049.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor

from msa_eval.attacks.ball import Ball, Norm, per_image
from msa_eval.attacks.losses import margin_loss
from msa_eval.device import onto

Start = Callable[[Tensor, Ball, torch.Generator], Tensor]
Propose = Callable[[Tensor, Tensor, Tensor, int, Ball, torch.Generator], Tensor]


class Queries(Protocol):
    """A batch under a query attack: it remembers the points kept so far, first the clean images."""

    def propose(self, points: Tensor, rows: Tensor) -> Tensor:
        """Logits ``(B, k)`` of the kept batch with new points ``(n, C, H, W)`` in some rows (a mask ``(B,)``)."""
        ...

    def accept(self, rows: Tensor) -> Tensor:
        """Keep these rows of the last proposal; logits ``(B, k)`` of the mixed batch that results."""
        ...


def square(
    target: Queries,
    x: Tensor,
    y: Tensor,
    *,
    attacked: Tensor,
    ball: Ball,
    queries: int,
    generator: torch.Generator,
    p_init: float = 0.8,
) -> Tensor:
    """Lower the margin of the samples of a batch by random search.

    A proposal is made for all samples that are still right at once, and those that lower their own margin are kept.
    Where the decision looks at the whole batch, the mixed batch of kept and new points was never asked about, so it
    is decided again before its margins are believed. A sample whose companions make it right again is searched again.

    Within a query all samples share the position of the square and draw their own signs.

    Args:
        target: the batch under attack, its kept points the clean images.
        x: images ``(B, C, H, W)`` in [0, 1].
        y: labels ``(B,)``.
        attacked: the samples to search for, a mask ``(B,)``; the others stay as they are.
        ball: the perturbation set.
        queries: how many proposals, at least 1; the first is the starting pattern.
        generator: draws the proposals.
        p_init: the share of pixels changed at first.

    Returns:
        the kept points ``(B, C, H, W)``.

    Raises:
        ValueError: when ``queries`` is less than 1 or ``p_init`` is outside (0, 1].
    """
    if queries < 1 or not 0 < p_init <= 1:
        raise ValueError(f"expected queries >= 1 and p_init in (0, 1], but got {queries} and {p_init}")
    start, propose = _KINDS[ball.norm]
    if not bool(attacked.any()):
        return x
    best = torch.where(per_image(attacked, x), start(x, ball, generator), x)
    target.propose(best[attacked], attacked)
    logits = target.accept(attacked)
    for query in range(1, queries):
        now = margin_loss(logits, y)
        rows = attacked & (logits.argmax(dim=1) == y)
        active = rows.nonzero().flatten()
        if not len(active):
            break
        side = _side(p_init, query, queries, x.shape)
        points = propose(best, x, active, side, ball, generator)
        proposed = target.propose(points, rows)
        better = rows & ((margin_loss(proposed, y) > now) | (proposed.argmax(dim=1) != y))
        kept = better.index_select(0, active).nonzero().flatten()
        best.index_copy_(0, active.index_select(0, kept), points.index_select(0, kept))
        logits = target.accept(better)
    return best


def _side(p_init: float, query: int, queries: int, shape: torch.Size) -> int:
    """Side of the square: the share of changed pixels halves at fixed points of a budget of 10,000 (section 3)."""
    at = int(query / queries * 10_000)
    halvings = sum(at > bound for bound in (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000))
    height, width = shape[2:]
    side = round(math.sqrt(p_init / 2**halvings * height * width))
    return min(max(side, 1), height, width)


def _signs(shape: tuple[int, ...], like: Tensor, generator: torch.Generator) -> Tensor:
    drawn = torch.randint(0, 2, shape, generator=generator, device=generator.device)
    return onto(2 * drawn - 1, like.device).to(like)


def _corner(shape: torch.Size, side: int, generator: torch.Generator) -> tuple[slice, slice]:
    """A window of the given side, anywhere in the image."""
    top, left = (
        int(torch.randint(0, length - side + 1, (), generator=generator, device=generator.device))
        for length in shape[2:]
    )
    return slice(top, top + side), slice(left, left + side)


def _stripes(x: Tensor, ball: Ball, generator: torch.Generator) -> Tensor:
    """Linf start: vertical stripes of ±ε."""
    batch, channels, _, width = x.shape
    return (x + ball.eps * _signs((batch, channels, 1, width), x, generator)).clamp(0, 1)


def _squares(best: Tensor, x: Tensor, active: Tensor, side: int, ball: Ball, generator: torch.Generator) -> Tensor:
    """Linf proposal for some places ``(n,)``: one square of ±ε, a sign a channel (Algorithm 2)."""
    rows, columns = _corner(x.shape, side, generator)
    signs = _signs((len(active), x.shape[1], 1, 1), x, generator)
    points = best.index_select(0, active)
    square = x[:, :, rows, columns].index_select(0, active)
    points[:, :, rows, columns] = square.add_(signs, alpha=ball.eps).clamp_(0, 1)
    return points


def _tiles(x: Tensor, ball: Ball, generator: torch.Generator) -> Tensor:
    """L2 start: a grid of tiles of equal norm, the whole scaled to ε."""
    batch, channels, height, width = x.shape
    side = max(min(height, width) // 5, 1)
    delta = torch.zeros_like(x)
    for top in range(0, height - side + 1, side):
        for left in range(0, width - side + 1, side):
            tile = _bump(side, x, generator) * _signs((batch, channels, 1, 1), x, generator)
            delta[:, :, top : top + side, left : left + side] = tile
    return (x + ball.eps * ball.unit(delta)).clamp(0, 1)


def _moved_mass(
    best: Tensor, x: Tensor, active: Tensor, side: int, ball: Ball, generator: torch.Generator
) -> Tensor:  # fmt: skip
    """L2 proposal for some places ``(n,)``: the norm of one window is moved to another (Algorithm 3).

    The window gets what the budget still allows, too.
    """
    best, x = best.index_select(0, active), x.index_select(0, active)
    odd = max(side, 3)
    odd = min(odd + 1 - odd % 2, *x.shape[2:])
    delta = best - x
    to, source = _corner(x.shape, odd, generator), _corner(x.shape, odd, generator)
    touched = torch.zeros(x.shape[2:], dtype=torch.bool, device=x.device)
    touched[to] = touched[source] = True

    unused = (ball.eps**2 - delta.pow(2).sum(dim=(1, 2, 3), keepdim=True)).clamp(min=0)
    mass = (delta.pow(2) * touched).sum(dim=(2, 3), keepdim=True) + unused / x.shape[1]
    here = delta[:, :, to[0], to[1]]
    shape = _bump(odd, x, generator) * _signs((*x.shape[:2], 1, 1), x, generator)
    shape = shape + here / (here.pow(2).sum(dim=(2, 3), keepdim=True).sqrt() + 1e-12)
    delta[:, :, source[0], source[1]] = 0
    unit = shape / (shape.pow(2).sum(dim=(2, 3), keepdim=True).sqrt() + 1e-12)
    delta[:, :, to[0], to[1]] = unit * mass.sqrt()
    return ball.project(x + ball.eps * ball.unit(delta), x)


def _tiles_l1(x: Tensor, ball: Ball, generator: torch.Generator) -> Tensor:
    """L1 start: a grid of tiles of L1 norm 1, projected into the ball (Croce & Hein 2021, section 5)."""
    batch, channels, height, width = x.shape
    side = max(min(height, width) // 5, 1)
    delta = torch.zeros_like(x)
    for top in range(0, height - side + 1, side):
        for left in range(0, width - side + 1, side):
            tile = _bump(side, x, generator, norm=1) * _signs((batch, channels, 1, 1), x, generator)
            delta[:, :, top : top + side, left : left + side] = tile
    return ball.project(x + delta, x)


def _moved_l1(best: Tensor, x: Tensor, active: Tensor, side: int, ball: Ball, generator: torch.Generator) -> Tensor:
    """L1 proposal for some places ``(n,)``: as `_moved_mass`, in sums of sizes, and projected."""
    best, x = best.index_select(0, active), x.index_select(0, active)
    odd = max(side, 3)
    odd = min(odd + 1 - odd % 2, *x.shape[2:])
    delta, channels = best - x, x.shape[1]
    to, source = _corner(x.shape, odd, generator), _corner(x.shape, odd, generator)
    touched = torch.zeros(x.shape[2:], dtype=torch.bool, device=x.device)
    touched[to] = touched[source] = True

    unused = (ball.eps - delta.abs().sum(dim=(1, 2, 3), keepdim=True)).clamp(min=0)
    mass = (delta.abs() * touched).sum(dim=(2, 3), keepdim=True) + unused / channels
    here = delta[:, :, to[0], to[1]]
    shape = _bump(odd, x, generator, norm=1) * _signs((*x.shape[:2], 1, 1), x, generator)
    shape = shape + here / (here.abs().sum(dim=(2, 3), keepdim=True) + 1e-12)
    delta[:, :, source[0], source[1]] = 0
    unit = shape / (shape.abs().sum(dim=(2, 3), keepdim=True) + 1e-12)
    delta[:, :, to[0], to[1]] = unit * mass * channels
    return ball.project(x + delta, x)


def _bump(side: int, like: Tensor, generator: torch.Generator, *, norm: int = 2) -> Tensor:
    """Two pyramids of opposite sign side by side, ``(side, side)``, of norm 1 (section 3.3).

    Args:
        side: of the bump.
        like: a tensor of its type and device.
        generator: turns it.
        norm: 2, or 1 for a steeper one of L1 norm 1 (Croce & Hein 2021).
    """
    half = side // 2
    parts = [_pyramid(half, side, like, norm), -_pyramid(side - half, side, like, norm)] if half else []
    bump = torch.cat(parts) if half else like.new_ones(1, 1)
    bump = bump / bump.norm(p=norm)
    flip = bool(torch.randint(0, 2, (), generator=generator, device=generator.device))
    turned: Tensor = bump.T if flip else bump
    return turned


def _pyramid(height: int, width: int, like: Tensor, norm: int = 2) -> Tensor:
    """Nested rectangles of falling weight around the centre, of norm 1."""
    rows = (torch.arange(height) - height // 2).abs()
    columns = (torch.arange(width) - width // 2).abs()
    rings = torch.maximum(rows.unsqueeze(1), columns.unsqueeze(0))
    weights = 1 / torch.arange(1, max(height, width) // 2 + 2).float() ** (2 if norm == 2 else 4)
    pyramid = weights.flip(0).cumsum(0).flip(0)[rings]
    unit: Tensor = pyramid / pyramid.norm(p=norm)
    return unit.to(like)


_KINDS: Mapping[Norm, tuple[Start, Propose]] = {
    "Linf": (_stripes, _squares),
    "L2": (_tiles, _moved_mass),
    "L1": (_tiles_l1, _moved_l1),
}
"""How a search starts and what it proposes, by norm."""
