"""The default protocol ``msa`` against pyautoattack's ``standard`` on static models trained for it.

    python -m tests.benchmarks strength --cache ~/.cache/msa-eval-strength

Each model is attacked by pyautoattack once and by ``msa`` with several seeds. Told are the samples left, the forward
passes for each sample of the set, and the passes that ``msa`` had made at the end of the run that reached
pyautoattack's number. pyautoattack's results stay in the cache beside the weights, so that a second call measures ours
alone.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from msa_eval import Classifier, Samples, evaluate
from msa_eval.attacks import Ball

from .passes import counted
from .strength_models import MODELS, images, trained

SAMPLES = {"digits": 128, "mnist": 128, "cifar10": 192}


def standard(model: Classifier, data: Samples, ball: Ball) -> dict[str, Any]:
    """What pyautoattack's ``standard`` leaves, by index, and its passes a sample."""
    from pyautoattack import AutoAttack

    with counted(model.trunk) as passes:
        attack = AutoAttack(model, norm=ball.norm, eps=ball.eps, seed=0)
        points: Tensor = attack.run_standard_evaluation(data.x, data.y, batch_size=len(data.y))[0]
    with torch.no_grad():
        right = (model(data.x).argmax(dim=1) == data.y) & (model(points).argmax(dim=1) == data.y)
    assert not ball.excess(points, data.x).any()
    return {"left": right.nonzero().flatten().tolist(), "passes": passes.forwards / len(data)}


def ours(model: Classifier, data: Samples, ball: Ball, seed: int, goal: int, protocol: str) -> dict[str, Any]:
    """What ``msa`` leaves, by index, its passes a sample, and those until no more than ``goal`` are left."""
    overrides = {"threat.eps": ball.eps, "threat.contexts": ["joint"], "audit.samples": 0}
    began = time.process_time()
    results = evaluate(
        model, data, protocol=protocol, overrides=overrides, fc=False, seed=seed, precision="fp32"
    )  # fmt: skip
    samples, runs = results.samples, results.attacks
    left = int(samples["clean_correct"].sum()) - runs["newly_broken"].cumsum()
    passes = runs["forwards"].cumsum() / len(data)
    reached = passes[left <= goal]
    return {
        "left": sorted(samples.loc[samples["robust"], "index"].tolist()),
        "clean": int(samples["clean_correct"].sum()),
        "passes": float(passes.iloc[-1]),
        "until": float(reached.iloc[0]) if len(reached) else float("nan"),
        "seconds": time.process_time() - began,
    }


def compare(name: str, cache: Path, seeds: int, protocol: str) -> dict[str, Any]:
    """A row of the table."""
    spec = MODELS[name]
    count, model = SAMPLES[spec.data], trained(name, cache)
    found = images(spec.data)[1]
    index = torch.arange(min(count, len(found)))
    data, ball = Samples(found.images(index), found.y[index], name), Ball("Linf", spec.eps)
    kept = cache / f"{name}-standard-{len(data)}.json"
    if not kept.is_file():
        kept.write_text(json.dumps(standard(model, data, ball)), encoding="utf-8")
    theirs = json.loads(kept.read_text(encoding="utf-8"))
    mine = [ours(model, data, ball, seed, len(theirs["left"]), protocol) for seed in range(seeds)]
    missed = [sorted(set(run["left"]) - set(theirs["left"])) for run in mine]
    until = max((run["until"] for run in mine), key=lambda passes: math.inf if math.isnan(passes) else passes)
    return {
        "model": name,
        "N": len(data),
        "clean": mine[0]["clean"],
        "standard left": len(theirs["left"]),
        "standard passes": round(theirs["passes"]),
        "msa left": ", ".join(str(len(run["left"])) for run in mine),
        "msa passes": round(sum(run["passes"] for run in mine) / seeds),
        "until": round(until, 1),
        "times fewer": round(theirs["passes"] / until, 1),
        "missed": "; ".join(" ".join(map(str, gap)) for gap in missed),
        "seconds": round(sum(run["seconds"] for run in mine) / seeds, 1),
    }


def main() -> None:
    """Compare both on every model, and print the table as it grows."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks strength", description=__doc__)
    parser.add_argument("--cache", type=Path, required=True, help="for weights and pyautoattack's results")
    parser.add_argument("--only", nargs="*", choices=tuple(MODELS), default=tuple(MODELS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--protocol", default="msa")
    parser.add_argument("--out", type=Path, help="write the table here as CSV")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for name in options.only:
        try:
            rows.append(compare(name, options.cache, options.seeds, options.protocol))
        except FileNotFoundError as error:
            print(f"{name}: left out; {error}", flush=True)
            continue
        print(" | ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
    if options.out is not None:
        pd.DataFrame(rows).to_csv(options.out, index=False)


if __name__ == "__main__":
    main()
