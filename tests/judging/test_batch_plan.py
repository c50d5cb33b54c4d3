"""Which samples, and who sits together."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from msa_eval.judging.batch_plan import plan_batches, select
from msa_eval.protocols import load_protocol


@given(count=st.integers(1, 500), size=st.integers(1, 100), seed=st.integers(0, 100))
def test_every_sample_sits_once_in_balanced_batches(count: int, size: int, seed: int) -> None:
    batch_plan = plan_batches(count, size=size, seed=seed)
    sizes = [len(indices) for indices in batch_plan]
    assert sorted(torch.cat(batch_plan).tolist()) == list(range(count))
    assert max(sizes) <= size
    assert max(sizes) - min(sizes) <= 1
    assert len(sizes) == -(-count // size)


def test_seats_are_shuffled_by_their_seed() -> None:
    first, again, other = (torch.cat(plan_batches(100, size=10, seed=seed)).tolist() for seed in (0, 0, 1))
    assert first == again
    assert first != other
    assert first != list(range(100))


def _select(y: torch.Tensor, **overrides: Any) -> list[int]:
    keys = {f"samples.{key}": value for key, value in overrides.items()}
    return select(y, load_protocol("digits", overrides=keys)).tolist()


def test_selections() -> None:
    y = torch.arange(1000) % 10
    assert _select(y) == list(range(1000))
    quarter = _select(y, fraction=0.25)
    assert len(quarter) == 250
    assert quarter == sorted(set(quarter))
    assert quarter == _select(y, fraction=0.25)
    assert quarter != _select(y, fraction=0.25, seed=1)
    assert min(torch.bincount(y[quarter]).tolist()) > 10
    five = _select(y, per_class=5)
    assert torch.bincount(y[five]).tolist() == [5] * 10
    limited = _select(y, fraction=0.25, limit=20)
    assert len(limited) == 20
    assert set(limited) < set(quarter)
    assert max(limited) > 500


def test_impossible_selections() -> None:
    with pytest.raises(ValueError, match="class 1 has 1"):
        _select(torch.tensor([0, 0, 0, 1]), per_class=2)
    with pytest.raises(ValueError, match="leaves none of the 2"):
        _select(torch.tensor([0, 1]), fraction=0.1)


def test_too_few_of_a_class_says_how_many_can_be_taken() -> None:
    with pytest.raises(ValueError, match=r'class 1 has 2; .*overrides=\{"samples.per_class": 1\}'):
        _select(torch.tensor([0, 0, 0, 1, 1, 2]), per_class=3)
