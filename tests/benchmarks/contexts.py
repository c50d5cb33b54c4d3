"""What a context costs: the same APGD run on the same batch in joint and in solo, in turns.

    python -m tests.benchmarks contexts cifar10-wrn10-2

prints the median time of each and of their ratio over pairs of runs that follow each other directly, so that a machine
that drifts slows both. CIFAR-10 needs the data in MSA_EVAL_SHARED.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from msa_eval import HPM, load_checkpoint, load_samples
from msa_eval.attacks import Ball
from msa_eval.attacks.batch import Batch
from msa_eval.attacks.gradient import ApgdAttack
from msa_eval.defense.weight_gradients import without_weight_gradients
from msa_eval.judging.batch_plan import plan_batches
from msa_eval.judging.clean_batches import CleanBatches
from msa_eval.judging.judged_batch import JudgedBatch
from msa_eval.references import reference_path
from msa_eval.surrogates import get

from .subjects import cifar10


def seconds(clean: CleanBatches, batch: Batch, context: str, surrogate: str, ball: Ball) -> float:
    started = time.perf_counter()
    judged = JudgedBatch(clean.view(context, batch), get(surrogate), batch, ball)
    judged.finish(ApgdAttack("dlr", steps=40)(judged, torch.Generator().manual_seed(0)))
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("reference", choices=("digits", "cifar10-wrn10-2"))
    parser.add_argument("--pairs", type=int, default=7)
    options = parser.parse_args()
    hpm = load_checkpoint(reference_path(options.reference)).model
    assert isinstance(hpm, HPM)
    cifar = options.reference != "digits"
    data = cifar10() if cifar else load_samples("digits")
    ball = Ball("Linf", 8 / 255 if cifar else 0.15)
    chosen = torch.arange(64)
    with without_weight_gradients(hpm):
        clean = CleanBatches(hpm, data, chosen, plan_batches(64, size=64, seed=0), device="cpu")
        batch = next(iter(clean))
        for surrogate in ("fc-oracle", "soft-hybrid", "ste"):
            pairs = []
            for _ in range(options.pairs + 1):
                pairs.append([seconds(clean, batch, context, surrogate, ball) for context in ("joint", "solo")])
            warm = pairs[1:]
            joint, solo = (statistics.median(times) for times in zip(*warm, strict=True))
            ratios = sorted(second / first for first, second in warm)
            print(
                f"{surrogate:12} joint {joint:.2f} s  solo {solo:.2f} s  ratio {statistics.median(ratios):.2f} "
                f"({ratios[0]:.2f} to {ratios[-1]:.2f}), {torch.get_num_threads()} threads",
                flush=True,
            )


if __name__ == "__main__":
    main()
