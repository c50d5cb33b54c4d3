"""Worst case against the radius: one evaluation a radius, from the smallest up.

Each level is an evaluation of the whole protocol, the very one that would be made at that radius alone, and at its
end one run more: from the points that came nearest under the radius before, as much further away as the radius has
grown. A sample that falls at one radius counts as broken at every larger one, whose ball holds the same point. So the
curve never rises, and at each radius it is no higher than an evaluation at that radius alone.
"""

from __future__ import annotations

import dataclasses
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from msa_eval.attacks.ball import Ball
from msa_eval.data import Samples
from msa_eval.device import check_device
from msa_eval.engine.continued import Continued, left_points
from msa_eval.engine.evaluate import evaluate
from msa_eval.evidence.metrics import rate
from msa_eval.evidence.results import INCOMPLETE, Results
from msa_eval.files import write_whole
from msa_eval.judging.batch_plan import select
from msa_eval.progress import warn
from msa_eval.protocols.loading import load_protocol, varied
from msa_eval.protocols.schema import Protocol
from msa_eval.quantity import as_number
from msa_eval.targets.loading import named
from msa_eval.verification.reopen import reopen

CURVE, SMALLEST, LEFT = "curve.csv", "smallest_eps.csv", "left.safetensors"
"""In the folder of a curve: accuracy by radius, the smallest radius that broke each sample; in that of a level: the
points that the next one goes on from."""


@dataclasses.dataclass(frozen=True)
class Curve:
    """Worst case against the radius.

    Attributes:
        table: one row per target, context and ``eps``: ``value`` (the share of samples that nothing broke at any radius
            up to this one), ``low``, ``high`` and ``n`` as in ``summary``, ``alone`` (what the runs at this radius left
            by themselves), ``newly_broken`` and the ``verdict`` at this radius. At 0 stands the clean accuracy.
        smallest: one row per target, context and sample: ``index``, ``label`` and ``smallest_eps``, the smallest of the
            radii that broke it; 0 where it is wrong on its clean batch, empty where none did.
        results: of each radius above 0.
    """

    table: pd.DataFrame
    smallest: pd.DataFrame
    results: Mapping[float, Results]


def curve(
    target: object,
    x: Samples | Any,
    y: Any = None,
    *,
    eps: Sequence[float | str],
    protocol: str | Path | Protocol = "msa",
    overrides: Mapping[str, Any] | None = None,
    out: str | Path | None = None,
    **options: Any,
) -> Curve:
    """Evaluate a target at several radii, from the smallest up.

    Args:
        target: as for `evaluate`.
        x: as for `evaluate`.
        y: as for `evaluate`.
        eps: radii, such as ``8/255``; 0 stands for the clean images.
        protocol: as for `evaluate`; its own radius is not used.
        overrides: as for `evaluate`.
        out: a folder that gets the tables and a folder of results a radius; the same call goes on where one stopped.
        options: passed on to `evaluate`.

    Raises:
        ValueError: as from `evaluate`, or when the radii are no different numbers from 0.
    """
    radii = _radii(eps)
    if not isinstance(protocol, Protocol):
        protocol = load_protocol(protocol, overrides=overrides)
    samples = Samples.of(x, y)
    levels = {radius: varied(protocol, {"threat.eps": radius}) for radius in radii if radius > 0}
    for level in levels.values():
        Ball(level.ball.norm, level.ball.eps).check_radius(math.prod(samples.shape))
    samples = samples.decoded(select(samples.y, protocol))
    target = named(target, samples)
    results: dict[float, Results] = {}
    with _folder(out) as folder:
        continued = Continued()
        for radius, level in levels.items():
            place = folder / f"eps-{radius:.6g}"
            continued = dataclasses.replace(continued, out=place / LEFT)
            made = None if options.get("force") else _finished(place, target, samples, level, continued, options)
            if made is None:
                made = evaluate(target, samples, protocol=level, out=place, continued=continued, **options)
            results[radius] = made
            points = left_points(place / LEFT, str(made.run["key"])) or {}
            following = next((other for other in levels if other > radius), radius)
            continued = Continued(points, following / radius)
        table, smallest = tabulate(radii, results)
        if out is not None:
            for name, rows in ((CURVE, table), (SMALLEST, smallest)):
                write_whole(folder / name, rows.to_csv(index=False, lineterminator="\n").encode())
    return Curve(table, smallest, results)


def _radii(eps: Sequence[float | str]) -> list[float]:
    """The radii, from the smallest up.

    >>> _radii(["2/255", 0, "1/255"]) == [0, 1 / 255, 2 / 255]
    True
    """
    radii = sorted(as_number(one) for one in eps)
    if not radii or len(set(radii)) < len(radii) or not 0 <= radii[0] <= radii[-1] < math.inf or radii[-1] == 0:
        raise ValueError(
            f"expected different radii from 0, and one above it, such as 0,1/255,2/255, but got {list(eps)}"
        )
    return radii


@contextmanager
def _folder(out: str | Path | None) -> Iterator[Path]:
    """The folder of a curve, or one that goes when the curve is made."""
    if out is not None:
        yield Path(out)
        return
    with tempfile.TemporaryDirectory(prefix="msa-eval-") as folder:
        yield Path(folder)


def _finished(
    place: Path, target: object, samples: Samples, level: Protocol, continued: Continued, options: Mapping[str, Any]
) -> Results | None:
    """The results of a level that an earlier call finished, if they are those that this call would make.

    Raises:
        ValueError: when there are others, or they were changed.
    """
    if not (place / "run.json").is_file():
        return None
    results = Results.load(place)
    run = results.run
    before = {name: about.get("continued_sha256") for name, about in run["targets"].items()}
    same = run["protocol"]["sha256"] == level.digest() and run["seed"] == options.get("seed", 0)
    if not same or run["verdict"] == INCOMPLETE or left_points(place / LEFT, run["key"]) is None:
        return None  # which the evaluation says, or mends
    if before != {name: continued.digest(name) for name in run["targets"]}:
        return None
    reopen(place, target, samples, fc=options.get("fc"), device=check_device(options.get("device", "auto")))
    options.get("notify", warn)(f"{place} is finished, and taken as it is")
    return results


def tabulate(radii: Sequence[float], results: Mapping[float, Results]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The curve, and the smallest radius that broke each sample, from the results at each radius above 0."""
    keys = ["target", "context", "index"]
    first = next(iter(results.values())).samples
    smallest = first[[*keys, "label"]].assign(smallest_eps=np.where(first["clean_correct"], np.nan, 0.0))
    rows = []
    for radius in radii:
        if radius > 0:
            robust = smallest.merge(results[radius].samples[[*keys, "robust"]], on=keys, how="left")["robust"]
            falls = smallest["smallest_eps"].isna() & ~robust.to_numpy(bool)
            smallest["smallest_eps"] = smallest["smallest_eps"].where(~falls, radius)
        for (target, context), part in smallest.groupby(["target", "context"], sort=False):
            right = int((part["smallest_eps"].isna() | (part["smallest_eps"] > radius)).sum())
            newly = int((part["smallest_eps"] == radius).sum()) if radius > 0 else 0
            alone, verdict = _level(results.get(radius), str(target), str(context), right / len(part))
            share = rate(right, len(part))
            rows.append((target, context, radius, *share, alone, newly, verdict))
    columns = ["target", "context", "eps", "value", "low", "high", "n", "alone", "newly_broken", "verdict"]
    table = pd.DataFrame(rows, columns=columns).sort_values(["target", "context", "eps"], ignore_index=True)
    return table, smallest.reset_index(drop=True)


def _level(results: Results | None, target: str, context: str, clean: float) -> tuple[float, str]:
    """The worst case of an evaluation, and its verdict on the target; of the clean images, their accuracy."""
    if results is None:
        return clean, ""
    rows = results.summary
    (row,) = rows[(rows["target"] == target) & (rows["context"] == context) & (rows["metric"] == "worst_case")].to_dict(
        orient="records"
    )
    return float(row["value"]), str(row.get("verdict", results.run["verdict"]))
