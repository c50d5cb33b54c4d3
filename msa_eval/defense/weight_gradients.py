"""Weight gradients, which a search has no use for, are switched off, unless a target takes them by itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from msa_eval.defense.contract import Defense, WholeModel, check_evaluating, decide, is_training, modules_of
from msa_eval.defense.micro_batches import MicroBatched
from msa_eval.defense.own_gradients import OwnGradients
from msa_eval.randomness import seeded

SAME = 1e-5
"""Answers that differ by no more than this share of the largest logit are the same."""

PROBED = 8
"""So many images a target is asked about, to find out what gradients it takes."""


@contextmanager
def without_weight_gradients(*defenses: object) -> Iterator[None]:
    """Switch weight gradients off for a while, and leave every parameter as it was found.

    Those of a target that takes gradients within its forward stay on, as far as that is known of it: one that adapts
    at test time would fail without them, or not adapt.

    Raises:
        ValueError: when a model is in training mode, where batch statistics and dropout would be measured.
    """
    check_evaluating(*defenses)
    with _switched_off([p for defense in defenses if not _takes_its_own(defense) for p in _learning(defense)]):
        yield


def find_own_gradients(defense: Defense, x: Tensor) -> None:
    """Find out what gradients a target takes within its forward, by asking it with weight gradients and without.

    It is noted in the target's ``own_gradients``. One in training mode, which is refused, is left alone.

    Args:
        defense: the target.
        x: a few clean images ``(N, C, H, W)``, on its device.
    """
    if not isinstance(defense, WholeModel | MicroBatched) or any(map(is_training, modules_of(defense))):
        return
    x, learning = x[:PROBED], _learning(defense)
    defense.own_gradients = OwnGradients.NONE
    with _switched_off(learning):
        off = _answer(defense, x)
    if off is not None and not learning:
        return
    for kind in (OwnGradients.TAKEN, OwnGradients.SWITCHED_ON):
        defense.own_gradients = kind
        on = _answer(defense, x)
        if on is not None:
            break
    if on is None or (off is not None and _same(off, on)):
        defense.own_gradients = OwnGradients.NONE
    elif off is not None:
        with _switched_off(learning):
            again = _answer(defense, x)
        if again is not None and not _same(off, again):  # it is no gradient that its answers differ by
            defense.own_gradients = OwnGradients.NONE


def _takes_its_own(defense: object) -> bool:
    return isinstance(defense, WholeModel | MicroBatched) and defense.own_gradients is not OwnGradients.NONE


def _learning(defense: object) -> list[nn.Parameter]:
    return [p for module in modules_of(defense) for p in module.parameters() if p.requires_grad]


@contextmanager
def _switched_off(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    try:
        for parameter in parameters:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


def _answer(defense: Defense, x: Tensor) -> Tensor | None:
    """The answer to a batch, its chance under a seed; ``None`` where it fails, which whoever asks next tells."""
    with seeded(0), torch.no_grad():
        try:
            return decide(defense, defense.features(x))
        except Exception:
            return None


def _same(first: Tensor, second: Tensor) -> bool:
    scale = float(first.abs().max())
    return first.shape == second.shape and not float((first - second).abs().max()) > SAME * scale
