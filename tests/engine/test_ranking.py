"""Runs towards the classes in the order of margin over slope: it is made once and handed on."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from toys import make_batch, make_hpm, make_samples

from msa_eval import Classifier
from msa_eval.attacks import Ball
from msa_eval.attacks.batch import Batch
from msa_eval.attacks.gradient import ApgdAttack
from msa_eval.attacks.losses import MALT, TARGETED
from msa_eval.defense.contract import decide
from msa_eval.engine.schedule import Run
from msa_eval.judging.batch_history import BatchHistory
from msa_eval.judging.judged_batch import JudgedBatch
from msa_eval.surrogates import get

STEPS = 4
BALL = Ball("Linf", 0.1)


def _steep() -> Classifier:
    """On two pixels: class 1 is likelier than class 2 and stays 0.2 behind the label; class 2 is reached at 0.05."""
    fc = nn.Linear(2, 4)
    with torch.no_grad():
        fc.weight.copy_(torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 8.0], [0.0, 0.0]]))
        fc.bias.copy_(torch.tensor([0.0, -0.8, -4.4, -9.0]))
    return Classifier(nn.Flatten(), fc).requires_grad_(False)


def _batch(defense: Classifier, x: Tensor, y: Tensor) -> Batch:
    z = defense.features(x)
    return Batch(0, x, y, z, decide(defense, z))


@pytest.mark.parametrize(("loss", "breaks"), [(MALT, True), (TARGETED, False)])
def test_the_class_that_is_reached_is_aimed_at_first(loss: str, breaks: bool) -> None:
    """By hand: at (0.5, 0.5) the leads are 0.3 and 0.4, and a step of 0.1 takes 0.1 and 0.8 off them."""
    defense = _steep()
    batch = _batch(defense, torch.full((3, 1, 1, 2), 0.5), torch.zeros(3, dtype=torch.long))
    run = Run(get("ste"), ApgdAttack(loss, STEPS), loss, 0, chained=True)
    history = BatchHistory(batch)
    judged = JudgedBatch(defense, get("ste"), batch, BALL, mixes_rows=False, setting=run.setting(defense, history))
    assert run.attack is not None
    start = torch.Generator().manual_seed(0)
    outcome = judged.finish(run.attack(judged, start))
    assert bool(outcome.any_broken.all()) == breaks
    history.add(outcome)
    assert (history.ranking is not None) == breaks


def test_the_classes_are_ranked_once_for_those_that_stand() -> None:
    """A pass of each and three back, by the first run that asks; a run without a use for it hands it on."""
    torch.manual_seed(0)
    defense = Classifier(nn.Flatten(), nn.Linear(12, 4)).requires_grad_(False)
    samples = make_samples(defense, 8)
    batch = _batch(defense, samples.x, torch.where(torch.arange(8) < 3, samples.y, (samples.y + 1) % 4))
    history, made, right = BatchHistory(batch), [], int(batch.correct.sum())
    assert 0 < right < 4
    for loss in ("margin", MALT, "margin", MALT):
        attack = ApgdAttack(loss, STEPS)
        run = Run(get("ste"), attack, loss, 0, chained=True)
        setting = run.setting(defense, history)
        judged = JudgedBatch(defense, get("ste"), batch, Ball("Linf", 1e-4), mixes_rows=False, setting=setting)
        points = attack(judged, torch.Generator().manual_seed(0))
        searched = judged.forwards
        outcome = judged.finish(points)
        history.add(outcome)
        made.append((searched, outcome.backwards))
    plain = (right * (STEPS + 1), right * STEPS)
    assert made == [plain, (plain[0] + right, plain[1] + 3 * right), plain, plain]
    assert history.ranking is not None
    assert torch.equal(history.ranking.sort(dim=1).values, torch.arange(4).expand(8, -1))


def test_where_rows_are_decided_together_the_logits_give_the_order() -> None:
    hpm = make_hpm().eval().requires_grad_(False)
    batch = make_batch(hpm, 6)
    found = []
    for loss in (MALT, TARGETED):
        attack = ApgdAttack(loss, STEPS)
        judged = JudgedBatch(hpm, get("ste"), batch, BALL)
        found.append(attack(judged, torch.Generator().manual_seed(0)))
        assert judged.ranking is None
    assert torch.equal(*found)
