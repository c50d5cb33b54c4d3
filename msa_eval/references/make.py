"""Make the packaged reference defences.

``python -m msa_eval.references.make digits OUT`` trains a CNN adversarially on scikit-learn's digits and fine-tunes HPM
on it. ``python -m msa_eval.references.make cifar10-wrn10-2 OUT CLASSIFIER TRAIN`` fine-tunes HPM on a given
WideResNet-10-2.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
from torch.nn import functional as F
from tqdm import tqdm

from msa_eval.attacks.ball import Ball
from msa_eval.data import Samples, load_samples
from msa_eval.defense.architectures import Blueprint, Classifier
from msa_eval.hpm.finetune import FinetuneSettings, finetune, history
from msa_eval.progress import Progress, silent
from msa_eval.targets.checkpoint import load_bare_classifier, save_checkpoint

DIGITS_EPS = 0.15
"""Linf radius of the digits reference: its FC head keeps between 40 and 80 % there."""


def train_classifier(
    classifier: Classifier,
    samples: Samples,
    *,
    eps: float,
    epochs: int,
    steps: int = 7,
    batch_size: int = 64,
    lr: float = 2e-3,
    seed: int = 0,
    progress: Progress = silent,
) -> Classifier:
    """Train a small classifier adversarially with PGD (Madry et al. 2018, arXiv:1706.06083).

    Args:
        classifier: changed in place and returned in evaluation mode.
        samples: the training set.
        eps: Linf radius, in [0, 1] pixel units.
        epochs: passes over the training set, with a cosine schedule to 0.
        steps: PGD steps of size ``2.5 eps / steps`` from a uniform start.
        batch_size: the last, incomplete batch is left out.
        lr: of Adam.
        seed: of the order and the starts; weights are initialised by the caller.
        progress: shows how far the training has come.
    """
    optimizer = torch.optim.Adam(classifier.parameters(), lr=lr, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    generator = torch.Generator().manual_seed(seed)
    ball = Ball("Linf", eps)
    for _ in progress(range(epochs), "adversarial training"):
        order = torch.randperm(len(samples), generator=generator)
        for index in order.split(batch_size)[: len(samples) // batch_size]:
            x, y = samples.images(index), samples.y[index]
            classifier.eval()
            x_adv = ball.project(x + eps * (2 * torch.rand(x.shape, generator=generator) - 1), x)
            for _ in range(steps):
                x_adv.requires_grad_()
                (gradient,) = torch.autograd.grad(F.cross_entropy(classifier(x_adv), y), x_adv)
                x_adv = ball.project(x_adv.detach() + 2.5 * eps / steps * gradient.sign(), x)
            loss = F.cross_entropy(classifier.train()(x_adv), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
    return classifier.eval()


def make_digits(out: Path, *, progress: Progress = silent) -> None:
    """Train and fine-tune the digits reference."""
    blueprint = Blueprint("digits-cnn", {"width": 16}, num_classes=10)
    train = load_samples("digits", split="train")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        classifier = blueprint.build()
    train_classifier(classifier, train, eps=DIGITS_EPS, epochs=40, progress=progress)
    # 40 epochs of 19 batches make as many updates as the paper's one epoch of CIFAR-10.
    settings = FinetuneSettings(epochs=40, eps=DIGITS_EPS, step_size=DIGITS_EPS / 4)
    model = finetune(classifier, train, settings=settings, progress=progress)
    training: dict[str, Any] = {"method": "PGD adversarial training", "norm": "Linf", "eps": DIGITS_EPS, "epochs": 40}
    save_checkpoint(out, model, blueprint, history={"classifier": training, **history(settings, train)})


def make_cifar10(out: Path, classifier: Path, train: Path, *, progress: Progress = silent) -> None:
    """Fine-tune the CIFAR-10 reference with the paper's settings."""
    bare = load_bare_classifier(classifier, "wideresnet", {"depth": 10, "width": 2})
    settings = FinetuneSettings()
    samples = load_samples(str(train))
    model = finetune(bare.classifier, samples, settings=settings, progress=progress)
    training = {"method": "N-FGSM", "norm": "Linf", "eps": 8 / 255, "epochs": 20, "file": classifier.name}
    save_checkpoint(out, model, bare.blueprint, history={"classifier": training, **history(settings, samples)})


@click.command(help=__doc__)
@click.argument("name", type=click.Choice(["digits", "cifar10-wrn10-2"]))
@click.argument("out", type=click.Path(path_type=Path))
@click.argument("files", nargs=-1, type=click.Path(exists=True, path_type=Path))
def _main(name: str, out: Path, files: tuple[Path, ...]) -> None:
    def bar(iterable: Any, description: str) -> Any:
        return tqdm(iterable, description)

    make: Callable[..., None] = make_digits if name == "digits" else make_cifar10
    if len(files) != (0 if name == "digits" else 2):
        raise click.UsageError("digits takes no files; cifar10-wrn10-2 takes CLASSIFIER and TRAIN")
    make(out, *files, progress=bar)


if __name__ == "__main__":
    _main()
