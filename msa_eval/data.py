"""Images and labels, from the places people keep them."""

from __future__ import annotations

import hashlib
import math
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from msa_eval.strangers import check_inside, told
from msa_eval.upstream import import_torchvision

if TYPE_CHECKING:
    from PIL import Image

Split = Literal["train", "test"]

DIGITS_TEST = 600
"""Size of the test split of scikit-learn's 1,797 digits; the split is stratified and fixed."""

FORMATS = ("PNG", "JPEG", "BMP", "GIF", "PPM", "TIFF", "WEBP")
"""Of images in folders; Pillow reads others too, some by starting other programs."""

DEFLATES = 1032
"""So many bytes can be packed into one, by zip's usual method."""


@dataclass(frozen=True)
class Samples:
    """Images and labels.

    Attributes:
        x: ``(N, C, H, W)``, either uint8 or float32 in [0, 1].
        y: labels ``(N,)``, int64, from 0.
        name: where they come from.
    """

    x: Tensor
    y: Tensor
    name: str = "memory"

    def __post_init__(self) -> None:
        if self.y.is_floating_point() or self.y.is_complex() or self.y.dtype == torch.bool:
            raise ValueError(f"{self.name}: expected integer labels, but got {self.y.dtype}")
        object.__setattr__(self, "x", self.x.detach().cpu())
        object.__setattr__(self, "y", self.y.detach().cpu().long())
        if self.x.ndim != 4 or self.x.shape[1] not in (1, 3):
            raise ValueError(
                f"{self.name}: expected images of shape (N, C, H, W) with 1 or 3 channels, "
                f"but got {tuple(self.x.shape)}"
            )
        if self.y.shape != self.x.shape[:1]:
            raise ValueError(
                f"{self.name}: expected one label an image, but got {len(self.x)} images "
                f"and labels of shape {tuple(self.y.shape)}"
            )
        if not self.x.numel():
            raise ValueError(f"{self.name}: there are no images")
        if int(self.y.min()) < 0:
            raise ValueError(f"{self.name}: labels must not be negative, but the lowest is {int(self.y.min())}")
        if self.x.dtype == torch.uint8:
            return
        object.__setattr__(self, "x", self.x.float())
        if not bool(torch.isfinite(self.x).all()):
            raise ValueError(f"{self.name}: the images hold NaN or infinite values")
        low, high = float(self.x.min()), float(self.x.max())
        if low < 0 or high > 1:
            raise ValueError(
                f"{self.name}: expected images in [0, 1] (or uint8), but they range from {low:.4g} to {high:.4g}; "
                f"put any normalisation inside the model"
            )

    @classmethod
    def of(cls, x: Any, y: Any = None) -> Samples:
        """Samples as they are, or made of images and labels as tensors or arrays.

        Raises:
            ValueError: when the labels are missing, or images and labels are not what `Samples` takes.
        """
        if isinstance(x, cls):
            return x
        if y is None:
            raise ValueError("expected labels y beside the images, or Samples that hold both")
        images, labels = (v if isinstance(v, Tensor) else torch.tensor(np.asarray(v)) for v in (x, y))
        return cls(images, labels)

    def __len__(self) -> int:
        return len(self.y)

    def images(self, index: Tensor) -> Tensor:
        """Float images ``(B, C, H, W)`` in [0, 1] of the given indices ``(B,)``."""
        x = self.x[index]
        return x.float() / 255 if x.dtype == torch.uint8 else x

    def digest(self) -> str:
        """SHA-256 of images and labels."""
        digest = hashlib.sha256(f"{tuple(self.x.shape)} {self.x.dtype}".encode())
        digest.update(self.x.cpu().contiguous().numpy().tobytes())
        digest.update(self.y.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()


def load_samples(source: str, *, split: Split = "test", root: str | Path = "data") -> Samples:
    """Read images and labels.

    Args:
        source: ``digits`` (scikit-learn's), ``cifar10`` or ``cifar100`` (by torchvision), an ``.npz`` file with ``x``
            and ``y``, or a folder with one subfolder of images a class.
        split: which part of a named data set; files and folders are taken whole.
        root: the folder in which torchvision looks for its data sets.

    Raises:
        ValueError: when the source can't be read or holds no valid images.

    >>> len(load_samples("digits")), tuple(load_samples("digits").x.shape[1:])
    (600, (1, 8, 8))
    """
    if source == "digits":
        return _digits(split)
    if source in ("cifar10", "cifar100"):
        return _torchvision(source, split, root)
    path = Path(source)
    if path.is_dir():
        return _folder(path)
    if path.suffix == ".npz":
        return _npz(path)
    raise ValueError(
        f"there is no data {source!r}; expected digits, cifar10, cifar100, an .npz file or a folder of class folders"
    )


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
    x = torch.from_numpy(found.data).permute(0, 3, 1, 2).contiguous()
    return Samples(x, torch.tensor(found.targets), f"{source} ({split})")


def _npz(path: Path) -> Samples:
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    try:
        _check_sizes(path)
        with np.load(path, allow_pickle=False) as archive:
            held = archive.files
            arrays = [archive[name] for name in ("x", "y") if name in held]
    except Exception as error:  # of zipfile, zlib and numpy, whose readers raise whatever their parsers do
        raise ValueError(f"{path} is not a readable .npz file: {told(error)}") from error
    if len(arrays) < 2:
        absent = " and no ".join(name for name in ("x", "y") if name not in held)
        raise ValueError(f"{path} holds {told(', '.join(held) or 'nothing')} but no {absent}")
    x, y = arrays
    if not np.issubdtype(y.dtype, np.integer):
        raise ValueError(f"{path}: expected integer labels, but got {y.dtype}")
    if x.dtype != np.uint8 and not np.issubdtype(x.dtype, np.floating):
        raise ValueError(f"{path}: expected images as uint8 or float, but got {x.dtype}")
    if x.dtype != np.uint8:
        with np.errstate(over="ignore"):  # what is too large becomes infinite, which is refused below
            x = x.astype(np.float32)
    return Samples(_channels_first(torch.from_numpy(x)), torch.from_numpy(y.astype(np.int64)), path.name)


def _check_sizes(path: Path) -> None:
    """Hold the sizes that a file's headers state to the file's own, before anything is allocated.

    Raises:
        ValueError: when an array, or what it is packed into, can't be as large as it says.
        Exception: when it is no such file.
    """
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            if info.filename not in ("x.npy", "y.npy"):
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


def _channels_first(x: Tensor) -> Tensor:
    """Bring ``(N, H, W)`` and ``(N, H, W, C)`` to ``(N, C, H, W)``."""
    if x.ndim == 3:
        return x.unsqueeze(1)
    if x.ndim == 4 and x.shape[1] not in (1, 3) and x.shape[3] in (1, 3):
        return x.permute(0, 3, 1, 2).contiguous()
    return x


def _folder(path: Path) -> Samples:
    from PIL import Image

    classes = sorted(entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith((".", "__")))
    for folder in classes:
        check_inside(folder, path)
    if not classes:
        raise ValueError(f"{path} has no subfolders; expected one folder of images a class")
    images: list[Tensor] = []
    labels: list[int] = []
    for label, folder in enumerate(classes):
        for file in sorted(entry for entry in folder.iterdir() if not entry.name.startswith(".")):
            if not check_inside(file, path).is_file():
                raise ValueError(f"{file} is not a readable image: it is no file")
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("error", Image.DecompressionBombWarning)
                    with Image.open(file, formats=FORMATS) as opened:
                        pixels = _pixels(opened)
            except Exception as error:  # of Pillow, whose readers raise whatever their parsers do
                raise ValueError(f"{file} is not a readable image: {told(error)}") from error
            images.append(pixels)
            labels.append(label)
            if images[0].shape != images[-1].shape:
                raise ValueError(
                    f"{file} is {tuple(images[-1].shape)} where the first image is {tuple(images[0].shape)}; "
                    f"bring all images to one size and colour mode first"
                )
    if not images:
        raise ValueError(f"{path}: the class folders hold no images")
    return Samples(torch.stack(images), torch.tensor(labels), path.name)


def _pixels(image: Image.Image) -> Tensor:
    """Eight bits a channel ``(C, H, W)``; 16-bit grey is scaled, where Pillow's own conversion would cut it off."""
    if image.mode.startswith("I;16"):
        return torch.from_numpy((np.array(image, dtype=np.uint16) >> 8).astype(np.uint8)).unsqueeze(0)
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels of mode {image.mode!r} have no known range; save it with 8 or 16 bits a channel")
    if image.mode in ("1", "L"):
        return torch.from_numpy(np.array(image.convert("L"))).unsqueeze(0)
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
