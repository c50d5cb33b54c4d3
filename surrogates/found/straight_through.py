"""A target's own code, with the gradient passed through what blocks it.

The code runs as it is, and its values are its own; what changes is the way back. Rounding, thresholds and integer
casts pass the gradient on, ``no_grad`` and ``inference_mode`` blocks and ``detach`` are looked through, and the argmax
has the gradient of a softmax. Nothing of the target is rewritten: its calls of torch are met one by one.

References:
    Obfuscated Gradients Give a False Sense of Security (Athalye, Carlini & Wagner, 2018), arXiv:1802.00420, section 4.1
    (BPDA); Estimating or Propagating Gradients Through Stochastic Neurons (Bengio, Léonard & Courville, 2013),
    arXiv:1308.3432 (the straight-through estimator).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from msa_eval.defense.contract import modules_of
from msa_eval.surrogates.found.passing import Passing, StraightThrough

_PATCHING = threading.RLock()
_ACTIVE = threading.local()


@contextmanager
def looking_through(passing: Passing) -> Iterator[StraightThrough]:
    """Run what is inside with the gradient passed through what blocks it, and leave torch as it was.

    Two calls can't be met by a torch function mode, so for as long as this lasts they are replaced, for this thread
    alone: entering ``torch.inference_mode``, and ``torch.from_numpy``.
    """
    mode = StraightThrough(passing)
    enabled = torch.is_grad_enabled()
    outer = getattr(_ACTIVE, "mode", None)
    with _PATCHING:
        _patch()
        _ACTIVE.mode = mode
        try:
            with mode:
                yield mode
        finally:
            _ACTIVE.mode = outer
            if outer is None:
                _unpatch()
            torch.set_grad_enabled(enabled)


_FROM_NUMPY = torch.from_numpy
_ENTER = torch.inference_mode.__enter__
_EXIT = torch.inference_mode.__exit__


def _from_numpy(ndarray: Any) -> Tensor:
    found = _FROM_NUMPY(ndarray)
    mode: StraightThrough | None = getattr(_ACTIVE, "mode", None)
    if mode is None:
        return found
    with torch._C.DisableTorchFunction():
        return mode.returned(found)


def _enter(self: torch.inference_mode) -> None:
    mode: StraightThrough | None = getattr(_ACTIVE, "mode", None)
    if mode is None or not mode.passing.blocks:
        _ENTER(self)
    else:
        mode.met += self.mode


def _exit(self: torch.inference_mode, *error: Any) -> None:
    mode: StraightThrough | None = getattr(_ACTIVE, "mode", None)
    if mode is None or not mode.passing.blocks:
        _EXIT(self, *error)


def _patch() -> None:
    torch.from_numpy = _from_numpy
    torch.inference_mode.__enter__ = _enter  # type: ignore[method-assign]
    torch.inference_mode.__exit__ = _exit  # type: ignore[method-assign]


def _unpatch() -> None:
    torch.from_numpy = _FROM_NUMPY
    torch.inference_mode.__enter__ = _ENTER  # type: ignore[method-assign]
    torch.inference_mode.__exit__ = _EXIT  # type: ignore[method-assign]


@dataclass(frozen=True)
class OwnCode:
    """The decision of a target, or all of it, run with the gradient passed through what blocks it.

    Attributes:
        passing: what the gradient is passed through.
        on_images: whether it takes images, and the trunk is looked through too; else features.
    """

    passing: Passing
    on_images: bool = False

    def __call__(self, defense: Any, x: Tensor) -> Tensor:
        """Logits ``(B, k)`` of images or features ``(B, ...)``."""
        held = x.grad if x.is_leaf else None
        with looking_through(self.passing):
            out: Tensor = run(defense, x.clone(), on_images=self.on_images)
        _detach_state(defense)
        if x.is_leaf:
            x.grad = held  # code that calls backward() leaves one
        return out


def _detach_state(defense: Any) -> None:
    """Cut what a target keeps off the graph of the pass.

    What it meant to keep without a gradient was given one too, and the graph would grow from pass to pass.
    """
    for module in modules_of(defense):
        for state in (module._buffers, vars(module)):
            for name, value in state.items():
                if isinstance(value, Tensor) and value.grad_fn is not None:
                    state[name] = value.detach()


def run(defense: Any, x: Tensor, *, on_images: bool) -> Tensor:
    """Logits of a defence, of images or of features, in floating point."""
    out: Tensor = defense.logits(defense.features(x) if on_images else x)
    return out if out.is_floating_point() else out.float()
