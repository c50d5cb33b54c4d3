"""Calls of torch that block a gradient, met one by one within a pass, and made so that they pass it on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from msa_eval.surrogates.found.numpy_bridge import Exports
from msa_eval.surrogates.found.soft_values import LOGICAL, SoftValues, attach, logical, one_hot_of, probabilities

ROUNDING = frozenset({"round", "floor", "ceil", "trunc", "fix"})
COMPARING = {"gt": 1, "greater": 1, "ge": 1, "greater_equal": 1, "lt": -1, "less": -1, "le": -1, "less_equal": -1}
CASTING = frozenset(
    {"to", "type", "type_as", "float", "double", "half", "bfloat16", "long", "int", "short", "char", "byte", "bool"}
)
CLAMPING = frozenset({"clamp", "clip", "clamp_min", "clamp_max", "hardtanh", "relu6", "hardsigmoid"})
INDEXING = frozenset({"getitem", "index_select", "gather", "take_along_dim", "masked_select"})
LEAVING = frozenset({"item", "tolist", "__float__", "__int__", "__bool__", "__index__", "__format__", "__repr__"})
"""Calls that make something else than a tensor, and warn of one with a gradient."""

WIDTH = 0.25
"""The width of the sigmoid that stands for a comparison, as a share of the spread of what is compared."""


@dataclass(frozen=True)
class Passing:
    """What a gradient is passed through.

    Attributes:
        steps: rounding, integer casts, thresholds and the argmax, and code in NumPy that returns what it was given.
        blocks: ``no_grad`` and ``inference_mode``.
        detached: ``detach`` and ``data``.
        clamps: clamping.
        soft: the values of the argmax and of comparisons are soft too, not their gradient alone.
        inner: gradients that the code finds for itself are differentiated again; else they are constant.
    """

    steps: bool = True
    blocks: bool = True
    detached: bool = True
    clamps: bool = False
    soft: bool = False
    inner: bool = False

    @property
    def words(self) -> str:
        """What it is passed through."""
        named = {
            "steps and casts": self.steps, "no_grad": self.blocks, "detach": self.detached, "clamping": self.clamps,
            "soft values of the argmax": self.soft, "gradients it finds itself": self.inner,
        }  # fmt: skip
        return ", ".join(name for name, true in named.items() if true)


class StraightThrough(TorchFunctionMode):
    """Meets the calls of torch within a pass of the target.

    Attributes:
        met: how often the gradient was passed through something.
    """

    def __init__(self, passing: Passing) -> None:
        super().__init__()
        self.passing, self.met = passing, 0
        self._table = SoftValues()
        self._exports = Exports()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Make a call, and mend its gradient."""
        kwargs = dict(kwargs or {})
        if not args and "input" in kwargs:
            args = (kwargs.pop("input"),)
        return self._handler(getattr(func, "__name__", ""), args)(func, args, kwargs)

    def _handler(self, name: str, args: tuple[Any, ...]) -> Callable[..., Any]:
        """What makes a call of a name."""
        plain = name.strip("_")
        found: Callable[..., Any] = self._promoted if self.passing.steps else _called
        if not args:
            found = _called
        elif name == "__get__":
            found = self._get
        elif name in LEAVING:
            found = _leaving
        elif hasattr(self, f"_on_{plain}"):
            found = getattr(self, f"_on_{plain}")
        elif self.passing.steps and plain in ROUNDING:
            found = self._rounded
        elif self.passing.steps and plain in COMPARING and len(args) == 2:
            found = self._compared
        elif self.passing.steps and plain in CASTING:
            found = self._cast
        elif self.passing.clamps and plain in CLAMPING:
            found = self._like_identity
        elif self.passing.steps and plain in INDEXING:
            found = self._indexed
        return found

    # What blocks a gradient on purpose.

    def _get(self, func: Any, args: Any, kwargs: Any) -> Any:
        del kwargs
        if getattr(func, "__self__", None) is torch.Tensor.data and self.passing.detached and args[0].requires_grad:
            self.met += 1
            return args[0].view_as(args[0])
        return func(*args)

    def _on_set_grad_enabled(self, func: Any, args: Any, kwargs: Any) -> Any:
        if self.passing.blocks and args and not args[0]:
            self.met += torch.is_grad_enabled()
            return None
        return func(*args, **kwargs)

    def _on_detach(self, func: Any, args: Any, kwargs: Any) -> Any:
        if not self.passing.detached or not args[0].requires_grad:
            found = func(*args, **kwargs)
            soft = self._table.of(args[0])
            return found if soft is None else self._table.put(found, soft)
        self.met += 1
        return args[0].view_as(args[0])

    def _on_requires_grad(self, func: Any, args: Any, kwargs: Any) -> Any:
        value = args[0]
        if value.requires_grad and not value.is_leaf:
            return value  # detached in the code, but looked through
        return func(*args, **kwargs)

    def _on_register_hook(self, func: Any, args: Any, kwargs: Any) -> Any:
        if not self.passing.detached:
            return func(*args, **kwargs)
        self.met += 1
        return _NoHandle()

    def _on_grad(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func is not torch.autograd.grad:
            return func(*args, **kwargs)
        return func(*args, **{**kwargs, "retain_graph": True, "create_graph": self.passing.inner})

    def _on_backward(self, func: Any, args: Any, kwargs: Any) -> Any:
        return func(*args[:1], **{**kwargs, "retain_graph": True})

    # What answers in steps.

    def _rounded(self, func: Any, args: Any, kwargs: Any) -> Any:
        value = args[0]
        if not isinstance(value, Tensor) or not value.requires_grad:
            return self._promoted(func, args, kwargs)
        self.met += 1
        with torch.no_grad():
            hard = func(value.detach().clone(), *args[1:], **kwargs)
        if func.__name__.endswith("_") and not func.__name__.startswith("__"):
            return value.add_((hard - value).detach())
        return attach(hard, value)

    def _like_identity(self, func: Any, args: Any, kwargs: Any) -> Any:
        value = args[0]
        if not isinstance(value, Tensor) or not value.requires_grad:
            return self._promoted(func, args, kwargs)
        return self._rounded(func, args, kwargs)

    def _on_floordiv(self, func: Any, args: Any, kwargs: Any) -> Any:
        value = args[0]
        if self.passing.steps and isinstance(value, Tensor) and value.requires_grad:
            self.met += 1
            return attach(func(*args, **kwargs), value / args[1])
        return self._promoted(func, args, kwargs)

    _on_floor_divide = _on_floordiv

    def _on_sign(self, func: Any, args: Any, kwargs: Any) -> Any:
        value = args[0]
        if not self.passing.steps or not isinstance(value, Tensor) or not value.requires_grad:
            return func(*args, **kwargs)
        self.met += 1
        with torch.no_grad():
            hard = torch.sign(value)
        soft = attach(hard, torch.tanh(value / _spread(value)))
        return value.copy_(soft) if func.__name__.endswith("_") else soft

    _on_sgn = _on_sign

    def _on_heaviside(self, func: Any, args: Any, kwargs: Any) -> Any:
        value = args[0]
        if not self.passing.steps or not value.requires_grad:
            return func(*args, **kwargs)
        self.met += 1
        return attach(func(value.detach(), *args[1:], **kwargs), torch.sigmoid(value / (WIDTH * _spread(value))))

    def _compared(self, func: Any, args: Any, kwargs: Any) -> Any:
        way = COMPARING[func.__name__.strip("_")]
        first, second = (self._table.replaced(value) for value in args)
        hard = func(*args, **kwargs)
        if not any(isinstance(value, Tensor) and value.requires_grad for value in (first, second)):
            return hard
        self.met += 1
        gap = way * (first - second)
        soft = torch.sigmoid(gap / (WIDTH * _spread(gap)))
        return self._table.put(hard, soft if self.passing.soft else attach(hard.to(soft), soft))

    def _cast(self, func: Any, args: Any, kwargs: Any) -> Any:
        value = args[0]
        soft = self._table.of(value)
        if soft is None and not (isinstance(value, Tensor) and value.requires_grad):
            found = func(*args, **kwargs)
            chance = self._table.of_index(value)
            return found if chance is None else self._table.put_index(found, chance)
        found = func(*args, **kwargs)
        if not isinstance(found, Tensor) or found is value:
            return found
        if found.is_floating_point():
            return found if soft is None else soft.to(found.dtype)
        self.met += 1
        kept = value if soft is None else soft
        return self._table.put(found, kept if self.passing.soft and soft is not None else attach(found.to(kept), kept))

    # The argmax, and what an index is used for.

    def _on_argmax(self, func: Any, args: Any, kwargs: Any, way: int = 1) -> Any:
        found = func(*args, **kwargs)
        value = self._table.replaced(args[0])
        dim = args[1] if len(args) > 1 else kwargs.get("dim")
        if not self.passing.steps or dim is None or not value.requires_grad:
            return found
        self.met += 1
        chance = probabilities(way * value, dim)
        keep = args[2] if len(args) > 2 else kwargs.get("keepdim", False)
        return self._table.put_index(found, chance.unsqueeze(dim if dim >= 0 else dim - 1) if keep else chance)

    def _on_argmin(self, func: Any, args: Any, kwargs: Any) -> Any:
        return self._on_argmax(func, args, kwargs, way=-1)

    def _on_max(self, func: Any, args: Any, kwargs: Any, way: int = 1) -> Any:
        found = func(*args, **kwargs)
        if not isinstance(found, tuple):
            return found
        dim = args[1] if len(args) > 1 else kwargs["dim"]
        keep = args[2] if len(args) > 2 else kwargs.get("keepdim", False)
        if self.passing.steps and args[0].requires_grad and not keep:
            self._table.put_index(found[1], probabilities(way * args[0], dim))
        return found

    def _on_min(self, func: Any, args: Any, kwargs: Any) -> Any:
        return self._on_max(func, args, kwargs, way=-1)

    def _on_one_hot(self, func: Any, args: Any, kwargs: Any) -> Any:
        found = func(*args, **kwargs)
        chance = self._table.of_index(args[0])
        if chance is None or chance.shape[-1] > found.shape[-1]:
            return found
        soft = one_hot_of(chance, found.shape[-1])
        return self._table.put(found, soft if self.passing.soft else attach(found.to(soft), soft))

    def _on_scatter(self, func: Any, args: Any, kwargs: Any) -> Any:
        found = func(*args, **kwargs)
        if len(args) < 4 or not isinstance(args[3], int | float) or found.ndim < 2:
            return found
        chance = self._table.of_index(args[2])
        if chance is None or chance.shape[-1] != found.shape[-1] or not found.is_floating_point():
            return found
        soft = args[3] * chance.reshape(found.shape)
        return found.copy_(attach(found, soft)) if func.__name__.endswith("_") else attach(found, soft)

    def _on_embedding(self, func: Any, args: Any, kwargs: Any) -> Any:
        found = func(*args, **kwargs)
        chance = self._table.of_index(args[0])
        if chance is None or chance.shape[-1] != len(args[1]):
            return found
        return attach(found, chance @ args[1])

    def _indexed(self, func: Any, args: Any, kwargs: Any) -> Any:
        found = func(*args, **kwargs)
        value = args[0]
        if (soft := self._table.of(value)) is not None:
            return self._table.put(found, func(soft, *args[1:], **kwargs))
        if (chance := self._table.of_index(value)) is not None and len(args) == 2 and found.ndim == value.ndim:
            return self._table.put_index(found, func(chance, *args[1:], **kwargs))
        chance = self._table.of_index(args[-1])
        if (
            func.__name__ == "__getitem__" and chance is not None and chance.shape[-1] == len(value)
            and value.is_floating_point()
        ):  # fmt: skip
            flat = chance.flatten(0, -2) @ value.flatten(1)
            return attach(found, flat.view(found.shape))
        return found

    # Masks.

    def _on_where(self, func: Any, args: Any, kwargs: Any) -> Any:
        if len(args) != 3 or (soft := self._table.of(args[0])) is None or not self.passing.steps:
            return self._promoted(func, (args[0], *self._table.replaced(args[1:])), kwargs)
        first, second = self._table.replaced(args[1]), self._table.replaced(args[2])
        found = func(args[0], first, second)
        if not found.is_floating_point():
            return found
        if self.passing.soft:
            return soft * first + (1 - soft) * second
        gap = _constant(first) - _constant(second)
        return found + (soft - soft.detach()) * gap

    def _on_masked_fill(self, func: Any, args: Any, kwargs: Any) -> Any:
        soft = self._table.of(args[1]) if len(args) == 3 else None
        if soft is None or func.__name__.endswith("_"):
            return func(*args, **kwargs)
        found = func(*args, **kwargs)
        gap = _constant(args[2]) - args[0].detach()
        return found + (soft - soft.detach()) * gap.nan_to_num(posinf=0.0, neginf=0.0)

    def _on_setitem(self, func: Any, args: Any, kwargs: Any) -> Any:
        value, place, new = args
        soft = self._table.of(place)
        new = self._table.replaced(new)
        before = value.detach().clone() if soft is not None and soft.shape == value.shape else None
        func(value, place, new)
        if before is not None and soft is not None and value.is_floating_point() and not isinstance(new, Tensor):
            value.add_((soft - soft.detach()) * (new - before))

    # Code that leaves torch.

    def _on_numpy(self, func: Any, args: Any, kwargs: Any) -> Any:
        value = args[0]
        self._exports.leaves(value, self._table.of(value))
        return func(value.detach(), *args[1:], **kwargs)

    def _on_array(self, func: Any, args: Any, kwargs: Any) -> Any:
        self._exports.leaves(args[0], self._table.of(args[0]))
        return func(args[0].detach(), *args[1:], **kwargs)

    def _on_tensor(self, func: Any, args: Any, kwargs: Any) -> Any:
        return self.returned(func(*args, **kwargs))

    _on_as_tensor = _on_tensor

    def returned(self, found: Tensor) -> Tensor:
        """A tensor made of NumPy's values, with the gradient of what they were made of, as far as that can be told."""
        if not self.passing.steps or (source := self._exports.source_of(found)) is None:
            return found
        self.met += 1
        if found.is_floating_point():
            return attach(found, source.to(found.dtype))
        return self._table.put(found, attach(found.to(source), source))

    def _promoted(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Any other call: what stands for its arguments takes their place."""
        if not self._table.concerns(args):
            return func(*args, **kwargs)
        soft = self._table.replaced(args)
        if func.__name__.endswith("_") and not func.__name__.startswith("__") and soft[0] is not args[0]:
            soft = (soft[0].clone(), *soft[1:])
        found = func(*args, **kwargs)
        try:
            stands = logical(func.__name__, soft) if func.__name__ in LOGICAL else func(*soft, **kwargs)
        except (RuntimeError, TypeError, IndexError, ValueError):
            return found
        if not isinstance(found, Tensor) or not isinstance(stands, Tensor) or stands.shape != found.shape:
            return found
        if not stands.requires_grad:
            return found
        if found.is_floating_point():
            return stands.to(found.dtype)
        return self._table.put(found, stands)


def _called(func: Any, args: Any, kwargs: Any) -> Any:
    return func(*args, **kwargs)


def _leaving(func: Any, args: Any, kwargs: Any) -> Any:
    return func(*(value.detach() if isinstance(value, Tensor) else value for value in args), **kwargs)


class _NoHandle:
    """What a hook that is not set returns."""

    def remove(self) -> None:
        """Remove nothing."""


def _spread(value: Tensor) -> Tensor:
    return value.detach().float().std(correction=0).clamp_min(1e-12)


def _constant(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value
