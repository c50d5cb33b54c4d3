"""How time and memory grow: with samples, classes, features, the batch, and from one context to another.

    python -m tests.benchmarks growth

Each case is a process of its own, on a toy trunk that costs next to nothing, so that what grows is the engine and the
head. It runs one APGD search through the FC head, one through the soft hybrid and some queries of Square, once small to
warm up and once as asked. Memory is the highest resident set of the process, and how much of that came after the small
run.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from msa_eval import Samples, evaluate
from msa_eval.protocols import make_protocol

from .clock import spend
from .passes import counted
from .sheet import Sheet
from .subjects import toy


class Case(NamedTuple):
    """One evaluation of a toy."""

    samples: int = 256
    classes: int = 10
    dim: int = 128
    batch: int = 64
    context: str = "joint"


def cases() -> Iterator[tuple[str, Case]]:
    """What is varied, one at a time."""
    for samples in (125, 250, 500, 1000, 2000, 4000):
        yield "samples", Case(samples=samples)
    for classes in (10, 100, 1000):
        yield "classes", Case(classes=classes)
    for dim in (128, 256, 512, 1024, 2048):
        yield "dim", Case(dim=dim)
    for batch in (1, 8, 64, 256):
        yield "batch", Case(batch=batch)
    for context in ("joint", "solo"):
        for classes in (10, 100):
            yield "context", Case(classes=classes, context=context)


def measure(case: Case, steps: int) -> dict[str, float]:
    """Evaluate in this process."""
    it = toy(samples=case.samples, classes=case.classes, dim=case.dim)
    assert it.hpm is not None
    hpm = it.hpm
    protocol = make_protocol({
        "schema": 1, "name": "growth", "version": 1, "description": "A little of everything.",
        "threat.norm": "Linf", "threat.eps": it.ball.eps, "threat.contexts": [case.context], "audit.samples": 0,
        "batches.size": case.batch, "batches.seed": 0, "attack.apgd.losses": ["ce"], "attack.apgd.restarts": 1,
        "attack.apgd.surrogates": ["fc-oracle", "soft-hybrid"], "attack.apgd.steps": steps,
        "attack.square.queries": steps,
    })  # fmt: skip
    few = Samples(it.data.x[: case.batch], it.data.y[: case.batch], it.data.name)
    evaluate(hpm, few, protocol=protocol, fc=False)
    before = peak()
    with counted(hpm.trunk) as passes:
        spent = spend(lambda: evaluate(hpm, it.data, protocol=protocol, fc=False))
    figures = {"wall": spent.wall, "cpu": spent.cpu, "inside": passes.inside, "cpu a sample": spent.cpu / case.samples}
    figures |= {"forwards": passes.forwards / case.samples, "backwards": passes.backwards / case.samples}
    return {**figures, "peak MiB": peak(), "more MiB": peak() - before}


def peak() -> float:
    """The highest resident set of this process so far, in MiB."""
    highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return highest / (2**20 if sys.platform == "darwin" else 2**10)


def run(*, steps: int, repeats: int, out: Path) -> None:
    """Measure every case in a process of its own, and write ``growth.csv``."""
    for repeat in range(repeats):
        for varied, case in cases():
            figures = apart(case, steps)
            sheet = Sheet(out / "growth.csv", varied=varied, **case._asdict(), steps=steps, repeat=repeat)
            sheet.add(figures)


def apart(case: Case, steps: int) -> dict[str, float]:
    """Measure in a new process."""
    code = "import json, sys; from tests.benchmarks import growth as g; a = json.loads(sys.argv[1]);"
    code += "print(json.dumps(g.measure(g.Case(*a[:-1]), a[-1])))"
    described = subprocess.run([sys.executable, "-c", code, json.dumps([*case, steps])], capture_output=True, text=True,
                          check=True).stdout  # fmt: skip
    figures: dict[str, float] = json.loads(described.splitlines()[-1])
    return figures
