"""Evidence: the per-sample record as tables, and on disk."""

from __future__ import annotations

import hashlib
import itertools
import json
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from msa_eval.files import write_all
from msa_eval.protocols import fields, metrics
from msa_eval.protocols.differences import differences
from msa_eval.protocols.spec import CONTEXTS
from msa_eval.untrusted import check_inside, told

SCHEMA_VERSION = 1
TARGETS = ("defense", "fc")
METRICS = ("clean", "paper", "realised", "worst_case")
TABLES = ("summary", "attacks", "samples", "outcomes", "batches")
TRIMMED = ("attacks", "outcomes", "batches")
"""Tables without which results can still be shown, in part."""

INCOMPLETE = "incomplete"
"""The verdict where something failed, so that what was not broken is not known to be robust."""
WITHOUT_AUDIT = {"verdict": "not audited", "reasons": ""}
"""What stands in a table for results without an audit, beside others that have a verdict."""

ARCHIVE = "adversarial.safetensors"
"""The adversarial batches beside the tables, where they are kept; ``run.json`` names it under ``adversarial``."""
NEW_ARCHIVE = f"new-{ARCHIVE}"
"""The same while the tables are not written yet, so that earlier results stay whole."""

GALLERY = "gallery.safetensors"
"""Pictures of a few broken samples (see `msa_eval.evidence.gallery`), where these are kept."""
PAGE = "report.html"
"""The page made from all this; not evidence, so it has no hash, and other results take it away."""
CROSSCHECK = "crosscheck.csv"
"""What attacks of others broke of it (see `msa_eval.protocols.crosscheck`); made later, so it has no hash either."""
FIGURES = "figures"
"""A folder of figures made from all this; no evidence either, and left to who made it."""
UNFINISHED, LOCK = "unfinished", ".lock"
"""What an evaluation keeps there while it is under way (see `msa_eval.protocols.units`)."""
OURS = ("run.json", *(f"{name}.csv" for name in (*TABLES, "audit")), ARCHIVE, GALLERY, PAGE, FIGURES, UNFINISHED)
"""All that an evaluation or what is made from one leaves in its folder."""


@dataclass(frozen=True)
class RunRecord:
    """One run over all samples; arrays are ``(N,)`` in the order of `TargetRecord.index`.

    The fields are those of `msa_eval.judging.trial.Outcome`, joined over batches. Where it failed, nothing is broken,
    and margin and perturbation are NaN. ``notes`` are its faults in words; ``None`` for our own attacks.
    """

    name: str
    surrogate: str
    attack: str
    loss: str
    restart: int
    surrogate_fooled: npt.NDArray[np.bool_]
    final_broken: npt.NDArray[np.bool_]
    any_broken: npt.NDArray[np.bool_]
    first_iterate: npt.NDArray[np.int64]
    min_margin: npt.NDArray[np.float32]
    perturbation: npt.NDArray[np.float32]
    forwards: int
    backwards: int
    decisions: int
    seconds: float
    notes: tuple[str, ...] | None = None

    @property
    def whole(self) -> bool:
        """Whether it failed on no batch, so that its shares mean something."""
        return not bool(np.isnan(self.min_margin).any())


@dataclass(frozen=True)
class TargetRecord:
    """One target in one context; arrays are ``(N,)``.

    Attributes:
        target: ``defense`` or ``fc``.
        context: what the attacker controls.
        index: places in the data set, ascending.
        label: of each sample.
        batch: the batch each sits in.
        position: its place there.
        clean_prediction: the target's answer on the clean batch.
        clean_margin: its logit lead there.
        committed: in ``joint``, right on the one adversarial batch that leaves the fewest of its batch right.
        runs: in the order they were made.
        taken_back: how many samples of a stochastic target were called broken, but no break was upheld.
    """

    target: str
    context: str
    index: npt.NDArray[np.int64]
    label: npt.NDArray[np.int64]
    batch: npt.NDArray[np.int64]
    position: npt.NDArray[np.int64]
    clean_prediction: npt.NDArray[np.int64]
    clean_margin: npt.NDArray[np.float32]
    committed: npt.NDArray[np.bool_]
    runs: Sequence[RunRecord]
    taken_back: int = 0

    @property
    def realised(self) -> npt.NDArray[np.bool_]:
        """Right on the one adversarial batch that the attacker commits to.

        Where image i alone is the attacker's, each sample has an adversarial batch of its own, and the attacker
        commits to the one that breaks it.
        """
        if self.context == "joint":
            return self.committed
        never: npt.NDArray[np.bool_] = self.correct & ~np.stack([run.any_broken for run in self.runs]).any(axis=0)
        return never

    @property
    def correct(self) -> npt.NDArray[np.bool_]:
        """Right on the clean batch."""
        correct: npt.NDArray[np.bool_] = self.clean_prediction == self.label
        return correct


@dataclass(frozen=True)
class Results:
    """What an evaluation found, as pandas tables (their columns are described in the README).

    Attributes:
        summary: a row a target, context and number.
        attacks: a row a run.
        samples: a row a sample, target and context.
        outcomes: a row a sample and run.
        batches: a row a sample's place.
        run: protocol, seed, hashes, versions and all else that says how the tables were made.
        audit: a row a target and sign, where the results were audited.
    """

    summary: pd.DataFrame
    attacks: pd.DataFrame
    samples: pd.DataFrame
    outcomes: pd.DataFrame
    batches: pd.DataFrame
    run: Mapping[str, Any]
    audit: pd.DataFrame = field(default_factory=pd.DataFrame)

    def save(
        self, folder: str | Path, *, force: bool = False, archive: Path | None = None, gallery: bytes | None = None
    ) -> None:
        """Write the tables as CSV and ``run.json``, all or none.

        Measured times go to ``run.json`` and leave ``seconds`` in ``attacks.csv`` empty, so that the same seed gives
        identical CSVs; `load` puts them back. ``run.json`` also holds the SHA-256 of each file and, last, of itself
        (see `run_digest`). What other results left there (archive, audit, gallery, page, cross-check) goes; a gallery
        of these same results stays.

        Args:
            folder: made if need be.
            force: write over other results.
            archive: a file in the folder with adversarial batches, named by ``run``, to be moved to its place.
            gallery: the content of `GALLERY`.

        Raises:
            ValueError: when the folder holds something else.
            OSError: when it can't be written.
        """
        folder = Path(folder)
        claim_folder(folder, self.run, force=force)
        before = (_read_run(folder) or {}).get("key", self.run["key"])
        if gallery is None and (folder / GALLERY).is_file():
            held = (folder / GALLERY).read_bytes()
            listed = self.run.get("files", {}).get(GALLERY)
            gallery = held if hashlib.sha256(held).hexdigest() == listed else None
        tables = {name: getattr(self, name) for name in TABLES}
        tables["attacks"] = self.attacks.assign(seconds=None)
        if len(self.audit):
            tables["audit"] = self.audit
        contents = {
            f"{name}.csv": table.to_csv(index=False, lineterminator="\n").encode() for name, table in tables.items()
        }
        if gallery is not None:
            contents[GALLERY] = gallery
        run = dict(self.run) | {"seconds_by_run": dict(zip(_keys(self.attacks), self.attacks["seconds"], strict=True))}
        run["files"] = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
        run["sha256"] = run_digest(run)
        contents["run.json"] = f"{json.dumps(run, indent=2, ensure_ascii=False)}\n".encode()
        write_all(folder, {name: [content] for name, content in contents.items()})
        if archive is not None:
            archive.replace(folder / ARCHIVE)
        stale = {"audit.csv", GALLERY, PAGE, CROSSCHECK} - set(contents) | (
            {ARCHIVE} if run.get("adversarial") is None else set()
        )
        for name in stale:
            if (folder / name).is_file():
                (folder / name).unlink()
        if before != self.run["key"] and (folder / FIGURES).is_dir():
            warnings.warn(f"{folder / FIGURES} is still of the results before; make the figures again", stacklevel=2)

    @classmethod
    def load(cls, folder: str | Path, *, trimmed: bool = False) -> Results:
        """Read what `save` wrote; the files are taken for hostile.

        Args:
            folder: of the results.
            trimmed: let tables of `TRIMMED` be missing; they come without rows then, but for ``batches``, which the
                samples tell.

        Raises:
            ValueError: when the folder holds no complete results of this schema, or a file is not as `save` wrote it:
                a field of ``run.json`` or a column of a table is missing or of another type, or there is a target or
                context that there is not.
        """
        folder = Path(folder)
        run = _read_run(folder)
        if run is None:
            raise ValueError(f"{folder} holds no complete results: there is no run.json")
        if run.get("schema_version") != SCHEMA_VERSION:
            raise ValueError(
                f"{folder} has schema version {run.get('schema_version')!a:.20}, but this release reads "
                f"{SCHEMA_VERSION}"
            )
        fields.check_run(str(folder / "run.json"), run)
        tables = {}
        for name in (*TABLES, "audit"):
            path = folder / f"{name}.csv"
            if not path.is_file() and (name == "audit" or (trimmed and name in TRIMMED)):
                continue
            try:
                tables[name] = _read(path, name)
            except (OSError, ValueError) as error:
                raise ValueError(f"{folder} holds no complete results: {error}") from error
            _check_known(str(path), tables[name])
        for name in set(TRIMMED) - set(tables):
            of_samples = name == "batches"
            seats = tables["samples"][["batch", "position", "index"]].drop_duplicates("index", ignore_index=True)
            tables[name] = seats if of_samples else pd.DataFrame(columns=list(fields.COLUMNS[name]))
        fields.check_together(str(folder), tables, METRICS)
        seconds = run.get("seconds_by_run", {})
        tables["attacks"]["seconds"] = [seconds.get(key, np.nan) for key in _keys(tables["attacks"])]
        return cls(**tables, run=run)


def run_digest(run: Mapping[str, Any]) -> str:
    """SHA-256 over all fields of a ``run.json`` but ``sha256``, as JSON with sorted keys and no white space.

    >>> run_digest({"seed": 0, "sha256": "any"})[:8]
    'bd048884'
    """
    fields = {name: value for name, value in run.items() if name != "sha256"}
    # There and back first: keys are sorted as they stand in the file, as texts.
    text = json.dumps(json.loads(json.dumps(fields)), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def claim_folder(folder: Path, about: Mapping[str, Any], *, force: bool = False) -> None:
    """Make a results folder, or check that the one there may be written.

    Args:
        folder: the folder.
        about: what the results depend on, and its ``key``; results of the same key are the same and may be replaced.
        force: allow other results to be replaced.

    Raises:
        ValueError: when the folder holds other results or other files, or can't be made or written.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; choose a folder for the results")
    run = _read_run(folder)
    if not force and run is not None and run.get("key") != about["key"]:
        told = differences(run, about)
        raise ValueError(
            f"{folder} holds the results of another evaluation ({run.get('protocol', {}).get('name')}, seed "
            f"{run.get('seed')}){f', which differs in {told}' if told else ''}; choose another folder, or start anew "
            f"with force=True"
        )
    try:
        # What an interrupted evaluation left behind, perhaps as it wrote its results.
        names = {ARCHIVE, NEW_ARCHIVE, *((*OURS, LOCK) if (folder / UNFINISHED).is_dir() else (LOCK,))}
        ours = names | {f"{name}.part" for name in names}
        held = sorted({entry.name for entry in folder.iterdir()} - ours) if folder.is_dir() else []
        if not force and run is None and held:
            raise ValueError(f"{folder} holds no results but {held[0]}; choose another folder, or use force=True")
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"results can't be written to {folder}: {error.strerror}; choose another folder") from error


def set_aside(folder: Path, key: str) -> Path | None:
    """Move other results and an unfinished evaluation to a folder of a dated name beside; ``None`` if there are none.

    Args:
        folder: of the results.
        key: of those that may stay.

    Raises:
        ValueError: when they can't be moved.
    """
    run = _read_run(folder)
    if (run is None or run.get("key") == key) and not (folder / UNFINISHED).is_dir():
        return None
    place = folder.resolve()
    dated = f"{place.name}-{time.strftime('%Y-%m-%dT%H%M%S')}"
    names = (dated if i == 1 else f"{dated}-{i}" for i in itertools.count(1))
    try:
        moved = next(place.with_name(name) for name in names if not place.with_name(name).exists())
        moved.mkdir()
        for name in OURS:
            if (folder / name).exists():
                (folder / name).rename(moved / name)
    except OSError as error:
        raise ValueError(f"what {folder} holds can't be moved away: {error.strerror}; choose another folder") from error
    return moved


def _read_run(folder: Path) -> dict[str, Any] | None:
    path = folder / "run.json"
    if not path.is_file():
        return None
    check_inside(path, folder)
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not readable: {told(error)}") from error
    if not isinstance(run, dict):
        raise ValueError(f"{path} is not the run.json of an evaluation")
    return run


def _keys(attacks: pd.DataFrame) -> list[str]:
    """What names a run among all targets and contexts."""
    return [f"{row['target']}/{row['context']}/{row['run']}" for row in attacks.to_dict(orient="records")]


def _read(path: Path, name: str) -> pd.DataFrame:
    check_inside(path, path.parent)
    try:
        table = pd.read_csv(path, dtype=fields.texts_of(name), low_memory=False)
    except (ValueError, OverflowError, RecursionError) as error:
        raise ValueError(f"{path} is no readable table: {told(error)}") from error
    fields.check_table(str(path), name, table)
    for column in {"verdict", "reasons", "reason", "notes"} & set(table):  # empty, it reads as a missing number
        table[column] = table[column].astype("string").fillna("").astype(object)
    return table.astype({column: "Int64" for column in ("broken_at", "first_iterate") if column in table})


def _check_known(name: str, table: pd.DataFrame) -> None:
    """Names of targets and contexts become parts of file names and pages, so no others are let in.

    Raises:
        ValueError: when there is another.
    """
    for column, known in (("target", TARGETS), ("context", CONTEXTS)):
        others = [value for value in table.get(column, pd.Series(dtype=object)).unique() if value not in known]
        if others:
            raise ValueError(f"{name} names the {column} {others[0]!a:.40}; expected one of {', '.join(known)}")


def tabulate(records: Sequence[TargetRecord], run: Mapping[str, Any]) -> Results:
    """Make the tables from the records of all targets and contexts."""
    first = records[0]
    seats = pd.DataFrame({"batch": first.batch, "position": first.position, "index": first.index})
    return Results(
        summary=pd.concat([_summary(record) for record in records], ignore_index=True),
        attacks=pd.concat([_attacks(record) for record in records], ignore_index=True),
        samples=pd.concat([_samples(record) for record in records], ignore_index=True),
        outcomes=pd.concat([_outcomes(record) for record in records], ignore_index=True),
        batches=seats.sort_values(["batch", "position"], ignore_index=True),
        run=run,
    )


def _whole_or_missing(values: npt.NDArray[np.int64], present: npt.NDArray[np.bool_]) -> pd.Series[int]:
    return pd.Series(values, dtype="Int64").where(pd.Series(present))


def _stack(record: TargetRecord, name: str) -> Any:
    return np.stack([getattr(run, name) for run in record.runs])


def _summary(record: TargetRecord) -> pd.DataFrame:
    rates = {
        "clean": metrics.clean(record.correct),
        "paper": metrics.paper(record.correct, _stack(record, "final_broken")),
        "realised": metrics.realised(record.realised),
        "worst_case": metrics.worst_case(record.correct, _stack(record, "any_broken")),
    }
    about = {"target": record.target, "context": record.context}
    return pd.DataFrame([about | {"metric": name} | rate._asdict() for name, rate in rates.items()])


def _attacks(record: TargetRecord) -> pd.DataFrame:
    rows = []
    standing = record.correct
    told = any(run.notes is not None for run in record.runs)
    for run in record.runs:
        newly = standing & run.any_broken
        standing = standing & ~run.any_broken
        shares = {
            "surrogate_accuracy": float((~run.surrogate_fooled).mean()),
            "final": float((record.correct & ~run.final_broken).mean()),
            "any": float((record.correct & ~run.any_broken).mean()),
        }
        rows.append(
            {
                "target": record.target,
                "context": record.context,
                "run": run.name,
                "surrogate": run.surrogate,
                "attack": run.attack,
                "loss": run.loss,
                "restart": run.restart,
                **(shares if run.whole else dict.fromkeys(shares, np.nan)),
                "newly_broken": int(newly.sum()),
                "forwards": run.forwards,
                "backwards": run.backwards,
                "decisions": run.decisions,
                "seconds": round(run.seconds, 3),
            }
            | ({"notes": "; ".join(run.notes or ())} if told else {})
        )
    return pd.DataFrame(rows)


def _samples(record: TargetRecord) -> pd.DataFrame:
    broken = _stack(record, "any_broken")
    names = np.array([run.name for run in record.runs])
    first_run = broken.argmax(axis=0)
    hit = broken.any(axis=0)
    iterate = _stack(record, "first_iterate")[first_run, np.arange(len(hit))]
    right = record.correct
    broken_by = pd.Series(np.where(right, names[first_run], "clean"), dtype=object)
    return pd.DataFrame(
        {
            "target": record.target,
            "context": record.context,
            "index": record.index,
            "label": record.label,
            "batch": record.batch,
            "position": record.position,
            "clean_prediction": record.clean_prediction,
            "clean_correct": right,
            "robust": right & ~hit,
            "broken_by": broken_by.where(pd.Series(hit | ~right), None),
            "broken_at": _whole_or_missing(iterate, right & hit),
            "min_margin": np.fmin(record.clean_margin, np.fmin.reduce(_stack(record, "min_margin"), axis=0)),
            "committed_right": record.realised,
        }
    )


def _outcomes(record: TargetRecord) -> pd.DataFrame:
    frames = [
        pd.DataFrame(
            {
                "target": record.target,
                "context": record.context,
                "run": run.name,
                "index": record.index,
                "surrogate_fooled": run.surrogate_fooled,
                "final_broken": run.final_broken,
                "any_broken": run.any_broken,
                "first_iterate": _whole_or_missing(run.first_iterate, run.any_broken),
                "min_margin": run.min_margin,
                "perturbation": run.perturbation,
            }
        )
        for run in record.runs
    ]
    return pd.concat(frames, ignore_index=True)
