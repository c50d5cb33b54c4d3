"""Files of arrays under the names that people give them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from msa_eval import load_samples
from msa_eval.data import Split

X = np.arange(2 * 8 * 8, dtype=np.uint8).reshape(2, 8, 8)
Y = np.array([1, 0], np.uint8)


@pytest.mark.parametrize(
    ("names", "split"),
    [
        (("x_test", "y_test"), "test"), (("x_train", "y_train"), "train"), (("test_images", "test_labels"), "test"),
        (("train_images", "train_labels"), "train"), (("images", "labels"), "test"), (("X", "y"), "test"),
        (("X", "Y"), "test"), (("images", "targets"), "test"), (("X_test", "Y_test"), "test"),
        (("arr_0", "arr_1"), "test"), (("x", "y"), "train"),
    ],
)  # fmt: skip
def test_common_names(names: tuple[str, str], split: Split, tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", **dict(zip(names, (X, Y[:, None]), strict=True)), val_images=X[:1], val_labels=Y[:1])
    torch.save({names[0]: torch.from_numpy(X), names[1]: torch.from_numpy(Y), "epoch": 3}, tmp_path / "a.pt")
    for file in ("a.npz", "a.pt"):
        found = load_samples(tmp_path / file, split=split)
        assert torch.equal(found.x, torch.from_numpy(X).unsqueeze(1))
        assert found.y.tolist() == [1, 0]
        assert found.notes == (() if names == ("x", "y") else (f"images are {names[0]}, labels {names[1]}",))


def test_a_file_of_the_other_split_alone(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x_train=X, y_train=Y)
    with pytest.raises(ValueError, match="holds x_train, y_train but no x and no y"):
        load_samples(tmp_path / "a.npz")


def test_a_pair_of_tensors_and_files_of_another_kind(tmp_path: Path) -> None:
    torch.save((torch.from_numpy(X), torch.from_numpy(Y)), tmp_path / "pair.pt")
    assert load_samples(tmp_path / "pair.pt").y.tolist() == [1, 0]
    torch.save(torch.from_numpy(X), tmp_path / "one.pt")
    with pytest.raises(ValueError, match="holds a Tensor; expected a dict with x and y, or a pair"):
        load_samples(tmp_path / "one.pt")
    torch.save(torch.nn.Linear(1, 1), tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r'torch.save\(\{"x": x, "y": y\}, "model.pt"\)'):
        load_samples(tmp_path / "model.pt")
    np.save(tmp_path / "x.npy", X)
    with pytest.raises(ValueError, match=r"holds one array; put images and labels into one file: np\.savez"):
        load_samples(tmp_path / "x.npy")
    with pytest.raises(ValueError, match="there is no file"):
        load_samples(tmp_path / "none.pt")


def test_a_size_that_a_header_only_claims_is_refused_under_any_name(tmp_path: Path) -> None:
    import io
    import zipfile

    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (1 << 40, 1, 1)})
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("images.npy", header.getvalue())
        archive.writestr("labels.npy", header.getvalue())
    with pytest.raises(ValueError, match="can't hold an array of shape"):
        load_samples(tmp_path / "a.npz")
