"""Whether a split model answers, and is differentiated, as the whole one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from msa_eval.defense.architectures import Classifier
from msa_eval.defense.calling import call
from msa_eval.targets.cut import CantSplitError

TOLERANCE = 1e-5
"""How far logits and input gradients of the split model may be off, as a share of their largest absolute value (of 1,
where logits stay below it)."""


def check_steady(again: Tensor, out: Tensor) -> None:
    """Raise a `CantSplitError` where the model answers the same images otherwise than before."""
    if not (drift := relative_difference(again, out)) <= TOLERANCE:
        raise CantSplitError(
            f"the model answers one batch differently from pass to pass (by {drift:.2g}), so its features can't be kept"
        )


def check_equivalence(model: nn.Module, classifier: Classifier, x: Tensor, out: Tensor) -> None:
    """Hold the split model to the whole one: logits, input gradients, and features without their companions."""
    with torch.inference_mode(False), torch.enable_grad():
        leaf = x.clone().requires_grad_()
        whole: Tensor = call(model, leaf)
        gradient = _gradient(whole, leaf)
        z: Tensor = call(classifier.features, leaf)
        logits = classifier.logits(z)
        split_gradient = _gradient(logits, leaf)
    with torch.no_grad():
        check_steady(whole.detach(), out)
        apart = relative_difference(call(classifier.features, x[:1]), z[:1])
        off, gradients_off = (
            relative_difference(logits, out),
            relative_difference(split_gradient, gradient, absolute=0.0),
        )
    wrong = (
        f"its logits change by {off:.2g}" if not off <= TOLERANCE
        else f"its input gradients change by {gradients_off:.2g} of their size" if not gradients_off <= TOLERANCE
        else f"features depend on the other images of the batch (by {apart:.2g})" if not apart <= 1e-3
        else None
    )  # fmt: skip
    if wrong:
        cut: Any = classifier.trunk.cut
        raise CantSplitError(f"the model was cut at its layer {cut.head!r}, but then {wrong}")


def check_answers(model: nn.Module, classifier: Classifier, x: Tensor) -> None:
    """Hold the split model's logits to the whole one's on real images, and on all-black and all-white ones."""
    cut: Any = classifier.trunk.cut
    with torch.inference_mode(False), torch.no_grad():
        for images in (x, torch.stack([torch.zeros_like(x[0]), torch.ones_like(x[0])])):
            whole, joined = (torch.nan_to_num(call(answer, images)) for answer in (model, classifier))
            if not (off := relative_difference(joined, whole)) <= TOLERANCE:
                raise CantSplitError(
                    f"the model was cut at its layer {cut.head!r}, but then its logits change by {off:.2g}"
                )


def _gradient(logits: Tensor, x: Tensor) -> Tensor:
    """The gradient of a fixed mix of the logits; zero where there is none."""
    if not logits.requires_grad:
        return torch.zeros_like(x)
    mix = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2)).to(logits)
    (gradient,) = torch.autograd.grad((logits * mix).sum(), x, allow_unused=True)
    return torch.zeros_like(x) if gradient is None else gradient


def relative_difference(value: Tensor, expected: Tensor, *, absolute: float = 1.0) -> float:
    """The largest difference, as a share of the largest expected value or of ``absolute`` where that is larger."""
    if value.shape != expected.shape:
        return float("inf")
    scale = max(float(expected.abs().max()), absolute) or 1.0
    return float((value - expected).abs().max()) / scale
