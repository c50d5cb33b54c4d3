"""Float32 stays float32, and settings stay as they were."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from proofs import make_results
from torch import Tensor
from toys import make_hpm, make_samples

from msa_eval import HPM, evaluate
from msa_eval.auditing.audit import audit
from msa_eval.numerics import WORKSPACE, _settings, full_precision
from msa_eval.protocols import make_protocol
from msa_eval.studies.crosscheck import crosscheck
from msa_eval.verification.verify import verify


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
        with full_precision(deterministic=deterministic):
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
        with full_precision():
            torch.testing.assert_close(a @ a, expected, rtol=1e-5, atol=1e-5)
    finally:
        torch.set_float32_matmul_precision(held)


class Asking(HPM):
    """Notes, at every pass, whether products are rounded."""

    rounded: list[bool]

    def features(self, x: Tensor) -> Tensor:
        self.rounded.append(any(getattr(place, name) != value for place, name, value in _settings()))
        return super().features(x)


def test_whatever_judges_a_target_rounds_no_products(tmp_path: Path) -> None:
    hpm: Any = make_hpm()
    hpm.__class__ = Asking
    hpm.rounded = []
    samples = make_samples(hpm, 16)
    make_results(hpm, samples, tmp_path)
    small = make_protocol({
        "schema": 1, "name": "small", "version": 1, "description": "A test.", "threat": {"norm": "Linf", "eps": 0.05},
        "attack": {"square": {"queries": 3}}, "audit": {"samples": 0}, "batches": {"size": 8},
    })  # fmt: skip
    before = [(place, name, getattr(place, name)) for place, name, _ in _settings()]
    try:
        for place, name, value in _settings():
            setattr(place, name, "tf32" if value == "ieee" else True)
        for judge in (
            lambda: evaluate(hpm, samples, protocol=small),
            lambda: verify(tmp_path, hpm, samples),
            lambda: audit(hpm, samples, protocol=small),
            lambda: crosscheck(tmp_path, hpm, samples, peers=["autoattack:apgd-ce"], steps=2, contexts=["joint"]),
        ):
            hpm.rounded.clear()
            judge()
            assert hpm.rounded
            assert not any(hpm.rounded)
    finally:
        for place, name, held in before:
            setattr(place, name, held)
