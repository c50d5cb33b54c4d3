"""The analysis of checkpoints: against the definitions, on every kind of head, and with degenerate data."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from toys import make_classifier, make_hpm, make_samples

from msa_eval import HPM, Samples, Variant
from msa_eval.attacks.apgd import apgd
from msa_eval.attacks.ball import Ball
from msa_eval.attacks.losses import ce
from msa_eval.judging.batch_plan import plan_batches
from msa_eval.sensitivity import analyse, empirical_cdf, sensitivity
from msa_eval.sensitivity.analysis import analyse_model
from msa_eval.sensitivity.heads import plain_l2_head


def _data(hpm: HPM, count: int = 60) -> Samples:
    return make_samples(hpm.fc_target, count)


def test_hybrid_prototypes_are_those_of_each_batch() -> None:
    hpm = make_hpm()
    data = _data(hpm)
    found = analyse_model(hpm, data, batch_size=16, seed=3)
    z = hpm.features(data.x).detach()
    assert found.batch.bincount().tolist() == [15, 15, 15, 15]
    for number, seat in enumerate(plan_batches(60, size=16, seed=3)):
        vectors = hpm.hybrid_prototypes(z[seat]).detach()
        torch.testing.assert_close(found.sensitivity.s_d[seat], 1 / torch.cdist(z[seat].double(), vectors.double()))
        assert found.batch[seat].unique().tolist() == [number]
        # The head's own distances are these.
        torch.testing.assert_close(1 / found.sensitivity.s_d[seat].float(), -hpm.logits(z[seat]).detach())
    expected = z @ hpm.fc_original.weight.T / hpm.fc_original.weight.norm(dim=1)
    torch.testing.assert_close(1 / found.sensitivity.s_c.float(), expected.detach().abs())


def test_global_prototypes_and_class_means_of_training_data() -> None:
    hpm = make_hpm()
    data = _data(hpm)
    z = hpm.features(data.x).detach().double()
    by_global = analyse_model(hpm, data, prototypes="global")
    torch.testing.assert_close(1 / by_global.sensitivity.s_d, torch.cdist(z, hpm.prototypes.double()))
    by_train = analyse_model(hpm, data, train=data)
    means = torch.stack([z[data.y == c].mean(dim=0) for c in range(4)])
    torch.testing.assert_close(1 / by_train.sensitivity.s_d, torch.cdist(z, means), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(analyse_model(hpm.fc_target, data, train=data).sensitivity.s_d, by_train.sensitivity.s_d)
    assert torch.equal(by_train.sensitivity.s_c, by_global.sensitivity.s_c)


def test_the_tables_follow_from_the_pairs() -> None:
    hpm = make_hpm()
    data = _data(hpm)
    found = analyse_model(hpm, data, gamma=0.7, limit=50)
    s, y = found.sensitivity, data.y[found.index]
    table, summary = found.samples(), found.summary().set_index("pairs")
    assert table["index"].tolist() == sorted(set(table["index"]))
    own = torch.tensor([[float(s.s_c[i, y[i]]), float(s.s_d[i, y[i]])] for i in range(50)])
    np.testing.assert_allclose(table[["s_c", "s_d"]], own)
    for i in (0, 17, 49):
        others = [c for c in range(4) if c != y[i]]
        assert table.loc[i, "condition"] == (s.ratio[i, y[i]] <= math.cos(0.7)).item()
        assert table.loc[i, "condition_others"] == pytest.approx(s.condition[i, others].double().mean().item())
        assert table.loc[i, "s_c_others"] == pytest.approx(s.s_c[i, others].median().item())
        assert table.loc[i, "theta_d"] == pytest.approx(math.degrees(s.theta_d[i, y[i]]))
    assert summary["n"].tolist() == [50, 150, 200]
    assert summary.loc["own", "condition"] == pytest.approx(table["condition"].mean())
    assert summary.loc["other", "condition"] == pytest.approx(table["condition_others"].mean())
    assert summary.loc["all", "condition"] == pytest.approx(s.condition.double().mean().item())
    assert summary.loc["own", "low"] < summary.loc["own", "condition"] < summary.loc["own", "high"]
    assert found.fc is not None
    assert found.l2 is not None
    expected = float(empirical_cdf(math.cos(0.7), found.fc, found.l2))
    assert summary.loc["all", "condition_empirical"] == pytest.approx(expected)
    cdf = found.cdf([0.2, math.cos(0.7)])
    assert cdf["measured"].iloc[1] == pytest.approx(summary.loc["all", "condition"])
    assert cdf["empirical"].iloc[1] == pytest.approx(expected)


def test_the_empirical_model_agrees_with_independent_gaussian_angles() -> None:
    """Features at drawn angles to orthogonal planes, so that what Eq. 13 assumes holds."""
    generator = torch.Generator().manual_seed(0)
    n = 4000
    theta_c = 1.2 + 0.1 * torch.randn(n, generator=generator, dtype=torch.float64)
    theta_d = 1.4 + 0.08 * torch.randn(n, generator=generator, dtype=torch.float64)
    z = torch.stack([theta_c.cos(), theta_d.cos(), (1 - theta_c.cos() ** 2 - theta_d.cos() ** 2).sqrt()], dim=1)
    found = analyse(z, torch.zeros(n, dtype=torch.long), torch.eye(3)[:1], torch.eye(3)[1:2])
    table = found.cdf(np.linspace(0.1, 0.8, 15))
    assert np.abs(table["measured"] - table["empirical"]).max() < 4.5 * math.sqrt(0.25 / n)
    assert found.fc is not None
    assert (found.fc.other, found.fc.share) == (None, 1.0)


def test_any_defence_with_a_linear_head_through_the_api() -> None:
    classifier = make_classifier()
    data = make_samples(classifier, 40)
    with torch.no_grad():
        z = classifier.features(data.x)
    found = analyse(z, data.y, classifier.fc.weight, torch.randn(4, 6, generator=torch.Generator().manual_seed(0)))
    assert found.summary()["n"].tolist() == [40, 120, 160]
    moved = analyse(z, data.y, classifier.fc.weight, torch.ones(4, 6), change=0.1 * torch.ones_like(z))
    assert math.isnan(moved.gamma)
    assert moved.summary()["condition_isotropic"].isna().all()
    assert moved.summary()["condition"].notna().all()


def test_measured_changes_are_those_of_an_attack() -> None:
    """Within the ball, towards a higher loss; a radius of 0 moves nothing, which leaves all undefined."""
    hpm = make_hpm()
    data = _data(hpm)
    found = analyse_model(hpm, data, eps=0.1, steps=5, batch_size=60, seed=4)
    generator, ball = torch.Generator().manual_seed(4), Ball("Linf", 0.1)
    seat = plan_batches(60, size=60, seed=4)[0]
    x, y = data.x[seat], data.y[seat]
    attacked = apgd(hpm.fc_target, x, y, loss=ce, ball=ball, steps=5, generator=generator)
    with torch.no_grad():
        z, moved = hpm.features(x), hpm.features(attacked.x)
        direct = sensitivity(z, hpm.fc_original.weight, hpm.hybrid_prototypes(z), change=moved - z)
        assert ce(hpm.fc_target.logits(moved), y).mean() > ce(hpm.fc_target.logits(z), y).mean()
    torch.testing.assert_close(found.sensitivity.s_c[seat], direct.s_c, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.sensitivity.cos_gamma[seat], direct.cos_gamma, rtol=1e-4, atol=1e-5)
    assert math.isnan(found.gamma)
    still = analyse_model(hpm, data, eps=0.0, steps=2)
    assert int(still.sensitivity.known.sum()) == 0
    with pytest.raises(ValueError, match="non-negative"):
        analyse_model(hpm, data, eps=-0.1)


def test_zero_features_are_left_out_and_counted() -> None:
    z = torch.rand(30, 5, generator=torch.Generator().manual_seed(0))
    z[3] = 0
    y = torch.arange(30) % 3
    found = analyse(z, y, torch.eye(5)[:3], torch.rand(3, 5, generator=torch.Generator().manual_seed(1)))
    table, summary = found.samples(), found.summary().set_index("pairs")
    assert summary["undefined"].tolist() == [1, 2, 3]
    assert table.loc[3, "undefined"] == 3
    assert table.loc[3, ["s_c", "s_d", "condition", "condition_others", "s_c_others"]].isna().all()
    all_zero = analyse(torch.zeros(4, 5), y[:4], torch.eye(5)[:3], torch.eye(5)[:3])
    assert all_zero.summary()[["condition", "more_sensitive", "s_c", "s_d", "theta_c_mean"]].isna().all(axis=None)
    assert all_zero.cdf()["measured"].isna().all()
    assert [m[:3] for m in all_zero.misfits] == ["θ_c", "θ_d"]


def test_one_class() -> None:
    z = torch.rand(20, 4, generator=torch.Generator().manual_seed(0))
    found = analyse(z, torch.zeros(20, dtype=torch.long), torch.eye(4)[:1], torch.eye(4)[1:2])
    summary = found.summary().set_index("pairs")
    assert summary["n"].tolist() == [20, 0, 20]
    assert math.isnan(summary.loc["other", "condition"])
    assert found.samples()["condition_others"].isna().all()


@pytest.mark.parametrize("kind", ["inner", "cosine"])
def test_heads_without_a_distance_are_refused(kind: str) -> None:
    classifier = make_classifier()
    hpm = HPM(classifier.trunk, classifier.fc, variant=Variant(similarity=kind)).eval()  # type: ignore[arg-type]
    data = make_samples(classifier)
    with pytest.raises(ValueError, match=f"compares by '{kind}'"):
        analyse_model(hpm, data)
    assert len(analyse_model(hpm, data, train=data).labels) == len(data)


def test_what_can_not_be_analysed() -> None:
    hpm = make_hpm()
    data = _data(hpm)
    with pytest.raises(ValueError, match="a classifier has no prototypes"):
        analyse_model(hpm.fc_target, data)
    with pytest.raises(ValueError, match="no hybrid prototypes"):
        analyse_model(plain_l2_head(hpm.fc_target, data), data, prototypes="hybrid")
    many = Samples(data.x, data.y + 3, "many")
    with pytest.raises(ValueError, match="many has label 6, but the model has 4 classes"):
        analyse_model(hpm, many)
    with pytest.raises(ValueError, match="many has label 6, but the classifier has 4 classes"):
        analyse_model(hpm, data, train=many)
    few = Samples(data.x[:2], data.y[:2], "few")
    with pytest.raises(ValueError, match="training samples of every class"):
        analyse_model(hpm, data, train=few)
    wrong = Samples(torch.rand(4, 1, 5, 5), torch.arange(4), "wrong")
    with pytest.raises(ValueError, match=r"can't take images of shape \(1, 5, 5\)"):
        analyse_model(hpm, wrong)
    with pytest.raises(ValueError, match=r"expected 3 labels in 0\.\.1"):
        analyse(torch.ones(3, 2), torch.tensor([0, 1, 2]), torch.eye(2), torch.eye(2))


def test_the_packaged_reference(digits_hpm: HPM, digits: Samples) -> None:
    """Real features: the condition implies the comparison, and Eq. 13 is near the measured CDF."""
    found = analyse_model(digits_hpm, digits)
    assert bool((found.sensitivity.more_sensitive | ~found.sensitivity.condition).all())
    table = found.cdf()
    assert np.abs(table["measured"] - table["empirical"]).max() < 0.1
    z: Tensor = digits_hpm.features(digits.images(torch.arange(5)))
    direct = sensitivity(z, digits_hpm.fc_original.weight, digits_hpm.prototypes)
    again = analyse_model(digits_hpm, digits, prototypes="global").sensitivity
    torch.testing.assert_close(again.s_c[:5], direct.s_c, rtol=1e-5, atol=1e-6)
