"""The attacks that ours are measured against, as their authors call them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from msa_eval import HPM
from msa_eval.attacks import Ball
from msa_eval.attacks.external import BatchModel, find, run_guarded
from msa_eval.surrogates import get

Model = Callable[[Tensor], Tensor]
Search = Callable[[Tensor, Tensor], Tensor]
"""``(x, y) -> points``, all of a batch."""


@contextmanager
def seeded(seed: int = 0) -> Iterator[None]:
    """Seed torch for attacks that draw from its global generator, and leave that as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def best_loss(model: Model, x: Tensor, y: Tensor, *, ball: Ball, steps: int, loss: str) -> Tensor:
    """Points of highest loss by pyautoattack's APGD (``best_loss=True``), for every image of a batch."""
    from pyautoattack.autopgd_base import APGDAttack

    attack = APGDAttack(model, n_iter=steps, norm=ball.norm, eps=ball.eps, loss=loss, device=x.device)
    with seeded():
        found: Tensor = attack.perturb(x, y, best_loss=True)
    return found


def as_it_comes(model: Model, x: Tensor, y: Tensor, *, ball: Ball, steps: int, loss: str) -> Tensor:
    """What pyautoattack's APGD returns by itself: it leaves out what is wrong from the start."""
    from pyautoattack.autopgd_base import APGDAttack

    attack = APGDAttack(model, n_iter=steps, norm=ball.norm, eps=ball.eps, loss=loss, device=x.device)
    with seeded():
        found: Tensor = attack.perturb(x, y)
    return found


def square(model: Model, x: Tensor, y: Tensor, *, ball: Ball, queries: int) -> Tensor:
    """pyautoattack's Square, in batches that shrink as it leaves out what it has broken."""
    from pyautoattack.square import SquareAttack

    attack = SquareAttack(model, n_queries=queries, norm=ball.norm, eps=ball.eps, device=x.device, resc_schedule=False)
    with seeded(), torch.no_grad():
        found: Tensor = attack.perturb(x, y)
    return found


def square_seated(model: nn.Module, x: Tensor, y: Tensor, *, ball: Ball, queries: int) -> Tensor:
    """The same with each image answered in its place in the whole batch, so that companions don't drop out."""

    def ask(whole: Tensor, rows: Tensor) -> Tensor:
        with torch.no_grad():
            logits: Tensor = model(whole)
        return logits

    with torch.no_grad():
        classes = model(x[:1]).shape[1]
    batch_model = BatchModel(ask, x, y, ball, classes=classes)
    return run_guarded(find("autoattack:square", ball, {"queries": queries}), batch_model, seed=0, turn=0).x


def through(hpm: HPM, surrogate: str) -> Model:
    """A surrogate of HPM as a plain function from images to logits."""
    chosen = get(surrogate)
    return lambda x: chosen.logits(hpm, hpm.features(x))
