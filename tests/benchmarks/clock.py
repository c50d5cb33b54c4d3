"""Time spent, of contenders that take turns: on a shared machine only such ratios mean something."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import pandas as pd
from torch import nn

from .passes import counted


class Spent(NamedTuple):
    """Seconds by the wall clock, and those this process computed for, on all of its threads."""

    wall: float
    cpu: float

    def __add__(self, other: tuple[object, ...]) -> Spent:
        assert isinstance(other, Spent)
        return Spent(self.wall + other.wall, self.cpu + other.cpu)


def spend(action: Callable[[], object]) -> Spent:
    """Do something, and say what it took."""
    wall, cpu = time.perf_counter(), time.process_time()
    action()
    return Spent(time.perf_counter() - wall, time.process_time() - cpu)


def in_turns(
    contenders: Mapping[str, Callable[[], object]], repeats: int, *, trunk: nn.Module, warm: int = 1
) -> pd.DataFrame:
    """Let all contenders run one after the other, again and again, every second time in reverse.

    Args:
        contenders: what is measured, by name.
        repeats: rounds that count.
        trunk: the module whose passes are counted.
        warm: rounds before these that don't.

    Returns:
        columns ``contender``, ``repeat``, ``wall``, ``cpu`` and those of `Passes`: ``forwards``, ``backwards`` and
        ``inside``, a row a run.
    """
    rows = []
    for repeat in range(-warm, repeats):
        for name in list(contenders)[:: -1 if repeat % 2 else 1]:
            with counted(trunk) as passes:
                spent = spend(contenders[name])
            rows.append((name, repeat, *spent, passes.forwards, passes.backwards, passes.inside))
    columns = ["contender", "repeat", "wall", "cpu", "forwards", "backwards", "inside"]
    table = pd.DataFrame(rows, columns=columns)
    return table[table["repeat"] >= 0].reset_index(drop=True)


def against(table: pd.DataFrame, base: str) -> pd.DataFrame:
    """What each contender takes in units of one of them.

    Args:
        table: as `in_turns` returns it.
        base: the contender that is 1.

    Returns:
        a row a contender, with the columns ``wall`` and ``cpu`` (medians over the rounds of the ratio within a round),
        ``least`` (the ratio of the lowest ``cpu``) and ``paced``: what it computed for a second inside the trunk,
        median over the rounds, by what the other did. The last compares what lies milliseconds apart, so that a
        machine that drifts, or works for others, shows in it least; it takes passes to be equal.
    """
    found = {}
    for clock in ("wall", "cpu"):
        times = table.pivot(index="repeat", columns="contender", values=clock)
        found[clock] = times.div(times[base], axis=0).median()
    found["least"] = times.min() / times.min()[base]
    paced = (table["cpu"] / table["inside"]).groupby(table["contender"]).median()
    found["paced"] = paced / paced[base]
    return pd.DataFrame(found)
