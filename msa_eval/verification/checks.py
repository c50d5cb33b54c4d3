"""The checks of a verification: each says what it found, or raises."""

from __future__ import annotations

import hashlib
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from msa_eval.data import Samples
from msa_eval.defense.contract import Defense
from msa_eval.evidence.archive import Archive
from msa_eval.evidence.folder import ARCHIVE, CROSSCHECK, GALLERY, TABLES
from msa_eval.evidence.provenance import defense_hash
from msa_eval.evidence.results import load_run, load_table, run_digest
from msa_eval.hashing import bytes_of, file_hash
from msa_eval.judging.batch_plan import batch_of, plan_batches, select
from msa_eval.judging.replay import Replay
from msa_eval.protocols.loading import make_protocol
from msa_eval.protocols.schema import Protocol
from msa_eval.verification.recompute import Tables, recount
from msa_eval.verification.referee import NEAR, NEAR_TIE, Referee


class NotCheckedError(Exception):
    """A check that can't be made; says why."""


def first_of(faults: Sequence[str]) -> str:
    """The first three faults, and how many more there are."""
    more = f"; and {len(faults) - 3} more" if len(faults) > 3 else ""
    return "; ".join(faults[:3]) + more


def none_of(faults: Sequence[str]) -> None:
    """Raise a `ValueError` with the first of the faults, if there are any."""
    if faults:
        raise ValueError(first_of(faults))


def check_hashes(folder: Path, run: Mapping[str, Any]) -> tuple[str, None]:
    """Hold every table, the gallery, and run.json itself, against the hashes recorded.

    A gallery proves nothing, so one that was left out is no fault.
    """
    if "files" not in run and "sha256" not in run:
        raise NotCheckedError("run.json carries no hashes: it is from before they were recorded, or they were removed")
    faults = []
    if run.get("sha256") != run_digest(run):
        faults.append("run.json was tampered with: it does not match its own hash")
    recorded = run.get("files")
    files = recorded if isinstance(recorded, dict) else {}
    paths = [*(path for path in folder.glob("*.csv") if path.name != CROSSCHECK), *folder.glob(GALLERY)]
    held = {path.name: file_hash(path) for path in paths}
    left_out = {GALLERY} & set(files) - set(held)
    due = {*held, *files, *(f"{name}.csv" for name in TABLES)} - left_out
    for name in sorted(due):
        if name not in held or files.get(name) != held[name]:
            faults.append(f"{name} was tampered with: it does not match the hash in run.json")
    none_of(faults)
    missing = f"; {GALLERY} is missing and was not checked" if left_out else ""
    return f"{len(due)} files and run.json match the hashes recorded{missing}", None


def read_run(folder: Path) -> tuple[str, Mapping[str, Any]]:
    """Read ``run.json``."""
    run = load_run(folder)
    return f"readable, of schema version {run['schema_version']}", run


def read_tables(folder: Path) -> tuple[str, Tables]:
    """Read the tables and hold their columns against what is known of them."""
    tables = {}
    for name in TABLES:
        try:
            tables[name] = load_table(folder / f"{name}.csv", name)
        except OSError as error:
            raise ValueError(f"{name}.csv is not readable: {error}") from error
        if tables[name].empty:
            raise ValueError(f"{name}.csv has no rows")
    return f"{len(tables['samples'])} samples, {len(tables['outcomes'])} outcomes", Tables(**tables)


def read_protocol(run: Mapping[str, Any]) -> tuple[str, Protocol]:
    """Read the protocol in ``run.json`` and compare it with its hash."""
    try:
        protocol = make_protocol(tomllib.loads(run["protocol"]["text"]), source="the protocol in run.json")
    except RecursionError as error:
        raise ValueError("the protocol in run.json is not readable") from error
    if protocol.digest() != run["protocol"]["sha256"]:
        raise ValueError("the protocol's text in run.json was tampered with: it does not match the protocol's hash")
    changed = dict(run["protocol"]["overrides"])
    if run["protocol"]["modified"] != bool(changed) or any(
        protocol.values.get(key) != value for key, value in changed.items()
    ):
        raise ValueError("the overrides in run.json are not those of the protocol's text")
    return f"{protocol.name} v{protocol.version}, as hashed", protocol


def check_weights(run: Mapping[str, Any], targets: Mapping[str, Defense]) -> tuple[str, bool]:
    """Hold the targets and their weights against those that the results are of."""
    if set(run["targets"]) != set(targets):
        raise ValueError(
            f"the results contain {' and '.join(sorted(run['targets']))}, "
            f"but the model provides {' and '.join(sorted(targets))}"
        )
    for name, about in run["targets"].items():
        expected = about["sha256"]
        found = defense_hash(targets[name])
        if found != expected:
            raise ValueError(
                f"the {name} has other weights ({found[:12]}) than the one the results are of ({expected[:12]})"
            )
    return f"of {' and '.join(run['targets'])}, as hashed", True


def check_data(run: Mapping[str, Any], samples: Samples) -> tuple[str, bool]:
    """Hold the data set against the one that the results are about."""
    found = samples.digest()
    if found != run["data"]["sha256"]:
        raise ValueError(
            f"{samples.name} ({found[:12]}) is not the data the results are about ({run['data']['sha256'][:12]})"
        )
    return f"{len(samples)} images and labels, as hashed", True


def check_numbers(tables: Tables, protocol: Protocol, run: Mapping[str, Any]) -> tuple[str, None]:
    """Count the tables again."""
    none_of(recount(tables, targets=list(run["targets"]), contexts=protocol.contexts, eps=protocol.ball.eps))
    if bool(tables.attacks["final"].isna().any()) and run.get("verdict") != "incomplete":
        raise ValueError("attacks.csv holds runs that failed, but run.json does not call the results incomplete")
    return "summary.csv, attacks.csv and samples.csv follow from outcomes.csv, and the order of the numbers holds", None


def planned(protocol: Protocol, samples: Samples) -> tuple[Tensor, list[Tensor]]:
    """The samples that a protocol evaluates, and the places in these of every batch."""
    chosen = select(samples.y, protocol)
    plan = plan_batches(len(chosen), size=protocol.batch_size, seed=protocol.batches_seed)
    if protocol.apgd is not None and protocol.apgd.victim is not None:
        chosen, plan = batch_of(protocol.apgd.victim, chosen, plan)
    return chosen, plan


def check_batches(
    tables: Tables, protocol: Protocol, run: Mapping[str, Any], samples: Samples
) -> tuple[str, list[Tensor]]:
    """Make the plan again; hand on indices into the data set, a tensor a batch."""
    chosen, plan = planned(protocol, samples)
    batch_plan = [chosen[places] for places in plan]
    expected = [
        (number, at, index) for number, indices in enumerate(batch_plan) for at, index in enumerate(indices.tolist())
    ]
    found = tables.batches[["batch", "position", "index"]].to_numpy().tolist()
    if [tuple(row) for row in found] != expected:
        raise ValueError("batches.csv is not the plan that the protocol makes")
    digest = hashlib.sha256(b"".join(bytes_of(indices) + b"|" for indices in batch_plan)).hexdigest()
    if digest != run["batches"]["sha256"] or run["data"]["n"] != len(chosen):
        raise ValueError("run.json states another batch plan than the protocol makes")
    batches = "1 batch" if len(batch_plan) == 1 else f"{len(batch_plan)} batches"
    return f"{len(chosen)} samples in {batches}, as the protocol plans them", batch_plan


def check_samples(tables: Tables, batch_plan: Sequence[Tensor], samples: Samples) -> tuple[str, None]:
    """Hold every row of samples.csv against the data and the plan."""
    seated = {
        int(index): (int(samples.y[index]), number, at)
        for number, indices in enumerate(batch_plan)
        for at, index in enumerate(indices.tolist())
    }
    faults = []
    for (target, context), rows in tables.samples.groupby(["target", "context"]):
        index = rows["index"].tolist()
        if index != sorted(seated):
            faults.append(f"samples.csv ({target}, {context}) is not about the samples of the plan, in their order")
            continue
        held = zip(index, rows[["label", "batch", "position"]].to_numpy().tolist(), strict=True)
        faults += [
            f"samples.csv: sample {i} ({target}, {context}) has label, batch and position {tuple(row)}, not {seated[i]}"
            for i, row in held
            if tuple(row) != seated[i]
        ]
    none_of(faults)
    return "labels and places are those of the data and the plan", None


def check_clean(tables: Tables, replays: Mapping[str, Replay]) -> tuple[str, None]:
    """Make the clean predictions again."""
    faults = []
    count = 0
    at_random: set[str] = set()
    for (target, context), rows in tables.samples.groupby(["target", "context"]):
        if target not in replays:
            continue
        if replays[str(target)].draws > 1:
            at_random.add(str(target))
            continue
        stated = dict(zip(rows["index"].tolist(), rows["clean_prediction"].tolist(), strict=True))
        for index, found, close in _clean_predictions(replays[str(target)], str(context)):
            count += 1
            if stated.get(index) != found:
                reason = NEAR if close else f"but is {found} here"
                faults.append(f"sample {index} ({target}, {context}): clean_prediction {stated.get(index)}, {reason}")
    none_of(faults)
    chance = "".join(f"; {target} answers at random, so its own were not compared" for target in sorted(at_random))
    return f"{count} clean predictions made again{chance}", None


def _clean_predictions(replay: Replay, context: str) -> Iterator[tuple[int, int, bool]]:
    """Each sample's index, its prediction, and whether that hangs on rounding."""
    for number, indices in enumerate(replay.batches):
        logits = replay.clean_logits(number, context)
        found = logits.argmax(dim=1)
        top = logits.topk(2, dim=1).values
        close = top[:, 0] - top[:, 1] < NEAR_TIE * logits.abs().amax(dim=1)
        yield from zip(indices.tolist(), found.tolist(), close.tolist(), strict=True)


def open_archive(folder: Path, run: Mapping[str, Any], referee: Referee) -> tuple[str, Archive]:
    """Open the archive, if it is the one that ``run.json`` names."""
    path = folder / ARCHIVE
    if run.get("adversarial") is None:
        raise ValueError(f"run.json does not list {ARCHIVE}: it is not of this run, or its entry was removed")
    if run["adversarial"].get("file") != ARCHIVE or not path.is_file():
        raise ValueError(f"{ARCHIVE}, which run.json names, is not there")
    if file_hash(path) != run["adversarial"].get("sha256"):
        raise ValueError(f"{ARCHIVE} was tampered with: it does not match the hash in run.json")
    archive = Archive(path, referee.images, referee.protocol.ball)
    return f"{len(archive)} proofs in {path.stat().st_size} bytes, as hashed", archive
