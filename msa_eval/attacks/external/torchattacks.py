"""torchattacks' attacks (Kim 2020), by the names and with the options of their classes."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from msa_eval.attacks.ball import Ball
from msa_eval.attacks.external.adapter import LibraryAttack, chosen, options_of, pick

_OURS = ("self", "model", "eps", "max_epsilon", "norm", "seed", "verbose", "n_classes")
"""What the adapter gives: the model, the ball, the seed and the number of classes."""

_LEFT_OUT = ("MultiAttack", "LGV")
"""Wrappers of other attacks."""

_NO_GRADIENT = ("GN", "OnePixel", "Pixle", "SPSA", "Square", "VANILA")
_NO_CHANCE = ("VANILA", "FGSM", "BIM", "MIFGSM", "NIFGSM", "SINIFGSM", "PIFGSM", "CW", "DeepFool", "SparseFool", "JSMA",
              "EADL1", "EADEN")  # fmt: skip


def make(name: str, ball: Ball, options: Mapping[str, Any]) -> LibraryAttack:
    """One of torchattacks' attacks.

    Its step size ``alpha``, which is meant for a radius of 8/255, is 2.5 radii over the number of steps by default.

    Raises:
        ValueError: when there is no such attack or option.
    """
    import torchattacks as library

    kinds = {one: getattr(library, one) for one in library.__all__ if one not in _LEFT_OUT}
    kind = kinds[pick("torchattacks", name, kinds)]
    takes = inspect.signature(kind.__init__).parameters
    known = options_of(kind.__init__, without=_OURS)
    given = chosen(f"torchattacks:{name}", known, options)
    if "alpha" in known and "steps" in known and "alpha" not in options:
        given["alpha"] = 2.5 * ball.eps / max(given["steps"], 1)

    def search(model: nn.Module, x: Tensor, y: Tensor, seed: int, turn: int) -> Tensor:
        ours: dict[str, Any] = {"eps": ball.eps, "max_epsilon": ball.eps, "norm": ball.norm, "seed": seed}
        ours["n_classes"] = getattr(model, "classes", None)
        attack = kind(model, **given, **{option: value for option, value in ours.items() if option in takes})
        attack.set_device(x.device)
        points: Tensor = attack(x, y)
        return points

    starts = name not in _NO_CHANCE or bool(given.get("random_start"))
    return LibraryAttack(f"torchattacks:{name}", search, name in _NO_GRADIENT, starts, given)
