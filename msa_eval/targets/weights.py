"""Weights from files: safetensors, or what ``torch.load(weights_only=True)`` reads. Nothing else is unpickled."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from msa_eval.checkpoint import misfits, read_safetensors
from msa_eval.hashing import file_hash

_HOLDERS = ("state_dict", "model_state_dict", "model", "net")
"""Under what names training scripts keep the weights among other things."""
_PREFIXES = ("module.", "_orig_mod.", "model.")
"""What wrappers put before every name."""


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Read a state dict, on the CPU.

    Args:
        path: a ``.safetensors`` file, or a file for ``torch.load(weights_only=True)``: a state dict, or a dict that
            holds one as ``state_dict``, ``model_state_dict``, ``model`` or ``net``.

    Raises:
        ValueError: when the file is missing, or holds anything else.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there is no weights file {path}")
    if path.suffix == ".safetensors":
        return read_safetensors(path)[1]
    held = read_plain(path)
    for name in _HOLDERS:
        if isinstance(held, Mapping) and isinstance(held.get(name), Mapping):
            held = held[name]
    if not isinstance(held, Mapping) or not held or not all(isinstance(value, Tensor) for value in held.values()):
        keys = ", ".join(str(key) for key in [*held][:5]) if isinstance(held, Mapping) else type(held).__name__
        raise ValueError(f"{path} holds no state dict but {keys or 'nothing'}; save model.state_dict()")
    return {str(name): value for name, value in held.items()}


def read_plain(path: Path) -> Any:
    """What ``torch.load(weights_only=True)`` reads from a file, on the CPU.

    Raises:
        ValueError: when it refuses the file.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, LookupError, ValueError, zipfile.BadZipFile) as error:
        # The unpickler stops at a file of another kind with a bare number.
        reason = str(error).splitlines()[0].split(". ")[0] if not isinstance(error, LookupError) and str(error) else ""
        raise ValueError(
            f"{path} is no file of plain weights that torch.load(weights_only=True) reads "
            f"({reason or 'it is of another kind'}); save model.state_dict(), best as safetensors"
        ) from error


def load_weights(model: nn.Module, tensors: Mapping[str, Tensor], *, source: str) -> None:
    """Put weights into a model; every one must have its place and every place its weight.

    Args:
        model: gets the weights.
        tensors: its state dict; a prefix of all names (``module.``, ``model.``) is dropped where they fit without it.
        source: the name of the file, for errors.

    Raises:
        ValueError: when they don't fit.
    """
    fitting = _renamed(tensors, set(model.state_dict()))
    absent = {name for name in model.state_dict() if name.endswith("num_batches_tracked")} - set(fitting)
    fitting |= {name: model.state_dict()[name] for name in absent}  # old files have none, and evaluation uses none
    if wrong := misfits(model, fitting):
        raise ValueError(f"{source} does not fit the model: {wrong}")
    model.load_state_dict(fitting)


def other_classes(model: nn.Module, tensors: Mapping[str, Tensor]) -> int | None:
    """The number of classes of weights that fit a model but for its number of classes; ``None`` if they don't."""
    expected = model.state_dict()
    fitting = _renamed(tensors, set(expected))
    other = {
        (expected[name].shape[0], value.shape[0])
        for name, value in fitting.items()
        if name in expected and value.shape != expected[name].shape and value.ndim and expected[name].ndim
    }
    return other.pop()[1] if len(other) == 1 else None


def _renamed(tensors: Mapping[str, Tensor], names: set[str]) -> dict[str, Tensor]:
    best = dict(tensors)
    for prefix in _PREFIXES:
        if not set(best) <= names and all(name.startswith(prefix) for name in best):
            best = {name.removeprefix(prefix): value for name, value in best.items()}
    return best


def describe_file(path: str | Path) -> dict[str, Any]:
    """What a result says of a weights file: its name, without its folder, and its SHA-256."""
    return {"weights": Path(path).name, "weights_sha256": file_hash(path)}
