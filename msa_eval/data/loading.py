"""Samples by the name of a data set, a file or a folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from msa_eval.data.archives import read_npz, read_pt
from msa_eval.data.folders import read_folder
from msa_eval.data.pixels import Preparation
from msa_eval.data.samples import Samples, Split
from msa_eval.installation.imports import import_torchvision

DIGITS_TEST = 600
"""Size of the test split of scikit-learn's 1,797 digits; the split is stratified and fixed."""

EXPECTED = "digits, cifar10, cifar100, an .npz or .pt file with x and y, or a folder of class folders"


def load_samples(
    source: str | Path,
    *,
    split: Split = "test",
    root: str | Path = "data",
    classes: str | Path | None = None,
    resize: int | None = None,
    crop: int | None = None,
) -> Samples:
    """Read images and labels.

    Args:
        source: ``digits`` (scikit-learn's), ``cifar10`` or ``cifar100`` (by torchvision); an ``.npz`` file, or a
            ``.pt`` file of plain tensors, with ``x`` and ``y`` or other common names (`archives.PAIRS`); or a folder
            with one subfolder of images per class, of which only what is evaluated is decoded.
        split: which part of a named data set, or of a file that holds both; other files and folders are taken whole.
        root: the folder in which torchvision looks for its data sets.
        classes: of a folder, a file that names the model's classes in its own order, one per line.
        resize: of a folder, the shorter side of every image is brought to so many pixels.
        crop: of a folder, so many pixels from the middle are kept, after the resize.

    Raises:
        ValueError: when the source can't be read or holds no valid images.

    >>> len(load_samples("digits")), tuple(load_samples("digits").x.shape[1:])
    (600, (1, 8, 8))
    """
    prepare = Preparation(resize, crop)
    path = Path(source)
    named = str(source) in ("digits", "cifar10", "cifar100")
    if not named and path.is_dir():
        return read_folder(path, prepare, None if classes is None else Path(classes))
    if classes is not None or str(prepare):
        raise ValueError(f"classes, resize and crop are for a folder of images; {source} is none")
    if str(source) == "digits":
        return _digits(split)
    if named:
        return _torchvision(str(source), split, root)
    if path.suffix == ".npz":
        return read_npz(path, split)
    if path.suffix in (".pt", ".pth"):
        return read_pt(path, split)
    if path.suffix == ".npy":
        raise ValueError(f"{path} holds one array; put images and labels into one file: np.savez('test.npz', x=x, y=y)")
    raise ValueError(f"there is no data {str(source)!r}; expected {EXPECTED}")


def _digits(split: Split) -> Samples:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    train, test = train_test_split(np.arange(len(labels)), test_size=DIGITS_TEST, random_state=0, stratify=labels)
    chosen = np.sort(train if split == "train" else test)
    x = torch.from_numpy(images[chosen]).float().reshape(-1, 1, 8, 8) / 16
    return Samples(x, torch.from_numpy(labels[chosen]), f"digits ({split})")


def _torchvision(source: str, split: Split, root: str | Path) -> Samples:
    try:
        import_torchvision()
        from torchvision import datasets  # type: ignore[import-not-found, unused-ignore]
    except ValueError as error:
        raise ValueError(
            f"{source} is read by torchvision; install it, or give an .npz file with x and y ({error})"
        ) from error
    kind = datasets.CIFAR10 if source == "cifar10" else datasets.CIFAR100
    try:
        found = kind(root, train=split == "train", download=False)
    except RuntimeError as error:
        raise ValueError(f"{source} is not in {root}: {error}") from error
    return Samples(found.data, found.targets, f"{source} ({split})")
