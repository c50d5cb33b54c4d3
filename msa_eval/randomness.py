"""The global generators of torch, NumPy and Python: seeded for a while, and put back."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import torch


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the global generators for a while, for targets that draw from them, and leave them as they were."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        _seed_torch(seed)
        yield


def _seed_torch(seed: int) -> None:
    """What `torch.manual_seed` does, which formats a traceback for each absent accelerator."""
    if _has_accelerator():
        torch.manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)


@cache
def _has_accelerator() -> bool:
    return torch.accelerator.is_available()


@contextmanager
def all_seeded(seed: int) -> Iterator[None]:
    """Seed NumPy's and Python's global generators for a while, and leave them as they were."""
    numpy_state, python_state = np.random.get_state(), random.getstate()
    np.random.seed(seed % 2**32)
    random.seed(seed)
    try:
        yield
    finally:
        np.random.set_state(numpy_state)
        random.setstate(python_state)


class Chance:
    """The global generators of torch, NumPy and Python, seeded for an external attack; ours go on where they were.

    Args:
        seed: for the external attack.
        device: whose generator is meant beside the CPU's.

    Attributes:
        seeded: whether torch's was seeded anew meanwhile.
    """

    def __init__(self, seed: int, device: torch.device) -> None:
        self._seed, self._device = seed, device
        self.seeded = False

    def __enter__(self) -> Chance:
        self._ours = self._states()
        torch.default_generator.manual_seed(self._seed)
        if self._device.type == "cuda":
            torch.cuda.manual_seed(self._seed)
        np.random.seed(self._seed)
        random.seed(self._seed)
        return self

    def __exit__(self, *_: object) -> None:
        self.seeded = self.seeded or torch.initial_seed() != self._seed
        self._set(self._ours)

    @contextmanager
    def ours(self) -> Iterator[None]:
        """Our own streams, for as long as the model answers."""
        self.seeded = self.seeded or torch.initial_seed() != self._seed
        theirs = self._states()
        self._set(self._ours)
        try:
            yield
        finally:
            self._ours = self._states()
            self._set(theirs)

    def _states(self) -> tuple[Any, ...]:
        cuda = torch.cuda.get_rng_state(self._device) if self._device.type == "cuda" else None
        return torch.get_rng_state(), cuda, np.random.get_state(), random.getstate()

    def _set(self, states: tuple[Any, ...]) -> None:
        cpu, cuda, numpy, python = states
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda, self._device)
        np.random.set_state(numpy)
        random.setstate(python)
