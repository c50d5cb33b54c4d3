"""The paper's whole protocol on HPM: ours, and the same composed of pyautoattack's attacks.

    python -m tests.benchmarks paper cifar10-wrn10-2 --samples 512 --steps 40 --queries 1000

Composed means: APGD with ``best_loss=True`` through each surrogate with each loss, its points carried over to the hard
target in their batch, and Square with as many queries on the hard target. Square leaves out images that it has broken,
and HPM's answers depend on who is there. So it is run in two ways: *seated*, each image answered in its whole batch,
which costs a pass of the batch; and *shrinking*, as it comes, its points judged in the whole batch at the end.

Ours is run in two ways as well: with every run from the clean batch, as the paper has it; and as a cascade, in which
what is broken stays in the batch as it broke and costs no more passes (``moves = ["unbroken"]``).

With ``--msa`` our default protocol takes part too. It looks for more and in other ways, so it is also told what part of
its runs, in their order, it takes until no more samples stand than pyautoattack leaves.

Contenders attack the data piece by piece in turns; all times are sums over the pieces. In ours they hold the clean
pass, the tables and all else that an evaluation does, but for the audit's probes.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from msa_eval import HPM, Results, Samples, evaluate
from msa_eval.attacks import Ball
from msa_eval.protocols import Protocol, make_protocol
from msa_eval.protocols.loading import load_protocol

from . import rivals
from .sheet import Sheet
from .subjects import batches, subject
from .tally import Tally, until

OURS, THEIRS, MSA = "msa-eval", "pyautoattack", "msa-eval, protocol msa"
STANDING = "msa-eval, what is broken stays"
SQUARES = {"seated": rivals.square_seated, "shrinking": rivals.square}


def protocol(ball: Ball, *, steps: int, queries: int, batch: int, **more: object) -> Protocol:
    """``paper-cifar10`` at another size, on all samples, without the audit's probes, and with more keys."""
    values = {**load_protocol("paper-cifar10").values, "threat.eps": ball.eps, "audit.samples": 0}
    values |= {"attack.apgd.steps": steps, "attack.square.queries": queries, "batches.size": batch}
    values.pop("samples.fraction")
    return make_protocol(values | more)


def default(ball: Ball, batch: int) -> Protocol:
    """``msa`` in ``joint`` alone, without the audit's probes."""
    overrides = {"threat.eps": ball.eps, "threat.contexts": ["joint"], "audit.samples": 0, "batches.size": batch}
    return load_protocol("msa", overrides=overrides)


def enter(tally: Tally, contender: str, results: Results) -> None:
    """Add the counts and accuracies that our tables tell: of each run, and of all together."""
    rows = results.summary.set_index("metric")
    for metric in ("clean", "realised", "worst_case"):
        tally.add(contender, **{metric: float(rows.loc[metric, "value"]) * float(rows.loc[metric, "n"])})
    count = float(rows.loc["clean", "n"])
    for run in results.attacks.to_dict(orient="records"):
        described = {
            "told forwards": run["forwards"],
            "told backwards": run["backwards"],
            "decisions": run["decisions"],
        }
        tally.add(contender, **described)
        newly = {"final": run["final"] * count, "newly_broken": run["newly_broken"]}
        tally.add(f"{contender}: {run['run']}", wall=run["seconds"], **newly, **described)


def compose(hpm: HPM, data: Samples, ball: Ball, tally: Tally, *, steps: int, queries: int, batch: int) -> None:
    """Attack a piece of the data with pyautoattack, and add what each of its attacks took and left."""
    searches = {
        f"{surrogate}:apgd-{loss}": partial(
            rivals.best_loss, rivals.through(hpm, surrogate), ball=ball, steps=steps, loss=loss
        )
        for surrogate in ("fc-oracle", "soft-hybrid")
        for loss in ("ce", "dlr")
    } | {f"square, {way}": partial(square, hpm, ball=ball, queries=queries) for way, square in SQUARES.items()}
    for x, y in batches(data, batch):
        clean = right(hpm, x, y)
        left = dict.fromkeys(SQUARES, clean)
        for run, search in searches.items():
            part = f"{THEIRS}: {run}"
            final = clean & tally.measure(part, partial(transfer, hpm, search, x, y))
            tally.add(part, final=int(final.sum()), decisions=len(y))
            left = {way: still & final if runs_in(run, way) else still for way, still in left.items()}
        for way, still in left.items():
            tally.add(f"standing, {way}", clean=int(clean.sum()), worst_case=int(still.sum()))


def transfer(model: rivals.Model, search: rivals.Search, x: Tensor, y: Tensor) -> Tensor:
    """Which images of a batch ``(B,)`` a model still gets right after a search."""
    return right(model, search(x, y), y)


def right(model: rivals.Model, points: Tensor, y: Tensor) -> Tensor:
    """Which images of a batch ``(B,)`` a model gets right."""
    with torch.no_grad():
        return model(points).argmax(dim=1) == y


def runs_in(run: str, way: str) -> bool:
    """Whether a run is part of the protocol composed with Square in one of the two ways."""
    return not run.endswith(tuple(other for other in SQUARES if other != way))


def run(
    name: str, *, samples: int, batch: int, steps: int, queries: int, chunk: int, msa: bool, precision: str, out: Path
) -> None:
    """Let all attack the data in turns, and write ``paper.csv`` after every piece.

    Args:
        name: of the model.
        samples: how many images.
        batch: images a batch.
        steps: of each APGD run.
        queries: of Square.
        chunk: images a piece.
        msa: whether our default protocol, which looks for more with other runs, takes part.
        precision: of our searches.
        out: the folder.
    """
    it = subject(name, samples)
    assert it.hpm is not None
    hpm = it.hpm
    size = {"steps": steps, "queries": queries, "batch": batch}
    stays = {"attack.apgd.combine": "cascade", "attack.apgd.moves": ["standing"]}
    ours = {OURS: protocol(it.ball, **size), STANDING: protocol(it.ball, **size, **stays)}
    ours |= {MSA: default(it.ball, batch)} if msa else {}
    tally, done = Tally(hpm.trunk), 0

    def attack(contender: str, piece: Samples) -> None:
        if contender == THEIRS:
            compose(hpm, piece, it.ball, tally, steps=steps, queries=queries, batch=batch)
            return
        search = partial(evaluate, hpm, piece, protocol=ours[contender], fc=False, precision=precision)
        enter(tally, contender, tally.measure(contender, search))

    for turn, piece in enumerate(it.chunks(chunk)):
        for contender in [*ours, THEIRS][:: -1 if turn % 2 else 1]:
            attack(contender, piece)
        done += len(piece)
        setting = {
            "model": name,
            "of": samples,
            "batch": batch,
            "steps": steps,
            "queries": queries,
            "precision": precision,
        }
        tell(Sheet(out / "paper.csv", **setting), tally, done)


def tell(sheet: Sheet, tally: Tally, samples: int) -> None:
    """Write each run, and each contender as a whole beside what ours takes of its time."""
    runs = {
        contender: tally.parts(f"{contender}: ") for contender in (OURS, STANDING, MSA) if tally.parts(f"{contender}: ")
    }
    whole = {contender: tally.figures(samples, contender) for contender in runs}
    for way in SQUARES:
        contender = f"{THEIRS}, Square {way}"
        runs[contender] = [part for part in tally.parts(f"{THEIRS}: ") if runs_in(part, way)]
        whole[contender] = tally.figures(samples, *runs[contender], f"standing, {way}")
        del whole[contender]["final"]
    for contender, figures in whole.items():
        figures["paper"] = min(tally.figures(samples, part)["final"] for part in runs[contender])
        for clock in ("wall", "cpu"):
            figures[f"{clock}, ours over it"] = whole[OURS][clock] / figures[clock]
            figures[f"{clock}, staying over it"] = whole[STANDING][clock] / figures[clock]
        if MSA in whole and contender.startswith(THEIRS):
            parts = [tally.figures(samples, part) for part in runs[MSA]]
            share = until(parts, whole[MSA]["clean"], figures["worst_case"], of="wall")
            figures["cpu, msa until there over it"] = share * whole[MSA]["cpu"] / figures["cpu"]
        sheet.add({"samples": samples, **figures}, contender=contender, run="all")
    for part in tally.parts():
        contender, _, run = part.partition(": ")
        if run:
            sheet.add(tally.figures(samples, part), contender=contender, run=run)
