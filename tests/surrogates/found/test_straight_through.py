"""The gradient is passed through what blocks it, the values stay, and torch is as it was afterwards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from msa_eval.surrogates.found.passing import Passing
from msa_eval.surrogates.found.straight_through import OwnCode, looking_through

A = torch.tensor([[1.0, -2.0, 0.5], [0.3, 1.5, -1.0], [-0.7, 0.2, 1.0], [0.1, 0.4, 0.6]])


class Own:
    """A defence whose decision is a function of the features, which are the images."""

    def __init__(self, decide: Callable[[Tensor], Tensor]) -> None:
        self.decide = decide

    def features(self, x: Tensor) -> Tensor:
        return x

    def logits(self, z: Tensor) -> Tensor:
        return self.decide(z)


def gradient(decide: Callable[[Tensor], Tensor], x: Tensor, passing: Passing | None = None) -> Tensor:
    """The gradient of the first logit's sum through a decision looked through."""
    leaf = x.clone().requires_grad_()
    logits = OwnCode(passing or Passing(), on_images=True)(Own(decide), leaf)
    (found,) = torch.autograd.grad(logits[:, 0].sum(), leaf)
    return found


@torch.no_grad()
def _as_decorator(x: Tensor) -> Tensor:
    return x @ A


@torch.inference_mode()
def _inference(x: Tensor) -> Tensor:
    return x @ A


def _block(x: Tensor) -> Tensor:
    with torch.no_grad():
        return x @ A


def _numpy(x: Tensor) -> Tensor:
    return torch.from_numpy(np.round(255 * x.detach().cpu().numpy()) / 255).to(x) @ A


def _turned(x: Tensor) -> Tensor:
    images = (255 * x.detach().view(-1, 2, 2, 1).permute(0, 3, 1, 2)).to(torch.uint8).numpy()
    return torch.tensor(images).float().permute(0, 2, 3, 1).reshape(-1, 4) / 255 @ A


def _in_place(x: Tensor) -> Tensor:
    return (x * 10).round_().div_(10) @ A


def _switched(x: Tensor) -> Tensor:
    before = torch.is_grad_enabled()
    torch.set_grad_enabled(False)
    z = x @ A
    torch.set_grad_enabled(before)
    return z


def _hooked(x: Tensor) -> Tensor:
    z = x * 1
    if z.requires_grad:
        z.register_hook(lambda g: 0 * g)
    return z @ A


LINEAR: dict[str, Callable[[Tensor], Tensor]] = {
    "no_grad": _block,
    "no_grad as a decorator": _as_decorator,
    "inference_mode": _inference,
    "set_grad_enabled": _switched,
    "detach": lambda x: x.detach() @ A,
    "data": lambda x: x.data @ A,
    "round": lambda x: (x * 10).round() / 10 @ A,
    "floor": lambda x: torch.floor(x * 10) / 10 @ A,
    "in place": _in_place,
    "integer division": lambda x: (x * 10 // 1) / 10 @ A,
    "uint8": lambda x: (x * 255).to(torch.uint8).float() / 255 @ A,
    "integers computed with": lambda x: ((x * 100).int() + 3).sub(3).float() / 100 @ A,
    "estimator": lambda x: (x + (x.round() - x).detach()) @ A,
    "numpy": _numpy,
    "numpy, turned": _turned,
    "a hook": _hooked,
    "a number read": lambda x: x.detach() @ A * (float(x.detach().max()) >= 0) * (x.detach().sum().item() >= 0),
}


@pytest.fixture
def x() -> Tensor:
    return torch.rand(5, 4, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", LINEAR)
def test_what_blocks_a_linear_map_has_its_gradient(name: str, x: Tensor) -> None:
    found = gradient(LINEAR[name], x)
    torch.testing.assert_close(found, A[:, 0].expand(5, 4), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("name", LINEAR)
def test_values_are_the_target_s_own(name: str, x: Tensor) -> None:
    with torch.no_grad():
        expected = LINEAR[name](x.clone())
    looked = OwnCode(Passing(), on_images=True)(Own(LINEAR[name]), x.clone().requires_grad_())
    torch.testing.assert_close(looked.detach(), expected, rtol=0, atol=1e-6)


def test_each_thing_is_passed_through_only_where_that_is_asked(x: Tensor) -> None:
    cases: list[tuple[str, Passing]] = [
        ("no_grad", Passing(blocks=False)),
        ("detach", Passing(detached=False)),
    ]
    for name, passing in cases:
        leaf = x.clone().requires_grad_()
        assert not OwnCode(passing, on_images=True)(Own(LINEAR[name]), leaf).requires_grad
    assert float(gradient(LINEAR["round"], x, Passing(steps=False)).abs().max()) == 0


def test_the_argmax_has_the_gradient_of_a_softmax(x: Tensor) -> None:
    leaf = x.clone().requires_grad_()
    scores = leaf @ A
    spread = float(scores.detach().std(dim=1).mean()) / 2
    (expected,) = torch.autograd.grad((scores / min(spread, 1.0)).softmax(1)[:, 0].sum(), leaf)
    for hard in (
        lambda z: F.one_hot((z @ A).argmax(1), 3).float(),
        lambda z: torch.zeros(len(z), 3).scatter(1, (z @ A).argmax(1, keepdim=True), 1.0),
        lambda z: torch.eye(3)[(z @ A).argmax(1)],
        lambda z: F.embedding((z @ A).max(dim=1).indices, torch.eye(3)),
    ):
        torch.testing.assert_close(gradient(hard, x), expected)


def test_values_of_an_argmax_are_soft_where_that_is_asked(x: Tensor) -> None:
    votes = OwnCode(Passing(soft=True), on_images=True)(
        Own(lambda z: F.one_hot((z @ A).argmax(1), 3).float()), x.requires_grad_()
    )
    assert float(votes.detach().sum(1).sub(1).abs().max()) < 1e-6
    assert 0.01 < float(votes.detach().max()) < 1


def test_a_threshold_lets_its_sigmoid_s_gradient_pass(x: Tensor) -> None:
    masks: list[Callable[[Tensor], Tensor]] = [
        lambda z: (z > 0.5).float() @ A,
        lambda z: torch.where(z > 0.5, 1.0, 0.0) @ A,
        lambda z: ((z > 0.5) & (z < 2)).float() @ A,
        lambda z: torch.zeros_like(z).masked_fill(z > 0.5, 1.0) @ A,
        lambda z: (~(z <= 0.5)).to(z.dtype) @ A,
        lambda z: z.sub(0.5).sign() @ A,
    ]
    for mask in masks:
        found = gradient(mask, x)
        assert bool((found.sign() == A[:, 0].sign()).all()), mask


def test_gradients_that_the_code_finds_itself_are_constant_unless_asked(x: Tensor) -> None:
    def adapted(z: Tensor) -> Tensor:
        with torch.enable_grad():
            step = torch.zeros_like(z).requires_grad_()
            (up,) = torch.autograd.grad(((z.detach() + step) ** 3).sum(), step)
        return (z + up.detach()) @ A

    torch.testing.assert_close(gradient(adapted, x), A[:, 0].expand(5, 4))
    through = gradient(adapted, x, Passing(inner=True))
    torch.testing.assert_close(through, A[:, 0] * (1 + 6 * x))


def test_backward_in_the_code_leaves_nothing_on_the_images(x: Tensor) -> None:
    def purified(z: Tensor) -> Tensor:
        with torch.enable_grad():
            step = torch.zeros_like(z, requires_grad=True)
            ((z.detach() + step) ** 2).sum().backward()
        assert step.grad is not None
        return (z - 0.1 * step.grad) @ A

    leaf = x.clone().requires_grad_()
    logits = OwnCode(Passing(), on_images=True)(Own(purified), leaf)
    torch.autograd.grad(logits.sum(), leaf)
    assert leaf.grad is None


@pytest.mark.parametrize("fails", [False, True])
def test_torch_is_as_it_was_afterwards(fails: bool, x: Tensor) -> None:
    before = torch.from_numpy, torch.inference_mode.__enter__, torch.inference_mode.__exit__

    def decide(z: Tensor) -> Tensor:
        torch.set_grad_enabled(False)
        with torch.inference_mode():
            if fails:
                raise RuntimeError("no")
            return z @ A

    leaf = x.clone().requires_grad_()
    if fails:
        with pytest.raises(RuntimeError, match="no"):
            OwnCode(Passing(), on_images=True)(Own(decide), leaf)
    else:
        OwnCode(Passing(), on_images=True)(Own(decide), leaf)
    assert (torch.from_numpy, torch.inference_mode.__enter__, torch.inference_mode.__exit__) == before
    assert torch.is_grad_enabled()
    assert not leaf.detach().requires_grad
    with torch.inference_mode():
        assert (leaf * 2).is_inference()


def test_a_pass_within_a_pass_ends_alone(x: Tensor) -> None:
    with looking_through(Passing()):
        with looking_through(Passing(blocks=False)):
            pass
        with torch.inference_mode():
            assert not (x * 2).is_inference()


def test_an_input_given_by_name_and_other_kinds_of_arguments_are_let_be(x: Tensor) -> None:
    def decide(z: Tensor) -> Tensor:
        index = torch.argmax(input=z @ A, dim=1)
        parts: list[Any] = [torch.stack([z, z]).mean(0), torch.cat([z, z], dim=0)[: len(z)]]
        return parts[0] @ A + parts[1] @ A + F.one_hot(index, num_classes=3)

    leaf = x.clone().requires_grad_()
    assert OwnCode(Passing(), on_images=True)(Own(decide), leaf).requires_grad


class Learning(nn.Module):
    """What it keeps of a batch, in a buffer and in an attribute, it keeps without a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(3))
        self.last = torch.zeros(3)

    def features(self, x: Tensor) -> Tensor:
        return x

    def logits(self, z: Tensor) -> Tensor:
        with torch.no_grad():
            self.mean.mul_(0.9).add_(0.1 * z.mean(dim=0))
            self.last = 0.5 * self.last + z.mean(dim=0)
        return z - self.mean - self.last


def test_what_a_target_keeps_holds_no_graph() -> None:
    learning, x = Learning(), torch.rand(4, 3).requires_grad_()
    out = OwnCode(Passing())(learning, x)
    assert learning.mean.grad_fn is None
    assert learning.last.grad_fn is None
    (found,) = torch.autograd.grad(out.sum(), x)
    assert torch.allclose(found, torch.full_like(found, 1 - 0.1 - 1))
