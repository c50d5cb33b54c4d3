"""The page: one file with all there is to see of an evaluation, made from its evidence alone."""

from __future__ import annotations

import base64
import hashlib
import io
import itertools
import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd
from markupsafe import Markup
from PIL import Image

import msa_eval
from msa_eval.protocols import gallery
from msa_eval.protocols.evidence import GALLERY, PAGE, Results
from msa_eval.report import frames
from msa_eval.report.charts import Chart, charts, percent
from msa_eval.report.comparison import points, told_p
from msa_eval.report.inline import csv_link, inline_svg, script_json
from msa_eval.report.style import NAMES
from msa_eval.report.text import METRICS

MEANINGS = {
    "clean": "on the clean batch",
    "paper": "on the final batch of the run that leaves the fewest right: the paper's number",
    "realised": "on the one adversarial batch that leaves the fewest of its batch right",
    "worst_case": "in every verified batch",
}
CONTEXTS = {
    "joint": ("every image of the batch", "some adversarial batch makes the target wrong on it"),
    "solo": ("the one image, among clean companions", "replacing it alone makes the target wrong on it"),
    "alone": ("the one image, in a batch of one", "the target is wrong on it"),
    "composed": ("the one image, and which clean images of a pool sit beside it", "some such batch makes it wrong"),
}
VERDICTS = {
    "sound": "No sign was found that these numbers should not be believed.",
    "suspect": "There are signs that these numbers may be too high.",
    "unreliable": "These numbers should not be believed.",
    "incomplete": "Something failed, so what was not broken is not known to be robust.",
}
SECTIONS = (
    ("verdict", "Verdict"), ("waterfall", "Waterfall"), ("transfer", "Surrogates"), ("spending", "Passes"),
    ("classes", "Classes"), ("agreement", "Agreement"), ("gallery", "Broken samples"), ("batches", "Batches"),
    ("samples", "Samples"), ("provenance", "Provenance"),
)  # fmt: skip
SHOWN, EXACT = 128, 64
"""Pictures are scaled down to so many pixels; small ones are shown pixel by pixel."""

LISTED = 100
"""So many samples are listed of those that one run alone broke; the rest is in the data."""


def write_page(folder: str | Path, out: str | Path | None = None) -> Path:
    """Write the page of the results in a folder; the same evidence gives the same bytes.

    Args:
        folder: of the results.
        out: the file; ``report.html`` in the folder by default.

    Raises:
        ValueError: when there are no complete results, or ``out`` is no place for a page.
        OSError: when the file can't be written.
    """
    folder = Path(folder)
    path = check_page(folder / PAGE if out is None else Path(out))
    results = Results.load(folder)
    pictures: Sequence[gallery.Exhibit] | str = "This run kept no pictures."
    try:
        pictures = gallery.of_results(folder, results.run.get("files", {})) or pictures
    except ValueError as error:
        pictures = f"There are no pictures: {error}."
    write_whole(path, render_page(results, pictures))
    return path


def check_page(path: Path) -> Path:
    """A place for a page, which must not be that of something else.

    Raises:
        ValueError: when it is a folder, or no HTML file by its name.
    """
    if path.is_dir():
        raise ValueError(f"{path} is a folder; give the page a file's name")
    if path.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"{path} is no name of a page; choose one that ends in .html")
    return path


def write_whole(path: Path, text: str) -> None:
    """Write a file that appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".part")
    try:
        partial.write_text(text, encoding="utf-8", newline="\n")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def render_page(results: Results, pictures: Sequence[gallery.Exhibit] | str = "This run kept no pictures.") -> str:
    """The page as HTML.

    Args:
        results: of an evaluation.
        pictures: of broken samples, or why there are none.
    """
    run = results.run
    targets = frames.targets_of(results)
    protocol = run["protocol"]
    script = source("samples.js")
    plan, found_in = results.batches.groupby("batch").size(), frames.contexts_of(results)
    return render(
        "report.jinja",
        title=f"{_kind(run)} on {run['data']['name']}, protocol {protocol['name']}",
        subtitle=describe(results),
        sections=SECTIONS,
        targets=targets,
        verdicts=[_verdict(results, target) for target in reversed(targets)],
        headlines=_headlines(results, targets),
        headline_told=_headline_told(results, targets),
        numbers=[_numbers(results, context, metric) for context, metric in itertools.product(found_in, METRICS)],
        n=run["data"]["n"],
        signs=results.audit.to_dict(orient="records"),
        figures=sections_of(charts(results)),
        only_one=[_only_one(results, context) for context in found_in],
        gallery=_gallery(results, pictures),
        plan=f"{len(results.batches)} samples sit in {len(plan)} batches of {_range(plan)}, the same for every run.",
        batches_csv=csv_link(results.batches),
        contexts=[(context, *CONTEXTS.get(context, ("", ""))) for context in found_in],
        samples_json=script_json(_samples(results)),
        script=Markup(script),
        script_hash=Markup(f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"),
        protocol=protocol,
        provenance=_provenance(run),
        command=shlex.join(str(part) for part in run.get("command", [])),
        files=_files(run),
    )  # fmt: skip


def render(template: str, **values: Any) -> str:
    """Fill in a template of this package; all that is not markup already is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("msa_eval.report"), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    environment.filters |= {"percent": percent, "short": short, "points": points, "told_p": told_p}
    shared = {"css": Markup(source("style.css")), "names": NAMES, "version": msa_eval.__version__, "script_hash": ""}
    return environment.get_template(template).render(shared | values)


def short(value: float) -> str:
    """A logit or a distance in as few digits as tell it apart.

    >>> short(13.04), short(9.634), short(-0.5)
    ('13.0', '9.63', '-0.50')
    """
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def source(name: str) -> str:
    """The text of a file beside the templates."""
    return (Path(__file__).parent / "templates" / name).read_text(encoding="utf-8")


def sections_of(listed: Iterable[Chart]) -> list[dict[str, Any]]:
    """The figures kind by kind, drawn."""
    sections: list[dict[str, Any]] = []
    for kind, group in itertools.groupby(listed, key=lambda chart: chart.kind):
        together = list(group)
        drawn = [
            {"name": one.name, "title": one.title, "label": one.context, "csv": csv_link(one.data),
             "svg": inline_svg(one.figure(), one.name, f"{one.title}, {one.context}. {one.alt}")}
            for one in together
        ]  # fmt: skip
        sections.append({"kind": kind, "title": together[0].title, "caption": together[0].caption, "charts": drawn})
    return sections


def describe(results: Results) -> str:
    """What was evaluated, in a line."""
    run, protocol = results.run, results.run["protocol"]
    changed = ", modified" if protocol["modified"] else ""
    return (
        f"{_kind(run)} under protocol {protocol['name']} v{protocol['version']}{changed}, {run['data']['n']} samples "
        f"of {run['data']['name']} in {run['batches']['count']} batches, seed {run['seed']}"
    )


def _kind(run: Mapping[str, Any]) -> str:
    return str(run["targets"]["defense"].get("type", "defence"))


def _verdict(results: Results, target: str) -> dict[str, Any]:
    about = results.run.get("verdicts", {}).get(target)
    if about is None:
        verdict, reasons = str(results.run.get("verdict", "not audited")), []
    else:
        verdict, reasons = about["verdict"], list(about["reasons"])
    told = VERDICTS.get(verdict, "Nobody looked for signs that these numbers should not be believed.")
    if len(results.audit):
        fired = results.audit[(results.audit["target"] == target) & results.audit["fired"].astype(bool)]
        told_by = [f"{row['reason']} ({row['severity']})" for row in fired.to_dict(orient="records")] or reasons
        failed = reasons if verdict == "incomplete" else []
        reasons = [reason for reason in failed if not any(one.startswith(reason) for one in told_by)] + told_by
    return {"verdict": verdict, "told": f"{NAMES[target].capitalize()}: {told}" if target == "defense" else
            f"{NAMES[target]}: {told}", "reasons": reasons}  # fmt: skip


def _numbers(results: Results, context: str, metric: str) -> tuple[str, str, list[tuple[str, pd.Series]], str]:
    """A row of the table of numbers: each target's, and when a sample counts as right."""
    cells = [(target, frames.number(results, target, context, metric)) for target in frames.targets_of(results)]
    own = metric == "realised" and context != "joint"
    return context, metric, cells, "in every verified batch: each sample has its own" if own else MEANINGS[metric]


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


def _headline_told(results: Results, targets: Sequence[str]) -> str:
    context = frames.contexts_of(results)[0]

    def told(target: str) -> str:
        clean, worst, paper = (
            frames.number(results, target, context, metric)["value"] for metric in ("clean", "worst_case", "paper")
        )
        less = f"{100 * (paper - worst):.1f} points less than" if paper > worst else "as"
        return (
            f"Of the {NAMES[target]}'s {percent(clean)} % on clean batches {percent(worst)} % are left in the worst "
            f"case, {less} the paper's number ({percent(paper)} %) says."
        )

    return " ".join(told(target) for target in reversed(targets))


def _only_one(results: Results, context: str) -> dict[str, Any]:
    table = frames.only_one(results, context)
    runs = [
        (target, run, list(rows["index"])[:LISTED], max(len(rows) - LISTED, 0))
        for (target, run), rows in table.groupby(["target", "run"], sort=False)
    ]
    return {"context": context, "count": len(table), "runs": runs, "csv": csv_link(table)}


def _range(sizes: pd.Series) -> str:
    low, high = int(sizes.min()), int(sizes.max())
    return str(low) if low == high else f"{low} to {high}"


def _samples(results: Results) -> dict[str, Any]:
    """What the sample table shows, compactly: what is the same for all targets and contexts stands once."""
    fates = ["robust", "broken", "wrong on clean"]
    names: dict[str, int] = {}
    seats = results.samples.drop_duplicates("index").reset_index(drop=True)
    everybody = list(seats["index"])
    place = {index: at for at, index in enumerate(seats["index"])}
    parts = []
    for (target, context), rows in results.samples.groupby(["target", "context"], sort=False):
        counts = frames.breakers(results, str(target), str(context)).sum(axis=1)
        right, robust = rows["clean_correct"].astype(bool), rows["robust"].astype(bool)
        by = [None if pd.isna(name) or name == "clean" else str(name) for name in rows["broken_by"]]
        parts.append(
            {
                "target": target, "context": context,
                "place": None if list(rows["index"]) == everybody else [place[index] for index in rows["index"]],
                "prediction": [int(value) for value in rows["clean_prediction"]],
                "fate": "".join("2" if not ok else "10"[holds] for ok, holds in zip(right, robust, strict=True)),
                "by": [-1 if name is None else names.setdefault(name, len(names)) for name in by],
                "at": [None if pd.isna(value) else int(value) for value in rows["broken_at"]],
                "runs": [int(counts[index]) if index in counts.index else None for index in rows["index"]],
                "margin": [float(f"{value:.3g}") for value in rows["min_margin"]],
            }
        )  # fmt: skip
    columns = {name: seats[name].tolist() for name in ("index", "label", "batch", "position")}
    return columns | {"fates": fates, "names": list(names), "parts": parts}


def _gallery(results: Results, pictures: Sequence[gallery.Exhibit] | str) -> dict[str, Any]:
    if isinstance(pictures, str):
        return {"exhibits": [], "told": pictures}
    shown, table = [], []
    distances = _distances(results.run, pictures)
    for one in pictures:
        rows = frames.pick(results.samples, one.target, one.context)
        rows = rows[rows["index"] == one.index]
        if rows.empty:
            return {"exhibits": [], "told": f"There are no pictures: {GALLERY} is not of these results."}
        exhibit = _exhibit(one, rows.iloc[0], distances=distances)
        shown.append(exhibit)
        table += [
            {"target": one.target, "context": one.context, "index": one.index, "label": exhibit["label"],
             "unit": exhibit["unit"], "class": row["class"], "clean": row["clean"], "adversarial": row["adversarial"]}
            for row in exhibit["rows"]
        ]  # fmt: skip
    told = (
        f"{len(shown)} of the broken samples of the first batches, spread over classes and runs: the original, one "
        "adversarial image that breaks it in its adversarial batch, and their difference, scaled up (grey: no change). "
        + ("Distances are to the prototypes of each batch: the smallest decides." if distances
           else "The largest logit decides.")
    )  # fmt: skip
    return {"exhibits": shown, "told": told, "csv": csv_link(pd.DataFrame(table))}


def _distances(run: Mapping[str, Any], pictures: Sequence[gallery.Exhibit]) -> bool:
    """Whether logits are minus the distances to prototypes, as HPM's are."""
    negative = all((one.logits <= 0).all() and (one.clean_logits <= 0).all() for one in pictures)
    return negative and all(run["targets"].get(one.target, {}).get("type") == "HPM" for one in pictures)


def _exhibit(one: gallery.Exhibit, row: pd.Series, *, distances: bool) -> dict[str, Any]:
    sign = -1 if distances else 1
    label, found = row["label"], int(one.logits.argmax())
    likely = np.argsort(-one.logits, kind="stable")[:8]
    own = {int(label)} if isinstance(label, int | np.integer) and 0 <= label < len(one.logits) else set()
    classes = range(len(one.logits)) if len(one.logits) <= 10 else sorted(own | {int(c) for c in likely})
    delta = one.delta.astype(np.float64)
    clean = one.clean / 255
    largest = max(float(np.abs(delta).max()), 1e-12)
    views = (
        ("original", clean), ("adversarial", (clean + delta).clip(0, 1)),
        (f"difference × {0.5 / largest:.2g}", 0.5 + delta * (0.5 / largest)),
    )  # fmt: skip
    return {
        "index": one.index, "label": label, "found": found, "target": one.target, "context": one.context,
        "batch": int(row["batch"]), "run": row["broken_by"], "clean": int(one.clean_logits.argmax()),
        "iterate": None if pd.isna(row["broken_at"]) else int(row["broken_at"]),
        "unit": "Distance to the prototype" if distances else "Logit",
        "pictures": [_picture(pixels, title, one.index) for title, pixels in views],
        "rows": [
            {"name": f"{c}{' (label)' if c == label else ' (answer)' if c == found else ''}",
             "class": int(c), "marked": c in (label, found), "clean": sign * float(one.clean_logits[c]),
             "adversarial": sign * float(one.logits[c])}
            for c in classes
        ],
    }  # fmt: skip


def _picture(pixels: np.ndarray[Any, np.dtype[Any]], title: str, index: int) -> dict[str, Any]:
    """An image ``(C, H, W)`` in [0, 1] for the page."""
    bytes_of = np.round(pixels * 255).clip(0, 255).astype(np.uint8)
    image = Image.fromarray(bytes_of[0] if len(bytes_of) == 1 else np.ascontiguousarray(bytes_of.transpose(1, 2, 0)))
    exact = max(image.size) <= EXACT
    image.thumbnail((SHOWN, SHOWN))
    buffer = io.BytesIO()
    if exact:
        image.save(buffer, "PNG", optimize=True)
    else:
        image.save(buffer, "JPEG", quality=80)
    return {
        "title": title, "alt": f"sample {index}, {title}", "exact": exact, "width": image.width, "height": image.height,
        "type": "image/png" if exact else "image/jpeg", "content": base64.b64encode(buffer.getvalue()).decode(),
    }  # fmt: skip


def _provenance(run: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What stands in run.json and says where the results come from."""
    git = run.get("git")
    rows = {
        "Protocol's changes": ", ".join(f"{k} = {json.dumps(v)}" for k, v in run["protocol"]["overrides"].items()),
        "Seed": run.get("seed"),
        "Data": f"{run['data']['name']}, SHA-256 {run['data']['sha256']}",
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
        "Commit": f"{git['commit']}{', with changes' if git['dirty'] else ''}" if git else "not in a repository",
        "Time": f"{run['seconds']:.0f} s" if run.get("seconds") is not None else "",
    }  # fmt: skip
    return [(name, str(value)) for name, value in rows.items() if value not in ("", None)]


def _files(run: Mapping[str, Any]) -> list[tuple[str, str]]:
    files = dict(run.get("files", {}))
    if run.get("adversarial"):
        files[run["adversarial"]["file"]] = run["adversarial"]["sha256"]
    return sorted(files.items()) + ([("run.json", run["sha256"])] if "sha256" in run else [])
