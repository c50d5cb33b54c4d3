"""A trial's record against a naive judge, its counts, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from msa_eval.protocols.runs import ApgdAttack, SquareAttack
from msa_eval.protocols.trial import AttackError, Batch, Outcome, Trial
from msa_eval.surrogates import get
from torch import Tensor, nn
from toys import make_classifier, make_hpm, make_samples

from msa_eval import HPM, Classifier, WholeModel
from msa_eval.attacks import Ball, apgd
from msa_eval.attacks.losses import LOSSES, margin
from msa_eval.defense import decide

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
    leads = torch.stack([-margin(answer, batch.y) for answer in (batch.logits, *logits)])
    rights = [batch.correct, *(~wrong & batch.correct)]
    return {
        "any_broken": wrong.any(dim=0),
        "min_margin": leads.amin(dim=0),
        "left": min(right.sum() for right in rights),
        "final_broken": wrong[-1],
    }


def _check(outcome: Outcome, naive: dict[str, Tensor]) -> None:
    assert torch.equal(outcome.any_broken, naive["any_broken"])
    assert torch.equal(outcome.final_broken, naive["final_broken"])
    assert outcome.committed.sum() == naive["left"]
    torch.testing.assert_close(outcome.min_margin, naive["min_margin"], atol=1e-5, rtol=1e-5)
    assert torch.equal(outcome.first_iterate >= 0, outcome.any_broken)


@pytest.mark.parametrize("surrogate", ["fc-oracle", "soft-hybrid", "ste"])
def test_every_iterate_is_judged_in_its_batch(surrogate: str) -> None:
    hpm = make_hpm().requires_grad_(False)
    batch = _batch(hpm, hpm)
    trial = Trial(hpm, get(surrogate), batch, BALL)
    asked: list[Tensor] = []

    def watched(x: Tensor) -> Tensor:
        asked.append(x.detach().clone())
        return trial(x)

    found = apgd(
        watched, batch.x, batch.y, loss=LOSSES["dlr"], ball=BALL, steps=12, generator=torch.Generator().manual_seed(0)
    )
    outcome = trial.finish(found.x)
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
        trial = Trial(hpm, get(surrogate), batch, BALL)
        outcome = trial.finish(ApgdAttack("ce", steps=10)(trial, torch.Generator().manual_seed(0)))
        assert trunk.batches == [24] * 12
        assert (outcome.forwards, outcome.backwards, outcome.decisions) == (12 * 24, 10 * 24, decisions * 24)


def test_a_targeted_loss_costs_no_pass_for_its_targets() -> None:
    hpm = make_hpm().requires_grad_(False)
    batch = _batch(hpm, hpm)
    trial = Trial(hpm, get("fc-oracle"), batch, BALL)
    outcome = trial.finish(ApgdAttack("dlr-targeted", steps=10, target=2)(trial, torch.Generator().manual_seed(0)))
    assert outcome.forwards == 12 * 24


def test_a_sample_wrong_on_the_clean_batch_never_counts_as_left() -> None:
    """The first sample is broken while the second, wrong at first, becomes right: none of the counted ones is left."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(1, 2))
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[1.0], [-1.0]]))
        model[1].bias.copy_(torch.tensor([-0.5, 0.5]))
    defense = WholeModel(model)
    x, y = torch.tensor([0.6, 0.6]).view(2, 1, 1, 1), torch.tensor([0, 1])
    trial = Trial(defense, None, Batch(0, x, y, x, decide(defense, x)), BALL)
    outcome = trial.finish(x - 0.2)
    assert trial.batch.correct.tolist() == [True, False]
    assert outcome.final_broken.tolist() == [True, False]
    assert outcome.committed.tolist() == [False, False]


def test_a_surrogate_with_a_trunk_of_its_own_costs_its_passes() -> None:
    hpm, other = make_hpm().requires_grad_(False), make_classifier(seed=3).requires_grad_(False)
    batch = _batch(hpm, hpm)
    theirs: Any = other.trunk
    trial = Trial(hpm, get("base", {"base": other}), batch, BALL)
    theirs.batches.clear()
    asked: list[Tensor] = []

    def watched(x: Tensor) -> Tensor:
        asked.append(x.detach().clone())
        return trial(x)

    found = apgd(
        watched, batch.x, batch.y, loss=LOSSES["ce"], ball=BALL, steps=10, generator=torch.Generator().manual_seed(0)
    )
    outcome = trial.finish(found.x)
    _check(outcome, _naive(hpm, batch, [*asked, found.x]))
    assert theirs.batches == [24] * 12
    assert (outcome.forwards, outcome.backwards) == (2 * 12 * 24, 10 * 24)
    assert torch.equal(outcome.surrogate_fooled, other(found.x).argmax(dim=1) != batch.y)


class _Watched(Trial):
    """Keeps every batch that a query attack asked about, put together as it says."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.asked: list[Tensor] = []
        self.held = self.batch.x

    def propose(self, points: Tensor, rows: Tensor) -> Tensor:
        self.offered = torch.where(rows.view(-1, 1, 1, 1), points, self.held)
        self.asked.append(self.offered)
        return super().propose(points, rows)

    def accept(self, rows: Tensor) -> Tensor:
        self.held = torch.where(rows.view(-1, 1, 1, 1), self.offered, self.held)
        self.asked.append(self.held)
        return super().accept(rows)


@pytest.mark.parametrize(
    ("make", "mixes"),
    [(make_hpm, True), (make_classifier, True), (make_classifier, False), (lambda: WholeModel(make_hpm()), True)],
)
def test_square_is_judged_on_the_mixed_batch(make: Any, mixes: bool) -> None:
    defense = make()
    labels = defense.model if isinstance(defense, WholeModel) else defense
    batch = _batch(defense, labels)
    trial = _Watched(defense, None, batch, BALL, mixes_rows=mixes)
    found = SquareAttack(queries=40, p_init=0.8)(trial, torch.Generator().manual_seed(0))
    assert torch.equal(found, trial.held)
    _check(trial.finish(found), _naive(defense, batch, [*trial.asked, found]))


def test_square_passes_only_what_it_proposes_and_what_it_confirms() -> None:
    """On a static model nothing is confirmed in vain: rows proposed, a whole batch for each new claim, a final one."""
    classifier = make_classifier()
    batch = _batch(classifier, classifier)
    trunk: Any = classifier.trunk
    trunk.batches.clear()
    trial = Trial(classifier, None, batch, BALL, mixes_rows=False)
    outcome = trial.finish(SquareAttack(queries=60, p_init=0.8)(trial, torch.Generator().manual_seed(0)))
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
    outcome = Trial(moody, None, batch, Ball("Linf", 1e-6))
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
    trial = Trial(sly, None, batch, Ball("Linf", 1e-6), mixes_rows=False)
    found = SquareAttack(queries=20, p_init=0.8)(trial, torch.Generator().manual_seed(0))
    assert not (trial.finish(found).any_broken & batch.correct).any()


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
    trial = Trial(jealous, None, batch, Ball("Linf", 1e-4), mixes_rows=False)
    outcome = trial.finish(SquareAttack(queries=30, p_init=0.8)(trial, torch.Generator().manual_seed(0)))
    assert outcome.committed.sum() >= batch.correct.sum() - 1


@pytest.mark.parametrize(
    ("move", "message"),
    [
        (lambda x: x + 0.3, "left the Linf ball of radius 0.2"),
        (lambda x: x * torch.nan, "not finite|left the"),
        (lambda x: torch.where(x > 0.7, 1.2, x), "left the Linf ball"),
    ],
)
def test_an_attack_that_leaves_the_ball_is_an_error(move: Any, message: str) -> None:
    classifier = make_classifier()
    batch = _batch(classifier, classifier)
    trial = Trial(classifier, get("fc-oracle"), batch, BALL)
    with torch.no_grad():
        trial(move(batch.x))
    with pytest.raises(AttackError, match=message):
        trial.finish(batch.x)


def test_an_attack_that_stays_in_is_none() -> None:
    classifier = make_classifier()
    batch = _batch(classifier, classifier)
    trial = Trial(classifier, get("fc-oracle"), batch, BALL)
    outcome = trial.finish((batch.x + 0.2).clamp(0, 1))
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
    trial = Trial(broken, surrogate, batch, BALL)
    with pytest.raises(AttackError, match="not finite"):
        trial.finish(batch.x)


def test_a_surrogate_of_another_shape_is_an_error() -> None:
    hpm = make_hpm()
    batch = _batch(hpm, hpm)
    trial = Trial(hpm, get("x", {"x": lambda defense, z: defense.fc_logits(z)[:, :2]}), batch, BALL)
    with pytest.raises(AttackError, match=r"'x' returned logits of shape \(24, 2\)"):
        trial(batch.x)


def test_verdicts_are_float32_whatever_the_search_uses() -> None:
    hpm = make_hpm()
    batch = _batch(hpm, hpm)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert decide(hpm, batch.z).dtype == torch.float32
        torch.testing.assert_close(decide(hpm, batch.z), batch.logits)
