"""Evidence made up for tests of what is shown: no model, no attack, any size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from msa_eval.evidence.records import TargetRecord
from msa_eval.evidence.results import Results
from msa_eval.evidence.tables import tabulate
from msa_eval.protocols import load_protocol

RUNS = (
    ("fc-oracle:apgd-margin:0", "fc-oracle", "apgd", "margin", 0),
    ("fc-oracle:apgd-margin:1", "fc-oracle", "apgd", "margin", 1),
    ("soft-hybrid:apgd-dlr:0", "soft-hybrid", "apgd", "dlr", 0),
    ("target:square-margin:0", "target", "square", "margin", 0),
)


def make_results(
    n: int = 40,
    *,
    classes: int = 4,
    broken: float = 0.3,
    clean: float = 0.9,
    contexts: Sequence[str] = ("joint",),
    targets: Sequence[str] = ("defense", "fc"),
    batch: int = 10,
    runs: Sequence[tuple[str, str, str, str, int]] = RUNS,
    seed: int = 0,
    **run: Any,
) -> Results:
    """Results of n samples of which each run breaks about a share; ``run`` replaces fields of ``run.json``."""
    rng = np.random.default_rng(seed)
    label = np.random.default_rng(1).integers(classes, size=n)
    batch_plan = np.random.default_rng(2).permutation(n)
    records = []
    for target in targets:
        for context in contexts:
            right = rng.random(n) < clean
            prediction = np.where(right, label, (label + 1) % max(classes, 2))
            made = [_run(entry, n, broken, rng) for entry in runs]
            arrays = {name: np.stack([one[name] for one, _ in made]) for name in made[0][0]}
            hit = arrays["any_broken"].any(axis=0)
            committed = right & (~hit | (rng.random(n) < 0.5))
            records.append(
                TargetRecord(
                    target, context, np.arange(n), label, batch_plan // batch, batch_plan % batch, prediction,
                    rng.random(n).astype(np.float32), committed, pd.DataFrame([about for _, about in made]), **arrays,
                )
            )  # fmt: skip
    return tabulate(records, about(n, targets, contexts, -(-n // batch)) | run)


def _run(
    entry: tuple[str, str, str, str, int], n: int, broken: float, rng: np.random.Generator
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a run did to every sample, and what it was."""
    hit = rng.random(n) < broken
    final = hit & (rng.random(n) < 0.8)
    did = {
        "surrogate_fooled": rng.random(n) < broken, "final_broken": final, "any_broken": hit,
        "first_iterate": np.where(hit, rng.integers(9, size=n), -1),
        "min_margin": np.where(hit, -0.1, 0.2).astype(np.float32) * rng.random(n, dtype=np.float32),
        "perturbation": np.full(n, 0.1, np.float32),
    }  # fmt: skip
    was = dict(zip(("run", "surrogate", "attack", "loss", "restart"), entry, strict=True))
    backwards = n * 9 if entry[2] == "apgd" else 0
    return did, was | {"forwards": n * 10, "backwards": backwards, "decisions": n * 10, "seconds": 1.5, "notes": None}


def about(n: int, targets: Sequence[str], contexts: Sequence[str], count: int) -> dict[str, Any]:
    """A ``run.json``."""
    protocol = load_protocol("quick", overrides={"threat.contexts": list(contexts)})
    return {
        "key": "made up", "schema_version": 1, "seed": 0,
        "protocol": {
            "name": protocol.name, "version": protocol.version, "modified": True,
            "overrides": dict(protocol.overrides), "sha256": protocol.digest(), "text": protocol.text(),
        },
        "data": {"name": "made-up", "sha256": "0" * 64, "n": n},
        "targets": {t: {"type": "HPM" if t == "defense" else "Classifier", "sha256": "1" * 64} for t in targets},
        "batches": {"sha256": "2" * 64, "count": count}, "verdict": "not audited", "packages": {"torch": "2"},
        "python": "3", "device": "cpu", "platform": "here", "threads": 1, "precision": "float32", "git": None,
        "command": ["msa-eval", "evaluate"], "seconds": 1.0, "draws": dict.fromkeys(targets, 1),
    }  # fmt: skip
