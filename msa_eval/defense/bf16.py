"""A private copy of a trunk for searches in bfloat16: rounded once, and its batch norm folded away.

Autocast rounds every weight anew in every pass, which costs most where few images are passed. The copy only serves to
search; the target stays as it is, and gives all verdicts.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from msa_eval.defense.contract import Defense, WholeModel, modules_of
from msa_eval.defense.micro_batches import MicroBatched, in_parts, parts_of, passed_last, unwrap

PROBED = 2

ROUGHER = 3.0
"""A copy's features may be so many times as far off as those of autocast."""

FLOOR = 1e-3
"""What is closer to the target's features than this share of their norm is close enough."""

ROUNDED = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
"""Layers whose weights autocast would round; subclasses may do more with theirs, and stay as they are."""


class Copied(MicroBatched):
    """A copy that takes a batch in the same parts as the target: where memory is short for one, it is for both.

    Args:
        defense: the copy.
        target: what it is a copy of.
        channels_last: whether images are passed so.
    """

    def __init__(self, defense: Defense, target: Defense, channels_last: bool | None) -> None:
        self._target = target
        super().__init__(defense, parts_of(target), channels_last)

    def __reduce__(self) -> tuple[Any, ...]:
        return Copied, (self.whole, self._target, self._asked_channels_last)

    def passed(self, part: Tensor) -> Tensor:
        """Features of what fits; in a backward pass by parts there is no autocast around it."""
        with torch.autocast(part.device.type, dtype=torch.bfloat16):
            return super().passed(part).float()

    @property
    def size(self) -> int | None:
        """The largest part that fits."""
        return parts_of(self._target)

    @size.setter
    def size(self, size: int | None) -> None:
        assert isinstance(self._target, MicroBatched)
        self._target.size = size


def bf16_features(defense: Defense, x: Tensor) -> Tensor:
    """Features ``(B, ...)`` of images ``(B, C, H, W)`` as bfloat16 passes make them, in float32."""
    if isinstance(defense, Copied):  # which does so by itself
        return defense.features(x)
    with torch.autocast(x.device.type, dtype=torch.bfloat16):
        return defense.features(x).float()


def bf16_copy(defense: Defense, x: Tensor) -> Defense | None:
    """A copy of a defence for `bf16_features`, tried on two images.

    Args:
        defense: the target, in evaluation mode.
        x: images ``(B, C, H, W)``.

    Returns:
        the copy, whose features alone are of use; ``None`` where it would gain nothing, or gives others.
    """
    x, whole, last = x[:PROBED].detach(), unwrap(defense), passed_last(defense)
    if isinstance(whole, WholeModel) or not any(type(module) in ROUNDED for module in _modules(whole)):
        return None
    with torch.no_grad():
        expected = defense.features(x)
        allowed = ROUGHER * _apart(bf16_features(defense, x), expected)
        for fold in (True, False):
            defense.features(1 - x[:1])  # what a trunk keeps of its last pass must not look like a copy's answer
            try:
                other = Copied(_duplicate(whole), in_parts(defense), last)
                pairs = _followed(other, x)
                if fold and not pairs:
                    continue
                if fold:
                    _fold(other.whole, pairs)
                _round(other.whole, last=last)
                if _apart(bf16_features(other, x), expected) <= max(allowed, FLOOR):
                    return other
            except Exception:
                continue  # what can't be copied, taken apart or put together again is passed as it is
    return None


def _duplicate(whole: Defense) -> Defense:
    """A copy that shares no module, weight or buffer with the target: it will be changed.

    Raises:
        ValueError: when it shares one.
    """
    other = copy.deepcopy(whole)
    ours, theirs = ({id(part) for part in _parts(defense)} for defense in (whole, other))
    if ours & theirs:
        raise ValueError("a copy of the defence shares modules with it")
    return other


def _parts(defense: Defense) -> list[object]:
    modules = _modules(defense)
    return [*modules, *(values for module in modules for values in (*module.parameters(), *module.buffers()))]


def _apart(found: Tensor, expected: Tensor) -> float:
    """How far features lie apart, as a share of their norm; infinity where they are others or not finite."""
    if found.shape != expected.shape:
        return math.inf
    share = float((found - expected).norm() / (expected.norm() + 1e-30))
    return math.inf if math.isnan(share) else share


def _modules(defense: Defense) -> set[nn.Module]:
    return {module for root in modules_of(defense) for module in root.modules()}


def _fold(defense: Defense, pairs: list[tuple[nn.Conv2d, nn.BatchNorm2d]]) -> None:
    """Fold each batch norm into the convolution before it."""
    for conv, norm in pairs:
        assert norm.running_mean is not None
        assert norm.running_var is not None
        weight, bias = fuse_conv_bn_weights(
            conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
        )
        conv.weight, conv.bias = nn.Parameter(weight, False), nn.Parameter(bias, False)
    gone = {norm for _, norm in pairs}
    for parent in _modules(defense):
        for name, child in parent.named_children():
            if child in gone:
                setattr(parent, name, nn.Identity())


def _followed(other: Copied, x: Tensor) -> list[tuple[nn.Conv2d, nn.BatchNorm2d]]:
    """The convolutions of a copy whose output goes straight into a batch norm, each called once.

    Raises:
        ValueError: when the copy's features are made by none of its own layers.
    """
    modules = _modules(other.whole)
    made: dict[int, tuple[nn.Conv2d, Tensor, int]] = {}
    calls: Counter[nn.Module] = Counter()
    pairs: list[tuple[nn.Conv2d, nn.BatchNorm2d]] = []

    def leave(conv: nn.Module, given: object, out: Tensor) -> None:
        assert isinstance(conv, nn.Conv2d)
        calls[conv] += 1
        made[id(out)] = (conv, out, out._version)  # kept, so that no other tensor gets its id

    def enter(norm: nn.Module, given: tuple[Tensor, ...]) -> None:
        assert isinstance(norm, nn.BatchNorm2d)
        calls[norm] += 1
        conv, out, version = made.get(id(given[0]), (None, given[0], 0))
        if conv is not None and out._version == version and norm.running_mean is not None:
            pairs.append((conv, norm))

    used: set[nn.Module] = set()
    hooks = [module.register_forward_pre_hook(lambda layer, given: used.add(layer)) for module in modules]
    for module in modules:
        if type(module) is nn.Conv2d:
            hooks.append(module.register_forward_hook(leave))
        elif type(module) is nn.BatchNorm2d:
            hooks.append(module.register_forward_pre_hook(enter))
    try:
        other.features(x)
    finally:
        for hook in hooks:
            hook.remove()
    if not any(type(module) in ROUNDED for module in used):
        raise ValueError("the copy passes images through layers that are not its own")
    return [(conv, norm) for conv, norm in pairs if calls[conv] == calls[norm] == 1]


def _round(defense: Defense, *, last: bool) -> None:
    """Round the weights that autocast would round, laid out as the images are."""
    for module in _modules(defense):
        if type(module) in ROUNDED:
            module.to(torch.bfloat16)
            if last and isinstance(module, nn.Conv2d):
                module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
