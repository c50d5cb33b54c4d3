"""What is known of a defence: how it masks its gradient, if it does, and what gives its number."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from msa_eval import Samples, load_samples
from msa_eval.attacks import Ball

from .nets import EPS

Attack = Callable[[Any, Tensor, Tensor, Ball], Tensor]
"""From the defence, images, labels and the ball to which samples are left ``(N,)``."""


@functools.cache
def digits(count: int = 64) -> Samples:
    """The first test digits."""
    data = load_samples("digits")
    return Samples(data.x[:count], data.y[:count], f"digits ({count})")


@dataclass(frozen=True)
class Known:
    """A defence with a known answer.

    Attributes:
        name: of its row.
        make: builds it.
        attack: written for it; gives the samples that are left.
        masked: by what mechanism its gradient is hidden; none of an honest one.
        level: where it is.
        part: whether a part of the gradient is left.
        exact: whether the attack is a closed form, so that its number is no upper bound but the truth.
        never_sound: whether no number of it can be believed, whatever it is.
        behaviour: what an answer depends on beside the image.
        context: of the evaluation; `joint` in one batch of all samples.
        norm: of the ball.
        eps: its radius.
        samples: that it is evaluated on.
        shared: whether its images lie outside the project, in the folder that ``MSA_EVAL_SHARED`` names.
        source: the paper it is from, if it is published.
    """

    name: str
    make: Callable[[], Any]
    attack: Attack
    masked: str = ""
    level: Literal["", "pixels", "features", "logits", "model"] = ""
    part: bool = False
    exact: bool = False
    never_sound: bool = False
    behaviour: Literal["static", "batch", "stochastic"] = "static"
    context: Literal["alone", "joint"] = "alone"
    norm: Literal["Linf", "L2"] = "Linf"
    eps: float = EPS
    samples: Callable[[], Samples] = digits
    shared: bool = False
    source: str = ""

    @property
    def kind(self) -> str:
        """Whether it is honest, or masked in part or in full."""
        if not self.masked:
            return "honest"
        return "masked in part" if self.part else "masked"

    @property
    def ball(self) -> Ball:
        """The perturbation set."""
        return Ball(self.norm, self.eps)

    def build(self) -> Any:
        """The defence, in evaluation mode."""
        made = self.make()
        return made.eval() if isinstance(made, nn.Module) else made

    def left(self) -> Tensor:
        """Attack it anew: which samples are left."""
        data = self.samples()
        return self.attack(self.build(), data.x, data.y, self.ball)
