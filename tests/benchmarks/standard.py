"""The default protocol ``msa`` against pyautoattack's ``standard``, each as its authors give it.

    python -m tests.benchmarks standard cifar10-wrn10-2 --samples 64

On HPM in ``joint``, where pyautoattack attacks the model as it stands; and on its FC head, which is static.
pyautoattack's points are judged by the hard target in the batches of the plan; its own count, in batches that change as
it drops samples, stands beside that. As our runs follow each other, it is also told what part of them had to be made
until no more samples stood than pyautoattack leaves by that verdict.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from msa_eval import Samples, evaluate
from msa_eval.protocols.loading import load_protocol

from .budget import autoattack
from .paper import OURS, default, enter
from .sheet import Sheet
from .subjects import Subject, subject
from .tally import Tally, until

THEIRS = "pyautoattack"


def run(name: str, *, samples: int, batch: int, chunk: int, precision: str, out: Path) -> None:
    """Let both attack the data in turns, and write ``standard.csv`` after every piece."""
    it = subject(name, samples)
    assert it.hpm is not None
    for target, model in (("defense", it.hpm), ("fc", it.fc)):
        tally, done = Tally(it.fc.trunk), 0
        for turn, piece in enumerate(it.chunks(chunk)):
            turns = (
                partial(ours, model, it, piece, tally, batch, precision),
                partial(theirs, model, it, piece, tally, batch),
            )
            for one in turns[:: -1 if turn % 2 else 1]:
                one()
            done += len(piece)
            tell(Sheet(out / "standard.csv", model=name, batch=batch, target=target, precision=precision), tally, done)


def ours(model: object, it: Subject, piece: Samples, tally: Tally, batch: int, precision: str) -> None:
    """``msa`` in joint alone, without the audit's probes."""
    search = partial(evaluate, model, piece, protocol=default(it.ball, batch), fc=False, precision=precision)
    enter(tally, OURS, tally.measure(OURS, search))


def theirs(model: object, it: Subject, piece: Samples, tally: Tally, batch: int) -> None:
    """``standard``, attack after attack on what it calls robust."""
    protocol = load_protocol("msa", overrides={"threat.eps": it.ball.eps, "batches.size": batch})
    curve = tally.measure(THEIRS, partial(autoattack, model, piece, protocol))
    first, last = curve.iloc[0], curve.iloc[-1]
    count = len(piece)
    tally.add(THEIRS, clean=first["worst_case"] * count, worst_case=last["worst_case"] * count)
    tally.add(THEIRS, own_count=last["own_count"] * count)


def tell(sheet: Sheet, tally: Tally, samples: int) -> None:
    """Write what each took and left, beside what ours takes of its time."""
    mine = tally.figures(samples, OURS)
    for contender in (OURS, THEIRS):
        figures = tally.figures(samples, contender)
        for clock in ("wall", "cpu"):
            figures[f"{clock}, ours over it"] = mine[clock] / figures[clock]
        if contender == THEIRS:
            runs = [tally.figures(samples, run) for run in tally.parts(f"{OURS}: ")]
            share = until(runs, mine["clean"], figures["worst_case"], of="wall")
            figures["cpu, ours until there over it"] = share * mine["cpu"] / figures["cpu"]
            passes = until(runs, mine["clean"], figures["worst_case"], of="told forwards")
            figures["forwards, ours until there"] = passes * sum(run["told forwards"] for run in runs)
        sheet.add({"samples": samples, **figures}, contender=contender)
