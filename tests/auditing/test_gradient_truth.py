"""How true a gradient is: closed forms on linear models, honest discontinuity, and masking in part and in full."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from toys import make_hpm

from msa_eval import WholeModel
from msa_eval.attacks.ball import Ball
from msa_eval.auditing.gradient_truth import HardResponse, Truth
from msa_eval.auditing.truth_sign import TRUE_ENOUGH, gradient_truth
from msa_eval.defense.contract import Defense
from msa_eval.surrogates import STE
from msa_eval.surrogates.registry import Surrogate, get

SHAPE = (3, 6, 6)


class Function(nn.Module):
    """A model that is a function of flat images."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x.flatten(1))


def weights(classes: int = 3) -> Tensor:
    return torch.randn(108, classes, generator=torch.Generator().manual_seed(0))


W = weights()


def data(defense: Defense, count: int = 24) -> tuple[Tensor, Tensor]:
    x = 0.3 + 0.4 * torch.rand(count, *SHAPE, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return x, defense.logits(defense.features(x)).argmax(1)


def truth(function: Callable[[Tensor], Tensor], *, ball: Ball | None = None, draws: int = 1, seed: int = 0) -> Truth:
    defense = WholeModel(Function(function))
    x, y = data(defense)
    return HardResponse(defense, x, y, ball or Ball("Linf", 0.1), draws=draws, seed=seed).truth_of(STE)


@pytest.mark.parametrize("ball", [Ball("Linf", 0.05), Ball("Linf", 0.3), Ball("L2", 0.5)])
def test_the_gradient_of_a_linear_model_is_true(ball: Ball) -> None:
    found = truth(lambda x: x @ W[:, :2], ball=ball)
    assert found.figure > 0.99
    assert found.lowest > 0.97
    assert found.signal > 0.95


def test_a_gradient_that_points_back_is_minus_one() -> None:
    found = truth(lambda x: (2 * x.detach() - x) @ W[:, :2])
    assert found.figure < -0.99


@pytest.mark.parametrize("share", [0.25, 0.5])
def test_of_a_model_masked_in_part_it_is_the_cosine_with_what_is_seen(share: float) -> None:
    """Two classes and a linear model: the margin's gradient is the difference of two columns."""
    hidden = torch.rand(108, generator=torch.Generator().manual_seed(2)) < share
    difference = W[:, 1] - W[:, 0]
    expected = float(difference[~hidden].norm() / difference.norm())
    found = truth(lambda x: torch.where(hidden, x.detach(), x) @ W[:, :2])
    assert found.figure == pytest.approx(expected, abs=0.12)


@pytest.mark.parametrize(
    "function",
    [lambda x: x.round() @ W, lambda x: (x @ W).detach() + 0 * x[:, :3],
     lambda x: F.one_hot((x @ W).argmax(1), 3) + 0 * x[:, :3]],
    ids=["rounded", "detached", "one-hot"],
)  # fmt: skip
def test_no_gradient_is_zero(function: Callable[[Tensor], Tensor]) -> None:
    assert truth(function).figure == 0


def test_honest_discontinuity_is_not_held_against_a_gradient() -> None:
    """Rounding with an estimator: the trend is what the estimator follows, the noise is nobody's."""
    found = truth(lambda x: (x + ((4 * x).round() / 4 - x).detach()) @ W[:, :2], ball=Ball("Linf", 0.2))
    assert found.figure > 0.9


def test_noise_is_averaged_under_the_same_seeds() -> None:
    found = truth(lambda x: (x + 0.1 * torch.randn_like(x)) @ W[:, :2], draws=4)
    assert found.figure > 0.99


class Centred:
    """Batch centring, and counts by hard decisions."""

    batch_dependent = True

    def features(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ W

    def logits(self, z: Tensor) -> Tensor:
        return z - z.mean(0) - 2 * F.one_hot(z.argmax(1), 3).float().mean(0)


def test_of_a_batch_each_gradient_is_its_own_sample_s() -> None:
    defense = Centred()
    x, y = data(defense, 32)
    hard = HardResponse(defense, x, y, Ball("Linf", 0.1), interacting=True)
    assert hard.truth_of(STE).figure > 0.95
    blind = Surrogate("blind", lambda defense, z: defense.logits(z.detach() + 0 * z))
    assert hard.truth_of(blind).figure == 0


def test_the_reference_defence_s_surrogates_are_true_enough() -> None:
    hpm = make_hpm().requires_grad_(False)
    x = 0.2 + 0.6 * torch.rand(32, 3, 2, 2, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        y = hpm(x).argmax(1)
    hard = HardResponse(hpm, x, y, Ball("Linf", 0.05), climber=STE, interacting=True)
    figures = {name: hard.truth_of(get(name)).figure for name in ("frozen-prototypes", "soft-hybrid@0.3", "ste")}
    assert max(figures.values()) > TRUE_ENOUGH + 0.05


def test_a_figure_follows_from_its_seed_and_leaves_the_generators_alone() -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, again, other = (truth(lambda x: torch.where(x > 0.5, x.detach(), x) @ W, seed=seed) for seed in (0, 0, 1))
    assert first == again
    assert first != other
    assert bool((torch.get_rng_state() == state).all())


def test_points_are_reached_along_the_gradient_within_the_ball() -> None:
    defense = WholeModel(Function(lambda x: x @ W))
    x, y = data(defense)
    ball = Ball("Linf", 0.1)
    hard = HardResponse(defense, x, y, ball, climber=STE)
    reached = hard.points[1]
    assert float(ball.excess(reached, x).max()) == 0
    assert bool((hard.margin_loss(reached) > hard.margin_loss(x)).all())


@pytest.mark.parametrize(
    ("best", "signal", "agreement", "fired", "severity"),
    [(0.95, 0.9, 0.0, False, ""), (0.7, 0.9, 1.0, True, "suspect"), (0.1, 0.9, 1.0, True, "unreliable"),
     (0.1, 0.02, 0.5, True, "suspect"), (0.1, 0.02, 0.97, False, "")],
)  # fmt: skip
def test_what_a_figure_means(best: float, signal: float, agreement: float, fired: bool, severity: str) -> None:
    sign = gradient_truth({"ste": best, "other": best - 0.1}, signal=signal, agreement=agreement, tried=["inner:net"])
    assert sign.fired == fired
    assert not fired or sign.severity == severity
    assert "ste" in sign.reason
    assert "inner:net" in sign.reason


def test_company_blurs_a_figure_and_the_limit_is_lower() -> None:
    figures = {"ste": 0.7}
    assert gradient_truth(figures, signal=0.9, agreement=1.0).fired
    assert not gradient_truth(figures, signal=0.9, agreement=1.0, interacting=True).fired
    assert gradient_truth({"ste": 0.5}, signal=0.9, agreement=1.0, interacting=True).fired


@pytest.mark.parametrize(
    ("own", "found", "options", "fired"),
    [
        ({"ste": 0.95}, {}, {}, False),
        ({"ste": 0.85}, {}, {}, True),
        ({"ste": 0.85}, {}, {"brought": True}, False),
        ({"ste": 0.85}, {}, {"interacting": True}, False),
        ({"ste": 0.95}, {"inner:net": 0.9}, {}, False),
        ({"ste": 0.92}, {"straight-through": 0.98}, {}, True),
        ({"ste": 0.83}, {"straight-through": 0.93}, {"interacting": True}, True),
        ({}, {"straight-through": 0.98}, {}, True),
        ({}, {"inner:net": 0.8}, {"signal": 0.05}, True),
        ({"ste": 0.0}, {}, {"signal": 0.05}, False),
    ],
)  # fmt: skip
def test_a_figure_that_rests_on_what_was_found_is_an_upper_bound(
    own: dict[str, float], found: dict[str, float], options: dict[str, Any], fired: bool
) -> None:
    sign = gradient_truth(own, found=found, **({"signal": 0.9, "agreement": 1.0} | options))
    assert (sign.fired, sign.severity) == (fired, "suspect")
    assert ("upper bound" in sign.reason) == (fired and bool(found))


def test_what_could_not_be_measured_says_so() -> None:
    sign = gradient_truth({}, signal=0.0, agreement=0.0, failure="RuntimeError: no")
    assert (sign.fired, sign.severity) == (True, "suspect")
    assert "could not be measured" in sign.reason
