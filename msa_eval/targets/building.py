"""A third-party model while it is built: what is asked for, and what came of it."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from msa_eval.defense.architectures import Normalize

NO_NETWORK = ("urlopen", "Max retries", "NameResolution", "Connection", "couldn't connect")
"""Parts of what packages say where there is none."""

RANDOM = "random"
"""What stands for the weights file where the weights are random; they are the same at every call."""


@dataclass(frozen=True)
class Built:
    """A model by name.

    Attributes:
        model: maps images ``(B, 3, H, W)`` in [0, 1] to logits, in evaluation mode.
        size: the side of the square images it was made for, if that is known.
        about: the weights file's name and hash, normalisation and preprocessing, for ``run.json``.
        notes: what its user should know, a sentence each.
    """

    model: nn.Module
    size: int | None = None
    about: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Wanted:
    """Which weights a model is to have.

    Attributes:
        file: a weights file, or ``None`` for the pretrained ones.
        random: random weights instead.
        folder: where robustbench keeps its weights.
        classes: how many classes a model of random weights has; ``None`` for its own number.
        normalization: ``mean`` and ``std`` of each channel, in place of those that its weights were made with.
    """

    file: str | Path | None = None
    random: bool = False
    folder: Path = Path("models")
    classes: int | None = None
    normalization: Mapping[str, Sequence[float]] | None = None


def normalised(built: Built, own: Mapping[str, Sequence[float]], size: int | None, wanted: Wanted) -> Built:
    """A model behind the normalisation that it was made with, or the one that is wanted."""
    used = {name: [float(v) for v in (wanted.normalization or own)[name]] for name in ("mean", "std")}
    whole = nn.Sequential(Normalize(**used), built.model).eval()
    shown = " and ".join(f"{name} {', '.join(f'{v:.4g}' for v in used[name])}" for name in ("mean", "std"))
    other = "" if wanted.normalization is None else ", as was asked for"
    notes = (*built.notes, f"images are normalised by {shown} inside the model{other} (mean=, std= change it)")
    return Built(whole, size, {**built.about, "normalization": used}, notes)


def reason_of(error: Exception) -> str:
    """What went wrong, in one line."""
    if any(sign in str(error) for sign in NO_NETWORK):
        return "there is no network"
    return " ".join(str(error).split())[:200] or type(error).__name__


@contextlib.contextmanager
def same_random() -> Any:
    """Random weights that are the same at every call, and leave no trace in the global random state."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@contextlib.contextmanager
def plain_weights() -> Any:
    """Other packages' ``torch.load`` reads plain weights only, whatever they and the environment ask for."""
    load = torch.load
    torch.load = lambda *given, **named: load(*given, **{**named, "weights_only": True})
    try:
        yield
    finally:
        torch.load = load


@contextlib.contextmanager
def quietly() -> Any:
    """No warnings and no printing of other packages."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
