"""Clean accuracy at chance: when it is called so, and what is said of it."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from toys import make_classifier, make_samples

from msa_eval import Samples, audit, evaluate
from msa_eval.auditing.chance import against_chance, ranges
from msa_eval.auditing.rules import clean_at_chance
from msa_eval.auditing.weighing import OF_ATTACKS

Y = np.arange(60) % 10
RANDOM = np.random.default_rng(0).integers(0, 10, 60)


@pytest.mark.parametrize(
    ("labels", "predictions", "k", "said"),
    [
        (Y, RANDOM, 10, "check that the weights are loaded"),
        (Y, np.full(60, 3), 10, "always the same one"),
        (Y, (Y + 1) % 10, 10, "another order|another class each"),
        (Y, Y + 1, 11, r"100 % of the predictions are the label \+1"),
        (Y, np.array([0, 1, 7, 9, 2, 3, 4, 5, 6, 8])[Y], 10, "2 is called 7"),  # two classes keep their place
        (Y, Y + 200, 1000, r"labels 0-9, predictions 200-209; 100 % .* the label \+200: check the class order"),
        (Y[:8], Y[:8] + 100, 1000, "predictions 100-107: check the class order"),
        (Y[:1], Y[:1] + 1, 10, "check the class order"),
        (np.where(Y < 9, 0, 1), np.zeros(60), 2, "always the same one"),  # right on 9 of 10
    ],
)
def test_at_chance(labels: Any, predictions: Any, k: int, said: str) -> None:
    sign = clean_at_chance(labels, predictions.astype(int), k)
    assert sign.fired
    assert sign.severity == "unreliable"
    assert pytest.approx(float((labels == predictions).mean())) == sign.value
    assert re.search(said, sign.reason), sign.reason


@pytest.mark.parametrize(
    ("labels", "predictions", "k"),
    [
        (Y, Y, 10),
        (Y[:8], Y[:8], 10),
        (Y[:1], Y[:1], 2),
        (Y[:3], Y[:3], 2),
        (np.full(4, 3), np.full(4, 3), 10),  # of one class only
        (Y, np.where(np.arange(60) % 3 < 1, Y, RANDOM), 10),  # a third and some more
        (np.where(Y < 9, 0, 1), np.where(Y < 9, 0, 1), 2),
        (np.arange(8), np.arange(8) // 2 * 2, 1000),
        (np.array([1, 1, 1, 1, 1, 1, 0, 2]), np.array([1, 1, 1, 1, 1, 2, 0, 1]), 4),  # few, and mostly of one class
    ],
)
def test_above_chance(labels: Any, predictions: Any, k: int) -> None:
    assert not clean_at_chance(labels, predictions, k).fired


def test_the_level_of_chance_is_a_labels_share_for_one_that_always_answers_the_same() -> None:
    labels = np.repeat([0, 1], [90, 10])
    assert against_chance(labels, np.repeat([0, 1], [96, 4]), 2).level == pytest.approx(0.9)
    assert against_chance(labels, labels, 2).level == pytest.approx(0.5)
    assert against_chance(Y, Y, 10).level == pytest.approx(0.1)


def test_ranges_are_short() -> None:
    assert ranges(np.arange(0, 100, 2)) == "0, 2, 4, 6, 8, 10, ..."


class Shifted(nn.Module):
    """A good classifier whose classes are called otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.classifier = make_classifier()

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(x).roll(1, 1)  # type: ignore[no-any-return]


def test_neither_evaluation_nor_audit_calls_it_sound_or_gives_advice_about_gradients() -> None:
    samples = make_samples(make_classifier(), 48)
    overrides = {"threat.eps": 0.1, "attack.apgd.steps": 2, "attack.square.queries": 2}
    results = evaluate(Shifted().eval(), samples, protocol="quick", overrides=overrides)
    report = audit(Shifted().eval(), samples, protocol="quick", overrides=overrides)
    found = {sign.name for sign in report.signs}
    for verdict, signs in ((results.run["verdict"], set(results.audit["sign"])), (report.verdict.verdict, found)):
        assert verdict == "unreliable"
        assert "clean_at_chance" in signs
        assert not signs & OF_ATTACKS
    assert "another class each" in report.verdict.reasons[0]
    honest = evaluate(make_classifier(), Samples(samples.x, samples.y), protocol="quick", overrides=overrides)
    row = honest.audit.set_index("sign").loc["clean_at_chance"]
    assert not row["fired"]
    assert row["value"] == pytest.approx(float((make_classifier()(samples.x).argmax(1) == samples.y).float().mean()))
    assert set(honest.audit["sign"]) & OF_ATTACKS


def test_all_samples_decide_not_the_few_that_are_audited() -> None:
    """The first batch is at chance, as it happens, and all others are right."""
    model = make_classifier()
    samples = make_samples(model, 96)
    with torch.no_grad():
        y = model(samples.x).argmax(dim=1)
    overrides = {"threat.eps": 0.1, "attack.apgd.steps": 1, "attack.square.queries": 1, "batches.size": 12,
                 "audit.samples": 12}  # fmt: skip
    first = evaluate(model, samples.x, y, protocol="quick", overrides=overrides | {"audit.samples": 0})
    index = torch.tensor(first.samples.loc[first.samples["batch"] == 0, "index"].tolist())
    y[index] = (y[index] + 1) % 4
    results = evaluate(model, samples.x, y, protocol="quick", overrides=overrides)
    assert not results.audit.set_index("sign").loc["clean_at_chance", "fired"]
    assert set(results.audit["sign"]) & OF_ATTACKS, "they are measured all the same"
