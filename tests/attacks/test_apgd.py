"""APGD against closed forms, laws and pyautoattack."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pyautoattack.autopgd_base import APGDAttack
from torch import Tensor, nn

from msa_eval import HPM, Samples
from msa_eval.attacks import Ball, apgd
from msa_eval.attacks.ball import Norm
from msa_eval.attacks.losses import LOSSES, most_likely_others, targeted_dlr


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize("loss", ["ce", "margin"])
def test_reaches_the_optimum_of_a_linear_classifier(norm: str, loss: str) -> None:
    """Two classes: the margin w·x + b falls by ε times the dual norm of w, and no point does better."""
    w = torch.randn(2, 12, generator=_generator(1))
    x = 0.3 + 0.4 * torch.rand(8, 3, 2, 2, generator=_generator(2))
    y = torch.arange(8) % 2
    ball = Ball(norm, 0.1)  # type: ignore[arg-type]

    def logits(images: Tensor) -> Tensor:
        return images.flatten(1) @ w.T

    found = apgd(logits, x, y, loss=LOSSES[loss], ball=ball, steps=100, generator=_generator())
    gap = w[1] - w[0]
    gain = ball.eps * (gap.abs().sum() if norm == "Linf" else gap.norm())
    before = LOSSES["margin"](logits(x), y)
    after = LOSSES["margin"](logits(found.x), y)
    torch.testing.assert_close(after, before + gain, atol=2e-4, rtol=0)
    assert (ball.excess(found.x, x) == 0).all()


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_reaches_the_optimum_that_the_box_leaves(norm: str) -> None:
    """On images at the corners of the box only half the Linf ball is left: each coordinate moves inwards or not."""
    w = torch.randn(2, 12, generator=_generator(1))
    x = (torch.rand(6, 12, generator=_generator(3)) > 0.5).float()
    y = torch.zeros(6, dtype=torch.long)
    ball = Ball(norm, 0.2)  # type: ignore[arg-type]
    found = apgd(lambda images: images @ w.T, x, y, loss=LOSSES["margin"], ball=ball, steps=200, generator=_generator())
    gap = w[1] - w[0]
    useful = torch.where(x == 1, (gap < 0), (gap > 0)) * gap.abs()
    gain = ball.eps * (useful.sum(dim=1) if norm == "Linf" else useful.norm(dim=1))
    before, after = (LOSSES["margin"](points @ w.T, y) for points in (x, found.x))
    torch.testing.assert_close(after, before + gain, atol=5e-3, rtol=0)
    assert (after <= before + gain + 1e-4).all()


@pytest.mark.filterwarnings("ignore:there are .* points with zero gradient")
@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize("loss", ["ce", "dlr"])
@pytest.mark.parametrize("steps", [10, 40])
def test_parity_with_pyautoattack(norm: str, loss: str, steps: int, digits_hpm: HPM, digits: Samples) -> None:
    """The same start points and budget give the same best losses and the same accuracy on the attacked model."""
    model = digits_hpm.fc_target
    x, y = digits.x[:200], digits.y[:200]
    eps = 0.15 if norm == "Linf" else 0.8
    ball = Ball(norm, eps)  # type: ignore[arg-type]
    start = ball.random(x, _generator(5))
    peer = APGDAttack(model, n_iter=steps, norm=norm, eps=eps, loss=loss, device="cpu")
    peer.init_hyperparam(x)
    _, accuracy, their_loss, _ = peer.attack_single_run(x, y, x_init=start)

    answers: list[Tensor] = []

    def logits(points: Tensor) -> Tensor:
        out = model(points)
        answers.append(out.detach().argmax(dim=1))
        return out

    found = apgd(logits, x, y, loss=LOSSES[loss], ball=ball, steps=steps, generator=_generator(), start=start)
    torch.testing.assert_close(found.loss, their_loss, atol=1e-4, rtol=0)
    unbroken = torch.stack([answer == y for answer in answers]).all(dim=0)
    assert 0.3 < unbroken.float().mean() < 0.95
    assert torch.equal(unbroken, accuracy.bool())


def test_parity_with_pyautoattack_on_a_targeted_loss(digits_hpm: HPM, digits: Samples) -> None:
    model = digits_hpm.fc_target
    x, y = digits.x[:100], digits.y[:100]
    ball = Ball("Linf", 0.15)
    start = ball.random(x, _generator(5))
    with torch.no_grad():
        target = most_likely_others(model(x), y, 1)
    logits = model(x)
    peer_logits = logits.sort(dim=1)[0]
    u = torch.arange(len(y))
    expected = -(logits[u, y] - logits[u, target]) / (
        peer_logits[:, -1] - 0.5 * (peer_logits[:, -3] + peer_logits[:, -4]) + 1e-12
    )
    torch.testing.assert_close(targeted_dlr(target)(logits, y), expected)
    found = apgd(model, x, y, loss=targeted_dlr(target), ball=ball, steps=20, generator=_generator(), start=start)
    assert (found.loss >= targeted_dlr(target)(model(start), y)).all()


def test_returns_the_best_point_of_every_sample_fooled_or_not() -> None:
    """A model that can't be fooled still gets perturbed points: a transfer of clean inputs would be vacuous."""
    x = torch.full((4, 3, 2, 2), 0.5)
    y = torch.zeros(4, dtype=torch.long)

    def certain(images: Tensor) -> Tensor:
        score = images.flatten(1).sum(dim=1)
        return torch.stack([1000 + score, -score, -score], dim=1)

    found = apgd(certain, x, y, loss=LOSSES["margin"], ball=Ball("Linf", 0.1), steps=20, generator=_generator())
    assert (certain(found.x).argmax(dim=1) == 0).all()
    torch.testing.assert_close(found.x, x - 0.1)


def test_of_all_points_seen_the_best_is_returned() -> None:
    """The loss has its peak within a step, so that the search passes over it and back."""
    x, y = torch.full((4, 3, 2, 2), 0.5), torch.zeros(4, dtype=torch.long)
    seen: list[Tensor] = []

    def peaked(images: Tensor) -> Tensor:
        far = (images - 0.53).pow(2).flatten(1).sum(dim=1)
        return torch.stack([far, -far], dim=1)

    def watched(logits: Tensor, labels: Tensor) -> Tensor:
        seen.append(LOSSES["margin"](logits, labels).detach())
        return LOSSES["margin"](logits, labels)

    found = apgd(peaked, x, y, loss=watched, ball=Ball("Linf", 0.1), steps=4, generator=_generator())
    assert torch.equal(found.loss, torch.stack(seen).amax(dim=0))
    assert bool((found.loss > seen[-1]).any())
    assert torch.equal(LOSSES["margin"](peaked(found.x), y), found.loss)


@given(
    seed=st.integers(0, 10_000),
    eps=st.floats(0, 2),
    norm=st.sampled_from(["Linf", "L2"]),
    loss=st.sampled_from(["ce", "dlr", "margin"]),
    steps=st.integers(1, 12),
)
@settings(max_examples=40, deadline=None)
def test_never_leaves_the_ball_or_the_box(seed: int, eps: float, norm: str, loss: str, steps: int) -> None:
    generator = _generator(seed)
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 5))
    x = torch.rand(5, 3, 2, 2, generator=generator)
    y = torch.randint(0, 5, (5,), generator=generator)
    ball = Ball(norm, eps)  # type: ignore[arg-type]
    seen: list[Tensor] = []

    def logits(points: Tensor) -> Tensor:
        seen.append(points.detach())
        return net(points)

    found = apgd(logits, x, y, loss=LOSSES[loss], ball=ball, steps=steps, generator=generator)
    assert len(seen) == steps + 1
    for points in [*seen, found.x]:
        assert (ball.excess(points, x) == 0).all()
        assert points.min() >= 0
        assert points.max() <= 1
        reach = (points - x).flatten(1)
        size = reach.abs().amax(dim=1) if norm == "Linf" else reach.double().norm(dim=1)
        assert (size <= eps + 1e-6 + 1e-5 * eps).all()


def test_the_found_loss_is_the_loss_of_the_found_point() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 5))
    x, y = torch.rand(6, 3, 2, 2, generator=_generator(4)), torch.arange(6) % 5
    found = apgd(net, x, y, loss=LOSSES["ce"], ball=Ball("L2", 0.5), steps=15, generator=_generator())
    torch.testing.assert_close(LOSSES["ce"](net(found.x), y), found.loss)


def test_the_generator_alone_decides(digits_hpm: HPM, digits: Samples) -> None:
    model, x, y = digits_hpm.fc_target, digits.x[:20], digits.y[:20]
    state = torch.random.get_rng_state()
    first, again, other = (
        apgd(model, x, y, loss=LOSSES["ce"], ball=Ball("Linf", 0.1), steps=5, generator=_generator(seed)).x
        for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_points_that_the_model_has_seen_are_never_written_over(norm: str) -> None:
    seen: list[tuple[Tensor, Tensor]] = []
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 5))

    def model(points: Tensor) -> Tensor:
        seen.append((points.detach(), points.detach().clone()))
        logits: Tensor = net(points)
        return logits

    x, y = torch.rand(6, 3, 2, 2, generator=_generator(4)), torch.arange(6) % 5
    start = torch.rand(6, 3, 2, 2, generator=_generator(5))
    kept = x.clone(), start.clone()
    apgd(model, x, y, loss=LOSSES["ce"], ball=Ball(norm, 0.3), steps=15, generator=_generator(), start=start)  # type: ignore[arg-type]
    assert len(seen) == 16
    assert all(torch.equal(points, then) for points, then in seen)
    assert torch.equal(x, kept[0])
    assert torch.equal(start, kept[1])


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_projecting_again_and_again_is_projecting(norm: str) -> None:
    """Against the definition: each point moves to the nearest of the ball's, then of the box's."""
    ball, generator = Ball(norm, 0.3), _generator(6)  # type: ignore[arg-type]
    x, points = torch.rand(8, 3, 4, 4, generator=generator), 3 * torch.rand(8, 3, 4, 4, generator=generator) - 1
    points[0] = x[0]
    delta = points - x
    if norm == "Linf":
        expected = (x + delta.clamp(-0.3, 0.3)).clamp(0, 1)
    else:
        size = delta.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        expected = (x + delta * (0.3 / size.clamp(min=0.3))).clamp(0, 1)
    kept, onto = points.clone(), ball.projection(x)
    torch.testing.assert_close(ball.project(points, x), expected)
    assert torch.equal(points, kept)
    for _ in range(2):
        torch.testing.assert_close(onto(points.clone()), expected)


def test_needs_a_step() -> None:
    with pytest.raises(ValueError, match="at least 1 step"):
        apgd(
            nn.Flatten(),
            torch.rand(1, 1, 2, 2),
            torch.zeros(1, dtype=torch.long),
            loss=LOSSES["ce"],
            ball=Ball("Linf", 0.1),
            steps=0,
            generator=_generator(),
        )


@pytest.mark.parametrize(("norm", "eps"), [("L0", 0.1), ("Linf", -1.0), ("Linf", math.nan), ("L2", math.inf)])
def test_a_ball_that_is_none(norm: str, eps: float) -> None:
    with pytest.raises(ValueError, match="expected"):
        Ball(norm, eps)  # type: ignore[arg-type]


def test_excess_finds_what_left_and_passes_what_stayed() -> None:
    x = torch.full((4, 2), 0.5)
    points = torch.tensor([[0.6, 0.5], [0.7, 0.5], [1.5, 0.5], [math.nan, 0.5]])
    assert (Ball("Linf", 0.1).excess(points, x) > 0).tolist() == [False, True, True, True]
    assert (Ball("L2", 5.0).excess(points, x) > 0).tolist() == [False, False, True, True]


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_a_projection_has_a_gradient(norm: Norm) -> None:
    x = torch.full((2, 1, 2, 2), 0.5)
    points = (x + torch.tensor([0.1, 0.02]).view(2, 1, 1, 1)).requires_grad_()
    (slope,) = torch.autograd.grad(Ball(norm, 0.05).project(points, x).sum(), points)
    assert slope[0].abs().max() < 1e-6  # along the edge's normal nothing moves
    torch.testing.assert_close(slope[1], torch.ones_like(slope[1]))


@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize("loss", sorted(LOSSES))
def test_a_search_names_no_device_and_never_waits_for_a_value(norm: str, loss: str) -> None:
    """On the meta device there are no values to wait for: reading one, or meeting a tensor of the CPU, is an error."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 10)).to("meta").requires_grad_(False)
    x, y = torch.empty(5, 3, 8, 8, device="meta"), torch.empty(5, dtype=torch.long, device="meta")
    found = apgd(
        model, x, y, loss=LOSSES[loss], ball=Ball(norm, 0.1), steps=12, generator=torch.Generator(), draws=2
    )  # fmt: skip
    assert found.x.device.type == "meta"
    assert found.x.shape == x.shape
    with pytest.raises(RuntimeError):  # which a search that reads a value would meet
        float(found.x.sum())
