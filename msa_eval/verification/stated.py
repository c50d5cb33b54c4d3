"""What ``run.json`` says, as far as it is checked."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from msa_eval.evidence.results import SCHEMA_VERSION


@dataclass(frozen=True)
class Stated:
    """What run.json says, as far as it is checked."""

    run: Mapping[str, Any]
    protocol: str
    protocol_sha256: str
    overrides: Mapping[str, Any]
    modified: bool
    data_sha256: str
    n: int
    plan_sha256: str
    targets: Mapping[str, str]
    archive: Mapping[str, Any] | None
    draws: Mapping[str, int]

    @classmethod
    def read(cls, run: Mapping[str, Any]) -> Stated:
        """Take it apart.

        Raises:
            ValueError: when something is missing or of another type.
        """
        targets = _field(run, "targets", dict)
        return cls(
            run=run,
            protocol=_field(run, "protocol.text", str),
            protocol_sha256=_field(run, "protocol.sha256", str),
            overrides=_field(run, "protocol.overrides", dict),
            modified=_field(run, "protocol.modified", bool),
            data_sha256=_field(run, "data.sha256", str),
            n=_field(run, "data.n", int),
            plan_sha256=_field(run, "batches.sha256", str),
            targets={name: _field(about, "sha256", str, f"targets.{name}.") for name, about in targets.items()},
            archive=_field(run, "adversarial", dict) if run.get("adversarial") is not None else None,
            draws={name: _field(run["draws"], name, int, "draws.") for name in run.get("draws", {})},
        )


def _field(run: Any, name: str, kind: type, prefix: str = "") -> Any:
    value = run
    for part in name.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    if not isinstance(value, kind):
        raise ValueError(f"run.json has no valid {prefix}{name}")
    return value


def read_run(path: Path) -> tuple[str, Stated]:
    """Read ``run.json``."""
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"run.json is not readable: {error}") from error
    if not isinstance(run, dict):
        raise ValueError("run.json is not the run.json of an evaluation")
    if run.get("schema_version") != SCHEMA_VERSION:
        raise ValueError(
            f"run.json has schema version {run.get('schema_version')!r:.20}, but this release reads {SCHEMA_VERSION}"
        )
    return f"readable, of schema version {SCHEMA_VERSION}", Stated.read(run)
