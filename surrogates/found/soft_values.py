"""Differentiable stand-ins for tensors that can't carry a gradient: integers, comparisons and indices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def attach(hard: Tensor, soft: Tensor) -> Tensor:
    """The value of ``hard`` with the gradient of ``soft``, of the same shape.

    >>> x = torch.tensor([0.7], requires_grad=True)
    >>> attach(x.detach().round(), 2 * x)
    tensor([1.], grad_fn=<AddBackward0>)
    """
    return hard.detach() + (soft - soft.detach())


def temperature(scores: Tensor, dim: int) -> Tensor:
    """What scores are divided by before a softmax stands in for their argmax: at most 1, less where they are close."""
    spread = scores.detach().float().std(dim=dim, keepdim=True).mean()
    return (spread / 2).clamp(1e-12, 1.0)


class SoftValues:
    """The stand-ins made in one pass of a model, by the tensor they stand for.

    A tensor is kept as long as the table is, so that no other can be taken for it.
    """

    def __init__(self) -> None:
        self._values: dict[int, tuple[Tensor, Tensor]] = {}
        self._classes: dict[int, tuple[Tensor, Tensor]] = {}

    def put(self, hard: Tensor, soft: Tensor) -> Tensor:
        """Let a float tensor of its shape stand for a tensor; returns the latter."""
        self._values[id(hard)] = hard, soft
        return hard

    def put_index(self, index: Tensor, probabilities: Tensor) -> Tensor:
        """Let probabilities ``(*index.shape, k)`` stand for an index in 0..k-1; returns the index."""
        self._classes[id(index)] = index, probabilities
        return index

    def of(self, value: Any) -> Tensor | None:
        """What stands for a tensor, if anything does."""
        found = self._values.get(id(value))
        return None if found is None else found[1]

    def of_index(self, value: Any) -> Tensor | None:
        """The probabilities that stand for an index, if any do."""
        found = self._classes.get(id(value))
        return None if found is None else found[1]

    def concerns(self, values: Any) -> bool:
        """Whether something stands for one of some arguments."""
        if isinstance(values, list | tuple):
            return any(self.concerns(value) for value in values)
        return id(values) in self._values

    def replaced(self, values: Any) -> Any:
        """Arguments with what stands for them in their place."""
        if isinstance(values, list | tuple):
            return type(values)(self.replaced(value) for value in values)
        soft = self.of(values)
        return values if soft is None else soft


def probabilities(scores: Tensor, dim: int) -> Tensor:
    """Softmax of scores over a dimension, which comes last ``(..., k)``."""
    return (scores / temperature(scores, dim)).softmax(dim).movedim(dim, -1)


def one_hot_of(chance: Tensor, width: int) -> Tensor:
    """Probabilities ``(..., k)`` padded with zeros to a width."""
    if width <= chance.shape[-1]:
        return chance
    return torch.cat([chance, chance.new_zeros(*chance.shape[:-1], width - chance.shape[-1])], dim=-1)


LOGICAL = frozenset({"__and__", "logical_and", "__or__", "logical_or", "__invert__", "logical_not", "bitwise_not"})


def logical(name: str, args: Sequence[Tensor]) -> Tensor:
    """What stands for a logical combination of comparisons: products of what stands for each.

    >>> logical("__or__", (torch.tensor(0.5), torch.tensor(0.5)))
    tensor(0.7500)
    """
    plain = name.strip("_")
    first = args[0].float()
    if plain in ("invert", "logical_not", "bitwise_not"):
        return 1 - first
    second = args[1].float()
    return first * second if plain in ("and", "logical_and") else first + second - first * second
