"""Figure 1's curves: a plain ℓ2 head, the attacks on it, and AutoAttack's ResNet-18."""

from __future__ import annotations

import pandas as pd
import pytest
import torch
from toys import make_classifier, make_hpm, make_samples

from msa_eval import HPM, Classifier, Samples, evaluate
from msa_eval.sensitivity import accuracy_curves, autoattack_resnet18, features, plain_l2_head
from msa_eval.sensitivity.heads import classifier_of, with_dataset_prototypes


def _head() -> tuple[HPM, Samples]:
    classifier = make_classifier()
    return plain_l2_head(classifier, make_samples(classifier, 120, seed=1)), make_samples(classifier, 32)


@pytest.fixture(scope="module")
def curves() -> pd.DataFrame:
    head, data = _head()
    return accuracy_curves(head, data, eps=(0.3, 0.02, 0.1), steps=4)


def test_the_plain_l2_head_is_the_nearest_class_mean() -> None:
    classifier = make_classifier()
    train = make_samples(classifier, 120, seed=1)
    head = plain_l2_head(classifier, train, batch_size=50)
    z = classifier.features(train.x)
    means = torch.stack([z[train.y == c].mean(dim=0) for c in range(4)])
    torch.testing.assert_close(head(train.x), -torch.cdist(z, means))
    torch.testing.assert_close(features(classifier, train, batch_size=7), z)
    assert torch.equal(head.fc_target(train.x), classifier(train.x))
    assert not head.batch_dependent
    assert not any(p.requires_grad for p in head.parameters())


def test_rows_of_every_head_radius_and_run(curves: pd.DataFrame) -> None:
    runs = {"fc": ["fc-oracle:apgd-ce:0", "fc-oracle:apgd-margin:0"]}
    runs["l2"] = ["ste:apgd-ce:0", "ste:apgd-margin:0", *runs["fc"]]
    for head, names in runs.items():
        rows = curves[curves["head"] == head]
        assert sorted(rows[rows["eps"] == 0]["run"]) == ["clean", "own", "worst_case"]
        for eps in (0.02, 0.1, 0.3):
            assert sorted(rows[rows["eps"] == eps]["run"]) == sorted([*names, "own", "worst_case"])
    assert (curves["n"] == 32).all()
    assert ((curves["low"] <= curves["value"]) & (curves["value"] <= curves["high"])).all()


def test_own_is_the_heads_own_cross_entropy_and_worst_case_the_least(curves: pd.DataFrame) -> None:
    at = curves.set_index(["head", "eps", "run"]).sort_index()["value"]
    iterates = curves.set_index(["head", "eps", "run"]).sort_index()["any"]
    for eps in (0.02, 0.1, 0.3):
        assert at["l2", eps, "own"] == at["l2", eps, "ste:apgd-ce:0"]
        assert at["fc", eps, "own"] == at["fc", eps, "fc-oracle:apgd-ce:0"]
        for head in ("fc", "l2"):
            runs = [run for run in at[head, eps].index if ":" in run]
            assert at[head, eps, "worst_case"] <= min(iterates[head, eps, run] for run in runs)
            assert all(iterates[head, eps, run] <= at[head, eps, run] <= at[head, 0.0, "clean"] for run in runs)
    for head in ("fc", "l2"):
        worst = [at[head, eps, "worst_case"] for eps in (0.0, 0.02, 0.1, 0.3)]
        assert worst == sorted(worst, reverse=True)
        assert worst[-1] < worst[0]


def test_a_linear_head_falls_where_its_margins_do() -> None:
    """Two classes, a linear trunk: x breaks within ε when its margin is below ε ‖slope‖₁, in the box's middle."""
    classifier = make_classifier(classes=2)
    generator = torch.Generator().manual_seed(0)
    x = 0.5 + 0.02 * torch.rand(200, 3, 2, 2, generator=generator)
    with torch.no_grad():
        logits = classifier(x)
    data = Samples(x, logits.argmax(dim=1))
    slope = (classifier.trunk.weight @ (classifier.fc.weight[1] - classifier.fc.weight[0])).abs().sum()
    margin = (logits[:, 1] - logits[:, 0]).abs() / slope
    eps = float(margin.detach().median())
    train = Samples(torch.rand(50, 3, 2, 2, generator=generator), torch.arange(50) % 2)
    curves = accuracy_curves(plain_l2_head(classifier, train), data, eps=(eps,), steps=10)
    at = curves.set_index(["head", "run", "eps"])["value"]
    assert at["fc", "worst_case", eps] == pytest.approx(float((margin > eps).double().mean()), abs=0.011)


def test_a_gradient_that_is_gone_is_seen_by_the_other_surrogates() -> None:
    """Logits so far apart that the softmax saturates: the head's own cross-entropy stalls, its margin doesn't."""
    head, data = _head()

    class Saturated(HPM):
        def compare(self, z: torch.Tensor, prototypes: torch.Tensor) -> torch.Tensor:
            return 1e5 * super().compare(z, prototypes)

    masked = Saturated(head.trunk, head.fc, variant=head.variant).eval().requires_grad_(False)
    masked.prototypes.copy_(head.prototypes)
    curves = accuracy_curves(masked, data, eps=(0.1,), steps=8, surrogates=("ste",)).set_index(["head", "run", "eps"])
    plain = accuracy_curves(head, data, eps=(0.1,), steps=8, surrogates=("ste",)).set_index(["head", "run", "eps"])
    assert curves.loc[("l2", "own", 0.1), "value"] > plain.loc[("l2", "own", 0.1), "value"]
    assert curves.loc[("l2", "worst_case", 0.1), "value"] == plain.loc[("l2", "worst_case", 0.1), "value"]


def test_the_engine_judges_the_curves() -> None:
    """The same numbers as an evaluation under the same protocol."""
    head, data = _head()
    curves = accuracy_curves(head, data, eps=(0.1,), steps=4).set_index(["head", "run", "eps"])["value"]
    protocol = {
        "threat.eps": 0.1, "attack.apgd.steps": 4, "attack.apgd.surrogates": ["ste", "fc-oracle"],
        "attack.apgd.losses": ["ce", "margin"], "attack.square.queries": 1, "audit.samples": 0,
    }  # fmt: skip
    results = evaluate(head, data, protocol="quick", overrides=protocol)
    runs = results.attacks.set_index(["target", "run"])["final"]
    for run in ("ste:apgd-ce:0", "ste:apgd-margin:0", "fc-oracle:apgd-margin:0"):
        assert curves["l2", run, 0.1] == runs["defense", run]


def test_what_can_not_be_drawn() -> None:
    hpm = make_hpm()
    data = make_samples(hpm.fc_target)
    with pytest.raises(ValueError, match="heads that decide each image alone"):
        accuracy_curves(hpm, data)
    plain = with_dataset_prototypes(hpm)
    assert torch.equal(plain.prototypes, hpm.prototypes)
    for eps in ((), (0.0,), (0.1, -0.1)):
        with pytest.raises(ValueError, match="radii above 0"):
            accuracy_curves(plain, data, eps=eps)
    with pytest.raises(ValueError, match="a classifier has no prototypes"):
        with_dataset_prototypes(hpm.fc_target)
    assert isinstance(classifier_of(hpm), Classifier)


def test_autoattacks_resnet18() -> None:
    """A classifier whose trunk and head together are the network as AutoAttack has it."""
    from pyautoattack.examples.resnet import ResNet18

    before = torch.get_rng_state()
    classifier = autoattack_resnet18()
    assert torch.equal(torch.get_rng_state(), before)
    whole = ResNet18().eval()
    weights = classifier.trunk.state_dict() | {f"linear.{k}": v for k, v in classifier.fc.state_dict().items()}
    whole.load_state_dict(weights)
    x = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(classifier(x), whole(x))
        assert classifier.features(x).shape == (4, 512)
    assert not classifier.training


def test_its_accuracy_on_cifar10(cifar10: Samples) -> None:
    """85.9 % on the whole test set."""
    classifier = autoattack_resnet18()
    with torch.no_grad():
        right = (classifier(cifar10.images(torch.arange(100))).argmax(dim=1) == cifar10.y[:100]).float().mean()
    assert right > 0.75


def test_a_resnet18_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"no examples/model_test\.pt"):
        autoattack_resnet18()
