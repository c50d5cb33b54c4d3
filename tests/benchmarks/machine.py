"""The machine that figures were made on, described in a file beside them."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("msa-eval", "torch", "numpy", "pyautoattack", "torchattacks", "foolbox")
FLAGS = ("avx2", "fma", "avx512f", "avx512_bf16", "avx512_vnni", "amx_tile", "amx_bf16", "asimd", "sve", "bf16")
"""Flags of a processor that decide how fast it multiplies."""


def describe() -> dict[str, Any]:
    """Processor, cores, threads, memory and versions."""
    described = _processor()
    return {
        "cpu": described.get("model name", platform.processor() or platform.machine()),
        "family": described.get("cpu family"),
        "model": described.get("model"),
        "cores": os.cpu_count(),
        "flags": [flag for flag in FLAGS if flag in described.get("flags", described.get("Features", "")).split()],
        "memory_gib": _memory(),
        "platform": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "mkldnn": torch.backends.mkldnn.is_available(),
        "build": [line.strip() for line in torch.__config__.show().splitlines() if "MKL" in line and len(line) < 120],
    }


def write(folder: Path) -> None:
    """Describe the machine in ``machine.json``."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(describe(), indent=2, ensure_ascii=False)
    (folder / "machine.json").write_text(text + "\n", encoding="utf-8")


def load() -> float:
    """How many processes have wanted a core, over the last minute."""
    return os.getloadavg()[0]


def _processor() -> dict[str, str]:
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return {}
    lines = (line.partition(":") for line in path.read_text(encoding="utf-8").splitlines())
    found: dict[str, str] = {}
    for name, _, value in lines:
        found.setdefault(name.strip(), value.strip())
    return found


def _memory() -> float | None:
    try:
        return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)
    except (ValueError, OSError, AttributeError):
        return None


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
