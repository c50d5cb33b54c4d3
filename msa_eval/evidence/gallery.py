"""The gallery: a few broken samples as pictures with the target's answers: a page needs neither model nor data.

One small safetensors file beside the tables. Images are kept as 8-bit pixels and perturbations in half precision, to be
looked at; the proofs are in the archive. Nothing is unpickled.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as save_tensors

from msa_eval.evidence.folder import GALLERY
from msa_eval.hashing import file_hash
from msa_eval.untrusted import check_inside, printable

LIMIT = 12
"""So many samples are shown at most."""


CHANNELS = (1, 3)


FORMAT_VERSION = 1


LARGEST_BYTES = 100_000_000
"""A larger file is none of ours."""


@dataclass(frozen=True)
class Exhibit:
    """A broken sample as it is shown.

    Attributes:
        target: ``defense`` or ``fc``.
        context: what the attacker controls.
        index: in the data set.
        clean: its pixels ``(C, H, W)``, 8 bits.
        delta: the perturbation ``(C, H, W)``, in pixel units of [0, 1].
        clean_logits: the target's answer in its clean batch ``(k,)``; of HPM, minus the distances to the prototypes.
        logits: its answer in the adversarial batch ``(k,)``.
    """

    target: str
    context: str
    index: int
    clean: npt.NDArray[np.uint8]
    delta: npt.NDArray[np.float16]
    clean_logits: npt.NDArray[np.float32]
    logits: npt.NDArray[np.float32]


def pack(exhibits: Sequence[Exhibit]) -> bytes:
    """The file's content; the same exhibits give the same bytes."""
    entries = [{"target": one.target, "context": one.context, "index": one.index} for one in exhibits]
    names = ("clean", "delta", "clean_logits", "logits")
    tensors = {name: np.stack([getattr(one, name) for one in exhibits]) for name in names}
    about = {"format_version": FORMAT_VERSION, "exhibits": entries}
    return bytes(save_tensors(tensors, metadata={"gallery": json.dumps(about)}))


def of_results(folder: str | Path, files: Mapping[str, Any]) -> list[Exhibit]:
    """The gallery of the results in a folder; none where they kept none.

    Args:
        folder: of the results.
        files: SHA-256 by file, as their run.json has it.

    Raises:
        ValueError: when it is missing, not the one that run.json lists, or no gallery.
    """
    path = Path(folder) / GALLERY
    if not path.is_file():
        if GALLERY in files:
            raise ValueError(f"{GALLERY}, which run.json lists, is missing")
        return []
    if files.get(GALLERY) != file_hash(check_inside(path, path.parent)):
        raise ValueError(f"{GALLERY} is not of these results: it does not match the hash in run.json")
    return read(path)


def read(path: str | Path) -> list[Exhibit]:
    """Read a gallery; the file is taken for hostile.

    Raises:
        ValueError: when it is no gallery of this format.
    """
    path = Path(path)
    try:
        if path.stat().st_size > LARGEST_BYTES:
            raise ValueError("it is too large for a gallery")
        with safe_open(path, framework="np") as opened:
            return _exhibits(opened)
    except (SafetensorError, OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
        raise ValueError(f"{path.name} is not a readable gallery: {printable(error)}") from error


def _exhibits(opened: Any) -> list[Exhibit]:
    about = json.loads((opened.metadata() or {}).get("gallery", "null"))
    if not isinstance(about, dict) or about.get("format_version") != FORMAT_VERSION:
        raise ValueError(f"expected a gallery of format version {FORMAT_VERSION}")
    types = {"clean": "U8", "delta": "F16", "clean_logits": "F32", "logits": "F32"}
    if set(opened.keys()) != set(types) or any(opened.get_slice(n).get_dtype() != t for n, t in types.items()):
        raise ValueError(f"expected the tensors {', '.join(f'{name} ({kind})' for name, kind in types.items())}")
    tensors = {name: opened.get_tensor(name) for name in types}
    entries = about["exhibits"]
    n, images, logits = len(entries), tensors["clean"].shape, tensors["logits"].shape
    fits = tensors["delta"].shape == images and tensors["clean_logits"].shape == logits
    if not fits or len(images) != 4 or len(logits) != 2 or images[0] != n or logits[0] != n or n > LIMIT:
        raise ValueError(f"expected images and logits of at most {LIMIT} samples that fit together")
    if images[1] not in CHANNELS or 0 in images or logits[1] < 1:
        raise ValueError(f"expected images of one or three channels, but got shape {images}")
    if not np.isfinite(tensors["delta"]).all():
        raise ValueError("a perturbation is not finite")
    if any(type(entry["index"]) is not int for entry in entries):
        raise ValueError("an index is no whole number")
    rows = zip(entries, *(tensors[name] for name in types), strict=True)
    return [Exhibit(str(entry["target"]), str(entry["context"]), entry["index"], *row) for entry, *row in rows]
