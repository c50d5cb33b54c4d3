"""Real processes on a real Ray cluster, of nodes that are all on this machine: workers, nodes and drivers are killed.

Whatever happens, the evidence has the bytes of a local run's.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from msa_eval.references import reference_path

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="the extra [ray] is not installed"),
    pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are looked up in /proc"),
    pytest.mark.slow,
]

COMMAND = [
    "evaluate", str(reference_path("digits")), "--data", "digits", "--protocol", "quick", "--save-adversarial",
    "--no-gallery", "--limit", "64", "--batch-size", "8", "--set=audit.samples=0", "--set=attack.apgd.steps=4",
    "--set=attack.square.queries=8",
]  # fmt: skip
# A shell may start the tests with SIGINT ignored, which children inherit.
PROGRAM = (
    "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from msa_eval.cli import main; main()"
)


def _environment() -> dict[str, str]:
    """One thread, no token to be let in, nothing reported, and no address but the one that is given."""
    ours = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    return ours | {"OMP_NUM_THREADS": "1", "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}


def _descendants(pid: int) -> list[int]:
    """The processes that a process has started, and those that they have."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
    found = [pid]
    for one in found:
        found += [child for child, parent in parents.items() if parent == one]
    return found[1:]


def _title(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except OSError:
        return ""


def _kill(pids: list[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


class _Cluster:
    """Nodes of so many CPUs each, the first of which is the head."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{free.getsockname()[1]}"
        self._folder, self.nodes, self.cpus = folder, list[subprocess.Popen[bytes]](), 0

    def grow_to(self, cpus: int) -> None:
        """Start a node where CPUs are missing."""
        if cpus > self.cpus:
            port = self.address.rpartition(":")[2]
            where = [f"--address={self.address}"] if self.nodes else ["--head", f"--port={port}",
                     "--include-dashboard=false", f"--temp-dir={self._folder}"]  # fmt: skip
            command = [sys.executable, "-W", "ignore", "-m", "ray.scripts.scripts", "start", "--block", *where,
                       "--node-ip-address=127.0.0.1", f"--num-cpus={cpus - self.cpus}", "--num-gpus=0",
                       "--object-store-memory=100000000", "--disable-usage-stats"]  # fmt: skip
            log = self._folder / f"node-{len(self.nodes)}.log"
            with log.open("wb") as file:
                node = subprocess.Popen(
                    command, stdout=file, stderr=file, env=_environment(), cwd=self._folder, start_new_session=True
                )
            self.nodes.append(node)
            _wait(node, lambda: b"Ray runtime started" in log.read_bytes(), "no node could be started")
            assert node.poll() is None, log.read_text()
            self.cpus = cpus

    def workers(self) -> list[int]:
        """Those that are at a batch."""
        return [pid for node in self.nodes for pid in _descendants(node.pid) if _title(pid).startswith("ray::msa-eval")]

    def stop(self) -> None:
        """End every process, kindly or not."""
        left = [pid for node in self.nodes for pid in [*_descendants(node.pid), node.pid]]
        for node in reversed(self.nodes):
            node.terminate()
        for node in self.nodes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                node.wait(timeout=15)
        _kill(left)
        for node in self.nodes:
            node.wait(timeout=15)


def _wait(process: subprocess.Popen[bytes], ready: Callable[[], bool], message: str) -> None:
    """Until something is the case, or the process has ended."""
    deadline = time.monotonic() + 90
    while process.poll() is None and not ready():
        assert time.monotonic() < deadline, message
        time.sleep(0.01)


@pytest.fixture(scope="module")
def cluster() -> Iterator[_Cluster]:
    # The path of a socket may have no more than 107 bytes, so pytest's own folder won't do.
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp", ignore_cleanup_errors=True) as folder:
        made = _Cluster(Path(folder))
        try:
            try:
                made.grow_to(1)
            except AssertionError:  # once more, on another port
                made.stop()
                made = _Cluster(Path(folder))
                try:
                    made.grow_to(1)
                except AssertionError as error:
                    pytest.skip(f"Ray itself does not start here: {error}")
            yield made
        finally:
            made.stop()


def _start(out: Path, address: str | None = None) -> subprocess.Popen[bytes]:
    engine = [] if address is None else ["--engine", "ray", "--address", address, "--cpus-per-worker", "1"]
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM, *COMMAND, "--out", str(out), *engine]
    with out.with_suffix(".log").open("wb") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, cwd=out.parent, env=_environment())


def _finish(process: subprocess.Popen[bytes], out: Path) -> tuple[int, str]:
    """Exit status, and all that was told."""
    try:
        status = process.wait(timeout=120)
    finally:
        process.kill()
    return status, out.with_suffix(".log").read_text()


def _store(out: Path) -> int:
    return len(list(out.glob("unfinished/*.unit")))


def _check_same(whole: Path, out: Path) -> None:
    """The same bytes, but for measured times and what holds them."""
    names = {path.name for path in whole.iterdir()}
    assert {"outcomes.csv", "adversarial.safetensors"} <= names
    assert names == {path.name for path in out.iterdir()}
    for name in names - {"run.json", "report.html"}:
        assert (whole / name).read_bytes() == (out / name).read_bytes(), name


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "r"
    status, message = _finish(_start(out), out)
    assert status == 0, message
    return out


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_so_many_workers_give_the_evidence_of_a_local_run(
    cluster: _Cluster, whole: Path, tmp_path: Path, workers: int
) -> None:
    cluster.grow_to(workers)
    out = tmp_path / "r"
    process = _start(out, cluster.address)
    seen: set[int] = set()
    _wait(process, lambda: bool(seen.update(cluster.workers())), "it never came to its end")
    status, message = _finish(process, out)
    assert status == 0, message
    assert len(seen) == cluster.cpus, "not every worker had a batch"
    _check_same(whole, out)


def test_a_worker_that_is_killed_is_told_of_and_its_batch_made_again(
    cluster: _Cluster, whole: Path, tmp_path: Path
) -> None:
    cluster.grow_to(2)
    out = tmp_path / "r"
    process = _start(out, cluster.address)
    _wait(process, lambda: _store(out) >= 4 and bool(cluster.workers()), "it never came so far")
    _kill(cluster.workers()[:1])
    status, message = _finish(process, out)
    assert status == 0, message
    assert "a worker was lost" in message
    _check_same(whole, out)


def test_a_driver_that_is_stopped_and_killed_goes_on(cluster: _Cluster, whole: Path, tmp_path: Path) -> None:
    """By SIGTERM, by SIGINT, and by SIGKILL, after each of which its tasks are over, and then to its end."""
    cluster.grow_to(2)
    out = tmp_path / "r"
    for number, expected in ((signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)):
        before = _store(out)
        process = _start(out, cluster.address)
        _wait(process, lambda before=before: _store(out) > before + 1, "it never came so far")  # type: ignore[misc]
        process.send_signal(number)
        status, message = _finish(process, out)
        assert status == expected, message
        line = rf"Error: interrupted after \d+ of \d+ runs on a batch; they are kept in {out / 'unfinished'}, and"
        assert bool(re.search(line, message)) == (number != signal.SIGKILL), message
        _wait(cluster.nodes[0], lambda: not cluster.workers(), "its workers went on")
    status, message = _finish(_start(out, cluster.address), out)
    assert status == 0, message
    assert f"note: going on in {out}: " in message
    _check_same(whole, out)


def test_a_node_that_is_killed_is_told_of_and_its_batches_made_again(
    cluster: _Cluster, whole: Path, tmp_path: Path
) -> None:
    cluster.grow_to(2)
    cluster.grow_to(4)
    out = tmp_path / "r"
    process = _start(out, cluster.address)
    node = cluster.nodes[-1]

    def ready() -> bool:
        return _store(out) >= 4 and bool({*_descendants(node.pid)} & {*cluster.workers()})

    _wait(process, ready, "it never came so far")
    _kill([node.pid, *_descendants(node.pid)])
    status, message = _finish(process, out)
    assert status == 0, message
    assert "a worker was lost" in message
    _check_same(whole, out)
