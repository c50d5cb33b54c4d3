"""Rounding to a grid of levels: on it, in the ball and the box, near the point, and transparent to gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from msa_eval.attacks.ball import Ball, Norm
from msa_eval.attacks.grid import Grid, off_grid
from msa_eval.data.levels import onto_levels

RADII: dict[Norm, tuple[float, ...]] = {"Linf": (1 / 255, 2.5 / 255, 8 / 255, 0.15), "L2": (0.05, 0.5), "L1": (1, 4)}


def _clean(levels: int, seed: int) -> Tensor:
    drawn = torch.randint(0, levels, (6, 3, 5, 5), generator=torch.Generator().manual_seed(seed))
    return onto_levels(drawn / (levels - 1), levels)


@pytest.mark.parametrize("norm", list(RADII))
@given(seed=st.integers(0, 10_000), levels=st.sampled_from([17, 256, 1000, 65536]), which=st.integers(0, 3))
@settings(max_examples=20, deadline=None)
def test_points_come_to_the_grid_inside_ball_and_box(norm: Norm, seed: int, levels: int, which: int) -> None:
    ball = Ball(norm, RADII[norm][which % len(RADII[norm])], levels)
    x = _clean(levels, seed)
    generator = torch.Generator().manual_seed(seed)
    points = ball.project(x + 3 * (ball.random(x, generator) - x) * torch.rand(x.shape, generator=generator), x)
    found = Grid(ball, x).round(points)
    assert off_grid(found, levels) == 0
    assert float(ball.excess(found, x).max()) == 0
    assert torch.equal(Grid(ball, x).round(found), found)
    step = 1 / (levels - 1)
    if norm == "Linf" and ball.eps * (levels - 1) == int(ball.eps * (levels - 1)):
        assert float((found - points).abs().max()) <= step / 2 + 1e-6
    rows = torch.tensor([4, 1])
    assert torch.equal(Grid(ball, x).round(points[rows], rows), found[rows])


def test_l2_points_lose_little_of_their_length() -> None:
    """Rounding towards the clean image would take a fifth of it."""
    ball, x = Ball("L2", 0.5, 256), _clean(256, 0)
    points = ball.random(x, torch.Generator().manual_seed(0))
    assert float((ball.size(Grid(ball, x).round(points) - x) / ball.size(points - x)).min()) > 0.95


def test_levels_of_8_bits_are_what_a_file_holds_to_the_bit() -> None:
    numbers = np.arange(256, dtype=np.uint8)
    held = torch.from_numpy(numbers).float() / 255
    assert torch.equal(onto_levels(held + 1e-4 * torch.randn(256).clamp(-1, 1), 256), held)


def test_a_gradient_passes_through() -> None:
    ball, x = Ball("Linf", 0.1, 11), _clean(11, 3)
    points = (x + 0.03).clamp(0, 1).requires_grad_()
    weight = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    (gradient,) = torch.autograd.grad((Grid(ball, x).round(points) * weight).sum(), points)
    assert torch.equal(gradient, weight)
