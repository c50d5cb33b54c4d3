"""Data: every source, and every kind of bad input."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from msa_eval import Samples, load_samples


def test_digits_splits_are_real_stratified_and_disjoint() -> None:
    from sklearn.datasets import load_digits

    train, test = load_samples("digits", split="train"), load_samples("digits")
    assert (len(train), len(test)) == (1197, 600)
    assert torch.bincount(test.y).min() >= 55
    rows = {tuple(row) for row in (16 * torch.cat([train.x, test.x])).flatten(1).int().tolist()}
    assert rows == {tuple(row) for row in load_digits().data.astype(int).tolist()}
    assert not {tuple(r) for r in train.x.flatten(1).tolist()} & {tuple(r) for r in test.x.flatten(1).tolist()}


@pytest.mark.parametrize(
    ("x", "shape"),
    [
        (np.full((4, 8, 8, 3), 255, np.uint8), (4, 3, 8, 8)),
        (np.ones((4, 3, 8, 8), np.float64), (4, 3, 8, 8)),
        (np.ones((4, 8, 8), np.float32), (4, 1, 8, 8)),
        (np.ones((4, 8, 8, 1), np.float32), (4, 1, 8, 8)),
    ],
)
def test_npz_layouts(x: Any, shape: tuple[int, ...], tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=x, y=np.arange(4, dtype=np.int32))
    samples = load_samples(str(tmp_path / "a.npz"))
    images = samples.images(torch.arange(4))
    assert images.shape == shape
    assert images.dtype == torch.float32
    assert torch.equal(images, torch.ones(shape))
    assert samples.y.tolist() == [0, 1, 2, 3]


def test_channels_are_moved_not_mixed(tmp_path: Path) -> None:
    x = np.random.default_rng(0).integers(0, 256, (2, 5, 6, 3), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", x=x, y=np.zeros(2, np.int64))
    found = load_samples(str(tmp_path / "a.npz")).x.numpy()
    for i, h, w, c in np.ndindex(*x.shape):
        assert found[i, c, h, w] == x[i, h, w, c]


def test_a_folder_of_class_folders(tmp_path: Path) -> None:
    for label, name in enumerate(["cat", "dog"]):
        (tmp_path / name).mkdir()
        for i in range(2):
            Image.new("RGB", (4, 3), (10 * label, 20 * i, 30)).save(tmp_path / name / f"{i}.png")
    samples = load_samples(str(tmp_path))
    assert samples.x.shape == (4, 3, 3, 4)
    assert samples.y.tolist() == [0, 0, 1, 1]
    assert samples.x[:, :, 0, 0].tolist() == [[0, 0, 30], [0, 20, 30], [10, 0, 30], [10, 20, 30]]

    Image.new("RGB", (5, 5)).save(tmp_path / "cat" / "2.png")
    with pytest.raises(ValueError, match=r"2\.png is \(3, 5, 5\) where .*0\.png is \(3, 3, 4\)"):
        load_samples(str(tmp_path)).digest()
    (tmp_path / "cat" / "2.png").write_text("no image")
    with pytest.raises(ValueError, match=r"2\.png is not a readable image"):
        load_samples(str(tmp_path)).digest()


def test_sixteen_bits_are_scaled_and_unknown_ranges_refused(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / ".checkpoints").mkdir()
    grey = np.array([[0, 257, 32896], [65535, 1000, 255]], np.uint16)
    Image.fromarray(grey).save(tmp_path / "a" / "0.png")
    samples = load_samples(str(tmp_path))
    assert samples.x.squeeze().tolist() == [[0, 1, 128], [255, 3, 0]]
    assert samples.y.tolist() == [0]
    Image.fromarray(grey.astype(np.float32)).save(tmp_path / "a" / "1.tiff")
    with pytest.raises(ValueError, match="no known range"):
        load_samples(str(tmp_path)).digest()


def test_labels_must_be_integers() -> None:
    with pytest.raises(ValueError, match="integer labels"):
        Samples(torch.rand(2, 1, 2, 2), torch.tensor([0.7, 1.2]))


def test_empty_folders(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no subfolders"):
        load_samples(str(tmp_path))
    (tmp_path / "cat").mkdir()
    with pytest.raises(ValueError, match="hold no images"):
        load_samples(str(tmp_path))


def _npz(folder: Path, **arrays: Any) -> str:
    np.savez(folder / "bad.npz", **arrays)
    return str(folder / "bad.npz")


GOOD = np.zeros((2, 3, 4, 4), np.float32)
LABELS = np.zeros(2, np.int64)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": GOOD}, "holds x but no y"),
        ({"images": GOOD}, "holds images but no labels"),
        ({"pixels": GOOD}, "holds pixels but no x and no y"),
        ({"x": GOOD, "y": LABELS.astype(float)}, "integer labels, but got float64"),
        ({"x": GOOD.astype(int) + 256, "y": LABELS}, "whole numbers from 256 to 256"),
        ({"x": GOOD.astype(complex), "y": LABELS}, "complex numbers"),
        ({"x": GOOD + 255, "y": LABELS}, "divide them by 255"),
        ({"x": GOOD, "y": np.array(["cat", "dog"])}, "labels are texts, not numbers; number the classes"),
        ({"x": GOOD, "y": np.full((2, 3), 0.5)}, "not one-hot"),
        ({"x": GOOD + 1.5, "y": LABELS}, r"images in \[0, 1\].*range from 1.5 to 1.5"),
        ({"x": GOOD - 0.1, "y": LABELS}, r"images in \[0, 1\]"),
        ({"x": GOOD * np.nan, "y": LABELS}, "NaN or infinite"),
        ({"x": np.zeros((2, 3), np.float32), "y": LABELS}, r"shape \(N, C, H, W\)"),
        ({"x": GOOD, "y": np.zeros(3, np.int64)}, "2 images and labels of shape"),
        ({"x": GOOD, "y": LABELS - 1}, "lowest is -1"),
        ({"x": GOOD[:0], "y": LABELS[:0]}, "no images"),
    ],
)
def test_bad_arrays_are_named(arrays: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        load_samples(_npz(tmp_path, **arrays))


def test_files_that_are_no_data(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no data 'cifra10'"):
        load_samples("cifra10")
    with pytest.raises(ValueError, match="there is no file"):
        load_samples(str(tmp_path / "none.npz"))
    (tmp_path / "text.npz").write_text("hello")
    with pytest.raises(ValueError, match=r"text\.npz"):
        load_samples(str(tmp_path / "text.npz"))
    np.save(tmp_path / "one.npy", GOOD)
    (tmp_path / "one.npy").rename(tmp_path / "one.npz")
    with pytest.raises(ValueError, match="not a readable"):
        load_samples(str(tmp_path / "one.npz"))
    assert load_samples(_npz(tmp_path, x=GOOD.astype(np.longdouble), y=LABELS)).x.dtype == torch.float32
    with pytest.raises(ValueError, match="not a readable"):
        load_samples(_npz(tmp_path, x=np.array([{"a": 1}], dtype=object), y=LABELS))


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "boom",))

    (tmp_path / "bomb.npz").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ValueError, match="not a readable"):
        load_samples(str(tmp_path / "bomb.npz"))
    assert not (tmp_path / "boom").exists()


def test_cifar_without_torchvision_or_its_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"torchvision; install it|is not in"):
        load_samples("cifar10", root=tmp_path)


def test_the_digest_sees_images_and_labels() -> None:
    x, y = torch.rand(3, 1, 2, 2), torch.arange(3)
    digest = Samples(x, y).digest()
    assert Samples(x.clone(), y.clone(), "other name").digest() == digest
    assert Samples(x, y.flip(0)).digest() != digest
    assert Samples(x.flip(0), y).digest() != digest
