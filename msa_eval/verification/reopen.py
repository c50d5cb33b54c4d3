"""Results beside their target and their data again, for more to be done with them."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from torch import Tensor

from msa_eval.data import Samples
from msa_eval.defense.contract import Defense
from msa_eval.protocols.schema import Protocol
from msa_eval.targets.loading import resolve
from msa_eval.targets.pair import make_targets
from msa_eval.verification.checks import (
    NotCheckedError,
    check_batches,
    check_data,
    check_hashes,
    check_samples,
    check_weights,
    planned,
    read_protocol,
    read_run,
    read_tables,
)


@dataclass(frozen=True)
class Reopened:
    """Results beside what they are about.

    Attributes:
        protocol: that they were made under.
        samples: their rows of samples.csv.
        batch_plan: the plan: indices into the data set, a tensor a batch.
        targets: by name, on the device.
        data: the whole data set, with what was evaluated decoded.
    """

    protocol: Protocol
    samples: pd.DataFrame
    batch_plan: Sequence[Tensor]
    targets: Mapping[str, Defense]
    data: Samples


def reopen(folder: str | Path, target: object, samples: Samples, *, fc: object = None, device: str = "cpu") -> Reopened:
    """Put results beside their target and their data again, for more to be done with them.

    Args:
        folder: the results.
        target: the defence, as for `msa_eval.evaluate`.
        samples: the whole data set that was evaluated.
        fc: the plain classifier, if it was given to `msa_eval.evaluate`; only those that the results are of are kept.
        device: where to compute; modules are moved there.

    Raises:
        ValueError: when there are no results, they were changed, or are of another target, data set or plan.
    """
    folder = Path(folder)
    if not (folder / "run.json").is_file():
        raise ValueError(f"{folder} holds no complete results: there is no run.json")
    _, run = read_run(folder)
    with contextlib.suppress(NotCheckedError):
        check_hashes(folder, run)
    _, tables = read_tables(folder)
    _, protocol = read_protocol(run)
    made = make_targets(resolve(target, samples)[0], fc, samples, device, only=run["targets"])
    targets = {name: one for name, one in made.items() if name in run["targets"]}
    check_weights(run, targets)
    chosen = planned(protocol, samples)[0]
    samples = samples.decoded(chosen).leveled(protocol.ball.levels, chosen)
    check_data(run, samples)
    _, batch_plan = check_batches(tables, protocol, run, samples)
    check_samples(tables, batch_plan, samples)
    return Reopened(protocol, tables.samples, batch_plan, targets, samples)
