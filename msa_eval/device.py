"""Where to compute, and how tensors get there."""

from __future__ import annotations

import torch
from torch import Tensor

ASYNCHRONOUS = ("cuda",)
"""Devices that compute while the host goes on, and that reading a value would stop."""


def asynchronous(values: Tensor) -> bool:
    """Whether reading values would make the host wait for what it has just asked for."""
    return values.device.type in ASYNCHRONOUS


def check_device(device: str) -> str:
    """Check that tensors can be made on a device, and return its name.

    Raises:
        ValueError: when there is no such device here.

    >>> check_device("cpu")
    'cpu'
    """
    name = str(device)
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device {name!r} was asked for, but CUDA is not available here; use device=cpu")
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0].split(". ")[0]
        raise ValueError(f"device {name!r} can't be used here: {reason}") from error
    return name


def onto(values: Tensor, device: torch.device | str) -> Tensor:
    """The same values on a device; a GPU fetches them from pinned memory, while the host goes on."""
    device = torch.device(device)
    if device.type != "cuda" or values.device.type != "cpu":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)
