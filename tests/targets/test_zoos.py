"""Models of torchvision, timm and robustbench: built from their own definitions, split, and held to them."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from msa_eval import HPM, Classifier, load_checkpoint, load_target, save_checkpoint
from msa_eval.installation.imports import import_robustbench, import_timm, import_torchvision
from msa_eval.targets.building import Wanted
from msa_eval.targets.zoos import robustbench, torchvision

ABSENT = [name for name in ("torchvision", "timm", "robustbench") if importlib.util.find_spec(name) is None]
pytestmark = pytest.mark.skipif(bool(ABSENT), reason=f"needs pip install '.[robustbench]': no {', '.join(ABSENT)}")

MEAN, STD = (torch.tensor(v).view(1, 3, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
SLOW = pytest.mark.slow


def _images(size: int) -> Tensor:
    return torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No test downloads anything, even where there is a network."""

    def fail(*_: Any, **__: Any) -> None:
        raise URLError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    if not ABSENT:
        import_robustbench()
        monkeypatch.setattr("robustbench.utils.download_gdrive_new", fail)


PAPER = [
    ("Cui2023Decoupled_WRN-28-10", 32, "logits", 640, 10, ()),
    ("Singh2023Revisiting_ConvNeXt-T-ConvStem", 64, "head.fc", 768, 1000, ()),
    ("Cui2023Decoupled_WRN-28-10@cifar100", 32, "logits", 640, 100, SLOW),
    ("Wang2023Better_WRN-70-16", 32, "logits", 1024, 10, SLOW),
    ("Wang2023Better_WRN-70-16@cifar100", 32, "logits", 1024, 100, SLOW),
    ("Jia2022LAS-AT_70_16", 32, "fc", 1024, 10, SLOW),
    ("Jia2022LAS-AT_34_20@cifar100", 32, "fc", 1280, 100, SLOW),
    ("Bartoldson2024Adversarial_WRN-94-16", 32, "logits", 1024, 10, SLOW),
    ("Xu2024MIMIR_Swin-L", 224, "head", 1536, 1000, SLOW),
    ("Amini2024MeanSparse_ConvNeXt-L", 64, "model.head.fc", 1536, 1000, SLOW),
    ("Mo2022When_ViT-B", 224, "model.head", 768, 1000, SLOW),
]


@pytest.mark.parametrize(
    ("name", "size", "head", "features", "classes"), [pytest.param(*row[:5], marks=row[5], id=row[0]) for row in PAPER]
)
def test_the_papers_models_are_split(name: str, size: int, head: str, features: int, classes: int) -> None:
    target = load_target(f"robustbench:{name}", _images(size), random_weights=True)
    cut = target.about["cut"]
    assert (cut["head"], cut["features"], cut["classes"]) == (head, features, classes)
    assert target.about["random_weights"]
    assert "random weights: these numbers say nothing" in target.notes[0]


OTHERS = [
    ("torchvision:resnet18", 64, "1.fc", ()),
    ("torchvision:mobilenet_v3_small", 64, "1.classifier.3", ()),
    ("torchvision:convnext_tiny", 32, "1.classifier.2", ()),
    ("torchvision:vit_b_16", 224, "1.heads.head", SLOW),
    ("torchvision:swin_t", 224, "1.head", SLOW),
    ("torchvision:densenet121", 64, "1.classifier", SLOW),
    ("torchvision:googlenet", 64, "1.fc", SLOW),
    ("timm:resnet10t", 64, "1.fc", ()),
    ("timm:convnext_atto", 64, "1.head.fc", ()),
    ("timm:vit_tiny_patch16_224", 224, "1.head", SLOW),
    ("timm:xcit_nano_12_p16_224", 224, "1.head", SLOW),
    ("timm:resnetv2_50", 64, "1.head.fc", SLOW),  # a 1x1 convolution
    ("timm:swin_tiny_patch4_window7_224", 224, "1.head.fc", SLOW),
]


@pytest.mark.parametrize(("word", "size", "head"), [pytest.param(*row[:3], marks=row[3], id=row[0]) for row in OTHERS])
def test_others_models_are_split(word: str, size: int, head: str) -> None:
    target = load_target(word, _images(size), random_weights=True)
    assert target.about["cut"]["head"] == head


def test_images_are_in_unit_range_and_normalised_inside() -> None:
    """The model is the package's own on normalised images: ε stays in pixel units."""
    import_torchvision()
    from torchvision.models import mobilenet_v3_small

    built = torchvision("mobilenet_v3_small", Wanted(random=True))
    own = mobilenet_v3_small().eval()
    own.load_state_dict(built.model[1].state_dict())  # type: ignore[index]
    x = _images(64)
    with torch.no_grad():
        assert torch.allclose(built.model(x), own((x - MEAN) / STD), atol=1e-6)
    vit = load_target("timm:vit_tiny_patch16_224", random_weights=True, whole=True)
    assert vit.about["normalization"] == {"mean": [0.5] * 3, "std": [0.5] * 3}


def test_robustbench_models_normalise_themselves() -> None:
    """Nothing is put around them: the result is the definition's own model."""
    import_robustbench()
    from robustbench.model_zoo import model_dicts
    from robustbench.model_zoo.enums import BenchmarkDataset, ThreatModel

    built = robustbench("Addepalli2022Efficient_RN18", Wanted(random=True))
    own = model_dicts[BenchmarkDataset.cifar_10][ThreatModel.Linf]["Addepalli2022Efficient_RN18"]["model"]().eval()
    own.load_state_dict(built.model.state_dict())
    with torch.no_grad():
        assert torch.equal(built.model(_images(32)), own(_images(32)))


def test_random_weights_are_the_same_at_every_call_and_leave_no_trace() -> None:
    state = torch.random.get_rng_state()
    one, two = (load_target("timm:resnet10t", _images(64), random_weights=True).classifier(_images(64)) for _ in "12")
    assert torch.equal(one, two)
    assert torch.equal(state, torch.random.get_rng_state())


def test_torchvision_weights_from_the_hub_folder_and_from_a_file(tmp_path: Path) -> None:
    built = torchvision("mobilenet_v3_small", Wanted(random=True))
    word, file = "torchvision:mobilenet_v3_small", "mobilenet_v3_small-047dcff4.pth"
    folder = tmp_path / "torch" / "hub" / "checkpoints"
    with pytest.raises(
        ValueError, match=rf"are not here and can't be fetched .*put {file} into {folder}, or .*weights=FILE"
    ):
        load_target(word, _images(64))
    folder.mkdir(parents=True, exist_ok=True)
    state = dict(built.model[1].state_dict())  # type: ignore[index]
    state["classifier.3.weight"] = state["classifier.3.weight"] + 1
    torch.save(state, folder / file)
    target = load_target(f"{word}@IMAGENET1K_V1", _images(64))
    assert (target.about["weights"], target.about["random_weights"]) == (file, False)
    assert torch.equal(target.classifier.fc.weight, state["classifier.3.weight"])

    state["classifier.3.weight"], state["classifier.3.bias"] = torch.rand(10, 1024), torch.rand(10)
    save_file(state, tmp_path / "ten.safetensors")
    ten = load_target(word, _images(64), weights=tmp_path / "ten.safetensors")
    assert ten.classifier.fc.out_features == 10
    assert ten.blueprint is not None
    save_checkpoint(tmp_path / "classifier.safetensors", ten.classifier, ten.blueprint)
    again = load_checkpoint(tmp_path / "classifier.safetensors")
    assert torch.equal(again.model(_images(64)), ten.classifier(_images(64)))
    with pytest.raises(ValueError, match="does not fit the model"):
        load_target("torchvision:resnet18", _images(64), weights=tmp_path / "ten.safetensors")


def test_timm_weights_from_the_hub_folder(tmp_path: Path) -> None:
    folder = tmp_path / "torch" / "hub" / "checkpoints"
    with pytest.raises(ValueError, match=rf"put resnet10t.c3_in1k.safetensors into {folder}"):
        load_target("timm:resnet10t", _images(64))
    folder.mkdir(parents=True, exist_ok=True)
    save_file(import_timm().create_model("resnet10t").state_dict(), folder / "resnet10t.c3_in1k.safetensors")
    target = load_target("timm:resnet10t", _images(64))
    assert target.about["weights"] == "resnet10t.c3_in1k.safetensors"


@pytest.mark.parametrize("form", ["pt", "safetensors"])
def test_robustbench_weights(form: str, tmp_path: Path) -> None:
    name, word = "Addepalli2022Efficient_RN18", "robustbench:Addepalli2022Efficient_RN18@cifar100/Linf"
    state = robustbench(f"{name}@cifar100", Wanted(random=True)).model.state_dict()
    state["linear.bias"] = torch.arange(100.0)
    folder = tmp_path / "models" / "cifar100" / "Linf"
    with pytest.raises(ValueError, match=rf"put {name}.pt into {folder}, or name a file with weights=FILE"):
        load_target(word, _images(32), models=tmp_path / "models")
    if form == "pt":
        torch.save(state, folder / f"{name}.pt")
        target = load_target(word, _images(32), models=tmp_path / "models")
    else:
        save_file(state, tmp_path / "mine.safetensors")
        target = load_target(word, _images(32), weights=tmp_path / "mine.safetensors")
    assert torch.equal(target.classifier.fc.bias, torch.arange(100.0))
    assert len(target.about["weights_sha256"]) == 64
    torch.save({"state_dict": {"a": torch.zeros(1)}}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"other.pt does not fit robustbench:Addepalli"):
        load_target(word, _images(32), weights=tmp_path / "other.pt")


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("torchvision:resnet81", "no torchvision called 'resnet81'; did you mean .*resnet"),
        ("torchvision:resnet18@V9", "no weights of torchvision:resnet18 called 'V9'"),
        ("timm:vit_tiny_patch16", r"no timm called 'vit_tiny_patch16'; did you mean .*vit_tiny_patch16_224"),
        ("timm:resnet10t.nobody", "did you mean resnet10t.c3_in1k"),
        ("robustbench:Cui2023Decoupled_WRN-28", "did you mean Cui2023Decoupled_WRN-28-10"),
        ("robustbench:Standard@cifar11", "no data set of robustbench called 'cifar11'; did you mean cifar10"),
        ("robustbench:Standard/L3", "no threat model of robustbench called 'L3'"),
        ("robustbench:Mo2022When_ViT-B@cifar10", "no robustbench for cifar10/Linf called 'Mo2022When_ViT-B'"),
        ("robustbench:Diffenderfer2021Winning_LRR_CARD_Deck/corruptions", "put Diffenderfer.*_m0"),
    ],
)
def test_misspelt_names(word: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_target(word, _images(32))


@pytest.mark.parametrize("name", ["googlenet", "vit_b_16@IMAGENET1K_SWAG_E2E_V1", "inception_v3"])
def test_what_torchvision_sets_beside_pretrained_weights_is_set(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Held to torchvision's own builder with pretrained weights, whose download is cut short at the architecture."""
    import_torchvision()
    from torchvision.models import get_model, get_model_weights
    from torchvision.models._api import WeightsEnum

    plain, _, tag = name.partition("@")
    ours = torchvision(name, Wanted(random=True)).model[1]  # type: ignore[index]
    monkeypatch.setattr(WeightsEnum, "get_state_dict", lambda *_, **__: ours.state_dict())
    theirs = get_model(plain, weights=get_model_weights(plain)[tag or "DEFAULT"]).eval()
    for attribute in ("transform_input", "image_size"):
        assert getattr(ours, attribute, None) == getattr(theirs, attribute, None)
    if plain == "googlenet":
        x = _images(64)
        with torch.no_grad():
            assert torch.equal(ours(x), theirs(x))


def test_grey_images_are_not_taken_for_colour() -> None:
    with pytest.raises(ValueError, match="takes images of 3 channels, but these have 1"):
        load_target("torchvision:mobilenet_v3_small", torch.rand(2, 1, 64, 64), random_weights=True)


def test_a_model_that_fetches_weights_while_it_is_built() -> None:
    with pytest.raises(ValueError, match="Standard_R50@imagenet/Linf can't be built without its pretrained weights"):
        load_target("robustbench:Standard_R50@imagenet", _images(64), random_weights=True)


def test_images_of_another_size() -> None:
    target = load_target("torchvision:mobilenet_v3_small", _images(32), random_weights=True)
    assert any("was made for images of 224x224, but gets 32x32" in note for note in target.notes)
    with pytest.raises(
        ValueError, match=r"timm:vit_tiny_patch16_224: the model can't take images of shape \(3, 32, 32\)"
    ):
        load_target("timm:vit_tiny_patch16_224", _images(32), random_weights=True)


def test_hpm_on_a_named_model_is_loaded_again(tmp_path: Path) -> None:
    """A checkpoint names its trunk's recipe, and needs neither weights nor network to come back."""
    for word, size in (("torchvision:mobilenet_v3_small", 64), ("robustbench:Addepalli2022Efficient_RN18", 32)):
        target, x = load_target(word, _images(size), random_weights=True), _images(size)
        hpm = HPM(target.classifier.trunk, target.classifier.fc).eval()
        hpm.prototypes.normal_(generator=torch.Generator().manual_seed(0))
        assert target.blueprint is not None
        save_checkpoint(tmp_path / "hpm.safetensors", hpm, target.blueprint)
        loaded = load_checkpoint(tmp_path / "hpm.safetensors")
        assert isinstance(loaded.model, HPM)
        assert loaded.blueprint.architecture == word
        assert torch.equal(loaded.model(x), hpm(x))
        assert isinstance(loaded.classifier, Classifier)
        assert torch.equal(loaded.classifier(x), target.classifier(x))


class _Hostile:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("pwned"),))


@pytest.mark.parametrize("held", [True, False])
def test_no_pickle_runs_through_robustbench(held: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even where the environment asks torch.load for it, and not in what robustbench reads itself."""
    name, load = "Addepalli2022Efficient_RN18", torch.load
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    file = tmp_path / "models" / "cifar10" / "Linf" / f"{name}.pt" if held else tmp_path / "hostile.pt"
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": _Hostile()}, file)
    how: dict[str, Any] = {"models": tmp_path / "models"} if held else {"weights": file}
    for _ in range(2):
        with pytest.raises(ValueError, match=f"{file.name} "):
            load_target(f"robustbench:{name}@cifar10", _images(32), **how)
        # And without the look before it.
        monkeypatch.setattr("msa_eval.targets.zoos.read_plain", lambda path: None)
    assert not (tmp_path / "pwned").exists()
    assert torch.load is load


def test_a_file_of_another_kind(tmp_path: Path) -> None:
    (tmp_path / "text.pt").write_text("hello")
    with pytest.raises(ValueError, match=r"text.pt is not a file of plain weights that .*reads \(.*[a-z ]{10}.*\)"):
        load_target("robustbench:Addepalli2022Efficient_RN18", _images(32), weights=tmp_path / "text.pt")


@pytest.mark.parametrize("name", ["Debenedetti2022Light_XCiT-S12", "Standard_R50@imagenet"])
def test_models_that_their_package_fills_take_no_weights_file(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="by its own package; it takes no weights file"):
        load_target(f"robustbench:{name}", _images(32), weights=tmp_path / "a.safetensors")
    # Nor is a file in robustbench's folder said to be theirs.
    word, _, dataset = name.partition("@")
    folder = tmp_path / "models" / (dataset or "cifar10") / "Linf"
    folder.mkdir(parents=True)
    torch.save({}, folder / f"{word}.pt")
    with pytest.raises(ValueError, match="fetches its weights from its own package's place"):
        load_target(f"robustbench:{name}", _images(32), models=tmp_path / "models")
    monkeypatch.setattr("robustbench.utils.load_model", lambda *_, **__: torch.nn.Flatten())
    assert robustbench(name, Wanted(folder=tmp_path / "models")).about["weights"] == "its package's"
