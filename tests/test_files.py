"""Files appear whole or not at all, and all of several or none."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from msa_eval.files import replacing, write_all, write_whole


def test_a_file_holds_its_parts_and_nothing_lies_beside_it(tmp_path: Path) -> None:
    write_whole(tmp_path / "a", b"one", b"two")
    assert (tmp_path / "a").read_bytes() == b"onetwo"
    with replacing(tmp_path / "deep" / "b") as partial:
        partial.write_bytes(b"three")
        assert not (tmp_path / "deep" / "b").exists()
    assert (tmp_path / "deep" / "b").read_bytes() == b"three"
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "b", "deep"]


def test_on_a_full_disk_all_is_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_all(tmp_path, {"a": [b"old a"], "b": [b"old b"]})
    synced = []

    def full(number: int) -> None:
        synced.append(number)
        if len(synced) > 1:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"could not write .*b: No space left on device; free some space"):
        write_all(tmp_path, {"a": [b"new a"], "b": [b"new b"]})
    with (
        pytest.raises(OSError, match=r"could not write .*a: No space left on device; free some space"),
        replacing(tmp_path / "a") as partial,
    ):
        partial.write_bytes(b"new a")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"a": b"old a", "b": b"old b"}


def test_a_block_that_fails_leaves_the_file(tmp_path: Path) -> None:
    write_whole(tmp_path / "a", b"old")

    def fail() -> None:
        with replacing(tmp_path / "a") as partial:
            partial.write_bytes(b"half of")
            raise KeyError("lost")

    with pytest.raises(KeyError):
        fail()
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("a", b"old")]
