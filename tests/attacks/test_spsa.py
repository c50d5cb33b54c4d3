"""SPSA against closed forms, laws, Square, and a model whose gradients are zero."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from toys import make_classifier, make_hpm, make_samples

from msa_eval import HPM, Samples
from msa_eval.attacks import Ball, apgd, spsa, square
from msa_eval.attacks.batch import Batch
from msa_eval.attacks.losses import ce, margin_loss
from msa_eval.attacks.spsa import _schedule
from msa_eval.defense.contract import Defense, decide
from msa_eval.judging.judged_batch import JudgedBatch

Model = Callable[[Tensor], Tensor]


class Recorder:
    """A batch under a query attack, decided as a whole; it keeps all that was proposed."""

    def __init__(self, model: Model, x: Tensor) -> None:
        self.model, self.kept = model, x
        self.proposals: list[Tensor] = []

    def _ask(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self.model(x)

    def propose(self, points: Tensor, rows: Tensor) -> Tensor:
        self.proposed = self.kept.clone()
        self.proposed[rows] = points
        self.proposals.append(self.proposed)
        return self._ask(self.proposed)

    def accept(self, rows: Tensor) -> Tensor:
        self.kept = torch.where(rows.view(-1, 1, 1, 1), self.proposed, self.kept)
        return self._ask(self.kept)


def _run(
    model: Model, x: Tensor, y: Tensor, ball: Ball, queries: int, *, seed: int = 0, samples: int = 8
) -> tuple[Tensor, Recorder]:
    target = Recorder(model, x)
    with torch.no_grad():
        attacked = model(x).argmax(dim=1) == y
    generator = torch.Generator().manual_seed(seed)
    found = spsa(
        target, x, y, attacked=attacked, ball=ball, queries=queries, samples=samples, generator=generator
    )  # fmt: skip
    assert torch.equal(found, target.kept)
    return found, target


def _linear(offset: float = 100.0) -> tuple[Model, Tensor]:
    weight = torch.randn(27, generator=torch.Generator().manual_seed(1))

    def model(x: Tensor) -> Tensor:
        score = (x - 0.5).flatten(1) @ weight + offset
        return torch.stack([score, -score], dim=1)

    return model, weight


@pytest.mark.parametrize(("norm", "eps", "dual"), [("Linf", 0.1, 1), ("L2", 0.3, 2)])
def test_finds_the_optimum_of_a_linear_classifier(norm: str, eps: float, dual: int) -> None:
    """The margin rises by at most 2 ε times the dual norm of the weights: a corner for Linf, one direction for L2."""
    model, weight = _linear()
    x, y = torch.full((5, 3, 3, 3), 0.5), torch.zeros(5, dtype=torch.long)
    found, _ = _run(model, x, y, Ball(norm, eps), 3000)  # type: ignore[arg-type]
    gain = margin_loss(model(found), y) - margin_loss(model(x), y)
    most = 2 * eps * weight.norm(p=dual)
    assert (gain <= most + 1e-3).all()
    assert (gain >= 0.95 * most).all()


@pytest.mark.parametrize(("share", "broken"), [(0.9, True), (1.1, False)])
def test_breaks_a_linear_classifier_up_to_its_exact_radius(share: float, broken: bool) -> None:
    _, weight = _linear()
    model, _ = _linear(offset=share * 0.1 * float(weight.abs().sum()))
    x, y = torch.full((4, 3, 3, 3), 0.5), torch.zeros(4, dtype=torch.long)
    found, _ = _run(model, x, y, Ball("Linf", 0.1), 1500)
    assert ((model(found).argmax(dim=1) != y) == broken).all()


@given(
    seed=st.integers(0, 10_000),
    eps=st.floats(0.001, 2),
    norm=st.sampled_from(["Linf", "L2"]),
    side=st.integers(1, 6),
    channels=st.sampled_from([1, 3]),
)
@settings(max_examples=40, deadline=None)
def test_never_leaves_the_ball_or_the_box(seed: int, eps: float, norm: str, side: int, channels: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(4, channels, side, side, generator=generator)
    net = make_classifier(inputs=channels * side * side, seed=seed)
    with torch.no_grad():
        y = net(x).argmax(dim=1)
    ball = Ball(norm, eps)  # type: ignore[arg-type]
    found, target = _run(net, x, y, ball, 20, seed=seed, samples=3)
    for points in [found, *target.proposals]:
        assert (ball.excess(points, x) == 0).all()


@pytest.mark.parametrize("queries", [3, 4, 7, 32, 33, 34, 65, 66, 67, 100])
def test_asks_as_often_as_it_may(queries: int) -> None:
    model, _ = _linear()
    x, y = torch.full((2, 3, 3, 3), 0.5), torch.zeros(2, dtype=torch.long)
    _, target = _run(model, x, y, Ball("Linf", 0.1), queries)
    assert len(target.proposals) == queries
    schedule = _schedule(queries, 8)
    assert 2 * sum(schedule) + len(schedule) == queries
    assert schedule[0] >= 1


def test_stops_when_all_are_wrong() -> None:
    model, _ = _linear(offset=0.01)
    x, y = torch.full((3, 3, 3, 3), 0.5), torch.zeros(3, dtype=torch.long)
    found, target = _run(model, x, y, Ball("Linf", 0.1), 500)
    assert (model(found).argmax(dim=1) != y).all()
    assert len(target.proposals) < 20


def test_the_same_generator_gives_the_same_points_and_the_global_one_is_left_alone() -> None:
    hpm = make_hpm()
    samples = make_samples(hpm)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, again, other = (_run(hpm, samples.x, samples.y, Ball("Linf", 0.1), 90, seed=s)[0] for s in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_samples_not_attacked_stay_as_they_are() -> None:
    model, _ = _linear()
    x, y = torch.full((6, 3, 3, 3), 0.5), torch.zeros(6, dtype=torch.long)
    attacked = torch.tensor([True, False] * 3)
    found = spsa(
        Recorder(model, x), x, y, attacked=attacked, ball=Ball("Linf", 0.1), queries=40,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    assert torch.equal(found[1::2], x[1::2])
    assert not torch.equal(found[::2], x[::2])


def test_a_broken_sample_leaves_the_search_until_its_companions_make_it_right_again() -> None:
    """A probe breaks row 0 in query 3; the mixed batch is right on it again after the step, query 5."""
    searched: list[list[bool]] = []

    class Scripted:
        def propose(self, points: Tensor, rows: Tensor) -> Tensor:
            del points
            searched.append(rows.tolist())
            return torch.tensor([[0.0, 1.0] if len(searched) == 3 else [1.0, 0.0], [1.0, 0.0]])

        def accept(self, rows: Tensor) -> Tensor:
            del rows
            return torch.tensor([[0.0, 1.0] if len(searched) in (3, 4) else [1.0, 0.0], [1.0, 0.0]])

    x, y = torch.full((2, 1, 4, 4), 0.5), torch.zeros(2, dtype=torch.long)
    spsa(
        Scripted(), x, y, attacked=y == 0, ball=Ball("Linf", 0.1), queries=10, samples=2,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    assert [rows[0] for rows in searched] == [True, True, True, False, False, *[True] * 5]
    assert all(rows[1] for rows in searched)


class Rounded(nn.Module):
    """A classifier of quantised features: its gradient is zero everywhere."""

    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, x: Tensor) -> Tensor:
        rounded = torch.round(20 * x) / 20
        logits: Tensor = self.classifier(x + rounded.sub(x).detach() - x + x.detach())
        return logits


def test_breaks_what_zero_gradients_can_not() -> None:
    classifier = make_classifier()
    model = Rounded(classifier).requires_grad_(False)
    samples = make_samples(model, 60)
    x, y, ball = samples.x, samples.y, Ball("Linf", 0.2)
    point = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(ce(model(point), y).sum(), point)
    assert not gradient.any()
    stuck = apgd(model, x, y, loss=ce, ball=ball, steps=20, generator=torch.Generator().manual_seed(0)).x
    found, _ = _run(model, x, y, ball, 300)
    reached = apgd(classifier, x, y, loss=ce, ball=ball, steps=20, generator=torch.Generator().manual_seed(0)).x
    left = [float((model(points).argmax(dim=1) == y).float().mean()) for points in (stuck, found, reached)]
    assert left[1] < left[0] - 0.3
    assert left[1] <= left[2] + 0.05


def test_works_through_a_trial_on_hpm() -> None:
    """The trial judges every probe: what SPSA leaves right is broken by none of them."""
    hpm = make_hpm()
    batch, ball = _batch(hpm, make_samples(hpm)), Ball("Linf", 0.2)
    judged = JudgedBatch(hpm, None, batch, ball)
    found = spsa(
        judged, batch.x, batch.y, attacked=batch.correct, ball=ball, queries=200,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    outcome = judged.finish(found)
    assert (outcome.any_broken & batch.correct).sum() >= 5
    with torch.no_grad():
        wrong = hpm.logits(hpm.features(found)).argmax(dim=1) != batch.y
    assert torch.equal(outcome.final_broken, wrong)


@pytest.mark.parametrize(("norm", "eps", "slack"), [("Linf", 0.15, 0.15), ("L2", 0.8, 0.02)])
def test_keeps_up_with_square_on_the_digits(
    norm: str, eps: float, slack: float, digits_hpm: HPM, digits: Samples
) -> None:
    """On the hard target in its joint batch: behind Square in Linf, where corners are best, and level with it in L2."""
    batch, ball = _batch(digits_hpm, Samples(digits.x[:64], digits.y[:64])), Ball(norm, eps)  # type: ignore[arg-type]
    left = []
    for search in (spsa, square):
        judged = JudgedBatch(digits_hpm, None, batch, ball)
        found = search(
            judged, batch.x, batch.y, attacked=batch.correct, ball=ball, queries=500,
            generator=torch.Generator().manual_seed(0),
        )  # fmt: skip
        left.append(float((batch.correct & ~judged.finish(found).any_broken).float().mean()))
    assert left[0] < float(batch.correct.float().mean()) - 0.25
    assert left[0] <= left[1] + slack


def _batch(defense: Defense, samples: Samples) -> Batch:
    with torch.no_grad():
        z = defense.features(samples.x)
    return Batch(0, samples.x, samples.y, z, decide(defense, z))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"queries": 2}, "queries >= 3"),
        ({"samples": 0}, "samples >= 1"),
        ({"delta": 0.0}, r"delta and step in \(0, 2\]"),
        ({"delta": float("nan")}, r"delta and step in \(0, 2\]"),
        ({"step": 3.0}, r"delta and step in \(0, 2\]"),
    ],
)
def test_unusable_settings(settings: dict[str, float], message: str) -> None:
    x, y = torch.rand(1, 1, 4, 4), torch.zeros(1, dtype=torch.long)
    with pytest.raises(ValueError, match=message):
        spsa(
            Recorder(nn.Flatten(), x), x, y, attacked=y == 0, ball=Ball("Linf", 0.1),
            generator=torch.Generator(), **{"queries": 9, **settings},
        )  # type: ignore[arg-type] # fmt: skip
