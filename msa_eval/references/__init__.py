"""The packaged reference defences, made by ``python -m msa_eval.references.make``."""

from __future__ import annotations

from pathlib import Path

NAMES = ("digits", "cifar10-wrn10-2")


def reference_path(name: str) -> Path:
    """The checkpoint of a packaged reference defence.

    Raises:
        ValueError: when there is none of that name.

    >>> reference_path("digits").name
    'digits.safetensors'
    """
    if name not in NAMES:
        raise ValueError(f"unknown reference {name!r}; available: {', '.join(NAMES)}")
    return Path(__file__).with_name(f"{name}.safetensors")
