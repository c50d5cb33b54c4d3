"""Float32 stays float32, and settings stay as they were."""

from __future__ import annotations

import os

import pytest
import torch

from msa_eval.arithmetic import WORKSPACE, _settings, exact


def _state() -> list[object]:
    algorithms = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    values = [getattr(place, name) for place, name, _ in _settings()]
    return [*values, *algorithms, torch.backends.cudnn.benchmark, os.environ.get(WORKSPACE)]


@pytest.mark.parametrize("deterministic", [False, True])
def test_settings_hold_inside_and_are_left_as_they_were(deterministic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(WORKSPACE, raising=False)
    place, name, _ = _settings()[0]
    found = getattr(place, name)
    setattr(place, name, "tf32" if isinstance(found, str) else True)
    before = _state()
    try:
        with exact(deterministic=deterministic):
            assert [getattr(place, name) for place, name, _ in _settings()] == [value for *_, value in _settings()]
            assert torch.are_deterministic_algorithms_enabled() == deterministic
        assert _state() == before
    finally:
        setattr(place, name, found)


def test_no_product_is_rounded_to_bfloat16() -> None:
    """Where a process lets float32 products be rounded and the processor has a use for it."""
    a = torch.rand(64, 64, generator=torch.Generator().manual_seed(0))
    expected = (a.double() @ a.double()).float()
    held = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with exact():
            torch.testing.assert_close(a @ a, expected, rtol=1e-5, atol=1e-5)
    finally:
        torch.set_float32_matmul_precision(held)
