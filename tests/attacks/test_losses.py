"""Losses by their definitions."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from msa_eval.attacks.losses import LOSSES, most_likely_others, targeted_dlr


@pytest.fixture
def logits() -> torch.Tensor:
    return torch.randn(50, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.fixture
def labels() -> torch.Tensor:
    return torch.arange(50) % 7


def test_values_follow_the_definitions(logits: torch.Tensor, labels: torch.Tensor) -> None:
    for row, y in zip(logits, labels.tolist(), strict=True):
        values = row.tolist()
        others = [value for j, value in enumerate(values) if j != y]
        first, _, third, fourth = sorted(values, reverse=True)[:4]
        one, label = row.unsqueeze(0), torch.tensor([y])
        assert LOSSES["margin"](one, label).item() == pytest.approx(max(others) - values[y])
        assert LOSSES["dlr"](one, label).item() == pytest.approx((max(others) - values[y]) / (first - third))
        assert LOSSES["ce"](one, label).item() == pytest.approx(row.exp().sum().log().item() - values[y])
        total = sum(math.exp(value) for value in values)
        wanted = (math.exp(max(others)) - math.exp(values[y])) / total
        assert LOSSES["probability-margin"](one, label).item() == pytest.approx(wanted)
        target = (y + 3) % 7
        found = targeted_dlr(torch.tensor([target]))(one, label).item()
        assert found == pytest.approx((values[target] - values[y]) / (first - (third + fourth) / 2))


def test_a_margin_is_positive_exactly_where_the_label_lost(logits: torch.Tensor, labels: torch.Tensor) -> None:
    for name in ("margin", "probability-margin"):
        assert torch.equal(LOSSES[name](logits, labels) > 0, logits.argmax(dim=1) != labels)


def test_dlr_ignores_scale_and_shift(logits: torch.Tensor, labels: torch.Tensor) -> None:
    torch.testing.assert_close(LOSSES["dlr"](3 * logits + 5, labels), LOSSES["dlr"](logits, labels))


def test_losses_leave_the_logits_alone(logits: torch.Tensor, labels: torch.Tensor) -> None:
    before = logits.clone()
    for loss in (*LOSSES.values(), targeted_dlr((labels + 1) % 7)):
        loss(logits, labels)
    assert torch.equal(logits, before)


def test_ranks_of_other_classes_leave_the_label_out(logits: torch.Tensor, labels: torch.Tensor) -> None:
    ranked = torch.stack([most_likely_others(logits, labels, rank) for rank in range(6)])
    assert not (ranked == labels).any()
    others = logits.masked_fill(F.one_hot(labels, 7).bool(), -torch.inf)
    assert torch.equal(ranked[0], others.argmax(dim=1))
    values = others.gather(1, ranked.T)
    assert (values[:, :-1] >= values[:, 1:]).all()


@pytest.mark.parametrize(("name", "classes"), [("dlr", 2), ("dlr-targeted", 3)])
def test_too_few_classes(name: str, classes: int) -> None:
    loss = LOSSES.get(name) or targeted_dlr(torch.tensor([1]))
    with pytest.raises(ValueError, match=f"has {classes}"):
        loss(torch.zeros(1, classes), torch.tensor([0]))
