"""Samples: images with their labels."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from msa_eval.data.arrays import as_images, as_labels
from msa_eval.data.levels import onto_levels
from msa_eval.progress import Progress, silent

Split = Literal["train", "test"]

PART = 256
"""So many images are hashed at a time, so that a folder of them is never held whole."""


class Images(Protocol):
    """Images that are decoded when they are asked for: uint8 ``(B, C, H, W)``, or float32 in [0, 1]."""

    def __getitem__(self, index: Tensor) -> Tensor:
        """Those of some indices ``(B,)``."""
        ...


class Samples:
    """Images and labels.

    Args:
        x: images ``(N, C, H, W)``, ``(N, H, W, C)`` or ``(N, H, W)``: uint8, or float in [0, 1]; also what decodes
            them when they are asked for.
        y: labels from 0: whole numbers ``(N,)`` or ``(N, 1)``, or one-hot ``(N, k)``.
        name: where they come from.
        classes: the name of each label, where they have names.
        prepared: what was done to the images after decoding, such as a resize.
        notes: what their user should know, a sentence each.

    Attributes:
        x: all images ``(N, C, H, W)``, either uint8 or float32 in [0, 1].
        y: labels ``(N,)``, int64, from 0.
        levels: images are given rounded to so many levels (see `leveled`); ``None``: as they are.

    Raises:
        ValueError: when they are anything else, or don't fit together.
    """

    def __init__(
        self,
        x: Any,
        y: Any,
        name: str = "memory",
        *,
        classes: Sequence[str] = (),
        prepared: str = "",
        notes: Sequence[str] = (),
    ) -> None:
        self.name, self.classes, self.prepared, self.notes = name, tuple(classes), prepared, tuple(notes)
        self.levels: int | None = None
        self.y = as_labels(y, name)
        self._images: Images = x if isinstance(x, Decoded | Decoder) else as_images(x, name)
        count = len(x) if isinstance(x, Decoded | Decoder) else len(self.x)
        if self.y.shape != (count,):
            raise ValueError(
                f"{name}: expected one label per image, but got {count} images and labels of "
                f"shape {tuple(self.y.shape)}"
            )

    @classmethod
    def of(cls, x: Any, y: Any = None) -> Samples:
        """Samples as they are, or made of whatever holds images and labels (see `msa_eval.data.collections`).

        Raises:
            ValueError: when the labels are missing, or images and labels are not what `Samples` takes.
        """
        from msa_eval.data.collections import gathered  # which makes samples itself

        return gathered(x, y)

    def __len__(self) -> int:
        return len(self.y)

    def __repr__(self) -> str:
        return f"Samples({self.name}, {len(self)} images)"

    @property
    def x(self) -> Tensor:
        """All images, decoded."""
        return self._images if isinstance(self._images, Tensor) else self._images[torch.arange(len(self))]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of an image: ``(C, H, W)``."""
        return tuple(self._images[torch.tensor([0])].shape[1:])

    def images(self, index: Tensor) -> Tensor:
        """Float images ``(B, C, H, W)`` in [0, 1] of the given indices ``(B,)``."""
        x = self._images[index]
        x = x.float() / 255 if x.dtype == torch.uint8 else x
        return x if self.levels is None else onto_levels(x, self.levels)

    def leveled(self, levels: int | None, index: Tensor) -> Samples:
        """The same samples with their images rounded to a grid of so many levels, as a file holds them.

        Where those of some indices lie on it already, nothing is rounded. The digest stays that of the images given.
        """
        if levels is None or all(self._on_levels(part, levels) for part in index.split(PART)):
            return self
        done = f"rounded to {levels} levels"
        made = self._with(self._images, self.y, self.name)
        made.levels, made.prepared = levels, f"{self.prepared}, {done}" if self.prepared else done
        return made

    def _on_levels(self, index: Tensor, levels: int) -> bool:
        x = self.images(index)
        return bool((onto_levels(x, levels) == x).all())

    def only(self, index: Tensor, name: str | None = None) -> Samples:
        """The samples of some indices ``(B,)``, numbered anew."""
        return self._with(self._images[index], self.y[index], name or self.name)

    def decoded(self, index: Tensor, *, progress: Progress = silent) -> Samples:
        """The same samples, those of some indices decoded and held; the others can't be asked for any more."""
        if not isinstance(self._images, Decoder):
            return self
        places = torch.full((len(self),), -1).index_put((index,), torch.arange(len(index)))
        return self._with(Decoded(self._images.read(index, progress), places), self.y, self.name)

    def digest(self) -> str:
        """SHA-256 of images and labels; where only some images are decoded and held, of these and all labels."""
        x = self._images.x if isinstance(self._images, Decoded) else self._images
        count = len(x) if isinstance(x, Tensor | Decoder) else len(self)
        digest = hashlib.sha256()
        for part in torch.arange(count).split(PART):
            images = x[part]
            if not int(part[0]):
                digest.update(f"{(count, *images.shape[1:])} {images.dtype}".encode())
            digest.update(images.contiguous().numpy().tobytes())
        digest.update(self.y.contiguous().numpy().tobytes())
        return digest.hexdigest()

    def parts(self) -> tuple[Tensor, ...]:
        """The tensors that it is made of, for `of_parts`."""
        if isinstance(self._images, Decoded):
            return self.y, self._images.x, self._images.places
        return self.y, self.x

    @classmethod
    def of_parts(cls, parts: Sequence[Tensor], name: str, levels: int | None = None) -> Samples:
        """Samples of `parts`, which are taken as they are: they were checked before."""
        made = cls.__new__(cls)
        made.name, made.y, made.classes, made.prepared, made.notes = name, parts[0], (), "", ()
        made.levels = levels
        made._images = parts[1] if len(parts) == 2 else Decoded(parts[1], parts[2])
        return made

    def about(self) -> Mapping[str, Any]:
        """What a result says of them beside their digest, where there is anything."""
        said = {"classes": list(self.classes), "prepared": self.prepared}
        return {key: value for key, value in said.items() if value}

    def _with(self, x: Any, y: Tensor, name: str) -> Samples:
        made = Samples(x, y, name, classes=self.classes, prepared=self.prepared, notes=self.notes)
        made.levels = self.levels
        return made


class Decoder:
    """Images that are decoded each time they are asked for.

    Args:
        count: how many there are.
        read: one of them by its number: ``(C, H, W)``.
        named: what to call it in errors.
    """

    def __init__(self, count: int, read: Callable[[int], Tensor], named: Callable[[int], str]) -> None:
        self._count, self._read, self._named = count, read, named

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: Tensor) -> Tensor:
        return self.read(index)

    def read(self, index: Tensor, progress: Progress = silent) -> Tensor:
        """Decode those of some indices ``(B,)``, into memory that is asked for once.

        Raises:
            ValueError: when one can't be read, or is of another size than the first.
        """
        numbers = index.tolist()
        first = self._read(numbers[0])
        held = first.new_empty((len(numbers), *first.shape))
        for place, number in enumerate(progress(numbers, "decoding images")):
            image = self._read(number) if place else first
            if image.shape != first.shape:
                raise ValueError(
                    f"{self._named(number)} is {tuple(image.shape)} where {self._named(numbers[0])} is "
                    f"{tuple(first.shape)}; bring all images to one size, as with resize=N, crop=N"
                )
            held[place] = image
        return held


class Decoded:
    """Some images of a data set, held under their indices in it.

    Args:
        x: these images ``(B, C, H, W)``.
        places: of every image of the data set, its row in ``x``, or -1 ``(N,)``.
    """

    def __init__(self, x: Tensor, places: Tensor) -> None:
        self.x, self.places = x, places

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: Tensor) -> Tensor:
        rows = self.places[index]
        if bool((rows < 0).any()):
            raise LookupError(f"image {int(index[rows < 0][0])} was not decoded")
        return self.x[rows]
