"""Where a result comes from: versions, hashes, machine and command line."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
import subprocess
import sys
from typing import Any

import torch

from msa_eval._version import __version__
from msa_eval.defense.contract import Defense, modules_of
from msa_eval.defense.micro_batches import unwrap
from msa_eval.hashing import weights_hash

PACKAGES = ("torch", "numpy", "pandas", "scipy", "scikit-learn", "safetensors", "pyautoattack")
PEERS = ("torchattacks", "foolbox")
"""Optional packages whose versions are recorded where they are installed."""


def defense_hash(defense: Defense) -> str:
    """SHA-256 over the weights of a defence's modules; of its type's name alone where it has none.

    The weights alone decide where there is one module, so a wrapper or a moved file changes nothing.
    """
    parts = [weights_hash(module) for module in modules_of(defense)] or [type(unwrap(defense)).__qualname__]
    return parts[0] if len(parts) == 1 else hashlib.sha256("\n".join(parts).encode()).hexdigest()


def place(device: str) -> dict[str, Any]:
    """Versions and machine: what results should not depend on, but may."""
    return {
        "packages": {"msa-eval": __version__}
        | {name: _version(name) or "unknown" for name in PACKAGES}
        | {name: version for name in PEERS if (version := _version(name)) is not None},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else platform.machine(),
        "threads": torch.get_num_threads(),
    }


def environment(device: str) -> dict[str, Any]:
    """Where it is made, git state of the working directory, and command line."""
    return {
        **place(device),
        "precision": "float32",
        "git": _git(),
        "command": [_basename(sys.argv[0]), *sys.argv[1:]],
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _basename(path: str) -> str:
    """The program without its folder, which says nothing to others."""
    return path.replace("\\", "/").rsplit("/", 1)[-1]


def _git() -> dict[str, Any] | None:
    """Commit and dirty flag of the working directory, or ``None`` outside a repository."""
    try:
        commit, status = (
            subprocess.run(["git", *arguments], capture_output=True, text=True, timeout=10, check=True).stdout.strip()
            for arguments in (("rev-parse", "HEAD"), ("status", "--porcelain"))
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit, "dirty": bool(status)}
