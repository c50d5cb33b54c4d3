"""A trial's record against a naive judge, its counts, and what it refuses."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from toys import AskedInQueries, attacked, make_classifier, make_hpm, make_samples

from msa_eval import HPM, Classifier, WholeModel
from msa_eval.attacks import Ball, apgd
from msa_eval.attacks.batch import AdversarialBatch, Batch
from msa_eval.attacks.gradient import ApgdAttack
from msa_eval.attacks.losses import LOSSES, margin_loss
from msa_eval.attacks.query import SquareAttack
from msa_eval.defense.contexts import AmongOthers, OneAtATime
from msa_eval.defense.contract import decide
from msa_eval.defense.precision import EXACT, SearchPrecision, choose
from msa_eval.errors import AttackError
from msa_eval.judging.break_record import BreakRecord
from msa_eval.judging.judged_batch import JudgedBatch
from msa_eval.judging.majority import decide_by_majority, telling_draw
from msa_eval.judging.outcomes import BreakingBatch, RunResult
from msa_eval.judging.search_state import Setting
from msa_eval.surrogates import ensemble, get

BALL = Ball("Linf", 0.2)


def _batch(defense: Any, labels: nn.Module, count: int = 24, seed: int = 0) -> Batch:
    samples = make_samples(labels, count, seed=seed)
    with torch.no_grad():
        z = defense.features(samples.x)
    return Batch(0, samples.x, samples.y, z, decide(defense, z))


def _naive(defense: Any, batch: Batch, asked: list[Tensor]) -> dict[str, Tensor]:
    """Judge every batch by a fresh pass of the whole."""
    with torch.no_grad():
        logits = [defense.logits(defense.features(x)) for x in asked]
    wrong = torch.stack([answer.argmax(dim=1) != batch.y for answer in logits])
    margins = torch.stack([-margin_loss(answer, batch.y) for answer in (batch.logits, *logits)])
    rights = [batch.correct, *(~wrong & batch.correct)]
    return {
        "any_broken": wrong.any(dim=0),
        "min_margin": margins.amin(dim=0),
        "left": min(right.sum() for right in rights),
        "final_broken": wrong[-1],
    }


def _check(outcome: RunResult, naive: dict[str, Tensor]) -> None:
    assert torch.equal(outcome.any_broken, naive["any_broken"])
    assert torch.equal(outcome.final_broken, naive["final_broken"])
    assert outcome.committed.sum() == naive["left"]
    torch.testing.assert_close(outcome.min_margin, naive["min_margin"], atol=1e-5, rtol=1e-5)
    assert torch.equal(outcome.first_iterate >= 0, outcome.any_broken)


@pytest.mark.parametrize("surrogate", ["fc-oracle", "soft-hybrid", "ste"])
def test_every_iterate_is_judged_in_its_batch(surrogate: str) -> None:
    hpm = make_hpm().requires_grad_(False)
    batch = _batch(hpm, hpm)
    judged = JudgedBatch(hpm, get(surrogate), batch, BALL)
    asked: list[Tensor] = []

    def watched(x: Tensor) -> Tensor:
        asked.append(x.detach().clone())
        return judged(x)

    found = apgd(
        watched, batch.x, batch.y, loss=LOSSES["dlr"], ball=BALL, steps=12, generator=torch.Generator().manual_seed(0)
    )
    outcome = judged.finish(found.x)
    naive = _naive(hpm, batch, [*asked, found.x])
    _check(outcome, naive)
    assert outcome.any_broken.sum() > outcome.final_broken.sum() * 0
    first = [
        next((t for t, x in enumerate([*asked, found.x]) if bool(_wrong(hpm, batch, x)[i])), -1)
        for i in range(len(batch.y))
    ]
    assert outcome.first_iterate.tolist() == first


def _wrong(defense: Any, batch: Batch, x: Tensor) -> Tensor:
    with torch.no_grad():
        wrong: Tensor = defense.logits(defense.features(x)).argmax(dim=1) != batch.y
    return wrong


def test_judging_the_target_costs_no_trunk_pass() -> None:
    """N steps: N + 1 passes of the attack and one for the final batch, N of them back, whatever is judged beside."""
    for surrogate, decisions in (("fc-oracle", 12), ("soft-hybrid", 12), ("frozen-assignment", 12), ("ste", 1)):
        hpm = make_hpm().requires_grad_(False)
        batch = _batch(hpm, hpm)
        trunk: Any = hpm.trunk
        trunk.batches.clear()
        judged = JudgedBatch(hpm, get(surrogate), batch, BALL)
        outcome = judged.finish(ApgdAttack("ce", steps=10)(judged, torch.Generator().manual_seed(0)))
        assert trunk.batches == [24] * 12
        assert (outcome.forwards, outcome.backwards, outcome.decisions) == (12 * 24, 10 * 24, decisions * 24)


def test_a_targeted_loss_costs_no_pass_for_its_targets() -> None:
    hpm = make_hpm().requires_grad_(False)
    batch = _batch(hpm, hpm)
    judged = JudgedBatch(hpm, get("fc-oracle"), batch, BALL)
    outcome = judged.finish(ApgdAttack("dlr-targeted", steps=10, target=2)(judged, torch.Generator().manual_seed(0)))
    assert outcome.forwards == 12 * 24


def test_a_sample_wrong_on_the_clean_batch_never_counts_as_left() -> None:
    """The first sample is broken while the second, wrong at first, becomes right: none of the counted ones is left."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(1, 2))
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[1.0], [-1.0]]))
        model[1].bias.copy_(torch.tensor([-0.5, 0.5]))
    defense = WholeModel(model)
    x, y = torch.tensor([0.6, 0.6]).view(2, 1, 1, 1), torch.tensor([0, 1])
    judged = JudgedBatch(defense, None, Batch(0, x, y, x, decide(defense, x)), BALL)
    outcome = judged.finish(x - 0.2)
    assert judged.batch.correct.tolist() == [True, False]
    assert outcome.final_broken.tolist() == [True, False]
    assert outcome.committed.tolist() == [False, False]


def test_a_surrogate_with_a_trunk_of_its_own_costs_its_passes() -> None:
    hpm, other = make_hpm().requires_grad_(False), make_classifier(seed=3).requires_grad_(False)
    batch = _batch(hpm, hpm)
    theirs: Any = other.trunk
    judged = JudgedBatch(hpm, get("base", {"base": other}), batch, BALL)
    theirs.batches.clear()
    asked: list[Tensor] = []

    def watched(x: Tensor) -> Tensor:
        asked.append(x.detach().clone())
        return judged(x)

    found = apgd(
        watched, batch.x, batch.y, loss=LOSSES["ce"], ball=BALL, steps=10, generator=torch.Generator().manual_seed(0)
    )
    outcome = judged.finish(found.x)
    _check(outcome, _naive(hpm, batch, [*asked, found.x]))
    assert theirs.batches == [24] * 12
    assert (outcome.forwards, outcome.backwards) == (2 * 12 * 24, 10 * 24)
    assert torch.equal(outcome.surrogate_fooled, other(found.x).argmax(dim=1) != batch.y)


@pytest.mark.parametrize(
    ("make", "mixes"),
    [(make_hpm, True), (make_classifier, True), (make_classifier, False), (lambda: WholeModel(make_hpm()), True)],
)
def test_square_is_judged_on_the_mixed_batch(make: Any, mixes: bool) -> None:
    defense = make()
    labels = defense.model if isinstance(defense, WholeModel) else defense
    batch = _batch(defense, labels)
    judged = AskedInQueries(defense, None, batch, BALL, mixes_rows=mixes)
    found = SquareAttack(queries=40, p_init=0.8)(judged, torch.Generator().manual_seed(0))
    assert torch.equal(found, judged.held)
    _check(judged.finish(found), _naive(defense, batch, [*judged.asked, found]))


@pytest.mark.parametrize("rough", [False, True])
def test_what_a_query_found_stays_as_it_was_found(rough: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kept points are written over; findings, and each sample's best point, are not."""
    hpm = make_hpm().requires_grad_(False)
    batch = _batch(hpm, hpm)
    before = batch.x.clone()
    found: list[tuple[BreakingBatch, Tensor]] = []
    keep = BreakRecord._find

    def find(record: BreakRecord, finding: BreakingBatch) -> None:
        found.append((finding, finding.x.clone()))
        keep(record, finding)

    monkeypatch.setattr(BreakRecord, "_find", find)
    setting = Setting(keep=True, search=SearchPrecision("bf16", rough=rough))
    judged = AskedInQueries(hpm, None, batch, Ball("Linf", 0.08), setting=setting)
    judged.finish(SquareAttack(60, 0.8)(judged, torch.Generator().manual_seed(0)))
    assert len(found) > 4
    for finding, x in found:
        assert torch.equal(finding.x, x)
        assert torch.equal(finding.breaks, (decide(hpm, hpm.features(x)).argmax(dim=1) != batch.y) & batch.correct)
    points = torch.stack([batch.x, *judged.asked, judged._final.x])
    margins = torch.stack([-margin_loss(decide(hpm, hpm.features(x)), batch.y) for x in points])
    trace = judged.trace()
    for row, point in enumerate(trace.best.x):
        same = (points[:, row] == point).flatten(1).all(dim=1)
        assert float((margins[same, row] - trace.best_margin[row]).abs().min()) < (0.05 if rough else 1e-5)
    assert torch.equal(batch.x, before)


@given(st.integers(0, 2**30))
def test_a_batch_that_is_put_together_late_is_the_same(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    draw = partial(torch.rand, generator=generator)
    whole, places = AdversarialBatch(draw(6, 1, 2, 2), draw(6, 3)), (draw(6) < 0.5).nonzero().flatten()
    new, z = draw(len(places), 1, 2, 2), draw(len(places), 3)
    placed = whole.placing(places, new, z, rounded=True)
    x = whole.x.clone()
    x[places] = new
    rows = torch.randint(6, (4,), generator=generator)
    assert torch.equal(placed.x, x)
    assert torch.equal(placed.images(rows), x[rows])
    assert placed.rounded is not None
    assert placed.rounded.nonzero().flatten().tolist() == places.tolist()
    mask, other = draw(6) < 0.5, AdversarialBatch(draw(6, 1, 2, 2), draw(6, 3))
    expected = other.with_rows(mask, AdversarialBatch(placed.x, placed.z, placed.rounded))
    taken = other.take(mask, placed)
    assert taken.x is other.x
    for one, two in ((taken.x, expected.x), (taken.z, expected.z), (taken.marked(), mask & placed.rounded)):
        assert torch.equal(one, two)


def test_square_passes_only_what_it_proposes_and_what_it_confirms() -> None:
    """On a static model nothing is confirmed in vain: rows proposed, a whole batch for each new claim, a final one."""
    classifier = make_classifier()
    batch = _batch(classifier, classifier)
    trunk: Any = classifier.trunk
    trunk.batches.clear()
    judged = JudgedBatch(classifier, None, batch, BALL, mixes_rows=False)
    outcome = judged.finish(SquareAttack(queries=60, p_init=0.8)(judged, torch.Generator().manual_seed(0)))
    claims = int((outcome.any_broken & batch.correct).sum())
    whole = trunk.batches.count(24)
    assert outcome.forwards == sum(trunk.batches)
    assert whole - 1 <= claims + 1
    assert max(size for size in trunk.batches if size < 24) <= int(batch.correct.sum())
    assert outcome.backwards == 0


def test_a_claim_from_cached_features_is_confirmed_by_the_whole_batch() -> None:
    """A trunk that breaks the rules and answers differently in smaller batches can't fake a broken sample."""

    class Moody(Classifier):
        def features(self, x: Tensor) -> Tensor:
            z = super().features(x)
            return z if len(x) == 24 else -5 * z

    plain = make_classifier()
    moody = Moody(plain.trunk, plain.fc).eval()
    batch = _batch(moody, plain)
    outcome = JudgedBatch(moody, None, batch, Ball("Linf", 1e-6))
    found = SquareAttack(queries=20, p_init=0.8)(outcome, torch.Generator().manual_seed(0))
    assert not (outcome.finish(found).any_broken & batch.correct).any()


def test_a_hidden_batch_dependence_can_not_fake_a_broken_sample() -> None:
    """A target taken for static that answers wrongly in any smaller batch: nothing it says there is believed."""

    class Sly(Classifier):
        def logits(self, z: Tensor) -> Tensor:
            out = super().logits(z)
            return out if len(z) == 24 else -out

    plain = make_classifier()
    sly = Sly(plain.trunk, plain.fc).eval()
    batch = _batch(sly, plain)
    judged = JudgedBatch(sly, None, batch, Ball("Linf", 1e-6), mixes_rows=False)
    found = SquareAttack(queries=20, p_init=0.8)(judged, torch.Generator().manual_seed(0))
    assert not (judged.finish(found).any_broken & batch.correct).any()


def test_a_batch_that_was_never_decided_is_never_counted() -> None:
    """A target taken for static in which only the row moved most is wrong: no batch leaves fewer than all but one."""

    class Jealous(Classifier):
        def logits(self, z: Tensor) -> Tensor:
            out = super().logits(z)
            moved = (z - start[: len(z)]).norm(dim=1) if len(z) == len(start) else torch.zeros(len(z))
            worst = moved.argmax()
            if moved[worst] > 1e-6:
                out[worst] = -out[worst]
            return out

    plain = make_classifier()
    jealous = Jealous(plain.trunk, plain.fc).eval()
    start = torch.zeros(0, 6)
    batch = _batch(jealous, plain)
    start = batch.z
    judged = JudgedBatch(jealous, None, batch, Ball("Linf", 1e-4), mixes_rows=False)
    outcome = judged.finish(SquareAttack(queries=30, p_init=0.8)(judged, torch.Generator().manual_seed(0)))
    assert outcome.committed.sum() >= batch.correct.sum() - 1


@pytest.mark.parametrize(
    ("move", "message"),
    [
        (lambda x: x + 0.3, "left the Linf ball of radius 0.2"),
        (lambda x: x * torch.nan, "NaN or infinite|left the"),
        (lambda x: torch.where(x > 0.7, 1.2, x), "left the Linf ball"),
    ],
)
def test_an_attack_that_leaves_the_ball_is_an_error(move: Any, message: str) -> None:
    classifier = make_classifier()
    batch = _batch(classifier, classifier)
    judged = JudgedBatch(classifier, get("fc-oracle"), batch, BALL)
    with torch.no_grad():
        judged(move(batch.x))
    with pytest.raises(AttackError, match=message):
        judged.finish(batch.x)


def test_an_attack_that_stays_in_is_none() -> None:
    classifier = make_classifier()
    batch = _batch(classifier, classifier)
    judged = JudgedBatch(classifier, get("fc-oracle"), batch, BALL)
    outcome = judged.finish((batch.x + 0.2).clamp(0, 1))
    assert (outcome.perturbation <= 0.2 + 1e-6).all()


@pytest.mark.parametrize("where", ["target", "surrogate"])
def test_outputs_that_are_not_finite_are_an_error(where: str) -> None:
    class Broken(HPM):
        def logits(self, z: Tensor, *arguments: Any, **settings: Any) -> Tensor:
            return super().logits(z, *arguments, **settings) * (torch.nan if where == "target" else 1)

        def fc_logits(self, z: Tensor) -> Tensor:
            return super().fc_logits(z)

    hpm = make_hpm()
    batch = _batch(hpm, hpm)
    broken = Broken(hpm.trunk, hpm.fc).eval().requires_grad_(False)
    surrogate = get("x", {"x": lambda d, z: d.fc_logits(z) * (torch.inf if where == "surrogate" else 1)})
    judged = JudgedBatch(broken, surrogate, batch, BALL)
    with pytest.raises(AttackError, match="NaN or infinite"):
        judged.finish(batch.x)


def test_a_surrogate_of_another_shape_is_an_error() -> None:
    hpm = make_hpm()
    batch = _batch(hpm, hpm)
    judged = JudgedBatch(hpm, get("x", {"x": lambda defense, z: defense.fc_logits(z)[:, :2]}), batch, BALL)
    with pytest.raises(AttackError, match=r"'x' returned logits of shape \(24, 2\)"):
        judged(batch.x)


def test_verdicts_are_float32_whatever_the_search_uses() -> None:
    hpm = make_hpm()
    batch = _batch(hpm, hpm)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert decide(hpm, batch.z).dtype == torch.float32
        torch.testing.assert_close(decide(hpm, batch.z), batch.logits)


def _start(defense: Any, batch: Batch, seed: int = 0) -> AdversarialBatch:
    """Points that an earlier run may have found."""
    x = BALL.random(batch.x, torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return AdversarialBatch(x, defense.features(x))


@pytest.mark.parametrize("whole", [False, True])
def test_on_a_static_target_only_the_samples_searched_for_are_passed(whole: bool) -> None:
    """The others stay at their start; what is claimed of the rest is decided with the whole batch."""
    plain = make_classifier().requires_grad_(False)
    defense: Any = WholeModel(plain, batch_dependent=False) if whole else plain
    batch = _batch(defense, plain)
    start, counted = _start(defense, batch), torch.arange(24) % 3 == 0
    trunk: Any = plain.trunk
    judged = JudgedBatch(
        defense, get("ste"), batch, BALL, mixes_rows=False, setting=Setting(start=start, counted=counted)
    )  # fmt: skip
    trunk.batches.clear()
    asked: list[Tensor] = []

    def watched(x: Tensor) -> Tensor:
        asked.append(x.detach().clone())
        return judged(x)

    moved = torch.where(counted.view(-1, 1, 1, 1), BALL.random(batch.x, torch.Generator().manual_seed(1)), start.x)
    found = apgd(
        watched, batch.x, batch.y, loss=LOSSES["margin"], ball=BALL, steps=10, start=moved,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    outcome = judged.finish(found.x)
    passes = list(trunk.batches)
    for x in asked:
        assert torch.equal(x[~counted], start.x[~counted])
    naive = _naive(defense, batch, [*asked, found.x])
    assert torch.equal(outcome.any_broken, naive["any_broken"])
    torch.testing.assert_close(outcome.min_margin, naive["min_margin"], atol=1e-5, rtol=1e-5)
    if not whole:
        assert passes == [8] * 11 + [24]
        assert (outcome.forwards, outcome.backwards) == (8 * 11 + 24, 8 * 10)


@pytest.mark.parametrize("seen", ["static", "one at a time", "whole"])
def test_a_sample_wrong_from_the_start_costs_passes_only_where_rows_interact(seen: str) -> None:
    """Points of the others are what they are when it is searched for too."""
    defense: Any = make_classifier() if seen == "static" else make_hpm()
    labels = make_classifier() if seen == "static" else make_hpm()
    with torch.no_grad():
        batch = _batch(defense.requires_grad_(False), labels)
    batch = dataclasses.replace(batch, y=torch.where(torch.arange(24) % 3 == 0, (batch.y + 1) % 10, batch.y))
    assert 0 < int(batch.correct.sum()) < 24
    view = OneAtATime(defense, batch.z) if seen == "one at a time" else defense
    trials = []
    for counted in (None, torch.ones_like(batch.correct)):
        judged = JudgedBatch(
            view, get("fc-oracle"), batch, BALL, mixes_rows=seen != "static", setting=Setting(counted=counted)
        )
        points = ApgdAttack("ce", 4)(judged, torch.Generator().manual_seed(0))
        trials.append((points, judged.finish(points)))
    (fewer, outcome), (all_points, whole) = trials
    right = batch.correct
    torch.testing.assert_close(fewer[right], all_points[right], atol=1e-6, rtol=0)
    assert torch.equal(outcome.final_broken[right], whole.final_broken[right])
    assert outcome.committed.sum() == whole.committed.sum()
    if seen == "whole":
        assert outcome.backwards == whole.backwards == 4 * 24
    else:
        assert torch.equal(fewer[~right], batch.x[~right])
        assert (outcome.backwards, whole.backwards) == (4 * int(right.sum()), 4 * 24)


def test_a_hidden_batch_dependence_can_not_fake_one_in_a_cascade_either() -> None:
    class Sly(Classifier):
        def logits(self, z: Tensor) -> Tensor:
            out = super().logits(z)
            return out if len(z) == 24 else -out

    plain = make_classifier().requires_grad_(False)
    sly = Sly(plain.trunk, plain.fc).eval().requires_grad_(False)
    batch = _batch(sly, plain)
    setting = Setting(start=AdversarialBatch(batch.x, batch.z), counted=torch.arange(24) < 9)
    judged = JudgedBatch(sly, get("ste"), batch, Ball("Linf", 1e-6), mixes_rows=False, setting=setting)
    outcome = judged.finish(ApgdAttack("margin", steps=5)(judged, torch.Generator().manual_seed(0)))
    assert not (outcome.any_broken & batch.correct).any()


def test_rows_that_stay_are_judged_among_companions_that_move_and_the_batch_beside_them() -> None:
    hpm = make_hpm().requires_grad_(False)
    batch = _batch(hpm, hpm)
    start = _start(hpm, batch)
    setting = Setting(start=start, view=AmongOthers(hpm, start.z), keep=True)
    judged = JudgedBatch(hpm, get("ste"), batch, BALL, setting=setting)
    asked: list[Tensor] = []

    def watched(x: Tensor) -> Tensor:
        asked.append(x.detach().clone())
        return judged(x)

    found = apgd(
        watched, batch.x, batch.y, loss=LOSSES["margin"], ball=BALL, steps=6,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    outcome = judged.finish(found.x)
    whole = _naive(hpm, batch, [*asked, found.x])
    broken, margin = whole["any_broken"], whole["min_margin"]
    for x in asked:
        for i in range(24):
            mixed = x.clone()
            mixed[i] = start.x[i]
            logits = hpm(mixed)
            broken[i] |= bool(logits[i].argmax() != batch.y[i])
            margin[i] = torch.minimum(margin[i], -margin_loss(logits, batch.y)[i])
    assert torch.equal(outcome.any_broken, broken)
    torch.testing.assert_close(outcome.min_margin, margin, atol=1e-5, rtol=1e-5)
    assert outcome.committed.sum() == whole["left"]  # nobody commits to many batches at once
    assert torch.equal(outcome.final_broken, whole["final_broken"])

    proven = torch.zeros_like(broken)
    for finding in judged.trace().findings:
        for i in finding.breaks.nonzero().flatten().tolist():
            mixed = finding.x.clone()
            if finding.own is not None:
                mixed[i] = finding.own[i]
            assert int(hpm(mixed)[i].argmax()) != int(batch.y[i])
            proven[i] = True
    assert torch.equal(proven, broken & batch.correct)


def test_the_best_point_of_every_sample_is_its_lowest() -> None:
    hpm = make_hpm().requires_grad_(False)
    batch = _batch(hpm, hpm)
    judged = JudgedBatch(hpm, get("soft-hybrid"), batch, BALL)
    asked: list[Tensor] = [batch.x]

    def watched(x: Tensor) -> Tensor:
        asked.append(x.detach().clone())
        return judged(x)

    generator = torch.Generator().manual_seed(0)
    found = apgd(watched, batch.x, batch.y, loss=LOSSES["dlr"], ball=BALL, steps=8, generator=generator)
    judged.finish(found.x)
    asked.append(found.x)
    margins = torch.stack([-margin_loss(hpm(x), batch.y) for x in asked])
    torch.testing.assert_close(judged.trace().best_margin, margins.amin(dim=0), atol=1e-6, rtol=1e-6)
    for i, t in enumerate(margins.argmin(dim=0).tolist()):
        assert torch.equal(judged.trace().best.x[i], asked[t][i])
    torch.testing.assert_close(judged.trace().best.z, hpm.features(judged.trace().best.x))


def test_an_ensemble_is_its_members_on_one_scale() -> None:
    """The mean of the members' losses, on one trunk pass."""
    hpm = make_hpm().requires_grad_(False)
    batch = _batch(hpm, hpm)
    members = [get("fc-oracle"), get("soft-hybrid"), get("ste")]
    together = ensemble("mean", members, hpm, batch.x, batch.z)
    judged = JudgedBatch(hpm, together, batch, BALL)
    loss = ApgdAttack("ce", steps=3)._loss(judged, judged.rows)
    gradients, values = [], []
    for member in members:
        x = batch.x.clone().requires_grad_()
        logits = member.logits(hpm, hpm.features(x))
        clean = member.logits(hpm, batch.z)
        scaled = logits / (clean - clean.mean(dim=1, keepdim=True)).pow(2).mean().sqrt()
        value = LOSSES["ce"](scaled, batch.y)
        values.append(value.detach())
        gradients.append(torch.autograd.grad(value.sum(), x)[0])
    for _ in range(4):
        x = batch.x.clone().requires_grad_()
        value = loss(judged(x), batch.y)
        gradient = torch.autograd.grad(value.sum(), x)[0]
        expected = torch.stack(gradients).mean(dim=0)
        torch.testing.assert_close(value, torch.stack(values).mean(dim=0))
        torch.testing.assert_close(gradient, expected, atol=1e-6, rtol=1e-3)
    outcome = judged.finish(batch.x)
    assert outcome.forwards == 5 * 24


@pytest.mark.parametrize("kind", ["static", "solo", "ensemble", "own"])
@pytest.mark.parametrize("early", [False, True])
def test_rows_that_are_searched_for_alone_are_answered_and_judged_as_in_their_batch(kind: str, early: bool) -> None:
    model: HPM | Classifier = make_classifier() if kind == "static" else make_hpm()
    model = model.requires_grad_(False)
    batch = _batch(model, model)
    target = model if kind == "static" else OneAtATime(model, batch.z)
    surrogate: Any = get("ste")
    if kind == "ensemble":
        surrogate = ensemble("mean", [get("fc-oracle"), get("soft-hybrid")], target, batch.x, batch.z)
    if kind == "own":
        surrogate = get("own", {"own": make_classifier(seed=3).requires_grad_(False)})
    setting = Setting(counted=batch.correct & (torch.arange(24) % 2 == 0), early_stop=early, keep=True)
    whole, part = (
        JudgedBatch(target, surrogate, batch, BALL, mixes_rows=kind != "static", setting=setting) for _ in range(2)
    )
    rows, model_of_rows = part.rows, part.of_rows()
    assert 0 < len(rows) < 24
    generator = torch.Generator().manual_seed(0)
    for _ in range(8):
        x = BALL.random(batch.x, generator)
        x = batch.x.index_copy(0, rows, x[rows]).requires_grad_()
        points = x.detach()[rows].requires_grad_()
        logits, some = whole(x)[..., rows, :], model_of_rows(points)
        torch.testing.assert_close(some, logits)
        (gradient,) = torch.autograd.grad(logits.pow(2).sum(), x)
        (own,) = torch.autograd.grad(some.pow(2).sum(), points)
        torch.testing.assert_close(own, gradient[rows])
        assert torch.equal(whole.counted, part.counted)
        if not part.searching:
            break
    outcomes = [judged.finish(judged.start.x) for judged in (whole, part)]
    assert bool((outcomes[0].any_broken & batch.correct).any())
    for field in dataclasses.fields(RunResult):
        if field.name == "trace":
            continue
        assert bool(torch.as_tensor(getattr(outcomes[0], field.name) == getattr(outcomes[1], field.name)).all()), field
    assert torch.equal(whole.trace().best.x, part.trace().best.x)


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_several_points_of_a_row_are_judged_as_one_after_the_other(early: bool, precision: str) -> None:
    """A row is broken where one of its points breaks it, its lowest margin is the lowest of all of them."""
    model = make_classifier().requires_grad_(False)
    batch = _batch(model, model)
    search = EXACT if precision == "fp32" else choose("bf16", model, batch.x)
    setting = Setting(counted=batch.correct & (torch.arange(24) % 2 == 0), early_stop=early, keep=True, search=search)
    judged = JudgedBatch(model, get("ste"), batch, BALL, mixes_rows=False, setting=setting)
    assert judged.has_copies
    rows = judged.rows
    places = torch.cat([rows, rows[: len(rows) // 2], rows])
    ask = judged.of_rows(places)
    generator = torch.Generator().manual_seed(0)
    broken, margin, passed = torch.zeros(24, dtype=torch.bool), -margin_loss(batch.logits, batch.y), 0
    for _ in range(4):
        drawn = [BALL.random(batch.x, generator)[at] for at in places.tolist()]
        points = torch.stack(drawn).requires_grad_()
        here = torch.isin(places, judged.rows)
        logits = ask(points)
        passed += int(here.sum())
        due = model(points)
        torch.testing.assert_close(logits[here], due[here], atol=0.05 if precision == "bf16" else 1e-6, rtol=1e-2)
        assert not logits[~here].any()
        (gradient,) = torch.autograd.grad(logits.sum(), points)
        assert gradient[~here].abs().sum() == 0 < gradient[here].abs().sum()
        for at, answer in zip(places[here].tolist(), due[here], strict=True):
            found = -margin_loss(answer.unsqueeze(0), batch.y[at : at + 1])[0]
            broken[at] |= bool(found < 0)
            margin[at] = torch.minimum(margin[at], found)
    assert torch.equal(judged.broken & batch.correct, broken & batch.correct)
    assert 0 < int((broken & batch.correct).sum()) < len(rows)
    if precision == "fp32":
        searched = setting.counted if setting.counted is not None else batch.correct
        torch.testing.assert_close(judged.margin[searched], margin[searched])
        assert judged.forwards == passed
    else:
        assert judged.forwards >= passed  # what seemed broken was passed again
    outcome = judged.finish(judged.start.x)
    best = judged.trace().best.x
    assert (model(best).argmax(dim=1) != batch.y)[outcome.any_broken].all()


def test_rows_that_others_decide_about_have_one_point_each() -> None:
    hpm = make_hpm().requires_grad_(False)
    batch = _batch(hpm, hpm)
    for target, mixes, setting in (
        (hpm, True, Setting()),
        (OneAtATime(hpm, batch.z), True, Setting()),
        (hpm, False, Setting(draws=3)),
    ):
        judged: Any = JudgedBatch(target, get("ste"), batch, BALL, mixes_rows=mixes, setting=setting)
        assert not judged.has_copies


def test_points_of_rows_searched_for_alone_are_held_to_the_ball() -> None:
    classifier = make_classifier().requires_grad_(False)
    batch = _batch(classifier, classifier)
    for reach, fails in ((0.5, False), (1.5, True)):
        judged = JudgedBatch(
            classifier, get("ste"), batch, BALL, mixes_rows=False, setting=Setting(counted=torch.arange(24) == 3)
        )
        judged.of_rows()(batch.x[3:4] + reach * BALL.eps * (1 - 2 * (batch.x[3:4] > 0.5).float()))
        if fails:
            with pytest.raises(AttackError, match="left the Linf ball"):
                judged.finish(batch.x)
        else:
            judged.finish(batch.x)


class _Noisy(nn.Module):
    """Two classes by one pixel, wrong at random: always below 0, never above 1, in between in proportion."""

    def forward(self, x: Tensor) -> Tensor:
        margin = x.flatten(1)[:, 0] - torch.rand(len(x))
        return torch.stack([margin, -margin], dim=1)


def test_a_stochastic_target_is_wrong_where_most_draws_are() -> None:
    """Majorities of 9 draws of a coin of known bias, against the binomial law."""
    defense = WholeModel(_Noisy(), batch_dependent=True)
    torch.manual_seed(0)
    for chance, expected in ((0.9, 0.00089), (0.5, 0.5), (0.3, 0.9012)):
        x = torch.full((4000, 1, 1, 1), chance)
        y = torch.zeros(4000, dtype=torch.long)
        wrong = (decide_by_majority(defense, x, y, draws=9).argmax(dim=1) != y).float().mean()
        assert float(wrong) == pytest.approx(expected, abs=0.02)


def test_a_majority_is_told_even_in_a_tie() -> None:
    """Ties of the logits are right or wrong by the place of the label, and so is their median."""

    drawn = torch.tensor([[[0.0, 0.0]], [[1.0, 0.0]], [[0.0, 0.0]]])
    assert int(telling_draw(drawn, torch.tensor([0])).argmax()) == 0
    drawn = torch.tensor([[[0.0, 0.0]], [[0.0, 1.0]], [[0.0, 0.0]]])
    assert int(telling_draw(drawn, torch.tensor([1])).argmax()) == 0


def test_draws_are_averaged_by_the_attack_and_the_target_is_asked_once_a_point() -> None:
    torch.manual_seed(0)
    defense = WholeModel(_Noisy(), batch_dependent=True)
    x = torch.full((8, 1, 1, 1), 0.999)
    y = torch.zeros(8, dtype=torch.long)
    batch = Batch(0, x, y, x, decide_by_majority(defense, x, y, draws=9))
    judged = JudgedBatch(defense, get("ste"), batch, Ball("Linf", 0.01), setting=Setting(draws=9, eot=4))
    outcome = judged.finish(ApgdAttack("margin", steps=10)(judged, torch.Generator().manual_seed(0)))
    assert outcome.decisions == 8 * 9 * 12
    assert outcome.forwards == 8 * (4 * 11 + 1)
    assert outcome.backwards == 8 * 4 * 10
    assert not outcome.any_broken.any()


@pytest.mark.parametrize(("chance", "broken"), [(0.7, 0.0), (0.3, 1.0)])
def test_many_looks_at_a_stochastic_target_do_not_break_it_by_chance(chance: float, broken: float) -> None:
    """Wrong in 3 draws of 10: of 40 majorities of 9 some are wrong (0.099 each), but none is confirmed by 60 of 99."""
    torch.manual_seed(0)
    defense = WholeModel(_Noisy(), batch_dependent=True)
    x = torch.full((20, 1, 1, 1), chance)
    y = torch.zeros(20, dtype=torch.long)
    batch = Batch(0, x, y, x, torch.tensor([[1.0, 0.0]]).expand(20, -1))
    judged = JudgedBatch(defense, get("ste"), batch, Ball("Linf", 1e-6), setting=Setting(draws=9))
    for _ in range(40):
        judged(x)
    assert float(judged.finish(x).any_broken.float().mean()) == pytest.approx(broken, abs=0.11)


def _watched(target: Any, batch: Batch, setting: Setting, surrogate: str, *, mixes_rows: bool) -> Any:
    """One APGD run with every batch that was judged, the final one last."""
    judged = JudgedBatch(target, get(surrogate), batch, Ball("Linf", 0.06), mixes_rows=mixes_rows, setting=setting)
    return *attacked(judged), judged


@pytest.mark.parametrize("kind", ["static", "solo"])
def test_what_breaks_apart_from_the_others_is_passed_no_more_and_nothing_else_changes(kind: str) -> None:
    model: Any = (make_classifier() if kind == "static" else make_hpm()).requires_grad_(False)
    batch = _batch(model, model)
    target = model if kind == "static" else OneAtATime(model, batch.z)
    whole, early = (
        _watched(target, batch, Setting(early_stop=stops, keep=True), "ste", mixes_rows=kind == "solo")
        for stops in (False, True)
    )
    for outcome, seen, _ in (whole, early):
        _check(outcome, _naive(target, batch, seen))
    assert torch.equal(whole[0].any_broken, early[0].any_broken)
    assert torch.equal(whole[0].first_iterate, early[0].first_iterate)
    broken = early[0].any_broken & batch.correct
    assert 0 < int(broken.sum()) < int(batch.correct.sum())
    torch.testing.assert_close(whole[1][-1][~broken], early[1][-1][~broken])
    first = early[0].first_iterate[broken]
    unbroken = int((batch.correct & ~broken).sum())
    assert early[0].forwards == int((first + 1).sum()) + unbroken * (12 + 2)
    assert early[0].backwards == int((first + 1).clamp(max=12).sum()) + unbroken * 12
    assert early[0].forwards < whole[0].forwards
    for i in broken.nonzero().flatten().tolist():  # it ends where it broke
        assert torch.equal(early[1][-1][i], early[1][int(early[0].first_iterate[i])][i])
    assert bool(early[0].final_broken[broken].all())


def test_in_a_batch_that_is_decided_together_what_broke_stays_and_keeps_the_others_company() -> None:
    hpm = make_hpm().requires_grad_(False)
    batch = _batch(hpm, hpm)
    setting = Setting(counted=batch.correct, stays=True, early_stop=True, keep=True)
    outcome, seen, judged = _watched(hpm, batch, setting, "soft-hybrid", mixes_rows=True)
    _check(outcome, _naive(hpm, batch, seen))
    broken = outcome.any_broken & batch.correct
    assert 0 < int(broken.sum()) < int(batch.correct.sum())
    for i, first in enumerate(outcome.first_iterate.tolist()):
        still = seen if not batch.correct[i] else seen[first:] if broken[i] else []
        assert all(torch.equal(x[i], still[0][i]) for x in still)
    moved = int(batch.correct.sum()) * 13
    assert outcome.forwards < moved + 24 * (1 + len(set(outcome.first_iterate[broken].tolist())))
    assert outcome.backwards < int(batch.correct.sum()) * 12
    proven = torch.zeros_like(broken)
    for finding in judged.trace().findings:
        proven |= finding.breaks
        assert bool((hpm(finding.x).argmax(dim=1) != batch.y)[finding.breaks].all())
    assert torch.equal(proven, broken)


def test_a_search_ends_when_nothing_stands() -> None:
    classifier = make_classifier().requires_grad_(False)
    batch = _batch(classifier, classifier)
    far = Ball("Linf", 1.0)
    judged = JudgedBatch(classifier, get("ste"), batch, far, mixes_rows=False, setting=Setting(early_stop=True))
    calls = []
    call = judged._passes.of_batch
    judged._passes.of_batch = lambda x, moved=None: (calls.append(len(x)), call(x, moved))[1]  # type: ignore[method-assign]
    outcome = judged.finish(ApgdAttack("margin", steps=50)(judged, torch.Generator().manual_seed(0)))
    assert bool(outcome.any_broken[batch.correct].all())
    assert len(calls) == int(outcome.first_iterate[batch.correct].max()) + 1 < 51


def test_what_breaks_within_rounding_is_searched_for_on() -> None:
    """A lead of minus a hundred-thousandth of the logits' size breaks, but another pass may round it away."""
    size = torch.tensor([[1.0, 1.0 + 1e-5], [1.0, 1.1]])

    class Fixed(nn.Module):
        def features(self, x: Tensor) -> Tensor:
            return x.flatten(1)

        def logits(self, z: Tensor) -> Tensor:
            return size[: len(z)] + 0 * z

    x = torch.full((2, 2, 1, 1), 0.5)
    batch = Batch(0, x, torch.zeros(2, dtype=torch.long), x.flatten(1), torch.tensor([[1.0, 0.0], [1.0, 0.0]]))
    judged = JudgedBatch(Fixed(), get("ste"), batch, BALL, mixes_rows=False, setting=Setting(early_stop=True))
    judged(x)
    assert judged.broken.tolist() == [True, True]
    assert judged.counted.tolist() == [True, False]


def test_what_parts_of_a_batch_claim_together_is_confirmed_by_the_whole() -> None:
    """A trunk that lies where it is given a part of the batch alone breaks nothing."""

    class Sly(HPM):
        def features(self, x: Tensor) -> Tensor:
            z = super().features(x)
            return z if len(x) == 24 else -z

    hpm: Any = make_hpm().requires_grad_(False)
    hpm.__class__ = Sly
    batch = _batch(hpm, hpm)
    counted = batch.correct & (torch.arange(24) < 12)
    setting = Setting(counted=counted, stays=True, early_stop=True, keep=True)
    outcome, seen, judged = _watched(hpm, batch, setting, "soft-hybrid", mixes_rows=True)
    _check(outcome, _naive(hpm, batch, seen))
    assert outcome.forwards > int(counted.sum()) * 13 + 24  # its claims were passed again
    for finding in judged.trace().findings:
        assert bool((hpm(finding.x).argmax(dim=1) != batch.y)[finding.breaks].all())
