"""foolbox's attacks (Rauber et al. 2020), by the names and with the options of their classes."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from msa_eval.attacks.ball import Ball
from msa_eval.attacks.external.adapter import LibraryAttack, chosen, options_of, pick

_NO_GRADIENT = ("Noise", "Boundary", "HopSkipJump", "Pointwise", "GenAttack", "SpatialAttack", "Contrast", "Inversion",
                "Blur", "Binarization")  # fmt: skip
"""Parts of the names of attacks that ask for logits or answers alone."""

_CHANCE = (
    "Noise",
    "Boundary",
    "HopSkipJump",
    "Pointwise",
    "GenAttack",
    "SpatialAttack",
    "VirtualAdversarial",
    "BrendelBethge",
)


def make(name: str, ball: Ball, options: Mapping[str, Any]) -> LibraryAttack:
    """One of foolbox's attacks; its points clipped to the radius, as foolbox returns them.

    With ``targeted = true`` it is driven towards the likeliest other class, in a next restart towards the one after.

    Raises:
        ValueError: when there is no such attack or option.
    """
    import foolbox as library

    kind = getattr(library.attacks, pick("foolbox", name, _kinds()))
    takes = options_of(kind.__init__, without=("self", "args", "kwargs"))
    needed = {option for option, default in takes.items() if default is inspect.Parameter.empty}
    known = {option: None if option in needed else default for option, default in takes.items()}
    given = chosen(f"foolbox:{name}", {**known, "targeted": False}, options)
    targeted = given.pop("targeted")
    if missing := sorted(needed - set(options)):
        raise ValueError(
            f"foolbox:{name} needs {', '.join(missing)}; give it in the protocol, or choose another attack"
        )
    if "distance" in takes and given["distance"] is None:
        given["distance"] = getattr(library.distances, ball.norm.lower())

    def search(model: nn.Module, x: Tensor, y: Tensor, seed: int, turn: int) -> Tensor:
        shown = library.PyTorchModel(model, bounds=(0, 1), device=x.device)
        criterion = library.Misclassification(y)
        if targeted:
            with torch.no_grad():
                others = model(x).scatter(1, y.unsqueeze(1), -torch.inf).argsort(dim=1, descending=True)
            criterion = library.TargetedMisclassification(others[:, turn % (others.shape[1] - 1)])
        points: Tensor = kind(**given)(shown, x, criterion, epsilons=ball.eps)[1]
        return points

    starts = targeted or bool(given.get("random_start")) or any(part in name for part in _CHANCE)
    gradient_free = any(part in name for part in _NO_GRADIENT)
    return LibraryAttack(f"foolbox:{name}", search, gradient_free, starts, {**given, "targeted": targeted})


def _kinds() -> list[str]:
    import foolbox as library
    from foolbox.attacks.base import Attack

    kinds = {name: kind for name, kind in vars(library.attacks).items() if inspect.isclass(kind)}
    return [name for name, kind in kinds.items() if issubclass(kind, Attack) and not inspect.isabstract(kind)]
