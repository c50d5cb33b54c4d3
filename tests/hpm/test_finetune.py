"""Fine-tuning: what moves, what stays, and what it is good for."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from toys import make_classifier, make_samples

from msa_eval import HPM, FinetuneSettings, Samples, Variant, finetune, load_samples
from msa_eval.hashing import weights_hash
from msa_eval.hpm.finetune import _most_divergent
from msa_eval.hpm.ikl import ikl
from msa_eval.hpm.model import class_means

SETTINGS = FinetuneSettings(batch_size=8, lr=1e-2, steps=3, eps=0.1, step_size=0.05)


@pytest.fixture
def samples() -> Samples:
    return make_samples(make_classifier(), 40)


def test_the_trunk_and_the_original_head_stay_and_the_rest_moves(samples: Samples) -> None:
    classifier = make_classifier()
    before = weights_hash(classifier)
    hpm = finetune(classifier, samples, settings=SETTINGS)
    assert weights_hash(classifier) == before
    assert weights_hash(hpm.fc_target) == before
    start = HPM(classifier.trunk, classifier.fc)
    assert not torch.allclose(hpm.fc.weight, start.fc.weight)
    assert not torch.allclose(hpm.mixer.weight, start.mixer.weight)
    assert not hpm.training
    assert not any(p.requires_grad for p in hpm.parameters())


def test_the_same_seed_gives_the_same_weights(samples: Samples) -> None:
    classifier = make_classifier()
    state = torch.random.get_rng_state()
    first, again, other = (
        weights_hash(finetune(classifier, samples, settings=dataclasses.replace(SETTINGS, seed=seed)))
        for seed in (0, 0, 1)
    )
    assert first == again != other
    assert torch.equal(state, torch.random.get_rng_state())


def test_incomplete_batches_let_nothing_decay(samples: Samples) -> None:
    """Batches of two never hold four classes; a decay of absent classes would shrink every prototype."""
    settings = dataclasses.replace(SETTINGS, batch_size=2, momentum=0.5, epochs=3)
    hpm = finetune(make_classifier(), samples, settings=settings)
    with torch.no_grad():
        means, _ = class_means(hpm.features(samples.x), samples.y, 4)
    ratio = hpm.prototypes.norm(dim=1) / means.norm(dim=1)
    assert (ratio > 0.6).all()


def test_the_trunk_sees_no_clean_image_twice(samples: Samples) -> None:
    classifier = make_classifier()
    trunk = classifier.trunk
    finetune(classifier, samples, settings=dataclasses.replace(SETTINGS, epochs=2))
    assert trunk.images == len(samples) * (1 + 2 * (SETTINGS.steps + 1))  # type: ignore[operator]


def test_every_variant_can_be_trained(samples: Samples) -> None:
    for variant in (Variant(prototypes="batch"), Variant(mixer="average"), Variant(similarity="inner")):
        assert finetune(make_classifier(), samples, settings=SETTINGS, variant=variant).variant == variant


def test_it_lowers_what_it_minimises(digits_hpm: HPM) -> None:
    """CE and IKL against fresh adversarial points of the digits test set fall from the untrained head to the tuned."""
    train, test = load_samples("digits", split="train"), load_samples("digits")
    classifier = digits_hpm.fc_target
    settings = FinetuneSettings(epochs=4, eps=0.15, step_size=0.0375)
    untrained = HPM(classifier.trunk, classifier.fc).eval()
    with torch.no_grad():
        untrained.start_prototypes(untrained.features(train.x), train.y)
    tuned = finetune(classifier, train, settings=settings)

    def loss(model: HPM) -> float:
        z = model.features(test.x).detach()
        x_adv = _most_divergent(model.requires_grad_(False), test.x, z, settings, torch.Generator().manual_seed(0))
        clean, adversarial = model.logits(z), model.logits(model.features(x_adv))
        uniform = torch.full_like(clean, 0.1)
        return float(F.cross_entropy(clean, test.y) + ikl(clean, adversarial, uniform))

    assert loss(tuned) < 0.97 * loss(untrained)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"y": 9}, "expected labels below 4"), ({"drop": 2}, "none of class 2")],
)
def test_unusable_samples(change: dict[str, int], message: str, samples: Samples) -> None:
    y, keep = samples.y.clone(), torch.ones(len(samples), dtype=torch.bool)
    if "y" in change:
        y[0] = change["y"]
    else:
        keep = y != change["drop"]
    with pytest.raises(ValueError, match=message):
        finetune(make_classifier(), Samples(samples.x[keep], y[keep]), settings=SETTINGS, progress=_no_pass)


def _no_pass(iterable: Any, description: str) -> Any:
    pytest.fail(f"{description} began")


def test_images_and_devices_that_do_not_fit(samples: Samples, digits: Samples) -> None:
    with pytest.raises(ValueError, match=r"can't take images of shape \(1, 8, 8\)"):
        finetune(make_classifier(), Samples(digits.x, digits.y.clamp(max=3)), settings=SETTINGS)
    with pytest.raises(ValueError, match="device 'warp' can't be used"):
        finetune(make_classifier(), samples, settings=SETTINGS, device="warp")


def test_a_diverging_loss_is_an_error(samples: Samples) -> None:
    with pytest.raises(ValueError, match="lower lr"):
        finetune(make_classifier(), samples, settings=dataclasses.replace(SETTINGS, lr=1e20, epochs=2))


def test_unusable_settings_are_reported_together() -> None:
    with pytest.raises(ValueError, match=r"epochs = 0.*batch_size = 1"):
        FinetuneSettings(epochs=0, batch_size=1)
