"""Surrogates are found where a gradient is masked, and none where it is true."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from toys import make_hpm

from msa_eval import WholeModel
from msa_eval.attacks.ball import Ball
from msa_eval.auditing.candidates import guarded
from msa_eval.auditing.finding import Finding
from msa_eval.auditing.surrogate_search import find_surrogates
from msa_eval.defense.contract import as_defense
from msa_eval.surrogates import STE
from msa_eval.surrogates.registry import Surrogate, get

BALL = Ball("Linf", 0.1)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(144, 3)).eval()


class Around(nn.Module):
    """Something around a model."""

    def __init__(self, rule: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.net, self.rule = net(), rule

    def forward(self, x: Tensor) -> Tensor:
        return self.rule(self.net, x)


def hide_detail(model: nn.Module, x: Tensor) -> Tensor:
    low = F.avg_pool2d(x, 3, 1, 1)
    with torch.no_grad():
        detail = x - low
    return model(low + detail)


def adapt(model: nn.Module, x: Tensor) -> Tensor:
    """An anti-adversary layer: steps that raise the model's own confidence."""
    with torch.enable_grad():
        own, d = model(x).argmax(1).detach(), torch.zeros_like(x, requires_grad=True)
        for _ in range(2):
            loss = F.cross_entropy(model(x.detach() + d), own, reduction="sum")
            (up,) = torch.autograd.grad(loss, d)
            d = (d - 0.3 * up.sign()).detach().requires_grad_()
    return model(x + d.detach())


class Negative(torch.autograd.Function):
    """The identity, with a gradient that points back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return -gradients[0]


def through_numpy(model: nn.Module, x: Tensor) -> Tensor:
    values = np.round(x.detach().numpy() * 31) / 31
    return model(torch.from_numpy(values))


def search(
    target: object, existing: list[Surrogate] | None = None, *, ball: Ball = BALL, **settings: Any
) -> Finding:  # fmt: skip
    defense = as_defense(target)
    for module in [target] if isinstance(target, nn.Module) else []:
        module.requires_grad_(False)
    x = 0.2 + 0.6 * torch.rand(24, 1, 6, 6, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        y = defense.logits(defense.features(x)).argmax(1)
    options: dict[str, Any] = {"brought": False, "batch_dependent": False} | settings
    correct = torch.ones_like(y, dtype=torch.bool)
    return find_surrogates(defense, x, y, correct, ball, [STE] if existing is None else existing, **options)


def test_of_a_true_gradient_nothing_is_searched() -> None:
    model = Around(lambda net, x: net(x))
    passes = 0

    def count(*_: object) -> None:
        nonlocal passes
        passes += 1

    model.register_forward_hook(count)
    finding = search(model)
    assert finding.best > 0.97
    assert not finding.surrogates
    assert not finding.tried
    assert passes < 70


def test_a_scaled_input_and_a_model_asked_of_the_images_are_no_finds() -> None:
    assert not search(Around(lambda net, x: net(2 * x - 1))).tried
    assert not search(Around(lambda net, x: net(x))).tried


MASKED: dict[str, tuple[Callable[[nn.Module, Tensor], Tensor], str]] = {
    "no_grad": (hide_detail, "straight-through"),
    "rounded": (lambda net, x: net((x * 8).round() / 8), "straight-through"),
    "a wrong gradient": (lambda net, x: net(Negative.apply(x)), "bpda:before-net"),
    "numpy": (through_numpy, "inner:net"),
    "a saturated head": (lambda net, x: torch.tanh(net(x).detach() * 50), "inner:net"),
}


@pytest.mark.parametrize("name", MASKED)
def test_of_a_masked_one_a_true_gradient_is_found(name: str) -> None:
    rule, expected = MASKED[name]
    target = Around(rule)
    differentiable = name in ("no_grad", "a wrong gradient")
    finding = search(target, [STE] if differentiable else [])
    assert finding.surrogates, finding.tried
    names = [one.name for one in finding.tried if one.truth is not None]
    assert any(found.startswith(expected) for found in names), names
    own = finding.truths["ste"].figure if differentiable else 0.0
    if name != "a saturated head":
        assert finding.best > max(0.9, own + 0.03)
    assert all(one.how for one in finding.tried)


def test_around_a_model_that_adapts_the_model_itself_is_found() -> None:
    """The layer drives the model into its flat part, where its gradient says nothing of the way out."""
    target = Around(adapt)
    torch.manual_seed(0)
    target.net = nn.Sequential(nn.Flatten(), nn.Linear(36, 12), nn.Tanh(), nn.Linear(12, 3))
    target.net[1].weight.data *= 8
    finding = search(target, ball=Ball("Linf", 0.04))
    assert [surrogate.name for surrogate in finding.surrogates] == ["inner:net"]
    broken = {one.name: one.broken for one in finding.tried}
    assert (broken["inner:net"] or 0) >= 8


def test_where_there_is_no_boundary_and_no_torch_answers_are_asked() -> None:
    weight = np.random.default_rng(0).normal(size=(36, 3)).astype("float32")

    class Alone(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            values = [[float(v) for v in row] for row in x.flatten(1).tolist()]
            return torch.tensor(np.array(values, dtype="float32") @ weight)

    finding = search(Alone(), [])
    assert [surrogate.name for surrogate in finding.surrogates] == ["smoothed"]
    assert finding.surrogates[0].passes > 1
    assert finding.best > 0.1


def test_the_reference_defence_is_left_to_what_it_brings() -> None:
    hpm = make_hpm().requires_grad_(False)
    x = 0.2 + 0.6 * torch.rand(32, 3, 2, 2, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        y = hpm(x).argmax(1)
    own = [get("frozen-prototypes"), get("soft-hybrid@0.3"), STE]
    correct = torch.ones_like(y, dtype=torch.bool)
    finding = find_surrogates(
        hpm, x, y, correct, Ball("Linf", 0.05), own, brought=True, batch_dependent=True
    )  # fmt: skip
    assert not finding.tried
    assert not finding.surrogates


def test_nothing_is_looked_for_where_that_is_not_wanted() -> None:
    finding = search(Around(hide_detail), search=False)
    assert not finding.tried
    assert set(finding.truths) == {"ste"}


def test_what_fails_is_dropped_with_the_reason() -> None:
    def fails_under_gradients(net: nn.Module, x: Tensor) -> Tensor:
        if torch.overrides._get_current_function_mode_stack():
            raise TypeError("not under a mode")
        with torch.no_grad():
            return net(x)

    finding = search(Around(fails_under_gradients), [])
    assert any("not under a mode" in one.reason for one in finding.tried)


def test_the_target_is_as_it_was() -> None:
    model = Around(hide_detail).eval()
    model.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    search(model)
    assert all(bool((value == before[name]).all()) for name, value in model.state_dict().items())
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert not module.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_same_seed_finds_the_same() -> None:
    first, again = (search(Around(hide_detail), seed=3) for _ in range(2))
    assert first.tried == again.tried
    assert first.truths == again.truths


def test_a_find_that_fails_on_some_batch_answers_as_the_target_does() -> None:
    def logits(defense: object, x: Tensor) -> Tensor:
        raise RuntimeError("not this batch")

    defense = WholeModel(net())
    x = torch.rand(4, 1, 6, 6, requires_grad=True)
    found = guarded(Surrogate("inner:net", logits, on_images=True)).logits(defense, x)
    torch.testing.assert_close(found, defense.logits(x))
    (gradient,) = torch.autograd.grad(found.sum(), x)
    assert float(gradient.abs().max()) == 0


def test_what_was_found_can_be_sent_to_another_process() -> None:
    cloudpickle = pytest.importorskip("ray.cloudpickle")
    target = Around(lambda net, x: net((x * 8).round() / 8)).eval()
    finding = search(target, [])
    x = torch.rand(4, 1, 6, 6)
    for surrogate in finding.surrogates:
        model, sent = cloudpickle.loads(cloudpickle.dumps((target, surrogate)))
        expected = surrogate.logits(as_defense(target), x)
        torch.testing.assert_close(sent.logits(as_defense(model), x), expected)


class Pulled(nn.Module):
    """Logits less what the batch has in the mean, looked at with or without a gradient, or not at all."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.net, self.how = net(), how

    def forward(self, x: Tensor) -> Tensor:
        z = self.net(x)
        mean = {"open": z, "hidden": z.detach(), "none": 0 * z}[self.how].mean(dim=0)
        return z - 0.5 * mean


@pytest.mark.parametrize(("how", "unreached"), [("open", False), ("hidden", True), ("none", False)])
def test_where_no_gradient_reaches_companions_that_count_one_is_found(how: str, unreached: bool) -> None:
    finding = search(WholeModel(Pulled(how).eval().requires_grad_(False)), batch_dependent=True)
    assert finding.unreached == unreached
    assert finding.sign().fired == unreached
    assert any("straight-through" in surrogate.name for surrogate in finding.surrogates) == unreached
    assert not search(
        WholeModel(Pulled(how).eval().requires_grad_(False)), batch_dependent=True, together=False
    ).unreached
