"""How near to the limit: multiply-adds of the passes made, over what the same cores reach in the convolutions alone.

    python -m tests.benchmarks limit cifar10-wrn10-2 --steps 10

Each convolution and linear layer of the trunk is run alone at its shapes, forward and back to its input (no weight
gradients), with channels last as a search lays them out, and its shortest time counts. A protocol's passes would take
as long as these together if there were nothing else to do. In turns with them runs the paper's protocol, or on a
static classifier one APGD run; it says how much of its time was inside the trunk, and how much of it the layers would
have taken.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from msa_eval import evaluate

from . import paper, static
from .clock import spend
from .passes import counted
from .sheet import Sheet
from .subjects import Subject, subject


class Layer(NamedTuple):
    """A layer that multiplies, and what it is given.

    Attributes:
        module: a convolution or a linear layer.
        x: its input ``(B, ...)``.
        shape: of its output.
    """

    module: nn.Conv2d | nn.Linear
    x: Tensor
    shape: torch.Size

    @property
    def multiplications(self) -> int:
        """Multiply-adds of a pass of the batch, forward; as many are due for the gradient of the input."""
        weight = self.module.weight
        return self.shape.numel() * weight[0].numel()

    def forward(self) -> None:
        """Run it alone."""
        with torch.no_grad():
            self.module(self.x)

    def backward(self) -> Callable[[], object]:
        """What makes the gradient of its input alone, its output's being given."""
        gradient, weight = torch.ones(self.shape), self.module.weight
        if gradient.ndim == 4:
            gradient = gradient.contiguous(memory_format=torch.channels_last)
        if isinstance(self.module, nn.Linear):
            return lambda: gradient @ weight
        conv = self.module
        assert not isinstance(conv.padding, str)
        return partial(
            torch.ops.aten.convolution_backward, gradient, self.x, weight, None, conv.stride, conv.padding,
            conv.dilation, False, [0, 0], conv.groups, [True, False, False],
        )  # fmt: skip


def layers(trunk: nn.Module, x: Tensor) -> list[Layer]:
    """The layers of a trunk that multiply, as they meet a batch of images."""
    found: list[Layer] = []

    def note(module: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> None:
        assert isinstance(module, nn.Conv2d | nn.Linear)
        found.append(Layer(module, given[0].detach(), out.shape))

    hooks = [m.register_forward_hook(note) for m in trunk.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    with torch.no_grad():
        trunk(x.contiguous(memory_format=torch.channels_last))
    for hook in hooks:
        hook.remove()
    return found


class Reached:
    """The shortest time that each layer was seen to take alone, forward and back, over all rounds.

    Args:
        layers: of a trunk.
    """

    def __init__(self, layers: Sequence[Layer]) -> None:
        self._actions = [[layer.forward for layer in layers], [layer.backward() for layer in layers]]
        self._least = [[math.inf] * len(layers) for _ in self._actions]

    def again(self, times: int) -> None:
        """Run all layers, one after the other, some more times."""
        with torch.no_grad():
            for _ in range(times):
                for actions, least in zip(self._actions, self._least, strict=True):
                    for place, action in enumerate(actions):
                        least[place] = min(least[place], spend(action).cpu)

    @property
    def forth(self) -> float:
        """Seconds of computing that a batch takes forward."""
        return sum(self._least[0])

    @property
    def back(self) -> float:
        """Seconds of computing that it takes back."""
        return sum(self._least[1])


def run(name: str, *, batch: int, steps: int, repeats: int, out: Path) -> None:
    """Run a protocol and the layers in turns, and write ``limit.csv``."""
    it = subject(name, batch)
    of = layers(it.fc.trunk, it.data.images(torch.arange(batch)))
    work, reached = protocol(it, steps, batch), Reached(of)
    reached.again(2)
    made = []
    for _ in range(repeats):
        with counted(it.fc.trunk) as passes:
            spent = spend(work)
        made.append((passes, spent))
        reached.again(2)
    due = sum(layer.multiplications for layer in of)
    for repeat, (passes, spent) in enumerate(made):
        figures = ratios(
            passes.forwards / batch, passes.backwards / batch, forth=reached.forth, back=reached.back, cpu=spent.cpu
        )
        multiplied = due * (passes.forwards + passes.backwards) / batch
        figures |= {
            "inside the trunk": passes.inside / spent.cpu,
            "gigamultiplications a second": multiplied / spent.cpu / 1e9,
            "gigamultiplications a second, layers alone": due * 2 / (reached.forth + reached.back) / 1e9,
            "megamultiplications an image": due / batch / 1e6,
            "cpu": spent.cpu,
        }
        Sheet(out / "limit.csv", model=name, batch=batch, steps=steps, repeat=repeat).add(figures)


def ratios(forwards: float, backwards: float, *, forth: float, back: float, cpu: float) -> dict[str, float]:
    """What share of a run's time its passes would take in the layers alone.

    Args:
        forwards: passes of a batch.
        backwards: the same back.
        forth: seconds of the layers alone for a batch.
        back: the same back.
        cpu: seconds of the run.

    >>> ratios(4, 2, forth=1.0, back=2.0, cpu=16.0)
    {'of the limit': 0.5, 'forwards': 4, 'backwards': 2}
    """
    return {"of the limit": (forwards * forth + backwards * back) / cpu, "forwards": forwards, "backwards": backwards}


def protocol(it: Subject, steps: int, batch: int) -> Callable[[], object]:
    """The paper's protocol on HPM with some queries, or one APGD run on a static classifier."""
    if it.hpm is None:
        return partial(evaluate, it.fc, it.data, protocol=static.protocol(it.ball, steps=steps, batch=batch), fc=False)
    ours = paper.protocol(it.ball, steps=steps, queries=2 * steps, batch=batch)
    return partial(evaluate, it.hpm, it.data, protocol=ours, fc=False)
