"""Interrupted evaluations: whatever stops one, the evidence is that of an evaluation that nothing stopped."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor, nn
from toys import make_classifier, make_hpm, make_samples

from msa_eval import HPM, AttackError, Results, Samples, WholeModel, evaluate
from msa_eval.engine.resume import ResumeStore
from msa_eval.protocols import Protocol, make_protocol
from msa_eval.report import render_table
from msa_eval.report.page import write_page
from msa_eval.surrogates import Surrogate
from msa_eval.verification.verify import verify

TIMES = {"seconds", "seconds_by_run", "sha256"}

CASCADE: dict[str, Any] = {
    "schema": 1, "name": "small", "version": 1, "description": "A test.", "audit.samples": 8,
    "threat": {"norm": "Linf", "eps": 0.1, "contexts": ["joint", "solo", "composed"]},
    "batches": {"size": 8},
    "attack": {
        "apgd": {
            "combine": "cascade", "steps": 3, "overtime": 4, "passes": 40,
            "runs": ["fc-oracle:margin", "soft-hybrid:margin:companions", "ste:margin"],
        },
        "recombination": {"runs": ["fc-oracle:margin", "soft-hybrid:dlr"], "steps": 2, "sweeps": 1, "passes": 20},
        "square": {"queries": 4},
        "spsa": {"queries": 3},
    },
}  # fmt: skip


def _protocol(**overrides: Any) -> Protocol:
    return make_protocol(CASCADE, overrides={key.replace("__", "."): value for key, value in overrides.items()})


FEW = {"audit__samples": 0, "threat__contexts": ["joint"]}


def _quiet(text: str) -> None:
    del text


def _evaluate(out: Path, model: Any = None, samples: Samples | None = None, **more: Any) -> Results:
    model = make_hpm() if model is None else model
    settings = {"protocol": _protocol(), "save_adversarial": "all", "notify": _quiet} | more
    return evaluate(model, samples or make_samples(make_classifier(), 16), out=out, **settings)


def _check_same(one: Path, other: Path) -> None:
    """The same bytes, but for measured times."""
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in other.iterdir())
    assert {
        "run.json",
        "adversarial.safetensors",
        "points.safetensors",
        "points.csv",
        "gallery.safetensors",
        "outcomes.csv",
    } <= set(names)
    for name in names:
        if name == "run.json":
            first, second = (json.loads((folder / name).read_text()) for folder in (one, other))
            assert {key: value for key, value in first.items() if key not in TIMES} == {
                key: value for key, value in second.items() if key not in TIMES
            }
        else:
            assert (one / name).read_bytes() == (other / name).read_bytes(), name


class _StopAfter:
    """Stops an evaluation when so many units have been written."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, count: int, error: type[BaseException] = KeyboardInterrupt):
        self.left, write = count, ResumeStore.write

        def counted(store: ResumeStore, name: str, value: Any) -> None:
            if self.left == 0:
                raise error
            self.left -= 1
            write(store, name, value)

        monkeypatch.setattr(ResumeStore, "write", counted)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    _evaluate(folder)
    return folder


def test_stopped_after_every_few_units_the_evidence_is_the_same(whole: Path, tmp_path: Path) -> None:
    """Each process writes five units and is stopped, until one comes to the end."""
    stops = 0
    while True:
        with pytest.MonkeyPatch.context() as patched:
            _StopAfter(patched, 5)
            try:
                _evaluate(tmp_path)
                break
            except KeyboardInterrupt:
                stops += 1
        assert list(tmp_path.glob("unfinished/*.unit"))
        assert not (tmp_path / "run.json").exists()
    assert stops > 5
    _check_same(whole, tmp_path)


def test_a_resumed_evaluation_makes_nothing_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The passes of two halves add up to those of a whole, but for the passes that begin every evaluation."""

    def passes(model: HPM) -> int:
        return model.trunk.images  # type: ignore[no-any-return, union-attr, operator]

    first, second, third = make_hpm(), make_hpm(), make_hpm()
    start = passes(first)  # the prototypes were made of these
    only = {"save_adversarial": False, "save_gallery": False, "protocol": _protocol(audit__samples=0), "fc": False}
    with pytest.MonkeyPatch.context() as patched:
        _StopAfter(patched, 0)
        with pytest.raises(KeyboardInterrupt):
            _evaluate(tmp_path / "never", third, **only)
    _evaluate(tmp_path / "whole", first, **only)
    with pytest.MonkeyPatch.context() as patched:
        _StopAfter(patched, 5)
        with pytest.raises(KeyboardInterrupt):
            _evaluate(tmp_path / "halves", second, **only)
    between = passes(second)
    notes: list[str] = []
    _evaluate(tmp_path / "halves", second, notify=notes.append, **only)
    repeated = passes(third) - start  # what begins an evaluation, and its first run, which was not kept
    assert 0 < passes(second) - between < passes(first) - start
    assert passes(second) - start <= passes(first) - start + 2 * repeated
    assert len(notes) == 1
    assert notes[0].startswith(f"going on in {tmp_path / 'halves'}: 5 of ")


def test_a_stochastic_target_is_resumed_too(tmp_path: Path) -> None:
    class Noisy(nn.Module):
        batch_dependent = True

        def __init__(self) -> None:
            super().__init__()
            self.inner = make_classifier()

        def features(self, x: Tensor) -> Tensor:
            return self.inner.features(x)

        def logits(self, z: Tensor) -> Tensor:
            out: Tensor = self.inner.fc(z) - z.mean()
            return out + 0.05 * torch.randn(out.shape)

    small = _protocol(threat__contexts=["joint"], audit__samples=0, stochastic__draws=3)
    settings = {"protocol": small, "model": Noisy().eval()}
    _evaluate(tmp_path / "whole", **settings)
    for _ in range(2):
        with pytest.MonkeyPatch.context() as patched:
            _StopAfter(patched, 3)
            with pytest.raises(KeyboardInterrupt):
                _evaluate(tmp_path / "parts", **settings)
    _evaluate(tmp_path / "parts", **settings)
    _check_same(tmp_path / "whole", tmp_path / "parts")


def _stop(folder: Path, count: int = 12, **more: Any) -> None:
    with pytest.MonkeyPatch.context() as patched:
        _StopAfter(patched, count)
        with pytest.raises(KeyboardInterrupt):
            _evaluate(folder, **more)


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _flip(where: float) -> Callable[[Path], None]:
    def flip(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[int(where * (len(content) - 1))] ^= 16
        path.write_bytes(bytes(content))

    return flip


DAMAGE: dict[str, Callable[[Path], None]] = {
    "truncated": _truncate, "empty": _empty, "flipped in the checksum": _flip(0.0), "flipped inside": _flip(0.5),
    "flipped at the end": _flip(1.0), "removed": Path.unlink,
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_unit_is_told_of_and_made_again(whole: Path, tmp_path: Path, damage: str) -> None:
    """A run's unit, a batch's, and the audit's."""
    _stop(tmp_path)
    names = sorted(path.stem for path in tmp_path.glob("unfinished/*.unit"))
    batches = [name for name in names if name[-1].isdigit() and "." not in name]
    runs = [name for name in names if "." in name]
    assert batches
    assert len(runs) > 2
    hurt = [batches[0], runs[0], "defense-audit"]
    for name in hurt:
        DAMAGE[damage](tmp_path / "unfinished" / f"{name}.unit")
    notes: list[str] = []
    _evaluate(tmp_path, notify=notes.append)
    _check_same(whole, tmp_path)
    for name in hurt if damage != "removed" else hurt[:2]:
        assert sum(name in note and "computed again" in note for note in notes) == 1, (name, notes)


def test_a_unit_of_something_else_is_not_taken(whole: Path, tmp_path: Path) -> None:
    """Neither another evaluation's unit, nor another unit of the same."""
    _stop(tmp_path / "a")
    _stop(tmp_path / "b", seed=1)
    store = sorted((tmp_path / "a").glob("unfinished/*.*.unit"))
    other = tmp_path / "b" / "unfinished" / store[0].name
    store[0].write_bytes(other.read_bytes())
    store[1].write_bytes(store[2].read_bytes())
    notes: list[str] = []
    _evaluate(tmp_path / "a", notify=notes.append)
    _check_same(whole, tmp_path / "a")
    assert sum("is a unit of something else" in note for note in notes) == 2


@pytest.mark.parametrize("damage", ["removed", "truncated"])
def test_without_a_word_whose_units_they_are_each_tells_itself(whole: Path, tmp_path: Path, damage: str) -> None:
    _stop(tmp_path)
    DAMAGE[damage](tmp_path / "unfinished" / "evaluation.json")
    _evaluate(tmp_path)
    _check_same(whole, tmp_path)


def test_another_evaluation_is_refused_and_told_apart(tmp_path: Path) -> None:
    _stop(tmp_path)
    before = {path.name: path.read_bytes() for path in (tmp_path / "unfinished").iterdir()}
    other = make_hpm(seed=3)
    cases: dict[str, dict[str, Any]] = {
        r"unfinished, which differs in the seed \(0, now 1\);": {"seed": 1},
        r"differs in attack\.apgd\.steps \(3, now 4\) and attack\.square\.queries \(4, now 5\);": {
            "protocol": _protocol(attack__apgd__steps=4, attack__square__queries=5)
        },
        r"differs in the weights of defense, .* and \d more;": {"model": other},
        r"differs in what the data hold, ": {"samples": make_samples(make_classifier(), 16, seed=5)},
        r"differs in save_adversarial \('all', now False\);": {"save_adversarial": False},
    }
    for message, more in cases.items():
        with pytest.raises(ValueError, match=message):
            _evaluate(tmp_path, **more)
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "unfinished").iterdir()}
    assert not (tmp_path / ".lock").exists()


def test_force_starts_anew_and_keeps_the_old_under_a_dated_name(tmp_path: Path) -> None:
    """What is unfinished, and what is finished; a second time in the same second too."""
    few = {"protocol": _protocol(**FEW), "fc": False}
    _evaluate(tmp_path / "whole", **few)
    out = tmp_path / "old" / "r"
    _stop(out, 6, seed=1, **few)
    kept = {path.name: path.read_bytes() for path in (out / "unfinished").iterdir()}
    notes: list[str] = []
    _evaluate(out, force=True, notify=notes.append, **few)
    _check_same(tmp_path / "whole", out)
    (dated,) = [path for path in out.parent.iterdir() if path != out]
    assert dated.name.startswith(f"r-{time.strftime('%Y-')}")
    assert kept == {path.name: path.read_bytes() for path in (dated / "unfinished").iterdir()}
    assert notes == [f"what {out} held is kept in {dated}"]
    _evaluate(out, seed=1, force=True, **few)
    _evaluate(out, seed=2, force=True, **few)
    found = [path for path in out.parent.iterdir() if path not in (out, dated)]
    assert len(found) == 2
    assert sorted(Results.load(path).run["seed"] for path in found) == [0, 1]
    assert Results.load(out).run["seed"] == 2
    _evaluate(dated, seed=1, **few)  # the old one goes on where it is
    assert Results.load(dated).run["seed"] == 1


def test_finished_results_of_the_same_key_are_made_again(whole: Path, tmp_path: Path) -> None:
    _evaluate(tmp_path)
    _stop(tmp_path)
    assert Results.load(tmp_path).run["seed"] == 0
    _evaluate(tmp_path)
    _check_same(whole, tmp_path)


def test_the_clock_may_go_backwards(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(10**9, 0, -1000))
    monkeypatch.setattr(time, "time", lambda: float(next(clock)))
    monkeypatch.setattr(time, "localtime", lambda *_: time.gmtime(next(clock)))
    _stop(tmp_path)
    for path in tmp_path.glob("unfinished/*"):
        os.utime(path, (next(clock), next(clock)))
    _evaluate(tmp_path)
    _check_same(whole, tmp_path)


class _Flaky:
    """A surrogate that fails at some of its calls."""

    def __init__(self, fails: Callable[[int], bool], error: Callable[[], Exception]) -> None:
        self.calls, self._fails, self._error = 0, fails, error

    def __call__(self, defense: Any, z: Tensor) -> Tensor:
        self.calls += 1
        if self._fails(self.calls):
            raise self._error()
        out: Tensor = defense.fc_logits(z)
        return out


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (lambda: RuntimeError("out of luck"), "out of luck"),
        (MemoryError, "MemoryError"),
        (lambda: KeyError("a key"), "KeyError: 'a key'"),
    ],
)
def test_a_failed_run_makes_the_results_incomplete(
    tmp_path: Path, error: Callable[[], Exception], message: str
) -> None:
    """It is named, nothing of it reads as robustness, and the same call tries it again."""
    alarm = {"on": True}
    flaky = _Flaky(lambda calls: alarm["on"] and calls > 7, error)
    settings = {"protocol": _protocol(**FEW), "surrogates": {"flaky": flaky}, "save_adversarial": True}
    sound = _evaluate(tmp_path / "sound", surrogates={"flaky": _Flaky(lambda _: False, error)},
                      protocol=_protocol(**FEW))  # fmt: skip
    results = _evaluate(tmp_path / "r", **settings)
    failed = results.run["failed"]
    assert results.run["verdict"] == "incomplete"
    assert {one["target"] for one in failed} == {"defense"}
    assert {one["run"].split(":")[0] for one in failed} == {"flaky"}
    assert {one["batch"] for one in failed} == {0, 1}
    assert all(one["error"] == message for one in failed)
    verdicts = results.run["verdicts"]
    assert verdicts["defense"]["verdict"] == "incomplete"
    assert verdicts["fc"]["verdict"] == "not audited"
    assert f"{failed[0]['run']} on batch 0, joint: {message}." in verdicts["defense"]["reasons"]
    assert set(results.summary.query("target == 'defense'")["verdict"]) == {"incomplete"}
    runs = results.attacks[results.attacks["run"].isin({one["run"] for one in failed})]
    assert runs[["final", "any", "surrogate_accuracy"]].isna().all(axis=None)
    rows = results.outcomes[results.outcomes["run"].isin({one["run"] for one in failed})]
    assert rows[["min_margin", "perturbation"]].isna().all(axis=None)
    assert "verdict: incomplete" in render_table(results)
    assert f"failed: defense, {failed[0]['run']} on batch 0, joint: {message}" in render_table(results)
    checks = verify(tmp_path / "r", make_hpm(), make_samples(make_classifier(), 16))
    assert checks.passed, [check for check in checks.checks if not check.passed]
    text = write_page(tmp_path / "r").read_text()
    assert 'class="badge incomplete"' in text

    alarm["on"] = False
    again = _evaluate(tmp_path / "r", **settings)
    assert "failed" not in again.run
    assert not (tmp_path / "r" / "unfinished").exists()
    pd.testing.assert_frame_equal(again.outcomes, sound.outcomes)
    pd.testing.assert_frame_equal(again.samples, sound.samples)


def test_failures_that_are_withheld_are_found(tmp_path: Path) -> None:
    """Results with runs that failed can't call themselves anything but incomplete."""
    flaky = {"flaky": _Flaky(lambda calls: calls > 7, lambda: RuntimeError("no"))}
    results = _evaluate(tmp_path / "r", surrogates=flaky, protocol=_protocol(**FEW))
    run = {**results.run, "verdict": "sound"}
    Results(**{**vars(results), "run": run}).save(tmp_path / "s")
    (tmp_path / "s" / "adversarial.safetensors").write_bytes((tmp_path / "r" / "adversarial.safetensors").read_bytes())
    checks = verify(tmp_path / "s", make_hpm(), make_samples(make_classifier(), 16))
    assert not checks.intact
    assert any("does not call the results incomplete" in check.detail for check in checks.checks)


def test_nan_is_a_failure(tmp_path: Path) -> None:
    def nan(defense: Any, z: Tensor) -> Tensor:
        out: Tensor = defense.fc_logits(z)
        return out * (torch.nan if not torch.equal(z, z.round()) and z.requires_grad and nan.calls else 1)  # type: ignore[attr-defined]

    nan.calls = 0  # type: ignore[attr-defined]

    def surrogate(defense: Any, z: Tensor) -> Tensor:
        nan.calls += 1  # type: ignore[attr-defined]
        return nan(defense, z) if nan.calls > 3 else defense.fc_logits(z)  # type: ignore[attr-defined, no-any-return]

    results = _evaluate(tmp_path / "r", surrogates={"nan": surrogate}, protocol=_protocol(**FEW))
    assert results.run["verdict"] == "incomplete"
    assert all("NaN or infinite" in one["error"] for one in results.run["failed"])


def test_a_failed_audit_makes_the_results_incomplete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise AttackError("the audit could not be finished: out of luck")

    with monkeypatch.context() as patched:
        patched.setattr("msa_eval.engine.assembly.probe", fail)
        results = _evaluate(tmp_path, protocol=_protocol(threat__contexts=["joint"]))
    assert results.run["verdict"] == "incomplete"
    assert [(one["target"], one["run"], one["batch"]) for one in results.run["failed"]] == [
        ("defense", "the audit", None), ("fc", "the audit", None),
    ]  # fmt: skip
    assert "failed: defense, the audit: the audit could not be finished" in render_table(results)
    again = _evaluate(tmp_path, protocol=_protocol(threat__contexts=["joint"]))
    assert again.run["verdict"] in ("sound", "suspect", "unreliable")
    pd.testing.assert_frame_equal(again.outcomes, results.outcomes)


def test_when_every_run_fails_there_is_no_evidence(tmp_path: Path, running: list[Any]) -> None:
    class Broken(type(make_classifier())):  # type: ignore[misc]
        def logits(self, z: Tensor) -> Tensor:
            if running:
                raise RuntimeError("out of luck")
            out: Tensor = super().logits(z)
            return out

    plain = make_classifier()
    with pytest.raises(AttackError, match=r"defense, run ste:apgd-margin:0, batch 0: out of luck"):
        _evaluate(
            tmp_path / "r", Broken(plain.trunk, plain.fc).eval(),
            protocol=_protocol(**FEW, attack__apgd__runs=["ste:margin"], attack__recombination__runs=["ste:margin"]),
            surrogates={"ste": Surrogate("ste", lambda defense, z: defense.logits(z))},
        )  # fmt: skip
    assert list((tmp_path / "r").iterdir()) == []


def test_a_state_that_changed_before_the_interrupt_is_remembered(tmp_path: Path, running: list[Any]) -> None:
    """The sign is not lost with the process that saw it."""

    class Counting(WholeModel):
        def __init__(self, *, changes: bool) -> None:
            super().__init__(make_classifier(), batch_dependent=False)
            self.model.register_buffer("seen", torch.zeros(()))
            self.changes = changes

        def logits(self, z: Tensor) -> Tensor:
            if self.changes and running:
                self.model.seen += 1  # type: ignore[operator]
            return super().logits(z)

    protocol = _protocol(threat__contexts=["joint"])
    _stop(tmp_path, 9, model=Counting(changes=True), protocol=protocol, fc=False)
    results = _evaluate(tmp_path, Counting(changes=False), protocol=protocol, fc=False)
    sign = results.audit.set_index("sign").loc["state_guard"]
    assert sign["fired"]
    assert "buffer seen" in sign["reason"]
    assert results.run["verdict"] == "unreliable"


def test_wall_time_goes_on(tmp_path: Path) -> None:
    _stop(tmp_path)
    about = [path.read_bytes().split(b"\n")[1] for path in tmp_path.glob("unfinished/*.unit")]
    before = max(json.loads(line)["seconds"] for line in about)
    results = _evaluate(tmp_path)
    assert results.run["seconds"] >= before > 0
    assert not math.isnan(sum(results.attacks["seconds"]))
