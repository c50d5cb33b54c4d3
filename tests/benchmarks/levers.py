"""What each lever of speed is worth alone, in turns with a plain pass on the same machine.

    python -m tests.benchmarks levers --out results/benchmarks/levers.csv

A plain pass is float32, forward and backward to the images, without weight gradients. Each lever is a row a network:
``ratio`` is the median of its time over that of the plain pass before it (for the forward lever, of the plain
forward pass), ``low`` and ``high`` the quartiles; ``signs`` the share of the gradient's signs that are the same,
``drift`` the largest change of a logit in units of their standard deviation. Time is that of the processor, in one
thread, so neighbours count for little.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse

from msa_eval import load_checkpoint
from msa_eval.defense.bf16 import bf16_copy
from msa_eval.defense.micro_batches import in_parts
from msa_eval.references import reference_path
from msa_eval.sensitivity import autoattack_resnet18

from .subjects import cifar10


class Lever(NamedTuple):
    """A way to pass a batch: the network, the layout of images, and what surrounds the pass."""

    name: str
    model: nn.Module
    layout: torch.memory_format = torch.contiguous_format
    around: Callable[[], Any] = nullcontext
    backward: bool = True


class Network(nn.Module):
    """Images to logits, as one module that can be traced."""

    def __init__(self, trunk: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.trunk, self.head = trunk, head

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.trunk(x))
        return out


class Features(nn.Module):
    """A network as a defence whose features are its logits."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def features(self, x: Tensor) -> Tensor:
        out: Tensor = self.network(x)
        return out

    def logits(self, z: Tensor) -> Tensor:
        return z


def rounded(network: nn.Module, x: Tensor) -> nn.Module:
    """The copy that searches in bfloat16 pass."""
    target = in_parts(Features(network))
    target.features(x)
    made: Any = bf16_copy(target, x)
    assert made is not None
    copied: nn.Module = made.whole.network
    return copied


def bf16() -> Any:
    return torch.autocast("cpu", dtype=torch.bfloat16)


def networks() -> Iterator[tuple[str, nn.Module]]:
    hpm: Any = load_checkpoint(reference_path("cifar10-wrn10-2")).model
    yield "cifar10-wrn10-2", Network(hpm.trunk, hpm.fc_original).eval()
    classifier = autoattack_resnet18()
    yield "autoattack-resnet18", Network(classifier.trunk, classifier.fc).eval()


def levers(model: nn.Module, x: Tensor, *, compiled: bool) -> list[Lever]:
    """The plain passes first."""
    folded, weights = fuse(copy.deepcopy(model)), copy.deepcopy(model).requires_grad_(True)
    last = torch.channels_last

    def reordered(source: nn.Module) -> nn.Module:
        return copy.deepcopy(source).to(memory_format=last)  # type: ignore[call-overload,no-any-return]

    found = [
        Lever("plain", model),
        Lever("plain-forward", model, around=torch.no_grad, backward=False),
        Lever("weight-gradients", weights),
        Lever("inference-mode", model, around=torch.inference_mode, backward=False),
        Lever("channels-last", reordered(model), last),
        Lever("channels-last-images", model, last),
        Lever("folded", folded),
        Lever("folded-channels-last", reordered(folded), last),
        Lever("bf16", model, around=bf16),
        Lever("bf16-channels-last-images", model, last, bf16),
        Lever("bf16-folded-channels-last", reordered(folded), last, bf16),
        Lever("bf16-copy", rounded(model, x), last, bf16),
    ]
    if compiled:
        found.append(Lever("compiled", torch.compile(copy.deepcopy(model))))  # type: ignore[arg-type]
    return found


def passed(lever: Lever, x: Tensor, y: Tensor) -> tuple[float, Tensor, Tensor]:
    """Processor seconds of a pass, its logits, and the gradient of the loss."""
    points = x.clone().contiguous(memory_format=lever.layout).requires_grad_(lever.backward)
    started = time.process_time()
    with lever.around():
        logits = lever.model(points)
    wanted = [points, *(p for p in lever.model.parameters() if p.requires_grad)]
    loss = nn.functional.cross_entropy(logits.float(), y, reduction="sum") if lever.backward else None
    gradient = torch.zeros_like(x) if loss is None else torch.autograd.grad(loss, wanted)[0]
    return time.process_time() - started, logits.detach().float(), gradient


def measure(
    name: str, model: nn.Module, x: Tensor, y: Tensor, *, rounds: int, compiled: bool, only: str | None = None
) -> Iterator[dict[str, Any]]:
    tried = levers(model.requires_grad_(False), x, compiled=compiled)
    plain, forward = tried[:2]
    tried = [lever for lever in tried if only in (None, lever.name)]
    _, exact, slope = passed(plain, x, y)
    for lever in tried:
        against = plain if lever.backward else forward
        started = time.process_time()
        _, logits, gradient = passed(lever, x, y)
        first = time.process_time() - started
        ratios, seconds = [], []
        for _ in range(rounds):
            before = passed(against, x, y)[0]
            seconds.append(passed(lever, x, y)[0])
            ratios.append(seconds[-1] / before)
        low, ratio, high = statistics.quantiles(ratios, n=4)
        same = float((gradient.sign() == slope.sign()).float().mean()) if lever.backward else float("nan")
        yield {
            "network": name, "lever": lever.name, "against": against.name, "ratio": ratio, "low": low, "high": high,
            "ms_an_image": 1000 * statistics.median(seconds) / len(x), "first_s": first, "signs": same,
            "drift": float((logits - exact).abs().max() / exact.std()), "rounds": rounds,
        }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--network", help="this one alone")
    parser.add_argument("--lever", help="this one alone, beside plain passes")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    samples = cifar10()
    x, y = samples.images(torch.arange(options.images)), samples.y[: options.images]
    rows: list[dict[str, Any]] = []
    for name, model in networks():
        if options.network in (None, name):
            for row in measure(
                name, model, x, y, rounds=options.rounds, compiled=not options.no_compile, only=options.lever
            ):
                rows.append(row)
                print("  ".join(f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()), flush=True)
    if options.out is not None:
        pd.DataFrame(rows).to_csv(options.out, index=False, float_format="%.4g")


if __name__ == "__main__":
    main()
