"""The L1 ball: its projection, APGD and Square, against closed forms and pyautoattack."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pyautoattack.autopgd_base import APGDAttack, L1_projection
from pyautoattack.square import SquareAttack
from torch import Tensor

from msa_eval import HPM, Samples
from msa_eval.attacks import Ball, apgd
from msa_eval.attacks.l1 import onto_l1
from msa_eval.attacks.losses import LOSSES, margin_loss
from msa_eval.attacks.square import square


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _knapsack(weight: Tensor, room: Tensor, eps: float) -> Tensor:
    """The most that a linear function can rise in the L1 ball and the box: the steepest numbers first ``(B,)``."""
    order = weight.abs().expand_as(room).argsort(dim=1, descending=True)
    filled = room.gather(1, order).cumsum(dim=1)
    spent = filled.clamp(max=eps).diff(dim=1, prepend=torch.zeros_like(filled[:, :1]))
    return (spent * weight.abs().expand_as(room).gather(1, order)).sum(dim=1)


def _nearest(x: Tensor, delta: Tensor, eps: float) -> Tensor:
    """The projection by bisection: the one λ by which all sizes are lowered before they are cut at the box."""
    room = torch.where(delta > 0, 1 - x, x)
    low, high = torch.zeros_like(x[:, :1]), delta.abs().amax(dim=1, keepdim=True)
    if_inside = torch.minimum(delta.abs(), room)
    for _ in range(100):
        middle = (low + high) / 2
        outside = torch.minimum((delta.abs() - middle).clamp(min=0), room).sum(dim=1, keepdim=True) > eps
        low, high = torch.where(outside, middle, low), torch.where(outside, high, middle)
    kept = torch.minimum((delta.abs() - high).clamp(min=0), room)
    kept = torch.where(if_inside.sum(dim=1, keepdim=True) > eps, kept, if_inside)
    return x + kept * delta.sign()


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), eps=st.floats(0.01, 20), scale=st.floats(0.01, 10))
@example(seed=1636, eps=17.5, scale=6.0)
def test_the_projection_is_the_nearest_point_and_pyautoattacks(seed: int, eps: float, scale: float) -> None:
    generator = _generator(seed)
    x = torch.rand(3, 40, generator=generator)
    delta = scale * torch.randn(3, 40, generator=generator)
    found = Ball("L1", eps).project((x + delta).view(3, 1, 5, 8), x.view(3, 1, 5, 8)).view(3, 40)
    nearest = _nearest(x.double(), delta.double(), eps)
    torch.testing.assert_close(found.double(), nearest, atol=2e-5 * max(1, scale), rtol=0)
    theirs = x + delta + L1_projection(x, delta, eps)
    # Rounding at times leaves theirs short of the ball's surface.
    whole = ((theirs - x).abs().sum(dim=1) - (nearest - x).abs().sum(dim=1)).abs() < 1e-4
    torch.testing.assert_close(found[whole], theirs[whole], atol=2e-4 * max(1, scale), rtol=0)
    assert (Ball("L1", eps).excess(found, x) == 0).all()
    # No step towards another point of the ball and the box leads nearer (the variational inequality).
    others = Ball("L1", eps).random(x.view(3, 1, 5, 8), generator).view(3, 40)
    assert ((x + delta - found) * (others - found)).sum(dim=1).max() <= 1e-3 * scale * eps + 1e-4


def test_what_is_inside_stays() -> None:
    delta = torch.tensor([[0.1, -0.2, 0.0]])
    assert torch.equal(onto_l1(delta, torch.full((1, 3), 0.5), 0.5), delta)


@pytest.mark.parametrize("eps", [0.2, 1.0, 3.0])
def test_apgd_reaches_the_optimum_of_a_linear_classifier(eps: float) -> None:
    w = torch.randn(2, 12, generator=_generator(1))
    x = torch.rand(8, 3, 2, 2, generator=_generator(2))
    y = torch.arange(8) % 2
    ball = Ball("L1", eps)

    def logits(images: Tensor) -> Tensor:
        return images.flatten(1) @ w.T

    found = apgd(logits, x, y, loss=LOSSES["margin"], ball=ball, steps=300, generator=_generator())
    gap = (w[1] - w[0]) * (1 - 2 * y).unsqueeze(1)
    room = torch.where(gap > 0, 1 - x.flatten(1), x.flatten(1))
    most = torch.stack([_knapsack(g.unsqueeze(0), r.unsqueeze(0), eps)[0] for g, r in zip(gap, room, strict=True)])
    gain = margin_loss(logits(found.x), y) - margin_loss(logits(x), y)
    assert (gain <= most + 1e-4).all()
    # The shortest step of the algorithm, a tenth of ε, leaves a little of it.
    assert (gain >= 0.9 * most).all()
    assert gain.sum() >= 0.96 * most.sum()
    assert (ball.excess(found.x, x) == 0).all()


@pytest.mark.parametrize("warm", [True, False])
def test_apgd_is_pyautoattacks(warm: bool, digits_hpm: HPM, digits: Samples, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same start gives the same best losses and the same accuracy; a start of its own is drawn as theirs is."""
    model, x, y, eps = digits_hpm.fc_target, digits.x[:100], digits.y[:100], 1.5
    ball = Ball("L1", eps)
    noise = torch.randn(x.shape, generator=_generator(5))
    start = ball.project(x + noise, x)
    peer = APGDAttack(model, n_iter=25, norm="L1", eps=eps, loss="ce", device="cpu")
    peer.init_hyperparam(x)
    monkeypatch.setattr(torch, "randn", lambda *shape, **named: noise.clone())
    _, accuracy, their_loss, _ = peer.attack_single_run(x, y, x_init=start if warm else None)
    answers: list[Tensor] = []

    def logits(points: Tensor) -> Tensor:
        out = model(points)
        answers.append(out.detach().argmax(dim=1))
        return out

    given = start if warm else None
    found = apgd(logits, x, y, loss=LOSSES["ce"], ball=ball, steps=25, generator=_generator(5), start=given)
    unbroken = torch.stack([answer == y for answer in answers]).all(dim=0)
    assert 0.2 < unbroken.float().mean() < 0.95
    assert (unbroken != accuracy.bool()).sum() <= 1
    assert ((found.loss - their_loss).abs() < 1e-2).float().mean() > 0.97
    assert abs(float((found.loss - their_loss).mean())) < 5e-3


def test_square_breaks_as_much_as_pyautoattacks(digits_hpm: HPM, digits: Samples) -> None:
    model, x, y, eps = digits_hpm.fc_target, digits.x[:100], digits.y[:100], 6.0

    class Static:
        def __init__(self) -> None:
            self.kept = x.clone()

        def propose(self, points: Tensor, rows: Tensor) -> Tensor:
            self.new = self.kept.clone()
            self.new[rows] = points
            with torch.no_grad():
                return model(self.new)

        def accept(self, rows: Tensor) -> Tensor:
            self.kept = torch.where(rows.view(-1, 1, 1, 1), self.new, self.kept)
            with torch.no_grad():
                return model(self.kept)

    right = model(x).argmax(dim=1) == y
    ball = Ball("L1", eps)
    found = square(Static(), x, y, attacked=right, ball=ball, queries=200, generator=_generator())
    assert (ball.excess(found, x) == 0).all()
    peer = SquareAttack(model, norm="L1", eps=eps, n_queries=200, resc_schedule=True, device="cpu", seed=0)
    theirs = peer.perturb(x, y)
    ours, other = ((model(points).argmax(dim=1) == y).float().mean() for points in (found, theirs))
    assert float(ours) < float(right.float().mean()) - 0.15
    assert abs(float(ours - other)) <= 0.08


def test_an_evaluation_in_an_l1_ball_is_sound_and_its_points_lie_inside() -> None:
    from toys import make_classifier, make_samples

    from msa_eval import evaluate

    model = make_classifier()
    samples = make_samples(model, 24)
    small = {"threat.norm": "L1", "threat.eps": 0.4, "attack.apgd.steps": 10, "attack.square.queries": 20}
    results = evaluate(model, samples, protocol="quick", overrides=small)
    assert results.run["verdict"] == "sound", results.run["verdicts"]
    values = results.summary.set_index("metric")["value"]
    assert 0 < values["worst_case"] < values["clean"]
