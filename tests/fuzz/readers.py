"""The readers of files from strangers, each with a valid file to start from and what its reading must hold to."""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image
from records import make_results

from msa_eval.attacks.ball import Ball
from msa_eval.data import load_samples
from msa_eval.defense.architectures import Blueprint
from msa_eval.evidence import archive, gallery
from msa_eval.evidence.proof import Proof
from msa_eval.evidence.results import Results
from msa_eval.hpm.model import HPM
from msa_eval.protocols import load_protocol
from msa_eval.report import page
from msa_eval.targets.checkpoint import load_checkpoint, save_checkpoint

MARK = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'"
"""Text that must not get out of a page as it is."""

Files = Mapping[str, bytes]


@dataclass(frozen=True)
class Reader:
    """What reads a folder of files.

    Attributes:
        valid: files that it takes.
        read: reads them from a folder.
    """

    valid: Callable[[], Files]
    read: Callable[[Path], object]


def _written(write: Callable[[Path], object]) -> Files:
    with TemporaryDirectory() as name:
        folder = Path(name)
        write(folder)
        return {
            str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
        }


def _checkpoint() -> Files:
    blueprint = Blueprint("digits-cnn", {"width": 1}, 2, {"mean": [0.5], "std": [0.5]})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        built = blueprint.build()
        model = HPM(built.trunk, built.fc)
    return _written(lambda folder: save_checkpoint(folder / "a.safetensors", model, blueprint, history={"data": MARK}))


def _npz() -> Files:
    held = io.BytesIO()
    np.savez_compressed(held, x=np.arange(2 * 3 * 4 * 4, dtype=np.uint8).reshape(2, 3, 4, 4), y=np.arange(2))
    return {"a.npz": held.getvalue()}


def _images() -> Files:
    files = {}
    pixels = Image.fromarray(np.arange(6 * 5 * 3, dtype=np.uint8).reshape(6, 5, 3))
    for kind in ("png", "jpeg", "bmp", "gif", "ppm", "tiff", "webp"):
        held = io.BytesIO()
        pixels.save(held, kind)
        files[f"a/{kind}.img"] = held.getvalue()
    return files


def _protocol() -> Files:
    return {"a.toml": load_protocol("digits").text().encode()}


def _evidence() -> Files:
    made = make_results(6, batch=3)
    return _written(made.save)


def _gallery() -> Files:
    rng = np.random.default_rng(0)
    one = gallery.Exhibit(
        "defense", "joint", 1, rng.integers(256, size=(1, 4, 4)).astype(np.uint8),
        rng.random((1, 4, 4)).astype(np.float16), *rng.random((2, 3)).astype(np.float32),
    )  # fmt: skip
    return {"gallery.safetensors": gallery.pack([one, replace(one, index=2)])}


_CLEAN = torch.full((3, 1, 2, 2), 0.5)
_BALL = Ball("Linf", 0.1)


def _archive() -> Files:
    x = (_CLEAN + 0.05).clone()
    proofs = [
        Proof("defense", "joint", 0, "batch", torch.tensor([0, 2]), x),
        Proof("fc", "solo", 0, "rows", torch.tensor([1]), x[:1]),
    ]

    def confirm(proof: Proof) -> torch.Tensor:
        return torch.ones(len(proof.positions), dtype=torch.bool)

    return _written(
        lambda folder: archive.write(folder / "a.safetensors", proofs, lambda _: _CLEAN, _BALL, confirm=confirm)
    )


def _images_of(number: int) -> torch.Tensor:
    return [_CLEAN][number]


class _Tags(HTMLParser):
    """Counts what runs, and refuses what must not be in a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.scripts = 0
        self.feed(text)
        assert self.scripts == 2

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.scripts += tag == "script"
        assert not [name for name, _ in attrs if name.startswith("on")]
        for name, value in attrs:
            if name in ("src", "href"):
                assert str(value).startswith(("data:", "#")), value


def _read_evidence(folder: Path) -> None:
    """Read results and show them; figures are drawn elsewhere, or ten thousand cases would take days."""
    results = Results.load(folder, trimmed=True)
    with patch.object(page, "KINDS", ()):
        text = page.render_page(results)
    _Tags(text)
    text.encode()


READERS = {
    "checkpoint": Reader(_checkpoint, lambda folder: load_checkpoint(folder / "a.safetensors")),
    "npz": Reader(_npz, lambda folder: load_samples(str(folder / "a.npz"))),
    "images": Reader(_images, lambda folder: load_samples(str(folder)).x),
    "protocol": Reader(_protocol, lambda folder: load_protocol(folder / "a.toml")),
    "evidence": Reader(_evidence, _read_evidence),
    "archive": Reader(_archive, lambda folder: archive.read(folder / "a.safetensors", _images_of, _BALL)),
    "gallery": Reader(_gallery, lambda folder: gallery.read(folder / "gallery.safetensors")),
}


@cache
def valid(name: str) -> Files:
    """The valid files of a reader."""
    return dict(READERS[name].valid())


def pack_header(header: object, tensors: bytes) -> bytes:
    """A safetensors file of any header."""
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + tensors
