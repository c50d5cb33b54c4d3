"""Runs on a Ray cluster: whatever the order in which results come, and whoever is lost, the evidence is the same.

Here tasks are run by a stand-in for the cluster: what is sent goes through Ray's own pickling, and streams are read in
a random order. Workers are lost by Ray's own exceptions.
"""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from toys import make_classifier, make_hpm, make_samples

from msa_eval import RayEngine, Results, evaluate
from msa_eval.engine.ray_executor import INSTALL
from msa_eval.protocols import make_protocol

SMALL: dict[str, Any] = {
    "schema": 1, "name": "small", "version": 1, "description": "A test.", "audit.samples": 0,
    "threat": {"norm": "Linf", "eps": 0.1, "contexts": ["joint", "solo"]}, "batches": {"size": 8},
    "attack": {
        "apgd": {"combine": "cascade", "steps": 2, "runs": ["fc-oracle:margin", "ste:margin"]},
        "square": {"queries": 2},
    },
}  # fmt: skip


class _Ref:
    def __init__(self, value: Any) -> None:
        self.value = value

    def hex(self) -> str:
        return str(id(self))


class _Stream:
    def __init__(self, made: Iterator[Any], dies_at: int | None, error: type[Exception]) -> None:
        self._made, self._left, self._error = made, dies_at, error

    def __next__(self) -> _Ref:
        if self._left == 0:
            raise self._error
        self._left = None if self._left is None else self._left - 1
        return _Ref(next(self._made))


class _Cluster:
    """Runs tasks here, a message at a time, in an order drawn from a seed."""

    def __init__(self, patched: pytest.MonkeyPatch, *, seed: int = 0, deaths: int = 0) -> None:
        ray = pytest.importorskip("ray", reason="the extra [ray] is not installed")
        self._ray, self._rng, self.deaths = ray, random.Random(seed), deaths
        self.puts = self.cancelled = 0
        for name in ("put", "get", "wait", "remote", "cancel", "nodes", "is_initialized"):
            patched.setattr(ray, name, getattr(self, name))
        patched.setattr(ray.util, "register_serializer", lambda *_, **__: None)
        patched.setattr(ray.util, "deregister_serializer", lambda *_: None)

    def is_initialized(self) -> bool:
        return True

    def nodes(self) -> list[dict[str, Any]]:
        return [{"Alive": True, "Resources": {"CPU": 2.0}}, {"Alive": False, "Resources": {"CPU": 64.0}}]

    def put(self, value: Any) -> _Ref:
        self.puts += 1
        return _Ref(self._ray.cloudpickle.dumps(value))

    def get(self, ref: _Ref) -> Any:
        return self._ray.cloudpickle.loads(ref.value) if _is_pickle(ref.value) else ref.value

    def wait(self, streams: list[_Stream], num_returns: int) -> tuple[list[_Stream], list[_Stream]]:
        return [self._rng.choice(streams)], []

    def cancel(self, stream: _Stream, *, force: bool) -> None:
        self.cancelled += 1

    def remote(self, function: Any) -> Any:
        cluster = self

        class Task:
            def options(self, **_: Any) -> Task:
                return self

            def remote(self, *given: Any) -> _Stream:
                dies_at = 2 if cluster.deaths else None
                cluster.deaths -= bool(cluster.deaths)
                return _Stream(function(*given), dies_at, cluster._ray.exceptions.WorkerCrashedError)

        return Task()


def _is_pickle(value: Any) -> bool:
    return isinstance(value, bytes) and value[:1] == b"\x80"


def _evaluate(out: Path, **more: Any) -> Results:
    settings = {"protocol": make_protocol(SMALL), "save_adversarial": "all", "notify": lambda _: None} | more
    return evaluate(make_hpm(), make_samples(make_classifier(), 32), out=out, **settings)


def _check_same(one: Path, other: Path) -> None:
    tables = {path.name for path in one.iterdir()} - {"run.json"}
    assert {"outcomes.csv", "adversarial.safetensors", "points.safetensors", "points.csv"} <= tables
    assert tables == {path.name for path in other.iterdir()} - {"run.json"}
    assert all((one / name).read_bytes() == (other / name).read_bytes() for name in tables)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("whole")
    _evaluate(folder)
    torch.set_num_threads(before)
    return folder


@pytest.mark.parametrize("seed", [0, 1])
def test_in_any_order_the_evidence_is_that_of_a_local_run(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    cluster = _Cluster(monkeypatch, seed=seed)
    before = torch.get_num_threads()
    _evaluate(tmp_path, engine=RayEngine(cpus=1))
    _check_same(whole, tmp_path)
    assert cluster.puts == 1
    assert torch.get_num_threads() == before


def test_a_lost_worker_costs_no_run_that_was_made(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _Cluster(monkeypatch, deaths=3)
    notes: list[str] = []
    _evaluate(tmp_path, engine=RayEngine(cpus=1), notify=notes.append)
    _check_same(whole, tmp_path)
    assert sum("a worker was lost (WorkerCrashedError" in note for note in notes) == 3


def test_workers_that_are_always_lost_make_the_results_incomplete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _Cluster(monkeypatch, deaths=2)
    results = _evaluate(tmp_path, engine=RayEngine(cpus=1, retries=0))
    assert results.run["verdict"] == "incomplete"
    assert {one["batch"] for one in results.run["failed"]} == {0, 1}
    assert all("a worker was lost" in one["error"] for one in results.run["failed"])


def test_an_attack_that_fails_makes_the_results_incomplete_as_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(defense: Any, z: torch.Tensor) -> torch.Tensor:
        if z.requires_grad and not torch.equal(z, z.round()) and len(z) == 8 and broken.calls > 1:  # type: ignore[attr-defined]
            raise RuntimeError("out of luck")
        broken.calls += 1  # type: ignore[attr-defined]
        out: torch.Tensor = defense.fc_logits(z)
        return out

    broken.calls = 0  # type: ignore[attr-defined]
    _Cluster(monkeypatch)
    results = _evaluate(tmp_path, engine=RayEngine(cpus=1), surrogates={"broken": broken})
    assert results.run["verdict"] == "incomplete"
    assert {one["error"] for one in results.run["failed"]} == {"out of luck"}


def test_interrupted_it_cancels_its_tasks_and_a_local_run_goes_on(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        cluster = _Cluster(patched)
        wait, left = cluster.wait, iter(range(9))

        def stopped(streams: list[_Stream], num_returns: int) -> Any:
            if next(left, None) is None:
                raise KeyboardInterrupt
            return wait(streams, num_returns)

        patched.setattr("ray.wait", stopped)
        with pytest.raises(KeyboardInterrupt, match=r"interrupted after \d+ of \d+ runs on a batch"):
            _evaluate(tmp_path, engine=RayEngine(cpus=1))
        assert cluster.cancelled > 0
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    _evaluate(tmp_path)
    torch.set_num_threads(before)
    _check_same(whole, tmp_path)


def test_no_room_for_a_worker_is_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _Cluster(monkeypatch)
    with pytest.raises(ValueError, match=r"no node of the cluster has room for a worker of 3 CPUs and 0 GPUs \(there"):
        _evaluate(tmp_path, engine=RayEngine(cpus=3))


@pytest.mark.parametrize(
    ("address", "message"),
    [("127.0.0.1:9", "nothing answers at"), ("nonsense", "not auto or HOST:PORT"), ("ray://h:1", "Ray's client")],
)
def test_a_wrong_address_is_told_of(tmp_path: Path, address: str, message: str) -> None:
    pytest.importorskip("ray", reason="the extra [ray] is not installed")
    with pytest.raises(ValueError, match=message):
        _evaluate(tmp_path, engine=RayEngine(address))


def test_without_the_extra_the_command_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match="needs Ray, which can't be imported") as caught:
        _evaluate(tmp_path, engine="ray")
    assert INSTALL in str(caught.value)


def test_a_local_run_does_not_import_ray(tmp_path: Path) -> None:
    (tmp_path / "ray.py").write_text("raise AssertionError('ray was imported')")
    code = (
        "import sys, torch, msa_eval; model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 4)).eval(); "
        "msa_eval.evaluate(model, torch.rand(8, 3, 2, 2), torch.zeros(8, dtype=torch.long), protocol='quick', "
        "overrides={'audit.samples': 0, 'attack.square.queries': 2, 'attack.apgd.steps': 1}); "
        "assert 'ray' not in sys.modules"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=tmp_path, check=True)


@pytest.mark.parametrize("wrong", [{"cpus": 0}, {"gpus": -1}, {"retries": -1}])
def test_impossible_workers_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="expected"):
        RayEngine(**wrong)  # type: ignore[arg-type]


def test_an_unknown_engine_is_told_of(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no engine 'rya'; expected local or ray"):
        _evaluate(tmp_path, engine="rya")


def test_a_gpu_has_to_be_asked_for() -> None:
    with pytest.raises(ValueError, match="gpus=1"):
        RayEngine().check("cuda")
    RayEngine(gpus=1).check("cuda")
