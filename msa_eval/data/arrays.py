"""Images and labels as arrays of any kind, brought to the two tensors that everything else takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

CHANNELS = (1, 3)
"""Numbers of channels that are told from heights and widths whatever these are."""

ROUNDING = 1e-5
"""So far outside [0, 1] a float image may be, from arithmetic in float32; it is clipped."""


def as_images(given: Any, name: str) -> Tensor:
    """Images ``(N, C, H, W)``, uint8 or float32 in [0, 1].

    Args:
        given: a tensor, an array, or a sequence of these, of shape ``(N, C, H, W)``, ``(N, H, W, C)`` or
            ``(N, H, W)``; whole numbers up to 255 are eight bits a channel, as in uint8.
        name: where they come from, for errors.

    Raises:
        ValueError: when they are anything else.

    >>> as_images(np.zeros((2, 8, 8, 3), np.uint8), "x").shape
    torch.Size([2, 3, 8, 8])
    """
    images = _channels_first(_tensor(given, name, "images", "np.stack(list(x))"), name)
    if not images.numel():
        raise ValueError(f"{name}: there are no images")
    if images.dtype == torch.uint8:
        return images
    if images.dtype == torch.bool:
        return images.float()
    if not images.is_floating_point():
        return _eight_bits(images, name)
    images = images.float()
    low, high = float(images.min()), float(images.max())
    if not bool((finite := torch.isfinite(images)).all()):
        bad = (~finite.flatten(1).all(dim=1)).nonzero().flatten().tolist()
        raise ValueError(
            f"{name}: {len(bad)} of the images hold NaN or infinite values, the first is image {bad[0]}; leave them out"
        )
    if low < -ROUNDING or high > 1 + ROUNDING:
        scale = "divide them by 255" if low >= 0 and 1 < high <= 255 else "put any normalisation inside the model"
        raise ValueError(
            f"{name}: expected images in [0, 1] (or uint8), but they range from {low:.4g} to {high:.4g}; {scale}"
        )
    return images.clamp(0, 1) if low < 0 or high > 1 else images


def as_labels(given: Any, name: str) -> Tensor:
    """Labels ``(N,)``, int64, from 0.

    Args:
        given: a tensor, an array or a sequence of whole numbers, ``(N,)`` or ``(N, 1)``, or one-hot ``(N, k)``.
        name: where they come from, for errors.

    Raises:
        ValueError: when they are anything else.

    >>> as_labels([[0, 0, 1], [1, 0, 0]], "y")
    tensor([2, 0])
    """
    labels = _tensor(given, name, "labels", "y.astype(int)")
    if labels.ndim == 2 and labels.shape[1] > 1:
        labels = _from_one_hot(labels, name)
    elif labels.ndim == 2:
        labels = labels[:, 0]
    if labels.is_floating_point() or labels.dtype == torch.bool:
        kind = str(labels.dtype).removeprefix("torch.")
        raise ValueError(f"{name}: expected integer labels, but got {kind}; convert them to int64")
    labels = labels.long()
    if labels.numel() and int(labels.min()) < 0:
        raise ValueError(
            f"{name}: labels must not be negative, but the lowest is {int(labels.min())}; leave out what has no label"
        )
    return labels


def _tensor(given: Any, name: str, what: str, remedy: str) -> Tensor:
    """A tensor on the CPU of numbers that are real, out of whatever holds them."""
    if isinstance(given, Sequence) and not isinstance(given, str) and len(given) and isinstance(given[0], Tensor):
        given = _stacked(given, name, what)
    if not isinstance(given, Tensor):
        given = _from_numpy(given, name, what, remedy)
    given = given.detach().cpu()
    if given.layout != torch.strided:
        given = given.to_dense()
    if given.is_complex():
        raise ValueError(f"{name}: the {what} are complex numbers; give real ones")
    if given.dtype in (torch.uint16, torch.uint32, torch.uint64):  # which torch hardly computes with
        given = given.long()
    result: Tensor = given
    return result


def _from_numpy(given: Any, name: str, what: str, remedy: str) -> Tensor:
    try:
        array: npt.NDArray[Any] = np.asarray(given)
    except ValueError as error:
        raise ValueError(f"{name}: the {what} are not all of one shape; bring them to one size first") from error
    if array.dtype.kind in "OUSVMm":
        first = type(array.flat[0]).__name__ if array.size else "nothing"
        kind = {"O": f"objects ({first})", "U": "texts", "S": "texts"}.get(array.dtype.kind, str(array.dtype))
        if array.dtype.kind in "US" or first == "str":
            remedy = "number the classes from 0 in the model's order"
        raise ValueError(f"{name}: the {what} are {kind}, not numbers; {remedy}")
    if array.dtype.kind == "f" and array.dtype.itemsize > 8:
        array = array.astype(np.float64)
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    # torch takes no negative strides, not even of an axis of length 1, and warns of memory that must not be written to.
    return torch.from_numpy(array if array.flags.writeable and min(array.strides, default=0) >= 0 else array.copy())


def _stacked(parts: Sequence[Any], name: str, what: str) -> Tensor:
    shapes = {tuple(part.shape) for part in parts}
    if len(shapes) > 1:
        shown = " and ".join(map(str, sorted(shapes)[:2]))
        raise ValueError(f"{name}: the {what} are not all of one shape ({shown}); bring them to one size first")
    return torch.stack(tuple(parts))


def _channels_first(images: Tensor, name: str) -> Tensor:
    """Bring ``(N, H, W)`` and ``(N, H, W, C)`` to ``(N, C, H, W)``."""
    if images.ndim == 3:
        return images.unsqueeze(1)
    if images.ndim != 4:
        raise ValueError(
            f"{name}: expected images of shape (N, C, H, W), (N, H, W, C) or (N, H, W), but got {tuple(images.shape)}"
        )
    return images.permute(0, 3, 1, 2).contiguous() if _channels_last(*images.shape[1:]) else images


def _channels_last(first: int, second: int, last: int) -> bool:
    """Whether the last of three sides counts channels: the one that is 1 or 3, or unlike two equal ones, or the least.

    >>> _channels_last(32, 32, 3), _channels_last(4, 8, 8), _channels_last(8, 8, 4), _channels_last(3, 8, 3)
    (True, False, True, False)
    """
    if first in CHANNELS or last in CHANNELS:
        return first not in CHANNELS
    if (first == second) != (second == last):
        return first == second
    return last < first


def _eight_bits(images: Tensor, name: str) -> Tensor:
    low, high = int(images.min()), int(images.max())
    if low < 0 or high > 255:
        raise ValueError(
            f"{name}: expected images as uint8, or float in [0, 1], but got whole numbers from {low} to {high}; divide "
            f"them by the highest that there can be"
        )
    return images.float() if high <= 1 else images.to(torch.uint8)


def _from_one_hot(labels: Tensor, name: str) -> Tensor:
    ones = (labels == 1).sum(dim=1)
    if not bool(((labels == 0) | (labels == 1)).all()) or not bool((ones == 1).all()):
        raise ValueError(
            f"{name}: labels of shape {tuple(labels.shape)} are not one-hot; give one whole number per image, as "
            f"y.argmax(1) of soft labels"
        )
    return labels.int().argmax(dim=1)
