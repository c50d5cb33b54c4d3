"""The results of an evaluation: its tables and its ``run.json``, written and read."""

from __future__ import annotations

import hashlib
import json
import tomllib
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from msa_eval.defense.contexts import CONTEXTS
from msa_eval.evidence import schema as fields
from msa_eval.evidence.folder import (
    ARCHIVE,
    CROSSCHECK,
    FIGURES,
    GALLERY,
    PAGE,
    POINTS,
    POINTS_TABLE,
    TABLES,
    claim_folder,
    read_run,
)
from msa_eval.evidence.metrics import METRICS
from msa_eval.files import write_all
from msa_eval.protocols.loading import make_protocol
from msa_eval.untrusted import check_inside, printable

if TYPE_CHECKING:
    from msa_eval.evidence.points import Adversarial

SCHEMA_VERSION = 1


TARGETS = ("defense", "fc")


TRIMMED = ("attacks", "outcomes", "batches")
"""Tables without which results can still be shown, in part."""


INCOMPLETE = "incomplete"
"""The verdict where something failed, so that what was not broken is not known to be robust."""


WITHOUT_AUDIT = {"verdict": "not audited", "reasons": ""}
"""What stands in a table for results without an audit, beside others that have a verdict."""


@dataclass(frozen=True)
class Results:
    """What an evaluation found, as pandas tables (docs/files.md describes their columns).

    Attributes:
        summary: one row per target, context and number.
        attacks: one row per run.
        samples: one row per sample, target and context.
        outcomes: one row per sample and run.
        batches: one row per sample's place.
        run: protocol, seed, hashes, versions and all else that says how the tables were made.
        audit: one row per target and sign, where the results were audited.
        folder: where they are on disk, if they are.
    """

    summary: pd.DataFrame
    attacks: pd.DataFrame
    samples: pd.DataFrame
    outcomes: pd.DataFrame
    batches: pd.DataFrame
    run: Mapping[str, Any]
    audit: pd.DataFrame = field(default_factory=pd.DataFrame)
    folder: Path | None = field(default=None, compare=False)

    def adversarial(self, target: str = "defense", context: str = "joint") -> Adversarial:
        """Every sample's best point, broken or not, with what the target answers to it beside its companions.

        Args:
            target: ``defense`` or ``fc``.
            context: what the attacker controls.

        Raises:
            ValueError: when they were not kept (by ``save_adversarial="all"``), or are not those of these results.
        """
        from msa_eval.evidence.points import read

        if self.folder is None:
            raise ValueError(
                'no points of every sample were kept; make the evaluation with save_adversarial="all" and out=FOLDER'
            )
        if target not in TARGETS or context not in CONTEXTS:
            raise ValueError(f"expected a target among {', '.join(TARGETS)} and a context among {', '.join(CONTEXTS)}, "
                             f"but got {target!r:.40} and {context!r:.40}")  # fmt: skip
        protocol = make_protocol(tomllib.loads(self.run["protocol"]["text"]), source="the protocol in run.json")
        sizes = Counter(self.batches["batch"].tolist())
        run = load_run(self.folder)  # the files' hashes stand there
        if run.get("key") != self.run.get("key"):
            raise ValueError(f"{self.folder} holds other results by now")
        return read(self.folder, run, protocol.ball, sizes, target=target, context=context)

    def save(
        self,
        folder: str | Path,
        *,
        force: bool = False,
        archive: Path | None = None,
        gallery: bytes | None = None,
        points: tuple[Path, pd.DataFrame] | None = None,
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
            points: a file in the folder with the best points, to be moved to its place, and their manifest.

        Raises:
            ValueError: when the folder holds something else.
            OSError: when it can't be written.
        """
        folder = Path(folder)
        claim_folder(folder, self.run, force=force)
        before = (read_run(folder) or {}).get("key", self.run["key"])
        gallery = gallery or self._standing(folder / GALLERY)
        manifest = points[1].to_csv(index=False, lineterminator="\n").encode() if points else None
        manifest = manifest or self._standing(folder / POINTS_TABLE)
        tables = {name: getattr(self, name) for name in TABLES}
        tables["attacks"] = self.attacks.assign(seconds=None)
        if len(self.audit):
            tables["audit"] = self.audit
        contents = {
            f"{name}.csv": table.to_csv(index=False, lineterminator="\n").encode() for name, table in tables.items()
        }
        if gallery is not None:
            contents[GALLERY] = gallery
        if manifest is not None:
            contents[POINTS_TABLE] = manifest
        run = dict(self.run) | {"seconds_by_run": dict(zip(_keys(self.attacks), self.attacks["seconds"], strict=True))}
        run["files"] = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
        run["sha256"] = run_digest(run)
        contents["run.json"] = f"{json.dumps(run, indent=2, ensure_ascii=False)}\n".encode()
        write_all(folder, {name: [content] for name, content in contents.items()})
        if archive is not None:
            archive.replace(folder / ARCHIVE)
        if points is not None:
            points[0].replace(folder / POINTS)
        stale = {"audit.csv", GALLERY, PAGE, CROSSCHECK, POINTS_TABLE} - set(contents)
        stale |= {file for file, name in ((ARCHIVE, "adversarial"), (POINTS, "points")) if run.get(name) is None}
        for name in stale:
            if (folder / name).is_file():
                (folder / name).unlink()
        if before != self.run["key"] and (folder / FIGURES).is_dir():
            warnings.warn(f"{folder / FIGURES} is still of the results before; make the figures again", stacklevel=2)

    def _standing(self, path: Path) -> bytes | None:
        """The content of a file of these same results, as far as their hashes tell."""
        held = path.read_bytes() if path.is_file() else None
        listed = self.run.get("files", {}).get(path.name)
        return held if held is not None and hashlib.sha256(held).hexdigest() == listed else None

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
        run = load_run(folder)
        tables = {}
        for name in (*TABLES, "audit"):
            path = folder / f"{name}.csv"
            if not path.is_file() and (name == "audit" or (trimmed and name in TRIMMED)):
                continue
            try:
                tables[name] = load_table(path, name)
            except (OSError, ValueError) as error:
                raise ValueError(f"{folder} holds no complete results: {error}") from error
        for name in set(TRIMMED) - set(tables):
            of_samples = name == "batches"
            seats = tables["samples"][["batch", "position", "index"]].drop_duplicates("index", ignore_index=True)
            tables[name] = seats if of_samples else pd.DataFrame(columns=list(fields.COLUMNS[name]))
        fields.check_together(str(folder), tables, METRICS)
        seconds = run.get("seconds_by_run", {})
        tables["attacks"]["seconds"] = [seconds.get(key, np.nan) for key in _keys(tables["attacks"])]
        return cls(**tables, run=run, folder=folder)


def run_digest(run: Mapping[str, Any]) -> str:
    """SHA-256 over all fields of a ``run.json`` but ``sha256``, as JSON with sorted keys and no white space.

    >>> run_digest({"seed": 0, "sha256": "any"})[:8]
    'bd048884'
    """
    fields = {name: value for name, value in run.items() if name != "sha256"}
    # There and back first: keys are sorted as they stand in the file, as texts.
    text = json.dumps(json.loads(json.dumps(fields)), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _keys(attacks: pd.DataFrame) -> list[str]:
    """What names a run among all targets and contexts."""
    return [f"{row['target']}/{row['context']}/{row['run']}" for row in attacks.to_dict(orient="records")]


def load_run(folder: Path) -> dict[str, Any]:
    """The ``run.json`` of results, which is taken for hostile.

    Raises:
        ValueError: when there is none, or it is of another schema.
    """
    run = read_run(folder)
    if run is None:
        raise ValueError(f"{folder} holds no complete results: there is no run.json")
    if run.get("schema_version") != SCHEMA_VERSION:
        raise ValueError(
            f"{folder} has schema version {run.get('schema_version')!a:.20}, but this release reads {SCHEMA_VERSION}"
        )
    fields.check_run(str(folder / "run.json"), run)
    return run


def load_table(path: Path, name: str) -> pd.DataFrame:
    """A table of results, which is taken for hostile.

    Args:
        path: of the file.
        name: of the table.

    Raises:
        ValueError: when it is none, or does not hold what `schema.COLUMNS` says.
        OSError: when it can't be read.
    """
    check_inside(path, path.parent)
    try:
        table = pd.read_csv(path, dtype=fields.texts_of(name), low_memory=False)
    except (ValueError, OverflowError, RecursionError) as error:
        raise ValueError(f"{path} is not a readable table: {printable(error)}") from error
    fields.check_table(str(path), name, table)
    for column in {"verdict", "reasons", "reason", "notes"} & set(table):  # empty, it reads as a missing number
        table[column] = table[column].astype("string").fillna("").astype(object)
    _check_known(str(path), table)
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
