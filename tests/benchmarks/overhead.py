"""What an attack takes over a bare loop of as many passes: nothing but forward, loss and gradient.

    python -m tests.benchmarks overhead cifar10-wrn10-2 --steps 10 --repeats 7

On one batch, in turns: the bare loop; our `apgd` as a function of logits; our APGD as the engine runs it, where every
iterate is judged by the hard target; and pyautoattack's APGD. All make ``steps + 1`` passes forward. The bare loop and
ours make ``steps`` back, pyautoattack one more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from msa_eval.attacks import apgd
from msa_eval.attacks.gradient import ApgdAttack
from msa_eval.attacks.losses import LOSSES
from msa_eval.defense.weight_gradients import without_weight_gradients
from msa_eval.judging.batch_plan import plan_batches
from msa_eval.judging.clean_batches import CleanBatches
from msa_eval.judging.judged_batch import JudgedBatch
from msa_eval.surrogates import get

from . import rivals
from .clock import against, in_turns
from .sheet import Sheet
from .subjects import Subject, subject

BASE = "bare loop"
CASES = (("fc", "ce"), ("fc-oracle", "dlr"), ("soft-hybrid", "ce"))
"""Surrogates and losses; ``fc`` is the static classifier itself."""


def bare(model: rivals.Model, x: Tensor, y: Tensor, *, loss: str, steps: int) -> None:
    """As many passes as APGD makes, and nothing else."""
    for _ in range(steps):
        point = x.detach().requires_grad_()
        torch.autograd.grad(LOSSES[loss](model(point), y).sum(), point)
    with torch.no_grad():
        LOSSES[loss](model(x), y)


def contenders(it: Subject, surrogate: str, *, loss: str, steps: int) -> Mapping[str, Callable[[], object]]:
    """The four, on all of a subject's images as one batch, through a surrogate of HPM or ``fc`` for the classifier."""
    defense = it.fc if surrogate == "fc" or it.hpm is None else it.hpm
    chosen = get("fc-oracle" if surrogate == "fc" else surrogate)
    size = len(it.data)
    clean = CleanBatches(defense, it.data, torch.arange(size), plan_batches(size, size=size, seed=0), device="cpu")
    batch = next(iter(clean))

    def model(x: Tensor) -> Tensor:
        return chosen.logits(defense, defense.features(x))

    def function() -> None:
        generator = torch.Generator().manual_seed(0)
        apgd(model, batch.x, batch.y, loss=LOSSES[loss], ball=it.ball, steps=steps, generator=generator)

    def engine() -> None:
        view = clean.view("joint", batch)
        judged = JudgedBatch(view, chosen, batch, it.ball, mixes_rows=clean.batch_dependent)
        ApgdAttack(loss, steps=steps)(judged, torch.Generator().manual_seed(0))

    return {
        BASE: lambda: bare(model, batch.x, batch.y, loss=loss, steps=steps),
        "ours, the function": function,
        "ours, in the engine": engine,
        "pyautoattack": lambda: rivals.best_loss(model, batch.x, batch.y, ball=it.ball, steps=steps, loss=loss),
    }


def run(name: str, *, batch: int, steps: int, repeats: int, out: Path) -> None:
    """Measure all contenders through each surrogate, and write ``overhead.csv``."""
    it = subject(name, batch)
    cases = CASES if it.hpm is not None else CASES[:1]
    sheet = Sheet(out / "overhead.csv", model=name, batch=batch, steps=steps, repeats=repeats)
    for surrogate, loss in cases:
        with without_weight_gradients(it.fc if it.hpm is None else it.hpm):
            actions = contenders(it, surrogate, loss=loss, steps=steps)
            times = in_turns(actions, repeats, trunk=it.fc.trunk)
        ratios = against(times, BASE)
        for contender, mine in times.groupby("contender", sort=False):
            figures = {f"{clock} over bare": float(ratios.loc[contender, clock]) for clock in ratios}
            figures |= {name: float(mine[name].median()) for name in ("wall", "cpu", "inside")}
            figures |= {name: float(mine[name].max()) / batch for name in ("forwards", "backwards")}
            sheet.add(figures, surrogate=surrogate, loss=loss, contender=contender)
