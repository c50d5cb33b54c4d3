"""Figures as a tidy table: one row a figure, with all that it depends on beside it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from . import machine


class Sheet:
    """Rows of one benchmark, written after each addition, so that an interrupted one leaves what it has.

    Args:
        path: the CSV. Rows of other settings that are there already stay.
        setting: what all rows share: the model, the number of samples, steps and so on.
    """

    def __init__(self, path: Path, **setting: object) -> None:
        self.path, self.setting = path, setting
        self._rows: list[dict[str, object]] = []
        self._before = self._others()

    def add(self, figures: Mapping[str, object], **about: object) -> None:
        """Add figures, by name, of something."""
        for figure, value in figures.items():
            self._rows.append({**self.setting, **about, "figure": figure, "value": value})
        described = ", ".join(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
                         for name, value in figures.items())  # fmt: skip
        print(*self.setting.values(), *about.values(), described, sep="  ", flush=True)
        self._write()

    def _others(self) -> pd.DataFrame:
        if not self.path.exists():
            return pd.DataFrame()
        table = pd.read_csv(self.path)
        same = pd.Series(True, index=table.index)
        for name, value in self.setting.items():
            same &= (table[name].astype(str) == str(value)) if name in table else False
        return table[~same]

    def _write(self) -> None:
        table = pd.concat([self._before, pd.DataFrame(self._rows)], ignore_index=True)
        last = ["figure", "value"]
        table = table[[name for name in table.columns if name not in last] + last]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        table.to_csv(self.path, index=False, float_format="%.6g")
        machine.write(self.path.parent)
