"""Samples of what Python code holds them in: arrays, pairs, data sets and loaders."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, RandomSampler, WeightedRandomSampler

from msa_eval.data.arrays import as_images, as_labels
from msa_eval.data.loading import load_samples
from msa_eval.data.pixels import GREY, Preparation, pixels
from msa_eval.data.samples import Decoder, Samples

IMAGES = ("image", "img", "images", "pixel_values", "x", "X", "data", "inputs")
LABELS = ("label", "labels", "y", "fine_label", "target", "targets", "class")
"""Under which names entries hold their image and their label, the likeliest first."""

LOOKED_AT = 32
"""So many pictures of a data set are looked at for colours."""

EXPECTED = "images x and labels y, a pair (x, y), a DataLoader, a Dataset, or a split of Hugging Face's datasets"


class Entry(NamedTuple):
    """An image with its label, or a batch of these."""

    x: Any
    y: Any


def gathered(x: Any, y: Any = None) -> Samples:
    """Samples of what is given to `msa_eval.evaluate`.

    Args:
        x: images, with labels as ``y``; or, alone, `Samples`, the name of data for `load_samples`, or what is said in
            `EXPECTED`.
        y: labels.

    Raises:
        ValueError: when it is anything else, or its labels are missing.
    """
    held = isinstance(x, Samples | str | Path | DataLoader | Dataset) or _is_table(x)
    if y is not None and held:
        raise ValueError(f"{_kind(x)} holds its labels itself; leave y out")
    if y is not None:
        return Samples(x, y)
    found = next((read(x) for fits, read in _READERS if fits(x)), None)
    if found is None:
        raise ValueError(f"expected {EXPECTED}, but got {_kind(x)} without labels")
    return found


def _loader(loader: DataLoader[Any]) -> Samples:
    """What a loader gives in one round.

    Raises:
        ValueError: when its order is another in every round.
    """
    sampler = getattr(loader, "sampler", None)
    inner = loader.batch_sampler if isinstance(loader.batch_sampler, BatchSampler) else None
    if any(isinstance(one, RandomSampler | WeightedRandomSampler) for one in (sampler, getattr(inner, "sampler", 0))):
        raise ValueError(
            "the DataLoader shuffles, and results name images by their place; make it with shuffle=False, or give its "
            "dataset"
        )
    made = _joined(loader, _kind(loader.dataset))
    count = len(loader.dataset) if hasattr(loader.dataset, "__len__") else len(made)
    left = [f"the DataLoader leaves out {count - len(made)} of {count} samples"] if count > len(made) else []
    return Samples(made.x, made.y, made.name, classes=_classes(loader.dataset), notes=left)


def _dataset(dataset: Dataset[Any]) -> Samples:
    """A data set that is indexed; where its labels are known apart from its images, these are decoded when asked for.

    Raises:
        ValueError: when it holds no images and labels.
    """
    name, held = _kind(dataset), _labels_apart(dataset)
    count = len(dataset)  # type: ignore[arg-type]  # what has none is an IterableDataset
    if held is None:
        made = _joined((dataset[number] for number in range(count)), name)
        return Samples(made.x, made.y, name, classes=_classes(dataset))

    colour = _any_colour(count, lambda number: _entry(dataset[number], name).x)

    def read(number: int) -> Tensor:
        entry = _entry(dataset[number], name)
        if int(as_labels([entry.y], name)) != int(held[number]):
            raise ValueError(f"{name}: sample {number} has label {entry.y}, but targets say {int(held[number])}")
        return _image(entry.x, name, colour=colour)

    return Samples(Decoder(count, read, lambda number: f"image {number}"), held, name, classes=_classes(dataset))


def _labels_apart(dataset: Any) -> Tensor | None:
    """All labels of a data set that keeps them beside its images, as torchvision's do; ``None`` for others."""
    held = getattr(dataset, "targets", None)
    if held is None or getattr(dataset, "target_transform", None) is not None:
        return None
    try:
        labels = as_labels(held, "targets")
    except ValueError:
        return None
    return labels if len(labels) == len(dataset) else None


def _is_table(x: Any) -> bool:
    """Whether it is of Hugging Face's ``datasets``, or looks the same."""
    return hasattr(x, "column_names") and hasattr(x, "__getitem__")


def _table(table: Any) -> Samples:
    """A split of Hugging Face's ``datasets``: labels are read at once, images when they are asked for.

    Raises:
        ValueError: when it is several splits, or has no column of images or of labels.
    """
    if isinstance(table, Mapping) or isinstance(table.column_names, Mapping):
        raise ValueError(f"expected one split, but got {', '.join(map(str, table))}; give one, as ds['test']")
    if not hasattr(table, "__len__"):
        return _joined(table, _kind(table))
    features = getattr(table, "features", None) or {}
    x = _column(table.column_names, IMAGES, features, "Image", "images")
    y = _column(table.column_names, LABELS, features, "ClassLabel", "labels")
    name = "/".join(str(v) for v in (getattr(table, "dataset_name", None), getattr(table, "split", None)) if v)

    colour = _any_colour(len(table), lambda number: table[number][x])

    def read(number: int) -> Tensor:
        return _image(table[number][x], name, colour=colour)

    return Samples(
        Decoder(len(table), read, lambda number: f"image {number}"),
        list(table[y]),
        name or "memory",
        classes=getattr(features.get(y), "names", None) or (),
    )


def _column(columns: Sequence[str], names: Sequence[str], features: Mapping[str, Any], kind: str, what: str) -> str:
    typed = [column for column in columns if type(features.get(column)).__name__ == kind]
    for column in (*(name for name in names if name in typed), *typed, *(name for name in names if name in columns)):
        return str(column)
    raise ValueError(
        f"there is no column of {what} among {', '.join(columns)}; name it {names[0]}, as ds.rename_column does"
    )


def _joined(entries: Iterable[Any], name: str) -> Samples:
    """All entries, be they samples or batches of these."""
    x: list[Tensor] = []
    y: list[Tensor] = []
    for given in entries:
        image, label = _entry(given, name)
        if _is_batch(image, label):
            x.append(as_images(image, name))
            y.append(as_labels(label, name))
        else:
            x.append(_image(image, name).unsqueeze(0))
            y.append(as_labels([label] if np.ndim(label) == 0 else torch.as_tensor(label).unsqueeze(0), name))
    if not x:
        raise ValueError(f"{name}: there are no images")
    shapes = dict.fromkeys(tuple(part.shape[1:]) for part in x)
    if len(shapes) > 1 or len({part.dtype for part in x}) > 1:
        kinds = " and ".join(map(str, itertools.islice(shapes, 2))) if len(shapes) > 1 else "uint8 and float"
        raise ValueError(f"{name}: the images are not all of one shape and type ({kinds}); bring them to one first")
    return Samples(torch.cat(x), torch.cat(y), name)


def _entry(given: Any, name: str) -> Entry:
    """The image and the label of an entry, or of a batch."""
    if isinstance(given, Mapping):
        found = [next((key for key in names if key in given), None) for names in (IMAGES, LABELS)]
        if None not in found:
            return Entry(given[found[0]], given[found[1]])
        held = f"a dict of {', '.join(map(str, given))}"
    elif isinstance(given, list | tuple) and len(given) >= 2:
        return Entry(given[0], given[1])
    else:
        held = _kind(given)
    raise ValueError(f"{name}: expected pairs (image, label), but an entry is {held}")


def _is_batch(image: Any, label: Any) -> bool:
    return np.ndim(label) >= 1 and np.ndim(image) == 4


def _image(image: Any, name: str, *, colour: bool = False) -> Tensor:
    """One image ``(C, H, W)``, of a picture, a tensor or an array; of a picture in three channels, where wanted."""
    if _is_picture(image):
        return pixels(image, Preparation(), colour=colour)
    if isinstance(image, Tensor) and image.ndim == 2:
        image = image.unsqueeze(0)
    return as_images(image.unsqueeze(0) if isinstance(image, Tensor) else np.asarray(image)[None], name)[0]


def _is_picture(image: Any) -> bool:
    """Whether it is an image of Pillow's."""
    return hasattr(image, "getbands")


def _any_colour(count: int, image: Callable[[int], Any]) -> bool:
    """Whether some of the pictures, evenly spread, hold colours; then the grey ones among them get three channels."""
    places = range(0, count, max(1, count // LOOKED_AT))
    return any(_is_picture(one) and one.mode not in GREY for one in map(image, places))


def _classes(dataset: Any) -> Sequence[str]:
    named = getattr(dataset, "classes", None)
    return [str(one) for one in named] if isinstance(named, list | tuple) else ()


def _kind(x: Any) -> str:
    return type(x).__name__


def _is_pair(x: Any) -> bool:
    return isinstance(x, list | tuple) and len(x) == 2 and not isinstance(x[0], list | tuple | Mapping)


def _is_entries(x: Any) -> bool:
    listed = isinstance(x, list | tuple) and bool(x) and isinstance(x[0], tuple | Mapping)
    return listed or isinstance(x, IterableDataset) or hasattr(x, "__next__")


_READERS: Sequence[tuple[Callable[[Any], bool], Callable[[Any], Samples]]] = (
    (lambda x: isinstance(x, Samples), lambda x: x),
    (lambda x: isinstance(x, str | Path), load_samples),
    (lambda x: isinstance(x, DataLoader), _loader),
    (_is_table, _table),
    (_is_entries, lambda x: _joined(x, "memory" if isinstance(x, list | tuple) else _kind(x))),
    (lambda x: isinstance(x, Dataset), _dataset),
    (lambda x: isinstance(x, Mapping), lambda x: Samples(*_entry(x, _kind(x)))),
    (_is_pair, lambda x: Samples(*x)),
)
"""What recognises a holder of samples, and what reads it; the first that does."""
