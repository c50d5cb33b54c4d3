"""Devices: which there are, and how tensors get there."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from toys import make_classifier, make_samples

import msa_eval
from msa_eval.device import check_device, device_for, onto
from msa_eval.engine.executors import LocalExecutor
from msa_eval.protocols import make_protocol
from msa_eval.studies.crosscheck import crosscheck


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


def test_an_accelerator_that_was_found_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    notes: list[str] = []
    assert device_for("auto", notes.append) == device_for("cpu", notes.append) == "cpu"
    assert not notes
    monkeypatch.setattr("msa_eval.device.automatic_device", lambda: "meta")
    assert device_for("auto", notes.append) == device_for("meta", notes.append) == "meta"
    assert notes == ["computing on meta (device= changes it)"]


@pytest.mark.parametrize(
    "function",
    [msa_eval.evaluate, msa_eval.audit, msa_eval.verify, msa_eval.finetune, msa_eval.ablate, crosscheck],
)
def test_the_device_is_found_by_default(function: Callable[..., Any]) -> None:
    assert inspect.signature(function).parameters["device"].default == "auto"


def test_an_evaluation_takes_the_device_that_was_found_and_a_cluster_none_unasked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Watched(LocalExecutor):
        def check(self, device: str) -> None:
            asked.append(device)

    asked: list[str] = []
    monkeypatch.setattr("msa_eval.device.automatic_device", lambda: "nowhere")
    model = make_classifier()
    one = make_protocol(
        {
            "schema": 1, "name": "device", "version": 1, "description": "A test.", "audit.samples": 0,
            "threat": {"norm": "Linf", "eps": 0.08}, "attack": {"square": {"queries": 1}},
        }
    )  # fmt: skip
    with pytest.raises(ValueError, match="'nowhere' can't be used"):
        msa_eval.evaluate(model, make_samples(model, 4), protocol=one)
    msa_eval.evaluate(model, make_samples(model, 4), protocol=one, engine=Watched())
    assert asked == ["cpu"]
