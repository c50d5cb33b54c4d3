"""The stages of a target: the submodules that it calls in a pass, with the images they are given.

A submodule that maps images to logits is a surrogate by itself (``inner:NAME``): a defence that works on the input, or
adapts around a static model, is attacked through that model. A stage that maps images to images can be passed over on
the way back (``bpda:NAME``), and so can whatever stands before a submodule that is given images.

References:
    Obfuscated Gradients Give a False Sense of Security (Athalye, Carlini & Wagner, 2018), arXiv:1802.00420, section 4.1
    (BPDA); Automated Discovery of Adaptive Attacks on Adversarial Defenses (Yao et al., 2021), arXiv:2102.11860.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from msa_eval.device import in_float64
from msa_eval.surrogates.found.passing import Passing
from msa_eval.surrogates.found.straight_through import looking_through, run

SAME = 1e-4
"""A fit whose residual is below this share of what is fitted is exact."""


@dataclass(frozen=True)
class Scaling:
    """How the images that a submodule is given follow from those of the target: a scale and a shift a channel.

    Attributes:
        scale: ``(C, 1, 1)``.
        shift: ``(C, 1, 1)``.
        residual: the share of what is given that it leaves unexplained, from 0.
    """

    scale: Tensor
    shift: Tensor
    residual: float

    @property
    def exact(self) -> bool:
        """Whether nothing else was done to the images."""
        return self.residual < SAME

    def __call__(self, x: Tensor) -> Tensor:
        """Images as the submodule takes them."""
        return x * self.scale.to(x) + self.shift.to(x)


@dataclass(frozen=True)
class Stage:
    """A submodule that was given images in a pass.

    Attributes:
        name: its path in the target, or its class's name where it has none.
        module: itself.
        given: how its images follow from the target's.
        answers: its logits ``(B, k)``, if it returns such.
        passes_on: whether it returns images of the shape that it was given.
        calls: how often it was called.
    """

    name: str
    module: nn.Module
    given: Scaling
    answers: Tensor | None
    passes_on: bool
    calls: int


def stages_of(defense: Any, x: Tensor) -> list[Stage]:
    """The submodules that are given images of the target's shape in a pass, each once, in the order of their calls.

    Modules are found also where they are registered nowhere, such as in a list or in a closure.

    Args:
        defense: the target.
        x: a batch of images ``(B, C, H, W)``.
    """
    seen: dict[int, _Seen] = {}
    given: dict[int, Tensor] = {}
    thread = threading.get_ident()

    def enter(module: nn.Module, args: tuple[Any, ...]) -> None:
        if threading.get_ident() == thread and args and _is_like(args[0], x):
            given[id(module)] = args[0].detach().clone()  # which the module may write into

    def note(module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        if threading.get_ident() != thread or not args or not _is_like(args[0], x):
            return
        known = seen.get(id(module))
        if known is None:
            answer = out.detach().clone() if isinstance(out, Tensor) else None
            seen[id(module)] = _Seen(module, given.get(id(module), args[0].detach()), answer)
        else:
            known.calls += 1

    handles = [register_module_forward_pre_hook(enter), register_module_forward_hook(note)]
    try:
        with torch.no_grad():
            answer = run(defense, x, on_images=True)
    finally:
        for handle in handles:
            handle.remove()
    names = names_of(defense)
    return [one.stage(names, x, answer.shape[1]) for one in seen.values()]


@dataclass
class _Seen:
    module: nn.Module
    given: Tensor
    returned: Tensor | None
    calls: int = 1

    def stage(self, names: Mapping[int, str], x: Tensor, classes: int) -> Stage:
        out = self.returned
        answers = out if out is not None and out.shape == (len(x), classes) and out.is_floating_point() else None
        name = names.get(id(self.module)) or type(self.module).__name__.lower()
        passes_on = out is not None and _is_like(out, x)
        return Stage(name, self.module, scaling(x, self.given), answers, passes_on, self.calls)


def _is_like(value: Any, x: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == x.shape and value.is_floating_point()


def scaling(x: Tensor, given: Tensor) -> Scaling:
    """Fit a scale and a shift a channel by least squares.

    Args:
        x: the target's images ``(B, C, H, W)``.
        given: what a submodule was given ``(B, C, H, W)``.

    >>> x = torch.rand(4, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    >>> fit = scaling(x, 2 * x - 1)
    >>> fit.exact, round(float(fit.scale), 3)
    (True, 2.0)
    """
    a, b = (in_float64(value).transpose(0, 1).flatten(1) for value in (x, given))
    a_mean, b_mean = a.mean(dim=1, keepdim=True), b.mean(dim=1, keepdim=True)
    variance = (a - a_mean).pow(2).mean(dim=1, keepdim=True)
    scale = ((a - a_mean) * (b - b_mean)).mean(dim=1, keepdim=True) / variance.clamp_min(1e-12)
    shift = b_mean - scale * a_mean
    rest = (scale * a + shift - b).pow(2).mean() / (b - b_mean).pow(2).mean().clamp_min(1e-12)
    return Scaling(scale.float().unsqueeze(-1), shift.float().unsqueeze(-1), float(rest.sqrt()))


def names_of(defense: Any) -> dict[int, str]:
    """The path of every module that a defence holds, by its identity, those in plain lists, dicts and objects too."""
    names: dict[int, str] = {}
    seen: set[int] = set()

    def walk(value: Any, path: str, depth: int) -> None:
        if id(value) in seen or depth > 8 or isinstance(value, Tensor | type | ModuleType | str | int | float):
            return
        seen.add(id(value))
        if isinstance(value, nn.Module):
            names[id(value)] = path
        if isinstance(value, Mapping):
            entries = list(value.items())
        elif isinstance(value, list | tuple):
            entries = list(enumerate(value))
        else:
            held = getattr(value, "__dict__", {})
            children = held.get("_modules", {}) if isinstance(value, nn.Module) else {}
            entries = [
                *children.items(),
                *((k, v) for k, v in held.items() if not k.startswith("_") and k != "training"),
            ]
        for key, entry in entries:
            walk(entry, f"{path}.{key}" if path else str(key), depth + 1)

    walk(getattr(defense, "model", defense), "", 0)
    return names


@dataclass(frozen=True)
class InnerModel:
    """A submodule's own logits, given the images that the target is given."""

    module: nn.Module
    given: Scaling

    def __call__(self, defense: Any, x: Tensor) -> Tensor:
        """Logits ``(B, k)``."""
        del defense
        out: Tensor = self.module(self.given(x))
        return out


@dataclass(frozen=True)
class MeanOfInner:
    """The mean of several submodules' logits."""

    members: tuple[InnerModel, ...]

    def __call__(self, defense: Any, x: Tensor) -> Tensor:
        """Logits ``(B, k)``."""
        return torch.stack([member(defense, x) for member in self.members]).mean(dim=0)


@dataclass(frozen=True)
class PassedOver:
    """The target's own code, one stage of which, or all that stands before it, has the identity's gradient.

    Attributes:
        stage: it.
        before: pass over what stands before it; else over itself.
        passing: what else the gradient is passed through, if anything.
    """

    stage: Stage
    before: bool
    passing: Passing | None = None

    def __call__(self, defense: Any, x: Tensor) -> Tensor:
        """Logits ``(B, k)`` of images ``(B, C, H, W)``."""
        with looking_through(self.passing) if self.passing else nullcontext(), self._bridged(defense, x):
            return run(defense, x.clone(), on_images=True)

    @contextmanager
    def _bridged(self, defense: Any, x: Tensor) -> Iterator[None]:
        """Mend the stage's gradient for as long as this lasts; the module is left as it was."""
        images = [x]
        root = getattr(defense, "model", None)
        thread, module, given = threading.get_ident(), self.stage.module, self.stage.given

        def enter(_: nn.Module, args: tuple[Any, ...]) -> None:
            if threading.get_ident() == thread and args and _is_like(args[0], args[0]):
                images[0] = args[0]

        def before(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            if threading.get_ident() != thread or not args or not _is_like(args[0], images[0]):
                return None
            with torch._C.DisableTorchFunction():
                return (args[0].detach() + given.scale.to(x) * (images[0] - images[0].detach()), *args[1:])

        def after(_: nn.Module, args: tuple[Any, ...], out: Any) -> Tensor | None:
            if threading.get_ident() != thread or not args or not _is_like(args[0], out):
                return None
            with torch._C.DisableTorchFunction():
                slope = scaling(args[0].detach(), out.detach()).scale
                mended: Tensor = out.detach() + slope.to(out) * (args[0] - args[0].detach())
                return mended

        handles = [root.register_forward_pre_hook(enter)] if isinstance(root, nn.Module) else []
        handles.append(module.register_forward_pre_hook(before) if self.before else module.register_forward_hook(after))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def classes_passing_on(defense: Any, x: Tensor) -> list[type[nn.Module]]:
    """The classes, other than torch's own, whose modules return what has the shape of what they are given.

    Args:
        defense: the target.
        x: a batch of images ``(B, C, H, W)``.
    """
    found: dict[type[nn.Module], bool] = {}
    thread = threading.get_ident()

    def note(module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        kind = type(module)
        if threading.get_ident() != thread or kind.__module__.startswith(("torch.", "torchvision.")) or not args:
            return
        given = args[0]
        alike = isinstance(given, Tensor) and _is_like(out, given) and len(args) == 1 and given.shape != x.shape
        found[kind] = alike and found.get(kind, True)

    handle = register_module_forward_hook(note)
    try:
        with torch.no_grad():
            run(defense, x, on_images=True)
    finally:
        handle.remove()
    return [kind for kind, alike in found.items() if alike]


@dataclass(frozen=True)
class ClassPassedOver:
    """The target's own code, in which every module of a class has the identity's gradient.

    Attributes:
        kind: the class; its modules return what has the shape of what they are given.
    """

    kind: type[nn.Module]

    def __call__(self, defense: Any, x: Tensor) -> Tensor:
        """Logits ``(B, k)`` of images ``(B, C, H, W)``."""
        thread = threading.get_ident()

        def after(module: nn.Module, args: tuple[Any, ...], out: Any) -> Tensor | None:
            if threading.get_ident() != thread or type(module) is not self.kind or not _is_like(args[0], out):
                return None
            mended: Tensor = out.detach() + args[0] - args[0].detach()
            return mended

        handle = register_module_forward_hook(after)  # type: ignore[arg-type]
        try:
            return run(defense, x.clone(), on_images=True)
        finally:
            handle.remove()
