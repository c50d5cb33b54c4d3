"""Real processes that are killed, stopped, run into each other or out of disk: nothing is lost, and they say so.

The slow test kills an evaluation twenty times: ``pytest tests/cli/test_resume_cli.py -m slow``.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from forked import Forked

from msa_eval.references import reference_path

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals")

BUDGET = {
    "audit.samples": 12, "attack.apgd.steps": 2, "attack.apgd.overtime": 2, "attack.recombination.steps": 2,
    "attack.recombination.passes": 4, "attack.square.queries": 4, "attack.spsa.queries": 3,
}  # fmt: skip
COMMAND = [
    "evaluate", str(reference_path("digits")), "--data", "digits", "--protocol", "digits", "--save-adversarial",
    "--limit", "24", "--batch-size", "12", *(f"--set={key}={value}" for key, value in BUDGET.items()),
]  # fmt: skip
TIMES = {"seconds", "seconds_by_run", "sha256", "command"}


def _start(out: Path, *more: str) -> Forked:
    return Forked([*COMMAND, "--out", str(out), *more], out.parent)


def _finish(process: Forked) -> tuple[int, str]:
    """Exit status and stderr, without progress."""
    status, message = process.finish()
    lines = [line.rpartition("\r")[2] for line in message.splitlines()]
    return status, "".join(f"{line}\n" for line in lines if "%|" not in line and line.strip())


def _units(out: Path) -> set[str]:
    return {path.name for path in out.glob("unfinished/*.unit")}


def _wait(process: Forked, ready: Callable[[], bool]) -> None:
    """Until something is the case, or the process has ended."""
    deadline = time.monotonic() + 120
    while process.running and not ready():
        assert time.monotonic() < deadline, "it never came so far"
        time.sleep(0.002)


def _check_same(whole: Path, out: Path) -> None:
    """The same bytes, but for measured times; the page holds these too."""
    assert sorted(path.name for path in whole.iterdir()) == sorted(path.name for path in out.iterdir())
    for path in whole.iterdir():
        if path.name == "run.json":
            first, second = (json.loads((folder / path.name).read_text()) for folder in (whole, out))
            assert {key: first[key] for key in first if key not in TIMES} == {
                key: second[key] for key in second if key not in TIMES
            }
        elif path.name != "report.html":
            assert path.read_bytes() == (out / path.name).read_bytes(), path.name


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "r"
    assert _finish(_start(folder)) == (0, "")
    return folder


def _killed_until_done(out: Path, kills: int, seed: int) -> list[int]:
    """How many units there were after each kill; then it is let go on to its end."""
    rng, found = random.Random(seed), []
    for _ in range(kills):
        before = _units(out)
        process = _start(out)
        # The clean pass comes first; from then on, at any moment.
        _wait(process, lambda before=before: _units(out) != before or (out / "run.json").exists())  # type: ignore[misc]
        time.sleep(rng.uniform(0, 0.25))
        process.send_signal(signal.SIGKILL)
        _finish(process)
        found.append(len(_units(out)))
        if (out / "run.json").exists() and not (out / "unfinished").exists():
            break
    assert _finish(_start(out))[0] == 0
    return found


def test_killed_twice_the_evidence_is_the_same(whole: Path, tmp_path: Path) -> None:
    found = _killed_until_done(tmp_path / "r", 2, seed=0)
    assert len(found) == 2
    assert found[0] > 0
    _check_same(whole, tmp_path / "r")


@pytest.mark.slow
def test_killed_twenty_times_the_evidence_is_the_same(whole: Path, tmp_path: Path) -> None:
    """As often as it takes: an evaluation that came to its end before the twentieth kill is followed by another."""
    kills = 0
    for seed in range(1, 100):
        kills += len(_killed_until_done(tmp_path / str(seed), 20 - kills, seed=seed))
        _check_same(whole, tmp_path / str(seed))
        if kills == 20:
            return
    raise AssertionError(f"only {kills} kills")


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_it_cleanly_and_the_same_command_goes_on(
    whole: Path, tmp_path: Path, number: signal.Signals, status: int
) -> None:
    out = tmp_path / "r"
    process = _start(out)
    _wait(process, lambda: len(_units(out)) > 5)
    process.send_signal(number)
    ended, message = _finish(process)
    assert ended == status
    assert re.fullmatch(
        rf"Error: interrupted after \d+ of \d+ runs on a batch; they are kept in {out / 'unfinished'}, and the same "
        r"command goes on from there; no earlier results were changed\n", message,
    ), message  # fmt: skip
    assert not (out / ".lock").exists()
    assert not list(out.glob("**/*.part"))
    status, message = _finish(_start(out))
    assert status == 0
    assert re.fullmatch(rf"note: going on in {out}: \d+ of \d+ runs on a batch are finished\n", message), message
    _check_same(whole, out)


def test_two_processes_on_one_folder(whole: Path, tmp_path: Path) -> None:
    """The second says who is at work; the lock of a process that was killed is taken over."""
    out = tmp_path / "r"
    first = _start(out)
    _wait(first, lambda: len(_units(out)) > 2)
    first.send_signal(signal.SIGSTOP)
    try:
        status, message = _finish(_start(out))
    finally:
        first.send_signal(signal.SIGCONT)
    assert status == 2
    assert message == (
        f"Error: {out} is in use by process {first.pid} on {os.uname().nodename}; wait until it ends, or choose "
        f"another folder\n"
    )
    first.send_signal(signal.SIGKILL)
    _finish(first)
    assert (out / ".lock").exists()
    status, message = _finish(_start(out))
    assert status == 0
    assert f"note: took over the lock of process {first.pid} on {os.uname().nodename}, which has ended\n" in message
    _check_same(whole, out)


@contextlib.contextmanager
def _tmpfs(folder: Path, options: str) -> Iterator[None]:
    """A file system of its own; where none may be mounted, the test is skipped."""
    folder.mkdir()
    mount = shutil.which("mount")
    if (
        mount is None
        or subprocess.run(
            [mount, "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True, check=False
        ).returncode
    ):
        pytest.skip("no file system may be mounted here")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_stops_it_and_loses_nothing(whole: Path, tmp_path: Path) -> None:
    """A tmpfs of 300 kB, and then a larger one."""
    disk = tmp_path / "disk"
    with _tmpfs(disk, "size=300k"):
        out = disk / "r"
        status, message = _finish(_start(out))
        assert status == 1
        assert re.fullmatch(
            rf"Error: \[Errno 28\] could not write {out}/unfinished/[\w.-]+: No space left on device; free some space; "
            r"the units finished before are kept, and the same command goes on from there\n", message,
        ), message  # fmt: skip
        assert _units(out)
        assert not list(out.glob("**/*.part"))
        subprocess.run(["mount", "-o", "remount,size=20m", str(disk)], check=True)
        assert _finish(_start(out))[0] == 0
        _check_same(whole, out)


@contextlib.contextmanager
def _read_only(folder: Path) -> Iterator[None]:
    """A folder of a disk that has become read-only, as disks do on errors: a view of itself lies over it.

    The disk itself can't be, while a process holds a file of it open for writing.
    """
    subprocess.run(["mount", "--bind", str(folder), str(folder)], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", str(folder)], check=True)
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_becomes_read_only_stops_it_and_loses_nothing(whole: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    with _tmpfs(disk, "size=20m"):
        out = disk / "r"
        process = _start(out)
        _wait(process, lambda: len(_units(out)) > 2)
        process.send_signal(signal.SIGSTOP)
        before = _units(out)
        with _read_only(out):
            process.send_signal(signal.SIGCONT)
            status, message = _finish(process)
        assert status == 1
        assert re.fullmatch(
            rf"Error: \[Errno 30\] could not write {out}/unfinished/[\w.-]+: Read-only file system; the units finished "
            r"before are kept, and the same command goes on from there\n", message,
        ), message  # fmt: skip
        assert _units(out) == before
        status, message = _finish(_start(out))
        assert status == 0
        assert re.search(rf"note: going on in {out}: \d+ of \d+ runs on a batch are finished\n", message), message
        _check_same(whole, out)


def test_a_read_only_folder_is_refused_at_once(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    with _tmpfs(disk, "size=1m"):
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        status, message = _finish(_start(disk / "r"))
    assert status == 2
    assert re.fullmatch(
        rf"Error: results can't be written to {disk / 'r'}: Read-only file system; choose another folder\n", message
    )
