"""What contenders took and left, added up over the pieces of the data that they attack in turns."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
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


def until(runs: Sequence[Mapping[str, float]], clean: float, goal: float, *, of: str) -> float:
    """What share of a cost our runs, one after the other, take until no more samples stand than a rival leaves.

    Args:
        runs: with what each ``newly_broken``, and its costs.
        clean: the share that stands before.
        goal: what the rival leaves.
        of: the cost.

    Returns:
        1 where it takes all of them, and NaN where they don't get there.

    >>> until([{"wall": 1, "newly_broken": 0.5}, {"wall": 3, "newly_broken": 0.2}], 1.0, 0.5, of="wall")
    0.25
    """
    unbroken, spent = clean, 0.0
    for run in runs:
        unbroken, spent = unbroken - run["newly_broken"], spent + run[of]
        if unbroken <= goal + 1e-9:
            return spent / sum(run[of] for run in runs)
    return math.nan
