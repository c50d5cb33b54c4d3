"""Files of arrays: ``.npz``, and ``.pt`` as ``torch.load(weights_only=True)`` reads it."""

from __future__ import annotations

import math
import pickle
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from msa_eval.data.samples import Samples, Split
from msa_eval.untrusted import printable

DEFLATES = 1032
"""So many bytes can be packed into one, by zip's usual method."""

SPLITS: Mapping[str, Sequence[tuple[str, str]]] = {
    "train": (("x_train", "y_train"), ("train_images", "train_labels")),
    "test": (("x_test", "y_test"), ("test_images", "test_labels")),
}
PAIRS = (
    ("x", "y"), ("images", "labels"), ("images", "targets"), ("image", "label"), ("data", "labels"),
    ("data", "targets"), ("arr_0", "arr_1"),
)  # fmt: skip
"""Under which names, in small or large letters, files hold images and labels."""


def read_npz(path: Path, split: Split) -> Samples:
    """Samples of an ``.npz`` file.

    Raises:
        ValueError: when it is none, or holds no images and labels.
    """
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    try:
        with zipfile.ZipFile(path) as opened:
            held = [name.removesuffix(".npy") for name in opened.namelist()]
        names = names_in(held, split)
        if names is not None:
            _check_sizes(path, names)
            with np.load(path, allow_pickle=False) as archive, np.errstate(over="ignore"):
                x, y = (archive[name] for name in names)
    except Exception as error:  # of zipfile, zlib and numpy, whose readers raise whatever their parsers do
        raise ValueError(f"{path} is not a readable .npz file: {printable(error)}") from error
    if names is None:
        raise ValueError(_no_pair(held, path))
    return Samples(x, y, path.name, notes=_note_on_names(names))


def read_pt(path: Path, split: Split) -> Samples:
    """Samples of a file of tensors: a dict that holds images and labels, or a pair of them.

    Raises:
        ValueError: when it is none.
    """
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    try:
        held = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, LookupError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{path} is not a file of plain tensors that torch.load(weights_only=True) reads; save it with "
            f'torch.save({{"x": x, "y": y}}, "{path.name}")'
        ) from error
    if isinstance(held, list | tuple) and len(held) == 2:
        return Samples(held[0], held[1], path.name)
    if not isinstance(held, Mapping):
        raise ValueError(f"{path} holds a {type(held).__name__}; expected a dict with x and y, or a pair of them")
    names = names_in([str(name) for name in held], split)
    if names is None:
        raise ValueError(_no_pair([str(name) for name in held], path))
    return Samples(held[names[0]], held[names[1]], path.name, notes=_note_on_names(names))


def names_in(held: Sequence[str], split: Split) -> tuple[str, str] | None:
    """Under which of the common names a file holds images and labels of a split; ``None`` for none.

    >>> names_in(["x_train", "y_train", "x_test", "y_test"], "test")
    ('x_test', 'y_test')
    """
    folded = {name.lower(): name for name in reversed(held)}
    for names in (*SPLITS[split], *PAIRS):
        if all(name.lower() in folded for name in names):
            images, labels = (name if name in held else folded[name.lower()] for name in names)
            return images, labels
    return None


def _no_pair(held: Sequence[str], path: Path) -> str:
    for names in ("x", "y"), ("images", "labels"):
        if names[0] in held:
            return f"{path} holds {printable(', '.join(held))} but no {names[1]}"
    return (
        f"{path} holds {printable(', '.join(held) or 'nothing')} but no x and no y (nor images and labels, x_test and "
        f"y_test, test_images and test_labels)"
    )


def _note_on_names(names: tuple[str, str]) -> list[str]:
    return [] if names == ("x", "y") else [f"images are {names[0]}, labels {names[1]}"]


def _check_sizes(path: Path, names: Sequence[str]) -> None:
    """Hold the sizes that a file's headers state to the file's own, before anything is allocated.

    Raises:
        ValueError: when an array, or what it is packed into, can't be as large as it says.
        Exception: when it is no such file.
    """
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            if info.filename not in [f"{name}.npy" for name in names]:
                continue
            packed = {zipfile.ZIP_STORED: 1, zipfile.ZIP_DEFLATED: DEFLATES}.get(info.compress_type)
            if packed is None:
                raise ValueError(f"{info.filename} is packed in a way that numpy does not; save it with numpy.savez")
            if info.file_size > packed * min(info.compress_size, path.stat().st_size):
                raise ValueError(f"{info.filename} can't hold the {info.file_size} bytes that it says")
            with archive.open(info) as member:
                version = np.lib.format.read_magic(member)
                read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                shape, _, dtype = read(member)
            if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize > info.file_size:
                raise ValueError(f"{info.filename} can't hold an array of shape {shape} and type {dtype}")
