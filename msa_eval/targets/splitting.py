"""Splitting a classifier into its trunk and its fully connected head, by running it.

Which layer makes the logits is found by intervention, not by name: the output of a layer is replaced by random numbers,
and the model's answer must be these numbers, or a known function of them, whatever the image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from msa_eval.defense import calling
from msa_eval.defense.architectures import Classifier
from msa_eval.defense.contract import is_training
from msa_eval.device import in_float64
from msa_eval.targets.cut import POOLS, POSTS, CantSplitError, Cut, first_tensor, is_conv, layer_named, linear_layers
from msa_eval.targets.equivalence import TOLERANCE, check_answers, check_equivalence, check_steady, relative_difference

FACTORS = (0.01, 30.0, 1000.0)
"""By how much the random numbers are stretched that stand for a layer's answer, once it is read as a function."""


MORE = "is followed by more than pooling, scaling or a softmax"
"""Why most layers that answer with as many numbers as there are classes are no head."""


INVERSES: Mapping[str, Callable[[Tensor, Tensor], tuple[Tensor, ...]]] = {
    "softmax": lambda h, out: _centred(h, out.log()),
    "log-softmax": lambda *logits: _centred(*logits),  # noqa: PLW0108 - defined further down
    "sigmoid": lambda h, out: (h, out.logit()),
}
"""What brings a head's answers and the model's to proportion, if the one followed on the other."""


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
        CantSplitError: when the model can't take two images, answers at random or no layer fits: with what was found.
        ValueError: when it is in training mode, or answers with anything but logits.

    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.ReLU(), nn.Linear(5, 3)).eval()
    >>> split(model, torch.rand(2, 3, 2, 2)).trunk.cut
    Cut(head='3', features=5, classes=3, bias=True, pool=None, post=None)
    """
    if "eval" not in vars(model) and any(map(is_training, model.modules())):
        raise ValueError("the model is in training mode; call .eval() on it before it is split")
    x = _distinct(example)
    with torch.inference_mode(False), torch.no_grad():
        out, calls = _watched(model, x, head)
        with _errors_described():
            found: list[str] = []
            for call in reversed(calls):
                reading = _intervene(model, x, call)
                if isinstance(reading, _Reading):
                    classifier = _joined(model, call, reading)
                    break
                after = _after(model, x, call) if reading == MORE else ""
                found.append(f"{call.name or 'the model'} ({_layer(call.module)}) {reading}{after}")
            else:
                check_steady(calling.call(model, x), out)
                raise CantSplitError(*_nothing_found(model, out, found, head))
    with _errors_described():
        check_equivalence(model, classifier, x, out)
        check_answers(model, classifier, _unit(example))
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
        raise ValueError(f"expected example images of shape (B, C, H, W), but got {calling.described(example)}")
    x = _unit(example)
    x = torch.cat([x, x.flip(3)])[:2]
    noise = torch.rand(x.shape, generator=torch.Generator().manual_seed(0)).to(x)
    return (0.7 * x + 0.3 * noise).clamp(0, 1)


def _unit(example: Tensor) -> Tensor:
    """Two of the images at most, in [0, 1]."""
    return example[:2].float() / 255 if example.dtype == torch.uint8 else example[:2].float()


@contextmanager
def _errors_described() -> Iterator[None]:
    """What a model raises in passes of ours, after one that it went through, in one line."""
    try:
        yield
    except ValueError:
        raise
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise CantSplitError(f"the model can't be split, it failed on the way: {reason}") from error


def _watched(model: nn.Module, x: Tensor, head: str | None) -> tuple[Tensor, list[_Call]]:
    """A pass of the model, and the calls that could be its head's, in order."""
    modules = {head: layer_named(model, head)} if head is not None else linear_layers(model)
    calls: list[_Call] = []

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...], named: Mapping[str, Any], answer: Any) -> None:
            features = first_tensor(inputs, named)
            if features is not None and isinstance(answer, Tensor):
                calls.append(_Call(name, module, features, answer, 1))

        return hook

    with _hooked({module: note(name) for name, module in modules.items()}):
        try:
            out = calling.call(model, x)
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise CantSplitError(
                f"the model can't take two images of shape {tuple(x.shape[1:])}: {reason}",
                "give images of the size that it takes, or evaluate it whole (whole=True)",
            ) from error
    if not isinstance(out, Tensor):
        raise CantSplitError(f"the model answers with {calling.described(out)}, not with logits alone")
    if wrong := calling.no_logits(out, len(x)):
        raise ValueError(wrong)
    if wrong := calling.not_finite(out):
        raise ValueError(f"the model's logits are not finite: {wrong}")
    last = {call.module: call for call in calls}  # in the order of first calls
    times = {module: sum(call.module is module for call in calls) for module in last}
    order = sorted(last.values(), key=lambda call: max(i for i, c in enumerate(calls) if c.module is call.module))
    return out, [call._replace(times=times[call.module]) for call in order if _answers_classes(call, out.shape[1])]


def _answers_classes(call: _Call, classes: int) -> bool:
    width = call.answer.shape[1 if is_conv(call.module) else -1] if call.answer.ndim > 1 else 0
    return width == classes


@contextmanager
def _hooked(hooks: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    handles = [module.register_forward_hook(hook, with_kwargs=True) for module, hook in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


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
        out = calling.call(model, x)
        reading = _read(_tokens(numbers, call.module), out)
        if reading is None and relative_difference(calling.call(model, x.flip(0)), out) <= TOLERANCE:
            return MORE
        if reading is None or (reading.shift is not None and _moves(model, x)):
            return "makes only a part of the logits"
    for factor in FACTORS:
        scaled = factor * numbers
        with _hooked({call.module: lambda *_, scaled=scaled: scaled.clone()}):
            if not relative_difference(calling.call(model, x), reading.of(_tokens(scaled, call.module))) <= TOLERANCE:
                return MORE
    return reading


def _after(model: nn.Module, x: Tensor, call: _Call) -> str:
    """The layers that run after a layer in a pass, the first three of them."""
    ran: list[nn.Module] = []
    names = {module: name for name, module in model.named_modules() if not list(module.children())}
    with _hooked({module: lambda module, *_: ran.append(module) for module in {**names, call.module: ""}}):
        calling.call(model, x)
    later = [*dict.fromkeys(ran[ran.index(call.module) + 1 :])] if call.module in ran else []
    more = ", ..." if len(later) > 3 else ""
    return f" (then run {', '.join(f'{names[m]} ({_layer(m)})' for m in later[:3])}{more})" if later else ""


def _moves(model: nn.Module, x: Tensor) -> bool:
    """Whether a model's answer depends on the images at all."""
    with torch.enable_grad():
        x = x.clone().requires_grad_()
        out = calling.call(model, x)
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
            if scale and relative_difference(POSTS[post](scale * h), out) <= TOLERANCE:
                return _Reading(pool, post, scale, None)
    return None


def _tokens(value: Tensor, module: nn.Module) -> Tensor:
    """``(B, c)`` as it is; more as ``(B, T, c)``, whichever side the channels were on."""
    if is_conv(module):
        value = value.movedim(1, -1)
    return value if value.ndim == 2 else value.flatten(1, -2)


def _centred(*logits: Tensor) -> tuple[Tensor, ...]:
    return tuple(row - row.mean(dim=1, keepdim=True) for row in logits)


def _line(h: Tensor, out: Tensor) -> tuple[float, Tensor | None] | None:
    """The scale and the shift ``(k,)`` with which ``out`` is ``scale * h + shift`` in both rows; ``None`` if not."""
    if not bool(torch.isfinite(out).all()):
        return None
    dh, do = in_float64(h[0] - h[1]), in_float64(out[0] - out[1])
    scale = float((dh @ do) / (dh @ dh))
    scale = 1.0 if abs(scale - 1) <= TOLERANCE else float(f"{scale:.7g}")
    if not scale > 0 or relative_difference(scale * dh, do, absolute=scale) > TOLERANCE:
        return None
    shift = (out - scale * h).mean(dim=0)
    if float(shift.abs().max()) <= TOLERANCE * max(1.0, scale):
        return scale, None
    return (scale, shift) if relative_difference(scale * h + shift, out) <= TOLERANCE else None


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
        if relative_difference(F.linear(z, weight, bias), answer) <= TOLERANCE:
            return weight, bias
    width = z.shape[-1]
    units = torch.cat([torch.zeros(1, width), torch.eye(width)]).to(z)
    if is_conv(module):
        units = units.view(width + 1, width, *(1 for _ in module.kernel_size))
    try:
        answers = _tokens(module(units), module).flatten(1)
        weight, bias = (answers[1:] - answers[0]).T.contiguous(), answers[0]
        if relative_difference(F.linear(z, weight, bias), answer) <= TOLERANCE:
            return weight, bias
    except (RuntimeError, ValueError, IndexError):
        pass
    raise CantSplitError(
        f"layer {call.name!r} ({_layer(module)}) makes the logits, but its answer is not linear in what it is given "
        f"(its input may be normalised inside it)",
        "name another layer with head=NAME, or evaluate it whole (whole=True)",
    )


def _layer(module: nn.Module) -> str:
    text = str(module) if not list(module.children()) else type(module).__name__
    return " ".join(text.split())


def _nothing_found(model: nn.Module, out: Tensor, found: list[str], head: str | None) -> tuple[str, str]:
    """Why no layer is the head, and what to do."""
    advice = "name the layer with head=NAME, or evaluate the model whole (whole=True)"
    classes = out.shape[1]
    if found:
        advice = "evaluate the model whole (whole=True), or name another layer with head=NAME"
        return f"the logits ({classes} classes) can't be traced to one linear layer: {'; '.join(found[:4])}", advice
    if head is not None:
        return f"layer {head!r} has no answer of {classes} classes in a pass", advice
    names = [f"{name} ({_layer(module)})" for name, module in linear_layers(model).items()][-3:]
    held = f"the last of its linear layers are {', '.join(names)}" if names else "it has no linear layer"
    return f"no nn.Linear or 1x1 convolution of the model answers with {classes} classes; {held}", advice
