"""The signs that finished evidence holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from msa_eval.attacks.attacked_batch import gradient_free
from msa_eval.auditing.rules import (
    Mask,
    clean_at_chance,
    gradient_free_beats_white_box,
    transfer_beats_direct,
)
from msa_eval.auditing.sign import Sign
from msa_eval.evidence.records import CARRIED
from msa_eval.evidence.results import Results


def gradient_free_only(passes: float) -> Sign:
    """Where no attack followed a gradient: what the figure then says.

    Args:
        passes: forward passes per sample of all attacks; 0 before they are made.

    >>> gradient_free_only(5000.0).severity
    'suspect'
    """
    made = f"about {passes:.0f} forward passes per sample" if passes else "its passes"
    reason = (
        f"no attack of the protocol follows a gradient: the figure says what {made} without gradients break, and is "
        f"too high against whoever has more of them, or a gradient"
    )
    return Sign("gradient_free_only", True, "suspect", passes, 0.0, reason[0].upper() + reason[1:] + ".")


def weaker_than_narrower(carried: int, n: int) -> Sign:
    """Whether attacks that control more broke less than attacks in a context with less control did.

    Args:
        carried: samples that were broken in a narrower context, and by no attack of this one.
        n: all samples.

    >>> weaker_than_narrower(3, 100).fired, weaker_than_narrower(2, 100).fired, weaker_than_narrower(3, 1000).fired
    (True, False, False)
    """
    fired = carried > 2 and carried / n > 0.01
    reason = f"{carried} of {n} samples were broken only by what a narrower context found, and count as broken"
    if fired:
        reason += "; the search with more control was too weak, so that its number may be too high: give it more passes"
    return Sign("weaker_than_narrower", fired, "suspect", carried / n, 0.01, reason + ".")


def signs_from(results: Results, *, target: str = "defense") -> list[Sign]:
    """The signs that finished evidence holds: of clean accuracy, and of attacks against each other.

    Where there are several contexts, the one in which a sign is strongest speaks.

    Args:
        results: of an evaluation.
        target: ``defense`` or ``fc``.
    """
    of_target = results.attacks["target"] == target
    by_context = [_signs_in(results, target, context) for context in results.attacks[of_target]["context"].unique()]
    found: dict[str, Sign] = {}
    for sign in (sign for signs in by_context for sign in signs):
        if sign.name not in found or (sign.fired, sign.value) > (found[sign.name].fired, found[sign.name].value):
            found[sign.name] = sign
    return list(found.values())


def _signs_in(results: Results, target: str, context: str) -> list[Sign]:
    """The signs of one target in one context."""
    attacks, samples, outcomes = (
        table[(table["target"] == target) & (table["context"] == context)]
        for table in (results.attacks, results.samples, results.outcomes)
    )
    if samples.empty:
        return []
    right = samples.set_index("index")["clean_correct"].astype(bool)
    wide = outcomes.pivot(index="index", columns="run", values="any_broken").loc[right.index]
    broken: dict[str, Mask] = {str(run): wide[run].to_numpy(dtype=bool) & right.to_numpy() for run in wide.columns}
    kinds = {str(row["run"]): row for row in attacks.to_dict(orient="records")}
    carried = [run for run in broken if str(kinds[run]["attack"]).startswith(CARRIED)]
    made = [run for run in broken if run not in carried]
    free = [run for run in made if kinds[run]["attack"] in gradient_free()]
    # Attacks of other libraries have a colon in their names; the signs are of our own runs.
    white = [run for run in made if kinds[run]["attack"] not in gradient_free() and ":" not in kinds[run]["attack"]]
    # A run of a cascade goes on from the points of earlier ones, so runs say nothing about each other there.
    continued = 'combine = "cascade"' in results.run.get("protocol", {}).get("text", "")
    signs = [
        clean_at_chance(
            samples["label"].to_numpy(), samples["clean_prediction"].to_numpy(),
            results.run["targets"][target]["num_classes"],
        )
    ]  # fmt: skip
    if carried:
        signs.append(weaker_than_narrower(int(_union(broken, carried, len(right)).sum()), len(right)))
    if free and not attacks["backwards"].any():
        signs.append(gradient_free_only(float(attacks["forwards"].sum()) / len(right)))
    elif free:
        only = _union(broken, free, len(right)) & ~_union(broken, white, len(right))
        signs.append(gradient_free_beats_white_box(int(only.sum()), len(right), continued=continued))
    if not continued:
        pairs = {
            run: (kinds[run]["surrogate"], *(kinds[run][key] for key in ("attack", "loss", "restart"))) for run in white
        }
        signs += _transfer_sign(broken, pairs)
    return signs


def _transfer_sign(broken: Mapping[str, Mask], runs: Mapping[str, tuple[object, ...]]) -> list[Sign]:
    """Compare each surrogate with ``ste`` on the runs that both made, so that none has more tries."""
    made: dict[object, dict[tuple[object, ...], str]] = {}
    for run, (surrogate, *key) in runs.items():
        made.setdefault(surrogate, {})[tuple(key)] = run
    direct = made.pop("ste", {})
    transfers = {}
    for surrogate, others in made.items():
        if set(others) == set(direct):
            transfers[str(surrogate)] = np.logical_or.reduce([broken[run] for run in others.values()])
    if not transfers:
        return []
    return [transfer_beats_direct(np.logical_or.reduce([broken[run] for run in direct.values()]), transfers)]


def _union(broken: Mapping[str, Mask], runs: Sequence[str], n: int) -> Mask:
    union: Mask = np.logical_or.reduce([np.zeros(n, dtype=bool), *(broken[run] for run in runs)])
    return union
