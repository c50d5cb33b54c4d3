"""What the toolkit needs of a model under attack, and how any model is made to fit.

A defence is a *trunk* ``features(x) -> z`` and a *decision* ``logits(z) -> (B, k)`` that may look at the whole batch.
The split is what makes an evaluation cheap: one trunk pass serves every surrogate and the hard decision.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn


@runtime_checkable
class Defense(Protocol):
    """A model under attack.

    Three attributes are optional. ``batch_dependent`` says whether ``logits`` looks at other rows; where it is missing
    or ``None``, `looks_batch_dependent` finds out. ``fc_logits(z)`` and further differentiable decisions make more
    surrogates available. ``fc_target`` is the plain classifier the defence was built on, evaluated beside it.
    """

    def features(self, x: Tensor) -> Tensor:
        """Map images ``(B, C, H, W)`` in [0, 1] to features ``(B, ...)``, each row from its own image alone."""
        ...

    def logits(self, z: Tensor) -> Tensor:
        """Decide a whole batch of features: logits ``(B, k)``."""
        ...


class WholeModel:
    """Any module from images to logits as a defence whose features are the images themselves.

    Args:
        model: maps images ``(B, C, H, W)`` in [0, 1] to logits ``(B, k)``.
        batch_dependent: whether an image's logits may depend on its companions; ``None`` to find out.
    """

    def __init__(self, model: nn.Module, *, batch_dependent: bool | None = None) -> None:
        self.model = model
        self.batch_dependent = batch_dependent

    def features(self, x: Tensor) -> Tensor:
        """Return the images as they are."""
        return x

    def logits(self, z: Tensor) -> Tensor:
        """Run the model on a batch of images."""
        out: Tensor = self.model(z)
        return out


def as_defense(target: object) -> Defense:
    """Make a defence of anything that can be one.

    Args:
        target: an object with ``features`` and ``logits``, or a module from images to logits.

    Raises:
        ValueError: when it is neither.

    >>> as_defense(nn.Flatten()).features.__doc__
    'Return the images as they are.'
    """
    if isinstance(target, type):
        raise ValueError(f"expected a defence, but got the class {target.__name__}; pass an instance of it")
    if isinstance(target, Defense):
        return target
    if isinstance(target, nn.Module):
        return WholeModel(target)
    raise ValueError(
        f"expected an object with features(x) and logits(z), or a torch module from images to logits, "
        f"but got {type(target).__name__}"
    )


def decide(defense: Defense, z: Tensor) -> Tensor:
    """The verdict of the hard target: its logits ``(B, k)`` in float32, whatever the search used."""
    with torch.no_grad(), torch.autocast(z.device.type, enabled=False):
        return defense.logits(z.float()).float()


def looks_batch_dependent(defense: Defense, z: Tensor, logits: Tensor) -> bool:
    """Whether a batch is decided differently in another order, or in halves.

    The answer only steers a query attack: on a defence that seems static it asks about changed rows alone, but what
    it finds is believed only after the whole batch was decided.

    Args:
        defense: the target; a stochastic one counts as dependent.
        z: features ``(B, ...)`` of a clean batch.
        logits: its logits ``(B, k)``.
    """
    if len(z) < 2:
        return True
    half = len(z) // 2
    others = (decide(defense, z.flip(0)).flip(0), torch.cat([decide(defense, z[:half]), decide(defense, z[half:])]))
    tolerance = 1e-4 * float(logits.abs().max())
    return any(float((other - logits).abs().max()) > tolerance for other in others)


def modules_of(defense: object) -> list[nn.Module]:
    """The modules a defence is made of: itself, or those among its attributes."""
    if isinstance(defense, nn.Module):
        return [defense]
    return [value for value in vars(defense).values() if isinstance(value, nn.Module)]


@contextmanager
def without_weight_gradients(*defenses: object) -> Iterator[None]:
    """Switch weight gradients off for a while, and leave every parameter as it was found.

    Raises:
        ValueError: when a model is in training mode, where batch statistics and dropout would be measured.
    """
    modules = [module for defense in defenses for module in modules_of(defense)]
    if any(module.training for module in modules):
        raise ValueError("the model is in training mode; call .eval() on it before it is evaluated")
    learning = [p for module in modules for p in module.parameters() if p.requires_grad]
    try:
        for parameter in learning:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)
