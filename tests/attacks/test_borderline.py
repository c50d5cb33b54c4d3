"""The last passes: who gets them, how many there are, and what they break."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from toys import make_classifier, make_samples

from msa_eval import as_defense
from msa_eval.attacks import Ball
from msa_eval.attacks.batch import AdversarialBatch, Batch
from msa_eval.attacks.borderline import NEAREST, NEAREST_OF_THESE, TARGETS, BorderlineAttack, _loss
from msa_eval.attacks.losses import margin_loss, probability_margin, targeted_dlr
from msa_eval.defense.contract import decide
from msa_eval.judging.judged_batch import JudgedBatch
from msa_eval.judging.search_state import Setting
from msa_eval.surrogates import get

STEPS = 5


class TwoValleys:
    """On an image of one pixel the label's lead falls on both sides of 0.5, on the left not far enough."""

    def __init__(self, depth: float) -> None:
        self.depth = depth

    def features(self, x: Tensor) -> Tensor:
        return x.flatten(1)

    def logits(self, z: Tensor) -> Tensor:
        left, right = (0.55 - z).clamp(min=0), (z - 0.55).clamp(min=0)
        margin = 0.1 - 0.2 * left - self.depth * right
        return torch.cat([margin, torch.zeros_like(margin)], dim=1)


def _judged(defense: object, x: Tensor, y: Tensor, ball: Ball, *, start: Tensor | None = None) -> JudgedBatch:
    own = as_defense(defense)
    with torch.no_grad():
        z = own.features(x)
        batch = Batch(0, x, y, z, decide(own, z))
        still = AdversarialBatch(x, z) if start is None else AdversarialBatch(start, own.features(start))
    setting = Setting(start=still, counted=batch.correct)
    return JudgedBatch(own, get("ste"), batch, ball, mixes_rows=False, setting=setting)


@pytest.mark.parametrize(("depth", "breaks"), [(1.0, True), (0.4, False)])
def test_other_starts_find_the_valley_that_the_first_does_not_lead_to(depth: float, breaks: bool) -> None:
    """By hand: at 0.55 + d the lead is 0.1 - depth * d, and d is at most 0.15 in a ball of 0.2 around 0.5."""
    judged = _judged(
        TwoValleys(depth), torch.full((1, 1, 1, 1), 0.5), torch.zeros(1, dtype=torch.long), Ball("Linf", 0.2)
    )
    points = BorderlineAttack(passes=20 * (STEPS + 1), steps=STEPS)(judged, torch.Generator().manual_seed(0))
    outcome = judged.finish(points)
    assert bool(outcome.any_broken) == breaks
    assert float(outcome.min_margin) == pytest.approx(0.1 - depth * 0.15, abs=1e-4 if not breaks else 1.0)


def test_only_the_nearest_are_searched_for_and_the_passes_are_kept_to() -> None:
    classifier = make_classifier().requires_grad_(False)
    samples = make_samples(classifier, 40)
    ball = Ball("Linf", 0.01)
    judged = _judged(classifier, samples.x, samples.y, ball)
    margin = -margin_loss(judged.batch.logits, samples.y)
    unbroken = judged.counted
    count = -(-int(unbroken.sum()) // NEAREST)
    nearest = margin.masked_fill(~unbroken, torch.inf).argsort()[:count]
    seen: list[Tensor] = []
    search_for = judged.search_for
    judged.search_for = lambda rows: (seen.append(rows), search_for(rows))[1]  # type: ignore[method-assign]
    attack = BorderlineAttack(passes=3, steps=STEPS)
    points = attack(judged, torch.Generator().manual_seed(0))
    assert torch.equal(points, samples.x)
    outcome = judged.finish(points)
    assert set(seen[0].nonzero().flatten().tolist()) == set(nearest.tolist())
    for rows in seen:
        assert bool((unbroken | ~rows).all())
    assert outcome.forwards - 40 <= 3 * 40 < outcome.forwards - 40 + count * (STEPS + 1)
    assert len(seen) < (outcome.forwards - 40) / (count * (STEPS + 1))  # several starts at a time
    assert outcome.backwards * (STEPS + 1) == (outcome.forwards - 40) * STEPS


def test_the_nearest_are_told_by_the_best_points_of_earlier_runs() -> None:
    classifier = make_classifier().requires_grad_(False)
    samples = make_samples(classifier, 24)
    ball = Ball("Linf", 0.2)
    generator = torch.Generator().manual_seed(1)
    start = ball.random(samples.x, generator)
    judged = _judged(classifier, samples.x, samples.y, ball, start=start)
    clean = -margin_loss(judged.batch.logits, samples.y)
    margin = torch.minimum(clean, -margin_loss(classifier(start), samples.y))
    seen: list[Tensor] = []
    search_for = judged.search_for
    judged.search_for = lambda rows: (seen.append(rows), search_for(rows))[1]  # type: ignore[method-assign]
    BorderlineAttack(passes=1, steps=STEPS)(judged, generator)
    count = -(-int(judged.batch.correct.sum()) // NEAREST)
    expected, by_clean = (
        set(margins.masked_fill(~judged.batch.correct, torch.inf).argsort()[:count].tolist())
        for margins in (margin, clean)
    )
    assert set(seen[0].nonzero().flatten().tolist()) == expected != by_clean


def test_nothing_is_passed_where_there_is_no_time_or_nobody_stands() -> None:
    classifier = make_classifier().requires_grad_(False)
    samples = make_samples(classifier, 12)
    for labels, passes in ((samples.y, 0), ((classifier(samples.x).argmax(dim=1) + 1) % 4, 50)):
        judged = _judged(classifier, samples.x, labels, Ball("Linf", 0.01))
        points = BorderlineAttack(passes=passes, steps=STEPS)(judged, torch.Generator().manual_seed(0))
        assert judged.finish(points).forwards == 12


def test_each_loss_has_a_start_for_the_nearest_and_one_for_the_very_nearest() -> None:
    """And the targeted ones follow the ranking of earlier runs, where there is one."""
    classifier = make_classifier(5).requires_grad_(False)
    samples = make_samples(classifier, 120)
    judged = _judged(classifier, samples.x, samples.y, Ball("Linf", 1e-4))
    unbroken = int(judged.counted.sum())
    judged.ranking = torch.arange(5).roll(2).expand(120, -1)
    seen: list[int] = []
    of_rows = judged.of_rows
    judged.of_rows = lambda places: (seen.extend(places.bincount().tolist()), of_rows(places))[1]  # type: ignore[method-assign]
    BorderlineAttack(passes=13, steps=STEPS)(judged, torch.Generator().manual_seed(0))
    wide, narrow = -(-unbroken // NEAREST), -(-unbroken // (NEAREST * NEAREST_OF_THESE))
    # Three losses, each from a start for the nearest and one for the very nearest of these.
    rounds = [count for count in seen if count]
    assert sorted(rounds[:wide]) == [3] * (wide - narrow) + [6] * narrow
    rows = torch.arange(3)
    logits = torch.randn(120, 5, generator=torch.Generator().manual_seed(1))
    losses = [_loss(logits, number, judged, rows)(logits[rows], samples.y[rows]) for number in range(TARGETS + 3)]
    for loss, place in zip(losses, [3, 4, 0, 1], strict=False):
        torch.testing.assert_close(loss, targeted_dlr(torch.full((3,), place))(logits[rows], samples.y[rows]))
    torch.testing.assert_close(losses[4], margin_loss(logits[rows], samples.y[rows]))
    torch.testing.assert_close(losses[5], probability_margin(logits[rows], samples.y[rows]))
    torch.testing.assert_close(losses[6], losses[0])
