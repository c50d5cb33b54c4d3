"""Folders of class folders: labels, the model's own order, preparation, and what is decoded."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from PIL import Image

from msa_eval import load_samples
from msa_eval.data import folders
from msa_eval.data.pixels import Preparation


def _folder(root: Path, names: Sequence[str], *, each: int = 1, size: tuple[int, int] = (4, 4)) -> Path:
    for number, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for i in range(each):
            Image.new("RGB", size, (number, i, 0)).save(root / name / f"{i}.png")
    return root


def test_numbers_as_names_sort_as_numbers_and_the_mapping_is_told(tmp_path: Path) -> None:
    numbered = load_samples(_folder(tmp_path / "a", ["0", "1", "2", "10", "11"]))
    assert numbered.classes == ("0", "1", "2", "10", "11")
    assert numbered.x[:, 0, 0, 0].tolist() == numbered.y.tolist() == [0, 1, 2, 3, 4]
    assert numbered.notes == ("labels by class folder: 0 = 0, 1 = 1, 2 = 2, 10 = 3, 11 = 4",)
    assert numbered.about() == {"classes": ["0", "1", "2", "10", "11"]}
    named = load_samples(_folder(tmp_path / "b", ["2a", "10a"]))
    assert named.classes == ("10a", "2a")


CLASSES = ("n01 tench, a fish", "n02", "n03 goldfish", "n04")


def _text(path: Path) -> Path:
    path.write_text("\n".join(CLASSES) + "\n")
    return path


def _listed(path: Path) -> Path:
    path.write_text(json.dumps([name.split()[0] for name in CLASSES]))
    return path


def _index(path: Path) -> Path:
    path.write_text(json.dumps({str(i): name.split(" ", 1) for i, name in enumerate(CLASSES)}))
    return path


@pytest.mark.parametrize(("write", "name"), [(_text, "c.txt"), (_listed, "c.json"), (_index, "c.json")])
def test_the_models_own_order(write: object, name: str, tmp_path: Path) -> None:
    assert callable(write)
    root = _folder(tmp_path / "data", ["n03", "n01"])
    samples = load_samples(root, classes=write(tmp_path / name))
    assert samples.y.tolist() == [0, 2]
    assert len(samples.classes) == 4
    assert samples.notes == ("labels by class folder: n01 = 0, n03 = 2",)
    (root / "n3").mkdir()
    (root / "n3" / "a.png").write_bytes((root / "n03" / "0.png").read_bytes())
    with pytest.raises(ValueError, match=r"class folder n3 is not in .* \(did you mean n0"):
        load_samples(root, classes=tmp_path / name)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("c.txt", "", "a line is empty"),
        ("c.txt", "a\n\nb", "a line is empty"),
        ("c.txt", "a\na", "names the class a twice, as 0 and as 1"),
        ("c.json", "3", "not a list of classes"),
        ("c.json", "[3]", "expected a list of names"),
        ("c.json", '{"1": "a"}', "label 0 is missing"),
        ("none.txt", None, "No such file"),
    ],
)
def test_files_that_name_no_classes(name: str, text: str | None, message: str, tmp_path: Path) -> None:
    root = _folder(tmp_path / "data", ["a"])
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        load_samples(root, classes=tmp_path / name)


def test_resize_and_crop_are_done_and_said(tmp_path: Path) -> None:
    root = _folder(tmp_path, ["a", "b"], size=(30, 20))
    Image.new("RGB", (20, 26)).save(root / "b" / "0.png")
    with pytest.raises(ValueError, match=r"\(3, 26, 20\) where .* is \(3, 20, 30\); bring all images to one size"):
        load_samples(root).digest()
    samples = load_samples(root, resize=12, crop=8)
    assert samples.x.shape == (2, 3, 8, 8)
    assert samples.about()["prepared"] == "shorter side resized to 12 (bilinear), center crop of 8"
    with pytest.raises(ValueError, match="smaller than the crop of 25"):
        load_samples(root, crop=25).digest()
    with pytest.raises(ValueError, match="a crop of 9 does not fit"):
        load_samples(root, resize=8, crop=9)
    with pytest.raises(ValueError, match="for a folder of images; digits is none"):
        load_samples("digits", resize=8)


def test_a_crop_is_from_the_middle() -> None:
    ramp = np.add.outer(10 * np.arange(7), np.arange(6)).astype(np.uint8)
    cut = np.array(Preparation(crop=4)(Image.fromarray(ramp)))
    assert cut.tolist() == ramp[2:6, 1:5].tolist()
    assert Preparation(resize=14)(Image.fromarray(ramp)).size == (14, 16)


def test_grey_among_coloured_images(tmp_path: Path) -> None:
    root = _folder(tmp_path, ["a", "b"])
    Image.new("L", (4, 4), 7).save(root / "a" / "0.png")
    found = load_samples(root).x
    assert found.shape == (2, 3, 4, 4)
    assert found[0].unique().tolist() == [7]
    Image.new("L", (4, 4), 8).save(root / "b" / "0.png")
    assert load_samples(root).x.shape == (2, 1, 4, 4)


def test_only_what_is_evaluated_is_decoded_once(tmp_path: Path) -> None:
    from msa_eval import evaluate, verify

    root = _folder(tmp_path / "data", ["a", "b", "c"], each=5, size=(3, 3))
    (root / "c" / "4.png").write_text("no image, and not evaluated")
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(27, 3)).eval()
    small = {"attack.apgd.steps": 1, "attack.square.queries": 1, "audit.samples": 0, "samples.limit": 4,
             "samples.seed": 1}  # fmt: skip
    with patch.object(folders, "read_picture", wraps=folders.read_picture) as read:
        results = evaluate(model, load_samples(root), protocol="quick", overrides=small, out=tmp_path / "out")
        assert read.call_count <= 6  # the first tells the shape, twice
    assert results.run["data"]["classes"] == ["a", "b", "c"]
    assert verify(tmp_path / "out", model, load_samples(root)).intact
    evaluated = int(results.samples["index"].iloc[0])
    file = sorted(root.rglob("*.png"))[evaluated]
    Image.new("RGB", (3, 3), (200, 0, 0)).save(file)
    assert not verify(tmp_path / "out", model, load_samples(root)).intact


def test_a_folder_of_parts_is_told_of_its_parts(tmp_path: Path) -> None:
    _folder(tmp_path / "val", ["cat", "dog"])
    with pytest.raises(ValueError, match=r"it is no file; give one part of the data, as .*val$"):
        load_samples(tmp_path)


def test_a_file_that_is_no_picture_is_to_be_taken_out(tmp_path: Path) -> None:
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / "notes.txt").write_text("x")
    with pytest.raises(ValueError, match=r"notes\.txt is not a readable image: it is no picture; take it out"):
        load_samples(tmp_path).images(torch.arange(1))
