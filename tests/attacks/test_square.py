"""Square against closed forms, laws, pyautoattack, and a batch in which companions matter."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pyautoattack.square import SquareAttack as PeerSquare
from torch import Tensor, nn

from msa_eval import HPM, Samples
from msa_eval.attacks import Ball, square
from msa_eval.attacks.losses import margin_loss
from msa_eval.attacks.square import _bump


class Recorder:
    """A batch under a query attack, decided as a whole; it keeps all that was asked."""

    def __init__(self, model: nn.Module, x: Tensor) -> None:
        self.model, self.kept, self.asked = model, x, [x]

    def _ask(self, x: Tensor) -> Tensor:
        self.asked.append(x)
        with torch.no_grad():
            return self.model(x)

    def propose(self, points: Tensor, rows: Tensor) -> Tensor:
        self.proposed = self.kept.clone()
        self.proposed[rows] = points
        return self._ask(self.proposed)

    def accept(self, rows: Tensor) -> Tensor:
        self.kept = torch.where(rows.view(-1, 1, 1, 1), self.proposed, self.kept)
        return self._ask(self.kept)


def _run(model: nn.Module, x: Tensor, y: Tensor, ball: Ball, queries: int, seed: int = 0) -> tuple[Tensor, Recorder]:
    target = Recorder(model, x)
    with torch.no_grad():
        attacked = model(x).argmax(dim=1) == y
    generator = torch.Generator().manual_seed(seed)
    return square(target, x, y, attacked=attacked, ball=ball, queries=queries, generator=generator), target


@given(
    seed=st.integers(0, 10_000),
    eps=st.floats(0.001, 2),
    norm=st.sampled_from(["Linf", "L2"]),
    side=st.integers(3, 9),
    channels=st.sampled_from([1, 3]),
)
@settings(max_examples=40, deadline=None)
def test_never_leaves_the_ball_or_the_box(seed: int, eps: float, norm: str, side: int, channels: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(4, channels, side, side, generator=generator)
    net = nn.Sequential(nn.Flatten(), nn.Linear(channels * side * side, 4))
    with torch.no_grad():
        y = net(x).argmax(dim=1)
    ball = Ball(norm, eps)  # type: ignore[arg-type]
    found, target = _run(net, x, y, ball, 15, seed)
    for points in [found, *target.asked]:
        assert (ball.excess(points, x) == 0).all()


@pytest.mark.parametrize("channels", [1, 3])
def test_approaches_the_linf_optimum_of_a_linear_classifier(channels: int) -> None:
    """The margin rises by at most ε times the l1 norm of the weights; the search ends within a twentieth of that."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(channels, 1, 6, 1, generator=generator).expand(channels, 1, 6, 6).flatten()

    def model(x: Tensor) -> Tensor:
        score = x.flatten(1) @ weight + 100
        return torch.stack([score, -score], dim=1)

    x, y = torch.full((5, channels, 6, 6), 0.5), torch.zeros(5, dtype=torch.long)
    found, _ = _run(model, x, y, Ball("Linf", 0.1), 3000)  # type: ignore[arg-type]
    gain = margin_loss(model(found), y) - margin_loss(model(x), y)
    most = 2 * 0.1 * weight.abs().sum()
    assert (gain <= most + 1e-3).all()
    assert (gain >= 0.95 * most).all()


@pytest.mark.parametrize(("norm", "eps"), [("Linf", 0.15), ("L2", 0.8)])
def test_breaks_as_much_as_pyautoattacks(norm: str, eps: float, digits_hpm: HPM, digits: Samples) -> None:
    model = digits_hpm.fc_target
    x, y = digits.x[:200], digits.y[:200]
    peer = PeerSquare(model, norm=norm, eps=eps, n_queries=400, n_restarts=1, seed=0, device="cpu", loss="margin")
    with torch.no_grad():
        correct = model(x).argmax(dim=1) == y
        theirs = (model(peer.perturb(x, y)).argmax(dim=1) == y).float().mean()
        found, _ = _run(model, x, y, Ball(norm, eps), 400)  # type: ignore[arg-type]
        ours = (model(found).argmax(dim=1) == y).float().mean()
    assert ours < correct.float().mean() - 0.1
    assert ours <= theirs + 0.03, f"{ours:.3f} against pyautoattack's {theirs:.3f}"


def test_the_margin_of_a_static_model_never_rises(digits_hpm: HPM, digits: Samples) -> None:
    model, x, y = digits_hpm.fc_target, digits.x[:50], digits.y[:50]
    _, target = _run(model, x, y, Ball("Linf", 0.1), 60)
    with torch.no_grad():
        kept = torch.stack([margin_loss(model(points), y) for points in target.asked[2::2]])
        right = torch.stack([model(points).argmax(dim=1) == y for points in target.asked[2::2]])
    assert ((kept[1:] >= kept[:-1] - 1e-6) | ~right[:-1]).all()


def test_a_tie_is_no_success() -> None:
    """Where all logits tie, class 0 is the answer: the search goes on, and nothing is written into them."""
    x, y = torch.full((3, 1, 4, 4), 0.5), torch.zeros(3, dtype=torch.long)
    flat = torch.zeros(3, 4)
    target = Recorder(lambda points: flat, x)  # type: ignore[arg-type]
    square(
        target, x, y, attacked=torch.ones(3, dtype=torch.bool), ball=Ball("Linf", 0.1), queries=10,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    assert len(target.asked) == 1 + 2 * 10
    assert torch.equal(flat, torch.zeros(3, 4))


def test_samples_not_attacked_stay_as_they_are() -> None:
    x, y = torch.rand(6, 1, 4, 4, generator=torch.Generator().manual_seed(0)), torch.zeros(6, dtype=torch.long)
    attacked = torch.tensor([True, False] * 3)
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    found = square(
        Recorder(net, x), x, y, attacked=attacked, ball=Ball("Linf", 0.1), queries=5,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    assert torch.equal(found[1::2], x[1::2])
    assert not torch.equal(found[::2], x[::2])


def test_a_sample_made_right_again_by_its_companions_is_searched_again() -> None:
    """The mixed batch of queries 3 and 4 is wrong on row 0, that of query 5 right: it rejoins in query 6."""
    searched: list[list[bool]] = []

    class Scripted:
        def propose(self, points: Tensor, rows: Tensor) -> Tensor:
            searched.append(rows.tolist())
            return torch.tensor([[1.0, 0.0], [1.0, 0.0]])

        def accept(self, rows: Tensor) -> Tensor:
            del rows
            wrong = len(searched) in (3, 4)
            return torch.tensor([[0.0, 1.0] if wrong else [2.0, 0.0], [2.0, 0.0]])

    x, y = torch.full((2, 1, 4, 4), 0.5), torch.zeros(2, dtype=torch.long)
    square(
        Scripted(), x, y, attacked=y == 0, ball=Ball("Linf", 0.1), queries=7, generator=torch.Generator().manual_seed(0)
    )
    assert [rows[0] for rows in searched] == [True, True, True, False, False, True, True]
    assert all(rows[1] for rows in searched)


@pytest.mark.parametrize("side", [1, 2, 3, 4, 5, 8, 9])
def test_a_bump_has_norm_one_and_two_signs(side: int) -> None:
    bump = _bump(side, torch.zeros(1), torch.Generator().manual_seed(0))
    assert bump.shape == (side, side)
    assert bump.norm().item() == pytest.approx(1, abs=1e-6)
    assert side == 1 or (bump.min() < 0 < bump.max())


@pytest.mark.parametrize(("queries", "p_init"), [(0, 0.8), (5, 0.0), (5, 1.5)])
def test_an_unusable_budget(queries: int, p_init: float) -> None:
    x, y = torch.rand(1, 1, 4, 4), torch.zeros(1, dtype=torch.long)
    with pytest.raises(ValueError, match="queries >= 1"):
        square(
            Recorder(nn.Flatten(), x), x, y, attacked=y == 0, ball=Ball("Linf", 0.1), queries=queries, p_init=p_init,
            generator=torch.Generator(),
        )  # fmt: skip
