"""Batches that do not fit: the trunk takes them in parts, features and gradients are those of the whole."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor, nn
from toys import make_classifier, make_samples

from msa_eval import HPM, Classifier, Results, Samples, WholeModel, audit, evaluate, verify
from msa_eval.defense.micro_batches import MicroBatched, in_parts, is_out_of_memory, unwrap
from msa_eval.protocols import make_protocol

ROOM = 16
ERRORS: dict[str, Callable[[], BaseException]] = {
    "memory": MemoryError,
    "cuda": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "cpu": lambda: RuntimeError(
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
        "allocate 4294967296 bytes. Error code 12 (Cannot allocate memory)"
    ),
    "mps": lambda: RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"),
    "windows": lambda: RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes."),
}


class Cramped(nn.Module):
    """A convolutional trunk that holds the activations of so many images at a time, forward or backward."""

    def __init__(self, room: int, error: Callable[[], BaseException] = MemoryError, *, backward: bool = False) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        with torch.no_grad():
            self.conv.weight.copy_(torch.randn(self.conv.weight.shape, generator=generator) / 3)
            self.conv.bias.zero_()  # type: ignore[union-attr]
        self.room, self.error, self.backward = room, error, backward
        self.largest, self.held, self.peak, self.passes = 0, 0, 0, 0

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > self.room and not self.backward:
            raise self.error()
        self.passes += len(x)
        self.largest = max(self.largest, len(x))
        z = torch.relu(self.conv(x)).mean(dim=(2, 3))
        if z.requires_grad:
            self.held += len(x)
            self.peak = max(self.peak, self.held)
            z.register_hook(lambda gradient: self._back(len(gradient)))
        return z

    def _back(self, count: int) -> None:
        self.held -= count
        if count > self.room:
            raise self.error()


class Cramping(Classifier):
    def __init__(self, trunk: Cramped) -> None:
        fc = nn.Linear(8, 4)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            fc.weight.copy_(torch.randn(fc.weight.shape, generator=generator))
            room, trunk.room = trunk.room, 10**9
            fc.bias.copy_(-fc.weight @ trunk(torch.rand(200, 3, 6, 6, generator=generator)).mean(dim=0))
        trunk.room, trunk.passes, trunk.largest = room, 0, 0
        super().__init__(trunk, fc)
        self.eval()


def _hpm(trunk: Cramped) -> HPM:
    classifier = Cramping(trunk)
    hpm = HPM(classifier.trunk, classifier.fc).eval()
    room, trunk.room = trunk.room, 10**9
    x = torch.rand(200, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        z = hpm.features(x)
        hpm.start_prototypes(z, hpm.fc_logits(z).argmax(dim=1))
    trunk.room = room
    trunk.passes = trunk.largest = 0
    return hpm


@pytest.mark.parametrize("name", ERRORS)
def test_each_way_memory_runs_short_is_known(name: str) -> None:
    assert is_out_of_memory(ERRORS[name]())
    x = torch.rand(40, 3, 6, 6)
    model = in_parts(Cramping(Cramped(ROOM, ERRORS[name])))
    with torch.no_grad():
        z = model.features(x)
    assert z.shape == (40, 8)
    assert model.size == 10  # type: ignore[attr-defined]


def test_other_errors_are_not_taken_for_it() -> None:
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_out_of_memory(ValueError("out of memory"))
    model = in_parts(Cramping(Cramped(ROOM, lambda: RuntimeError("a kernel failed"))))
    with pytest.raises(RuntimeError, match="a kernel failed"):
        model.features(torch.rand(40, 3, 6, 6))
    assert model.size is None  # type: ignore[attr-defined]


def test_where_not_one_image_fits_it_is_an_error() -> None:
    model = in_parts(Cramping(Cramped(0)))
    with pytest.raises(MemoryError):
        model.features(torch.rand(8, 3, 6, 6))


@pytest.mark.parametrize("count", [1, 7, 16, 17, 31, 64, 256])
@pytest.mark.parametrize("backward", [False, True])
def test_features_and_gradients_are_those_of_the_whole(count: int, backward: bool) -> None:
    """Also where the forward pass fits and the backward pass does not."""
    x = torch.rand(count, 3, 6, 6, generator=torch.Generator().manual_seed(count))
    weight = torch.rand(count, 8, generator=torch.Generator().manual_seed(1))

    def both(model: Any) -> tuple[Tensor, Tensor]:
        leaf = x.clone().requires_grad_()
        z = model.features(leaf)
        # A decision over the whole batch: no row's gradient is its own alone.
        ((z - z.mean(dim=0)).pow(2) * weight).sum().backward()
        assert leaf.grad is not None
        return z.detach(), leaf.grad

    expected = both(Cramping(Cramped(10**9)))
    trunk = Cramped(ROOM, backward=backward)
    model = MicroBatched(Cramping(trunk), ROOM if backward else None)
    found = both(model)
    for one, other in zip(expected, found, strict=True):
        assert torch.allclose(one, other, atol=1e-6, rtol=1e-5)
    assert trunk.largest <= ROOM
    assert trunk.peak <= ROOM


def test_what_fits_is_remembered() -> None:
    trunk = Cramped(ROOM)
    model = in_parts(Cramping(trunk))
    with torch.no_grad():
        model.features(torch.rand(100, 3, 6, 6))
        trunk.passes, failed = 0, []
        trunk.error = lambda: failed.append(1) or MemoryError()  # type: ignore[func-returns-value]
        model.features(torch.rand(100, 3, 6, 6))
    assert not failed
    assert trunk.passes == 100
    assert model.size == 13  # type: ignore[attr-defined]


def test_a_trunk_without_a_gradient_still_has_none() -> None:
    class Numeric(Cramping):
        def features(self, x: Tensor) -> Tensor:
            return super().features(x.detach())

    x = torch.rand(40, 3, 6, 6, requires_grad=True)
    z = MicroBatched(Numeric(Cramped(ROOM)), 8).features(x)
    assert torch.autograd.grad(z.sum(), x, allow_unused=True) == (None,)


def test_a_model_without_a_trunk_stays_whole() -> None:
    whole = WholeModel(make_classifier())
    assert in_parts(whole) is whole
    with pytest.raises(ValueError, match="can't be passed in parts; use smaller batches"):
        in_parts(whole, 4)
    inner = make_classifier()
    assert unwrap(in_parts(inner)) is inner
    assert in_parts(in_parts(inner)) is not inner
    with pytest.raises(ValueError, match="at least 1 image, but got 0"):
        MicroBatched(inner, 0)


def _samples(count: int) -> Samples:
    trunk = Cramped(10**9)
    return make_samples(_hpm(trunk), count, shape=(3, 6, 6))


PROTOCOL: dict[str, Any] = {
    "schema": 1, "name": "small", "version": 1, "description": "A test.", "audit.samples": 0,
    "threat": {"norm": "Linf", "eps": 0.05, "contexts": ["joint", "solo"]},
    "batches": {"size": 256},
    "attack": {
        "apgd": {"surrogates": ["fc-oracle", "soft-hybrid", "ste"], "losses": ["ce"], "steps": 4},
        "square": {"queries": 5},
    },
}  # fmt: skip


PRECISION = "fp32"


@pytest.fixture(autouse=True, params=["fp32", "bf16"])
def _searched_in(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """In both precisions, and never as a trial of the time decides."""
    monkeypatch.setitem(globals(), "PRECISION", request.param)


def _evaluate(trunk: Cramped, samples: Samples, **more: Any) -> Results:
    return evaluate(_hpm(trunk), samples, protocol=make_protocol(PROTOCOL), precision=PRECISION, **more)


def _check_alike(one: Results, other: Results) -> None:
    """The same verdicts; leads differ by rounding, so that one in a hundred samples may fall on either side."""
    columns = ["clean_prediction", "clean_correct", "batch", "position"]
    assert one.samples[columns].equals(other.samples[columns])
    assert (one.samples["robust"] != other.samples["robust"]).mean() <= 0.01
    assert (one.summary["value"] - other.summary["value"]).abs().max() <= 0.01


def test_a_batch_of_256_is_evaluated_where_16_fit() -> None:
    samples = _samples(256)
    roomy, cramped = Cramped(10**9), Cramped(ROOM)
    expected, found = _evaluate(roomy, samples), _evaluate(cramped, samples)
    assert roomy.largest == 256
    assert cramped.largest <= ROOM
    assert cramped.peak <= ROOM
    assert found.batches["batch"].nunique() == 1
    _check_alike(expected, found)
    assert found.run["micro_batch"] == {"defense": 16, "fc": 16}
    assert "micro_batch" not in expected.run
    assert found.run["targets"]["defense"]["type"] == "HPM"
    assert found.run["targets"]["defense"]["runs"] == expected.run["targets"]["defense"]["runs"]


def test_a_card_that_is_full_is_no_other_than_a_machine_that_is() -> None:
    """Simulated: a trunk on the CPU raises what torch raises on CUDA."""
    assert torch.cuda.OutOfMemoryError is torch.OutOfMemoryError
    samples = _samples(64)
    card, machine = (_evaluate(Cramped(ROOM, ERRORS[name]), samples) for name in ("cuda", "cpu"))
    for found in (card, machine):
        assert "failed" not in found.run
        assert found.run["micro_batch"] == {"defense": 16, "fc": 16}
    pd.testing.assert_frame_equal(card.outcomes, machine.outcomes)
    pd.testing.assert_frame_equal(card.samples, machine.samples)


def test_memory_that_runs_short_in_a_backward_pass_makes_the_run_again() -> None:
    samples = _samples(64)
    cramped = Cramped(ROOM, ERRORS["cuda"], backward=True)
    found = _evaluate(cramped, samples)
    assert "failed" not in found.run
    assert found.run["micro_batch"]["defense"] <= ROOM
    _check_alike(_evaluate(Cramped(10**9), samples), found)


def test_parts_may_be_given(tmp_path: Path) -> None:
    samples = _samples(40)
    trunk = Cramped(10**9)
    found = _evaluate(trunk, samples, micro_batch=7, out=tmp_path, save_adversarial=True)
    assert trunk.largest <= 10 + 10  # checks of the trunk look at halves
    assert found.run["micro_batch"] == {"defense": 7, "fc": 7}
    _check_alike(_evaluate(Cramped(10**9), samples), found)
    assert verify(tmp_path, _hpm(Cramped(ROOM)), samples).passed
    with pytest.raises(ValueError, match="use smaller batches"):
        evaluate(WholeModel(make_classifier()), make_samples(make_classifier()), protocol="quick", micro_batch=4)


def test_the_audit_fits_too() -> None:
    samples = _samples(64)
    signs = [
        {sign.name: sign.fired for sign in audit(_hpm(Cramped(room)), samples, protocol="quick", limit=64).signs}
        for room in (10**9, ROOM)
    ]
    assert signs[0] == signs[1]
