"""Which radii measure anything."""

from __future__ import annotations

import pytest
from toys import make_classifier, make_samples

from msa_eval import audit, evaluate
from msa_eval.attacks.ball import Ball, Norm


@pytest.mark.parametrize(
    ("norm", "eps", "pixels", "hint"),
    [("Linf", 8, 64, "did you mean 8/255"), ("Linf", 1, 64, "did you mean 1/255"), ("Linf", 0.5, 64, ""),
     ("L2", 100, 64, "did you mean 100/255"), ("L2", 4, 64, "did you mean 4/255"), ("Linf", 255, 64, "")],
)  # fmt: skip
def test_a_ball_in_which_every_image_can_be_erased_is_refused(norm: Norm, eps: float, pixels: int, hint: str) -> None:
    with pytest.raises(ValueError, match="no classifier withstands that") as error:
        Ball(norm, eps).check_radius(pixels)
    assert hint in str(error.value)
    assert bool(hint) is ("did you mean" in str(error.value))


@pytest.mark.parametrize(("norm", "eps", "pixels"), [("Linf", 0.499, 64), ("L2", 3.99, 64), ("L2", 20, 3072)])
def test_a_ball_in_which_images_stay_apart_is_not(norm: Norm, eps: float, pixels: int) -> None:
    Ball(norm, eps).check_radius(pixels)


def test_neither_an_evaluation_nor_an_audit_is_made_in_it() -> None:
    model = make_classifier()
    for check in (evaluate, audit):
        with pytest.raises(ValueError, match="did you mean 8/255"):
            check(model, make_samples(model), protocol="quick", overrides={"threat.eps": 8})
        with pytest.raises(ValueError, match="did you mean 2/255"):
            check(model, make_samples(model), protocol="quick", overrides={"threat.eps": 2, "threat.norm": "L2"})
