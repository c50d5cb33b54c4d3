"""Splitting a classifier into its trunk and its fully connected head, by running it.

Which layer makes the logits is found by intervention, not by name: the output of a layer is replaced by random numbers,
and the model's answer must be these numbers, or a known function of them, whatever the image.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from msa_eval.defense.architectures import Classifier
from msa_eval.defense.contract import describe

TOLERANCE = 1e-5
"""How far logits and input gradients of the split model may be off, as a share of their largest absolute value (of 1,
where logits stay below it)."""

WIDEST = 2**24
"""More features or classes than a head may have."""

FACTORS = (0.01, 30.0, 1000.0)
"""By how much the random numbers are stretched that stand for a layer's answer, once it is read as a function."""

MORE = "is followed by more than pooling, scaling or a softmax"
"""Why most layers that answer with as many numbers as there are classes are no head."""

POOLS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda tokens: tokens.mean(dim=1),
    "first": lambda tokens: tokens[:, 0],
    "rest": lambda tokens: tokens[:, 1:].mean(dim=1),
    "last": lambda tokens: tokens[:, -1],
}
"""What becomes of a head's answers ``(B, T, k)`` to the tokens or places of an image. Each commutes with the head, so
it is applied to the features ``(B, T, d)`` instead."""

POSTS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda logits: torch.softmax(logits, dim=1),
    "log-softmax": lambda logits: torch.log_softmax(logits, dim=1),
    "sigmoid": torch.sigmoid,
}
"""What may come after the logits and is kept as part of the decision."""

INVERSES: Mapping[str, Callable[[Tensor, Tensor], tuple[Tensor, ...]]] = {
    "softmax": lambda h, out: _centred(h, out.log()),
    "log-softmax": lambda *logits: _centred(*logits),  # noqa: PLW0108 - defined further down
    "sigmoid": lambda h, out: (h, out.logit()),
}
"""What brings a head's answers and the model's to proportion, if the one followed on the other."""


@dataclass(frozen=True)
class Cut:
    """Where a model was cut: enough to cut another copy of it at the same place without running it.

    Attributes:
        head: the dotted name of the head in the model; empty where the model is its own head.
        features: d, the width of the features.
        classes: k.
        bias: whether the head has one.
        pool: a name of `POOLS`, or ``None`` where the head answers once an image.
        post: a name of `POSTS`, or ``None`` where the head's answers are the logits, scaled at the most.
    """

    head: str
    features: int
    classes: int
    bias: bool = True
    pool: str | None = None
    post: str | None = None

    def __post_init__(self) -> None:
        sizes = {"features": (self.features, 1), "classes": (self.classes, 2)}
        for name, (size, least) in sizes.items():
            if type(size) is not int or not least <= size <= WIDEST:
                raise ValueError(f"a cut's {name} must be a whole number from {least} to {WIDEST}, but got {size!r}")
        if not isinstance(self.head, str) or not isinstance(self.bias, bool):
            raise ValueError(
                f"a cut needs a head's name and whether it has a bias, but got {self.head!r}, {self.bias!r}"
            )
        for name, value, known in (("pool", self.pool, POOLS), ("post", self.post, POSTS)):
            if value is not None and (not isinstance(value, str) or value not in known):
                raise ValueError(f"a cut's {name} must be one of {', '.join(known)}, or none, but got {value!r}")

    def apply(self, model: nn.Module) -> Classifier:
        """Cut a model here, with a head of random weights.

        Raises:
            ValueError: when it has no such layer.
        """
        head = _named(model, self.head)
        fc = nn.utils.skip_init(nn.Linear, self.features, self.classes, bias=self.bias)
        return self.join(model, head, fc.eval())

    def join(self, model: nn.Module, head: nn.Module, fc: nn.Linear) -> Classifier:
        """The model as a trunk up to its head, and another head."""
        trunk = Trunk(_grafted(model, head, _Tap()), self, channels_first=_is_conv(head)).eval()
        return (Classifier(trunk, fc) if self.post is None else PostClassifier(trunk, fc, self.post)).eval()


class _Reached(Exception):  # noqa: N818 - it is no error
    """Carries the features out of the model when they reach the head."""

    def __init__(self, features: Tensor) -> None:
        super().__init__("the head was reached")
        self.features = features


class _Tap(nn.Module):
    """Stands where the head stood, and ends the pass there."""

    def forward(self, *given: Any, **named: Any) -> NoReturn:
        features = _given(given, named)
        assert features is not None
        raise _Reached(features)


def _given(given: tuple[Any, ...], named: Mapping[str, Any]) -> Tensor | None:
    """The first tensor that a layer is called with, by position or by name."""
    return next((value for value in (*given, *named.values()) if isinstance(value, Tensor)), None)


class Trunk(nn.Module):
    """A model up to its head, which is not run.

    It has the model's own modules; only those that contain the head are copies. So nothing hangs on the model, and its
    passes don't get in each other's way.

    Args:
        body: the model, with the head's place taken by what ends the pass.
        cut: where it was cut.
        channels_first: whether features reach the head as ``(B, d, ...)``, as they reach a convolution.
    """

    def __init__(self, body: nn.Module, cut: Cut, *, channels_first: bool = False) -> None:
        super().__init__()
        self.body = body
        self.cut = cut
        self.channels_first = channels_first

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``(B, C, H, W)`` to features ``(B, d)``."""
        try:
            self.body(x)
        except _Reached as reached:
            features = reached.features
        else:
            raise ValueError(f"the model did not run its layer {self.cut.head!r}; evaluate it whole (whole=True)")
        if self.cut.pool is None:
            return features
        places = features.movedim(1, -1) if self.channels_first else features
        return POOLS[self.cut.pool](places.flatten(1, -2))


class PostClassifier(Classifier):
    """A classifier whose head's answers go through one more function: its decision is the function's value.

    The FC logits before it stay there for a surrogate, because attacks on probabilities stall.

    Args:
        trunk: maps images to features ``(B, d)``.
        fc: maps features to ``(B, k)``.
        post: a name of `POSTS`.
    """

    def __init__(self, trunk: nn.Module, fc: nn.Linear, post: str) -> None:
        super().__init__(trunk, fc)
        self.post = post

    def logits(self, z: Tensor) -> Tensor:
        """Map features ``(B, d)`` to what the model answers ``(B, k)``."""
        return POSTS[self.post](self.fc(z))

    def fc_logits(self, z: Tensor) -> Tensor:
        """Map features ``(B, d)`` to the logits ``(B, k)`` before the last function."""
        out: Tensor = self.fc(z)
        return out


def split(model: nn.Module, example: Tensor, *, head: str | None = None) -> Classifier:
    """Split a classifier into trunk and fully connected head, at the last linear layer that produces the logits.

    The layer may be an `nn.Linear` or a 1x1 convolution, without a bias, with normalised weights, inside any wrapper,
    before or after pooling. A constant scale (a temperature) or shift after it becomes part of the head; a softmax
    is kept as part of the decision. The result is checked: logits and input gradients are the model's own.

    Args:
        model: maps images ``(B, C, H, W)`` in [0, 1] to logits ``(B, k)``; in evaluation mode. It is not changed, and
            the trunk shares its weights.
        example: some images; two are enough.
        head: the name of the layer, as in ``model.named_modules()``, where it is not to be searched for.

    Returns:
        the classifier; where it was cut stands in ``classifier.trunk.cut``.

    Raises:
        ValueError: when the model is in training mode, can't take the images, answers at random or with anything but
            logits, or no layer fits: with what was found.

    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.ReLU(), nn.Linear(5, 3)).eval()
    >>> split(model, torch.rand(2, 3, 2, 2)).trunk.cut
    Cut(head='3', features=5, classes=3, bias=True, pool=None, post=None)
    """
    if any(module.training for module in model.modules()):
        raise ValueError("the model is in training mode; call .eval() on it before it is split")
    x = _distinct(example)
    with torch.inference_mode(False), torch.no_grad():
        out, calls = _watched(model, x, head)
        with _told():
            found: list[str] = []
            for call in reversed(calls):
                reading = _intervene(model, x, call)
                if isinstance(reading, _Reading):
                    classifier = _joined(model, call, reading)
                    break
                after = _after(model, x, call) if reading == MORE else ""
                found.append(f"{call.name or 'the model'} ({_layer(call.module)}) {reading}{after}")
            else:
                _check_steady(model(x), out)
                raise ValueError(_nothing_found(model, out, found, head))
    with _told():
        _verify(model, classifier, x, out)
        _compare(model, classifier, _unit(example))
    return classifier


class _Call(NamedTuple):
    """A layer's only call in a pass."""

    name: str
    module: nn.Module
    features: Tensor
    answer: Tensor
    times: int


class _Reading(NamedTuple):
    """The model's answer as a function of a layer's: ``post(scale * pool(answer) + shift)``."""

    pool: str | None
    post: str | None
    scale: float
    shift: Tensor | None

    def of(self, tokens: Tensor) -> Tensor:
        """The model's answer ``(B, k)`` to a layer's, ``(B, k)`` or ``(B, T, k)``."""
        logits = self.scale * (tokens if self.pool is None else POOLS[self.pool](tokens))
        logits = logits if self.shift is None else logits + self.shift
        return logits if self.post is None else POSTS[self.post](logits)


def _distinct(example: Tensor) -> Tensor:
    """Two images that differ, near the given ones."""
    if example.ndim != 4 or not len(example):
        raise ValueError(f"expected example images of shape (B, C, H, W), but got {describe(example)}")
    x = _unit(example)
    x = torch.cat([x, x.flip(3)])[:2]
    noise = torch.rand(x.shape, generator=torch.Generator().manual_seed(0)).to(x)
    return (0.7 * x + 0.3 * noise).clamp(0, 1)


def _unit(example: Tensor) -> Tensor:
    """Two of the images at most, in [0, 1]."""
    return example[:2].float() / 255 if example.dtype == torch.uint8 else example[:2].float()


@contextmanager
def _told() -> Iterator[None]:
    """What a model raises in passes of ours, after one that it went through, in one line."""
    try:
        yield
    except ValueError:
        raise
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(
            f"the model can't be split, it failed on the way: {reason}; evaluate it whole (whole=True)"
        ) from error


def _watched(model: nn.Module, x: Tensor, head: str | None) -> tuple[Tensor, list[_Call]]:
    """A pass of the model, and the calls that could be its head's, in order."""
    modules = {head: _named(model, head)} if head is not None else _linear_layers(model)
    calls: list[_Call] = []

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...], named: Mapping[str, Any], answer: Any) -> None:
            features = _given(inputs, named)
            if features is not None and isinstance(answer, Tensor):
                calls.append(_Call(name, module, features, answer, 1))

        return hook

    with _hooked({module: note(name) for name, module in modules.items()}):
        try:
            out = model(x)
        except Exception as error:
            raise ValueError(
                f"the model can't take images of shape {tuple(x.shape[1:])}: {type(error).__name__}: {error}"
            ) from error
    if not isinstance(out, Tensor) or out.ndim != 2 or len(out) != len(x) or out.shape[1] < 2:
        raise ValueError(f"expected logits of shape ({len(x)}, k) from the model, but got {describe(out)}")
    if not bool(torch.isfinite(out).all()):
        raise ValueError("the model answers with NaN or infinite values")
    last = {call.module: call for call in calls}  # in the order of first calls
    times = {module: sum(call.module is module for call in calls) for module in last}
    order = sorted(last.values(), key=lambda call: max(i for i, c in enumerate(calls) if c.module is call.module))
    return out, [call._replace(times=times[call.module]) for call in order if _answers_classes(call, out.shape[1])]


def _answers_classes(call: _Call, classes: int) -> bool:
    width = call.answer.shape[1 if _is_conv(call.module) else -1] if call.answer.ndim > 1 else 0
    return width == classes


def _linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) or (_is_conv(module) and _is_pointwise(module))
    }


def _is_conv(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)


def _is_pointwise(module: Any) -> bool:
    sizes = {*module.kernel_size, *module.stride, module.groups}
    return sizes == {1} and (isinstance(module.padding, str) or set(module.padding) == {0})


@contextmanager
def _hooked(hooks: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    handles = [module.register_forward_hook(hook, with_kwargs=True) for module, hook in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _check_steady(again: Tensor, out: Tensor) -> None:
    if not (drift := _off(again, out)) <= TOLERANCE:
        raise ValueError(
            f"the model answers one batch differently from pass to pass (by {drift:.2g}), so its features can't be "
            f"kept; evaluate it whole (whole=True)"
        )


def _intervene(model: nn.Module, x: Tensor, call: _Call) -> _Reading | str:
    """Put random numbers in the place of a layer's answer, and read the model's answer as a function of them.

    Larger and smaller numbers must give the same function: what follows may be a limit that few answers reach.

    Returns:
        the function, or what was found instead.
    """
    if call.times > 1:
        return f"runs {call.times} times in a pass"
    if others := {call.features.dtype, call.answer.dtype} - {torch.float32}:
        return f"computes in {str(others.pop()).removeprefix('torch.')}, not in float32"
    generator = torch.Generator().manual_seed(1)
    numbers = torch.randn(call.answer.shape, generator=generator).to(call.answer)
    with _hooked({call.module: lambda *_: numbers.clone()}):
        out = model(x)
        reading = _read(_tokens(numbers, call.module), out)
        if reading is None and _off(model(x.flip(0)), out) <= TOLERANCE:
            return MORE
        if reading is None or (reading.shift is not None and _moves(model, x)):
            return "makes only a part of the logits"
    for factor in FACTORS:
        scaled = factor * numbers
        with _hooked({call.module: lambda *_, scaled=scaled: scaled.clone()}):
            if not _off(model(x), reading.of(_tokens(scaled, call.module))) <= TOLERANCE:
                return MORE
    return reading


def _after(model: nn.Module, x: Tensor, call: _Call) -> str:
    """The layers that run after a layer in a pass, the first three of them."""
    ran: list[nn.Module] = []
    names = {module: name for name, module in model.named_modules() if not list(module.children())}
    with _hooked({module: lambda module, *_: ran.append(module) for module in {**names, call.module: ""}}):
        model(x)
    later = [*dict.fromkeys(ran[ran.index(call.module) + 1 :])] if call.module in ran else []
    more = ", ..." if len(later) > 3 else ""
    return f" (then run {', '.join(f'{names[m]} ({_layer(m)})' for m in later[:3])}{more})" if later else ""


def _moves(model: nn.Module, x: Tensor) -> bool:
    """Whether a model's answer depends on the images at all."""
    with torch.enable_grad():
        x = x.clone().requires_grad_()
        out = model(x)
        (gradient,) = torch.autograd.grad(out.sum(), x, allow_unused=True) if out.requires_grad else (None,)
    return gradient is not None


def _read(tokens: Tensor, out: Tensor) -> _Reading | None:
    """The model's answer ``(B, k)`` as a function of a layer's, ``(B, k)`` or ``(B, T, k)``; ``None`` if it is none."""
    pools: list[str | None] = [None] if tokens.ndim == 2 else [*POOLS]
    for pool in pools:
        h = tokens if pool is None else POOLS[pool](tokens)
        if (line := _line(h, out)) is not None:
            return _Reading(pool, None, *line)
        for post, inverse in INVERSES.items():
            scale, _ = _line(*inverse(h, out)) or (0.0, None)
            if scale and _off(POSTS[post](scale * h), out) <= TOLERANCE:
                return _Reading(pool, post, scale, None)
    return None


def _tokens(value: Tensor, module: nn.Module) -> Tensor:
    """``(B, c)`` as it is; more as ``(B, T, c)``, whichever side the channels were on."""
    if _is_conv(module):
        value = value.movedim(1, -1)
    return value if value.ndim == 2 else value.flatten(1, -2)


def _centred(*logits: Tensor) -> tuple[Tensor, ...]:
    return tuple(row - row.mean(dim=1, keepdim=True) for row in logits)


def _line(h: Tensor, out: Tensor) -> tuple[float, Tensor | None] | None:
    """The scale and the shift ``(k,)`` with which ``out`` is ``scale * h + shift`` in both rows; ``None`` if not."""
    if not bool(torch.isfinite(out).all()):
        return None
    dh, do = (h[0] - h[1]).double(), (out[0] - out[1]).double()
    scale = float((dh @ do) / (dh @ dh))
    scale = 1.0 if abs(scale - 1) <= TOLERANCE else float(f"{scale:.7g}")
    if not scale > 0 or _off(scale * dh, do, absolute=scale) > TOLERANCE:
        return None
    shift = (out - scale * h).mean(dim=0)
    if float(shift.abs().max()) <= TOLERANCE * max(1.0, scale):
        return scale, None
    return (scale, shift) if _off(scale * h + shift, out) <= TOLERANCE else None


def _joined(model: nn.Module, call: _Call, reading: _Reading) -> Classifier:
    weight, bias = _affine(call)
    weight, bias = reading.scale * weight, None if bias is None else reading.scale * bias
    if reading.shift is not None:
        bias = reading.shift if bias is None else bias + reading.shift
    cut = Cut(call.name, weight.shape[1], weight.shape[0], bias is not None, reading.pool, reading.post)
    fc = nn.utils.skip_init(nn.Linear, cut.features, cut.classes, bias=cut.bias, device=weight.device)
    fc.weight.copy_(weight)
    if bias is not None:
        fc.bias.copy_(bias)
    return cut.join(model, call.module, fc)


def _affine(call: _Call) -> tuple[Tensor, Tensor | None]:
    """The layer's weight ``(k, d)`` and bias ``(k,)``: its own, or read off its answers to the unit vectors."""
    module: Any = call.module
    z, answer = _tokens(call.features, module), _tokens(call.answer, module)
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    if isinstance(weight, Tensor) and weight.flatten(1).shape == (answer.shape[-1], z.shape[-1]):
        weight = weight.detach().flatten(1).float()
        bias = bias.detach().float() if isinstance(bias, Tensor) else None
        if _off(F.linear(z, weight, bias), answer) <= TOLERANCE:
            return weight, bias
    width = z.shape[-1]
    units = torch.cat([torch.zeros(1, width), torch.eye(width)]).to(z)
    if _is_conv(module):
        units = units.view(width + 1, width, *(1 for _ in module.kernel_size))
    try:
        answers = _tokens(module(units), module).flatten(1)
        weight, bias = (answers[1:] - answers[0]).T.contiguous(), answers[0]
        if _off(F.linear(z, weight, bias), answer) <= TOLERANCE:
            return weight, bias
    except (RuntimeError, ValueError, IndexError):
        pass
    raise ValueError(
        f"layer {call.name!r} ({_layer(module)}) makes the logits, but its answer is not linear in what it is given "
        f"(its input may be normalised inside it); name another layer with head=NAME, or evaluate it whole (whole=True)"
    )


def _named(model: nn.Module, name: str) -> nn.Module:
    modules: dict[str, nn.Module] = dict(model.named_modules(remove_duplicate=False))
    if name not in modules:
        names = [*_linear_layers(model)]
        close = difflib.get_close_matches(name, names, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise ValueError(
            f"the model has no layer {name!r}{hint}; its last linear layers: {', '.join(names[-5:]) or 'none'}"
        )
    return modules[name]


def _layer(module: nn.Module) -> str:
    text = str(module) if not list(module.children()) else type(module).__name__
    return " ".join(text.split())


def _nothing_found(model: nn.Module, out: Tensor, found: list[str], head: str | None) -> str:
    advice = "name the layer with head=NAME, or evaluate the model whole (whole=True)"
    classes = out.shape[1]
    if found:
        advice = "evaluate the model whole (whole=True), or name another layer with head=NAME"
        return f"the logits ({classes} classes) can't be traced to one linear layer: {'; '.join(found[:4])}; {advice}"
    if head is not None:
        return f"layer {head!r} has no answer of {classes} classes in a pass; {advice}"
    names = [f"{name} ({_layer(module)})" for name, module in _linear_layers(model).items()][-3:]
    held = f"the last of its linear layers are {', '.join(names)}" if names else "it has no linear layer"
    return f"no nn.Linear or 1x1 convolution of the model answers with {classes} classes; {held}; {advice}"


def _grafted(model: nn.Module, head: nn.Module, tap: nn.Module) -> nn.Module:
    """The model with another module in the head's place.

    Modules on the way to the head are shallow copies, which share parameters and buffers; all others are the model's
    own. Wrappers that only distribute or compile give way to what they wrap: they would run the old head.
    """
    copies: dict[nn.Module, nn.Module] = {head: tap}

    def graft(module: nn.Module) -> nn.Module:
        if module in copies:
            return copies[module]
        copies[module] = module  # should it contain itself
        children = {name: None if child is None else graft(child) for name, child in module._modules.items()}
        if any(child is not module._modules[name] for name, child in children.items()):
            copies[module] = children.get(_wrapped(module)) or _like(module, children)
        return copies[module]

    return graft(model)


def _wrapped(module: nn.Module) -> str:
    """The name of the module that a wrapper distributes or compiles; empty for any other module."""
    if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
        return "module"
    return "_orig_mod" if type(module).__name__ == "OptimizedModule" else ""


def _like(module: nn.Module, children: dict[str, nn.Module | None]) -> nn.Module:
    twin = type(module).__new__(type(module))
    twin.__dict__ = module.__dict__ | {"_modules": children}
    return twin


def _verify(model: nn.Module, classifier: Classifier, x: Tensor, out: Tensor) -> None:
    """Hold the split model to the whole one: logits, input gradients, and features without their companions."""
    with torch.inference_mode(False), torch.enable_grad():
        leaf = x.clone().requires_grad_()
        whole = model(leaf)
        gradient = _gradient(whole, leaf)
        z = classifier.features(leaf)
        logits = classifier.logits(z)
        split_gradient = _gradient(logits, leaf)
    with torch.no_grad():
        _check_steady(whole.detach(), out)
        apart = _off(classifier.features(x[:1]), z[:1])
        off, gradients_off = _off(logits, out), _off(split_gradient, gradient, absolute=0.0)
    wrong = (
        f"its logits change by {off:.2g}" if not off <= TOLERANCE
        else f"its input gradients change by {gradients_off:.2g} of their size" if not gradients_off <= TOLERANCE
        else f"features depend on the other images of the batch (by {apart:.2g})" if not apart <= 1e-3
        else None
    )  # fmt: skip
    if wrong:
        cut: Any = classifier.trunk.cut
        raise ValueError(
            f"the model was cut at its layer {cut.head!r}, but then {wrong}; evaluate it whole (whole=True)"
        )


def _compare(model: nn.Module, classifier: Classifier, x: Tensor) -> None:
    """Hold the split model's logits to the whole one's on real images, and on all-black and all-white ones."""
    cut: Any = classifier.trunk.cut
    with torch.inference_mode(False), torch.no_grad():
        for images in (x, torch.stack([torch.zeros_like(x[0]), torch.ones_like(x[0])])):
            whole, joined = (torch.nan_to_num(answer(images)) for answer in (model, classifier))
            if not (off := _off(joined, whole)) <= TOLERANCE:
                raise ValueError(
                    f"the model was cut at its layer {cut.head!r}, but then its logits change by {off:.2g}; evaluate "
                    f"it whole (whole=True)"
                )


def _gradient(logits: Tensor, x: Tensor) -> Tensor:
    """The gradient of a fixed mix of the logits; zero where there is none."""
    if not logits.requires_grad:
        return torch.zeros_like(x)
    mix = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2)).to(logits)
    (gradient,) = torch.autograd.grad((logits * mix).sum(), x, allow_unused=True)
    return torch.zeros_like(x) if gradient is None else gradient


def _off(value: Tensor, expected: Tensor, *, absolute: float = 1.0) -> float:
    """The largest difference, as a share of the largest expected value or of ``absolute`` where that is larger."""
    if value.shape != expected.shape:
        return float("inf")
    scale = max(float(expected.abs().max()), absolute) or 1.0
    return float((value - expected).abs().max()) / scale
