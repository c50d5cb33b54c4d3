"""What a second worker on a Ray cluster is worth: the same evaluation with one worker, with two, and again.

    python -m tests.benchmarks cluster cifar10-wrn10-2 --samples 128 --batch 16 --repeats 2

Protocol `quick` in `solo`, without the audit. *Cold* begins with nothing: Ray is started here, and workers import
torch. *Warm* is the same evaluation once more by the same workers, so what it takes is the work itself, the clean pass
of the driver included. The efficiency is t₁/(2·t₂). Neighbours on the machine spoil it, so the load stands beside it.
"""

from __future__ import annotations

import os
import statistics
import time
from pathlib import Path

import ray

from msa_eval import RayEngine, evaluate

from . import machine
from .sheet import Sheet
from .subjects import subject


def run(name: str, samples: int, batch: int, repeats: int, out: Path) -> None:
    """Measure, with one worker and with two in turns."""
    os.environ |= {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    it = subject(name, samples)
    settings = {"threat.contexts": ["solo"], "batches.size": batch, "audit.samples": 0}
    sheet = Sheet(out / "cluster.csv", model=name, samples=samples, batch=batch)
    seconds: dict[tuple[int, str], list[float]] = {}
    for repeat in range(repeats):
        for workers in (1, 2):
            began = time.perf_counter()
            ray.init("local", num_cpus=workers, include_dashboard=False, log_to_driver=False, object_store_memory=10**8)
            figures = {"connect": time.perf_counter() - began}
            for state in ("cold", "warm"):
                began = time.perf_counter()
                evaluate(it.hpm, it.data, protocol="quick", overrides=settings, engine=RayEngine(cpus=1))
                figures[state] = time.perf_counter() - began
            ray.shutdown()
            for state, value in (("whole", figures["connect"] + figures["cold"]), ("work", figures["warm"])):
                seconds.setdefault((workers, state), []).append(value)
            sheet.add(figures | {"load": machine.load()}, workers=workers, repeat=repeat)
    for state in ("whole", "work"):
        one, two = (statistics.median(seconds[workers, state]) for workers in (1, 2))
        sheet.add({f"efficiency, {state}": one / (2 * two)}, workers=2)
