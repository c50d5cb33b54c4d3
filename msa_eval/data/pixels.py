"""Pictures decoded, and brought to one size."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from msa_eval.untrusted import printable

if TYPE_CHECKING:
    from PIL import Image

FORMATS = ("PNG", "JPEG", "BMP", "GIF", "PPM", "TIFF", "WEBP")
"""Of images in folders; Pillow reads others too, some by starting other programs."""

GREY = ("1", "L", "I;16", "I;16B", "I;16L", "I;16N", "I", "F")
"""Pillow's modes of one channel."""


@dataclass(frozen=True)
class Preparation:
    """What is done to a picture after decoding, as torchvision's ``Resize`` and ``CenterCrop`` do it.

    Attributes:
        resize: the shorter side is brought to so many pixels, bilinearly and with antialiasing; ``None`` for no resize.
        crop: then so many from the middle are kept, in both directions; ``None`` for all.

    Raises:
        ValueError: when one of them is not positive, or the crop is larger than what a resize leaves.
    """

    resize: int | None = None
    crop: int | None = None

    def __post_init__(self) -> None:
        for name, value in (("resize", self.resize), ("crop", self.crop)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"expected {name} to be a number of pixels from 1, but got {value!r}")
        if self.resize is not None and self.crop is not None and self.crop > self.resize:
            raise ValueError(f"a crop of {self.crop} does not fit into images resized to {self.resize}; resize less")

    def __str__(self) -> str:
        parts = [] if self.resize is None else [f"shorter side resized to {self.resize} (bilinear)"]
        parts += [] if self.crop is None else [f"center crop of {self.crop}"]
        return ", ".join(parts)

    def __call__(self, image: Image.Image) -> Image.Image:
        """Prepare a picture.

        Raises:
            ValueError: when it is smaller than the crop.
        """
        from PIL import Image

        if self.resize is not None:
            width, height = image.size
            short = min(width, height)
            size = (int(self.resize * width / short), int(self.resize * height / short))
            image = image.resize(size, Image.Resampling.BILINEAR)
        if self.crop is not None:
            width, height = image.size
            if min(width, height) < self.crop:
                raise ValueError(f"it is {width}x{height}, smaller than the crop of {self.crop}")
            left, top = round((width - self.crop) / 2), round((height - self.crop) / 2)
            image = image.crop((left, top, left + self.crop, top + self.crop))
        return image


def read_picture(file: Path, prepare: Preparation, *, colour: bool) -> Tensor:
    """Eight bits a channel ``(C, H, W)`` of a file.

    Raises:
        ValueError: when it is not a readable picture.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file, formats=FORMATS) as opened:
                return pixels(opened, prepare, colour=colour)
    except Exception as error:  # of Pillow, whose readers raise whatever their parsers do
        reason = "it is no picture; take it out of the folder" if isinstance(error, UnidentifiedImageError) else error
        raise ValueError(f"{file} is not a readable image: {printable(reason)}") from error


def is_colour(file: Path) -> bool:
    """Whether a file's header says that it holds colours; one that can't be read does not say so."""
    from PIL import Image

    try:
        with Image.open(file, formats=FORMATS) as opened:
            return opened.mode not in GREY
    except Exception:  # it is reported when it is decoded
        return False


def pixels(image: Image.Image, prepare: Preparation, *, colour: bool) -> Tensor:
    """Eight bits a channel ``(C, H, W)``; 16-bit grey is scaled, where Pillow's own conversion would cut it off.

    Args:
        image: a picture.
        prepare: what is done to it.
        colour: make three channels, of a grey one too.

    Raises:
        ValueError: when its pixels have no known range.
    """
    from PIL import Image

    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.array(image, dtype=np.uint16) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels of mode {image.mode!r} have no known range; save it with 8 or 16 bits a channel")
    plain = prepare(image.convert("RGB" if colour or image.mode not in GREY else "L"))
    array = torch.from_numpy(np.array(plain))
    return array.unsqueeze(0) if array.ndim == 2 else array.permute(2, 0, 1)
