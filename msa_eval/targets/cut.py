"""Where a classifier was cut, and the trunk and the head that the cut makes of it."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from msa_eval.defense.architectures import Classifier

WIDEST = 2**24
"""More features or classes than a head may have."""


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
        head = layer_named(model, self.head)
        fc = nn.utils.skip_init(nn.Linear, self.features, self.classes, bias=self.bias)
        return self.join(model, head, fc.eval())

    def join(self, model: nn.Module, head: nn.Module, fc: nn.Linear) -> Classifier:
        """The model as a trunk up to its head, and another head."""
        trunk = Trunk(_grafted(model, head, _Tap()), self, channels_first=is_conv(head)).eval()
        return (Classifier(trunk, fc) if self.post is None else PostClassifier(trunk, fc, self.post)).eval()


class CantSplitError(ValueError):
    """A model can't be split into trunk and head, though it may be evaluated whole.

    Args:
        reason: why.
        advice: what to do.
    """

    def __init__(self, reason: str, advice: str = "evaluate it whole (whole=True)") -> None:
        super().__init__(f"{reason}; {advice}")
        self.reason = reason


class _Reached(Exception):  # noqa: N818 - it is no error
    """Carries the features out of the model when they reach the head."""

    def __init__(self, features: Tensor) -> None:
        super().__init__("the head was reached")
        self.features = features


class _Tap(nn.Module):
    """Stands where the head stood, and ends the pass there."""

    def forward(self, *given: Any, **named: Any) -> NoReturn:
        features = first_tensor(given, named)
        assert features is not None
        raise _Reached(features)


def first_tensor(given: tuple[Any, ...], named: Mapping[str, Any]) -> Tensor | None:
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


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The linear layers of a model by dotted name, in order."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) or (is_conv(module) and _is_pointwise(module))
    }


def is_conv(module: nn.Module) -> bool:
    """Whether a layer is a convolution."""
    return isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)


def _is_pointwise(module: Any) -> bool:
    sizes = {*module.kernel_size, *module.stride, module.groups}
    return sizes == {1} and (isinstance(module.padding, str) or set(module.padding) == {0})


def layer_named(model: nn.Module, name: str) -> nn.Module:
    """The layer of a name; a `ValueError` names the nearest where there is none."""
    modules: dict[str, nn.Module] = dict(model.named_modules(remove_duplicate=False))
    if name not in modules:
        names = [*linear_layers(model)]
        close = difflib.get_close_matches(name, names, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise ValueError(
            f"the model has no layer {name!r}{hint}; its last linear layers: {', '.join(names[-5:]) or 'none'}"
        )
    return modules[name]


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
