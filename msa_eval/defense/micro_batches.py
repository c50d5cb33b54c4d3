"""Batches that do not fit into memory: the trunk takes them in parts, and the decision gets them whole."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from msa_eval.defense.calling import call, logits_in
from msa_eval.defense.channels_last import channels_last, takes_channels_last
from msa_eval.defense.contract import Defense, WholeModel, modules_of
from msa_eval.defense.own_gradients import OwnGradients, followed

TOLD_BY = ("out of memory", "not enough memory", "can't allocate memory", "alloc_failed")
"""Parts of what torch says, in small letters, when memory is short."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory was short.

    >>> is_out_of_memory(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried ..."))
    True
    """
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in TOLD_BY)


class MicroBatched:
    """A defence whose trunk takes a batch in parts, where the whole does not fit into memory.

    The features of the parts are joined before anything is decided, so the batch that the decision sees never changes.
    Their gradients are found part by part too: no activations are kept, and each part is passed once more. The trunk is
    passed with the images' channels last in memory, where that is worth it. All else is the defence's own.

    Args:
        defense: the target; features come from their own image alone.
        size: the largest part from the start, in images.
        channels_last: whether images are passed so, if that is not for each process to find out.

    Attributes:
        size: the largest part that fits, as far as was found out; ``None`` while all batches have fitted.
        channels_last: whether images are passed so; ``None`` before the first were.
        note: which of the decision's answers are its logits, where it answers with more than one.
        own_gradients: what gradients the defence takes by itself, once that was tried.
    """

    def __init__(self, defense: Defense, size: int | None = None, channels_last: bool | None = None) -> None:
        if size is not None and size < 1:
            raise ValueError(f"expected parts of at least 1 image, but got {size}")
        self.whole, self.size = defense, size
        self.channels_last = self._asked_channels_last = channels_last
        self.note = ""
        self.own_gradients = OwnGradients.NONE

    def __getattr__(self, name: str) -> Any:
        return getattr(self.whole, name)

    def __reduce__(self) -> tuple[Any, ...]:  # else unpickling would ask for attributes before there are any
        return MicroBatched, (self.whole, self.size, self._asked_channels_last), {"own_gradients": self.own_gradients}

    def features(self, x: Tensor) -> Tensor:
        """The defence's features ``(B, ...)`` of images ``(B, C, H, W)``, in as few parts as memory allows."""
        for attempt in in_smaller_parts(self, len(x)):
            with attempt:
                if self.channels_last is None:
                    self.channels_last = takes_channels_last(self.whole, x)
                fits = self.size is None or len(x) <= self.size
                z = self.passed(x) if fits else self._in_parts(x)
        return z

    @property
    def logits(self) -> Callable[..., Tensor]:
        """The defence's own decision on a whole batch of features: surrogates look at what it takes."""
        return Decision(self, self.whole.logits)

    def keep_to(self, size: int | None) -> None:
        """Take no larger parts than fitted elsewhere."""
        self.size = min((each for each in (self.size, size) if each is not None), default=None)

    def shrink(self, count: int) -> bool:
        """Take half as many images at a time, of so many; whether that is possible."""
        size = min(self.size or count, count)
        if size <= 1:
            return False
        self.size = (size + 1) // 2
        return True

    def passed(self, part: Tensor) -> Tensor:
        """Features of what fits."""
        given = channels_last(part) if self.channels_last else part
        if self.own_gradients is OwnGradients.NONE:
            z: Tensor = call(self.whole.features, given)
        else:
            z = self.followed(partial(call, self.whole.features), given)
        return z.contiguous() if self.channels_last else z

    def followed(self, answer: Callable[[Tensor], Tensor], given: Tensor) -> Tensor:
        """The answer of one of the defence's methods, which may take gradients by itself."""
        if self.own_gradients is OwnGradients.NONE:
            return answer(given)
        return followed(answer, given, modules_of(self.whole), self.own_gradients)

    def _in_parts(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and x.requires_grad:
            joined: Tensor = _Joined.apply(x, self)  # type: ignore[no-untyped-call]
            return joined
        return torch.cat([self.passed(part) for part in x.split(self.size or len(x))])


@dataclass(frozen=True)
class Decision:
    """The decision of a defence, which is called as all of a target's code is.

    Attributes:
        of: the defence in parts, which keeps what is to be said of the answers.
        own: the defence's own ``logits``.
    """

    of: MicroBatched
    own: Callable[..., Any]

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        """For whoever asks for its signature."""
        return self.own

    def __eq__(self, other: object) -> bool:
        return self.own == (other.own if isinstance(other, Decision) else other)

    def __hash__(self) -> int:
        return hash(self.own)

    def __call__(self, z: Tensor, *more: Any, **settings: Any) -> Tensor:
        """Logits ``(B, k)`` of a whole batch of features ``(B, ...)``."""

        def answer(z: Tensor) -> Tensor:
            out: Tensor
            out, self.of.note = logits_in(call(self.own, z, *more, **settings))
            return out

        return self.of.followed(answer, z)


class _Joined(torch.autograd.Function):
    """The features of a batch, its parts passed one after another, and again for their gradients.

    Torch's own checkpoints keep more than one part at a time.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, trunk: MicroBatched) -> Tensor:
        ctx.save_for_backward(x)
        ctx.trunk = trunk
        return trunk._in_parts(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None]:
        (x,) = ctx.saved_tensors
        for attempt in in_smaller_parts(ctx.trunk, len(x)):
            with attempt:
                found = _gradient(ctx.trunk, x, gradients[0])
        return (None if found.numel() < x.numel() else found), None


def _gradient(trunk: MicroBatched, x: Tensor, gradient: Tensor) -> Tensor:
    """The gradient of images ``(B, C, H, W)`` from that of their features; empty where none leads to them."""
    found = []
    for part, above in zip(x.split(trunk.size or len(x)), gradient.split(trunk.size or len(x)), strict=True):
        with torch.enable_grad():
            leaf = part.detach().requires_grad_()
            z = trunk.passed(leaf)
        (below,) = torch.autograd.grad(z, leaf, above, allow_unused=True) if z.requires_grad else (None,)
        if below is None:
            return x.new_empty(0)
        found.append(below)
    return torch.cat(found)


def in_parts(defense: Defense, size: int | None = None) -> Defense:
    """A defence that goes on in parts where memory is short.

    A model without a trunk decides on the images themselves, and stays as it is: its batch can't be taken apart.

    Raises:
        ValueError: when a size of parts is asked of such a model.
    """
    if isinstance(defense, MicroBatched):
        return defense
    if isinstance(defense, WholeModel):
        if size is not None:
            raise ValueError(
                "a model without a trunk decides on whole batches of images, which can't be passed in parts; "
                "use smaller batches"
            )
        return defense
    return MicroBatched(defense, size)


def in_smaller_parts(defense: Defense, count: int) -> Iterator[AbstractContextManager[None]]:
    """Attempts at something with a batch of so many images: where memory is short, another in smaller parts follows.

    What else an attempt raises, and what it raises when not even a single image fits, is raised to the caller.

    >>> for attempt in in_smaller_parts(defense, len(x)):  # doctest: +SKIP
    ...     with attempt:
    ...         z = defense.features(x)
    """
    again = True

    @contextmanager
    def attempt() -> Iterator[None]:
        nonlocal again
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            again = is_out_of_memory(error) and isinstance(defense, MicroBatched) and defense.shrink(count)
            if not again:
                raise

    while again:
        again = False
        yield attempt()
        if again:
            gc.collect()  # what the attempt that failed still holds
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


def unwrap(defense: Defense) -> Defense:
    """The defence itself."""
    return defense.whole if isinstance(defense, MicroBatched) else defense


def parts_of(defense: Defense) -> int | None:
    """The largest part that a trunk takes at a time; ``None`` where it takes whole batches."""
    return defense.size if isinstance(defense, MicroBatched) else None


def passed_last(defense: Defense) -> bool:
    """Whether a trunk's images are passed with their channels last in memory."""
    return isinstance(defense, MicroBatched) and bool(defense.channels_last)
