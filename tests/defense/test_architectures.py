"""Architectures: shapes, parameter counts and refusals."""

from __future__ import annotations

import pytest
import torch

from msa_eval import Blueprint
from msa_eval.defense.architectures import DigitsCNN, Normalize, WideResNet


@pytest.mark.parametrize(
    ("depth", "width", "millions"), [(10, 2, 0.302), (28, 10, 36.47), (34, 20, 184.5), (16, 4, 2.748)]
)
def test_wide_resnets_have_the_published_sizes(depth: int, width: int, millions: float) -> None:
    with torch.device("meta"):
        trunk = WideResNet(depth, width)
    count = sum(p.numel() for p in trunk.parameters())
    assert count / 1e6 == pytest.approx(millions, rel=2e-3)


def test_features_have_the_promised_width() -> None:
    assert WideResNet(16, 1).eval()(torch.rand(2, 3, 32, 32)).shape == (2, 64)
    assert DigitsCNN(4)(torch.rand(3, 1, 8, 8)).shape == (3, 16)


def test_normalisation_is_inside_the_model() -> None:
    plain = Blueprint("digits-cnn", {"width": 2}, 3).build()
    inside = Blueprint("digits-cnn", {"width": 2}, 3, {"mean": [0.4], "std": [0.2]}).build()
    inside.trunk[1].load_state_dict(plain.trunk.state_dict())  # type: ignore[index]
    inside.fc.load_state_dict(plain.fc.state_dict())
    x = torch.rand(2, 1, 8, 8)
    torch.testing.assert_close(inside(x), plain((x - 0.4) / 0.2))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: WideResNet(11, 2), "6n\\+4"),
        (lambda: WideResNet(10, 0), "at least 1"),
        (lambda: DigitsCNN(0), "at least 1"),
        (lambda: Normalize([0.5], [0.0]), "positive stds"),
        (lambda: Normalize([0.5, 0.5], [1.0]), "as many means"),
        (lambda: Blueprint("digits-cnn", {}, 1).build(), "at least 2 classes"),
        (lambda: Blueprint("digits-cnn", {"width": "x"}, 3).build(), "is a whole number"),
    ],
)
def test_unusable_settings(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]
