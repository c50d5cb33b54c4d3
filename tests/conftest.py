"""Real models and data that several tests share."""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: on small models threads wait for each other

import math
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from msa_eval import HPM, Samples, load_checkpoint, load_samples
from msa_eval.engine.batch_runner import BatchRunner
from msa_eval.references import reference_path


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """A process a core for all tests, four at most as each takes a gigabyte; one for those of some files."""
    return min(len(os.sched_getaffinity(0)), 4) if config.args_source is config.ArgsSource.TESTPATHS else 0


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of a file stay in one process, for they share fixtures, as do those of the demo; what is long begins."""
    groups = {item: "demo" if "demo" in getattr(item, "fixturenames", ()) else item.path.as_posix() for item in items}
    long = {groups[item] for item in items if item.get_closest_marker("slow")}
    for item, group in groups.items():
        item.add_marker(pytest.mark.xdist_group(group))
    items.sort(key=lambda item: (groups[item] != "demo", groups[item] not in long))


@pytest.fixture(autouse=True, scope="module")
def steady() -> Iterator[None]:
    """What `auto` finds is the machine's and depends on its load: here bf16 is never faster, and there is no GPU."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("msa_eval.defense.precision.WORTH", math.inf)
        patched.setattr("msa_eval.device.automatic_device", lambda: "cpu")
        yield


@pytest.fixture(scope="session")
def digits() -> Samples:
    return load_samples("digits")


@pytest.fixture(scope="session")
def digits_hpm() -> HPM:
    model = load_checkpoint(reference_path("digits")).model
    assert isinstance(model, HPM)
    return model


@pytest.fixture
def running(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Has something in it once the clean passes and the look at gradients are over, and runs are made."""
    seen: list[Any] = []
    search = BatchRunner.search

    def begun(runner: Any, *arguments: Any) -> Any:
        seen.append(runner)
        return search(runner, *arguments)

    monkeypatch.setattr(BatchRunner, "search", begun)
    return seen


@dataclass(frozen=True)
class Demo:
    """The demo of the README as its own process, and the folder of its results."""

    ended: subprocess.CompletedProcess[str]
    out: Path


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    """Run in an empty folder and without a network to speak of, on a fifth of the digits: all of them take minutes."""
    folder = tmp_path_factory.mktemp("demo")
    environment = {**os.environ, "http_proxy": "http://localhost:9", "https_proxy": "http://localhost:9"}
    command = [sys.executable, "-m", "msa_eval", "demo", "--limit", "120", "--quiet"]
    ended = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    return Demo(ended, folder / "results" / "demo")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of CIFAR-10 data and models."""
    folder = Path(os.environ.get("MSA_EVAL_SHARED", ""))
    if not os.environ.get("MSA_EVAL_SHARED") or not (folder / "data/cifar10/test.npz").is_file():
        pytest.skip("MSA_EVAL_SHARED does not name a folder with data/cifar10/test.npz")
    return folder


@pytest.fixture(scope="session")
def cifar10(shared: Path) -> Samples:
    with np.load(shared / "data/cifar10/test.npz") as archive:
        x, y = archive["x"][:200], archive["y"][:200]
    return Samples(torch.from_numpy(x).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(y), "cifar10")
