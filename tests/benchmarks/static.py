"""A static classifier: ours against pyautoattack, torchattacks and foolbox at equal steps.

    python -m tests.benchmarks static cifar10-wrn10-2 --samples 512 --steps 20

Every contender makes one search of so many steps with cross-entropy from one start, ours as a whole evaluation.
Ours leaves an image as it is once it is broken; the others go on with it.
pyautoattack is run in both of its ways: as it comes, where it leaves out what is wrong from the start, and with
``best_loss=True``. Accuracy is of the returned points, judged by the model; ours also counts every iterate
(``worst_case``). torchattacks and foolbox each want an environment of their own
(docs/external-attacks.md); one that is not installed is named in a row.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

from torch import Tensor

from msa_eval import Samples, evaluate
from msa_eval.attacks import Ball
from msa_eval.attacks.external import find, installed, library_of
from msa_eval.protocols import Protocol, make_protocol

from . import rivals
from .paper import OURS, enter, right
from .sheet import Sheet
from .subjects import Subject, batches, subject
from .tally import Tally

PEERS: Mapping[str, Mapping[str, object]] = {
    "torchattacks:APGD": {"loss": "ce"},
    "torchattacks:PGD": {},
    "foolbox:LinfPGD": {},
}


def protocol(ball: Ball, *, steps: int, batch: int) -> Protocol:
    """One APGD run with cross-entropy through the model's own logits, for what is not broken yet, and no audit."""
    return make_protocol({
        "schema": 1, "name": "static", "version": 1, "description": "One run of APGD with cross-entropy.",
        "threat.norm": ball.norm, "threat.eps": ball.eps, "threat.contexts": ["joint"], "audit.samples": 0,
        "batches.size": batch, "batches.seed": 0, "attack.apgd.surrogates": ["fc-oracle"],
        "attack.apgd.losses": ["ce"], "attack.apgd.steps": steps, "attack.apgd.restarts": 1,
        "attack.apgd.combine": "cascade",
    })  # fmt: skip


def searches(it: Subject, steps: int) -> dict[str, rivals.Search]:
    """The peers that are installed, by name."""
    apgd = {"ball": it.ball, "steps": steps, "loss": "ce"}
    found: dict[str, rivals.Search] = {
        "pyautoattack, APGD-CE": partial(rivals.as_it_comes, it.fc, **apgd),
        "pyautoattack, APGD-CE best_loss": partial(rivals.best_loss, it.fc, **apgd),
    }
    for name, options in PEERS.items():
        if installed(library_of(name)) is None:
            continue
        walk = {"rel_stepsize": 2.5 / steps} if name.startswith("foolbox") else {}
        peer = find(name, it.ball, {"steps": steps, **walk, **options})

        def search(x: Tensor, y: Tensor, peer=peer) -> Tensor:  # type: ignore[no-untyped-def]
            with rivals.seeded():
                return peer.search(it.fc, x, y, 0, 0)

        found[name.replace(":", ", ")] = search
    return found


def run(name: str, *, samples: int, batch: int, steps: int, chunk: int, precision: str, out: Path) -> None:
    """Let all attack the data in turns, batch after batch, and write ``static.csv`` after every piece."""
    it = subject(name, samples)
    ours, others = protocol(it.ball, steps=steps, batch=batch), searches(it, steps)
    tally, done = Tally(it.fc.trunk), 0
    for turn, piece in enumerate(it.chunks(chunk)):
        order = [OURS, *others]
        for contender in order[:: -1 if turn % 2 else 1]:
            if contender == OURS:
                search = partial(evaluate, it.fc, piece, protocol=ours, fc=False, precision=precision)
                enter(tally, OURS, tally.measure(OURS, search))
            else:
                attack(it, contender, others[contender], piece, tally, batch)
        done += len(piece)
        tell(Sheet(out / "static.csv", model=name, batch=batch, steps=steps, precision=precision), tally, done)


def attack(it: Subject, contender: str, search: rivals.Search, piece: Samples, tally: Tally, batch: int) -> None:
    """Let a peer attack a piece of the data."""
    for x, y in batches(piece, batch):
        clean = right(it.fc, x, y)
        points = it.ball.project(tally.measure(contender, partial(search, x, y)).detach(), x)
        left = int((clean & right(it.fc, points, y)).sum())
        tally.add(contender, clean=int(clean.sum()), final=left, worst_case=left)


def tell(sheet: Sheet, tally: Tally, samples: int) -> None:
    """Write what each took and left, beside what ours takes of its time; and a row for each that is not here."""
    ours = tally.figures(samples, OURS)
    for part in tally.parts():
        figures = tally.figures(samples, part)
        if part.startswith(f"{OURS}: "):
            continue
        if part == OURS:
            figures["final"] = min(tally.figures(samples, run)["final"] for run in tally.parts(f"{OURS}: "))
        for clock in ("wall", "cpu"):
            figures[f"{clock}, ours over it"] = ours[clock] / figures[clock]
        sheet.add({"samples": samples, **figures}, contender=part)
    for library in dict.fromkeys(library_of(name) for name in PEERS):
        if installed(library) is None:
            sheet.add({"installed": 0}, contender=library)
