"""Pursuits that ask nothing of a target but its gradient, against the real target."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toys import make_classifier, make_samples

from msa_eval import Classifier, evaluate
from msa_eval.attacks import Ball
from msa_eval.attacks.batch import Batch
from msa_eval.attacks.gradient import ApgdAttack
from msa_eval.attacks.losses import by_likelihood
from msa_eval.attacks.pursuit import STEPS, VictimAttack, _VictimSearch, ascend
from msa_eval.defense.contract import WholeModel, as_defense, decide
from msa_eval.engine.batch_runner import BatchRunner
from msa_eval.engine.messages import RunResult
from msa_eval.engine.schedule import plan_runs
from msa_eval.judging.judged_batch import JudgedBatch
from msa_eval.judging.search_state import Setting
from msa_eval.judging.usable_surrogates import select_surrogates
from msa_eval.protocols import load_protocol
from msa_eval.surrogates.builtin import STE

BALL = Ball("Linf", 0.05)


class Centred(nn.Module):
    """A classifier of features from which the mean of the batch is taken; counts the images it sees."""

    batch_dependent = True

    def __init__(self) -> None:
        super().__init__()
        self.classifier = make_classifier().requires_grad_(False)
        self.middle = self.classifier.features(make_samples(self.classifier, 64).x).mean(dim=0)
        self.images = 0

    def forward(self, x: Tensor) -> Tensor:
        self.images += len(x)
        z = self.classifier.features(x)
        out: Tensor = self.classifier.fc(z - z.mean(dim=0) + self.middle)
        return out


def case(seed: int = 0) -> tuple[WholeModel, Batch]:
    target: Any = as_defense(Centred().eval())
    x = make_samples(make_classifier(), 12, seed=seed).x
    logits = decide(target, x)
    return target, Batch(0, x, logits.argmax(dim=1), x, logits)


def test_it_breaks_one_sample_at_a_time_what_steps_of_all_at_once_leave_and_keeps_to_its_passes() -> None:
    more = 0
    for seed in range(3):
        target, batch = case(seed)
        together = JudgedBatch(target, STE, batch, BALL)
        broken = together.finish(ApgdAttack("margin", 100)(together, torch.Generator().manual_seed(0))).any_broken
        known = broken & batch.correct
        judged = JudgedBatch(
            target, STE, batch, BALL, setting=Setting(counted=batch.correct & ~known, known=known, keep=True)
        )
        seen = target.model.images
        outcome = judged.finish(VictimAttack(100)(judged, torch.Generator().manual_seed(0)))
        # The final pass is made by trunk, surrogate and verdict; of a target without a trunk the first costs nothing.
        assert target.model.images - seen <= 12 * 102
        assert outcome.forwards <= 12 * 101
        for finding in judged.trace().findings:
            assert float((finding.x - batch.x).abs().max()) <= 0.05 + 1e-6
            with torch.no_grad():
                wrong = target.model(finding.x).argmax(dim=1) != batch.y
            assert torch.equal(finding.breaks, wrong & batch.correct)
            more += int((finding.breaks & ~known).sum())
    assert more > 0


def test_the_whole_batch_follows_the_gradient_of_one_sample_towards_each_class_in_turn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    target, batch = case()
    judged = JudgedBatch(target, STE, batch, Ball("Linf", 0.01))
    search = _VictimSearch(judged, torch.Generator().manual_seed(0))
    classes = by_likelihood(batch.logits, batch.y)
    row, climbs = int(search.nearest_first()[-1]), []

    def noted(attacked: Any, start: Tensor, steps: int, rise: Any, keep: Any) -> int:
        logits = batch.logits.clone().requires_grad_()
        (slope,) = torch.autograd.grad(rise(batch.z, [logits]), logits)
        climbs.append((start, slope))
        return ascend(attacked, start, steps, rise, keep)

    monkeypatch.setattr("msa_eval.attacks.pursuit.ascend", noted)
    for turn in range(5):
        search.lowest[:] = torch.inf  # so that the points of this climb are noted
        nearest = search.nearest.get(row)
        assert search.climb(row, turn) == STEPS + 1
        assert float((judged.latest.x - batch.x).flatten(1).abs().amax(dim=1).min()) > 0.005  # every image moved
        start, slope = climbs[-1]
        toward = int(classes[row, {0: 0, 1: 1, 3: 2, 4: 0}.get(turn, 0)])
        if turn == 2:
            assert nearest is not None
            assert torch.equal(start, nearest[0])
            toward = nearest[1]
        expected = torch.zeros_like(slope)
        expected[row, toward], expected[row, batch.y[row]] = 1, -1
        assert torch.equal(slope, expected)
    assert len({start.numpy().tobytes() for start, _ in climbs}) == 5


def test_the_sample_with_the_lowest_margin_comes_first_and_one_that_is_broken_no_more() -> None:
    target, batch = case()
    judged = JudgedBatch(target, STE, batch, BALL)
    search = _VictimSearch(judged, torch.Generator().manual_seed(0))
    top = batch.logits.topk(2, dim=1).values
    assert search.nearest_first().tolist() == (top[:, 0] - top[:, 1]).argsort().tolist()
    while len(rows := search.nearest_first()) == 12:
        search.climb(int(rows[0]), 0)
    assert set(rows.tolist()) == set((~judged.broken).nonzero().flatten().tolist())


class Asked:
    """The same target with a trunk, and a decision that can only be asked."""

    def __init__(self) -> None:
        self.model = Centred().eval()

    def features(self, x: Tensor) -> Tensor:
        return self.model.classifier.features(x)

    def logits(self, z: Tensor) -> Tensor:
        out: Tensor = self.model.classifier.fc(z - z.mean(dim=0) + self.model.middle)
        return out


@pytest.mark.parametrize("kind", ["whole", "asked", "apart"])
def test_which_targets_are_pursued_so(kind: str) -> None:
    """Without a trunk, and where a decision is only asked; not where no gradient leads to companions."""
    classifier = make_classifier().requires_grad_(False)
    target: Any = {"whole": as_defense(Centred().eval()), "asked": Asked()}.get(kind, WholeModel(classifier))
    protocol = load_protocol("msa", overrides={"threat.contexts": ["joint"]})
    assert protocol.apgd is not None
    batch = dataclasses.replace(case()[1], z=target.features(case()[1].x))
    usable = select_surrogates(protocol.apgd, target, batch, own={}, recombination=protocol.recombination)
    runs = plan_runs(protocol, usable, num_classes=4, caches=kind == "asked")
    labels = [run.attack.name for run in runs]
    assert [type(run.attack) is VictimAttack for run in runs if run.attack.name == "pursuit"] == [True] * (
        kind != "apart"
    )
    assert ("recombination" in labels) == (kind == "asked")
    assert not any(run.moves == "companions" for run in runs)
    if kind != "apart":
        assert labels.count("apgd") == 3


def test_a_target_without_a_trunk_falls_in_joint_for_little_more_than_the_passes_of_its_budget(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All passes are counted, wherever they are made: the model itself saw no more than 1.3 of its budget."""
    model = Centred().eval()
    samples = make_samples(model, 24)
    overrides = {
        "threat.eps": 0.02, "threat.contexts": ["joint"], "batches.size": 24, "audit.samples": 0,
        "attack.recombination.passes": 60, "attack.square.queries": 10, "attack.spsa.queries": 12,
    }  # fmt: skip
    made, seen = BatchRunner._make, 0

    def counted(*args: Any, **settings: Any) -> RunResult:
        nonlocal seen
        before = model.images
        found = made(*args, **settings)
        seen += model.images - before
        return found

    monkeypatch.setattr(BatchRunner, "_make", counted)
    results = evaluate(model, samples, protocol="msa", overrides=overrides, found_surrogates=False)
    runs = results.attacks.set_index("run")
    passes = runs["forwards"] / 24
    assert passes["ste:pursuit-margin:0"] <= 61
    budget = 3 * 12 + 61 + 11 + 13
    assert passes.sum() <= budget
    assert budget / 2 < seen / 24 <= 1.3 * budget
    assert runs.loc["ste:pursuit-margin:0", "newly_broken"] > 0


def test_a_plain_classifier_has_no_such_run() -> None:
    classifier: Classifier = make_classifier()
    model = nn.Sequential(classifier).eval()
    overrides = {"threat.eps": 0.1, "audit.samples": 0, "samples.limit": 12, "attack.apgd.steps": 2}
    results = evaluate(model, make_samples(classifier, 12), protocol="msa", overrides=overrides, found_surrogates=False)
    assert not results.attacks["run"].str.contains("pursuit").any()
