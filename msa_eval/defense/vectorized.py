"""Many batches decided in one call of the target's code, by `torch.vmap`, where that gives the same answers.

Nothing is assumed of the code: before it is called so, two batches are decided one after the other and at once, under
the same seed. Code whose answers differ then, that keeps something of a call, or that can't be called so (it looks at
values, writes in place, leaves torch, draws from generators other than torch's own), is called once a batch, always. So
is all code where gradients are followed: under `torch.vmap` some come out wrong where a norm or a distance is near
zero, though the values are right.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from msa_eval.defense.contract import Defense, modules_of
from msa_eval.defense.micro_batches import is_out_of_memory, unwrap
from msa_eval.randomness import seeded

ROOM = 2**20
"""So many values are given to a call at most; a batch of which no two have room is decided by itself."""

SAME = 1e-4
"""Two answers are the same up to this share of the largest logit."""

Key = tuple[object, ...]

_vectorizes: WeakKeyDictionary[object, dict[Key, bool]] = WeakKeyDictionary()


def decide_many(defense: Defense, batches: Tensor, **settings: Any) -> Tensor:
    """The target's answers to several batches of features.

    A target that answers at random draws anew for each.

    Args:
        defense: the target.
        batches: features ``(n, b, ...)``.
        settings: passed on to the decision.

    Returns:
        logits ``(n, b, k)``.
    """
    if vectorizes(defense, batches, settings):
        try:
            return _at_once(defense, batches, settings, randomness="different")
        except Exception as error:
            if not is_out_of_memory(error):
                _vectorizes[defense][_key(batches, settings)] = False
    return torch.stack([defense.logits(batch, **settings) for batch in batches])


def has_room(batch: Tensor) -> bool:
    """Whether there is room for two such batches in a call."""
    return 2 * batch.numel() <= ROOM


def _at_once(defense: Defense, batches: Tensor, settings: Mapping[str, Any], *, randomness: str) -> Tensor:
    call: Callable[[Tensor], Tensor] = torch.vmap(
        lambda batch: defense.logits(batch, **settings),
        randomness=randomness, chunk_size=ROOM // batches[0].numel(),
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="There is a performance drop")
        return call(batches)


def vectorizes(defense: Defense, batches: Tensor, settings: Mapping[str, Any]) -> bool:
    """Whether a target's code is called so on batches of this shape, by trial on two of them."""
    if torch.is_grad_enabled() or len(batches) < 2 or not has_room(batches[0]):
        return False
    try:
        known = _vectorizes.setdefault(defense, {})
    except TypeError:  # no weak reference can be made to it
        return False
    key = _key(batches, settings)
    if key not in known:
        known[key] = _gives_the_same(defense, batches[:2], settings)
    return known[key]


def _gives_the_same(defense: Defense, batches: Tensor, settings: Mapping[str, Any]) -> bool:
    expected, before = [], _held(defense)
    for batch in batches:
        with seeded(0):
            expected.append(defense.logits(batch, **settings))
    if not _same(before, _held(defense)):
        return False  # what a target keeps of a call would be a tensor of torch.vmap's own, of no use after it
    try:
        with seeded(0):
            found = _at_once(defense, batches, settings, randomness="same")
    except Exception:
        return False
    due = torch.stack(expected)
    return found.shape == due.shape and bool(((found - due).abs() <= SAME * due.abs().max()).all())


def _held(defense: Defense) -> list[tuple[Tensor, int]]:
    """The tensors that a target holds, each with the count of writes into it."""
    things = [unwrap(defense), *(part for module in modules_of(defense) for part in module.modules())]
    found: list[tuple[Tensor, int]] = []

    def walk(value: object) -> None:
        if isinstance(value, Tensor):
            found.append((value, -1 if value.is_inference() else value._version))
        elif isinstance(value, Mapping):
            for entry in list(value.values()):
                walk(entry)
        elif isinstance(value, list | tuple | deque):
            for entry in value:
                walk(entry)

    for thing in things:
        walk(getattr(thing, "__dict__", {}))
    return found


def _same(before: Sequence[tuple[Tensor, int]], after: Sequence[tuple[Tensor, int]]) -> bool:
    """Whether the same tensors are held, and none was written into."""
    pairs = zip(before, after, strict=False)
    return len(before) == len(after) and all(one is other and a == b for (one, a), (other, b) in pairs)


def _key(batches: Tensor, settings: Mapping[str, Any]) -> Key:
    return (batches.shape[1:], batches.dtype, *sorted(settings))
