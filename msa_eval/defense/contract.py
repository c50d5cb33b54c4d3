"""What the toolkit needs of a model under attack, and how any model is made to fit.

A defence is a *trunk* ``features(x) -> z`` and a *decision* ``logits(z) -> (B, k)`` that may look at the whole batch.
The split is what makes an evaluation cheap: one trunk pass serves every surrogate and the hard decision.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from types import FunctionType, MethodType, ModuleType
from typing import Any, Protocol, TypeGuard, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd

from msa_eval.defense.calling import call, logits_in, no_logits
from msa_eval.defense.own_gradients import OwnGradients, followed

TORCHS_OWN = ("torch.nn.", "torch.ao.nn.")
"""Modules of torch's layers."""


@runtime_checkable
class Defense(Protocol):
    """A model under attack.

    Four attributes are optional. ``batch_dependent`` says whether ``logits`` looks at other rows; where it is missing,
    it is taken to. ``fc_logits(z)`` makes the surrogate ``fc-oracle`` available, and ``surrogates`` brings more: a dict
    of functions ``(defense, z) -> (B, k)``, differentiable in ``z``, by name. ``fc_target`` is the plain classifier the
    defence was built on, evaluated beside it.

    >>> class Rounding:  # a hard decision, and a smooth stand-in for it
    ...     def features(self, x):
    ...         return x.flatten(1)
    ...
    ...     def logits(self, z):
    ...         return z.round()
    ...
    ...     surrogates = {"smooth": lambda defense, z: z}
    >>> isinstance(Rounding(), Defense)
    True
    """

    def features(self, x: Tensor) -> Tensor:
        """Map images ``(B, C, H, W)`` in [0, 1] to features ``(B, ...)``, each row from its own image alone."""
        ...

    def logits(self, z: Tensor) -> Tensor:
        """Decide a whole batch of features: logits ``(B, k)``."""
        ...


class WholeModel:
    """Any module or function from images to logits as a defence whose features are the images themselves.

    Args:
        model: maps images ``(B, C, H, W)`` in [0, 1] to logits ``(B, k)``. Its ``surrogates``, if it has any, are
            functions ``(model, x) -> (B, k)``.
        batch_dependent: whether an image's logits may depend on its companions; ``None`` to find out on a clean batch.
        why: of a model with a trunk, why it is evaluated as a whole.

    Attributes:
        note: which of the model's answers are its logits, where it answers with more than one.
        own_gradients: what gradients the model takes by itself, once that was tried.
    """

    def __init__(
        self, model: Callable[[Tensor], Any], *, batch_dependent: bool | None = None, why: str = ""
    ) -> None:  # fmt: skip
        self.model = model
        self.batch_dependent = batch_dependent
        self.why, self.note = why, ""
        self.own_gradients = OwnGradients.NONE

    def features(self, x: Tensor) -> Tensor:
        """Return the images as they are."""
        return x

    def logits(self, z: Tensor) -> Tensor:
        """Run the model on a batch of images."""
        if self.own_gradients is OwnGradients.NONE:
            return self._answer(z)
        return followed(self._answer, z, modules_of(self.model), self.own_gradients)

    def _answer(self, z: Tensor) -> Tensor:
        out: Tensor
        out, self.note = logits_in(call(self.model, z))
        return out

    @property
    def surrogates(self) -> dict[str, Any]:
        """The model's own, which are given the model."""
        return {name: self._of_the_model(own) for name, own in own_surrogates(self.model).items()}

    def _of_the_model(self, own: Any) -> Any:
        return (lambda _, x: own(self.model, x)) if callable(own) and not isinstance(own, nn.Module) else own


def own_surrogates(target: object) -> Mapping[str, Any]:
    """The surrogates that a defence or a model brings.

    Raises:
        ValueError: when its ``surrogates`` are not functions or modules by name.
    """
    brought = getattr(target, "surrogates", {})
    if not isinstance(brought, Mapping) or not all(isinstance(name, str) for name in brought):
        raise ValueError(
            f"the surrogates of {type(target).__name__} must be a dict of functions (defense, features) -> logits by "
            f"name, but got {type(brought).__name__}"
        )
    if wrong := [name for name, own in brought.items() if not callable(own) and not hasattr(own, "logits")]:
        raise ValueError(
            f"the surrogate {wrong[0]!r} of {type(target).__name__} is not a function (defense, features) -> logits"
        )
    return brought


def as_defense(target: object) -> Defense:
    """Make a defence of anything that can be one.

    Args:
        target: an object with ``features`` and ``logits``, or a module or function from images to logits.

    Whether a ``forward`` of its own answers the same is not looked at here (see `msa_eval.defense.own_forward`).

    Raises:
        ValueError: when it is neither.

    >>> as_defense(nn.Flatten()).features.__doc__
    'Return the images as they are.'
    """
    if isinstance(target, type):
        raise ValueError(f"expected a defence, but got the class {target.__name__}; pass an instance of it")
    if has_trunk(target):
        return target
    if callable(target) and not isinstance(target, nn.ModuleList | nn.ModuleDict):
        return WholeModel(target)
    raise ValueError(
        f"expected an object with features(x) and logits(z), or a module or function from images to logits, "
        f"but got {_kind(target)}"
    )


def _kind(target: object) -> str:
    if isinstance(target, Mapping) and target and all(isinstance(value, Tensor) for value in target.values()):
        return "a state dict; load it into its model first"
    if isinstance(target, nn.ModuleList | list | tuple):
        return f"a {type(target).__name__}; of an ensemble give a module that returns the mean of its logits"
    return type(target).__name__


def has_trunk(target: object) -> TypeGuard[Defense]:
    """Whether a target has a trunk and a decision: ``features`` and ``logits`` that can be called.

    >>> model = nn.Flatten()
    >>> model.features, model.logits = 512, nn.Linear(512, 10)
    >>> has_trunk(model)
    False
    """
    return callable(getattr(target, "features", None)) and callable(getattr(target, "logits", None))


def decide(defense: Defense, z: Tensor) -> Tensor:
    """The verdict of the hard target: its logits ``(B, k)`` in float32, whatever the search used.

    Raises:
        ValueError: when the target returns something else.
    """
    kind = z.device.type
    rounding = torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()
    with torch.no_grad(), rounding:
        logits = defense.logits(z.float())
    if wrong := no_logits(logits, len(z)):
        raise ValueError(wrong)
    return logits.float().detach()


def modules_of(thing: object) -> list[nn.Module]:
    """The modules a defence is made of: itself, or those among its attributes, in lists, dicts and objects too.

    Of a function, or an object that is called, also those that its code names.
    """
    found: list[nn.Module] = []
    seen: set[int] = set()

    def walk(value: object, depth: int, called: bool) -> None:
        if id(value) in seen or depth > 8:
            return
        seen.add(id(value))
        if isinstance(value, nn.Module):
            found.append(value)
        elif isinstance(value, Mapping):
            for entry in value.values():
                walk(entry, depth + 1, False)
        elif isinstance(value, list | tuple | set):
            for entry in value:
                walk(entry, depth + 1, False)
        elif called and isinstance(value, FunctionType | MethodType | functools.partial):
            for entry in _named_by(value):
                walk(entry, depth + 1, True)
        elif not isinstance(value, Tensor | type | ModuleType):
            slots = [getattr(value, name, None) for name in getattr(type(value), "__slots__", ())]
            for entry in (*getattr(value, "__dict__", {}).values(), *slots):
                walk(entry, depth + 1, called or isinstance(value, WholeModel))
            own = vars(type(value)).get("__call__")
            if called and isinstance(own, FunctionType):
                walk(own, depth + 1, True)

    walk(thing, 0, not has_trunk(thing))
    return found


def _named_by(code: Any) -> list[object]:
    """What the code of a function names: what it closes over, globals and defaults."""
    if isinstance(code, functools.partial):
        return [code.func, *code.args, *code.keywords.values()]
    if isinstance(code, MethodType):
        return [code.__self__, code.__func__]
    if code.__module__ is not None and code.__module__.split(".")[0] == "torch":
        return []
    try:
        names = inspect.getclosurevars(code)
    except ValueError:  # a name that is not bound yet
        return []
    return [*names.nonlocals.values(), *names.globals.values(), *(code.__defaults__ or ())]


def check_evaluating(*defenses: object) -> None:
    """Check that no model is in training mode, where batch statistics and dropout would be measured.

    Raises:
        ValueError: when one is.
    """
    modules = (module for defense in defenses for module in modules_of(defense))
    if training := [module for module in modules if is_training(module)]:
        raise ValueError(
            f"the model is in training mode ({type(training[0]).__name__}); call .eval() on it before it is evaluated"
        )


def is_training(module: nn.Module) -> bool:
    """Whether a module is in training mode.

    ``torch.export`` and ``torch.jit.freeze`` fix the mode: their modules' ``eval()`` raises, or they have none.
    """
    return "eval" not in vars(module) and bool(getattr(module, "training", False))


def left_training(defense: object) -> list[str]:
    """What is in training mode within models in evaluation mode, such as ``layer3.dropout (Dropout)``.

    Of torch's own layers only those that answer differently in it; of other classes all, since they may.

    >>> model = nn.Sequential(nn.Linear(2, 2), nn.Dropout()).eval()
    >>> model[0].training = model[1].training = True
    >>> left_training(model)
    ['1 (Dropout)']
    """
    named = (pair for model in modules_of(defense) for pair in _named_parts(model))
    return [f"{name} ({type(module).__name__})" for name, module in named if is_training(module) and _has_modes(module)]


def _named_parts(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The modules within a model in evaluation mode."""
    return [] if getattr(model, "training", False) else list(model.named_modules())


def _has_modes(module: nn.Module) -> bool:
    """Whether a layer may answer differently in training mode."""
    if isinstance(module, _DropoutNd):
        return module.p > 0
    if isinstance(module, nn.MultiheadAttention | nn.RNNBase):
        return float(module.dropout) > 0
    return isinstance(module, _NormBase | nn.RReLU) or not type(module).__module__.startswith(TORCHS_OWN)
