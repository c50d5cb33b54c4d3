"""Options that several commands share, and how they are read."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from fractions import Fraction
from typing import Any

import click
from tqdm import tqdm

from msa_eval.progress import Progress, silent


class _Number(click.ParamType[float]):
    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Read ``0.03`` or ``8/255``."""
        try:
            return float(Fraction(value)) if isinstance(value, str) else float(value)
        except (ValueError, ZeroDivisionError, OverflowError):
            self.fail(f"{value!r} is not a number or a fraction such as 8/255", param, ctx)


class _Assignment(click.ParamType[tuple[str, Any]]):
    name = "key=value"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, Any]:
        """Read ``attack.square.queries=1000``: the value is TOML, or else a text."""
        if isinstance(value, tuple):
            return value
        key, separator, text = str(value).partition("=")
        if not separator or not key.strip():
            self.fail(f"{value!r} is not of the form key=value", param, ctx)
        try:
            return key.strip(), tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            return key.strip(), text.strip()


NUMBER = _Number()
ASSIGNMENT = _Assignment()

data_root = click.option(
    "--data-root", default="data", show_default=True, help="Folder of torchvision's data sets (cifar10, cifar100)."
)
device = click.option("--device", default="cpu", show_default=True, help="cpu, cuda or cuda:N.")
force = click.option("--force", is_flag=True, help="Replace other results in the output folder.")
quiet = click.option("--quiet", is_flag=True, help="Show no progress.")
seed = click.option(
    "--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True, help="Seed of all randomness."
)


def bars(quiet: bool) -> Progress:
    """Progress bars on stderr, or none."""

    def bar(iterable: Iterable[Any], description: str) -> Iterable[Any]:
        return tqdm(iterable, description, dynamic_ncols=True)

    return silent if quiet else bar
