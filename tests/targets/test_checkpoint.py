"""Checkpoints: what comes back, and what is refused."""

from __future__ import annotations

import json
import pickle
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from msa_eval import HPM, Blueprint, Classifier, Variant, load_bare_classifier, load_checkpoint, save_checkpoint
from msa_eval.hashing import weights_hash
from msa_eval.references import reference_path
from msa_eval.targets.weights import read_safetensors

BLUEPRINT = Blueprint("digits-cnn", {"width": 2}, 10, {"mean": [0.5], "std": [0.25]})


def _hpm() -> HPM:
    classifier = BLUEPRINT.build()
    hpm = HPM(classifier.trunk, classifier.fc, momentum=0.9, variant=Variant(similarity="cosine")).eval()
    hpm.prototypes.normal_()
    with torch.no_grad():
        hpm.fc.weight += 1
    return hpm


@pytest.mark.parametrize("make", [_hpm, lambda: BLUEPRINT.build().eval()])
def test_everything_comes_back(make: Callable[[], HPM | Classifier], tmp_path: Path) -> None:
    model, x = make(), torch.rand(5, 1, 8, 8)
    save_checkpoint(tmp_path / "deep" / "a.safetensors", model, BLUEPRINT, history={"by": "hand"})
    loaded = load_checkpoint(tmp_path / "deep" / "a.safetensors")
    assert loaded.blueprint == BLUEPRINT
    assert loaded.history == {"by": "hand"}
    assert weights_hash(loaded.model) == weights_hash(model)
    assert torch.equal(loaded.model(x), model(x))
    assert not loaded.model.training
    if isinstance(model, HPM):
        assert isinstance(loaded.model, HPM)
        assert (loaded.model.momentum, loaded.model.variant) == (0.9, model.variant)
        assert torch.equal(loaded.model.fc_target(x), model.fc_target(x))
    mode = (tmp_path / "deep" / "a.safetensors").stat().st_mode
    assert stat.S_IMODE(mode) == 0o644
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["a.safetensors"]


def _altered(tmp_path: Path, alter: Callable[[dict[str, str], dict[str, torch.Tensor]], None]) -> Path:
    save_checkpoint(tmp_path / "a.safetensors", _hpm(), BLUEPRINT)
    header, tensors = read_safetensors(tmp_path / "a.safetensors")
    alter(header, tensors)
    save_file(tensors, tmp_path / "b.safetensors", metadata=header)
    return tmp_path / "b.safetensors"


def _about(change: dict[str, Any]) -> Callable[[dict[str, str], dict[str, torch.Tensor]], None]:
    def alter(header: dict[str, str], tensors: dict[str, torch.Tensor]) -> None:
        del tensors
        about = json.loads(header["about"])
        about["blueprint"] |= change.pop("blueprint", {})
        header["about"] = json.dumps(about | change)

    return alter


@pytest.mark.parametrize(
    ("alter", "message"),
    [
        (lambda header, _: header.update(format="other"), "no msa-eval checkpoint"),
        (lambda header, _: header.update(format_version="2"), "format version 2"),
        (lambda header, _: header.pop("about"), "does not fit its own description"),
        (lambda header, _: header.update(about="{"), "does not fit its own description"),
        (lambda _, tensors: tensors.pop("fc.weight"), "fc.weight is missing"),
        (lambda _, tensors: tensors.update(extra=torch.zeros(1)), "extra is not part of the model"),
        (lambda _, tensors: tensors["fc.weight"].fill_(torch.nan), "fc.weight holds values that are not finite"),
        (_about({"blueprint": {"num_classes": 7}}), r"is \(10.*not \(7"),
        (_about({"blueprint": {"architecture": "vit"}}), "unknown architecture 'vit'"),
        (_about({"blueprint": {"arguments": {"depth": 1}}}), "takes width, not depth"),
        (_about({"blueprint": {"arguments": {"width": "a"}}}), "width of architecture .* is a whole number, not 'a'"),
        (_about({"blueprint": {"arguments": ["cut"]}}), "does not fit its own description: its blueprint is none"),
        (_about({"history": []}), "does not fit its own description: its history is none"),
        (_about({"kind": "gan"}), "unknown kind of model 'gan'"),
    ],
)
def test_what_does_not_fit_is_refused(alter: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        load_checkpoint(_altered(tmp_path, alter))


def test_missing_damaged_and_pickled_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no file"):
        load_checkpoint(tmp_path / "none.safetensors")
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(reference_path("digits").read_bytes()[:5000])
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        load_checkpoint(cut)

    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "boom",))

    (tmp_path / "model.pt").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ValueError, match="pickles are never loaded"):
        load_checkpoint(tmp_path / "model.pt")
    assert not (tmp_path / "boom").exists()


@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_bare_state_dict(prefix: str, tmp_path: Path) -> None:
    classifier = Blueprint("digits-cnn", {"width": 2}, 7).build().eval()
    bare = {prefix + name.replace("trunk.", ""): value for name, value in classifier.state_dict().items()}
    bare = {name.replace("fc.", "head."): value for name, value in bare.items()}
    save_file(bare, tmp_path / "bare.safetensors")
    loaded = load_bare_classifier(tmp_path / "bare.safetensors", "digits-cnn", {"width": 2}, head="head")
    assert loaded.blueprint.num_classes == 7
    x = torch.rand(2, 1, 8, 8)
    assert torch.equal(loaded.model(x), classifier(x))
    with pytest.raises(ValueError, match="no msa-eval checkpoint; turn a bare"):
        load_checkpoint(tmp_path / "bare.safetensors")
    with pytest.raises(ValueError, match="no fully connected layer 'fc'"):
        load_bare_classifier(tmp_path / "bare.safetensors", "digits-cnn", {"width": 2})
    with pytest.raises(ValueError, match="does not fit digits-cnn"):
        load_bare_classifier(tmp_path / "bare.safetensors", "digits-cnn", {"width": 3}, head="head")


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_checkpoint(path, _hpm(), BLUEPRINT)
    before = path.read_bytes()
    (tmp_path / "a.safetensors.part").mkdir()
    with pytest.raises(OSError, match=r"a\.safetensors"):
        save_checkpoint(path, _hpm(), BLUEPRINT)
    assert path.read_bytes() == before


def test_loading_leaves_the_global_random_state_alone() -> None:
    state = torch.random.get_rng_state()
    load_checkpoint(reference_path("digits"))
    assert torch.equal(state, torch.random.get_rng_state())


def test_the_hash_sees_values_names_and_types() -> None:
    model = torch.nn.Linear(2, 2)
    before = weights_hash(model)
    assert weights_hash(model.double()) != before
    assert weights_hash(torch.nn.Sequential(model.float())) != before
    with torch.no_grad():
        model.bias[0] += 1
    assert weights_hash(model) != before


def test_the_shared_classifier_has_its_published_accuracy(shared: Path, cifar10: Any) -> None:
    path = shared / "models/cifar10_wrn10_2_at.safetensors"
    model = load_bare_classifier(path, "wideresnet", {"depth": 10, "width": 2}).model
    with torch.no_grad():
        right = (model(cifar10.images(torch.arange(200))).argmax(dim=1) == cifar10.y).float().mean()
    assert 0.56 < right < 0.73
