"""The copy that searches in bfloat16 pass their points through: the same features, and the target stays as it is."""

from __future__ import annotations

import copy
import pickle
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from msa_eval import HPM
from msa_eval.defense.bf16 import bf16_copy, bf16_features
from msa_eval.defense.micro_batches import in_parts


class Net(nn.Module):
    """Convolutions and batch norms, wired in one of several ways."""

    def __init__(self, wiring: str) -> None:
        super().__init__()
        self.wiring = wiring
        self.conv1, self.norm1 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.norm2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.out = nn.Linear(8, 6)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        first = self.conv1(x)
        if self.wiring == "in place":
            self.act(first)
        z = F.relu(self.norm1(first))
        second = self.norm2(self.conv2(z))
        if self.wiring == "used twice":
            second = second + first
        if self.wiring == "called twice":
            second = self.norm2(self.conv2(F.relu(second)))
        if self.wiring == "float32 alone":
            with torch.autocast("cpu", enabled=False):
                second = self.conv2(second.float())
        features: Tensor = self.out((z + second).mean(dim=(2, 3)))
        return features


def make(wiring: str = "plain") -> HPM:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Net(wiring)
        for norm in (net.norm1, net.norm2):
            for values in (norm.running_mean, norm.bias):
                assert values is not None
                nn.init.normal_(values)
            for values in (norm.running_var, norm.weight):
                assert values is not None
                nn.init.uniform_(values, 0.5, 2)
        return HPM(net, nn.Linear(6, 4)).eval().requires_grad_(False)


def images(count: int = 8) -> Tensor:
    return torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def parts(defense: Any) -> list[str]:
    """The layers of the copy, with the precision of their weights."""
    trunk = defense.whole.trunk
    names = ("conv1", "norm1", "conv2", "norm2", "out")
    return [
        f"{type(layer).__name__} {getattr(layer, 'weight', torch.zeros(0)).dtype}".replace("torch.", "")
        for layer in (getattr(trunk, name) for name in names)
    ]


@pytest.mark.parametrize(
    ("wiring", "folded"),
    [("plain", (True, True)), ("called twice", (True, False)), ("in place", (False, True)), ("used twice", None)],
)
def test_what_can_be_is_folded_and_the_rest_rounded(wiring: str, folded: tuple[bool, bool] | None) -> None:
    hpm, x = make(wiring), images()
    other: Any = bf16_copy(hpm, x)
    one, two = folded or (False, False)
    norm = "BatchNorm2d float32"
    assert parts(other) == [
        "Conv2d bfloat16", "Identity float32" if one else norm,
        "Conv2d bfloat16", "Identity float32" if two else norm, "Linear bfloat16",
    ]  # fmt: skip
    exact, rough = hpm.features(x), bf16_features(other, x)
    assert rough.dtype == torch.float32
    assert not torch.equal(exact, rough)
    torch.testing.assert_close(rough, exact, rtol=0.02, atol=0.02)
    leaf = images().requires_grad_()
    slopes = [torch.autograd.grad(z.square().sum(), leaf)[0] for z in (hpm.features(leaf), bf16_features(other, leaf))]
    assert float(F.cosine_similarity(*(slope.flatten(1) for slope in slopes)).min()) > 0.99


def test_the_target_stays_as_it_is() -> None:
    hpm, x = make(), images()
    before, expected = copy.deepcopy(hpm.state_dict()), hpm.features(x)
    assert bf16_copy(in_parts(hpm), x) is not None
    assert all(torch.equal(value, before[name]) for name, value in hpm.state_dict().items())
    assert torch.equal(hpm.features(x), expected)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in hpm.modules())


def test_a_copy_passes_images_as_the_target_does() -> None:
    target: Any = in_parts(make(), 4)
    x = images()
    target.features(x)
    assert target.channels_last
    other: Any = bf16_copy(target, x)
    assert other.size == 4
    assert other.channels_last
    assert other.whole.trunk.conv2.weight.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(bf16_features(other, x), target.features(x), rtol=0.02, atol=0.02)
    sent = pickle.loads(pickle.dumps(other))  # as to another process, which has to search the same points
    assert (sent.size, sent.channels_last) == (4, True)
    assert torch.equal(bf16_features(sent, x), bf16_features(other, x))


class Locked(HPM):
    """Can't be copied."""

    lock: object


class Drifting(HPM):
    """Its copies are others."""

    def __deepcopy__(self, memo: dict[int, Any]) -> HPM:
        other = make()
        other.trunk.out.bias.add_(1)  # type: ignore[union-attr, operator]
        return other


def test_where_there_is_no_such_copy_the_target_is_passed_itself() -> None:
    x = images()
    assert bf16_copy(make(), x) is not None
    assert bf16_copy(make("float32 alone"), x) is None
    locked: Any = make()
    locked.__class__ = Locked
    locked.lock = threading.Lock()
    assert bf16_copy(locked, x) is None
    drifting: Any = make()
    drifting.__class__ = Drifting
    assert bf16_copy(drifting, x) is None


class Closed:
    """Reaches its net past what a copy copies."""

    def __init__(self) -> None:
        whole = make()
        self.net, self.logits = whole.trunk, whole.logits
        self.features = lambda x: self.net(2 * x - 1)


class Single(Closed):
    """There is only one of it."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Single:
        return self


class Keeping(HPM):
    """Its features are what a hook kept of the last pass, and the hook of a copy keeps it for the target."""

    kept: Tensor

    def features(self, x: Tensor) -> Tensor:
        self.trunk(x)
        return self.kept


@pytest.mark.parametrize("kind", [Closed, Single, Keeping])
def test_what_a_copy_shares_with_the_target_is_not_changed(kind: type) -> None:
    target: Any = make() if kind is Keeping else kind()
    if kind is Keeping:
        target.__class__ = Keeping
        target.trunk.out.register_forward_hook(lambda layer, given, out: setattr(target, "kept", out))
    net: nn.Module = target.trunk if kind is Keeping else target.net
    x = images()
    before, expected, layers = copy.deepcopy(net.state_dict()), target.features(x), list(map(type, net.modules()))
    assert bf16_copy(in_parts(target), x) is None
    assert list(map(type, net.modules())) == layers
    assert net.state_dict().keys() == before.keys()
    for name, value in net.state_dict().items():
        assert value.dtype == before[name].dtype
        assert torch.equal(value, before[name])
    assert torch.equal(target.features(x), expected)


def test_without_layers_to_round_a_copy_gains_nothing() -> None:
    class Flat:
        weight = torch.randn(192, 6, generator=torch.Generator().manual_seed(0))

        def features(self, x: Tensor) -> Tensor:
            return x.flatten(1) @ self.weight

        def logits(self, z: Tensor) -> Tensor:
            return z

    assert bf16_copy(Flat(), images()) is None
