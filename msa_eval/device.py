"""Where to compute, and how tensors get there."""

from __future__ import annotations

import torch
from torch import Tensor

from msa_eval.progress import Notify

ASYNCHRONOUS = ("cuda",)
"""Devices that compute while the host goes on, and that reading a value would stop."""


def asynchronous(values: Tensor) -> bool:
    """Whether reading values would make the host wait for what it has just asked for."""
    return values.device.type in ASYNCHRONOUS


WITHOUT_FLOAT64 = ("mps",)
"""Devices that have no float64."""


def has_float64(device: torch.device) -> bool:
    """Whether a device can compute in float64."""
    return device.type not in WITHOUT_FLOAT64


def in_float64(values: Tensor) -> Tensor:
    """Values in float64: on their device, or on the CPU where their device has none.

    >>> in_float64(torch.ones(2)).dtype
    torch.float64
    """
    return (values if has_float64(values.device) else values.cpu()).double()


def automatic_device() -> str:
    """The accelerator of this machine, or its processor."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def check_device(device: str) -> str:
    """Check that tensors can be made on a device, and return its name; ``auto`` is CUDA, else MPS, else the CPU.

    Raises:
        ValueError: when there is no such device here.

    >>> check_device("cpu")
    'cpu'
    """
    name = automatic_device() if str(device) == "auto" else str(device)
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device {name!r} was asked for, but CUDA is not available here; use device=cpu")
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0].split(". ")[0]
        raise ValueError(f"device {name!r} can't be used here: {reason}") from error
    return name


def device_for(device: str, notify: Notify) -> str:
    """As `check_device`; an accelerator that ``auto`` found is said in one line."""
    name = check_device(device)
    if device == "auto" and name != "cpu":
        notify(f"computing on {name} (device= changes it)")
    return name


def onto(values: Tensor, device: torch.device | str) -> Tensor:
    """The same values on a device; a GPU fetches them from pinned memory, while the host goes on."""
    device = torch.device(device)
    if device.type != "cuda" or values.device.type != "cpu":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)
