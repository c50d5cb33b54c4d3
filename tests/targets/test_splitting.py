"""Splitting by running: every kind of head and wrapper, and what can't be split."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from msa_eval import HPM, Classifier, evaluate
from msa_eval.defense.architectures import Normalize
from msa_eval.defense.contract import as_defense
from msa_eval.targets.cut import Cut, PostClassifier, Trunk
from msa_eval.targets.splitting import split


def _seeded(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make().eval()


class _Body(nn.Module):
    """Images ``(B, 3, 8, 8)`` to a map ``(B, 6, 4, 4)`` or tokens ``(B, 16, 6)``."""

    def __init__(self, *, tokens: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, stride=2, padding=1)
        self.bn = nn.BatchNorm2d(6)
        self.tokens = tokens

    def forward(self, x: Tensor) -> Tensor:
        out = torch.tanh(self.bn(self.conv(x)))
        return out.flatten(2).mT if self.tokens else out


class _Net(nn.Module):
    """A body, what lies between it and the head, the head, and what comes after."""

    def __init__(
        self, head: nn.Module, *, before: Callable[[Tensor], Tensor] = lambda z: z.mean(dim=(2, 3)),
        after: Callable[[Tensor], Any] = lambda out: out, tokens: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.body, self.before, self.after = _Body(tokens=tokens), before, after
        self.top = nn.ModuleDict({"head": head})

    def forward(self, x: Tensor) -> Any:
        return self.after(self.top["head"](self.before(self.body(x))))


def _linear(width: int = 6, **options: Any) -> nn.Linear:
    return nn.Linear(width, 4, **options)


class _Standardised(nn.Linear):
    """Linear in its input, though its weight is not the one used."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight / self.weight.norm(dim=1, keepdim=True), self.bias)


class _Cosine(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.normalize(x), F.normalize(self.weight))


def _same(z: Tensor) -> Tensor:
    return z


def _old_weight_norm() -> nn.Module:
    with pytest.warns(FutureWarning):
        return nn.utils.weight_norm(_linear())


def _conv() -> nn.Conv2d:
    return nn.Conv2d(6, 4, 1)


HEADS: dict[str, tuple[Callable[[], nn.Module], Cut]] = {
    "linear": (lambda: _Net(_linear()), Cut("top.head", 6, 4)),
    "without bias": (lambda: _Net(_linear(bias=False)), Cut("top.head", 6, 4, bias=False)),
    "weight-normalised": (
        lambda: _Net(nn.utils.parametrizations.weight_norm(_linear())), Cut("top.head", 6, 4)
    ),
    "weight-normalised, old": (lambda: _Net(_old_weight_norm()), Cut("top.head", 6, 4)),
    "spectral norm": (lambda: _Net(nn.utils.parametrizations.spectral_norm(_linear())), Cut("top.head", 6, 4)),
    "its own weights": (lambda: _Net(_Standardised(6, 4)), Cut("top.head", 6, 4)),
    "in a Sequential": (
        lambda: nn.Sequential(Normalize([0.5] * 3, [0.2] * 3), _Net(nn.Sequential(nn.Dropout(), _linear()))),
        Cut("1.top.head.1", 6, 4),
    ),
    "in DataParallel": (lambda: nn.Sequential(nn.Identity(), nn.DataParallel(_Net(_linear()))),
                        Cut("1.module.top.head", 6, 4)),
    "two layers": (
        lambda: _Net(nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 4))), Cut("top.head.2", 4, 4)
    ),
    "conv, then pooling": (
        lambda: _Net(_conv(), before=_same, after=lambda out: out.mean(dim=(2, 3))), Cut("top.head", 6, 4, pool="mean")
    ),
    "conv, then flatten": (
        lambda: _Net(_conv(), before=nn.AdaptiveAvgPool2d(1), after=lambda out: out.flatten(1)),
        Cut("top.head", 6, 4, pool="mean"),
    ),
    "conv without bias, summed": (
        lambda: _Net(nn.Conv2d(6, 4, 1, bias=False), before=_same, after=lambda out: out.sum(dim=(2, 3))),
        Cut("top.head", 6, 4, bias=False, pool="mean"),
    ),
    "tokens, pooled before": (
        lambda: _Net(_linear(), tokens=True, before=lambda z: z.mean(dim=1)), Cut("top.head", 6, 4)
    ),
    "tokens, first after": (
        lambda: _Net(_linear(), tokens=True, before=_same, after=lambda out: out[:, 0]),
        Cut("top.head", 6, 4, pool="first"),
    ),
    "tokens, mean after": (
        lambda: _Net(_linear(), tokens=True, before=_same, after=lambda out: out.mean(dim=1)),
        Cut("top.head", 6, 4, pool="mean"),
    ),
    "tokens, mean of the rest": (
        lambda: _Net(_linear(), tokens=True, before=_same, after=lambda out: out[:, 1:].mean(dim=1)),
        Cut("top.head", 6, 4, pool="rest"),
    ),
    "tokens, last": (
        lambda: _Net(_linear(), tokens=True, before=_same, after=lambda out: out[:, -1]),
        Cut("top.head", 6, 4, pool="last"),
    ),
    "as many tokens as features": (
        lambda: _Net(_linear(), tokens=True, before=lambda z: z[:, :6], after=lambda out: out[:, 0]),
        Cut("top.head", 6, 4, pool="first"),
    ),
    "as many rows as channels": (
        lambda: _Net(_conv(), before=lambda z: F.interpolate(z, (2, 6)), after=lambda out: out.mean(dim=(2, 3))),
        Cut("top.head", 6, 4, pool="mean"),
    ),
    "temperature": (lambda: _Net(_linear(), after=lambda out: out / 0.3), Cut("top.head", 6, 4)),
    "shift": (
        lambda: _Net(_linear(bias=False), after=lambda out: 2 * out + torch.arange(4.0)), Cut("top.head", 6, 4)
    ),
    "softmax": (
        lambda: _Net(_linear(), after=lambda out: (out / 2).softmax(1)), Cut("top.head", 6, 4, post="softmax")
    ),
    "log-softmax": (
        lambda: _Net(_linear(), after=lambda out: out.log_softmax(1)), Cut("top.head", 6, 4, post="log-softmax")
    ),
    "sigmoid": (lambda: _Net(_linear(), after=torch.sigmoid), Cut("top.head", 6, 4, post="sigmoid")),
}  # fmt: skip


@pytest.fixture
def x() -> Tensor:
    return torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("kind", HEADS)
def test_the_split_model_is_the_model(kind: str, x: Tensor) -> None:
    make, cut = HEADS[kind]
    model = _seeded(make)
    names = [name for name, _ in model.named_modules()]
    classifier = split(model, x[:2])
    assert classifier.trunk.cut == cut
    assert classifier.features(x).shape == (5, cut.features)

    leaf, split_leaf = x.clone().requires_grad_(), x.clone().requires_grad_()
    out, split_out = model(leaf), classifier(split_leaf)
    assert (split_out - out).abs().max() <= 1e-5 * max(1, float(out.detach().abs().max()))
    mix = torch.randn(out.shape, generator=torch.Generator().manual_seed(7))
    (gradient,) = torch.autograd.grad((out * mix).sum(), leaf)
    (split_gradient,) = torch.autograd.grad((split_out * mix).sum(), split_leaf)
    assert (split_gradient - gradient).abs().max() <= 1e-5 * gradient.abs().max()

    assert [name for name, _ in model.named_modules()] == names
    assert not any(module._forward_hooks for module in model.modules())
    trunk, own = {id(p) for p in classifier.trunk.parameters()}, {id(p) for p in model.parameters()}
    assert trunk < own


def test_the_head_is_not_run(x: Tensor) -> None:
    class Counting(nn.Linear):
        runs = 0

        def forward(self, z: Tensor) -> Tensor:
            self.runs += 1
            return super().forward(z)

    head = Counting(6, 4)
    classifier = split(_seeded(lambda: _Net(head)), x)
    runs = head.runs
    classifier(x)
    assert head.runs == runs


def test_passes_of_several_threads_stay_apart(x: Tensor) -> None:
    classifier = split(_seeded(lambda: _Net(_linear())), x)
    images = [torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(8)]
    with torch.no_grad():
        expected = [classifier.features(image) for image in images]
        wrong: list[int] = []

        def work(i: int) -> None:
            with torch.no_grad():
                wrong.extend(i for _ in range(50) if not torch.equal(classifier.features(images[i]), expected[i]))

        threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


def test_a_cut_is_found_again_without_running(x: Tensor) -> None:
    make, _ = HEADS["conv, then pooling"]
    first = split(_seeded(make), x)
    again = first.trunk.cut.apply(_seeded(make))
    again.fc.load_state_dict(first.fc.state_dict())
    assert torch.equal(again(x), first(x))


def test_a_head_with_two_names_and_a_head_that_is_the_model(x: Tensor) -> None:
    model = _seeded(lambda: _Net(_linear()))
    model.alias = model.top["head"]
    assert torch.equal(split(model, x)(x), model(x))

    whole = _seeded(lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 4)))
    assert split(whole, x).trunk.cut.head == "1"


def test_probabilities_are_attacked_through_their_logits(x: Tensor) -> None:
    """The decision is the softmax, as in the model; the FC logits before it are there for a surrogate."""
    model = _seeded(HEADS["softmax"][0])
    classifier = split(model, x)
    assert isinstance(classifier, PostClassifier)
    z = classifier.features(x)
    assert torch.allclose(classifier.logits(z), model(x), atol=1e-6)
    assert torch.allclose(classifier.fc_logits(z).softmax(1), model(x), atol=1e-6)
    results = evaluate(classifier, x, model(x).argmax(1), protocol="quick", overrides={"attack.apgd.steps": 2})
    assert {"fc-oracle", "ste"} & set(results.attacks["surrogate"])


def test_hpm_stands_on_a_split_model_and_shares_its_passes(x: Tensor) -> None:
    classifier = split(_seeded(HEADS["without bias"][0]), x)
    hpm = HPM(classifier.trunk, classifier.fc).eval()
    assert hpm(x).shape == (5, 4)
    assert isinstance(as_defense(classifier), Classifier)
    assert isinstance(hpm.trunk, Trunk)


class _Averaged(nn.Module):
    """Two heads, whose answers are averaged."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.one, self.two = _Body(), _linear(), _linear()

    def forward(self, x: Tensor) -> Tensor:
        z = self.body(x).mean(dim=(2, 3))
        return (self.one(z) + self.two(z.square())) / 2


class _Leaning(nn.Module):
    """A second head whose answer hardly differs from image to image."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.one, self.two = _Body(), _linear(), _linear()

    def forward(self, x: Tensor) -> Tensor:
        z = self.body(x).mean(dim=(2, 3))
        out: Tensor = self.one(z) + self.two(1e-4 * z)
        return out


class _Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = _Net(_linear())

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x) + self.net(x.flip(3))
        return out


class _Random(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = _Net(_linear())

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x + 0.1 * torch.randn_like(x))
        return out


class _Batchwise(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = _Net(_linear())

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x - x.mean(dim=0))
        return out


class _Double(_Net):
    """Computes in another precision than it is asked in."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__(_linear(), after=lambda out: out.float())
        self.to(dtype)
        self.dtype = dtype

    def forward(self, x: Tensor) -> Any:
        return super().forward(x.to(self.dtype))


class _Blank(nn.Module):
    """Answers images of one value by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.net = _Net(_linear())

    def forward(self, x: Tensor) -> Tensor:
        blank = x.flatten(1).std(dim=1, keepdim=True) == 0
        return torch.where(blank, torch.ones(4), self.net(x))


class _InPlace(nn.Module):
    """Overwrites its images, which no gradient goes through."""

    def __init__(self) -> None:
        super().__init__()
        self.net = _Net(_linear())

    def forward(self, x: Tensor) -> Tensor:
        x.sub_(0.0)
        out: Tensor = self.net(x)
        return out


class _Matrix(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(192, 4))
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).flatten(1) @ self.weight


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: _Net(_linear(), after=lambda out: (out, out)), r"answers with a tuple of shapes .*whole=True"),
        (lambda: _Net(_linear(), after=lambda out: out[:, :1]), r"expected logits of shape \(2, k\)"),
        (lambda: _Net(_conv(), before=_same), "expected logits"),
        (_Averaged, r"two \(Linear.*makes only a part.*; one \(Linear.*makes only a part.*whole=True.*head=NAME"),
        (_Leaning, r"two \(Linear.*makes only a part.*; one \(Linear.*makes only a part"),
        (lambda: _Net(_linear(), after=lambda out: out / 0), r"not finite: they hold \+inf"),
        (_Twice, "top.head .*runs 2 times in a pass"),
        (_Random, "differently from pass to pass"),
        (_Batchwise, "features depend on the other images"),
        (_Matrix, r"answers with 4 classes; the last of its linear layers are conv \(Conv2d"),
        (lambda: nn.Sequential(nn.Flatten()), "it has no linear layer"),
        (lambda: _Net(_Cosine(6, 4)), "not linear in what it is given"),
        (lambda: _Net(_linear(), after=lambda out: out.square()), "followed by more than"),
        (
            lambda: _Net(nn.Sequential(_conv(), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()), before=_same),
            r"\(Conv2d.*followed by more than.*then run \S*1 \(ReLU\(\)\), .*2 \(Adaptive.*whole=True.*, or name ano",
        ),
        (lambda: _Net(_conv(), before=_same, after=lambda out: out.amax(dim=(2, 3))), "followed by more than"),
        (lambda: _Net(_linear(), after=lambda out: out.clamp(-6, 6)), "followed by more than"),
        (lambda: _Net(_linear(), after=lambda out: out.clamp(-200, 200)), "followed by more than"),
        (lambda: _Net(_linear(), after=lambda out: torch.where(out.abs() > 8, 0, out)), "followed by more than"),
        (lambda: _Net(_linear(), after=lambda out: torch.where(out.abs() < 0.02, 0, out)), "followed by more than"),
        (_Double, r"top.head .Linear.* computes in float64, not in float32; .*whole=True"),
        (lambda: _Double(torch.bfloat16), r"top.head .Linear.* computes in bfloat16, not in float32; .*whole=True"),
        (lambda: _Double(torch.float16), r"top.head .Linear.* computes in float16, not in float32; .*whole=True"),
        (_Blank, "logits change by .*evaluate it whole"),
        (lambda: _Net(_linear(7)), r"can't take two images of shape \(3, 8, 8\): RuntimeError"),
    ],
)
def test_what_cannot_be_split_says_what_was_found(make: Callable[[], nn.Module], message: str, x: Tensor) -> None:
    model = _seeded(make)
    with pytest.raises(ValueError, match=message):
        split(model, x)
    assert not any(module._forward_hooks for module in model.modules())


def test_a_model_that_writes_into_its_input_is_split(x: Tensor) -> None:
    before = x.clone()
    assert split(_seeded(_InPlace), x).trunk.cut.head
    assert torch.equal(x, before)


def test_a_named_layer(x: Tensor) -> None:
    model = _seeded(lambda: _Net(_linear()))
    assert split(model, x, head="top.head").trunk.cut.head == "top.head"
    with pytest.raises(ValueError, match=r"no layer 'top.haed' \(did you mean 'top.head'\?\)"):
        split(model, x, head="top.haed")
    with pytest.raises(ValueError, match=r"layer 'body.conv' has no answer of 4 classes"):
        split(model, x, head="body.conv")


def test_training_mode_and_bad_examples_are_refused(x: Tensor) -> None:
    model = _seeded(lambda: _Net(_linear()))
    with pytest.raises(ValueError, match="expected example images"):
        split(model, x[0])
    with pytest.raises(ValueError, match=r"training mode; call \.eval\(\)"):
        split(model.train(), x)
    assert model.training


def test_a_head_called_by_keyword(x: Tensor) -> None:
    class Named(_Net):
        def forward(self, x: Tensor) -> Any:
            return self.top["head"](input=self.before(self.body(x)))

    model = _seeded(lambda: Named(_linear()))
    classifier = split(model, x)
    assert classifier.trunk.cut == Cut("top.head", 6, 4)
    assert torch.equal(classifier(x), model(x))
