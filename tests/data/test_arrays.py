"""Arrays of every kind people have, through the API and through files alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from msa_eval import Samples, load_samples

X = np.random.default_rng(0).random((4, 3, 6, 5)).astype(np.float32)
Y = np.array([2, 0, 1, 2])


def _from_api(x: Any, y: Any, folder: Path) -> Samples:
    del folder
    return Samples.of(x, y)


def _from_npz(x: Any, y: Any, folder: Path) -> Samples:
    np.savez(folder / "a.npz", x=x, y=y)
    return load_samples(folder / "a.npz")


def _from_pt(x: Any, y: Any, folder: Path) -> Samples:
    held = [torch.from_numpy(np.ascontiguousarray(part).astype(part.dtype.newbyteorder("="))) for part in (x, y)]
    torch.save({"x": held[0], "y": held[1]}, folder / "a.pt")
    return load_samples(folder / "a.pt")


WAYS = pytest.mark.parametrize("way", [_from_api, _from_npz, _from_pt])


@WAYS
@pytest.mark.parametrize(
    ("x", "y"),
    [
        (X, Y),
        (X.transpose(0, 2, 3, 1), Y),
        (X.astype(">f4"), Y.astype(">i2")),
        (X[::-1][::-1], Y[::-1].copy()[::-1]),
        (np.asfortranarray(X), Y.astype(np.uint8)),
        (X.astype(np.float64), Y[:, None]),
        (X, np.eye(3)[Y]),
        (X, np.eye(4, dtype=bool)[Y]),
        (X, Y.astype(np.uint64)),
    ],
)
def test_the_same_samples_in_other_arrays(way: Any, x: Any, y: Any, tmp_path: Path) -> None:
    found = way(x, y, tmp_path)
    assert torch.equal(found.x, torch.from_numpy(X))
    assert found.y.tolist() == Y.tolist()


@WAYS
@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((2, 6, 5), (1, 6, 5)),
        ((2, 6, 5, 1), (1, 6, 5)),
        ((2, 4, 6, 6), (4, 6, 6)),
        ((2, 6, 6, 4), (4, 6, 6)),
        ((2, 12, 6, 6), (12, 6, 6)),
        ((2, 6, 5, 2), (2, 6, 5)),
        ((2, 2, 6, 5), (2, 6, 5)),
        ((2, 3, 6, 3), (3, 6, 3)),
    ],
)
def test_layouts(way: Any, shape: tuple[int, ...], expected: tuple[int, ...], tmp_path: Path) -> None:
    assert way(np.zeros(shape, np.uint8), Y[:2], tmp_path).x.shape == (2, *expected)


def test_negative_strides_are_copied() -> None:
    assert torch.equal(Samples.of(X[::-1], Y[::-1]).x, torch.from_numpy(X).flip(0))
    assert Samples.of(X[::-1], Y[::-1]).y.tolist() == Y[::-1].tolist()
    grey = X[:, :1][:, ::-1]  # NumPy calls it contiguous all the same
    assert torch.equal(Samples.of(grey, Y).x, torch.from_numpy(X[:, :1]))


def test_values_a_rounding_outside_are_clipped_and_others_refused() -> None:
    found = Samples.of(X * 0 + np.float32(1 + 1e-6), Y).x
    assert bool((found == 1).all())
    assert Samples.of(X * 0 - np.float32(1e-6), Y).x.min() == 0
    for scale in (1 + 1e-4, -1e-4):
        with pytest.raises(ValueError, match=r"expected images in \[0, 1\].*normalisation|divide"):
            Samples.of(X * 0 + np.float32(scale), Y)


def test_whole_numbers_are_eight_bits_unless_they_can_not_be() -> None:
    whole = (X * 255).astype(np.int64)
    assert torch.equal(Samples.of(whole, Y).x, torch.from_numpy(whole).to(torch.uint8))
    assert Samples.of(X > 0.5, Y).x.max() == 1
    with pytest.raises(ValueError, match="whole numbers from 0 to 65278"):
        Samples.of((whole * 257).astype(np.uint16), Y)
    with pytest.raises(ValueError, match="whole numbers from -"):
        Samples.of(whole - 300, Y)


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (X.astype(complex), Y, "images are complex"),
        (np.array([*X, None], dtype=object)[:4], Y, r"images are objects \(ndarray\), not numbers; np.stack"),
        ([X[0], X[1][:, :4]], Y[:2], "not all of one shape"),
        ([torch.zeros(1, 2, 2), torch.zeros(1, 2, 3)], Y[:2], r"not all of one shape \(\(1, 2, 2\) and \(1, 2, 3\)\)"),
        (X.reshape(4, -1), Y, r"shape \(N, C, H, W\), \(N, H, W, C\) or \(N, H, W\), but got \(4, 90\)"),
        (X, Y.astype(object), r"labels are objects \(int\), not numbers; y.astype\(int\)"),
        (X, ["a", "b", "a", "c"], "labels are texts, not numbers; number the classes"),
        (X, np.array(["a", "b", "a", "c"], dtype=object), "number the classes"),
        (X, Y.astype(float), "expected integer labels, but got float64"),
        (X, Y > 1, "expected integer labels, but got bool"),
        (X, Y.astype(complex), "labels are complex"),
        (X, np.full((4, 2), 0.5), "not one-hot"),
        (X, np.ones((4, 2)), "not one-hot"),
        (X, Y[:3], "4 images and labels of shape"),
        (X, 3, "labels of shape"),
    ],
)
def test_what_is_neither_is_refused_in_a_line(x: Any, y: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        Samples.of(x, y)
    assert len(str(caught.value)) < 200
    assert "\n" not in str(caught.value)


def test_float_images_are_not_copied() -> None:
    x = X.copy()
    assert Samples.of(x, Y).x.data_ptr() == x.ctypes.data
    x.flags.writeable = False
    assert torch.equal(Samples.of(x, Y).x, torch.from_numpy(X))


def test_sparse_images_are_made_dense() -> None:
    plain = torch.tensor([[[[0.0, 0.5], [0.0, 1.0]]]])
    assert torch.equal(Samples(plain.to_sparse(), torch.tensor([0]), "sparse").x, plain)
