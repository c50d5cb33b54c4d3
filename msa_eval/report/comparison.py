"""Several evaluations of the same samples side by side, pair by pair."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.stats import binomtest

from msa_eval.evidence.metrics import METRICS, Z_95
from msa_eval.evidence.results import Results
from msa_eval.report import frames
from msa_eval.report.plots.axes import percent
from msa_eval.report.style import NAMES

KEYS = ("target", "context", "metric", "index")
"""What a row of `Comparison.right` is about; no evaluation can have such a name."""

Mask = npt.NDArray[np.bool_]


class Paired(NamedTuple):
    """The difference between two shares of the same samples.

    Attributes:
        difference: second less first, in [-1, 1]; NaN where there are no samples.
        low: the 95 % interval's lower end.
        high: its upper end.
        lost: samples right in the first only.
        gained: samples right in the second only.
        p: of McNemar's exact test, two-sided, that the two are equally likely.
    """

    difference: float
    low: float
    high: float
    lost: int
    gained: int
    p: float


def paired(first: Mask, second: Mask) -> Paired:
    """Compare two outcomes of the same samples.

    The interval is Bonett & Price's (2012), a Wald interval with one sample added to either kind of change; the test is
    McNemar's (1947), exact: of the samples that changed, the gained are binomial with odds of one half.

    Args:
        first: right or not ``(n,)``.
        second: the same of the other evaluation, for the same samples.

    >>> found = paired(np.array([1, 1, 1, 1, 1, 1, 0, 0], dtype=bool), np.array([0] * 6 + [0, 1], dtype=bool))
    >>> found.difference, found.lost, found.gained, found.p
    (-0.625, 6, 1, 0.125)
    """
    n, lost, gained = len(first), int((first & ~second).sum()), int((~first & second).sum())
    if not n:
        return Paired(math.nan, math.nan, math.nan, 0, 0, math.nan)
    down, up = (lost + 1) / (n + 2), (gained + 1) / (n + 2)
    centre, spread = up - down, Z_95 * math.sqrt((up + down - (up - down) ** 2) / (n + 2))
    p = float(binomtest(gained, lost + gained).pvalue) if lost + gained else 1.0
    return Paired((gained - lost) / n, max(centre - spread, -1.0), min(centre + spread, 1.0), lost, gained, p)


@dataclass(frozen=True)
class Comparison:
    """Evaluations of the same samples.

    Attributes:
        results: by name; the first is what the others are compared with.
        table: one row per name, target, context and metric: ``value``, ``low``, ``high``, ``n``, and for all but the
            first name the fields of `Paired` (the interval's ends as ``difference_low`` and ``difference_high``).
        right: one row per sample, target, context and metric, one column per name: whether it counts as right; missing
            where the evidence does not say.
        notes: in what the evaluations differ, in sentences.
    """

    results: Mapping[str, Results]
    table: pd.DataFrame
    right: pd.DataFrame
    notes: Sequence[str]


def name_all(folders: Sequence[str | Path]) -> dict[str, Path]:
    """Name several results by their folders; by more of the path where names are alike or one of `KEYS`.

    Raises:
        ValueError: when a folder is given twice.
    """
    paths = [Path(folder) for folder in folders]
    for parts in range(1, max(len(path.resolve().parts) for path in paths) + 1):
        names = ["/".join(path.resolve().parts[-parts:]) for path in paths]
        if len(set(names)) == len(names) and not set(names) & set(KEYS):
            return dict(zip(names, paths, strict=True))
    raise ValueError("the same folder is given twice; give each results folder once")


def load_all(folders: Sequence[str | Path]) -> dict[str, Results]:
    """Read several results, named as by `name_all`; tables may be missing, see `Results.load`."""
    return {name: Results.load(path, trimmed=True) for name, path in name_all(folders).items()}


def compare(results: Mapping[str, Results]) -> Comparison:
    """Hold evaluations against the first of them, sample by sample.

    Args:
        results: two or more, by name.

    Raises:
        ValueError: when there are less than two, one has a name of `KEYS`, or they are not of the same samples.
    """
    if len(results) < 2:
        raise ValueError("a comparison needs at least two results folders")
    if reserved := [name for name in results if name in KEYS]:
        raise ValueError(f"no evaluation can be called {reserved[0]!r} in a comparison; give it another name")
    base, *others = results
    for name in others:
        _check_same(base, results[base], name, results[name])
    shared = [context for context in frames.contexts_of(results[base])
              if all(context in frames.contexts_of(one) for one in results.values())]  # fmt: skip
    if not shared:
        raise ValueError("the results have no context in common; evaluate them in the same one")
    targets = [target for target in frames.targets_of(results[base])
               if all(target in frames.targets_of(one) for one in results.values())]  # fmt: skip
    rows, masks = [], []
    for target in reversed(targets):
        for context in shared:
            for metric in METRICS:
                right = pd.DataFrame({name: _right(one, target, context, metric) for name, one in results.items()})
                masks.append(right.assign(target=target, context=context, metric=metric).reset_index())
                rows += [_row(results[name], name, base, target, context, metric, right) for name in results]
    right = pd.concat(masks, ignore_index=True)[[*KEYS, *results]]
    notes = [*_left_out(results, shared, targets), *_unpaired(results, shared), *_notes(results)]
    return Comparison(results, pd.DataFrame(rows), right, notes)


def _row(
    results: Results, name: str, base: str, target: str, context: str, metric: str, right: pd.DataFrame
) -> dict[str, object]:
    number = frames.number(results, target, context, metric)
    row: dict[str, object] = {"target": target, "context": context, "metric": metric, "name": name}
    row |= {key: number[key] for key in ("value", "low", "high", "n")}
    if name == base:
        return row
    if right[[base, name]].isna().any(axis=None):
        return row
    found = paired(*(right[one].to_numpy(bool) for one in (base, name)))
    return row | {
        "difference": found.difference, "difference_low": found.low, "difference_high": found.high,
        "lost": found.lost, "gained": found.gained, "p": found.p,
    }  # fmt: skip


def _right(results: Results, target: str, context: str, metric: str) -> pd.Series:
    """Which samples count as right, by their index in the data set, ascending."""
    samples = frames.pick(results.samples, target, context).sort_values("index")
    definition = METRICS[metric]
    if definition.needs_outcomes and frames.lacking(results, context, "attacks", "outcomes"):
        return pd.Series(pd.NA, index=samples["index"], dtype="boolean")
    outcomes = frames.pick(results.outcomes, target, context)
    return pd.Series(definition.right_rows(samples, outcomes), index=samples["index"])


def _check_same(base: str, first: Results, name: str, second: Results) -> None:
    """Both are of the same samples of the same data.

    Raises:
        ValueError: when they are not.
    """
    if first.run["data"]["sha256"] != second.run["data"]["sha256"]:
        raise ValueError(
            f"{base} and {name} are of different data ({first.run['data']['name']} and {second.run['data']['name']}, "
            "by their hashes), so their samples can't be paired; evaluate both on the same data"
        )
    mine, theirs = (one.batches.set_index("index").index for one in (first, second))
    if set(mine) != set(theirs):
        raise ValueError(
            f"{base} has {len(mine)} samples and {name} has {len(theirs)}, {len(mine.intersection(theirs))} of them "
            "the same, so they can't be paired; evaluate both with the same samples.limit, fraction and seed"
        )


def _left_out(results: Mapping[str, Results], contexts: Sequence[str], targets: Sequence[str]) -> list[str]:
    """Which contexts and targets some evaluations have and others don't, in sentences."""
    lacking = []
    for name, one in results.items():
        found = [f"context {context}" for context in frames.contexts_of(one) if context not in contexts]
        found += [NAMES[target] for target in frames.targets_of(one) if target not in targets]
        if found:
            lacking.append(f"{', '.join(found)} of {name}")
    return [f"Not all have them, so these are left out: {'; '.join(lacking)}."] if lacking else []


def _unpaired(results: Mapping[str, Results], contexts: Sequence[str]) -> list[str]:
    """Whose evidence does not say which samples the paper's number counts as right, in sentences."""
    whose: dict[str, list[str]] = {}
    for name, one in results.items():
        reasons = (frames.lacking(one, context, "attacks", "outcomes") for context in contexts)
        whose.setdefault(next(filter(None, reasons), ""), []).append(name)
    return [f"The paper's number of {' and '.join(held)} is not paired: {why}." for why, held in whose.items() if why]


def only_one(comparison: Comparison, target: str, context: str) -> pd.DataFrame:
    """The samples that one evaluation alone broke: right on its clean batch, broken there, robust in all others.

    Returns:
        ``results`` (a name), ``index`` and ``label``.
    """
    rows: list[tuple[str, int, object]] = []
    tables = {
        name: frames.pick(one.samples, target, context).set_index("index").sort_index()
        for name, one in comparison.results.items()
    }
    robust = pd.DataFrame({name: table["robust"] for name, table in tables.items()})
    for name, table in tables.items():
        alone = table["clean_correct"] & ~table["robust"] & robust.drop(columns=name).all(axis=1)
        rows += [
            (name, int(index), label) for index, label in zip(table.index[alone], table["label"][alone], strict=True)
        ]
    return pd.DataFrame(rows, columns=["results", "index", "label"])


def _notes(results: Mapping[str, Results]) -> list[str]:
    runs = [one.run for one in results.values()]
    notes = []
    if len({run["protocol"]["sha256"] for run in runs}) > 1:
        notes.append("The protocols differ: a difference may be the attack's and not the defence's.")
    threats = [tomllib.loads(run["protocol"]["text"]).get("threat", {}) for run in runs]
    balls = list(dict.fromkeys(f"{threat.get('norm')} of radius {threat.get('eps')}" for threat in threats))
    if len(balls) > 1:
        notes.append(f"The perturbation sets differ: {', '.join(balls)}.")
    if len({run["targets"]["defense"]["sha256"] for run in runs}) > 1:
        notes.append("The defences differ (their weights have different hashes).")
    if all("fc" in run["targets"] for run in runs) and len({run["targets"]["fc"]["sha256"] for run in runs}) > 1:
        notes.append("The FC heads differ (their weights have different hashes).")
    if len({run["batches"]["sha256"] for run in runs}) > 1:
        notes.append("The batch plans differ, so the same sample has other companions.")
    if len({run["seed"] for run in runs}) > 1:
        notes.append("The seeds of the attacks differ.")
    if len(runs) > 2:
        notes.append("The p-values are not corrected for multiple comparisons.")
    return notes


def render_comparison(comparison: Comparison) -> str:
    """The comparison as text: values in %, and differences to the first results in points."""
    base = next(iter(comparison.results))
    parts = []
    for (target, context), rows in comparison.table.groupby(["target", "context"], sort=False):
        lines = {}
        for row in rows.to_dict(orient="records"):
            value = f"{percent(row['value'])} [{percent(row['low'])}, {percent(row['high'])}]"
            other = row["name"] != base and not math.isnan(row["difference"])
            lines[row["metric"], row["name"]] = {
                "accuracy": value,
                "difference": f"{points(row['difference'])} "
                f"[{points(row['difference_low'])}, {points(row['difference_high'])}]" if other else "",
                "lost": f"{row['lost']:.0f}" if other else "",
                "gained": f"{row['gained']:.0f}" if other else "",
                "p": told_p(row["p"]) if other else "",
            }  # fmt: skip
        frame = pd.DataFrame.from_dict(lines, orient="index")
        frame.index = pd.MultiIndex.from_tuples(list(lines))
        parts.append(f"{NAMES[str(target)]}, {context}\n{frame.to_string()}")
    heading = (
        f"accuracy in %; differences to {base} in points, paired by sample, with 95 % intervals; samples lost and "
        "gained, and McNemar's exact p"
    )
    return "\n\n".join([heading, *parts, *(["\n".join(comparison.notes)] if comparison.notes else [])])


def points(difference: float) -> str:
    """A difference of shares in percentage points, with its sign.

    >>> points(0.031), points(-0.0002), points(float("nan"))
    ('+3.1', '0.0', 'undefined')
    """
    if math.isnan(difference):
        return "undefined"
    rounded = round(100 * difference, 1)
    return f"{rounded:+.1f}" if rounded else "0.0"


def told_p(p: float) -> str:
    """A p-value in as many digits as it deserves.

    >>> told_p(0.1234), told_p(0.00421), told_p(3e-9)
    ('0.12', '0.0042', '< 0.0001')
    """
    if math.isnan(p):
        return "undefined"
    return "< 0.0001" if p < 0.0001 else f"{p:.2g}"
