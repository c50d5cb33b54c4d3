"""The trunk that searches use, where it differs from the one that gives the verdicts.

Verdicts are float32, by the target as it is. A search may pass its points in bfloat16, where the hardware gains by it:
what such features seem to break is passed once more in float32, in its batch, before it counts.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from msa_eval.defense.bf16 import bf16_copy, bf16_features
from msa_eval.defense.contract import Defense, WholeModel
from msa_eval.defense.micro_batches import unwrap

PRECISIONS = ("auto", "fp32", "bf16")

WORTH = 1.5
"""Passes in bfloat16 have to be so many times as fast, because what they seem to break costs a second pass."""

PROBED, ROUNDS = 16, 3
"""So many images are passed, in turns so often, to find that out."""

FEW, HOPELESS = 2, 3.0
"""Where so few images take so many times as long in bfloat16, a processor that emulates it, no more are passed."""


@dataclass(frozen=True)
class SearchPrecision:
    """How a search passes its points.

    Attributes:
        asked: for which precision, of `PRECISIONS`.
        rough: whether it passes them in bfloat16.
        gain: how many times as fast that was found to be; ``None`` where nothing was tried.
        trunk: a private copy that points are passed through in bfloat16; without it that is the target's own.
    """

    asked: str = "fp32"
    rough: bool = False
    gain: float | None = None
    trunk: Defense | None = None

    def about(self) -> dict[str, Any]:
        """For ``run.json``, which holds no measured time, so that it is the same when it is made again."""
        return {"asked": self.asked, "precision": "bf16" if self.rough else "fp32"}

    def features(self, defense: Defense, x: Tensor) -> Tensor:
        """Features ``(B, ...)`` of images ``(B, C, H, W)`` as the search sees them, in float32."""
        if not self.rough:
            return defense.features(x)
        return bf16_features(self.trunk or defense, x)

    def of(self, defense: Defense, x: Tensor) -> SearchPrecision:
        """The same for one target, with a copy of its trunk where that is of use, tried on some images.

        Raises:
            ValueError: when bf16 is asked for and the trunk can't be passed so.
        """
        if not self.rough:
            return self
        try:
            return dataclasses.replace(self, trunk=bf16_copy(defense, x))
        except FAILS as error:
            return SearchPrecision(_unless_asked(self.asked, error))


EXACT = SearchPrecision()
"""Points are passed as the target is."""

FAILS = (RuntimeError, TypeError, ValueError)
"""What a trunk raises that can't run in bfloat16."""


def _unless_asked(asked: str, error: Exception) -> str:
    if asked == "bf16":
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"the trunk can't run in bfloat16 ({reason}); use precision=fp32") from error
    return asked


def choose(asked: str, defense: Defense, x: Tensor) -> SearchPrecision:
    """Choose how to pass points; for ``auto`` by trying on a few images, in turns.

    A target without a trunk, whose passes are its verdicts, is passed in float32 always.

    Args:
        asked: one of `PRECISIONS`.
        defense: the target.
        x: images ``(B, C, H, W)``.

    Raises:
        ValueError: when the precision is unknown, or bf16 is asked for and the trunk can't be passed so.
    """
    if asked not in PRECISIONS:
        raise ValueError(f"unknown precision {asked!r}; choose one of {', '.join(PRECISIONS)}")
    if asked == "fp32" or isinstance(unwrap(defense), WholeModel):
        return SearchPrecision(asked)
    rough = SearchPrecision(asked, rough=True)
    try:
        before, after = _pair(rough, defense, x[:FEW])
        if asked == "bf16":
            return rough
        if after > before:  # the first pass may have had kernels to load
            before, after = _pair(rough, defense, x[:FEW])
        if after > HOPELESS * before:
            return SearchPrecision(asked, gain=before / after)
        rough = rough.of(defense, x)
        pairs = [_pair(rough, defense, x[:PROBED])]
        while pairs[-1][1] < pairs[-1][0] and len(pairs) <= ROUNDS:
            pairs.append(_pair(rough, defense, x[:PROBED]))
        gain = statistics.median(first / second for first, second in pairs[1:] or pairs)
    except FAILS as error:
        return SearchPrecision(_unless_asked(asked, error))
    return SearchPrecision(asked, rough=gain >= WORTH, gain=gain)


def _pair(rough: SearchPrecision, defense: Defense, x: Tensor) -> tuple[float, float]:
    return _seconds(SearchPrecision(), defense, x), _seconds(rough, defense, x)


def _seconds(search: SearchPrecision, defense: Defense, x: Tensor) -> float:
    """How long a pass forth and back takes.

    Raises:
        ValueError: when it makes what is not finite.
    """
    x = x.detach().requires_grad_()
    _wait(x)
    started = time.perf_counter()
    z = search.features(defense, x)
    if z.requires_grad:
        torch.autograd.grad(z.sum(), x, allow_unused=True)
    _wait(x)
    seconds = time.perf_counter() - started
    if not bool(torch.isfinite(z).all()):
        raise ValueError("its features are not finite")
    return seconds


def _wait(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
