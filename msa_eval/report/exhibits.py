"""The gallery as a page shows it: pictures of broken samples with the target's answers."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from msa_eval.evidence import gallery
from msa_eval.evidence.folder import GALLERY
from msa_eval.evidence.results import Results
from msa_eval.report import frames
from msa_eval.report.inline import csv_link
from msa_eval.report.style import NAMES

SHOWN, EXACT = 128, 64
"""Pictures are scaled down to so many pixels; small ones are shown pixel by pixel."""

NONE = "This run kept no pictures."
Pictures = Sequence[gallery.Exhibit] | str
"""Of broken samples, or why there are none."""


def pictures_of(folder: Path, results: Results) -> Pictures:
    """The pictures that the results in a folder kept."""
    try:
        return gallery.of_results(folder, results.run.get("files", {})) or NONE
    except ValueError as error:
        return f"There are no pictures: {error}."


def exhibits(
    results: Results, pictures: Pictures, *, limit: int = gallery.LIMIT, others: Mapping[str, Results] | None = None
) -> dict[str, Any]:
    """The gallery of an evaluation as a page shows it.

    Args:
        results: of the evaluation.
        pictures: of broken samples, or why there are none.
        limit: so many are shown at most.
        others: evaluations by name of which each exhibit says what became of the sample there.

    Returns:
        ``exhibits``, a ``sentence`` on them all, and their data as ``csv``; without exhibits ``sentence`` says why.
    """
    if isinstance(pictures, str):
        return {"exhibits": [], "sentence": pictures}
    shown, table = [], []
    distances = _distances(results.run, pictures)
    for one in pictures[:limit]:
        rows = frames.pick(results.samples, one.target, one.context)
        rows = rows[rows["index"] == one.index]
        if rows.empty:
            return {"exhibits": [], "sentence": f"There are no pictures: {GALLERY} is not of these results."}
        exhibit = _exhibit(one, rows.iloc[0], distances=distances)
        exhibit["elsewhere"] = [(name, _fate(other, one)) for name, other in (others or {}).items()]
        shown.append(exhibit)
        table += [
            {"target": one.target, "context": one.context, "index": one.index, "label": exhibit["label"],
             "unit": exhibit["unit"], "class": row["class"], "clean": row["clean"], "adversarial": row["adversarial"]}
            for row in exhibit["rows"]
        ]  # fmt: skip
    described = (
        f"{len(shown)} of the broken samples of the first batches, spread over classes and runs: the original, one "
        "adversarial image that breaks it in its adversarial batch, and their difference, scaled up (grey: no change). "
        + ("Distances are to the prototypes of each batch: the smallest decides." if distances
           else "The largest logit decides.")
    )  # fmt: skip
    return {"exhibits": shown, "sentence": described, "csv": csv_link(pd.DataFrame(table))}


def _fate(results: Results, one: gallery.Exhibit) -> str:
    rows = frames.pick(results.samples, one.target, one.context)
    rows = rows[rows["index"] == one.index]
    if rows.empty:
        return "not evaluated"
    row = rows.iloc[0]
    if not row["clean_correct"]:
        return "wrong on clean"
    return "robust" if row["robust"] else f"broken by {row['broken_by']}"


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
        "index": one.index, "label": label, "found": found, "who": NAMES.get(one.target, one.target),
        "context": one.context, "batch": int(row["batch"]), "run": row["broken_by"],
        "clean": int(one.clean_logits.argmax()),
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
