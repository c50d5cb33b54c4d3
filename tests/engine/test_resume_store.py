"""Units on disk, and the lock of the folder they are in."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from msa_eval.attacks.batch import AdversarialBatch
from msa_eval.engine.resume import ResumeStore, opened
from msa_eval.engine.serialization import pack, unpack
from msa_eval.evidence.diff import differences
from msa_eval.evidence.folder import HOLDER, LOCK
from msa_eval.judging.outcomes import BreakingBatch

ABOUT = {"key": "k", "seed": 0, "protocol": {"name": "small", "text": "[attack]\nsteps = 3\n"}}


def _opened(out: Path, notes: list[str] | None = None, *, force: bool = False, where: Any = None, **about: Any) -> Any:
    notify = (lambda _: None) if notes is None else notes.append
    return opened(
        out, ABOUT | about, options={}, where=where or {"python": "3"}, force=force, device="cpu", notify=notify
    )


def _dead() -> int:
    """The number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_what_is_packed_comes_back() -> None:
    """Tensors that share memory, parts of tensors, none at all, and every type in use."""
    whole = torch.rand(4, 3, 2, 2)
    value = (
        AdversarialBatch(whole, whole[:, 0]), BreakingBatch(torch.tensor([True, False]), whole, None),
        whole.detach(), whole.view(48),
        whole.transpose(0, 1), torch.zeros(0, 3), torch.tensor(7), torch.tensor(float("nan")), 3, 0.1, "text", None, (),
    )  # fmt: skip
    found = unpack(b"".join(pack(value)))
    assert isinstance(found[0], AdversarialBatch)
    assert torch.equal(found[0].z, whole[:, 0])
    assert found[1].own is None
    assert found[2] is found[1].x  # kept once
    for one, other in zip(value[2:7], found[2:7], strict=True):
        assert torch.equal(one, other)  # type: ignore[arg-type]
        assert one.dtype == other.dtype  # type: ignore[union-attr]
    assert found[7].isnan()
    assert found[8:] == value[8:]
    assert len(pack((whole, whole.detach()))[1]) == len(pack(whole)[1])


def test_nothing_else_is_packed() -> None:
    with pytest.raises(TypeError, match="a set can't be packed"):
        pack({1})
    with pytest.raises(TypeError, match="a Path can't be packed"):
        pack((Path(),)) if type(Path()) is Path else pack((type("Path", (), {})(),))


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200), st.binary(max_size=200))
def test_bytes_that_were_never_packed_are_refused(line: bytes, rest: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        unpack(b'{"record": "Point"}\n' + rest)
    for content in (line + b"\n" + rest, line + b"\n" + pack(())[1]):
        try:
            found = unpack(content)
        except ValueError:
            continue
        assert repr(unpack(b"".join(pack(found)))) == repr(found)  # a number, a text: nothing to build


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 8 * 2**20 - 1))
def test_a_unit_with_any_one_bit_changed_is_not_read(tmp_path_factory: pytest.TempPathFactory, drawn: int) -> None:
    folder = tmp_path_factory.mktemp("units")
    notes: list[str] = []
    kept = ResumeStore(folder, "k", notify=notes.append)
    kept.write("a-0", (torch.arange(5), "text"))
    path = folder / "a-0.unit"
    content = bytearray(path.read_bytes())
    bit = drawn % (8 * len(content))  # its length depends on how the time in it is written
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(bytes(content))
    assert kept.read("a-0", tuple) is None
    assert len(notes) == 1
    assert "is damaged" in notes[0]


def test_a_unit_that_says_strange_things_is_not_read(tmp_path: Path) -> None:
    """Its checksum is right."""
    notes: list[str] = []
    kept = ResumeStore(tmp_path, "k", notify=notes.append)
    bodies = [b"[]\n{}", b"{}\n{}", b"null\nnull", b"\xff\n", b'{"key": "k", "unit": "a-0"}\n1\n', b"[" * 9999 + b"\n"]
    for body in bodies:
        (tmp_path / "a-0.unit").write_bytes(hashlib.sha256(body).hexdigest().encode() + b"\n" + body)
        assert kept.read("a-0", tuple) is None
    assert len(notes) == len(bodies)


def test_a_failed_write_leaves_the_old_unit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = ResumeStore(tmp_path, "k")
    kept.write("a-0", 1)

    def full(number: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        OSError, match=r"could not write .*a-0\.unit: No space left on device; free some space; the units"
    ):
        kept.write("a-0", 2)
    assert kept.read("a-0", int) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["a-0.unit"]


def test_a_unit_is_synced_before_it_takes_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    fsync = os.fsync

    def watched(number: int) -> None:
        fsync(number)
        seen.append(sorted(path.name for path in tmp_path.iterdir()))

    monkeypatch.setattr(os, "fsync", watched)
    ResumeStore(tmp_path, "k").write("a-0", 1)
    assert seen == [["a-0.unit.part"]]


def test_without_a_folder_nothing_is_kept() -> None:
    kept = ResumeStore()
    kept.write("a-0", {1})  # not even packed
    assert kept.read("a-0", tuple) is None
    assert kept.names() == set()
    kept.drop("a-0")
    kept.finish()


def test_a_folder_without_finished_units_is_left_as_it_was(tmp_path: Path) -> None:
    with _opened(tmp_path / "r"):
        assert (tmp_path / "r" / ".lock").exists()
    assert list((tmp_path / "r").iterdir()) == []


def test_one_at_a_time(tmp_path: Path) -> None:
    message = rf"in use by process {os.getpid()} on {platform.node()}; wait until it ends"
    with _opened(tmp_path) as kept:
        kept.write("a-0", 1)
        for force in (False, True):
            with pytest.raises(ValueError, match=message), _opened(tmp_path, force=force):
                pass
    notes: list[str] = []
    with _opened(tmp_path, notes) as kept:
        assert kept.read("a-0", int) == 1
    assert notes == []


@pytest.mark.parametrize("locks", [True, False])
def test_the_lock_of_a_process_that_has_ended_is_taken_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, locks: bool
) -> None:
    """Also on a file system that has no locks."""
    if not locks:
        _without_locks(monkeypatch)
    pid = _dead()
    (tmp_path / HOLDER).write_text(f"{pid}\n{platform.node()}\n")
    notes: list[str] = []
    with _opened(tmp_path, notes):
        assert (tmp_path / HOLDER).read_text().startswith(f"{os.getpid()}\n")
    assert notes == [f"took over the lock of process {pid} on {platform.node()}, which has ended"]
    assert list(tmp_path.glob(".lock*")) == []


def test_the_operating_system_knows_that_a_process_elsewhere_has_ended(tmp_path: Path) -> None:
    (tmp_path / HOLDER).write_text(f"{os.getpid()}\nelsewhere\n")
    notes: list[str] = []
    with _opened(tmp_path, notes):
        pass
    assert notes == [f"took over the lock of process {os.getpid()} on elsewhere, which has ended"]


def _without_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)


def test_where_there_are_no_locks_a_process_at_work_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of another machine can't be asked, and counts as being at work."""
    _without_locks(monkeypatch)
    for pid, host in ((os.getpid(), platform.node()), (_dead(), "elsewhere")):
        (tmp_path / HOLDER).write_text(f"{pid}\n{host}\n")
        with pytest.raises(ValueError, match=f"in use by process {pid} on {host}"), _opened(tmp_path):
            pass
        assert (tmp_path / HOLDER).exists()


def test_a_lock_without_a_name_is_no_hindrance(tmp_path: Path) -> None:
    for text in ("", "{", "[]", "7", '{"pid": 1}'):
        for name in (LOCK, HOLDER):
            (tmp_path / name).write_text(text)
        with _opened(tmp_path):
            assert (tmp_path / HOLDER).read_text().startswith(f"{os.getpid()}\n")


def test_results_cut_short_by_a_kill_are_written_over(tmp_path: Path) -> None:
    """Tables without a run.json, beside units; without units they are somebody else's."""
    with _opened(tmp_path) as kept:
        kept.write("a-0", 1)
    for name in ("summary.csv", "run.json.part", "new-adversarial.safetensors.part"):
        (tmp_path / name).write_text("")
    with _opened(tmp_path) as kept:
        assert kept.read("a-0", int) == 1
        kept.finish()
    with pytest.raises(ValueError, match=r"holds no results but (summary\.csv|run\.json\.part)"), _opened(tmp_path):
        pass


def test_what_another_release_left_unfinished_is_refused(tmp_path: Path) -> None:
    """Its classes may have other fields by now, or other names; started anew, it is kept aside."""
    with _opened(tmp_path) as kept:
        kept.write("a-0", 1)
    about = tmp_path / "unfinished" / "evaluation.json"
    held = json.loads(about.read_text())
    for version in ({}, {"format": held.pop("format") + 1}):
        about.write_text(json.dumps(held | version))
        with pytest.raises(ValueError, match="unfinished evaluation of another release"), _opened(tmp_path):
            pass
    with _opened(tmp_path, force=True) as kept:
        assert kept.read("a-0", int) is None


def test_another_place_is_told_of_and_remembered(tmp_path: Path) -> None:
    notes: list[str] = []
    for where in ({"python": "3"}, {"python": "3"}, {"python": "4"}, {"python": "3"}):
        with _opened(tmp_path, notes, where=where) as kept:
            kept.write("a-0", 1)
    assert kept.environments == [{"python": "4"}]
    assert [note.partition(", so")[0] for note in notes] == [
        "it was begun elsewhere (python ('3', now '4'))", "it was begun elsewhere (python ('4', now '3'))",
    ]  # fmt: skip


def test_differences_in_words() -> None:
    text = "[attack]\nsteps = 4\n"
    other = {"key": "l", "seed": 0, "protocol": {"name": "small", "text": text}, "seconds": 3}
    assert differences(ABOUT, other) == "attack.steps (3, now 4)"
    assert differences({}, {"seed": 1}) == "the seed (none, now 1)"
    assert differences({"seed": 1}, {}) == "the seed (1, now none)"
    assert differences({"protocol": {"text": "=="}}, {"protocol": {"text": text}}) == "attack.steps (none, now 4)"
    many = {"protocol": {"text": "a = 1\nb = 1\nc = 1\nd = 1\ne = 1"}}
    assert differences({}, many).endswith("c (none, now 1) and 2 more")
