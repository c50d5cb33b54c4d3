"""Targets that take gradients of their own within a forward, such as those that adapt at test time.

A search follows the gradient of the answer to the images. The steps that a target takes on its way, and the weights
that they leave, are constants of that gradient.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn


class OwnGradients(Enum):
    """Whether a target takes gradients within its forward."""

    NONE = "none that its weights' gradients are needed for"
    TAKEN = "it takes them, and switches them on by itself"
    SWITCHED_ON = "it takes them where they are switched on for it"


def followed(
    answer: Callable[[Tensor], Tensor], x: Tensor, modules: Iterable[nn.Module], kind: OwnGradients
) -> Tensor:  # fmt: skip
    """What a part of a target answers, with a gradient to what it was given where that is followed, and no other.

    Args:
        answer: calls the part.
        x: what it is given ``(B, ...)``.
        modules: those that the target is made of.
        kind: what gradients it takes.
    """
    if not (torch.is_grad_enabled() and x.requires_grad):
        with torch.set_grad_enabled(torch.is_grad_enabled() or kind is OwnGradients.SWITCHED_ON):
            return _detached(answer(x.detach()))
    given = x.detach().requires_grad_()  # apart from the caller's, where the target's backward() would leave a gradient
    with _weights_kept(modules), _graphs_kept():
        out = answer(given)
    if not isinstance(out, Tensor) or not _leads_to(out, given):
        return _detached(out)
    joined: Tensor = _Joined.apply(x, given, out)  # type: ignore[no-untyped-call]
    return joined


class _Joined(torch.autograd.Function):
    """An answer, its gradient to what was given handed on to where that came from."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, given: Tensor, out: Tensor) -> Tensor:
        ctx.given, ctx.out = given, out
        return out.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (found,) = torch.autograd.grad(ctx.out, ctx.given, gradients[0], retain_graph=True)
        return found, None, None


def _detached(out: Tensor) -> Tensor:
    return out.detach() if isinstance(out, Tensor) else out  # anything else whoever asked for it refuses


@contextmanager
def _weights_kept(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Save weights for the way back as they are now: a step or a restore afterwards writes over them."""
    own = {
        tensor.untyped_storage().data_ptr()
        for module in modules
        for tensor in (*module.parameters(), *module.buffers())
    }

    def pack(saved: Tensor) -> Tensor:
        return saved.clone() if saved.untyped_storage().data_ptr() in own else saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        yield


@contextmanager
def _graphs_kept() -> Iterator[None]:
    """Let a backward within a forward leave the graph, which its answer may be part of."""
    backward, grad = torch.autograd.backward, torch.autograd.grad
    try:
        torch.autograd.backward = _keeping(backward)
        torch.autograd.grad = _keeping(grad)
        yield
    finally:
        torch.autograd.backward, torch.autograd.grad = backward, grad


def _keeping(function: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(function)

    @functools.wraps(function)
    def kept(*args: Any, **named: Any) -> Any:
        bound = signature.bind(*args, **named)
        bound.arguments["retain_graph"] = True
        return function(*bound.args, **bound.kwargs)

    return kept


def _leads_to(out: Tensor, given: Tensor) -> bool:
    """Whether the gradient of an answer leads to what was given."""
    seen, left = set(), [out.grad_fn]
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        if getattr(node, "variable", None) is given:
            return True
        seen.add(node)
        left += [before for before, _ in node.next_functions]
    return False
