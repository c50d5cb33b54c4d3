"""Passes through a trunk, counted where they are made, whoever makes them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import Tensor, nn


@dataclass
class Passes:
    """What went through a trunk.

    Attributes:
        forwards: images.
        backwards: images whose features' gradient was followed back to the pixels.
        inside: seconds this process computed for between entering and leaving it, both ways.
        calls: forward passes.
    """

    forwards: int = 0
    backwards: int = 0
    inside: float = 0.0
    calls: int = 0
    _entered: list[float] = field(default_factory=list)

    def __deepcopy__(self, memo: object) -> Passes:
        """Itself: passes through a copy of the trunk count as well."""
        return self

    def _enter(self, trunk: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        (x,) = given
        self.forwards += len(x)
        self.calls += 1
        if x.requires_grad:
            x = x.view_as(x)  # the same images may be passed again, and a hook on them would stay
            x.register_hook(self._left_back)
        self._entered.append(time.process_time())
        return (x,)

    def _leave(self, trunk: nn.Module, given: tuple[Tensor, ...], z: Tensor) -> None:
        self.inside += time.process_time() - self._entered.pop()
        if z.requires_grad:
            z.register_hook(self._entered_back)

    def _entered_back(self, gradient: Tensor) -> None:
        self._entered.append(time.process_time())

    def _left_back(self, gradient: Tensor) -> None:
        self.backwards += len(gradient)
        self.inside += time.process_time() - self._entered.pop()


@contextmanager
def counted(trunk: nn.Module) -> Iterator[Passes]:
    """Count what goes through a trunk for a while.

    It must not be called from within itself, and gradients are expected to reach the pixels or nothing.
    """
    passes = Passes()
    hooks = [trunk.register_forward_pre_hook(passes._enter), trunk.register_forward_hook(passes._leave)]
    try:
        yield passes
    finally:
        for hook in hooks:
            hook.remove()
