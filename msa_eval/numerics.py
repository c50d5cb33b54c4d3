"""How numbers are computed while a target is judged, whatever the process has set for itself."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
"""What cuBLAS needs to be deterministic; it is read when a process first uses it."""


@contextmanager
def full_precision(*, deterministic: bool = False) -> Iterator[None]:
    """Compute float32 in float32 for a while: no TF32 and no bfloat16 inside of products.

    By default torch lets cuDNN round the inputs of convolutions to ten bits, and a process may let other products do
    so too. All settings are left as they were found.

    Args:
        deterministic: use deterministic algorithms alone, and let torch raise an error where there is none.
    """
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
