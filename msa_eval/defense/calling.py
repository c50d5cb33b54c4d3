"""One call of a target's code: what it is given, and what is taken of what it answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from msa_eval.numerics import callers_device

LOGITS = ("logits", "out", "output", "outputs", "scores", "predictions", "preds", "pred", "y_hat")
"""What models that answer with more than one value call their logits."""

PASSED_ON = (RuntimeError, ValueError, IndexError, MemoryError)
"""Errors that callers look for; any other of the target's code becomes a `RuntimeError` that names it."""


class Taken(NamedTuple):
    """What is taken of an answer.

    Attributes:
        value: the logits, or the answer as it is.
        note: which of its values that is, where there were more.
    """

    value: Any
    note: str = ""


def call(code: Callable[..., Any], given: Tensor, *more: Any, **settings: Any) -> Any:
    """Call a target's code with a copy of a tensor, so that code which writes into what it is given changes only that.

    No code is given an empty batch, which ``x.view(len(x), -1)`` can't take: it answers for one row of zeros, and no
    row of that is returned.

    Args:
        code: the target's.
        given: images or features ``(B, ...)``.
        more: passed on.
        settings: passed on.

    Returns:
        its answer; tensors that are detached where gradients are off, whatever the code switches on for itself.

    Raises:
        RuntimeError: for any error of the code that is not among `PASSED_ON`.

    >>> x = torch.ones(2, 3)
    >>> call(lambda x: x.sub_(1), x).sum(), x.sum()
    (tensor(0.), tensor(6.))
    """
    if not len(given):
        row = torch.cat([given, given.new_zeros(1, *given.shape[1:])])  # to which a gradient finds its way
        answer = logits_in(call(code, row, *more, **settings)).value
        return answer[:0] if isinstance(answer, Tensor) else answer
    copy = given.clone()
    if copy.requires_grad:
        copy.retain_grad()  # for code that asks for the gradient of what it is given
    device = callers_device()
    try:
        with nullcontext() if device is None else torch.device(device):
            return _plain(code(copy, *more, **settings))
    except PASSED_ON:
        raise
    except Exception as error:
        raise RuntimeError(f"{type(error).__name__}: {error}") from error


def _plain(answer: Any) -> Any:
    """A tensor without the traces of how gradients were switched inside of the code."""
    if not isinstance(answer, Tensor):
        return answer
    if answer.is_inference() and not torch.is_inference_mode_enabled():
        answer = answer.clone()
    return answer if torch.is_grad_enabled() else answer.detach()


def logits_in(answer: Any) -> Taken:
    """The logits in an answer: itself, the value of that name, or the only value of that shape.

    Two values of different widths could both be logits: then none is taken.

    >>> logits_in({"features": torch.zeros(2, 64), "logits": torch.zeros(2, 10)}).note
    "it answers with a dict, of which 'logits' is taken"
    """
    if isinstance(answer, Tensor):
        return Taken(answer if answer.layout == torch.strided else answer.to_dense())
    if isinstance(answer, np.ndarray):
        return Taken(torch.from_numpy(answer), "it answers with a NumPy array, which has no gradient")
    kind = _kind(answer)
    values = answer if isinstance(answer, Mapping) else getattr(answer, "__dict__", {})
    named = [name for name in LOGITS if isinstance(_value(answer, name), Tensor)]
    if named:
        return Taken(_plain(_value(answer, named[0])), f"it answers with {kind}, of which {named[0]!r} is taken")
    listed = list(answer) if isinstance(answer, tuple | list) else list(values.values())
    fitting = [value for value in listed if isinstance(value, Tensor) and value.ndim == 2]
    if not fitting or len({value.shape for value in fitting}) > 1:
        return Taken(answer)
    return Taken(_plain(fitting[0]), f"it answers with {kind}, of which the first value of shape (B, k) is taken")


def _value(answer: Any, name: str) -> Any:
    return answer.get(name) if isinstance(answer, Mapping) else getattr(answer, name, None)


def no_logits(answer: Any, count: int) -> str:
    """What to say of an answer to so many images that is no logits ``(B, k)``; empty where it is.

    >>> no_logits(torch.zeros(4, 2), 4)
    ''
    """
    expected = f"expected logits of shape ({count}, k)"
    if isinstance(answer, torch.nn.Module):
        return f"{expected}, but got {_kind(answer)}; a function that makes the model must need no argument"
    if not isinstance(answer, Tensor):
        return f"{expected}, but got {described(answer)}; return the logits alone, as a tensor"
    shape, z = tuple(answer.shape), "z" if answer.ndim == 2 else "z.view(-1, 1)"
    if answer.is_complex():
        advice = f"but got {answer.dtype}; return real numbers"
    elif shape in ((count,), (count, 1)) and answer.is_floating_point():
        advice = f"of at least 2 classes, but got shape {shape}; of one logit z return torch.cat([-{z}, {z}], 1)"
    elif shape in ((count,), (count, 1)):
        advice = f"but got shape {shape} of {answer.dtype}: return each class's logit, not the class's number"
    elif len(shape) > 2 and shape[0] == count and answer[:1].numel() == shape[1]:
        advice = f"but got shape {shape}; return z.flatten(1)"
    elif len(shape) != 2 or shape[0] != count or shape[1] < 2:
        advice = f"but got shape {shape}; return one row of logits per image"
    else:
        return ""
    return f"{expected}{' ' if advice.startswith('of') else ', '}{advice}"


def described(value: object) -> str:
    """A tensor's shape, or what else came in its place.

    >>> described((torch.zeros(2, 10), torch.zeros(2, 64)))
    'a tuple of shapes (2, 10), (2, 64)'
    """
    if isinstance(value, Tensor):
        return f"shape {tuple(value.shape)}"
    parts = list(value.values()) if isinstance(value, Mapping) else value if isinstance(value, tuple | list) else []
    shapes = ", ".join(str(tuple(part.shape)) for part in parts if isinstance(part, Tensor))
    return _kind(value) + (f" of shapes {shapes}" if shapes else "")


def _kind(value: object) -> str:
    """What a value is, with its article.

    >>> _kind(()), _kind(OSError()), _kind(None)
    ('a tuple', 'an OSError', 'nothing')
    """
    name = type(value).__name__
    return "nothing" if value is None else f"{'an' if name[0] in 'AEIOUaeio' else 'a'} {name}"


def not_finite(logits: Tensor) -> str:
    """What logits that are not finite hold, and what to do; empty where all are finite.

    >>> not_finite(torch.tensor([[0.0, -torch.inf]]))
    'they hold -inf; use a finite number such as -1e9 for classes that are switched off'
    """
    if bool(logits.isnan().any()):
        return "they hold NaN; look for a division by zero, a log or a root of what is not positive"
    if bool((logits == torch.inf).any()):
        return "they hold +inf; scale the logits down"
    if bool((logits == -torch.inf).any()):
        return "they hold -inf; use a finite number such as -1e9 for classes that are switched off"
    return ""
