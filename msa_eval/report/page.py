"""The page: one file with all there is to see of an evaluation, made from its evidence alone."""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
from markupsafe import Markup

from msa_eval._version import __version__
from msa_eval.defense.contexts import CONTEXTS
from msa_eval.evidence.folder import PAGE
from msa_eval.evidence.metrics import METRICS
from msa_eval.evidence.results import Results
from msa_eval.files import write_whole
from msa_eval.report import frames
from msa_eval.report.comparison import points, told_p
from msa_eval.report.exhibits import NONE, Pictures, exhibits, pictures_of
from msa_eval.report.inline import csv_link, inline_svg, script_json
from msa_eval.report.plots.axes import percent
from msa_eval.report.plots.catalog import KINDS, Kind
from msa_eval.report.samples import sample_table
from msa_eval.report.statements import NOT_AUDITED, VERDICTS, statements
from msa_eval.report.style import NAMES
from msa_eval.report.text import in_batches, named_data

SECTIONS = (
    ("verdict", "Verdict"), ("waterfall", "Waterfall"), ("transfer", "Surrogates"), ("spending", "Passes"),
    ("classes", "Classes"), ("agreement", "Agreement"), ("gallery", "Broken samples"), ("batches", "Batches"),
    ("samples", "Samples"), ("provenance", "Provenance"),
)  # fmt: skip
LISTED = 100
"""So many samples are listed of those that one run alone broke; the rest is in the data."""


def write_page(folder: str | Path, out: str | Path | None = None) -> Path:
    """Write the page of the results in a folder; the same evidence gives the same bytes.

    Args:
        folder: of the results; what needs a table that is missing there is left out.
        out: the file; ``report.html`` in the folder by default.

    Raises:
        ValueError: when there are no results, or ``out`` is no place for a page.
        OSError: when the file can't be written.
    """
    folder = Path(folder)
    path = check_page(folder / PAGE if out is None else Path(out))
    results = Results.load(folder, trimmed=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, render_page(results, pictures_of(folder, results)).encode())
    return path


def check_page(path: Path) -> Path:
    """A place for a page, which must not be that of something else.

    Raises:
        ValueError: when it is a folder, or no HTML file by its name.
    """
    if path.is_dir():
        raise ValueError(f"{path} is a folder; give the page a file's name")
    if path.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"{path} is not the name of a page; choose one that ends in .html")
    return path


def render_page(results: Results, pictures: Pictures = NONE) -> str:
    """The page as HTML.

    Args:
        results: of an evaluation.
        pictures: of broken samples, or why there are none.
    """
    run = results.run
    targets, found_in = frames.targets_of(results), frames.contexts_of(results)
    one = evaluation(results, found_in) | {"gallery": exhibits(results, pictures)}
    return render(
        "report.jinja",
        title=f"{_kind(run)} on {run['data']['name']}, protocol {run['protocol']['name']}",
        subtitle=describe(results),
        sections=SECTIONS,
        targets=targets,
        headlines=_headlines(results, targets),
        statements=statements(results),
        numbers=[_numbers(results, context, metric) for context, metric in itertools.product(found_in, METRICS)],
        n=run["data"]["n"],
        runs=[one],
        **together({"": results}, list(reversed(targets)), found_in),
    )


def evaluation(results: Results, contexts: Sequence[str]) -> dict[str, Any]:
    """What a page shows of each evaluation by itself, but for its pictures, which stand under ``gallery``."""
    run, sizes = results.run, results.batches.groupby("batch").size()
    return {
        "name": "", "suffix": "", "protocol": run["protocol"], "provenance": _provenance(run), "files": _files(run),
        "command": shlex.join(run.get("command", [])),
        "verdicts": [_verdict(results, target) for target in reversed(frames.targets_of(results))],
        "plan": f"{len(results.batches)} samples sit {in_batches(run)} of {_range(sizes)}, the same for every "
        "run.",
        "batches_csv": csv_link(results.batches),
        "peers": _peers(results),
        "only_one": [
            _only_one(results, context) for context in contexts
            if not frames.lacking(results, context, "attacks", "outcomes")
        ],
    }  # fmt: skip


def together(
    named: Mapping[str, Results], targets: Sequence[str], contexts: Sequence[str], **columns: Sequence[str]
) -> dict[str, Any]:
    """What a page shows of its evaluations together: figures, the audit, and the sample table.

    Args:
        named: by name; where there is one only, it needs none.
        targets: that all of them have.
        contexts: that all of them have.
        **columns: of the sample table.
    """
    return {
        "figures": [_section(kind, named, contexts) for kind in KINDS],
        "audit": _audit(named),
        "contexts": [CONTEXTS[context] for context in contexts],
        "samples_json": script_json(sample_table(named, targets, contexts, **columns)),
    }


def _section(kind: Kind, named: Mapping[str, Results], contexts: Sequence[str]) -> dict[str, Any]:
    """The figures of a kind, drawn, those of one context next to each other."""
    drawn: list[dict[str, Any]] = []
    lacking: list[str] = []
    for context, (number, (name, results)) in itertools.product(contexts, enumerate(named.items(), 1)):
        chart = kind.chart(results, context)
        if isinstance(chart, str):
            of = f" of {name}" if name else ""
            lacking.append(f"There is no such figure{of} for the context {context}: {chart}.")
            continue
        label = ": ".join(filter(None, (context, name)))
        own = f"{chart.name}-{number}" if len(named) > 1 else chart.name
        svg = inline_svg(chart.figure(), own, f"{chart.title}, {label}. {chart.alt}")
        drawn.append({"name": own, "title": chart.title, "label": label, "csv": csv_link(chart.data), "svg": svg})
    return {"kind": kind.name, "title": kind.title, "caption": kind.caption, "charts": drawn, "lacking": lacking}


def _audit(named: Mapping[str, Results]) -> dict[str, Any]:
    """What the audits looked for: one row per target and sign, one cell per evaluation, None where it did not."""
    found: dict[tuple[str, str], list[dict[str, Any] | None]] = {}
    for place, results in enumerate(named.values()):
        for row in results.audit.to_dict(orient="records"):
            cells = found.setdefault((row["target"], row["sign"]), [None] * len(named))
            cells[place] = {str(key): value for key, value in row.items()}
    described = [
        f"{': '.join(filter(None, (name, str(int(results.audit['fired'].sum())))))} of {len(results.audit)} signs fired"
        for name, results in named.items() if len(results.audit)
    ]  # fmt: skip
    rows = [{"target": target, "sign": sign, "cells": cells} for (target, sign), cells in found.items()]
    return {"rows": rows, "sentence": ", ".join(described)}


def render(template: str, **values: Any) -> str:
    """Fill in a template of this package; all that is not markup already is escaped."""
    script = source("samples.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    shared = {
        "css": Markup(source("style.css")), "names": NAMES, "version": __version__,
        "script": Markup(script), "script_hash": Markup(f"'sha256-{digest}'"),
    }  # fmt: skip
    return _environment().get_template(template).render(shared | values)


@cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("msa_eval.report"), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    environment.filters |= {"percent": percent, "short": short, "points": points, "told_p": told_p}
    return environment


def short(value: float) -> str:
    """A logit or a distance in as few digits as tell it apart.

    >>> short(13.04), short(9.634), short(-0.5)
    ('13.0', '9.63', '-0.50')
    """
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def source(name: str) -> str:
    """The text of a file beside the templates."""
    return (Path(__file__).parent / "templates" / name).read_text(encoding="utf-8")


def describe(results: Results) -> str:
    """What was evaluated, in a line."""
    run, protocol = results.run, results.run["protocol"]
    changed = ", modified" if protocol["modified"] else ""
    return (
        f"{_kind(run)} under protocol {protocol['name']} v{protocol['version']}{changed}, {run['data']['n']} samples "
        f"of {named_data(run)} {in_batches(run)}, seed {run['seed']}"
    )


def _peers(results: Results) -> list[dict[str, Any]]:
    """What third-party attacks did that had to be corrected, one row per run."""
    rows = frames.notes(results)[["target", "context", "run", "notes"]].to_dict(orient="records")
    return [
        {str(key): value for key, value in row.items()} | {"sentence": str(row["notes"]).split("; ")} for row in rows
    ]


def _kind(run: Mapping[str, Any]) -> str:
    return str(run["targets"]["defense"].get("type", "defence"))


def _verdict(results: Results, target: str) -> dict[str, Any]:
    about = results.run.get("verdicts", {}).get(target)
    if about is None:
        verdict, reasons = str(results.run.get("verdict", "not audited")), []
    else:
        verdict, reasons = about["verdict"], list(about["reasons"])
    described = VERDICTS.get(verdict, VERDICTS[NOT_AUDITED]).capitalize() + "."
    if len(results.audit):
        fired = results.audit[(results.audit["target"] == target) & results.audit["fired"].astype(bool)]
        told_by = [f"{row['reason']} ({row['severity']})" for row in fired.to_dict(orient="records")] or reasons
        failed = reasons if verdict == "incomplete" else []
        reasons = [reason for reason in failed if not any(one.startswith(reason) for one in told_by)] + told_by
    return {"verdict": verdict, "sentence": f"{NAMES[target].capitalize()}: {described}" if target == "defense" else
            f"{NAMES[target]}: {described}", "reasons": reasons}  # fmt: skip


def _numbers(results: Results, context: str, metric: str) -> tuple[str, str, list[tuple[str, pd.Series]], str]:
    """A row of the table of numbers: each target's, and when a sample counts as right."""
    cells = [(target, frames.number(results, target, context, metric)) for target in frames.targets_of(results)]
    return context, metric, cells, METRICS[metric].meaning_in(CONTEXTS[context])


def _headlines(results: Results, targets: Sequence[str]) -> list[dict[str, Any]]:
    """The worst case of the first context, the defence's first, and then the paper's number."""
    context = frames.contexts_of(results)[0]
    kinds = (
        ("worst_case", "Worst case", "never wrong in any verified batch"),
        ("paper", "Paper's number", "the lowest final accuracy of any run"),
    )
    shown: list[dict[str, Any]] = []
    for (metric, title, beside), target in itertools.product(kinds, list(reversed(targets))):
        row = frames.number(results, target, context, metric)
        about = {"title": f"{title} of the {NAMES[target]}, {context}", "target": target, "beside": beside}
        shown.append(about | {name: float(row[name]) for name in ("value", "low", "high")})
    return shown


def listed(groups: Iterable[tuple[str, pd.DataFrame]]) -> list[tuple[str, list[int], int]]:
    """Samples by the title they are listed under: the first of them, and how many more there are."""
    return [(title, list(rows["index"])[:LISTED], max(len(rows) - LISTED, 0)) for title, rows in groups]


def _only_one(results: Results, context: str) -> dict[str, Any]:
    table = frames.only_one(results, context)
    groups = table.groupby(["target", "run"], sort=False)
    return {
        "context": context, "count": len(table), "csv": csv_link(table),
        "groups": listed((f"{NAMES[str(target)]}, {run}", rows) for (target, run), rows in groups),
    }  # fmt: skip


def _range(sizes: pd.Series) -> str:
    low, high = int(sizes.min()), int(sizes.max())
    return str(low) if low == high else f"{low} to {high}"


def _provenance(run: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What stands in run.json and says where the results come from."""
    git = run.get("git")
    rows = {
        "Protocol's changes": ", ".join(f"{k} = {json.dumps(v)}" for k, v in run["protocol"]["overrides"].items()),
        "Seed": run.get("seed"),
        "Data": f"{named_data(run)}, SHA-256 {run['data']['sha256']}",
        "Class of each label": ", ".join(map(str, run["data"].get("classes", ()))),
        **{
            f"Weights, {NAMES.get(name, name)}": f"{about.get('type', '')}, SHA-256 {about.get('sha256')}"
            for name, about in run["targets"].items()
        },
        "Batch plan": f"SHA-256 {run['batches'].get('sha256')}",
        "Answers a verdict": ", ".join(
            f"{NAMES.get(name, name)} {count}" for name, count in run.get("draws", {}).items() if count > 1
        ),
        "Breaks taken back": ", ".join(
            f"{NAMES.get(name, name)} {context} {count}"
            for name, counts in run.get("taken_back", {}).items() for context, count in counts.items()
        ),
        "Versions": ", ".join(f"{name} {version}" for name, version in run.get("packages", {}).items()),
        "Python": run.get("python"),
        "Machine": f"{run.get('device')}, {run.get('platform')}, {run.get('threads')} threads, {run.get('precision')}",
        "Search": _search(run.get("search"), deterministic=bool(run.get("deterministic"))),
        "Commit": f"{git['commit']}{', with changes' if git['dirty'] else ''}" if git else "not in a repository",
        "Time": f"{run['seconds']:.0f} s" if run.get("seconds") is not None else "",
    }  # fmt: skip
    return [(name, str(value)) for name, value in rows.items() if value not in ("", None)]


def _search(search: Mapping[str, Any] | None, *, deterministic: bool) -> str:
    """How points were passed, where that is known."""
    if search is None:
        return ""
    how = f"in {search.get('precision')} (asked for: {search.get('asked')})"
    return f"{how}, deterministic" if deterministic else how


def _files(run: Mapping[str, Any]) -> list[tuple[str, str]]:
    files = dict(run.get("files", {}))
    if run.get("adversarial"):
        files[run["adversarial"]["file"]] = run["adversarial"]["sha256"]
    return sorted(files.items()) + ([("run.json", run["sha256"])] if "sha256" in run else [])
