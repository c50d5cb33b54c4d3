"""Fine-tuning an HPM head on a frozen trunk (paper, section 6.2)."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from msa_eval.attacks.ball import Ball
from msa_eval.data import Samples
from msa_eval.defense.architectures import Classifier
from msa_eval.device import device_for
from msa_eval.hpm.ikl import ClassMeanSoftmax, ikl, soft_ce
from msa_eval.hpm.model import HPM, Variant
from msa_eval.progress import Progress, silent, warn
from msa_eval.untrusted import printable


@dataclass(frozen=True)
class FinetuneSettings:
    """The paper's settings for CIFAR-10.

    Attributes:
        epochs: 1 on CIFAR-10, 2 on CIFAR-100 and ImageNet.
        batch_size: the last, incomplete batch is used too.
        lr: of Adam.
        momentum: λ of Eq. 14; 0.995 on CIFAR-100 and ImageNet.
        eps: Linf radius of the adversarial examples, in [0, 1] pixel units; 4/255 on ImageNet.
        steps: of the inner maximisation.
        step_size: of these, in pixel units.
        noise: standard deviation of the Gaussian start, in pixel units.
        alpha: weight of IKL's cross-entropy.
        beta: weight of IKL's squared term.
        temperature: of the class-mean softmax.
        seed: of the order and the noise.
    """

    epochs: int = 1
    batch_size: int = 64
    lr: float = 5e-5
    momentum: float = 0.98
    eps: float = 8 / 255
    steps: int = 10
    step_size: float = 0.003
    noise: float = 0.001
    alpha: float = 4.0
    beta: float = 20.0
    temperature: float = 4.0
    seed: int = 0

    def __post_init__(self) -> None:
        low = {
            "epochs": 1,
            "batch_size": 2,
            "steps": 1,
            "eps": 0,
            "step_size": 0,
            "noise": 0,
            "lr": 0,
            "temperature": 0,
        }
        wrong = [f"{name} = {getattr(self, name)} (at least {bound})" for name, bound in low.items()
                 if not getattr(self, name) >= bound]  # fmt: skip
        if wrong:
            raise ValueError(f"unusable settings: {', '.join(wrong)}")


@torch.enable_grad()
def finetune(
    classifier: Classifier,
    samples: Samples,
    *,
    settings: FinetuneSettings | None = None,
    variant: Variant | None = None,
    device: str = "auto",
    progress: Progress = silent,
) -> HPM:
    """Put an HPM head on a classifier and fine-tune it adversarially, the trunk frozen.

    The trunk stays in evaluation mode, so its batch statistics stay too. Clean features never change and are computed
    once. There is no augmentation; the paper mentions none.

    A plain head (``prototypes = "global"``) has nothing to fine-tune: neither the FC head nor the mixer reaches its
    logits, and it learns through the trunk alone (paper, section 3.2), which is frozen here. Its prototypes are the
    class means of the clean pass, exact where the moving average of Eq. 14 would be a noisy copy.

    Args:
        classifier: the trained trunk and FC head; it is not changed.
        samples: the training set, with samples of every class.
        settings: the paper's for CIFAR-10 by default.
        variant: the ablation switches.
        device: where to compute. ``auto`` is CUDA, else MPS, else the CPU.
        progress: shows how far each loop has come.

    Returns:
        the defence, in evaluation mode, on the CPU.

    Raises:
        ValueError: when the classifier can't take the images, a label is out of range, a class has no sample, the loss
            stops being finite, or there is no such device.
    """
    settings = settings or FinetuneSettings()
    num_classes = classifier.fc.out_features
    if int(samples.y.max()) >= num_classes:
        raise ValueError(
            f"expected labels below {num_classes}, the classifier's number of classes, "
            f"but {samples.name} has label {int(samples.y.max())}"
        )
    device = device_for(device, warn)
    if absent := sorted(set(range(num_classes)) - set(samples.y.unique().tolist())):
        more = f" and {len(absent) - 10} more" if len(absent) > 10 else ""
        raise ValueError(
            f"expected training samples of every class, but {samples.name} has none of class "
            f"{', '.join(map(str, absent[:10]))}{more}"
        )
    model = HPM(classifier.trunk, classifier.fc, momentum=settings.momentum, variant=variant).to(device)
    model.eval().requires_grad_(False)
    clean = _features(model, samples, settings.batch_size, device, progress)
    model.start_prototypes(clean, samples.y.to(device))
    if not model.assigns:
        return model.cpu()

    learned = [p.requires_grad_() for p in (*model.fc.parameters(), *model.mixer.parameters())]
    optimizer = torch.optim.Adam(learned, lr=settings.lr)
    generator = torch.Generator().manual_seed(settings.seed)
    class_means = ClassMeanSoftmax(num_classes, temperature=settings.temperature)
    for epoch in range(settings.epochs):
        order = torch.randperm(len(samples), generator=generator)
        batches = order.split(settings.batch_size)
        for index in progress(batches, f"epoch {epoch + 1}/{settings.epochs}"):
            x, y, z = samples.images(index).to(device), samples.y[index].to(device), clean[index.to(device)]
            model.update_prototypes(z, y)
            x_adv = _most_divergent(model, x, z, settings, generator)
            with torch.no_grad():
                z_adv = model.features(x_adv)
            logits = model.logits(z)
            weights = class_means.weights(y)
            divergence = ikl(logits, model.logits(z_adv), weights, alpha=settings.alpha, beta=settings.beta)
            loss = F.cross_entropy(logits, y) + divergence
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            class_means.gather(logits, y)
            if not bool(torch.isfinite(loss)):
                raise ValueError(
                    f"the loss is {float(loss.detach())}; lower lr, or look for bad values in {samples.name}"
                )
        class_means.next_epoch()
    return model.requires_grad_(False).cpu()


def history(settings: FinetuneSettings, samples: Samples) -> dict[str, Any]:
    """What a checkpoint should say of how it was made."""
    return {"finetune": asdict(settings), "data": samples.name, "data_sha256": samples.digest(), "n": len(samples)}


@torch.no_grad()
def _features(model: HPM, samples: Samples, batch_size: int, device: str, progress: Progress) -> Tensor:
    index = torch.arange(len(samples)).split(batch_size)
    try:
        return torch.cat([model.features(samples.images(i).to(device)) for i in progress(index, "clean features")])
    except RuntimeError as error:
        shape = samples.shape
        raise ValueError(
            f"the classifier can't take images of shape {shape} ({samples.name}): {printable(error)}"
        ) from error


def _most_divergent(model: HPM, x: Tensor, z: Tensor, settings: FinetuneSettings, generator: torch.Generator) -> Tensor:
    """The inner maximisation: signed steps on IKL's second term alone, from Gaussian noise."""
    ball = Ball("Linf", settings.eps)
    with torch.no_grad():
        clean = model.logits(z)
    noise = torch.randn(x.shape, generator=generator).to(x)
    x_adv = (x + settings.noise * noise).clamp(0, 1)
    for _ in range(settings.steps):
        x_adv.requires_grad_()
        divergence = soft_ce(clean, model.logits(model.features(x_adv)))
        (gradient,) = torch.autograd.grad(divergence, x_adv)
        x_adv = ball.project(x_adv.detach() + settings.step_size * gradient.sign(), x)
    return x_adv
