"""The small networks that the defences are built on: the packaged digits reference, and those of ``nets.safetensors``.

``python -m tests.defences.nets [NAME ...]`` trains the latter again, in a few minutes.
"""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from msa_eval import HPM, Classifier, Samples, load_checkpoint, load_samples
from msa_eval.references import reference_path

WEIGHTS = Path(__file__).with_name("nets.safetensors")
EPS = 0.15
"""Linf radius of adversarial training, as of the digits reference."""

LEVELS = 10
"""Of the thermometer code."""


class KWinners(nn.Module):
    """k-winners-take-all: keep the largest activations of each image (Xiao et al. 2020, arXiv:1905.10510)."""

    def __init__(self, share: float = 0.25) -> None:
        super().__init__()
        self.share = share

    def forward(self, z: Tensor) -> Tensor:
        flat = z.flatten(1)
        lowest = flat.topk(max(1, int(self.share * flat.shape[1])), dim=1).values[:, -1:]
        return (flat * (flat >= lowest)).view_as(z)


class Binary(torch.autograd.Function):
    """The sign, with the gradient of a clipped identity (Hubara et al. 2016, arXiv:1602.02830)."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, z: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(z)
        return z.sign()

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> Tensor:  # type: ignore[override]
        (z,) = ctx.saved_tensors  # type: ignore[attr-defined]
        out: Tensor = grad * (z.abs() <= 1)
        return out


class BinaryTrunk(nn.Module):
    """Two layers whose features are signs; ``before(x)`` is what they are signs of."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 16, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(256, 64))

    def before(self, x: Tensor) -> Tensor:
        out: Tensor = self.body(x)
        return out

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = Binary.apply(self.before(x))
        return out


def thermometer(x: Tensor) -> Tensor:
    """Each pixel as ``LEVELS`` bits, the first of which say which levels it exceeds: ``(B, 64 LEVELS)``."""
    steps = torch.arange(LEVELS) / LEVELS
    return (x.flatten(1).unsqueeze(2) > steps).float().flatten(1)


class Thermometer(nn.Module):
    """The code as a layer."""

    def forward(self, x: Tensor) -> Tensor:
        return thermometer(x)


def cnn(act: Callable[[], nn.Module], width: int = 8) -> nn.Sequential:
    """A small CNN with any activation."""
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1), act(), nn.Conv2d(width, 2 * width, 3, 2, 1), act(),
        nn.Flatten(), nn.Linear(32 * width, 32), act(), nn.Linear(32, 10),
    )  # fmt: skip


def batch_normed() -> nn.Sequential:
    """A small CNN with batch normalisation."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1), nn.BatchNorm2d(16),
        nn.ReLU(), nn.Flatten(), nn.Linear(256, 10),
    )  # fmt: skip


BLUEPRINTS: dict[str, tuple[Callable[[], nn.Module], str, float]] = {
    "natural": (lambda: cnn(nn.ReLU), "plain", 0.0),
    "trades": (lambda: cnn(nn.ReLU), "trades", EPS),
    "tanh": (lambda: cnn(nn.Tanh), "pgd", EPS),
    "mlp": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10)), "pgd", EPS),
    "batch-norm": (batch_normed, "pgd", EPS),
    "linear": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), "pgd", 0.1),
    "binary": (lambda: Classifier(BinaryTrunk(), nn.Linear(64, 10)), "pgd", EPS),
    "k-winners": (lambda: cnn(KWinners), "pgd", 0.1),
    "thermometer": (lambda: nn.Sequential(Thermometer(), nn.Linear(64 * LEVELS, 10)), "plain", 0.0),
}
"""How each is built, how it is trained, and at which Linf radius."""


def reference() -> Classifier:
    """The packaged digits CNN with its FC head, adversarially trained."""
    return copy.deepcopy(load_checkpoint(reference_path("digits")).classifier).eval()


def reference_hpm() -> HPM:
    """The packaged HPM on that CNN."""
    model = load_checkpoint(reference_path("digits")).model
    assert isinstance(model, HPM)
    return copy.deepcopy(model).eval()


def net(name: str) -> nn.Module:
    """One of `BLUEPRINTS`, trained."""
    model = BLUEPRINTS[name][0]()
    held = {key.removeprefix(f"{name}:"): value for key, value in _weights().items() if key.startswith(f"{name}:")}
    model.load_state_dict(held)
    return model.eval()


@functools.cache
def _weights() -> dict[str, Tensor]:
    return {name: v.float() if v.is_floating_point() else v for name, v in load_file(WEIGHTS).items()}


@functools.cache
def training_set() -> Samples:
    """All training digits."""
    return load_samples("digits", split="train")


@functools.cache
def training_features() -> Tensor:
    """The reference's features of the training digits ``(N, d)``."""
    with torch.no_grad():
        return reference().features(training_set().x)


def _inner(model: nn.Module, x: Tensor, y: Tensor, eps: float, how: str, draw: torch.Generator) -> Tensor:
    """Seven steps of PGD on cross-entropy, or on the divergence from the clean answer."""
    clean = model(x).softmax(1).detach()
    point = (x + eps * (2 * torch.rand(x.shape, generator=draw) - 1)).clamp(0, 1)
    for _ in range(7):
        point.requires_grad_()
        out = model(point)
        loss = F.kl_div(out.log_softmax(1), clean, reduction="sum") if how == "trades" else F.cross_entropy(out, y)
        (slope,) = torch.autograd.grad(loss, point)
        point = (x + (point.detach() + eps / 3 * slope.sign() - x).clamp(-eps, eps)).clamp(0, 1)
    return point.detach()


def _train(model: nn.Module, how: str, eps: float, *, epochs: int = 30, lr: float = 3e-3, seed: int = 0) -> nn.Module:
    """Train plainly, by PGD (Madry et al. 2018) or by TRADES with β = 6 (Zhang et al. 2019)."""
    data, draw = training_set(), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for _ in range(epochs):
        for index in torch.randperm(len(data), generator=draw).split(64):
            x, y = data.x[index], data.y[index]
            point = x if how == "plain" else _inner(model.eval(), x, y, eps, how, draw)
            out = model.train()(point)
            loss = F.cross_entropy(out, y)
            if how == "trades":
                plain = model(x)
                loss = F.cross_entropy(plain, y) + 6 * F.kl_div(
                    out.log_softmax(1), plain.log_softmax(1), reduction="batchmean", log_target=True
                )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
    return model.eval()


def _short(value: Tensor) -> Tensor:
    """In half precision, for a small file; the nets are these, rounded."""
    return (value.half() if value.is_floating_point() else value).contiguous()


def main(names: list[str]) -> None:
    """Train these, or all of them, and write their weights."""
    held = load_file(WEIGHTS) if names else {}
    test = load_samples("digits")
    for name, (build, how, eps) in BLUEPRINTS.items():
        if names and name not in names:
            continue
        torch.manual_seed(0)
        model = _train(build(), how, eps)
        with torch.no_grad():
            clean = float((model(test.x).argmax(1) == test.y).float().mean())
        print(f"{name}: {clean:.3f} of the test digits right", flush=True)
        held = {key: value for key, value in held.items() if not key.startswith(f"{name}:")}
        held |= {f"{name}:{key}": _short(value) for key, value in model.state_dict().items()}
    save_file(held, WEIGHTS)


if __name__ == "__main__":
    main(sys.argv[1:])
