"""How numbers are computed while a target is judged, whatever the process has set for itself."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_CALLERS_DEVICE: list[torch.device] = []
"""The default devices of those who called us, where they are not the CPU: a target's code may rely on them."""

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
"""What cuBLAS needs to be deterministic; it is read when a process first uses it."""


@contextmanager
def full_precision(*, deterministic: bool = False) -> Iterator[None]:
    """Compute float32 in float32 for a while: no TF32 and no bfloat16 inside of products.

    By default torch lets cuDNN round the inputs of convolutions to ten bits, and a process may let other products do
    so too. Tensors are float32 and on the CPU where nothing else is said. Code that was compiled runs as it was
    written: compiled code allows only one gradient of a pass, and is compiled again for every kind of pass. All
    settings are left as they were found.

    Args:
        deterministic: use deterministic algorithms alone, and let torch raise an error where there is none.
    """
    with _defaults(), _as_written(), _products(deterministic=deterministic):
        yield


def callers_device() -> torch.device | None:
    """The default device that was set before `full_precision`, for as long as that lasts; ``None`` for the CPU."""
    return _CALLERS_DEVICE[-1] if _CALLERS_DEVICE else None


@contextmanager
def _defaults() -> Iterator[None]:
    """Tensors are float32, and on the CPU, where nothing else is said."""
    dtype, device = torch.get_default_dtype(), torch.get_default_device()
    if dtype == torch.float32 and device.type == "cpu":
        yield  # entering a device has a price for every call of torch
        return
    torch.set_default_dtype(torch.float32)
    if device.type != "cpu":
        _CALLERS_DEVICE.append(device)
    try:
        with torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(dtype)
        if device.type != "cpu":
            _CALLERS_DEVICE.pop()


@contextmanager
def _as_written() -> Iterator[None]:
    """Code that was compiled runs as it was written; where none was, the compiler is not even imported."""
    if "torch._dynamo" not in sys.modules:
        yield
        return
    with torch.compiler.set_stance("force_eager"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Using `torch\.compile\(module\)` when there are global hooks")
        yield


@contextmanager
def _products(*, deterministic: bool) -> Iterator[None]:
    """Products of float32 are made in float32."""
    held = [(place, name, getattr(place, name)) for place, name, _ in _settings()]
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    workspace = os.environ.get(WORKSPACE)
    try:
        for place, name, value in _settings():
            setattr(place, name, value)
        if deterministic:
            os.environ.setdefault(WORKSPACE, ":4096:8")
            held.append((torch.backends.cudnn, "benchmark", torch.backends.cudnn.benchmark))
            torch.backends.cudnn.benchmark = False
            torch.use_deterministic_algorithms(True)
        yield
    finally:
        for place, name, value in held:
            setattr(place, name, value)
        if deterministic:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])
            if workspace is None:
                os.environ.pop(WORKSPACE, None)


def _settings() -> list[tuple[Any, str, Any]]:
    """Where torch keeps what products may be rounded to, and the value that says: not at all."""
    backends: Any = torch.backends
    places = [backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn] if hasattr(backends.cudnn, "conv") else []
    if places and hasattr(backends.cuda.matmul, "fp32_precision"):
        places += [backends.mkldnn.conv, backends.mkldnn.matmul]
        return [(place, "fp32_precision", "ieee") for place in places]
    return [(backends.cuda.matmul, "allow_tf32", False), (backends.cudnn, "allow_tf32", False)]
