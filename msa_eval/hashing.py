"""SHA-256 of what evidence names: tensors, weights and files."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


def bytes_of(tensor: Tensor) -> bytes:
    """The bytes of a tensor's values, in order."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def tensor_hash(tensor: Tensor) -> str:
    """Of a tensor's type, shape and values."""
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    digest.update(bytes_of(tensor))
    return digest.hexdigest()


def weights_hash(model: nn.Module) -> str:
    """Of the names, types, shapes and bytes of a model's parameters and buffers, and of what else its state holds.

    >>> weights_hash(nn.Identity())[:8]
    'e3b0c442'
    """
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        for kind, content in _contents(value):
            digest.update(f"{name} {kind}\n".encode())
            digest.update(content)
    return digest.hexdigest()


def _contents(value: Any) -> Iterator[tuple[str, bytes]]:
    """What a value of a model's state is, and its bytes: of a tensor, of weights in int8, or of any other thing."""
    if isinstance(value, Tensor) and value.is_quantized:
        yield f"{value.dtype} {tuple(value.shape)}", bytes_of(value.int_repr())
        yield "scale", bytes_of(value.dequantize())
    elif isinstance(value, Tensor):
        yield (
            f"{value.dtype} {tuple(value.shape)}",
            bytes_of(value.to_dense() if value.layout != torch.strided else value),
        )
    elif isinstance(value, tuple | list):
        for entry in value:
            yield from _contents(entry)
    else:
        text = repr(value)
        yield type(value).__name__, b"" if " at 0x" in text else text.encode()


def file_hash(path: str | Path) -> str:
    """Of a file's content."""
    with Path(path).open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
