"""Submodules that are given images: found wherever they are held, by themselves and passed over."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from msa_eval.surrogates.found.stages import (
    ClassPassedOver,
    InnerModel,
    MeanOfInner,
    PassedOver,
    classes_passing_on,
    scaling,
    stages_of,
)


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 3))


class Quantised(nn.Module):
    """A stage without a gradient."""

    def forward(self, x: Tensor) -> Tensor:
        return (x * 8).round() / 8


class Halved(nn.Module):
    """A stage on features with a wrong gradient."""

    def forward(self, z: Tensor) -> Tensor:
        return (z / 2).detach() - z + z.detach()


class Guarded(nn.Module):
    """Normalises, purifies, and asks a model that it may hold in a list."""

    def __init__(self, *, hidden: bool = False, exact: bool = False) -> None:
        super().__init__()
        model, self.exact = net(), exact
        self.stage = Quantised()
        self.tail = nn.Sequential(Halved(), nn.Linear(3, 3))
        self.held = [model] if hidden else nn.ModuleList([model])

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.exact else self.stage(x)
        return self.tail(self.held[0](2 * x - 1))


class Whole:
    """A model whose features are the images."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def features(self, x: Tensor) -> Tensor:
        return x

    def logits(self, z: Tensor) -> Tensor:
        return self.model(z)


@pytest.fixture
def x() -> Tensor:
    return torch.rand(6, 3, 2, 2, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("hidden", [False, True])
def test_the_inner_model_is_found_with_what_it_is_given(hidden: bool, x: Tensor) -> None:
    target = Whole(Guarded(hidden=hidden, exact=True))
    stages = {stage.name: stage for stage in stages_of(target, x)}
    inner = stages["held.0"]
    assert inner.given.exact
    torch.testing.assert_close(inner.given(x), 2 * x - 1)
    assert inner.answers is not None
    leaf = x.clone().requires_grad_()
    logits = InnerModel(inner.module, inner.given)(target, leaf)
    torch.testing.assert_close(logits, inner.answers)
    assert logits.requires_grad


def test_a_stage_passes_images_on_and_is_no_model(x: Tensor) -> None:
    stages = {stage.name: stage for stage in stages_of(Whole(Guarded()), x)}
    assert stages["stage"].passes_on
    assert stages["stage"].answers is None
    assert not stages["held.0"].given.exact
    assert not stages["held.0"].passes_on


@pytest.mark.parametrize(("name", "before"), [("stage", False), ("held.0", True)])
def test_what_is_passed_over_is_the_identity_on_the_way_back(name: str, before: bool, x: Tensor) -> None:
    target = Whole(Guarded())
    target.model.tail = nn.Identity()
    stage = next(stage for stage in stages_of(target, x) if stage.name == name)
    leaf = x.clone().requires_grad_()
    logits = PassedOver(stage, before=before)(target, leaf)
    with torch.no_grad():
        torch.testing.assert_close(logits, target.logits(x))
    (found,) = torch.autograd.grad(logits[:, 0].sum(), leaf)
    expected = 2 * target.model.held[0][1].weight[0].detach()
    for row in found.flatten(1):
        assert float(torch.cosine_similarity(row, expected, dim=0)) > 0.99


def test_modules_of_a_class_are_passed_over_together(x: Tensor) -> None:
    target = Whole(Guarded(exact=True))
    assert classes_passing_on(target, x) == [Halved]
    leaf = x.clone().requires_grad_()
    logits = ClassPassedOver(Halved)(target, leaf)
    with torch.no_grad():
        torch.testing.assert_close(logits, target.logits(x))
    (found,) = torch.autograd.grad(logits[:, 0].sum(), leaf)
    expected = 2 * target.model.tail[1].weight[0] @ target.model.held[0][1].weight
    torch.testing.assert_close(found, expected.view(1, 3, 2, 2).expand_as(found))


def test_no_hook_stays_not_even_after_a_failure(x: Tensor) -> None:
    class Failing(Guarded):
        def forward(self, x: Tensor) -> Tensor:
            super().forward(x)
            raise RuntimeError("no")

    target = Whole(Guarded())
    stage = next(stage for stage in stages_of(target, x) if stage.name == "stage")
    failing = Whole(Failing())
    for model in (PassedOver(stage, before=False), PassedOver(stage, before=True), ClassPassedOver(Halved)):
        with pytest.raises(RuntimeError, match="no"):
            model(failing, x)
    with pytest.raises(RuntimeError, match="no"):
        stages_of(failing, x)
    for module in [*target.model.modules(), *failing.model.modules()]:
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    assert not torch.nn.modules.module._global_forward_hooks


def test_the_mean_of_several_models(x: Tensor) -> None:
    members = tuple(InnerModel(net(seed), scaling(x, x)) for seed in range(3))
    mean: Any = torch.stack([member(None, x) for member in members]).mean(0)
    torch.testing.assert_close(MeanOfInner(members)(None, x), mean)
