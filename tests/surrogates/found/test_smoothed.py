"""Averages over noise, and gradients estimated from answers alone."""

from __future__ import annotations

import torch
from torch import Tensor

from msa_eval.surrogates.found.smoothed import Averaged, Estimated
from msa_eval.surrogates.registry import Surrogate


class Stairs:
    """A linear model of images that are rounded: its own gradient is zero everywhere."""

    batch_dependent = False

    def __init__(self) -> None:
        self.weight = torch.randn(48, 3, generator=torch.Generator().manual_seed(0))

    def features(self, x: Tensor) -> Tensor:
        return x

    def logits(self, z: Tensor) -> Tensor:
        return (z * 10).round().flatten(1) / 10 @ self.weight


def _cosine(defense: Stairs, found: Tensor) -> float:
    return float(torch.cosine_similarity(found.flatten(1), defense.weight[:, 0].expand(len(found), -1)).mean())


def test_an_estimate_points_where_the_answers_rise() -> None:
    defense, x = Stairs(), 0.2 + 0.6 * torch.rand(8, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    cosines = []
    for pairs in (12, 200):
        leaf = x.clone().requires_grad_()
        logits = Estimated(0.1, pairs)(defense, leaf)
        torch.testing.assert_close(logits.detach(), defense.logits(x))
        (found,) = torch.autograd.grad(logits[:, 0].sum(), leaf)
        again = torch.autograd.grad(Estimated(0.1, pairs)(defense, leaf)[:, 0].sum(), leaf)[0]
        assert bool((found == again).all())
        cosines.append(_cosine(defense, found))
    assert 0.2 < cosines[0] < cosines[1]
    assert cosines[1] > 0.6


def test_an_average_is_over_the_surrogate_s_logits_on_images_in_the_box() -> None:
    seen: list[Tensor] = []

    def logits(defense: object, x: Tensor) -> Tensor:
        seen.append(x)
        return x.flatten(1)[:, :3] ** 2

    x = torch.rand(4, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    found = Averaged(Surrogate("square", logits, on_images=True), 0.1, draws=5)(None, x)
    torch.testing.assert_close(found, torch.stack([one.flatten(1)[:, :3] ** 2 for one in seen]).mean(0))
    assert len(seen) == 5
    assert all(float(one.min()) >= 0 and float(one.max()) <= 1 for one in seen)
    assert not bool((seen[0] == seen[1]).all())
