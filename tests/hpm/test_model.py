"""HPM against its equations, written out with loops."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from toys import make_classifier, make_hpm

from msa_eval import HPM, Variant
from msa_eval.hpm.model import EPSILON, assign, class_means, similarity


def _features(count: int = 9, seed: int = 3) -> Tensor:
    return torch.randn(count, 6, generator=torch.Generator().manual_seed(seed))


def _by_definition(hpm: HPM, z: Tensor, *, soft: bool) -> Tensor:
    """Eqs. 15-18, an entry at a time."""
    fc = z @ hpm.fc.weight.T + hpm.fc.bias
    w_m, b_m = hpm.mixer.weight.T, hpm.mixer.bias
    out = torch.empty(len(z), 4)
    for j in range(4):
        share = [torch.softmax(row, 0)[j] if soft else float(row.argmax() == j) for row in fc]
        batch = sum(p * row for p, row in zip(share, z, strict=True)) / (sum(share) + EPSILON)
        hybrid = torch.cat([hpm.prototypes[j], batch]) @ w_m + b_m
        for i, row in enumerate(z):
            out[i, j] = -(row - hybrid).pow(2).sum().sqrt()
    return out


@pytest.mark.parametrize("soft", [False, True])
def test_logits_follow_the_equations(soft: bool) -> None:
    hpm, z = make_hpm(), _features()
    with torch.no_grad():
        hpm.mixer.weight += 0.3 * torch.randn(hpm.mixer.weight.shape, generator=torch.Generator().manual_seed(1))
        hpm.mixer.bias += 0.1
        found = hpm.logits(z, "soft" if soft else "ste")
        torch.testing.assert_close(found, _by_definition(hpm, z, soft=soft), atol=1e-5, rtol=1e-5)


def test_the_straight_through_forward_is_exactly_hard() -> None:
    logits = torch.randn(1000, 50, generator=torch.Generator().manual_seed(0))
    hard = F.one_hot(logits.argmax(dim=1), 50).float()
    assert torch.equal(assign(logits, "ste"), hard)
    assert torch.equal(assign(logits, "frozen"), hard)


def test_the_straight_through_gradient_is_that_of_the_softmax() -> None:
    logits = torch.randn(5, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    weight = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
    gradients = [
        torch.autograd.grad((assign(logits, kind) * weight).sum(), logits)[0] for kind in ("ste", "soft")  # type: ignore[arg-type]
    ]  # fmt: skip
    torch.testing.assert_close(*gradients)
    assert not assign(logits, "frozen").requires_grad


def test_temperature_sharpens_towards_hard() -> None:
    logits = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(assign(logits, "soft", temperature=1e-3), assign(logits, "frozen"))


def test_surrogate_views_share_one_forward_value_where_they_should() -> None:
    hpm, z = make_hpm(), _features()
    with torch.no_grad():
        assert torch.equal(hpm.logits(z, "ste"), hpm.logits(z, "frozen"))
        assert not torch.allclose(hpm.logits(z, "ste"), hpm.logits(z, "soft"))


def test_a_class_nobody_is_assigned_to_gets_the_zero_row() -> None:
    hpm, z = make_hpm(), _features(3)
    p = F.one_hot(torch.tensor([0, 0, 2]), 4).float()
    prototypes = hpm.batch_prototypes(z, p)
    assert torch.equal(prototypes[1], torch.zeros(6))
    assert torch.equal(prototypes[3], torch.zeros(6))
    torch.testing.assert_close(prototypes[0], z[:2].mean(dim=0), atol=1e-5, rtol=1e-5)


def test_the_batch_matters_and_its_order_does_not() -> None:
    hpm, z = make_hpm(), _features(8)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(hpm.logits(z[order]), hpm.logits(z)[order], atol=1e-5, rtol=1e-5)
        assert not torch.allclose(hpm.logits(z[:4]), hpm.logits(z)[:4])


def test_the_mixer_starts_as_the_average() -> None:
    hpm = make_hpm()
    batch = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(hpm.mix(batch), (hpm.prototypes + batch) / 2)


def test_prototypes_move_by_momentum_and_absent_classes_stay() -> None:
    hpm = make_hpm()
    before = hpm.prototypes.clone()
    z, y = _features(4), torch.tensor([1, 1, 3, 1])
    hpm.update_prototypes(z, y)
    torch.testing.assert_close(hpm.prototypes[1], 0.98 * before[1] + 0.02 * z[[0, 1, 3]].mean(dim=0))
    torch.testing.assert_close(hpm.prototypes[3], 0.98 * before[3] + 0.02 * z[2])
    assert torch.equal(hpm.prototypes[[0, 2]], before[[0, 2]])


def test_only_labels_in_training_mode_move_the_prototypes() -> None:
    hpm, x, y = make_hpm(), torch.rand(4, 3, 2, 2), torch.arange(4)
    before = hpm.prototypes.clone()
    hpm(x, y)
    hpm.train()(x)
    assert torch.equal(hpm.prototypes, before)
    hpm(x, y)
    assert not torch.equal(hpm.prototypes, before)


def test_prototypes_start_at_the_class_means() -> None:
    hpm, z, y = make_hpm(), _features(12), torch.arange(12) % 4
    hpm.start_prototypes(z, y)
    for j in range(4):
        torch.testing.assert_close(hpm.prototypes[j], z[y == j].mean(dim=0))
    with pytest.raises(ValueError, match="none of class 2"):
        hpm.start_prototypes(z[y != 2], y[y != 2])


def test_class_means_of_an_empty_class_are_zero_not_nan() -> None:
    means, present = class_means(_features(2), torch.tensor([0, 0]), 3)
    assert torch.isfinite(means).all()
    assert present.tolist() == [True, False, False]


def test_the_distance_has_a_safe_gradient_at_zero() -> None:
    z = torch.zeros(1, 3, requires_grad=True)
    similarity(z, torch.zeros(2, 3)).sum().backward()
    assert torch.equal(z.grad, torch.zeros(1, 3))  # type: ignore[arg-type]


def test_the_distance_keeps_its_digits_close_to_a_prototype() -> None:
    prototypes = 100 * torch.randn(50, 64, generator=torch.Generator().manual_seed(0))
    z = prototypes[:1] + 1e-3
    exact = (z.double() - prototypes[:1].double()).norm()
    assert -similarity(z, prototypes)[0, 0].item() == pytest.approx(exact.item(), rel=1e-5)


def test_variants_follow_their_definitions() -> None:
    classifier, z = make_classifier(), _features()
    anchor = torch.randn(4, 6, generator=torch.Generator().manual_seed(5))

    def build(**switches: str) -> HPM:
        hpm = HPM(classifier.trunk, classifier.fc, variant=Variant(**switches)).eval()  # type: ignore[arg-type]
        hpm.prototypes.copy_(anchor)
        return hpm

    batch = build().batch_prototypes(z, assign(classifier.fc(z), "ste"))
    expected = {
        ("mixer", "average"): -torch.cdist(z, (anchor + batch) / 2),
        ("prototypes", "batch"): -torch.cdist(z, batch),
        ("prototypes", "global"): -torch.cdist(z, anchor),
        ("similarity", "inner"): z @ ((anchor + batch) / 2).T,
        ("similarity", "cosine"): F.cosine_similarity(z.unsqueeze(1), ((anchor + batch) / 2).unsqueeze(0), dim=2),
    }
    for (switch, value), logits in expected.items():
        hpm = build(**{switch: value})
        torch.testing.assert_close(hpm.logits(z), logits, atol=1e-4, rtol=1e-4)
        assert hpm.batch_dependent == (value != "global")


def test_the_fc_target_is_the_classifier_before_fine_tuning() -> None:
    classifier = make_classifier()
    hpm = HPM(classifier.trunk, classifier.fc).eval()
    x = torch.rand(3, 3, 2, 2)
    with torch.no_grad():
        hpm.fc.weight += 1
        assert torch.equal(hpm.fc_target(x), classifier(x))
        assert not torch.allclose(hpm.fc_logits(hpm.features(x)), classifier(x))
    assert not hpm.fc_target.training


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: HPM(make_classifier().trunk, make_classifier().fc, momentum=1.5), "momentum in"),
        (lambda: Variant(mixer="none"), "mixer to be one of"),  # type: ignore[arg-type]
        (lambda: assign(torch.zeros(1, 2), "hard"), "assignment to be one of"),  # type: ignore[arg-type]
    ],
)
def test_unusable_settings(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]


@pytest.mark.parametrize(
    "variant",
    [
        Variant(), Variant(prototypes="batch"), Variant(prototypes="global"), Variant(mixer="average"),
        Variant(similarity="inner"), Variant(similarity="cosine"),
    ],
)  # fmt: skip
def test_batches_that_differ_in_one_row_come_in_closed_form(variant: Variant) -> None:
    """Against every batch put together and decided as a whole, also where a class loses its only row."""
    hpm = make_hpm()
    hpm.variant = variant
    generator = torch.Generator().manual_seed(3)
    staying, offered = torch.randn(4, 5, 6, generator=generator), torch.randn(4, 7, 6, generator=generator)
    with torch.no_grad():
        beside = hpm.logits_with(staying[:, 2:3], staying, offered)
        themselves = hpm.logits_with(offered, staying, offered)
        for i in range(4):
            for w in range(7):
                whole = hpm.logits(torch.cat([staying[i], offered[i, w : w + 1]]))
                torch.testing.assert_close(beside[i, w], whole[2], rtol=1e-5, atol=1e-5)
                torch.testing.assert_close(themselves[i, w], whole[5], rtol=1e-5, atol=1e-5)
