"""Devices: which there are, and how tensors get there."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from torch import Tensor

from msa_eval.device import check_device, onto


class _Recorded:
    """Stands for a tensor, and tells where it was sent and how."""

    def __init__(self, device: str, *, pinned: bool = False) -> None:
        self.device, self.pinned = torch.device(device), pinned
        self.went: tuple[Any, ...] = ()

    def pin_memory(self) -> _Recorded:
        return _Recorded("cpu", pinned=True)

    def to(self, device: torch.device, *, non_blocking: bool = False) -> _Recorded:
        self.went = (self.pinned, device.type, non_blocking)
        return self


@pytest.mark.parametrize(
    ("there", "to", "expected"),
    [
        ("cpu", "cuda:0", (True, "cuda", True)),
        ("cpu", "cpu", (False, "cpu", False)),
        ("cuda:0", "cuda:1", (False, "cuda", False)),
        ("cuda:0", "cpu", (False, "cpu", False)),
    ],
)
def test_only_what_goes_to_a_gpu_is_pinned_and_not_waited_for(there: str, to: str, expected: tuple[Any, ...]) -> None:
    found = cast(_Recorded, onto(cast(Tensor, _Recorded(there)), to))
    assert found.went == expected


def test_values_stay_the_same_on_the_way() -> None:
    x = torch.rand(3)
    assert onto(x, "cpu") is x
    assert onto(x, "meta").device.type == "meta"


def test_a_device_that_is_not_there() -> None:
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="CUDA is not available"):
            check_device("cuda")
    with pytest.raises(ValueError, match="can't be used here"):
        check_device("nonsense")
