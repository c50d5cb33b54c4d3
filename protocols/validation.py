"""Which keys of a protocol contradict each other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from msa_eval.protocols import checks
from msa_eval.protocols.keys import KEYS

SCHEMA = 1
"""The version of the format of protocols."""

BESIDE = ("attack.recombination", "attack.composition")
"""What goes along with attacks, and is none by itself."""

ATTACKS = tuple(dict.fromkeys(
    ".".join(key.split(".")[:2]) for key in KEYS if key.startswith("attack.") and not key.startswith(BESIDE)
))  # fmt: skip
"""The sections that name an attack."""


def contradictions(values: Mapping[str, Any]) -> list[str]:
    """Which keys contradict each other, a sentence each."""
    found = []
    if values.get("schema", SCHEMA) != SCHEMA:
        found.append(f"schema: this release reads schema {SCHEMA}, but got {values['schema']!r}")
    if "samples.fraction" in values and "samples.per_class" in values:
        found.append("samples.fraction and samples.per_class exclude each other")
    if not any(key.startswith(ATTACKS) for key in values):
        found.append(f"no attack: give {', '.join(ATTACKS[:-1])} or {ATTACKS[-1]}")
    found += _too_coarse(values)
    moves = [*_listed(values, "moves"), *(str(run).rpartition(":")[2] for run in _listed(values, "runs"))]
    if "attack.apgd.victim" in values and "companions" not in moves:
        found.append(
            "attack.apgd.victim names the sample whose companions are moved, but no run moves companions; "
            "use a protocol that has such runs (msa), or give attack.apgd.moves"
        )
    for key in ("attack.apgd.passes", "attack.apgd.overtime"):
        if key in values and values.get("attack.apgd.combine") != "cascade":
            found.append(f"{key} ends a cascade; give attack.apgd.combine = 'cascade', or leave it out")
    if "standing" in moves and values.get("attack.apgd.combine") != "cascade":
        found.append(
            "only a cascade knows which samples are unbroken; give attack.apgd.combine = 'cascade', or move the batch"
        )
    if values.get("attack.apgd.combine") == "mean" and set(moves) - {"batch", ""}:
        found.append("surrogates combined by mean move the batch; leave attack.apgd.moves out")
    if "attack.recombination.steps" in values and "attack.recombination.runs" not in values:
        found.append("attack.recombination.steps is of its own runs; give attack.recombination.runs, or leave it out")
    if "attack.recombination.runs" in values and not any(key.startswith("attack.apgd.") for key in values):
        found.append("attack.recombination.runs replace those of attack.apgd in joint; give attack.apgd too")
    if "attack.apgd.runs" in values:
        other = [k for k in ("surrogates", "losses", "restarts", "targets", "moves") if f"attack.apgd.{k}" in values]
        found += [f"attack.apgd.runs names every run, so attack.apgd.{key} has no meaning beside it" for key in other]
        if values.get("attack.apgd.combine") == "mean":
            found.append("attack.apgd.runs can't be combined by mean; give surrogates and losses")
    return found


def _too_coarse(values: Mapping[str, Any]) -> list[str]:
    """Whether no image can be changed by a level within the ball, in which the least change has the norm of one."""
    try:
        eps, levels = checks.number(0, 1000)(values["threat.eps"]), checks.levels(values["threat.levels"])
    except (KeyError, ValueError):  # reported by its own check
        return []
    if eps * (levels - 1) >= 1 - 1e-6:
        return []
    return [
        f"threat.eps is {eps:.4g}, less than one step of threat.levels = {levels} (1/{levels - 1}), so that no image "
        f"could be changed; take a larger threat.eps or more levels"
    ]


def _listed(values: Mapping[str, Any], key: str) -> list[Any]:
    given = values.get(f"attack.apgd.{key}", [])
    return given if isinstance(given, list) else []
