"""The order of classes, by hand on linear models and by what a linear model makes certain."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from msa_eval.attacks.ball import Ball, Norm
from msa_eval.attacks.malt import CANDIDATES, rank_classes


def test_a_steep_class_goes_before_a_likelier_one_that_is_flat() -> None:
    """By hand: the leads are 1, 2 and 3, the slopes 0.5, 4 and 1: distances 2, 0.5 and 3."""
    weight = torch.tensor([[0.0, 0.0], [0.5, 0.0], [4.0, 0.0], [0.5, -0.5]])
    bias = torch.tensor([0.0, -1.0, -2.0, -3.0])
    x = torch.zeros(1, 1, 1, 2)
    order = rank_classes(lambda p: p.flatten(1) @ weight.T + bias, x, torch.tensor([0]), Ball("Linf", 1.0))
    assert order.tolist() == [[2, 1, 3, 0]]


@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize("classes", [2, 5, CANDIDATES + 4])
def test_on_a_linear_model_the_first_class_is_the_one_that_the_least_change_reaches(norm: Norm, classes: int) -> None:
    """Law: the distance of a point from a hyperplane is its value over the dual norm of its normal."""
    draw = torch.Generator().manual_seed(classes)
    weight = torch.randn(classes, 12, generator=draw) * torch.rand(classes, 1, generator=draw)
    x = torch.randn(6, 3, 2, 2, generator=draw)

    def logits(points: Tensor) -> Tensor:
        return points.flatten(1) @ weight.T

    y = logits(x).argmax(dim=1)
    order = rank_classes(logits, x, y, Ball(norm, 0.5))
    assert torch.equal(order.sort(dim=1).values, torch.arange(classes).expand(6, -1))
    assert torch.equal(order[:, -1], y)
    for row, label in enumerate(y.tolist()):
        likely = logits(x)[row].argsort(descending=True).tolist()[1 : CANDIDATES + 1]
        normal = weight[label] - weight
        size = normal.abs().sum(dim=1) if norm == "Linf" else normal.norm(dim=1)
        distance = (normal @ x[row].flatten()) / size
        assert order[row, : len(likely)].tolist() == sorted(likely, key=lambda c: float(distance[c]))


def test_a_class_that_no_change_reaches_comes_after_those_that_some_does() -> None:
    weight = torch.tensor([[1.0], [1.0], [0.5], [0.0]])  # the lead over the second class is the same everywhere
    bias = torch.tensor([0.0, -0.1, -5.0, -torch.inf])
    order = rank_classes(
        lambda p: p.flatten(1) @ weight.T + bias, torch.ones(1, 1, 1, 1), torch.tensor([0]), Ball("Linf", 1.0)
    )
    assert order.tolist() == [[2, 1, 3, 0]]
