"""Packing records of tensors into bytes, and back, exactly: a line of JSON and a safetensors file, and no pickle.

What may be packed: tensors, texts, numbers, ``None``, tuples of these, and the dataclasses of `RECORDS`.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from msa_eval.attacks.batch import AdversarialBatch
from msa_eval.attacks.external.faults import Fault
from msa_eval.auditing.sign import Sign
from msa_eval.engine.messages import BatchResult, Failure
from msa_eval.evidence.proof import Proof
from msa_eval.judging.outcomes import BreakingBatch, Nearest, RunResult, Trace

RECORDS: dict[str, type[Any]] = {
    kind.__name__: kind
    for kind in (Failure, Fault, BreakingBatch, Nearest, AdversarialBatch, Proof, BatchResult, Sign, RunResult, Trace)
}
"""The dataclasses that may be packed, by name."""


def pack(value: Any) -> tuple[bytes, bytes]:
    """The JSON line and the tensors of a value; a tensor that occurs several times is kept once.

    >>> import torch
    >>> line, tensors = pack((1, None, torch.arange(2)))
    >>> line.strip()
    b'[1, null, {"tensor": 0, "here": true}]'
    >>> unpack(line + tensors)
    (1, None, tensor([0, 1]))
    """
    places: dict[tuple[Any, ...], int] = {}
    tensors: dict[str, Tensor] = {}
    held: set[int] = set()

    def put(value: Any) -> Any:
        if isinstance(value, np.generic):
            value = value.item()
        if value is None or isinstance(value, bool | int | float | str):
            return value
        if isinstance(value, tuple):
            return [put(one) for one in value]
        if isinstance(value, Tensor):
            place = places.setdefault(_identity(value), len(places))
            if str(place) not in tensors:
                tensors[str(place)] = _alone(value, held)
            return {"tensor": place, "here": value.device.type == "cpu"}
        name = type(value).__name__
        if RECORDS.get(name) is not type(value):
            raise TypeError(f"a {name} can't be packed")
        return {"record": name} | {f.name: put(getattr(value, f.name)) for f in dataclasses.fields(value)}

    line = json.dumps(put(value))
    return line.encode() + b"\n", bytes(save_tensors(tensors))


def _identity(tensor: Tensor) -> tuple[Any, ...]:
    """What two tensors share that are the same."""
    return tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def _alone(tensor: Tensor, held: set[int]) -> Tensor:
    """A tensor on the CPU that shares no memory with those held, or with more than it shows, as safetensors asks."""
    own = tensor.detach().cpu().contiguous()
    storage = own.untyped_storage()
    if storage.nbytes() != own.nbytes or storage.data_ptr() in held:
        own = own.clone()
    held.add(own.untyped_storage().data_ptr())
    return own


def unpack(content: bytes, *, device: str = "cpu") -> Any:
    """What `pack` packed; what was on a device returns to the given one.

    Raises:
        ValueError: when it is nothing of the kind.
    """
    line, _, rest = content.partition(b"\n")
    try:
        tensors = load_tensors(rest)

        def get(value: Any) -> Any:
            if isinstance(value, list):
                return tuple(get(one) for one in value)
            if not isinstance(value, dict):
                return value
            if "tensor" in value:
                tensor = tensors[str(value["tensor"])]
                return tensor if value["here"] else tensor.to(device)
            return RECORDS[value["record"]](**{name: get(one) for name, one in value.items() if name != "record"})

        return get(json.loads(line))
    except (SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"it can't be unpacked ({error})") from error
