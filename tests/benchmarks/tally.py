"""What contenders took and left, added up over the pieces of the data that they attack in turns."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import TypeVar

from torch import nn

from .clock import spend
from .passes import counted

T = TypeVar("T")

SECONDS = ("wall", "cpu", "inside")


class Tally:
    """Sums by name, a part of a contender's work each.

    Args:
        trunk: the module whose passes are counted.
    """

    def __init__(self, trunk: nn.Module) -> None:
        self._trunk = trunk
        self._sums: dict[str, Counter[str]] = {}

    def measure(self, part: str, action: Callable[[], T]) -> T:
        """Do something, return what it does, and add what it took to a part: seconds and passes."""
        found: list[T] = []
        with counted(self._trunk) as passes:
            spent = spend(lambda: found.append(action()))
        self.add(part, wall=spent.wall, cpu=spent.cpu, inside=passes.inside)
        self.add(part, forwards=passes.forwards, backwards=passes.backwards)
        return found[0]

    def add(self, part: str, **sums: float) -> None:
        """Add to some of a part's sums."""
        found = self._sums.setdefault(part, Counter())
        for name, value in sums.items():
            found[name] += float(value)  # type: ignore[assignment]

    def parts(self, beginning: str = "") -> list[str]:
        """The parts whose names begin so, in the order in which they were first met."""
        return [part for part in self._sums if part.startswith(beginning)]

    def figures(self, samples: int, *parts: str) -> dict[str, float]:
        """Some parts together: seconds as they are, everything else a sample."""
        total: Counter[str] = Counter()
        for part in parts:
            for name, value in self._sums[part].items():
                total[name] += value
        return {name: value if name in SECONDS else value / samples for name, value in total.items()}
