"""Files from strangers: whatever is in them, a reader takes them or says in a sentence why not.

``MSA_EVAL_FUZZ_CASES=10000 python -m pytest tests/fuzz`` looks for new cases, other ones each time; what fails is kept
in ``MSA_EVAL_FUZZ_KEEP``, a folder, as a zip that goes to ``tests/fuzz/corpus``, which is replayed always.
"""

from __future__ import annotations

import hashlib
import os
import resource
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory

import pytest
from fuzz.mutations import mutated
from fuzz.readers import READERS, Files, valid
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

CASES = int(os.environ.get("MSA_EVAL_FUZZ_CASES", "25"))
KEEP = os.environ.get("MSA_EVAL_FUZZ_KEEP")
CORPUS = Path(__file__).parent / "corpus"
ROOM = 1 << 30
"""So much more memory a reader of these small files may ask for."""

LONGEST = 2000
"""Of a message, in letters."""


@contextmanager
def _bounded() -> Iterator[None]:
    """Asking for much more memory fails, even where it would not be used."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + ROOM, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def _check(name: str, files: Files) -> bool:
    """Read files; whether they were taken."""
    with TemporaryDirectory() as root:
        folder = Path(root) / "given"
        for path, content in files.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(content)
        folder.mkdir(exist_ok=True)
        try:
            with _bounded(), warnings.catch_warnings():
                warnings.simplefilter("error")
                READERS[name].read(folder)
        except ValueError as error:
            _check_message(error)
            return False
        finally:
            assert [path.name for path in Path(root).iterdir()] == ["given"], "something was written"
            assert not CANARY.exists(), "code was run"
        return True


def _check_message(error: ValueError) -> None:
    message = str(error)
    assert type(error) is ValueError, f"not our words: {error!r}"
    assert message, "it says nothing"
    assert message.isprintable(), f"not in one line: {message!r}"
    assert len(message) < LONGEST, "it says too much"


CANARY = Path(f"/tmp/msa-eval-canary-{os.getpid()}")


@pytest.mark.parametrize("name", READERS)
def test_what_is_valid_is_taken(name: str) -> None:
    assert _check(name, valid(name))


@pytest.mark.parametrize("name", READERS)
def test_anything_is_taken_or_refused_in_a_sentence(name: str) -> None:
    @settings(
        max_examples=CASES, deadline=timedelta(seconds=20), database=None, derandomize=CASES < 1000,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(st.randoms(use_true_random=False))
    def cases(random: Random) -> None:
        files = mutated(random, dict(valid(name)), str(CANARY))
        try:
            _check(name, files)
        except Exception as error:
            _keep(name, files, error)
            raise

    cases()


def _keep(name: str, files: Files, error: Exception) -> None:
    if KEEP is None:
        return
    digest = hashlib.sha256(repr(sorted(files.items())).encode()).hexdigest()[:8]
    path = Path(KEEP) / name / f"{type(error).__name__}-{digest}.zip"
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as made:
        for own, content in sorted(files.items()):
            made.writestr(zipfile.ZipInfo(own), content)


@pytest.mark.parametrize("path", sorted(CORPUS.glob("*/*.zip")), ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_what_once_failed_is_taken_or_refused(path: Path) -> None:
    with zipfile.ZipFile(path) as opened:
        files = {name: opened.read(name) for name in opened.namelist()}
    _check(path.parent.name, files)
