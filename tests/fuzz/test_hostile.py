"""What fuzzing would hardly come upon: links out of the folder, sizes that lie, and code in places for data."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fuzz.mutations import Payload
from fuzz.readers import READERS, pack_header, valid
from PIL import Image
from records import make_results

from msa_eval.data import load_samples
from msa_eval.defense.architectures import Blueprint
from msa_eval.evidence import gallery
from msa_eval.evidence.folder import GALLERY
from msa_eval.evidence.results import Results
from msa_eval.targets.checkpoint import load_checkpoint


@pytest.mark.parametrize("name", ["run.json", "samples.csv", "outcomes.csv"])
def test_results_are_not_read_through_links_that_lead_out(name: str, tmp_path: Path) -> None:
    for folder in ("mine", "theirs"):
        make_results().save(tmp_path / folder)
    (tmp_path / "theirs" / name).unlink()
    (tmp_path / "theirs" / name).symlink_to(tmp_path / "mine" / name)
    with pytest.raises(ValueError, match=f"{name} is a link that leads out"):
        Results.load(tmp_path / "theirs", trimmed=True)
    (tmp_path / "theirs" / "copy").write_bytes((tmp_path / "mine" / name).read_bytes())
    (tmp_path / "theirs" / name).unlink()
    (tmp_path / "theirs" / name).symlink_to("copy")
    assert len(Results.load(tmp_path / "theirs").samples)  # within the folder it is fine
    (tmp_path / "linked").symlink_to(tmp_path / "theirs")
    assert len(Results.load(tmp_path / "linked").samples)  # and so is a link to the folder that was given


def test_a_gallery_is_not_read_through_a_link_that_leads_out(tmp_path: Path) -> None:
    (tmp_path / "g").write_bytes(b"")
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / GALLERY).symlink_to(tmp_path / "g")
    with pytest.raises(ValueError, match="leads out"):
        gallery.of_results(tmp_path / "r", {})


@pytest.mark.parametrize("whole", [False, True])
def test_images_are_not_read_through_links_that_lead_out(whole: bool, tmp_path: Path) -> None:
    (tmp_path / "secret").mkdir()
    Image.new("L", (4, 4)).save(tmp_path / "secret/a.png")
    given = tmp_path / "given"
    given.mkdir()
    if whole:
        (given / "a").symlink_to(tmp_path / "secret")
    else:
        (given / "a").mkdir()
        (given / "a/a.png").symlink_to(tmp_path / "secret/a.png")
    with pytest.raises(ValueError, match="is a link that leads out of"):
        load_samples(str(given))


def test_a_pipe_among_images_does_not_hang(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    os.mkfifo(tmp_path / "a/p.png")
    with pytest.raises(ValueError, match="it is no file"):
        load_samples(str(tmp_path)).digest()


@pytest.mark.parametrize("kind", ["eps", "pcx"])
def test_other_formats_are_not_read_as_some_start_programs(kind: str, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    Image.new("L", (4, 4)).save(tmp_path / f"a/a.{kind}")
    with pytest.raises(ValueError, match="not a readable image"):
        load_samples(str(tmp_path)).digest()


def test_an_image_that_unpacks_to_too_much_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    Image.new("1", (20_000, 20_000)).save(tmp_path / "a/a.png")
    with pytest.raises(ValueError, match=r"not a readable image: .*decompression bomb"):
        load_samples(str(tmp_path)).digest()


def _npy(shape: tuple[int, ...], content: bytes) -> bytes:
    held = io.BytesIO()
    np.lib.format.write_array_header_1_0(held, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return held.getvalue() + content


def _zip(path: Path, members: dict[str, bytes], packed: int = zipfile.ZIP_DEFLATED) -> None:
    with zipfile.ZipFile(path, "w", packed) as made:
        for name, content in members.items():
            made.writestr(name, content)


@pytest.mark.parametrize("shape", [(2**20, 3, 32, 32), (2**40, 3, 32, 32), (2**62, 2**62, 3, 3)])
def test_an_array_that_states_more_than_it_has_is_refused(shape: tuple[int, ...], tmp_path: Path) -> None:
    _zip(tmp_path / "a.npz", {"x.npy": _npy(shape, b"\0" * 100), "y.npy": _npy((1,), b"\0")})
    with pytest.raises(ValueError, match=r"x\.npy can't hold an array of shape"):
        load_samples(str(tmp_path / "a.npz"))


def test_a_member_that_states_more_than_can_be_packed_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    _zip(path, {"x.npy": _npy((1, 1, 4, 4), b"\0" * 16), "y.npy": _npy((1,), b"\0")})
    content = path.read_bytes()
    place = content.index(b"PK\x01\x02")
    path.write_bytes(content[: place + 24] + struct.pack("<I", 2**32 - 2) + content[place + 28 :])
    with pytest.raises(ValueError, match=r"x\.npy can't hold the 4294967294 bytes that it says"):
        load_samples(str(path))
    _zip(path, {"x.npy": _npy((1, 1, 4, 4), b"\0" * 16), "y.npy": _npy((1,), b"\0")}, zipfile.ZIP_BZIP2)
    with pytest.raises(ValueError, match="in a way that numpy does not"):
        load_samples(str(path))


def _described(**blueprint: Any) -> bytes:
    (content,) = valid("checkpoint").values()
    (size,) = struct.unpack_from("<Q", content)
    header = json.loads(content[8 : 8 + size])
    about = json.loads(header["__metadata__"]["about"])
    about["blueprint"] |= blueprint
    header["__metadata__"]["about"] = json.dumps(about)
    return pack_header(header, content[8 + size :])


@pytest.mark.parametrize(
    "blueprint",
    [
        {"arguments": {"width": 2**20}}, {"num_classes": 2**40}, {"architecture": "os:system"},
        {"architecture": "wideresnet", "arguments": {"depth": 6 * 10**8 + 4, "width": 1}},
        {"architecture": "wideresnet", "arguments": {"depth": 10, "width": 10**6}},
    ],
    ids=str,
)  # fmt: skip
def test_a_description_takes_no_memory_that_the_file_does_not_fill(
    blueprint: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.safetensors").write_bytes(_described(**blueprint))
    build, devices = Blueprint.build, []

    def watched(self: Blueprint) -> Any:
        made = build(self)
        devices.append(next(made.parameters()).device.type)
        return made

    monkeypatch.setattr(Blueprint, "build", watched)
    with pytest.raises(ValueError, match="does not fit its own description"):
        load_checkpoint(tmp_path / "a.safetensors")
    assert "cpu" not in devices
    (tmp_path / "a.safetensors").write_bytes(_described())
    load_checkpoint(tmp_path / "a.safetensors")
    assert devices[-1] == "cpu"


@pytest.mark.parametrize("name", READERS)
def test_pickles_are_not_loaded(name: str, tmp_path: Path) -> None:
    for path in valid(name):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_bytes(pickle.dumps(Payload(str(tmp_path / "run"))))
    with pytest.raises(ValueError, match=r"\w") as found:
        READERS[name].read(tmp_path)
    assert not (tmp_path / "run").exists()
    assert str(found.value).isprintable()


def test_arrays_of_objects_are_not_loaded(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.array([Payload(str(tmp_path / "run"))], dtype=object), y=np.zeros(1, dtype=int))
    with pytest.raises(ValueError, match="not a readable"):
        load_samples(str(tmp_path / "a.npz"))
    assert not (tmp_path / "run").exists()


def test_the_payload_would_run(tmp_path: Path) -> None:
    """Or the tests above would prove nothing."""
    pickle.loads(pickle.dumps(Payload(str(tmp_path / "run"))))
    assert (tmp_path / "run").exists()
