"""The folder of results: its files, who may write there, and what is set aside."""

from __future__ import annotations

import itertools
import json
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from msa_eval.evidence.diff import differences
from msa_eval.untrusted import check_inside, printable

TABLES = ("summary", "attacks", "samples", "outcomes", "batches")


ARCHIVE = "adversarial.safetensors"
"""The adversarial batches beside the tables, where they are kept; ``run.json`` names it under ``adversarial``."""


NEW_ARCHIVE = f"new-{ARCHIVE}"
"""The same while the tables are not written yet, so that earlier results stay whole."""


POINTS, POINTS_TABLE = "points.safetensors", "points.csv"
"""Every sample's best point and the manifest of these (see `msa_eval.evidence.points`), where they are kept."""


NEW_POINTS = f"new-{POINTS}"
"""As `NEW_ARCHIVE`."""


GALLERY = "gallery.safetensors"
"""Pictures of a few broken samples (see `msa_eval.evidence.gallery`), where these are kept."""


PAGE = "report.html"
"""The page made from all this; not evidence, so it has no hash, and other results take it away."""


CROSSCHECK = "crosscheck.csv"
"""What external attacks broke of it (see `msa_eval.studies.crosscheck`); made later, so it has no hash either."""


FIGURES, EXPORT = "figures", "export"
"""Folders of figures, and of points as other tools read them, made from all this; no evidence either, and left to who
made them."""


UNFINISHED, LOCK, HOLDER = "unfinished", ".lock", ".lock-holder"
"""What an evaluation keeps there while it is under way (see `msa_eval.engine.resume`)."""


OURS = (
    "run.json", *(f"{name}.csv" for name in (*TABLES, "audit")), ARCHIVE, GALLERY, PAGE, FIGURES, UNFINISHED, POINTS,
    POINTS_TABLE, EXPORT,
)  # fmt: skip
"""All that an evaluation or what is made from one leaves in its folder."""


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
    run = read_run(folder)
    if not force and run is not None and run.get("key") != about["key"]:
        differing = differences(run, about)
        raise ValueError(
            f"{folder} holds the results of another evaluation ({run.get('protocol', {}).get('name')}, seed "
            f"{run.get('seed')}){f', which differs in {differing}' if differing else ''}; choose another folder, or "
            f"start anew with force=True"
        )
    try:
        # What an interrupted evaluation left behind, perhaps as it wrote its results.
        names = {
            ARCHIVE,
            NEW_ARCHIVE,
            POINTS,
            NEW_POINTS,
            LOCK,
            HOLDER,
            *(OURS if (folder / UNFINISHED).is_dir() else ()),
        }
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
    run = read_run(folder)
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


def read_run(folder: Path) -> dict[str, Any] | None:
    """The ``run.json`` of a folder; ``None`` where there is none, and a `ValueError` where it can't be read."""
    path = folder / "run.json"
    if not path.is_file():
        return None
    check_inside(path, folder)
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not readable: {printable(error)}") from error
    if not isinstance(run, dict):
        raise ValueError(f"{path} is not the run.json of an evaluation")
    return run
