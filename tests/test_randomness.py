"""Seeding torch's global generator for a while."""

from __future__ import annotations

import traceback
from typing import NoReturn

import pytest
import torch

from msa_eval.randomness import seeded


def test_it_draws_what_manual_seed_would_and_goes_on_where_it_was() -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    with seeded(5):
        drawn = torch.rand(3)
    torch.manual_seed(1)
    with seeded(7):
        torch.rand(1)
    assert torch.equal(torch.rand(3), expected)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(3), drawn)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is an accelerator to seed")
def test_without_an_accelerator_no_traceback_is_formatted(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `torch.manual_seed` does, which took 1.4 ms a call within the command line, 15 % of a small evaluation."""

    def never(*_: object, **__: object) -> NoReturn:
        raise AssertionError("a traceback")

    monkeypatch.setattr(traceback, "format_stack", never)
    with pytest.raises(AssertionError, match="a traceback"):
        torch.manual_seed(0)
    with seeded(0):
        pass
