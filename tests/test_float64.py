"""A device without float64, as MPS is: an evaluation makes none there, and finds what it finds on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_any, tree_map
from toys import make_hpm, make_samples

from msa_eval import evaluate
from msa_eval.device import automatic_device, check_device, has_float64, in_float64
from msa_eval.protocols import make_protocol

FAKE = torch.device("mps")


class OnFake(Tensor):
    """A tensor that says it is on the device."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return FAKE


class FakeDevice(TorchFunctionMode):
    """Keeps the tensors of the device apart, and refuses float64 there, as MPS does.

    Attributes:
        calls: how many calls had a tensor of the device.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        there = tree_any(_is_there, (args, kwargs))
        self.calls += there
        if name == "__get__":
            return func(*args, **kwargs)
        if name == "cpu" or (name == "to" and _names(args[1:], kwargs) == "cpu"):
            there, args = False, (args[0].as_subclass(Tensor), *(a for a in args[1:] if not _is_cpu(a)))
            kwargs.pop("device", None)
        elif name == "to" and _names(args[1:], kwargs) == "mps":
            kinds = [getattr(a, "dtype", a) for a in (*args[1:], kwargs.get("dtype"))]
            dtype = next((kind for kind in kinds if isinstance(kind, torch.dtype)), None)
            return _taken_there(args[0] if dtype in (None, args[0].dtype) else func(args[0], dtype))
        elif _names((), kwargs) == "mps":
            there = True
            del kwargs["device"]
        found = func(*args, **kwargs)
        return tree_map(_taken_there, found) if there else found


def _is_there(value: Any) -> bool:
    return isinstance(value, OnFake)


def _is_cpu(value: Any) -> bool:
    return isinstance(value, str | torch.device) and torch.device(value).type == "cpu"


def _names(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """The device that a call asks for, if it does."""
    for value in (*args, kwargs.get("device")):
        if isinstance(value, OnFake):
            return "mps"
        if isinstance(value, torch.device) or (isinstance(value, str) and value in ("cpu", "mps")):
            return torch.device(value).type
    return ""


def _taken_there(value: Any) -> Any:
    if not isinstance(value, Tensor) or isinstance(value, torch.nn.Parameter):
        return value
    if value.dtype == torch.float64:
        raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64")
    return value.as_subclass(OnFake)


def _protocol(*contexts: str) -> Any:
    return make_protocol(
        {
            "schema": 1, "name": "small", "version": 1, "description": "A test.", "audit.samples": 8,
            "threat": {"norm": "Linf", "eps": 0.1, "contexts": contexts}, "batches": {"size": 8},
            "attack": {
                "apgd": {"surrogates": ["ste"], "losses": ["ce"], "steps": 3},
                "square": {"queries": 5}, "recombination": {"passes": 8},
            },
        }
    )  # fmt: skip


def test_the_fake_refuses_float64() -> None:
    with FakeDevice():
        x = torch.rand(3).to("mps")
        assert x.device == FAKE
        assert (x + 1).device == FAKE
        assert torch.zeros(3, device=x.device).device == FAKE
        assert x.cpu().device.type == "cpu"
        assert x.cpu().double().dtype == torch.float64
        for make in (x.double, lambda: x.to(torch.float64), lambda: x.sum(dtype=torch.float64)):
            with pytest.raises(TypeError, match="float64"):
                make()


def test_float64_is_made_on_the_cpu_where_a_device_has_none() -> None:
    assert has_float64(torch.device("cpu"))
    assert not has_float64(FAKE)
    with FakeDevice():
        found = in_float64(torch.ones(2).to("mps"))
    assert (found.dtype, found.device.type) == (torch.float64, "cpu")


@pytest.mark.parametrize(("context", "find"), [("joint", True), ("solo", False)])
def test_an_evaluation_there_makes_no_float64_and_finds_the_same(
    context: str, find: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    hpm = make_hpm()
    samples = make_samples(hpm, 16)
    monkeypatch.setattr("msa_eval.attacks.mixtures.has_float64", lambda device: False)
    expected = evaluate(hpm, samples, protocol=_protocol(context), found_surrogates=find)
    with FakeDevice() as device:
        found = evaluate(hpm, samples, protocol=_protocol(context), device="mps", found_surrogates=find)
    assert device.calls > 200
    assert found.run["verdict"] != "incomplete"
    assert found.samples["robust"].tolist() == expected.samples["robust"].tolist()
    if not find:  # what is looked through keeps its notes by tensor, and those of the fake are made anew
        np.testing.assert_array_equal(found.summary["value"], expected.summary["value"])


def test_the_automatic_device_is_the_first_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def there_is(cuda: bool, mps: bool) -> str:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
        return automatic_device()

    assert [there_is(True, True), there_is(True, False), there_is(False, True)] == ["cuda", "cuda", "mps"]
    assert there_is(False, False) == "cpu"
    assert check_device("auto") == "cpu"
