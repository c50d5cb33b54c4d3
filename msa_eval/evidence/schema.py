"""What evidence files must hold to be read: the fields of ``run.json``, and the columns of the tables.

Results come from strangers, so this is checked once, where they are read; what shows them can then rely on it.
"""

from __future__ import annotations

import tomllib
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import pandas as pd

from msa_eval.untrusted import printable

_PROTOCOL_TEXT = {
    "attack?": {"apgd?": {"combine?": str}, "*": object},
    "stochastic?": {"eot?": int, "*": object},
    "threat?": {"norm?": str, "eps?": (float, str), "*": object},
    "*": object,
}
RUN: Mapping[str, Any] = {
    "key": str,
    "schema_version": int,
    "seed": int,
    "protocol": {
        "name": str, "version": int, "modified": bool, "overrides": {"*": object}, "sha256": str, "text": str,
        "*": object,
    },
    "data": {"name": str, "sha256": str, "n": int, "*": object},
    "targets": {
        "defense": {"sha256": str, "type?": str, "*": object},
        "fc?": {"sha256": str, "type?": str, "*": object},
        "*": {"sha256": str, "*": object},
    },
    "batches": {"sha256": str, "count": int, "*": object},
    "verdict": str,
    "verdicts?": {"*": {"verdict": str, "reasons": [str], "*": object}},
    "target?": {"word?": str, "random_weights?": bool, "*": object},
    "msa_eval?": str,
    "draws?": {"*": int},
    "taken_back?": {"*": {"*": int}},
    "search?": {"asked?": str, "precision?": str, "*": object},
    "deterministic?": bool,
    "packages?": {"*": str},
    "git?": ({"commit": str, "dirty": bool, "*": object}, None),
    "command?": [str],
    "seconds?": (float, None),
    "seconds_by_run?": {"*": (float, None)},
    "files?": {"*": str},
    "points?": ({"file": str, "sha256": str, "image": [int], "*": object}, None),
    "adversarial?": ({"file": str, "sha256": str, "*": object}, None),
    "sha256?": str,
    "*": object,
}  # fmt: skip
"""Fields by name: ``?`` marks one that may be missing, ``*`` stands for all others, a tuple lists alternatives."""

_WORDS = {
    str: "a text", int: "a whole number", float: "a number", bool: "true or false", None: "null", object: "anything",
}  # fmt: skip


def check_run(name: str, run: Any) -> None:
    """The fields of a ``run.json`` are of the types that readers rely on.

    Args:
        name: of the file.
        run: its content.

    Raises:
        ValueError: when a field is missing or of another type; says which.
    """
    _check_field(name, "", run, RUN)
    _check_texts(name, run)
    try:
        protocol = tomllib.loads(run["protocol"]["text"])
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name}: the field protocol.text is no TOML: {printable(error)}") from error
    _check_field(name, "protocol.text", protocol, _PROTOCOL_TEXT)


def _check_field(name: str, field: str, value: Any, kind: Any) -> None:
    if not _is(value, kind):
        shown = f"the field {printable(field)}" if field else "the file"
        raise ValueError(f"{name}: {shown} must hold {_describe_kind(kind)}, but holds {_value(value)}")
    for alternative in kind if isinstance(kind, tuple) else (kind,):
        if isinstance(alternative, dict) and isinstance(value, dict):
            _check_fields(name, field, value, alternative)
        if isinstance(alternative, list) and isinstance(value, list):
            for place, part in enumerate(value):
                _check_field(name, f"{field}[{place}]", part, alternative[0])


def _check_fields(name: str, field: str, value: Mapping[str, Any], kinds: Mapping[str, Any]) -> None:
    inside = f"{field}." if field else ""
    for key in kinds:
        if key != "*" and not key.endswith("?") and key not in value:
            raise ValueError(f"{name}: the field {printable(inside + key)} is missing")
    known = {key.rstrip("?"): kind for key, kind in kinds.items() if key != "*"}
    for key, part in value.items():
        _check_field(name, f"{inside}{key}", part, known.get(key, kinds.get("*", object)))


def _is(value: Any, kind: Any) -> bool:
    """Whether a value is of a kind itself; what it holds is not looked at."""
    if isinstance(kind, tuple):
        return any(_is(value, one) for one in kind)
    if kind is object or kind is None:
        return kind is object or value is None
    if isinstance(kind, dict | list):
        return isinstance(value, type(kind))
    if kind in (int, float):
        return isinstance(value, (int, float) if kind is float else int) and not isinstance(value, bool)
    return isinstance(value, kind)


def _value(value: Any) -> str:
    try:
        return f"{value!a:.40}"
    except (ValueError, RecursionError):  # too long a number, too deep a list
        return f"a {type(value).__name__}"


def _check_texts(name: str, run: Mapping[str, Any]) -> None:
    """No text of a ``run.json``, known or not, holds half a letter: JSON can, but no page and no terminal.

    Raises:
        ValueError: when one does; says which. Lists may be nested too deep to be walked by recursion.
    """
    ahead: list[tuple[str, Any]] = [("", run)]
    while ahead:
        field, value = ahead.pop()
        inside = f"{field}." if field else ""
        if isinstance(value, dict):
            if any(map(_is_cut, value)):
                raise ValueError(f"{name}: the name of a field in {printable(field or 'it')} is no valid text")
            ahead += [(f"{inside}{key}", part) for key, part in value.items()]
        elif isinstance(value, list):
            ahead += [(f"{field}[{place}]", part) for place, part in enumerate(value)]
        elif isinstance(value, str) and _is_cut(value):
            raise ValueError(f"{name}: the field {printable(field)} is no valid text")


def _is_cut(text: str) -> bool:
    """Whether there is half a letter in it."""
    return any("\ud800" <= letter <= "\udfff" for letter in text)


def _describe_kind(kind: Any) -> str:
    if isinstance(kind, tuple):
        return " or ".join(map(_describe_kind, kind))
    return "fields" if isinstance(kind, dict) else "a list" if isinstance(kind, list) else _WORDS[kind]


class Column(NamedTuple):
    """What a column holds.

    Attributes:
        kind: ``text``, ``whole``, ``number``, ``share``, ``yes`` (true or false) or ``any``.
        meaning: of a cell, in words.
        gaps: whether cells may be empty.
        optional: whether a table may lack it.
    """

    kind: str
    meaning: str
    gaps: bool = False
    optional: bool = False


_ABOUT = {
    "target": Column("text", "`defense` or `fc`, the plain head on the same trunk"),
    "context": Column("text", "what the attacker controls"),
}
_RUN = {"run": Column("text", "a name of its own among the runs of a target and context")}
_SAMPLE = {"index": Column("whole", "the sample, by its place in the data set")}
_PLACE = {
    "batch": Column("whole", "the number of the batch in which it sits"),
    "position": Column("whole", "its place there"),
}
COLUMNS: Mapping[str, Mapping[str, Column]] = {
    "summary": {
        **_ABOUT,
        "metric": Column("text", "which number"),
        "value": Column("share", "of the samples that count as right", gaps=True),
        "low": Column("share", "the lower end of its Wilson 95 % interval", gaps=True),
        "high": Column("share", "the upper end", gaps=True),
        "n": Column("whole", "samples"),
        "verdict": Column("text", "on the numbers of the target", gaps=True, optional=True),
        "reasons": Column("text", "for it", gaps=True, optional=True),
    },
    "attacks": {
        **_ABOUT,
        **_RUN,
        "surrogate": Column("text", "through which it was searched; `target` where none was needed"),
        "attack": Column("text", "the search"),
        "loss": Column("text", "that it raised"),
        "restart": Column("whole", "from 0, among runs of the same surrogate, attack and loss", optional=True),
        "surrogate_accuracy": Column("share", "right by the surrogate on the final batches; empty: the run failed",
                                     gaps=True),
        "final": Column("share", "right on clean and final batches", gaps=True),
        "any": Column("share", "right on clean batches and in every verified batch of the run", gaps=True),
        "newly_broken": Column("whole", "samples that it was the first to break"),
        "forwards": Column("whole", "images passed through the trunk"),
        "backwards": Column("whole", "images passed back through it"),
        "decisions": Column("whole", "images that the target decided on; without a trunk each is a pass",
                            optional=True),
        "seconds": Column("number", "that it took; empty on disk, because times are in `run.json`", gaps=True,
                          optional=True),
        "notes": Column("text", "what a third-party attack did and should not have", gaps=True, optional=True),
    },
    "samples": {
        **_ABOUT,
        **_SAMPLE,
        "label": Column("any", "its class"),
        **_PLACE,
        "clean_prediction": Column("whole", "the target's answer in the clean batch"),
        "clean_correct": Column("yes", "whether that is the label"),
        "robust": Column("yes", "right on the clean batch and never broken"),
        "broken_by": Column("text", "the first run that broke it, or `clean` where it was wrong before", gaps=True),
        "broken_at": Column("whole", "the iterate of that run", gaps=True),
        "min_margin": Column("number", "the label's logit minus the best other one, lowest over all verified batches",
                             gaps=True),
        "committed_right": Column("yes", "counted as right in `realised`"),
    },
    "outcomes": {
        **_ABOUT,
        **_RUN,
        **_SAMPLE,
        "surrogate_fooled": Column("yes", "whether the surrogate is wrong on the final batch"),
        "final_broken": Column("yes", "whether the target is wrong on it"),
        "any_broken": Column("yes", "whether the target is wrong on any verified batch of the run"),
        "first_iterate": Column("whole", "where it first was", gaps=True),
        "min_margin": Column("number", "as in `samples`, over this run; empty: the run failed", gaps=True),
        "perturbation": Column("number", "the largest norm of what was added to the image; empty: the run failed",
                               gaps=True),
    },
    "batches": {**_PLACE, **_SAMPLE},
    "audit": {
        "target": _ABOUT["target"],
        "sign": Column("text", "what was looked for"),
        "fired": Column("yes", "whether it was found"),
        "severity": Column("text", "what it says of the numbers"),
        "value": Column("number", "what was measured", gaps=True, optional=True),
        "threshold": Column("number", "from where on it fires", gaps=True, optional=True),
        "reason": Column("text", "what was found, in a sentence", gaps=True),
    },
}  # fmt: skip
"""The columns of each table; others may stand beside them."""

MOST = 64
"""So many columns a table may have at the most: pandas is slow with very many, and says so in warnings of its own."""

KEYS = {
    "summary": ["target", "context", "metric"],
    "attacks": ["target", "context", "run"],
    "samples": ["target", "context", "index"],
    "outcomes": ["target", "context", "run", "index"],
    "batches": ["index"],
}
"""What names a row of a table; no two rows have the same."""

_KIND_WORDS = {
    "text": "texts", "whole": "whole numbers", "number": "numbers", "share": "shares from 0 to 1",
    "yes": "True or False", "any": "anything",
}  # fmt: skip


def texts_of(table: str) -> dict[str, type]:
    """The columns that are read as texts, whatever they look like."""
    return {name: str for name, column in COLUMNS[table].items() if column.kind == "text"}


def columns_markdown() -> str:
    """The columns of all tables as a table in Markdown.

    >>> print(columns_markdown().splitlines()[2])
    | `summary.csv` | `target` | texts | `defense` or `fc`, the plain head on the same trunk |
    """
    lines = ["| table | column | holds | meaning |", "| --- | --- | --- | --- |"]
    for table, columns in COLUMNS.items():
        for name, column in columns.items():
            held = _KIND_WORDS[column.kind] + (", or nothing" if column.gaps else "")
            lines.append(f"| `{table}.csv` | `{name}` | {held} | {column.meaning} |")
    return "\n".join(lines)


def check_table(name: str, table: str, rows: pd.DataFrame) -> None:
    """A table has its columns, each of its kind, and no row twice.

    Args:
        name: of the file.
        table: which.
        rows: as they were read, columns of `texts_of` as texts.

    Raises:
        ValueError: when not; says in which column.
    """
    if len(rows.columns) > MOST:
        raise ValueError(f"{name} has {len(rows.columns)} columns, but {MOST} at the most are read")
    for held, column in COLUMNS[table].items():
        if held not in rows:
            if column.optional:
                continue
            raise ValueError(f"{name} has no column {held}")
        if not column.gaps and rows[held].isna().any():
            raise ValueError(f"{name} has an empty cell in the column {held}")
        if len(rows) and not _holds(rows[held], column.kind):
            raise ValueError(f"{name} must hold {_KIND_WORDS[column.kind]} in the column {held}")
    if table in KEYS and rows.duplicated(KEYS[table]).any():
        raise ValueError(f"{name} has two rows of the same {', '.join(KEYS[table])}")


def _holds(cells: pd.Series, kind: str) -> bool:
    if kind in ("text", "any") or (kind != "yes" and cells.isna().all()):
        return True
    if kind == "yes" or cells.dtype.kind not in "iuf":
        return kind == "yes" and cells.dtype == bool
    held = cells.dropna()
    if kind == "whole":
        return bool((held.abs() < 2**53).all() and (held % 1 == 0).all())
    return kind == "number" or bool(held.between(0, 1).all())


def check_together(folder: str, tables: Mapping[str, pd.DataFrame], metrics: Collection[str]) -> None:
    """The tables are of one evaluation: each target and context has all numbers and its samples.

    Raises:
        ValueError: when not.
    """
    summary, samples = tables["summary"], tables["samples"]
    for name, rows in (("summary", summary), ("samples", samples), ("batches", tables["batches"])):
        if rows.empty:
            raise ValueError(f"{folder}/{name}.csv has no rows")
    everybody = set(tables["batches"]["index"])
    of_samples = {key: set(rows["index"]) for key, rows in samples.groupby(["target", "context"])}
    for (target, context), rows in summary.groupby(["target", "context"]):
        if lacking := [metric for metric in metrics if metric not in set(rows["metric"])]:
            raise ValueError(f"{folder}/summary.csv has no {lacking[0]} of {target}/{context}")
        if of_samples.get((target, context)) != everybody:
            raise ValueError(
                f"{folder}/samples.csv has not every sample of batches.csv, and no other, for {target}/{context}"
            )
    if len(summary.groupby(["target", "context"])) != summary["target"].nunique() * summary["context"].nunique():
        raise ValueError(f"{folder}/summary.csv has a context that not all targets have")
