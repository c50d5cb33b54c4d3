"""Images are passed with their channels last where a trunk gains by it, and nothing but rounding changes."""

from __future__ import annotations

import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from msa_eval import Defense, evaluate
from msa_eval.defense.channels_last import channels_last, takes_channels_last
from msa_eval.defense.micro_batches import MicroBatched, in_parts
from msa_eval.protocols import make_protocol

LAST = torch.channels_last
PROTOCOL = {
    "schema": 1, "name": "small", "version": 1, "description": "A test.", "audit.samples": 0,
    "threat": {"norm": "Linf", "eps": 0.05, "contexts": ["joint"]}, "batches": {"size": 4},
    "attack": {"apgd": {"surrogates": ["ste"], "losses": ["ce"], "steps": 2}},
}  # fmt: skip


class Trunk(nn.Module):
    """Convolutions, then features in the way given; it remembers how the images lay."""

    def __init__(self, channels: int = 3, then: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.convs = nn.Sequential(
                nn.Conv2d(channels, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2, padding=1)
            )
        self.then = then or (lambda maps: maps.mean(dim=(2, 3)))
        self.last: list[bool] = []

    def forward(self, x: Tensor) -> Tensor:
        self.last.append(x.is_contiguous(memory_format=LAST))
        return self.then(self.convs(x))


class Headed:
    """A defence with a trunk of its own and a fixed linear decision."""

    def __init__(self, trunk: nn.Module) -> None:
        self.trunk = trunk.eval()

    def features(self, x: Tensor) -> Tensor:
        z: Tensor = self.trunk(x)
        return z

    def logits(self, z: Tensor) -> Tensor:
        return z.flatten(1)[:, :4]


def images(channels: int = 3, count: int = 6) -> Tensor:
    return torch.rand(count, channels, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("size", [None, 2])
def test_convolutions_see_channels_last_and_features_and_gradients_stay(size: int | None) -> None:
    trunk = Trunk(then=lambda maps: maps)  # whole maps, which would stay as they lay
    plain, arranged = Headed(trunk), in_parts(Headed(trunk), size)
    x = images().requires_grad_()
    expected = plain.features(x)
    (slope,) = torch.autograd.grad(expected.square().sum(), x)
    trunk.last.clear()
    found = arranged.features(x)
    (gradient,) = torch.autograd.grad(found.square().sum(), x)
    assert len(trunk.last) > 2
    assert all(trunk.last[1:]), "all but the first pass of the trial"
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient, slope, rtol=1e-5, atol=1e-4)
    assert found.is_contiguous()
    assert gradient.is_contiguous()
    assert x.is_contiguous()


@pytest.mark.parametrize("then", [
    lambda maps: maps.view(len(maps), -1),  # raises on maps whose channels lie last
    lambda maps: maps.as_strided((len(maps), 8 * 16), (8 * 16, 1)),  # mixes them up without a word
], ids=["view", "strides"])  # fmt: skip
def test_a_trunk_that_looks_at_memory_is_passed_as_it_expects(then: Callable[[Tensor], Tensor]) -> None:
    trunk = Trunk(then=then)
    defense = Headed(trunk)
    arranged = in_parts(defense)
    with torch.no_grad():
        torch.testing.assert_close(arranged.features(images()), defense.features(images()), rtol=0, atol=0)
    assert isinstance(arranged, MicroBatched)
    assert arranged.channels_last is False
    assert not any(trunk.last[2:])


@pytest.mark.parametrize(("trunk", "channels"), [
    (nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 8)), 3),  # no convolution
    (Trunk(1), 1),  # one channel lies first and last
], ids=["linear", "one channel"])  # fmt: skip
def test_what_has_nothing_to_gain_is_left(trunk: nn.Module, channels: int) -> None:
    assert not takes_channels_last(Headed(trunk), images(channels))


def test_a_device_that_it_was_not_measured_on_is_left() -> None:
    assert not takes_channels_last(Headed(Trunk().to("meta")), images().to("meta"))
    assert takes_channels_last(Headed(Trunk()), images())


def test_the_trial_draws_nothing_and_a_random_trunk_is_left() -> None:
    noisy = Headed(Trunk(then=lambda maps: maps.mean(dim=(2, 3)) + 0.1 * torch.randn(len(maps), 8)))
    torch.manual_seed(7)
    assert not takes_channels_last(noisy, images())
    drawn = torch.rand(3)
    torch.manual_seed(7)
    torch.testing.assert_close(drawn, torch.rand(3), rtol=0, atol=0)


def test_the_gradient_lies_as_the_images_do() -> None:
    x = images().requires_grad_()
    channels_last(x).square().sum().backward()
    assert x.grad is not None
    assert x.grad.is_contiguous()
    torch.testing.assert_close(x.grad, 2 * x.detach())


def test_every_process_decides_for_itself() -> None:
    arranged = MicroBatched(Headed(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten())))
    arranged.features(images())
    sent = pickle.loads(pickle.dumps(arranged))
    assert arranged.channels_last
    assert sent.channels_last is None
    sent.features(images())
    assert sent.channels_last


@pytest.mark.parametrize(("then", "expected"), [(None, ["defense"]), (lambda maps: maps.view(len(maps), -1), None)])
def test_results_say_which_targets_were_passed_so(
    then: Callable[[Tensor], Tensor] | None, expected: list[str] | None
) -> None:
    defense: Defense = Headed(Trunk(then=then))
    x = images(count=8)
    y = defense.logits(defense.features(x)).argmax(dim=1)
    results = evaluate(defense, x, y, protocol=make_protocol(PROTOCOL))
    assert results.run.get("channels_last") == expected
