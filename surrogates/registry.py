"""The one registry: surrogates by name."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from msa_eval.defense.calling import call, logits_in

Decision = Callable[[Any, Tensor], Tensor]
"""``(defense, features (B, ...)) -> logits (B, k)``, differentiable in the features."""


@dataclass(frozen=True)
class Surrogate:
    """A differentiable stand-in for a defence's decision, on the defence's own trunk.

    Attributes:
        name: as protocols and tables call it.
        logits: the decision. It may look at the whole batch.
        applies: whether a defence has what this surrogate needs.
        on_images: ``logits`` takes images instead of features: a model with a trunk of its own, which costs a pass.
        passes: how many passes of that model it takes, where it averages over several.
    """

    name: str
    logits: Decision
    applies: Callable[[Any], bool] = lambda defense: True
    on_images: bool = False
    passes: int = 1


SurrogateLike = Decision | nn.Module | Surrogate
"""What a caller may give as a surrogate of his own."""

_REGISTRY: dict[str, Surrogate] = {}
_FAMILIES: dict[str, Callable[[float], Surrogate]] = {}


def register(surrogate: Surrogate) -> Surrogate:
    """Make a surrogate available by its name.

    Raises:
        ValueError: when the name is taken.
    """
    if surrogate.name in _REGISTRY:
        raise ValueError(f"there is already a surrogate {surrogate.name!r}; choose another name")
    _REGISTRY[surrogate.name] = surrogate
    return surrogate


def register_family(name: str, make: Callable[[float], Surrogate]) -> None:
    """Make surrogates with a parameter available, as ``name@value``.

    Raises:
        ValueError: when the name is taken.
    """
    if name in _FAMILIES:
        raise ValueError(f"there is already a family of surrogates {name!r}; choose another name")
    _FAMILIES[name] = make


def available() -> list[str]:
    """The names of all registered surrogates, sorted."""
    return sorted(_REGISTRY)


def get(name: str, own: Mapping[str, SurrogateLike] | None = None) -> Surrogate:
    """Look a surrogate up.

    Args:
        name: its name, or ``family@value`` such as ``soft-hybrid@0.5``.
        own: surrogates of the caller's own; they come first. A function takes the defence and its features, a module
            takes images.

    Raises:
        ValueError: when there is none of that name.

    >>> get("ste").name
    'ste'
    >>> get("fc-orcale")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ValueError: unknown surrogate 'fc-orcale'; did you mean 'fc-oracle'? available: ...
    """
    own = own or {}
    if name in own:
        return _named(name, own[name])
    family, _, value = name.partition("@")
    if family in _FAMILIES and value:
        try:
            number = float(value)
        except ValueError:
            raise ValueError(f"surrogate {name!r}: expected a number after the @") from None
        return _FAMILIES[family](number)
    if name not in _REGISTRY:
        names = [*sorted({*own, *_REGISTRY}), *(f"{family}@VALUE" for family in _FAMILIES)]
        close = difflib.get_close_matches(name, names, n=1)
        hint = f" did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"unknown surrogate {name!r};{hint} available: {', '.join(names)}")
    return _REGISTRY[name]


def _named(name: str, own: SurrogateLike) -> Surrogate:
    if isinstance(own, Surrogate):
        return replace(own, name=name)
    if isinstance(own, nn.Module):
        model = own  # bound here, because mypy forgets the narrowing inside the function
        return Surrogate(name, lambda defense, x: _logits(call(model, x)), on_images=True)
    decision = own
    return Surrogate(name, lambda defense, z: _logits(call(functools.partial(decision, defense), z)))


def _logits(answer: Any) -> Tensor:
    """The logits in the answer of a caller's code."""
    out: Tensor = logits_in(answer).value
    return out
