"""Each guard against a peer that commits the fault, and one that does not."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from toys import make_hpm, make_samples

from msa_eval.attacks.ball import Ball
from msa_eval.attacks.batch import Batch
from msa_eval.attacks.external import (
    BatchModel,
    ExternalAttackError,
    Fault,
    Found,
    LibraryAttack,
    describe_faults,
    find,
    run_guarded,
)
from msa_eval.attacks.external.attack import ExternalAttack
from msa_eval.defense.contract import decide
from msa_eval.judging.judged_batch import JudgedBatch
from msa_eval.judging.outcomes import RunResult
from msa_eval.surrogates import FC_ORACLE, STE

BALL = Ball("Linf", 0.06)
SEED = 5

Toy = Callable[[nn.Module, Tensor, Tensor], Tensor]


def _fgsm(model: nn.Module, x: Tensor, y: Tensor, eps: float = BALL.eps) -> Tensor:
    """A peer without a fault: one step of the sign, shown to the model once more."""
    x = x.requires_grad_()
    loss = nn.functional.cross_entropy(model(x), y, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, x)
    points = (x + eps * gradient.sign()).clamp(0, 1).detach()
    model(points)
    return points


def _case() -> tuple[JudgedBatch, Batch]:
    with torch.random.fork_rng():
        hpm = make_hpm()
    samples = make_samples(hpm.fc_target, 10)
    with torch.no_grad():
        z = hpm.features(samples.x)
        batch = Batch(0, samples.x, samples.y, z, decide(hpm, z))
    for parameter in hpm.parameters():
        parameter.requires_grad_(False)
    return JudgedBatch(hpm, FC_ORACLE, batch, BALL), batch


def _peer(search: Toy) -> LibraryAttack:
    return LibraryAttack("toy:attack", lambda model, x, y, seed, turn: search(model, x, y))


def _batch_model(judged: JudgedBatch, batch: Batch, *, rows: Tensor | None = None, ball: Ball = BALL) -> BatchModel:
    parts = [judged.target] if isinstance(judged.target, nn.Module) else []
    return BatchModel(judged.ask, batch.x, batch.y, ball, classes=4, rows=rows, parts=parts)


def _run_guarded(search: Toy) -> tuple[Found, JudgedBatch, Batch]:
    judged, batch = _case()
    return run_guarded(_peer(search), _batch_model(judged, batch), seed=SEED), judged, batch


def _run(search: Toy) -> tuple[RunResult, Batch]:
    judged, batch = _case()
    attack = ExternalAttack(_peer(search))
    return judged.finish(attack(judged, torch.Generator().manual_seed(0))), batch


def _kinds(found: Found) -> set[str]:
    return {fault.kind for fault in found.faults}


def test_a_peer_without_faults_is_left_alone() -> None:
    found, _, batch = _run_guarded(_fgsm)
    assert found.faults == ()
    expected = _fgsm(make_hpm().fc_target, batch.x.clone(), batch.y)
    assert torch.equal(found.x, expected)


def test_clean_images_give_way_to_what_was_shown() -> None:
    returned: list[Tensor] = []

    def only_if_fooled(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        points = _fgsm(model, x.clone(), y, 0.01)
        with torch.no_grad():
            fooled = model(points).argmax(dim=1) != y
        returned.append(torch.where(fooled.view(-1, 1, 1, 1), points, x))
        return returned[0]

    found, _, batch = _run_guarded(only_if_fooled)
    shown = _fgsm(make_hpm().fc_target, batch.x.clone(), batch.y, 0.01)
    clean = (returned[0] == batch.x).flatten(1).all(dim=1)
    assert clean.sum() > 4
    assert torch.equal(found.x, shown)  # a step up the loss: every image's best
    assert found.faults == (Fault("clean", int(clean.sum())),)


def test_clean_images_never_shown_otherwise_are_counted() -> None:
    found, _, batch = _run_guarded(lambda model, x, y: x)
    assert found.faults == (Fault("unmoved", 10),)
    assert torch.equal(found.x, batch.x)


def test_a_flipped_mode_is_put_back_before_anybody_is_answered() -> None:
    judged, batch = _case()
    target = judged.target
    assert isinstance(target, nn.Module)
    seen: list[bool] = []
    handle = target.trunk.register_forward_pre_hook(lambda module, _: seen.append(module.training))

    def reaches_in(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        target.train()
        return _fgsm(model, x, y)

    found = run_guarded(_peer(reaches_in), _batch_model(judged, batch), seed=SEED)
    handle.remove()
    assert _kinds(found) == {"mode"}
    assert len(seen) == 2
    assert not any(seen)
    assert not any(module.training for module in target.modules())

    def flips_the_seat(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        points = _fgsm(model, x, y)
        model.train()
        return points

    found, judged, _ = _run_guarded(flips_the_seat)
    assert _kinds(found) == {"mode"}
    assert isinstance(judged.target, nn.Module)
    assert not judged.target.training


def test_a_seat_has_nothing_to_change() -> None:
    batch_model = _batch_model(*_case())
    assert list(batch_model.children()) == list(batch_model.parameters()) == list(batch_model.buffers()) == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.uint8])
def test_other_types_are_converted_and_told(dtype: torch.dtype) -> None:
    scale = 255 if dtype == torch.uint8 else 1
    found, _, batch = _run_guarded(lambda model, x, y: (_fgsm(model, x, y) * scale).to(dtype))
    assert found.x.dtype == torch.float32
    assert Fault("dtype", 10, detail=str(dtype)[6:]) in found.faults
    assert not BALL.excess(found.x, batch.x).any()
    expected = _fgsm(make_hpm().fc_target, batch.x.clone(), batch.y)
    assert (found.x - expected).abs().max() < (1.01 / 255 if dtype == torch.uint8 else 1e-3)


def test_whole_grey_levels_are_noticed() -> None:
    found, _, _ = _run_guarded(lambda model, x, y: (_fgsm(model, x, y) * 255).to(torch.uint8).float() / 255)
    assert "rounded" in _kinds(found)
    # Images of whole grey levels and a step of a few of them are nobody's fault.
    judged, batch = _case()
    x = (batch.x * 255).round() / 255
    batch_model = BatchModel(judged.ask, x, batch.y, Ball("Linf", 16 / 255), classes=4)
    found = run_guarded(_peer(lambda model, x, y: _fgsm(model, x, y, 16 / 255)), batch_model, seed=SEED)
    assert "rounded" not in _kinds(found)


def _states() -> tuple[object, ...]:
    return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()


def test_generators_are_put_back() -> None:
    def seeds(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        torch.manual_seed(0)
        np.random.seed(0)
        random.seed(0)
        return _fgsm(model, x, y)

    before = _states()
    found, _, _ = _run_guarded(seeds)
    assert _kinds(found) == {"seed"}
    assert _states() == before

    def draws(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        noise = torch.rand(1).item() + np.random.rand() + random.random()
        drawn.append(noise)
        return _fgsm(model, x, y)

    drawn: list[float] = []
    assert _run_guarded(draws)[0].faults == _run_guarded(draws)[0].faults == ()
    assert drawn[0] == drawn[1]  # the same seed gives a peer the same draws
    assert _states() == before


def test_a_model_that_draws_is_not_seeded_by_a_peer() -> None:
    """A peer that seeds before each question would else be answered with the same draw every time."""

    def drawn(seeding: bool) -> list[float]:
        answers: list[float] = []

        def ask(x: Tensor, rows: Tensor) -> Tensor:
            answers.append(torch.rand(1).item())
            return torch.zeros(len(x), 4)

        def search(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
            for _ in range(3):
                if seeding:
                    torch.manual_seed(0)
                model(x)
                torch.rand(7)
            return x

        torch.manual_seed(3)
        x = torch.full((2, 3, 2, 2), 0.5)
        run_guarded(_peer(search), BatchModel(ask, x, torch.zeros(2, dtype=torch.long), BALL, classes=4), seed=SEED)
        return answers

    with torch.random.fork_rng():
        seeded, free = drawn(True), drawn(False)
        torch.manual_seed(3)
        assert seeded == free == [torch.rand(1).item() for _ in range(3)]


def test_written_logits_are_a_copy() -> None:
    kept: list[Tensor] = []

    def ask(x: Tensor, rows: Tensor) -> Tensor:
        kept.append(torch.ones(len(x), 4))
        return kept[-1]

    def writes(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        model(x)[torch.arange(len(y)), y] = -torch.inf
        return x

    x = torch.full((2, 3, 2, 2), 0.5)
    batch_model = BatchModel(ask, x, torch.zeros(2, dtype=torch.long), BALL, classes=4)
    assert "logits" in _kinds(run_guarded(_peer(writes), batch_model, seed=SEED))
    assert torch.equal(kept[0], torch.ones(2, 4))


def test_written_logits_and_images_change_no_verdict() -> None:
    def honest(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return _fgsm(model, x, y)

    def vandal(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        given = x.clone()
        points = _fgsm(model, x, y)
        with torch.no_grad():
            shown = points.clone()
            model(shown).fill_(torch.nan)
            shown.fill_(0.5)
            x.fill_(0.25)
            y.fill_(0)
        assert not torch.equal(given, x)
        return points

    first, second = _run(honest)[0], _run(vandal)[0]
    assert torch.equal(first.any_broken, second.any_broken)
    assert torch.equal(first.final_broken, second.final_broken)
    assert torch.equal(first.min_margin, second.min_margin)


def test_points_outside_are_projected_and_told() -> None:
    found, _, batch = _run_guarded(lambda model, x, y: _fgsm(model, x, y, 0.1))
    (fault,) = found.faults
    assert (fault.kind, fault.count) == ("outside", 10)
    assert fault.size == pytest.approx(0.04, abs=2e-6)
    assert torch.allclose(found.x, _fgsm(make_hpm().fc_target, batch.x.clone(), batch.y), atol=1e-7)
    assert describe_faults(found.faults) == ("outside: 10 points left the ball by up to 0.04 and were projected",)


def test_points_outside_break_nothing_while_they_are_shown() -> None:
    """Far outside all is broken; only what stays inside may count, beside clean images where others are outside."""

    def mixed(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        points = 1 - x
        points[0] = x[0]
        model(points)
        return x

    outcome, batch = _run(mixed)
    assert torch.equal(outcome.any_broken, ~batch.correct)
    far, _ = _run(lambda model, x, y: _fgsm(model, x, y, 0.4))
    assert far.any_broken.sum() > (~batch.correct).sum()  # brought into the ball, they do


def test_a_static_target_is_never_asked_about_nothing() -> None:
    judged, batch = _case()
    target = judged.target
    assert isinstance(target, nn.Module)
    asked: list[int] = []

    class Static:
        batch_dependent = False

        def features(self, x: Tensor) -> Tensor:
            return target.features(x)

        def logits(self, z: Tensor) -> Tensor:
            asked.append(len(z))
            return target.fc_logits(z)

    fc = Static()
    batch = Batch(0, batch.x, batch.y, batch.z, decide(fc, batch.z))
    judged = JudgedBatch(fc, STE, batch, BALL, mixes_rows=False)
    attack = ExternalAttack(_peer(lambda model, x, y: (model(1 - x[:4]), x)[1]))
    outcome = judged.finish(attack(judged, torch.Generator()))
    assert min(asked) > 0
    assert torch.equal(outcome.any_broken, ~batch.correct)


@pytest.mark.parametrize(
    ("search", "message"),
    [
        (lambda model, x, y: torch.full_like(x, torch.nan), "returned 10 points that are not finite"),
        (lambda model, x, y: x[:3], r"returned a tensor of shape \(3, 3, 2, 2\) for images of shape \(10, 3, 2, 2\)"),
        (lambda model, x, y: None, "returned NoneType"),
        (lambda model, x, y: model(torch.full_like(x, torch.inf)), "images that are not finite"),
        (lambda model, x, y: model(x[:, :1]), "showed the model images of shape"),
    ],
)
def test_what_can_not_be_judged_is_an_error(search: Toy, message: str) -> None:
    with pytest.raises(ExternalAttackError, match=message):
        _run_guarded(search)


def test_generators_are_put_back_after_an_error() -> None:
    before = _states()
    with pytest.raises(ZeroDivisionError):
        _run_guarded(lambda model, x, y: x / (1 // 0))
    assert _states() == before


def test_images_left_out_are_answered_among_the_others_as_last_seen() -> None:
    judged, batch = _case()
    hpm = make_hpm()
    judged = JudgedBatch(hpm, STE, batch, BALL)
    moved = (batch.x + 0.05).clamp(0, 1)

    def drops(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        with torch.no_grad():
            model(moved)
            got.append(model(batch.x[[7, 2]]))
            got.append(model(torch.cat([moved[[7]], batch.x[[7]], moved[[2]], batch.x[[4]]])))
        return moved

    got: list[Tensor] = []
    run_guarded(_peer(drops), _batch_model(judged, batch), seed=SEED)
    mixed = moved.clone()
    mixed[[7, 2]] = batch.x[[7, 2]]
    with torch.no_grad():
        assert torch.allclose(got[0], hpm(mixed)[[7, 2]], atol=1e-6)
        mixed[[7, 2]], mixed[4] = moved[[7, 2]], batch.x[4]
        assert torch.allclose(got[1][[0, 2, 3]], hpm(mixed)[[7, 2, 4]], atol=1e-6)
        mixed[7] = batch.x[7]  # a second point of one image is asked in a batch after
        assert torch.allclose(got[1][1], hpm(mixed)[7], atol=1e-6)


def test_passes_are_counted() -> None:
    outcome, _ = _run(_fgsm)
    assert (outcome.forwards, outcome.backwards) == (30, 10)  # two questions, one gradient, one final pass


def test_inference_mode_spoils_nothing() -> None:
    def infers(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        with torch.inference_mode():
            points = (x + 0.03).clamp(0, 1)
            model(points)
        return points.clone()

    judged, batch = _case()
    found = run_guarded(_peer(infers), _batch_model(judged, batch), seed=SEED)
    assert not judged.latest.z.is_inference()
    judged.finish(found.x)
    assert not judged.trace().best.x.is_inference()


def test_a_subset_is_all_that_a_peer_is_given() -> None:
    judged, batch = _case()
    rows = torch.tensor([1, 4, 9])
    found = run_guarded(_peer(_fgsm), _batch_model(judged, batch, rows=rows), seed=SEED)
    assert len(found.x) == 3
    assert torch.equal(found.x, _fgsm(make_hpm().fc_target, batch.x[rows].clone(), batch.y[rows]))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("autoatack:fab", {}, r"did you mean autoattack:fab\?"),
        ("autoattack", {}, "expected library:attack"),
        ("autoattack:fabt", {}, "did you mean 'fab-t'"),
        ("autoattack:square", {"steps": 3}, "has no option 'steps'.*takes: queries, p_init"),
        ("autoattack:apgd-t", {"steps": 2.5}, "expected steps to be a whole number, but got 2.5"),
    ],
)
def test_names_and_options_are_checked(name: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find(name, BALL, options)
