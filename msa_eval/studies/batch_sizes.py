"""Batch-size dependence: one evaluation for each batch size."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from msa_eval.data import Samples
from msa_eval.engine.evaluate import evaluate
from msa_eval.evidence.results import WITHOUT_AUDIT, Results
from msa_eval.judging.batch_plan import select
from msa_eval.progress import warn
from msa_eval.protocols.loading import load_protocol, varied
from msa_eval.protocols.schema import Protocol
from msa_eval.targets.loading import named

SIZES = (1, 8, 64, 256)


@dataclasses.dataclass(frozen=True)
class SizeReport:
    """How accuracy depends on the batch size.

    Attributes:
        table: one row per size, context and number: ``batch_size``, then the columns of ``summary``.
        results: of each size.
    """

    table: pd.DataFrame
    results: Mapping[int, Results]


def batch_size_report(
    target: object,
    x: Samples | Any,
    y: Any = None,
    *,
    protocol: str | Path | Protocol = "quick",
    sizes: Sequence[int] = SIZES,
    overrides: Mapping[str, Any] | None = None,
    out: str | Path | None = None,
    **options: Any,
) -> SizeReport:
    """Evaluate a defence in batches of several sizes, on the same samples.

    The plain classifier it was built on is left out: batches mean nothing to it.

    Args:
        target: as for `evaluate`.
        x: as for `evaluate`.
        y: as for `evaluate`.
        protocol: as for `evaluate`.
        sizes: the largest batch of each evaluation; those that are larger than there are samples are left out, with a
            note.
        overrides: as for `evaluate`.
        out: a folder that gets ``batch_sizes.csv`` and a folder of results a size.
        options: passed on to `evaluate`.

    Raises:
        ValueError: as from `evaluate`, or when a size is larger than there are samples.
    """
    if not sizes or len(set(sizes)) < len(sizes) or min(sizes) < 1:
        raise ValueError(f"expected different batch sizes of at least 1, but got {list(sizes)}")
    if not isinstance(protocol, Protocol):
        protocol = load_protocol(protocol, overrides=overrides)
    samples = Samples.of(x, y)
    chosen = select(samples.y, protocol)
    n = len(chosen)
    left = [size for size in sizes if size > n]
    if len(left) == len(sizes):
        raise ValueError(f"a batch of {min(sizes)} needs as many samples, but there are {n}; give more, or other sizes")
    if left:
        sizes = [size for size in sizes if size <= n]
        printable = ", ".join(map(str, left))
        options.get("notify", warn)(f"there are {n} samples, so that batches of {printable} are left out")
    samples = samples.decoded(chosen)
    target = named(target, samples)
    results: dict[int, Results] = {}
    for size in sizes:
        sized = varied(protocol, {"batches.size": size})
        folder = None if out is None else Path(out) / f"batch-{size}"
        results[size] = evaluate(target, samples, protocol=sized, fc=False, out=folder, **options)
    table = pd.concat(
        [result.summary.assign(batch_size=size) for size, result in results.items()], ignore_index=True
    ).fillna(WITHOUT_AUDIT)  # fmt: skip
    table.insert(0, "batch_size", table.pop("batch_size"))
    if out is not None:
        table.to_csv(Path(out) / "batch_sizes.csv", index=False, lineterminator="\n")
    return SizeReport(table, results)
