"""pyautoattack's attacks, each on its own and set up as in AutoAttack's version ``standard`` (Croce & Hein 2020)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted
from pyautoattack.fab_pt import FABAttack_PT
from pyautoattack.square import SquareAttack
from torch import Tensor, nn

from msa_eval.attacks.ball import Ball
from msa_eval.attacks.external.adapter import LibraryAttack, chosen, pick

_KNOWN: Mapping[str, Mapping[str, Any]] = {
    "apgd-ce": {"steps": 100, "rho": 0.75},
    "apgd-dlr": {"steps": 100, "rho": 0.75},
    "apgd-t": {"steps": 100, "rho": 0.75, "targets": 9},
    "fab": {"steps": 100},
    "fab-t": {"steps": 100, "targets": 9},
    "square": {"queries": 5000, "p_init": 0.8},
}
"""The attacks and their options; the defaults are those of the version ``standard``."""


def make(name: str, ball: Ball, options: Mapping[str, Any]) -> LibraryAttack:
    """One of AutoAttack's attacks, without the suite's checks of the model, which forward more batches.

    Where the model has fewer classes than ``targets`` asks for, all others are targets.

    Raises:
        ValueError: when there is no such attack or option.
    """
    kind = pick("autoattack", name, _KNOWN)
    given = chosen(f"autoattack:{name}", _KNOWN[kind], options)

    def search(model: nn.Module, x: Tensor, y: Tensor, seed: int, turn: int) -> Tensor:
        of_all: dict[str, Any] = {"norm": ball.norm, "eps": ball.eps, "seed": seed, "device": x.device}
        targets = min(given.get("targets", 1), int(getattr(model, "classes", 1000)) - 1)
        attack: Any
        if kind == "square":
            queries, p_init = given["queries"], given["p_init"]
            attack = SquareAttack(model, n_queries=queries, p_init=p_init, resc_schedule=False, **of_all)
        elif kind.startswith("fab"):
            of_all |= {"n_iter": given["steps"], "targeted": kind == "fab-t", "n_target_classes": targets}
            attack = FABAttack_PT(model, n_restarts=1, **of_all)
        elif kind == "apgd-t":
            of_all |= {"n_iter": given["steps"], "rho": given["rho"], "n_target_classes": targets}
            attack = APGDAttack_targeted(model, use_largereps=ball.norm == "L1", **of_all)
        else:
            of_all |= {"n_iter": given["steps"], "rho": given["rho"], "loss": kind.removeprefix("apgd-")}
            attack = APGDAttack(model, use_largereps=ball.norm == "L1", **of_all)
        points: Tensor = attack.perturb(x, y)
        return points

    # FAB's only restart starts at the clean images, so its seed changes nothing.
    return LibraryAttack(f"autoattack:{name}", search, kind == "square", not kind.startswith("fab"), given)
