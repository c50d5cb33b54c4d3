"""Image classifiers of transformers from a folder: with their normalisation, split, and held to the model itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from msa_eval import load_target
from msa_eval.targets import huggingface
from msa_eval.targets.huggingface import LogitsOf

transformers = pytest.importorskip("transformers", reason="needs pip install '.[hf]'")

IMAGES = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.3, 0.4]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        config = transformers.ViTConfig(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=8,
            patch_size=4, num_labels=5,
        )  # fmt: skip
        transformers.ViTForImageClassification(config).save_pretrained(tmp_path)
    _processor(tmp_path, image_mean=MEAN, image_std=STD, do_normalize=True, size={"height": 8, "width": 8})
    return tmp_path


def _processor(folder: Path, **said: Any) -> None:
    (folder / "preprocessor_config.json").write_text(json.dumps(said))


def _own(folder: Path, x: Tensor) -> Tensor:
    model: nn.Module = transformers.AutoModelForImageClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        out: Tensor = model(pixel_values=x).logits
    return out


def _normalised(x: Tensor) -> Tensor:
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return (x - mean) / std


def _logits(word: str, **how: Any) -> Tensor:
    model = load_target(word, IMAGES, **how).model
    with torch.no_grad():
        return model.logits(model.features(IMAGES))


def test_a_model_of_a_folder_is_split_and_answers_as_its_own_processor_and_model_do(folder: Path) -> None:
    target = load_target(f"hf:{folder}", IMAGES)
    assert target.about["cut"]["head"] == "1.model.classifier"
    assert target.about["weights"] == "model.safetensors"
    assert target.about["package"].startswith("transformers ")
    assert any("mean 0.4, 0.5, 0.6 and std 0.2, 0.3, 0.4" in note for note in target.notes)
    torch.testing.assert_close(_logits(f"hf:{folder}"), _own(folder, _normalised(IMAGES)))
    other = load_target(f"hf:{folder}", torch.rand(2, 3, 8, 8))
    assert not any("made for images" in note for note in other.notes)


def test_scale_order_and_absence_of_a_normalisation_are_followed(folder: Path) -> None:
    _processor(folder, image_mean=[0.5], image_std=0.5, rescale_factor=1 / 127.5)
    torch.testing.assert_close(_logits(f"hf:{folder}"), _own(folder, (2 * IMAGES - 0.5) / 0.5))
    _processor(folder, do_normalize=False, image_mean=MEAN, image_std=STD)
    torch.testing.assert_close(_logits(f"hf:{folder}"), _own(folder, IMAGES))
    _processor(folder, do_flip_channel_order=True, do_rescale=True)
    torch.testing.assert_close(_logits(f"hf:{folder}"), _own(folder, IMAGES.flip(1)))
    torch.testing.assert_close(
        _logits(f"hf:{folder}", mean=MEAN, std=STD), _own(folder, _normalised(IMAGES).flip(1)), atol=1e-5, rtol=1e-5
    )


def test_weights_may_be_random_or_come_from_a_file(folder: Path) -> None:
    random = load_target(f"hf:{folder}", IMAGES, random_weights=True)
    assert random.about["random_weights"]
    assert not torch.allclose(_logits(f"hf:{folder}", random_weights=True), _logits(f"hf:{folder}"))
    other = folder / "other.safetensors"
    save_file({name: 2 * value for name, value in load_file(folder / "model.safetensors").items()}, other)
    assert not torch.allclose(_logits(f"hf:{folder}", weights=other), _logits(f"hf:{folder}"))


def test_what_is_missing_is_said_in_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _processor(folder, image_mean=MEAN, image_std=STD, rescale_offset=True)
    with pytest.raises(ValueError, match=r"in a way of its own \(rescale_offset\); give mean="):
        load_target(f"hf:{folder}", IMAGES)
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(ValueError, match=r"says nothing of how images are normalised; give mean="):
        load_target(f"hf:{folder}", IMAGES)
    assert load_target(f"hf:{folder}", IMAGES, mean="none").about["cut"]
    tensors = load_file(folder / "model.safetensors")
    save_file(
        {n: v for n, v in tensors.items() if "classifier" not in n}, folder / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(ValueError, match=r"no weights for classifier\.bias, classifier\.weight, which would be random"):
        load_target(f"hf:{folder}", IMAGES, mean="none")
    with pytest.raises(ValueError, match="there is no folder"):
        load_target(f"hf:{folder / 'nothing'}", IMAGES)

    def absent() -> Any:
        raise ValueError("install it with: pip install 'msa-eval[hf]'")

    monkeypatch.setattr(huggingface, "import_transformers", absent)
    with pytest.raises(ValueError, match=r"msa-eval\[hf\]"):
        load_target(f"hf:{folder}", IMAGES)


def test_a_folder_that_holds_no_image_classifier_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"can't be loaded.*OWNER/NAME, or the folder"):
        load_target(f"hf:{tmp_path}", IMAGES)
    transformers.BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1).save_pretrained(tmp_path)
    _processor(tmp_path, do_normalize=False)
    with pytest.raises(ValueError, match=r"not an image classifier"):
        load_target(f"hf:{tmp_path}", IMAGES, random_weights=True)


def test_nothing_is_written_while_a_model_is_loaded(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    load_target(f"hf:{folder}", IMAGES)
    assert capfd.readouterr() == ("", "")


def test_only_logits_are_passed_on() -> None:
    class Answering(nn.Module):
        def forward(self, pixel_values: Tensor) -> Any:
            return transformers.modeling_outputs.ImageClassifierOutput(logits=pixel_values.flatten(1))

    assert torch.equal(LogitsOf(Answering(), flipped=True)(IMAGES), IMAGES.flip(1).flatten(1))
