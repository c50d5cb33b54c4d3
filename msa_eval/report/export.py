"""Every sample's best point as files that other tools read: NumPy's, or pictures."""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from msa_eval.data.levels import level_of
from msa_eval.evidence.folder import EXPORT
from msa_eval.evidence.points import ADVERSARIAL, Adversarial
from msa_eval.evidence.results import Results

FORMATS = ("npz", "png")
MANIFEST, ARRAYS, IMAGES, BATCHES = "manifest.csv", "adversarial.npz", "images", "batches"
BYTE = 256
CHANNELS = {1: "L", 3: "RGB"}
"""Of pictures, with Pillow's names."""

ROUNDED = (
    "rounding to 8 bits may undo breaks: the manifest describes the points before rounding; evaluate with "
    'overrides={"threat.levels": 256} for points that a file of 8 bits holds'
)


def export(
    folder: str | Path,
    *,
    format: str = "npz",
    target: str = "defense",
    context: str = "joint",
    out: str | Path | None = None,
) -> tuple[Path, list[str]]:
    """Write every sample's best point, broken or not, and a manifest.

    As ``npz``: ``adversarial.npz`` with ``x`` and ``y``, the manifest's numbers, and in ``joint`` each adversarial
    batch as ``batch_GROUP``. As ``png``: ``images/LABEL/INDEX.png`` and ``batches/GROUP/POSITION.png``. Points that lie
    on 256 levels are written as 8 bits, exactly; others as float32, or rounded in pictures.

    Args:
        folder: of the results.
        format: ``npz`` or ``png``.
        target: ``defense`` or ``fc``.
        context: what the attacker controls.
        out: a folder that gets one of the target and context; ``export`` in the results by default.

    Returns:
        the folder of the target and context, and what its user should know.

    Raises:
        ValueError: when the points were not kept, or can't be written as such.
        OSError: when a file can't be written.
    """
    if format not in FORMATS:
        raise ValueError(f"expected the format {' or '.join(FORMATS)}, but got {format!r}")
    results = Results.load(folder)
    points = results.adversarial(target, context)
    if format == "png" and points.x.shape[1] not in CHANNELS:
        raise ValueError(f"pictures have one or three channels, but these images {points.x.shape[1]}; use format=npz")
    place = (Path(folder) / EXPORT if out is None else Path(out)) / f"{target}-{context}"
    _clear(place)
    manifest = points.manifest
    if format == "png":
        files = [f"{IMAGES}/{y}/{i:06d}.png" for y, i in zip(manifest["label"], manifest["index"], strict=True)]
        manifest = manifest.assign(file=files)
        for name, image in [*zip(files, points.x, strict=True), *_pictures_of_batches(points)]:
            _write_picture(place / name, image)
    else:
        _write_arrays(place / ARRAYS, points)
    manifest.to_csv(place / MANIFEST, index=False, lineterminator="\n")
    notes = [ROUNDED] if format == "png" and points.levels != BYTE else []
    if left_out := len(set(results.batches["index"]) - set(manifest["index"])):
        notes.append(f"{left_out} samples are missing: their points were left out for the size of the file")
    if (manifest["companions"] == ADVERSARIAL).any():
        notes.append("a point lives in its adversarial batch (column group): beside other images it may be answered "
                     "otherwise")  # fmt: skip
    return place, notes


def _clear(place: Path) -> None:
    """Make a folder for what is written, and take away what was written there before, if that is all it holds.

    Raises:
        ValueError: when it holds something else.
    """
    if place.exists() and not place.is_dir():
        raise ValueError(f"{place} is a file; choose another folder")
    ours = {MANIFEST, ARRAYS, IMAGES, BATCHES}
    held = {path.name for path in place.iterdir()} if place.is_dir() else set()
    if held - ours or (held and MANIFEST not in held):
        raise ValueError(f"{place} holds {min(held - ours or held)}, which is not an export; choose another folder")
    for name in held:
        shutil.rmtree(place / name) if (place / name).is_dir() else (place / name).unlink()
    place.mkdir(parents=True, exist_ok=True)


def _eight_bits(images: Tensor) -> npt.NDArray[np.uint8]:
    return level_of(images.clamp(0, 1), BYTE).to(torch.uint8).numpy()


def _write_arrays(path: Path, points: Adversarial) -> None:
    """Write the arrays one after another, so that no two adversarial batches are held at once."""

    def stored(images: Tensor) -> npt.NDArray[Any]:
        return _eight_bits(images) if points.levels == BYTE else images.numpy()

    def arrays() -> Iterator[tuple[str, npt.NDArray[Any]]]:
        yield "x", stored(points.x)
        yield "y", points.y.numpy()
        for name in ("index", "prediction", "broken", "margin", "batch", "position", "group"):
            yield name, points.manifest[name].to_numpy()
        for group in points.groups:
            yield f"batch_{group}", stored(points.companions(group))

    with zipfile.ZipFile(path, "w", allowZip64=True) as held:
        for name, array in arrays():
            with held.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as opened:
                np.lib.format.write_array(opened, np.ascontiguousarray(array), allow_pickle=False)


def _pictures_of_batches(points: Adversarial) -> Iterator[tuple[str, Tensor]]:
    for group in points.groups:
        for position, image in enumerate(points.companions(group)):
            yield f"{BATCHES}/{group}/{position:03d}.png", image


def _write_picture(path: Path, image: Tensor) -> None:
    from PIL import Image

    pixels = _eight_bits(image)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0)).save(path)
