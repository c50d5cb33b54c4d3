"""That the models of `strength` are made, attacked by both, and compared rightly; on a model trained for a moment."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from benchmarks import strength, strength_models
from benchmarks.strength_models import MODELS, STEPS_OF, build, images, trained


def test_at_least_twelve_models_each_with_an_eps_and_a_known_training() -> None:
    assert len(MODELS) >= 12
    assert {model.training for model in MODELS.values()} == {"natural", "pgd", "trades"}
    assert {"clipped", "tanh"} <= {model.activation for model in MODELS.values()}
    assert {model.data for model in MODELS.values()} == set(strength.SAMPLES) == set(STEPS_OF)


@pytest.mark.parametrize("name", ["digits-pgd", "digits-tanh", "mnist-pgd", "cifar10-pgd"])
def test_a_model_maps_images_of_its_data_to_ten_logits(name: str) -> None:
    channels, side = strength_models.SHAPES[MODELS[name].data]
    assert build(MODELS[name])(torch.rand(2, channels, side, side)).shape == (2, 10)


@pytest.mark.parametrize("training", ["natural", "trades"])
def test_a_trained_model_is_kept_and_knows_digits(
    training: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = dataclasses.replace(MODELS["digits-tanh"], training=training, epochs=2, eps=0.05)
    monkeypatch.setattr(strength_models, "MODELS", {"few": few})
    monkeypatch.setitem(STEPS_OF, "digits", 1)
    model = trained("few", tmp_path)
    data = images("digits")[1]
    assert (model(data.x).argmax(dim=1) == data.y).float().mean() > 0.5
    again = trained("few", tmp_path)
    assert torch.equal(again.fc.weight, model.fc.weight)


def test_a_row_compares_what_both_leave(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = dataclasses.replace(MODELS["digits-tanh"], training="natural", epochs=2)
    for module in (strength, strength_models):
        monkeypatch.setattr(module, "MODELS", {"few": few})
    monkeypatch.setitem(strength.SAMPLES, "digits", 16)
    (tmp_path / "few-standard-16.json").write_text(json.dumps({"left": [0], "passes": 3000.0}), encoding="utf-8")
    row = strength.compare("few", tmp_path, 2, "quick")
    assert row["N"] == 16
    assert row["standard left"] == 1
    left = [int(count) for count in row["msa left"].split(", ")]
    assert len(left) == 2
    assert all(count <= row["clean"] for count in left)
    missed = [len(gap.split()) for gap in row["missed"].split("; ")]
    assert all(count - 1 <= gap <= count for count, gap in zip(left, missed, strict=True))


def test_standard_counts_its_passes_and_leaves_no_sample_that_is_wrong(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = build(MODELS["digits-tanh"]).eval().requires_grad_(False)
    found = images("digits")[1]
    data = strength.Samples(found.x[:8], found.y[:8])
    described = strength.standard(model, data, strength.Ball("Linf", 0.3))
    right = (model(data.x).argmax(dim=1) == data.y).nonzero().flatten().tolist()
    assert set(described["left"]) <= set(right)
    assert described["passes"] >= 1
