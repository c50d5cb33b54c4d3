"""Defences that mask their gradient before the network, at the level of pixels."""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image
from scipy.ndimage import median_filter
from torch import Tensor, nn
from torch.nn import functional as F

from msa_eval.attacks import Ball

from .adaptive import alone
from .exact import additive
from .known import Attack, Known
from .nets import LEVELS, net, reference, training_set


def through(stage: object, x: Tensor) -> Tensor:
    """The stage's image on the way there, the identity on the way back (BPDA; Athalye et al. 2018)."""
    return x + (stage(x) - x).detach()  # type: ignore[operator]


def bpda(defence: nn.Module, x: Tensor, y: Tensor, ball: Ball) -> Tensor:
    """Of ``clean`` before ``net``: the network's gradient at the stage's image, and at the image itself."""
    routes = [lambda v: defence.net(through(defence.clean, v)), defence.net]
    return alone(defence, routes, x, y, ball)


class Rounding(nn.Module):
    """Each pixel to one of four grey levels."""

    def __init__(self) -> None:
        super().__init__()
        self.net = reference()

    def clean(self, x: Tensor) -> Tensor:
        return (x * 3).round() / 3

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.clean(x))


class Threshold(nn.Module):
    """Black or white, by comparison, before a linear model."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net("linear")

    def forward(self, x: Tensor) -> Tensor:
        return self.net((x > 0.45).to(next(self.net.parameters()).dtype))


class IntegerTable(nn.Module):
    """Pixels as integers look up a tone curve, before a linear model."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net("linear")
        self.register_buffer("curve", torch.tensor([0.0, 0.02, 0.1, 0.3, 0.55, 0.8, 0.95, 0.98, 1.0]))

    def forward(self, x: Tensor) -> Tensor:
        curve: Tensor = self.get_buffer("curve")
        return self.net(curve.to(next(self.net.parameters()).dtype)[(x * 8).long()])


class ThermometerCode(nn.Module):
    """Each pixel as bits that say which levels it exceeds, and a linear model of the bits."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net("thermometer")

    def forward(self, x: Tensor) -> Tensor:
        bits = self.net[0](x)  # type: ignore[index]
        return self.net[1](bits.to(next(self.net.parameters()).dtype))  # type: ignore[index,no-any-return]


class MedianFilter(nn.Module):
    """SciPy's median filter: pixels leave torch."""

    def __init__(self) -> None:
        super().__init__()
        self.net = reference()

    def clean(self, x: Tensor) -> Tensor:
        return torch.from_numpy(median_filter(x.detach().numpy(), size=(1, 1, 2, 2)))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.clean(x))


def medians(x: Tensor) -> Tensor:
    """The same filter in torch: of four values SciPy takes the third; its borders reflect."""
    padded = F.pad(x, (1, 0, 1, 0), mode="replicate")
    four = torch.stack([padded[..., i : i + 8, j : j + 8] for i in (0, 1) for j in (0, 1)])
    return four.sort(dim=0).values[2]


class Jpeg(nn.Module):
    """Pillow's JPEG there and back: one block of 8 by 8 an image."""

    def __init__(self, quality: int = 30) -> None:
        super().__init__()
        self.net, self.quality = reference(), quality

    def clean(self, x: Tensor) -> Tensor:
        out = []
        for image in (x.detach()[:, 0] * 255).round().byte().numpy():
            file = io.BytesIO()
            Image.fromarray(image).save(file, "JPEG", quality=self.quality)
            out.append(np.asarray(Image.open(file)).astype(np.float32) / 255)
        return torch.from_numpy(np.stack(out)).unsqueeze(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.clean(x))


class Subspace(nn.Module):
    """An outside denoiser, run without gradients: each image on the first principal components of training."""

    def __init__(self, components: int = 16) -> None:
        super().__init__()
        flat = training_set().x.flatten(1)
        mean = flat.mean(0)
        _, _, rows = torch.linalg.svd(flat - mean, full_matrices=False)
        self.register_buffer("mean", mean)
        self.register_buffer("project", rows[:components].T @ rows[:components])

    def forward(self, x: Tensor) -> Tensor:
        mean = self.get_buffer("mean")
        flat = (x.flatten(1) - mean) @ self.get_buffer("project") + mean
        return flat.clamp(0, 1).view_as(x)


class Denoised(nn.Module):
    """The denoiser's image, under ``no_grad``."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.denoiser = reference(), Subspace()

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.denoiser(x)
        return self.net(x)


class DetailDenoised(nn.Module):
    """The coarse part of an image as it is, its detail from the denoiser, under ``no_grad``."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.denoiser = reference(), Subspace()

    def forward(self, x: Tensor) -> Tensor:
        coarse = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
        with torch.no_grad():
            detail = self.denoiser(x) - F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
        return self.net(coarse + detail)


def denoised(defence: nn.Module, x: Tensor, y: Tensor, ball: Ball) -> Tensor:
    """Through the denoiser, which is differentiable: of both forms the image is the denoiser's (or near it)."""

    def whole(v: Tensor) -> Tensor:
        with _gradients_kept():
            return defence(v)  # type: ignore[no-any-return]

    return alone(defence, [whole, lambda v: defence.net(defence.denoiser(v)), defence.net], x, y, ball)


class _gradients_kept:  # noqa: N801
    """Within it ``torch.no_grad`` does nothing."""

    def __enter__(self) -> None:
        self.held = torch.no_grad
        torch.no_grad = torch.enable_grad  # type: ignore[assignment,misc]

    def __exit__(self, *_: object) -> None:
        torch.no_grad = self.held  # type: ignore[misc]


class InferenceMode(nn.Module):
    """A forward that is never to be differentiated."""

    def __init__(self) -> None:
        super().__init__()
        self.net = reference()

    @torch.inference_mode()
    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class HalfDetached(nn.Module):
    """Every second pixel is detached."""

    def __init__(self) -> None:
        super().__init__()
        self.net = reference()

    def forward(self, x: Tensor) -> Tensor:
        board = (torch.arange(8).view(8, 1) + torch.arange(8)) % 2 == 0
        return self.net(torch.where(board, x, x.detach()))


class Purified(nn.Module):
    """Five steps that lower the total variation, started from the image and detached at the end."""

    def __init__(self, steps: int = 5) -> None:
        super().__init__()
        self.net, self.steps = reference(), steps

    def clean(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            point = x.detach().clone().requires_grad_()
            for _ in range(self.steps):
                rough = (point.diff(dim=2) ** 2).sum() + (point.diff(dim=3) ** 2).sum()
                (slope,) = torch.autograd.grad(rough + (point - x.detach()).square().sum(), point)
                point = (point - 0.03 * slope).detach().requires_grad_()
        return point.detach()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.clean(x))


class Patches(nn.Module):
    """Each patch of 2 by 2 becomes the nearest of 48 patches of training digits."""

    def __init__(self) -> None:
        super().__init__()
        self.net = reference()
        patches = F.unfold(training_set().x[:300], 2, stride=2).transpose(1, 2).reshape(-1, 4)
        order = torch.randperm(len(patches), generator=torch.Generator().manual_seed(0))
        self.register_buffer("book", patches[order].unique(dim=0)[:: max(1, len(patches.unique(dim=0)) // 48)])

    def clean(self, x: Tensor) -> Tensor:
        book, patches = self.get_buffer("book"), F.unfold(x, 2, stride=2).transpose(1, 2)
        near = book[torch.cdist(patches, book.expand(len(x), -1, -1)).argmin(dim=2)]
        return F.fold(near.transpose(1, 2), (8, 8), 2, stride=2)

    def soft(self, x: Tensor) -> Tensor:
        book, patches = self.get_buffer("book"), F.unfold(x, 2, stride=2).transpose(1, 2)
        near = (-40 * torch.cdist(patches, book.expand(len(x), -1, -1)) ** 2).softmax(dim=2) @ book
        return F.fold(near.transpose(1, 2), (8, 8), 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.clean(x))


class AntiAdversary(nn.Module):
    """Two steps on the image that raise the network's own confidence (Alfarra et al. 2022, arXiv:2103.14347)."""

    def __init__(self, length: float = 0.15, net: nn.Module | None = None) -> None:
        super().__init__()
        self.net, self.length = net or reference(), length

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            held = x.detach()
            label = self.net(held).argmax(1)
            delta = torch.zeros_like(held).requires_grad_()
            for _ in range(2):
                loss = F.cross_entropy(self.net(held + delta), label, reduction="sum")
                (slope,) = torch.autograd.grad(loss, delta)
                delta = (delta - self.length * slope.sign()).detach().requires_grad_()
        return self.net(x + delta.detach())


def static_net(defence: nn.Module, x: Tensor, y: Tensor, ball: Ball) -> Tensor:
    """Through the network behind the defence alone."""
    return alone(defence, [defence.net], x, y, ball)


def pixelwise(values: Tensor) -> Attack:
    """The closed form of a linear model of each pixel's own code."""

    def attack(defence: nn.Module, x: Tensor, y: Tensor, ball: Ball) -> Tensor:
        return additive(defence.double(), x, y, ball, values)

    return attack


def patched(defence: Patches, x: Tensor, y: Tensor, ball: Ball) -> Tensor:
    """Through soft assignments, through the patches themselves, and through the network at the image."""
    routes = [
        lambda v: defence.net(defence.soft(v)), lambda v: defence.net(through(defence.clean, v)),
        defence.net,
    ]  # fmt: skip
    return alone(defence, routes, x, y, ball)


def median_filtered(defence: MedianFilter, x: Tensor, y: Tensor, ball: Ball) -> Tensor:
    """Through the filter in torch."""
    routes = [lambda v: defence.net(medians(v)), lambda v: defence.net(through(defence.clean, v))]
    return alone(defence, routes, x, y, ball)


def purified(defence: Purified, x: Tensor, y: Tensor, ball: Ball) -> Tensor:
    """Through the inner steps, which are linear in the image."""

    def inner(v: Tensor) -> Tensor:
        point = v
        for _ in range(defence.steps):
            rows = F.pad(point.diff(dim=2), (0, 0, 1, 1)).diff(dim=2)
            columns = F.pad(point.diff(dim=3), (1, 1)).diff(dim=3)
            point = point - 0.03 * (-2 * rows - 2 * columns + 2 * (point - v))
        return defence.net(point)

    return alone(defence, [inner, lambda v: defence.net(through(defence.clean, v))], x, y, ball)


def cells(edges: list[float]) -> Tensor:
    """The middle of each interval between edges."""
    line = torch.tensor([0.0, *edges, 1.0])
    return (line[1:] + line[:-1]) / 2


DEFENCES = (
    Known("rounding", Rounding, bpda, masked="rounding", level="pixels"),
    Known("threshold", Threshold, pixelwise(cells([0.45])), masked="comparison", level="pixels", exact=True, eps=0.1),
    Known("integer-table", IntegerTable, pixelwise(cells([i / 8 for i in range(1, 8)])), masked="integer cast, table",
          level="pixels", exact=True, eps=0.1),
    Known("thermometer", ThermometerCode, pixelwise(cells([i / LEVELS for i in range(1, LEVELS)])),
          masked="comparison", level="pixels", exact=True, eps=0.04, source="Buckman et al. 2018"),
    Known("median-filter", MedianFilter, median_filtered, masked="SciPy", level="pixels", source="Xu et al. 2018"),
    Known("jpeg", Jpeg, bpda, masked="Pillow", level="pixels", source="Guo et al. 2018"),
    Known("denoiser", Denoised, denoised, masked="no_grad", level="pixels"),
    Known("detail-denoiser", DetailDenoised, denoised, masked="no_grad", level="pixels", part=True),
    Known("inference-mode", InferenceMode, static_net, masked="inference_mode", level="model"),
    Known("half-detached", HalfDetached, static_net, masked="detach", level="pixels", part=True),
    Known("total-variation", Purified, purified, masked="inner optimisation", level="pixels",
          source="Guo et al. 2018"),
    Known("patches", Patches, patched, masked="argmin, table", level="pixels", source="Guo et al. 2018"),
    Known("anti-adversary", AntiAdversary, static_net, masked="inner optimisation", level="pixels", part=True,
          source="Alfarra et al. 2022"),
)  # fmt: skip
