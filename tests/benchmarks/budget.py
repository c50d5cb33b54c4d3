"""Worst case against passes: msa, the paper's protocol, single surrogates, and pyautoattack on the naive target.

    python -m tests.benchmarks budget digits --samples 256 --out results/benchmarks

writes ``budget-digits.csv`` (contender, target, context, passes a sample, worst_case, seconds) and a chart. CIFAR-10
needs the data in MSA_EVAL_SHARED. Everything is judged on the same samples in the same batches by the hard target; of
pyautoattack's result, which changes batches as it drops samples, both its own count and that verdict are given.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from msa_eval import HPM, Samples, evaluate, load_checkpoint, load_samples
from msa_eval.judging.batch_plan import plan_batches, select
from msa_eval.protocols import Protocol, make_protocol
from msa_eval.protocols.loading import load_protocol
from msa_eval.references import reference_path
from msa_eval.report import draw_curves, spending, to_svg

from .subjects import cifar10

SINGLE = ("fc-oracle", "soft-hybrid", "soft-hybrid@0.3", "ste", "frozen-assignment", "frozen-prototypes")
LOSSES = ("margin", "dlr-targeted", "dlr", "dlr-targeted", "ce", "dlr-targeted", "margin", "dlr-targeted", "dlr",
          "dlr-targeted", "margin")  # fmt: skip


class Counted(nn.Module):
    """A model that counts the images it is shown."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.images = 0

    def forward(self, x: Tensor) -> Tensor:
        self.images += len(x)
        out: Tensor = self.model(x)
        return out


def contenders(eps: Any, samples: int) -> Iterator[tuple[str, Protocol]]:
    common = {"threat.eps": eps, "samples.limit": samples, "audit.samples": 0}
    for context in ("joint", "solo", "alone", "composed"):
        name = "msa" if context == "joint" else f"msa, {context}"
        yield name, load_protocol("msa", overrides={**common, "threat.contexts": [context]})
    paper = {**load_protocol("paper-cifar10").values, **common, "attack.square.queries": 1000}
    paper.pop("samples.fraction")
    yield "paper", make_protocol(paper)
    base = {key: value for key, value in load_protocol("msa").values.items() if not key.startswith("attack.")}
    base |= {**common, "threat.contexts": ["joint"]}
    steps = {"attack.apgd.steps": load_protocol("msa").values["attack.apgd.steps"]}
    runs = list(load_protocol("msa").values["attack.apgd.runs"])[:16]  # which make some 500 passes
    still = [run.removesuffix(":companions") for run in runs]
    together = {"attack.apgd.surrogates": list(dict.fromkeys(run.split(":")[0] for run in runs)),
                "attack.apgd.losses": ["margin", "dlr", "ce", "dlr-targeted"], "attack.apgd.restarts": 3,
                "attack.apgd.targets": 7, **steps}  # fmt: skip
    yield "separate", make_protocol({**base, **steps, "attack.apgd.runs": still, "attack.apgd.combine": "separate"})
    yield "mean", make_protocol({**base, **together, "attack.apgd.combine": "mean"})
    yield "cascade", make_protocol({**base, **steps, "attack.apgd.runs": still, "attack.apgd.combine": "cascade"})
    yield (
        "cascade, companions",
        make_protocol({**base, **steps, "attack.apgd.runs": runs, "attack.apgd.combine": "cascade"}),
    )
    for surrogate in SINGLE:
        runs = [f"{surrogate}:{loss}" for loss in LOSSES]
        yield (
            f"only {surrogate}",
            make_protocol({**base, "attack.apgd.runs": runs, "attack.apgd.combine": "cascade"}),
        )


def autoattack(model: nn.Module, data: Samples, protocol: Protocol) -> pd.DataFrame:
    """pyautoattack's standard version on the model as it stands, attack after attack on what it calls robust."""
    from pyautoattack import AutoAttack

    chosen = select(data.y, protocol)
    batch_plan = plan_batches(len(chosen), size=protocol.batch_size, seed=protocol.batches_seed)
    order = chosen[torch.cat(batch_plan)]
    x, y = data.images(order), data.y[order]
    sizes = [len(indices) for indices in batch_plan]
    counted = Counted(model)

    def right(points: Tensor) -> Tensor:
        with torch.no_grad():
            return torch.cat([model(part).argmax(dim=1) for part in points.split(sizes)]) == y

    attack = AutoAttack(counted, norm="Linf", eps=protocol.ball.eps, seed=0)
    clean = unbroken = claimed = right(x)
    points, started = x.clone(), time.perf_counter()
    rows = [(0.0, float(clean.float().mean()), float(clean.float().mean()), 0.0)]
    for name in ("apgd-ce", "apgd-t", "fab-t", "square"):
        attack.attacks_to_run = [name]
        left = claimed.nonzero().flatten()
        found, label = attack.run_standard_evaluation(x[left], y[left], batch_size=protocol.batch_size)
        points[left] = found
        claimed = claimed.index_put((left,), label == y[left])
        unbroken = unbroken & right(points)
        spent, seconds = counted.images / len(y), time.perf_counter() - started
        rows.append((spent, float(unbroken.float().mean()), float((claimed & clean).float().mean()), seconds))
    return pd.DataFrame(rows, columns=["passes", "worst_case", "own_count", "seconds"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("reference", choices=("digits", "cifar10-wrn10-2"))
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--out", type=Path, default=Path("results/benchmarks"))
    parser.add_argument("--only", nargs="*", help="contenders to run anew, as in the CSV; the other rows stay")
    options = parser.parse_args()
    hpm = load_checkpoint(reference_path(options.reference)).model
    assert isinstance(hpm, HPM)
    cifar = options.reference != "digits"
    eps = "8/255" if cifar else 0.15
    data = cifar10() if cifar else load_samples("digits")
    path = options.out / f"budget-{options.reference}.csv"
    frames: list[pd.DataFrame] = []
    if options.only and path.exists():
        before = pd.read_csv(path)
        frames.append(before[~before["contender"].isin(options.only)])

    def add(name: str, target: str, context: str, curve: pd.DataFrame) -> None:
        frames.append(curve.assign(contender=name, target=target, context=context))
        table = pd.concat(frames, ignore_index=True)
        table = table[["contender", "target", "context", "passes", "worst_case", "own_count", "seconds"]]
        options.out.mkdir(parents=True, exist_ok=True)
        table.to_csv(path, index=False, float_format="%.6g")
        last = curve.iloc[-1]
        print(f"{name:26} {target:8} {last['passes']:8.0f} passes  {100 * last['worst_case']:5.1f} %", flush=True)

    for name, protocol in contenders(eps, options.samples):
        if options.only and name not in options.only:
            continue
        both = name in ("msa", "paper")
        started = time.perf_counter()
        results = evaluate(hpm, data, protocol=protocol, fc=None if both else False)
        seconds = time.perf_counter() - started
        context = protocol.contexts[0]
        for target in ("defense", "fc") if both else ("defense",):
            curve = spending(results, target=target, context=context)
            add(name, target, context, curve.assign(own_count=None, seconds=seconds))
    if not options.only or "autoattack" in options.only:
        judged = load_protocol("msa", overrides={"threat.eps": eps, "samples.limit": options.samples})
        for target, model in (("defense", hpm), ("fc", hpm.fc_target)):
            add("autoattack", target, "joint", autoattack(model, data, judged))
    table = pd.concat(frames, ignore_index=True)
    curves = {str(name): rows for name, rows in table[table["target"] == "defense"].groupby("contender", sort=False)}
    title = f"HPM on {options.reference}, {options.samples} samples: worst case in %, by passes"
    chart = to_svg(draw_curves(curves, title))
    (options.out / f"budget-{options.reference}.svg").write_text(chart, encoding="utf-8")


if __name__ == "__main__":
    main()
