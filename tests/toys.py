"""Small models and data that tests build their cases from."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from msa_eval import HPM, Classifier, Samples
from msa_eval.attacks.batch import AdversarialBatch, Batch
from msa_eval.attacks.gradient import ApgdAttack
from msa_eval.defense.contract import decide
from msa_eval.judging.judged_batch import JudgedBatch
from msa_eval.judging.outcomes import RunResult


class LinearTrunk(nn.Module):
    """Flattens images and keeps a few random directions; counts the images it sees."""

    def __init__(self, inputs: int = 12, dim: int = 6, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(inputs, dim, generator=generator) / inputs**0.5)
        self.images = 0
        self.batches: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.images += len(x)
        self.batches.append(len(x))
        return x.flatten(1) @ self.weight


def make_classifier(classes: int = 4, *, inputs: int = 12, dim: int = 6, seed: int = 0) -> Classifier:
    trunk = LinearTrunk(inputs, dim, seed)
    fc = nn.Linear(dim, classes)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        fc.weight.copy_(torch.randn(fc.weight.shape, generator=generator))
        fc.bias.copy_(0.1 * torch.randn(fc.bias.shape, generator=generator))
    return Classifier(trunk, fc).eval()


def make_samples(
    classifier: nn.Module, count: int = 24, *, shape: tuple[int, ...] = (3, 2, 2), seed: int = 0
) -> Samples:
    """Random images, labelled by the classifier, one in six wrongly."""
    generator = torch.Generator().manual_seed(seed)
    x = 0.2 + 0.6 * torch.rand(count, *shape, generator=generator)
    with torch.no_grad():
        logits = classifier(x)
    y = logits.argmax(dim=1)
    y[::6] = (y[::6] + 1) % logits.shape[1]
    return Samples(x, y, "random")


def make_hpm(classes: int = 4, *, seed: int = 0) -> HPM:
    """An untrained HPM whose prototypes are class means of random images."""
    classifier = make_classifier(classes, seed=seed)
    hpm = HPM(classifier.trunk, classifier.fc).eval()
    x = torch.rand(200, 3, 2, 2, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        z = hpm.features(x)
        hpm.start_prototypes(z, hpm.fc_logits(z).argmax(dim=1))
    return hpm


def make_batch(hpm: HPM, count: int, seed: int = 0) -> Batch:
    """Samples of `make_samples` as one clean batch, with the target's answer."""
    samples = make_samples(hpm, count, seed=seed)
    with torch.no_grad():
        z = hpm.features(samples.x)
    return Batch(0, samples.x, samples.y, z, decide(hpm, z))


def attacked(judged: JudgedBatch) -> tuple[RunResult, list[Tensor]]:
    """One APGD run on a trial, with every batch that was judged, the final one last."""
    seen: list[Tensor] = []
    judge_point = judged._judge.iterate

    def watched(point: AdversarialBatch, logits: Tensor) -> None:
        seen.append(point.x)
        judge_point(point, logits)

    judged._judge.iterate = watched  # type: ignore[method-assign]
    outcome = judged.finish(ApgdAttack("margin", steps=12)(judged, torch.Generator().manual_seed(0)))
    return outcome, [*seen, judged._final.x]


class AskedInQueries(JudgedBatch):
    """Keeps every batch that a query attack asked about, put together as it says."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.asked: list[Tensor] = []
        self.held = self.batch.x

    def propose(self, points: Tensor, rows: Tensor) -> Tensor:
        self.offered = self.held.clone()
        self.offered[rows] = points
        self.asked.append(self.offered)
        return super().propose(points, rows)

    def accept(self, rows: Tensor) -> Tensor:
        self.held = torch.where(rows.view(-1, 1, 1, 1), self.offered, self.held)
        self.asked.append(self.held)
        return super().accept(rows)
