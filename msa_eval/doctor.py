"""What may be wrong with an installation, and the commands that mend it.

Each check is a function that returns a finding. Nothing is changed here but a file of no name that is made and gone in
each cache; what mends is run by the command line, if it is asked to.
"""

from __future__ import annotations

import importlib
import os
import platform
import shutil
import sys
import sysconfig
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import Distribution
from pathlib import Path
from typing import Literal

import torch
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from torch import Tensor

from msa_eval.data import load_samples
from msa_eval.installation import imports, records
from msa_eval.installation.records import Command, SearchPath
from msa_eval.targets.checkpoint import load_checkpoint

PEERS = ("robustbench", "torchattacks", "foolbox", "pyautoattack")
"""Distributions whose files are held to their records; each is imported by the name of the distribution."""

ZOOS = ("torchvision", "timm")
"""Packages of models whose files are not held to their records: no other package is known to write over them."""

LEAST = 0.8
"""Share of 64 clean digits that the packaged digits defence gets right at least; it gets 92 % of 600."""


@dataclass(frozen=True)
class Finding:
    """What a check found.

    Attributes:
        name: what was looked at.
        state: ``ok``; ``note``, which needs nothing done; or ``fault``.
        said: a sentence.
        mends: the commands that mend it, in order.
        by_hand: they only work in the user's own shell.
    """

    name: str
    state: Literal["ok", "note", "fault"]
    said: str
    mends: tuple[Command, ...] = ()
    by_hand: bool = False


def examine() -> Iterator[Finding]:
    """Make every check, one after the other: cheap ones first."""
    packages = [check_python(platform.python_version()), *check_requirements(), check_own_files()]
    packages += [check_files(name) for name in PEERS]
    yield from packages
    if all(finding.state != "fault" for finding in packages):  # else an import may fail for the same reason
        yield from (check_import(name, load) for name, load in IMPORTS.items() if records.find(name) is not None)
    yield check_cpu(torch.backends.cpu.get_cpu_capability())
    yield check_device()
    for variable, folder in caches().items():
        yield check_cache(variable, folder)
    from msa_eval.references import NAMES, reference_path

    for name in NAMES:
        yield check_reference(name, reference_path(name))


def check_python(version: str) -> Finding:
    """Hold Python's version to our metadata."""
    own = records.find("msa-eval")
    wanted = ",".join([] if own is None else own.metadata.get_all("Requires-Python") or [])
    if SpecifierSet(wanted).contains(version, prereleases=True):
        return Finding("python", "ok", f"{version} at {sys.executable}")
    mends = (("python3.11", "-m", "venv", "msa-eval-venv"),)
    return Finding("python", "fault", f"{version}, but msa-eval needs {wanted}", mends, by_hand=True)


def check_requirements(name: str = "msa-eval", path: SearchPath = None) -> list[Finding]:
    """Hold all that we need, directly or not, to what the metadata of each asks for.

    An extra counts where a package of its name is installed, and so does a package of models or attacks that none of
    ours asks for.
    """
    own = records.find(name, path)
    if own is None:
        return [Finding("packages", "note", f"{name} is not installed, so its requirements are not known")]
    tops = records.requirements(own, path)
    more = set(PEERS) | set(ZOOS)
    tops += [Requirement(one) for one in sorted(more - {top.name for top in tops}) if records.find(one, path)]
    wrong = {top: found for top in tops if (found := records.unmet(top, path, imports.EXCUSED))}
    if not wrong:
        versions = records.followed(tops, path)
        chief = ", ".join(f"{key} {versions[key]}" for key in ("torch", "numpy", *PEERS) if key in versions)
        return [Finding("packages", "ok", f"{len(versions)} that {name} needs go together, among them {chief}")]
    # With what caps torch, because pip would move it for the sake of torchvision.
    asked = [*wrong, *(top for top in tops if top.name == "torch" and top not in wrong)]
    mends = records.pip("install", *(_bare(top) for top in asked))
    sentences = dict.fromkeys(sentence for found in wrong.values() for sentence in found)
    return [Finding("packages", "fault", sentence, mends) for sentence in sentences]


def _bare(requirement: Requirement) -> str:
    """A requirement without its marker, which holds here."""
    extras = f"[{','.join(sorted(requirement.extras))}]" if requirement.extras else ""
    return f"{requirement.name}{extras}{requirement.specifier}"


def check_files(name: str, path: SearchPath = None) -> Finding:
    """Hold a peer's files to its own record.

    The wheel of torchattacks 3.5.1 carries an old top-level ``robustbench`` that is written over the real one. Only the
    folder of a package's own name counts as its own, so after a mend torchattacks has no fault.
    """
    found = records.find(name, path)
    if found is None:
        other = records.stray("robustbench", "torchattacks", path) if name == "robustbench" else None
        beside = f"; what is imported by its name is an old copy in torchattacks, {other}" if other else ""
        return Finding(name, "note", f"not installed{beside}")
    wrong = records.wrong_with(name, path)
    if not wrong:
        return Finding(name, "ok", f"{found.version}, {records.altered(found, name) or 'no files in its record'}")
    other = records.shadow(found, name, path)
    if other is not None and path is None and other.parent.resolve() not in _own_places():
        mends: tuple[Command, ...] = (("mv", str(other), f"{other}.aside"),)
        return Finding(name, "fault", f"{found.version}: {wrong}", mends, by_hand=True)
    mends = _reinstall(name, path)
    if name == "torchattacks" and records.find("robustbench", path) is not None:
        mends += _reinstall("robustbench", path)[-1:]
    return Finding(name, "fault", f"{found.version}: {wrong}", mends)


def _own_places() -> set[Path]:
    """Where this environment's pip writes."""
    return {Path(sysconfig.get_path(kind)).resolve() for kind in ("purelib", "platlib")}


def _reinstall(name: str, path: SearchPath) -> tuple[Command, ...]:
    """Put a peer's files back: the same version, or the one that we ask for where that is another."""
    found, own = records.find(name, path), records.find("msa-eval", path)
    if found is None:
        return ()
    wanted = {top.name: top for top in ([] if own is None else records.requirements(own, path))}.get(name)
    if wanted is None or wanted.specifier.contains(found.version, prereleases=True):
        return records.reinstall(found)
    return records.pip("install", "--force-reinstall", "--no-deps", _bare(wanted))


def check_own_files(path: SearchPath = None) -> Finding:
    """Hold our own files to our own record: code, protocols and reference checkpoints."""
    found = records.find("msa-eval", path)
    differs = None if found is None else records.altered(found, "msa_eval")
    if found is None or differs is None:
        return Finding("msa-eval", "note", f"runs from {Path(__file__).parent}, without a record to hold it to")
    if differs.changed or differs.missing:
        return Finding("msa-eval", "fault", f"{found.version}: {differs}", records.reinstall(found))
    return Finding("msa-eval", "ok", f"{found.version}, {differs}")


IMPORTS: Mapping[str, Callable[[], object]] = {
    "torchvision": imports.import_torchvision,
    "timm": imports.import_timm,
    "robustbench": imports.import_robustbench,
    "torchattacks": lambda: importlib.import_module("torchattacks"),
    "foolbox": lambda: importlib.import_module("foolbox"),
}
"""How packages are imported of which we take models or attacks."""


def check_import(name: str, load: Callable[[], object]) -> Finding:
    """Import a package as a target or an attack would."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            load()
    except Exception as error:
        said = " ".join(f"{type(error).__name__}: {error}".split())
        return Finding(f"import {name}", "fault", said, _reinstall(name, None))
    return Finding(f"import {name}", "ok", "works")


def check_cpu(capability: str) -> Finding:
    """Say what torch makes of the processor: the instructions it uses, and whether bfloat16 is among them."""
    bf16 = capability.startswith("AVX512") and _has_bf16()
    said = f"torch computes with {capability}, bfloat16 {'in hardware' if bf16 else 'emulated'}"
    if asked := os.environ.get("ATEN_CPU_CAPABILITY"):
        said += f"; ATEN_CPU_CAPABILITY={asked} holds it there"
        return Finding("processor", "note", said, (("unset", "ATEN_CPU_CAPABILITY"),), by_hand=True)
    return Finding("processor", "ok" if capability.startswith("AVX512") else "note", said)


def _has_bf16() -> bool:
    ask = getattr(torch.cpu, "_is_avx512_bf16_supported", None)  # not public, so it may go
    return ask is not None and bool(ask())


def check_device() -> Finding:
    """Say what there is besides the processor, and let each accelerator compute."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    names = [f"cuda:{i}" for i in range(count)]
    names += ["mps"] if torch.backends.mps.is_available() else []
    if not names:
        return Finding("devices", "note", "the processor only" + _idle_card())
    devices = [f"{n} ({torch.cuda.get_device_name(n)})" if n.startswith("cuda") else n for n in names]
    if wrong := [f"{name}: {reason}" for name in names if (reason := miscomputes(name))]:
        mends = (("export", "CUDA_VISIBLE_DEVICES="),)
        return Finding("devices", "fault", f"can't be computed on: {'; '.join(wrong)}", mends, by_hand=True)
    return Finding("devices", "ok", f"cpu, {', '.join(devices)}")


def _idle_card() -> str:
    if shutil.which("nvidia-smi") is None:
        return ""
    built = "for the processor only" if torch.version.cuda is None else f"for CUDA {torch.version.cuda}"
    return f", though there is an NVIDIA driver: torch {torch.__version__} was built {built}, and finds no device"


def miscomputes(device: str) -> str:
    """Whether a small product comes out otherwise on a device than on the processor: how, or empty."""
    a = torch.rand(64, 64, generator=torch.Generator().manual_seed(0))
    try:
        off = float(((a.to(device) @ a.to(device)).cpu() - a @ a).abs().max())
    except RuntimeError as error:
        return " ".join(str(error).split())
    return "" if off < 0.1 else f"a product of matrices is off by {off:.2g}"


def caches() -> dict[str, Path]:
    """The folders that weights, fonts and temporary files go to, by the variable that moves each."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return {
        "TORCH_HOME": Path(torch.hub.get_dir()).parent,
        "HF_HOME": Path(os.environ.get("HF_HOME") or home / "huggingface"),
        "MPLCONFIGDIR": Path(os.environ.get("MPLCONFIGDIR") or home / "matplotlib"),
        "TMPDIR": Path(os.environ.get("TMPDIR") or "/tmp"),
    }


def check_cache(variable: str, folder: Path) -> Finding:
    """Write into a folder, or into the nearest above it that is there."""
    # Not `Path.exists`, which raises where a folder above may not be entered.
    there = next((place for place in (folder, *folder.parents) if os.path.exists(place)), Path.cwd())
    try:
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(b"msa-eval doctor")
    except OSError as error:
        reason = f"{folder} can't be written to ({error.strerror or error})"
        if there.is_dir() and hasattr(os, "geteuid") and there.stat().st_uid == os.geteuid():
            return Finding(variable, "fault", reason, (("chmod", "u+rwx", str(there)),))
        aside = Path.cwd() / ".cache" / folder.name
        return Finding(variable, "fault", reason, (("export", f"{variable}={aside}"),), by_hand=True)
    return Finding(variable, "ok", str(folder))


def check_reference(name: str, file: Path) -> Finding:
    """Load a packaged checkpoint and let it answer on one batch; of real digits, where it is made for them."""
    own = records.find("msa-eval")
    mends = () if own is None else _restore(own, file)
    try:
        model = load_checkpoint(file).model
        x, y = _batch(name)
        with torch.no_grad():
            logits = model(x)
    except (ValueError, RuntimeError, OSError) as error:
        return Finding(f"reference {name}", "fault", " ".join(str(error).split()), mends)
    if logits.shape != (len(x), 10) or not bool(torch.isfinite(logits).all()):
        return Finding(f"reference {name}", "fault", f"answers with {tuple(logits.shape)}, or not with numbers", mends)
    if y is None:
        return Finding(f"reference {name}", "ok", f"answers on {len(x)} images of noise")
    right = float((logits.argmax(1) == y).float().mean())
    said = f"{right:.0%} of {len(x)} digits are right"
    if right < LEAST:
        return Finding(f"reference {name}", "fault", f"{said}, expected at least {LEAST:.0%}", mends)
    return Finding(f"reference {name}", "ok", said)


def _batch(name: str) -> tuple[Tensor, Tensor | None]:
    if name != "digits":
        return torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(0)), None
    samples = load_samples("digits")
    return samples.images(torch.arange(64)), samples.y[:64]


def _restore(own: Distribution, file: Path) -> tuple[Command, ...]:
    """From git where we run from a folder, and else by installing ourselves again."""
    root = next((parent for parent in file.parents if (parent / ".git").exists()), None)
    if records.altered(own, "msa_eval") is None and root is not None:
        return (("git", "-C", str(root), "checkout", "--", str(file.relative_to(root))),)
    return records.reinstall(own)
