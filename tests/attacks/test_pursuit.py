"""Mixtures of points and pursuits, against real batches and the hard decision."""

from __future__ import annotations

import pytest
import torch
from toys import make_batch, make_hpm

from msa_eval import HPM
from msa_eval.attacks import Ball
from msa_eval.attacks.batch import AdversarialBatch, Batch
from msa_eval.attacks.losses import margin_loss
from msa_eval.attacks.mixtures import MixtureSearch
from msa_eval.attacks.pursuit import PursuitAttack, RecombinationAttack, _Pursuit, gather, roles
from msa_eval.defense.contract import decide
from msa_eval.judging.judged_batch import JudgedBatch
from msa_eval.judging.search_state import Setting
from msa_eval.surrogates import get

BALL = Ball("Linf", 0.2)


def test_recombined_batches_are_real_ones_and_break_what_no_single_batch_did() -> None:
    """Seen from outside: every batch that the trial judged is a mixture of the points, passed as a whole."""
    broke_more = False
    for seed in range(6):
        hpm = make_hpm().requires_grad_(False)
        batch = make_batch(hpm, 12, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        clouds = [batch.x, *(BALL.random(batch.x, generator) for _ in range(6))]
        points = [AdversarialBatch(x, hpm.features(x)) for x in clouds]
        broken = torch.stack([decide(hpm, p.z).argmax(1) != batch.y for p in points]).any(dim=0)
        unbroken = batch.correct & ~broken
        judged = JudgedBatch(
            hpm, None, batch, BALL, setting=Setting(counted=unbroken, known=broken, keep=True, found=points)
        )
        attack = RecombinationAttack(sweeps=2)
        outcome = judged.finish(attack(judged, generator) if bool(unbroken.any()) else batch.x)
        for finding in judged.trace().findings:
            assert finding.own is None
            for j, image in enumerate(finding.x):
                assert any(torch.equal(image, cloud[j]) for cloud in clouds)
            with torch.no_grad():
                wrong = hpm(finding.x).argmax(dim=1) != batch.y
            assert torch.equal(finding.breaks, wrong & batch.correct)
        broke_more |= bool((outcome.any_broken & unbroken).any())
        assert outcome.forwards == outcome.decisions
    assert broke_more


def test_a_pursuit_moves_the_whole_batch_against_one_sample_and_keeps_to_its_passes() -> None:
    """It breaks what recombination alone does not, each time by a real batch in the ball, and stops in time."""
    further = 0
    for seed in range(4):
        hpm = make_hpm().requires_grad_(False)
        batch = make_batch(hpm, 12, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        ball = Ball("Linf", 0.03)
        points = [AdversarialBatch(x, hpm.features(x)) for x in (batch.x, ball.random(batch.x, generator))]
        broken = []
        for passes in (0, 60):
            judged = JudgedBatch(
                hpm, get("soft-hybrid"), batch, ball, setting=Setting(counted=batch.correct, keep=True, found=points)
            )
            outcome = judged.finish(PursuitAttack(sweeps=2, passes=passes)(judged, generator))
            broken.append(outcome.any_broken & batch.correct)
            # Recombination confirms what it claims, a pursuit keeps to its passes; and one pass is the final one.
            assert outcome.forwards <= 12 * (passes + int(broken[-1].sum()) + 1)
            assert (outcome.backwards > 0) == (passes > 0)
            for finding in judged.trace().findings:
                assert float((finding.x - batch.x).abs().max()) <= 0.03 + 1e-6
                with torch.no_grad():
                    wrong = hpm(finding.x).argmax(dim=1) != batch.y
                assert torch.equal(finding.breaks, wrong & batch.correct)
        further += int((broken[1] & ~broken[0]).sum())
    assert further > 0


def _recombined() -> tuple[HPM, Batch, Ball, MixtureSearch]:
    """A mixer of clean and random points, each sample's mixture chosen."""
    hpm = make_hpm().requires_grad_(False)
    batch = make_batch(hpm, 12, seed=3)
    generator = torch.Generator().manual_seed(3)
    ball = Ball("Linf", 0.02)
    points = [AdversarialBatch(x, hpm.features(x)) for x in (batch.x, ball.random(batch.x, generator))]
    judged = JudgedBatch(hpm, get("soft-hybrid"), batch, ball, setting=Setting(counted=batch.correct))
    mixtures = MixtureSearch(judged, points, generator)
    for _ in range(2):
        mixtures.recombine()
    mixtures.narrow()
    return hpm, batch, ball, mixtures


def test_mixtures_by_products_of_features_are_those_found_by_asking(monkeypatch: pytest.MonkeyPatch) -> None:
    """A defence that can only be asked gets the same mixtures, one class after another."""
    monkeypatch.setattr("msa_eval.attacks.mixtures.AIMS", 1)
    _, _, _, fast = _recombined()
    monkeypatch.delattr(HPM, "exchange")
    _, _, _, asked = _recombined()
    rows = fast.unbroken()
    assert len(rows) > 3
    assert torch.equal(rows, asked.unbroken())
    assert torch.allclose(fast.margin[rows], asked.margin[rows], atol=1e-4)
    for row in rows.tolist():
        assert torch.allclose(fast.mixture(row, 0).z[row], asked.mixture(row, 0).z[row])


@pytest.mark.parametrize("stalled", [False, True])
def test_a_pursuit_starts_at_random_where_the_last_one_gained_little(stalled: bool) -> None:
    """Else at the mixture, which it leaves as it is; from a random start, its last point is the next mixture."""
    _, batch, ball, mixtures = _recombined()
    row = int(mixtures.nearest_first()[-1])
    margin, aim = mixtures.margin[row].min(dim=0)
    mixture, first = mixtures.mixture(row, int(aim)).x, len(mixtures.points)
    pursuit = _Pursuit(mixtures)
    pursuit.before[row, int(mixtures.aims[row, aim])] = float(margin) * (1.05 if stalled else 1.5)
    assert pursuit(row, 0) == len(mixtures.points) - first
    assert mixtures.is_unbroken(row)
    assert torch.equal(mixtures.points[first].x, mixture) == (not stalled)
    assert torch.equal(mixtures.mixture(row, int(aim)).x, mixtures.points[-1].x if stalled else mixture)
    assert float(ball.size(mixtures.points[first].x - batch.x).max()) <= 0.02 + 1e-6


def test_a_pursuit_asks_a_stochastic_target_several_times_about_each_point() -> None:
    """Else a trial, which judges after so many answers, would hand it points of the past."""
    hpm = make_hpm().requires_grad_(False)
    batch = make_batch(hpm, 12, seed=3)
    generator = torch.Generator().manual_seed(3)
    points = [AdversarialBatch(batch.x, batch.z)]
    judged = JudgedBatch(
        hpm, get("soft-hybrid"), batch, Ball("Linf", 0.02), setting=Setting(counted=batch.correct, eot=4)
    )
    mixtures = MixtureSearch(judged, points, generator)
    passes = _Pursuit(mixtures)(int(mixtures.nearest_first()[-1]), 2)
    added = mixtures.points[1:]
    assert passes == 4 * len(added) == 44
    assert torch.equal(added[0].x, batch.x)
    assert len({point.x.numpy().tobytes() for point in added[:6]}) == 6  # later ones may end in one corner of the ball


def test_a_pursuit_forgets_only_points_that_serve_in_no_mixture(monkeypatch: pytest.MonkeyPatch) -> None:
    """However little room there is, every mixture stays the batch that was chosen for its lead."""
    monkeypatch.setattr("msa_eval.attacks.batch.POOL_BYTES", 5 * 12 * 12 * 4)
    hpm, batch, _, mixtures = _recombined()
    pursuit, most = _Pursuit(mixtures), 0
    for turn in range(3):
        for row in mixtures.unbroken().tolist():
            others = {i: mixtures.mixture(i, 0).x for i in mixtures.unbroken().tolist() if i != row}
            pursuit(row, turn)
            most = max(most, len(mixtures.points))
            for i in set(others) & set(mixtures.unbroken().tolist()):
                assert torch.equal(mixtures.mixture(i, 0).x, others[i])
        mixtures.recombine()
        for row in mixtures.unbroken().tolist():
            for aim in range(mixtures.aims.shape[1]):
                with torch.no_grad():
                    logits = hpm(mixtures.mixture(row, aim).x)[row]
                margin = logits[batch.y[row]] - logits[mixtures.aims[row, aim]]
                assert float(margin) == pytest.approx(float(mixtures.margin[row, aim]), abs=1e-4)
    used = len(mixtures.chosen[mixtures.unbroken()].unique())
    assert 5 <= most <= max(5, used) + 33  # 11 points of a pursuit may be needed before any is let go
    assert len(mixtures.unbroken()) > 0


def test_mixtures_start_without_companions_in_the_label_s_class_or_the_one_aimed_at() -> None:
    """Where an image has a point elsewhere: to empty a class, all of its members have to leave at once."""
    hpm = make_hpm().requires_grad_(False)
    batch = make_batch(hpm, 12, seed=3)
    generator = torch.Generator().manual_seed(3)
    points = [
        AdversarialBatch(x, hpm.features(x)) for x in (batch.x, *(BALL.random(batch.x, generator) for _ in range(5)))
    ]
    mixtures = MixtureSearch(JudgedBatch(hpm, get("ste"), batch, BALL), points, generator)
    assigned = torch.stack([hpm.fc_logits(point.z).argmax(dim=1) for point in points])
    moved = stuck = 0
    for row in range(12):
        with torch.no_grad():
            margins = [-(hpm.logits(point.z)[row, :] - hpm.logits(point.z)[row, batch.y[row]]) for point in points]
        for aim, toward in enumerate(mixtures.aims[row].tolist()):
            at = mixtures.chosen[row, aim]
            assert float(margins[at[row]][toward]) == pytest.approx(min(float(margin[toward]) for margin in margins))
            for j in set(range(12)) - {row}:
                taken = {int(batch.y[row]), toward}
                able = not set(assigned[:, j].tolist()) <= taken
                assert (int(assigned[at[j], j]) not in taken) == able
                moved += able and at[j] != at[row]
                stuck += not able
    assert moved
    assert stuck


def test_every_image_is_moved_towards_a_class_within_the_ball() -> None:
    hpm = make_hpm().requires_grad_(False)
    batch = make_batch(hpm, 12, seed=3)
    for number in range(4):
        judged = JudgedBatch(hpm, get("fc-oracle"), batch, BALL)
        points: list[AdversarialBatch] = []
        passes = gather(judged, number, torch.Generator().manual_seed(0), points.append)
        outcome = judged.finish(batch.x)
        assert (len(points), passes, outcome.forwards, outcome.backwards) == (7, 7, 12 * 8, 12 * 6)
        wanted = torch.full_like(batch.y, number)
        before, after = (-margin_loss(hpm.fc_logits(z), wanted) for z in (batch.z, points[-1].z))
        assert bool((after > before).all())
        assert max(float(BALL.excess(point.x, batch.x).max()) for point in points) <= 1e-6


def test_each_image_has_the_role_that_lowers_the_lead_of_the_sample_pursued() -> None:
    """Against the hard decision: its slope where a companion may move it, the FC margin where it is yet to enter."""
    hpm = make_hpm().requires_grad_(False)
    batch = make_batch(hpm, 12, seed=3)
    seen = set()
    for row in range(12):
        y = int(batch.y[row])
        toward = (y + 1) % 4
        judged = JudgedBatch(hpm, get("ste"), batch, BALL)
        rise = roles(judged, batch.z, row, toward)
        z = batch.z.clone().requires_grad_()
        (up,) = torch.autograd.grad(rise(z, []), z)
        logits = hpm.logits(z, "frozen")
        (exact,) = torch.autograd.grad(logits[row, toward] - logits[row, y], z)
        fc = hpm.fc_logits(z)
        assigned = fc.argmax(dim=1)
        clean = -margin_loss(fc, assigned)
        sure = float(clean.detach().median()) / 8
        scale = float((-margin_loss(batch.logits, batch.logits.argmax(dim=1))).median())
        members = {k: [j for j in range(12) if j != row and int(assigned[j]) == k] for k in (y, toward)}
        assert torch.allclose(up[row], exact[row] / scale, atol=1e-5)
        for j in set(range(12)) - {row}:
            goal = toward if int(assigned[j]) == toward else y
            (enter,) = torch.autograd.grad(-margin_loss(fc, torch.full_like(batch.y, goal))[j], z, retain_graph=True)
            inside = int(assigned[j]) == goal and bool(clean[j] > sure)
            pull = exact[members[goal][0]] * len(members[goal]) / scale if members[goal] else torch.zeros(6)
            assert torch.allclose(up[j], pull + (0 if inside else enter[j] / sure), atol=1e-4)
            seen.add((goal == toward, inside))
        # A sample that moves counts against the rest of the mixture as it was.
        moved = batch.z + 0.01 * torch.randn(batch.z.shape, generator=torch.Generator().manual_seed(row))
        alone = torch.where((torch.arange(12) == row).unsqueeze(1), moved, batch.z)
        with torch.no_grad():
            gained = rise(alone, []) - rise(batch.z, [])
            before, after = hpm.logits(batch.z)[row], hpm.logits(alone)[row]
        expected = ((after[toward] - after[y]) - (before[toward] - before[y])) / scale
        assert float(gained) == pytest.approx(float(expected), abs=1e-4)
    assert {(False, False), (False, True), (True, True)} <= seen
