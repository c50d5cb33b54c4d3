"""An entry for RobustBench's leaderboard, made from evidence alone."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from typing import Any

from msa_eval.evidence.results import Results
from msa_eval.report.text import in_batches

FIELDS = (
    "link", "name", "authors", "additional_data", "number_forward_passes", "dataset", "venue", "architecture", "eps",
    "clean_acc", "reported", "external", "footnote", "unreliable",
)  # fmt: skip
"""In RobustBench's order. ``autoattack_acc`` is left out, because AutoAttack was not run; ``external`` is where
RobustBench keeps the best known evaluation by others, and what it ranks by where it is there."""

_OURS = ("eps", "clean_acc", "external", "unreliable")
_DATASETS = ("cifar100", "cifar10", "imagenet")


def robustbench_entry(
    results: Results, *, target: str = "defense", context: str | None = None, about: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The content of a ``model_info/DATASET/NORM/NAME.json`` of RobustBench.

    ``external`` is the worst case, in percent; the footnote says how it was found and on how many samples.

    Args:
        results: of an evaluation.
        target: whose: ``defense`` or ``fc``.
        context: which; the first one by default.
        about: the fields that only the author knows, such as ``name``, ``authors`` or ``link``.

    Raises:
        ValueError: when there is no such target or context, a field is none of RobustBench's or is measured, or the
            model had random weights.
    """
    run, about = results.run, dict(about or {})
    if run.get("target", {}).get("random_weights"):
        raise ValueError("these results are of random weights, so they can't become an entry")
    if unknown := sorted(set(about) - set(FIELDS)):
        raise ValueError(f"RobustBench has no field {unknown[0]!r}; it has {', '.join(FIELDS)}")
    if measured := sorted(set(about) & set(_OURS)):
        raise ValueError(f"{measured[0]} is measured; it can't be set")
    context = context or str(results.summary["context"].iloc[0])
    chosen = results.summary[(results.summary["target"] == target) & (results.summary["context"] == context)]
    if not len(chosen):
        held = sorted({f"{row['target']}/{row['context']}" for row in results.summary.to_dict(orient="records")})
        raise ValueError(f"there is no {target}/{context} in these results; there is {', '.join(held)}")
    numbers = {row["metric"]: row for row in chosen.to_dict(orient="records")}
    worst, protocol = numbers["worst_case"], run["protocol"]
    values = tomllib.loads(protocol["text"])
    verdict = run.get("verdicts", {}).get(target, {}).get("verdict", run["verdict"])
    changed = ", modified" if protocol["modified"] else ""
    footnote = (
        f"Evaluated with msa-eval {run.get('msa_eval', '')}, protocol {protocol['name']} v{protocol['version']}"
        f"{changed} ({values['threat']['norm']}, context {context}): worst case over all verified adversarial batches "
        f"of {worst['n']} samples {in_batches(run)}, 95 % interval "
        f"[{_percent(worst['low'])}, {_percent(worst['high'])}]; lowest accuracy of a single run "
        f"{_percent(numbers['paper']['value'])}; verdict: {verdict}."
    )
    word = f"{run['data']['name']} {run.get('target', {}).get('word', '')}"
    entry: dict[str, Any] = dict.fromkeys(FIELDS)
    entry |= {
        "number_forward_passes": 1,
        "dataset": next((name for name in _DATASETS if name in word), None),
    }
    entry |= about
    entry |= {
        "eps": str(values["threat"]["eps"]),
        "clean_acc": _percent(numbers["clean"]["value"]),
        "external": _percent(worst["value"]),
        "footnote": " ".join(part for part in (about.get("footnote"), footnote) if part),
        "unreliable": verdict in ("unreliable", "incomplete"),
    }
    return entry


def _percent(share: float) -> str:
    return f"{100 * share:.2f}"
