"""Targets that take gradients of their weights or images within a forward."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from toys import make_classifier, make_samples

from msa_eval import Classifier, evaluate, verify
from msa_eval.attacks.batch import Batch
from msa_eval.auditing.state_guard import StateGuard
from msa_eval.defense.contract import decide
from msa_eval.defense.own_gradients import OwnGradients
from msa_eval.defense.weight_gradients import without_weight_gradients
from msa_eval.judging.usable_surrogates import answer_with_gradient
from msa_eval.surrogates.builtin import STE
from msa_eval.targets.pair import make_targets

RATE = 0.3


def entropy(logits: Tensor) -> Tensor:
    return -(logits.softmax(1) * logits.log_softmax(1)).sum(1).mean()


class Adapting(nn.Module):
    """A classifier that lowers the entropy of its answers to a batch by one step of its head, then answers.

    Args:
        classifier: which.
        way: when its weights are set back: ``before`` the next batch, ``after`` this one, ``copy`` for a copy that is
            adapted, ``official`` for the answer before the step, ``never``, and ``unaided`` for ``after``, without
            switching gradients on.
    """

    def __init__(self, classifier: Classifier, way: str) -> None:
        super().__init__()
        self.classifier, self.way = classifier, way
        self.kept = copy.deepcopy(classifier.state_dict())

    def forward(self, x: Tensor) -> Tensor:
        with torch.set_grad_enabled(torch.is_grad_enabled() or self.way != "unaided"):
            return self.adapt(x)

    def adapt(self, x: Tensor) -> Tensor:
        if self.way in ("before", "official"):
            self.classifier.load_state_dict(self.kept)
        model = copy.deepcopy(self.classifier) if self.way == "copy" else self.classifier
        optimizer = torch.optim.SGD(model.fc.parameters(), RATE)
        out = model(x)
        optimizer.zero_grad()
        entropy(out).backward()
        optimizer.step()
        if self.way != "official":
            out = model(x)
        if self.way in ("after", "unaided"):
            self.classifier.load_state_dict(self.kept)
        return out


WAYS = ("before", "after", "copy", "official", "unaided")


def expected(classifier: Classifier, x: Tensor, way: str) -> tuple[Tensor, Tensor]:
    """The answer of weights adapted by hand, and the gradient of its sum of squares with these held constant."""
    x = x.clone().requires_grad_()
    weight, bias = classifier.fc.weight, classifier.fc.bias
    z = classifier.features(x)
    if way != "official":
        steps = torch.autograd.grad(entropy(z.detach() @ weight.T + bias), (weight, bias))
        weight, bias = weight - RATE * steps[0], bias - RATE * steps[1]
    logits = z @ weight.detach().T + bias.detach()
    (gradient,) = torch.autograd.grad(logits.pow(2).sum(), x)
    return logits.detach(), gradient


@pytest.mark.parametrize("way", WAYS)
def test_the_answer_and_its_gradient_are_those_of_weights_adapted_by_hand(way: str) -> None:
    classifier = make_classifier()
    samples = make_samples(classifier, 12)
    answer, slope = expected(classifier, samples.x, way)
    model = Adapting(make_classifier(), way).eval()
    defense = make_targets(model, False, samples, "cpu")["defense"]
    kind = OwnGradients.SWITCHED_ON if way == "unaided" else OwnGradients.TAKEN
    assert getattr(defense, "own_gradients", None) is kind
    with without_weight_gradients(defense):
        assert all(p.requires_grad for p in model.parameters())
        logits = decide(defense, samples.x)
        assert not logits.requires_grad
        assert torch.allclose(logits, answer, atol=1e-5)
        assert float((logits - classifier(samples.x)).detach().abs().max()) > 1e-3 or way == "official"
        x = samples.x.clone().requires_grad_()
        out = defense.logits(x)
        (gradient,) = torch.autograd.grad(out.pow(2).sum(), x)
    assert torch.allclose(gradient, slope, atol=1e-4)
    assert x.grad is None
    assert not samples.x.requires_grad


@pytest.mark.parametrize("kind", ["plain", "trunk", "frozen"])
def test_weight_gradients_of_an_ordinary_target_are_switched_off_and_come_back(kind: str) -> None:
    classifier = make_classifier()
    samples = make_samples(classifier, 12)
    model: nn.Module = nn.Sequential(classifier).eval() if kind == "plain" else classifier
    if kind == "frozen":
        model.requires_grad_(False)
    defense = make_targets(model, False, samples, "cpu")["defense"]
    assert getattr(defense, "own_gradients", None) is OwnGradients.NONE
    before = [p.requires_grad for p in model.parameters()]
    with without_weight_gradients(defense):
        assert not any(p.requires_grad for p in model.parameters())
    assert [p.requires_grad for p in model.parameters()] == before


def test_a_model_that_draws_from_numpy_is_not_taken_for_one_that_adapts() -> None:
    class Drawing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.calls = nn.Linear(12, 4), 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            out: Tensor = self.fc(x.flatten(1))
            return out * (1 + 0.1 * self.calls)  # what no seed governs

    defense = make_targets(Drawing().eval(), False, make_samples(make_classifier(), 12), "cpu")["defense"]
    assert getattr(defense, "own_gradients", None) is OwnGradients.NONE


def test_a_decision_of_features_adapts_too() -> None:
    class Head:
        def __init__(self, classifier: Classifier) -> None:
            self.classifier = classifier
            self.model = Adapting(Classifier(nn.Identity(), classifier.fc), "after").eval()

        def features(self, x: Tensor) -> Tensor:
            return self.classifier.features(x)

        def logits(self, z: Tensor) -> Tensor:
            out: Tensor = self.model(z)
            return out

    classifier = make_classifier()
    samples = make_samples(classifier, 12)
    answer, slope = expected(make_classifier(), samples.x, "after")
    defense = make_targets(Head(classifier), False, samples, "cpu")["defense"]
    with without_weight_gradients(defense):
        x = samples.x.clone().requires_grad_()
        logits = defense.logits(defense.features(x))
        assert torch.allclose(logits, answer, atol=1e-5)
        (gradient,) = torch.autograd.grad(logits.pow(2).sum(), x)
    assert torch.allclose(gradient, slope, atol=1e-4)


def test_an_answer_whose_gradient_leads_to_weights_alone_has_none_to_the_images() -> None:
    model = Adapting(make_classifier(), "after").eval()
    inner = model.adapt
    model.adapt = lambda x: inner(x.detach())  # type: ignore[method-assign]
    samples = make_samples(make_classifier(), 12)
    defense = make_targets(model, False, samples, "cpu")["defense"]
    x = samples.x.clone().requires_grad_()
    assert not defense.logits(x).requires_grad


class Purifier(nn.Module):
    """Moves images down a potential of its own before they are classified, by gradients to what it was given."""

    def __init__(self, classifier: nn.Module, *, aided: bool) -> None:
        super().__init__()
        self.classifier, self.aided = classifier, aided

    def forward(self, x: Tensor) -> Tensor:
        with torch.set_grad_enabled(torch.is_grad_enabled() or self.aided):
            x.requires_grad_()
            (slope,) = torch.autograd.grad((x - 0.5).pow(2).sum(), x)
            out: Tensor = self.classifier(x - 0.1 * slope)
            return out


@pytest.mark.parametrize("aided", [True, False])
def test_a_purifier_may_ask_for_the_gradient_of_what_it_was_given(aided: bool) -> None:
    classifier = make_classifier()
    samples = make_samples(classifier, 12)
    defense = make_targets(Purifier(classifier, aided=aided).eval(), False, samples, "cpu")["defense"]
    with without_weight_gradients(defense):
        x = samples.x.clone()
        logits = decide(defense, x)
        assert not x.requires_grad
        with torch.no_grad():
            assert torch.allclose(logits, classifier(0.8 * x + 0.1), atol=1e-5)
        x.requires_grad_()
        assert answer_with_gradient(STE, defense, _batch(samples.x, samples.y)) is not None


def _batch(x: Tensor, y: Tensor) -> Batch:
    return Batch(0, x, y, x, torch.zeros(len(x), 4))


def make(way: str) -> Adapting:
    return Adapting(make_classifier(), way).eval()


QUICK = {"threat.eps": 0.1, "batches.size": 12, "threat.contexts": ["joint"]}


@pytest.mark.parametrize("way", ["before", "after", "never"])
def test_adaptation_that_is_set_back_is_no_leak_and_one_that_goes_on_is_named(way: str, tmp_path: Path) -> None:
    samples = make_samples(make_classifier(), 24)
    model = make(way)
    few = {"attack.square.queries": 2, "attack.apgd.steps": 2} if way == "never" else {}  # the audit is what counts
    results = evaluate(
        model, samples, protocol="quick", overrides=QUICK | few, out=tmp_path / "out", save_adversarial=True
    )
    audit = results.audit.query("target == 'defense'").set_index("sign")
    assert bool(audit.loc["state_guard", "fired"]) == (way == "never"), audit.loc["state_guard"]
    if way == "never":
        assert "classifier.fc.weight" in str(audit.loc["state_guard"].to_dict())
    else:
        assert "ste:apgd-ce:0" in set(results.attacks["run"])
        found = verify(tmp_path / "out", make(way), samples)
        assert found.passed, found.checks
        assert found.claims > 0


def test_the_guard_names_what_leaks_and_not_what_is_set_back() -> None:
    classifier = make_classifier()
    samples = make_samples(classifier, 24)
    for way in ("before", "after", "never"):
        defense = make_targets(make(way), False, samples, "cpu")["defense"]
        batch = _batch(samples.x[:12], samples.y[:12])
        with without_weight_gradients(defense):
            guard = StateGuard(defense, batch=batch)
            for _ in range(2):
                decide(defense, samples.x[12:])
            assert bool(guard.changes()) == (way == "never")
