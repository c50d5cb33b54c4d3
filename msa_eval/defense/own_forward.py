"""Whether a model's trunk and decision together are the model: what ``forward`` answers is what counts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from msa_eval.defense.contract import Defense, WholeModel, check_evaluating, own_surrogates
from msa_eval.defense.micro_batches import is_out_of_memory
from msa_eval.randomness import seeded

IMAGES, PERTURBED = 32, 8
"""The two answer to so many clean images in one batch, and to so many perturbed ones."""

NOISE = 8 / 255
"""The perturbed images are that far from clean ones: a forward may do something off the 8-bit grid alone."""

SAME = 1e-4
"""Answers that differ by less than this share of the logits' range are the same."""


def counted(target: Any, x: Tensor) -> Defense:
    """The model that counts where a target has a trunk and a ``forward`` (or ``__call__``) of its own.

    Both are asked about a clean batch and a perturbed one, under the same seed. Where ``forward`` gives no answer, the
    trunk and its decision are the model. Where it gives another one, the whole model counts.

    Args:
        target: an object with ``features`` and ``logits``, in evaluation mode.
        x: a clean batch of images ``(B, C, H, W)`` on the target's device.

    Returns:
        the target itself, or a `WholeModel` that says why.

    Raises:
        ValueError: when the whole model would count, but can't be evaluated as one.
    """
    if not callable(target) or _unimplemented(target):
        return target  # type: ignore[no-any-return]
    check_evaluating(target)
    size = len(x)
    while True:
        try:
            found = _difference(target, x[:size]) or _difference(target, _perturbed(x[: min(size, PERTURBED)]))
        except (RuntimeError, MemoryError) as error:
            if size == 1 or not is_out_of_memory(error):
                raise
            size = (size + 1) // 2
        else:
            return _whole(target, found) if found else target


def _unimplemented(target: object) -> bool:
    return isinstance(target, nn.Module) and type(target).forward is nn.Module.forward


def _perturbed(x: Tensor) -> Tensor:
    noise = torch.rand(x.shape, generator=torch.Generator().manual_seed(0)).to(x) * 2 - 1
    return (x + NOISE * noise).clamp(0, 1)


def _difference(target: Any, x: Tensor) -> str:
    """How ``forward`` differs from the trunk and its decision on a batch, in words; empty where it does not."""
    with torch.inference_mode(False), torch.no_grad():
        whole = _answer(target, x)
        if isinstance(whole, Exception):
            return ""
        again = _answer(target, x)
        parts = _answer(lambda images: target.logits(target.features(images)), x)
    if isinstance(parts, Exception):
        return f"logits(features(x)) fails ({type(parts).__name__}: {parts}), and forward(x) does not"
    if not isinstance(parts, Tensor):
        return ""  # a broken contract, of which the evaluation tells
    logits = _logits(whole, parts)
    if logits is None:
        raise ValueError(
            f"forward(x) of {type(target).__name__} returns {_described(whole)}, which can't be compared with "
            f"logits(features(x)) of shape {tuple(parts.shape)}; let it return logits, or leave features and logits out"
        )
    repeated = _logits(again, parts)
    # What no seed of torch repeats can only be compared with its own spread.
    spread = 0.0 if repeated is None else _distance(logits, repeated)
    scale = float((top := logits[logits.isfinite()]).max() - top.min()) if bool(logits.isfinite().any()) else 1.0
    distance = _distance(logits, parts.float())
    if distance <= SAME * max(scale, 1e-12) + 3 * spread:
        return ""
    flips = int((logits.argmax(dim=1) != parts.argmax(dim=1)).sum())
    return (
        f"its forward(x) is not logits(features(x)): logits differ by up to {distance:.3g}, "
        f"and {flips} of {len(x)} images get another class"
    )


def _answer(ask: Callable[[Tensor], Any], x: Tensor) -> Any:
    """What comes of a batch under a fixed seed, or the error that does."""
    with seeded(0), torch.autocast(x.device.type, enabled=False):
        try:
            return ask(x.clone())
        except Exception as error:
            if is_out_of_memory(error):
                raise
            return error


def _logits(answer: Any, like: Tensor) -> Tensor | None:
    """The logits in an answer: itself, or the first tensor of their shape in a tuple, list or dict."""
    values = answer.values() if isinstance(answer, dict) else answer if isinstance(answer, tuple | list) else [answer]
    fitting = (value for value in values if isinstance(value, Tensor) and value.shape == like.shape)
    found = next(fitting, None)
    return None if found is None else found.float()


def _distance(first: Tensor, second: Tensor) -> float:
    """The largest difference of two answers; the same infinities and NaNs are none."""
    same = (first == second) | (first.isnan() & second.isnan())
    return float((first - second).abs().masked_fill(same, 0).nan_to_num(nan=float("inf")).max())


def _described(answer: Any) -> str:
    return f"shape {tuple(answer.shape)}" if isinstance(answer, Tensor) else f"a {type(answer).__name__}"


def _whole(target: Any, why: str) -> WholeModel:
    """The whole model in place of its parts.

    Raises:
        ValueError: when it brings surrogates, which are functions of features.
    """
    if own_surrogates(target):
        raise ValueError(
            f"{type(target).__name__}: {why}. So the whole model counts, but its surrogates take features; let "
            f"logits(features(x)) be the model, or give WholeModel(model) with surrogates of images"
        )
    declared = getattr(target, "batch_dependent", None)
    return WholeModel(target, batch_dependent=True if declared is True else None, why=why)
