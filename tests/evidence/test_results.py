"""Evidence on disk: the promised columns, reading back, and folders that must not be overwritten."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from toys import make_classifier, make_hpm, make_samples

from msa_eval import Results, evaluate
from msa_eval.protocols import load_protocol

COLUMNS = {
    "summary": "target context metric value low high n",
    "attacks": "target context run surrogate attack loss restart surrogate_accuracy final any newly_broken forwards "
    "backwards decisions seconds",
    "samples": "target context index label batch position clean_prediction clean_correct robust broken_by broken_at "
    "min_margin",
    "outcomes": "target context run index surrogate_fooled final_broken any_broken first_iterate min_margin "
    "perturbation",
    "batches": "batch position index",
}


@pytest.fixture(scope="module")
def results() -> Results:
    protocol = load_protocol(
        "quick", overrides={"attack.square.queries": 5, "attack.apgd.steps": 2, "audit.samples": 16}
    )
    return evaluate(make_hpm(), make_samples(make_classifier(), 20), protocol=protocol, found_surrogates=False)


def test_the_promised_columns_and_rows(results: Results, tmp_path: Path) -> None:
    results.save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        [*(f"{n}.csv" for n in COLUMNS), "audit.csv", "run.json"]
    )
    tables = {name: pd.read_csv(tmp_path / f"{name}.csv") for name in COLUMNS}
    for name, columns in COLUMNS.items():
        assert set(columns.split()) <= set(tables[name].columns)
    assert list(tables["summary"]["metric"]) == ["clean", "paper", "realised", "worst_case"] * 2
    runs = 6 + 1, 2 + 1
    assert len(tables["attacks"]) == sum(runs)
    assert len(tables["outcomes"]) == 20 * sum(runs)
    assert len(tables["samples"]) == 20 * 2
    assert len(tables["batches"]) == 20
    for name in ("summary", "attacks"):
        shares = tables[name].select_dtypes(float).drop(columns="seconds", errors="ignore")
        assert "seconds" not in tables[name] or tables[name]["seconds"].isna().all()
        assert shares.stack().between(0, 1).all()


def test_run_json_says_where_it_comes_from(results: Results, tmp_path: Path) -> None:
    results.save(tmp_path)
    run = json.loads((tmp_path / "run.json").read_text())
    for key in ("schema_version", "key", "seed", "protocol", "data", "targets", "batches", "packages", "device"):
        assert run[key] is not None
    for key in ("precision", "git", "command", "seconds", "verdict", "platform", "threads", "python"):
        assert key in run
    assert run["protocol"]["overrides"] == {"attack.square.queries": 5, "attack.apgd.steps": 2, "audit.samples": 16}
    assert run["protocol"]["modified"] is True
    assert "queries = 5" in run["protocol"]["text"]
    assert run["packages"]["torch"]
    assert {len(run["data"]["sha256"]), len(run["protocol"]["sha256"]), len(run["key"])} == {64}


def _filled(table: pd.DataFrame) -> dict[str, Any]:
    """Missing texts read back as another kind of missing."""
    return {"broken_by": table["broken_by"].fillna("").astype(object)} if "broken_by" in table else {}


def test_what_is_saved_loads_again(results: Results, tmp_path: Path) -> None:
    results.save(tmp_path)
    loaded = Results.load(tmp_path)
    for name in COLUMNS:
        found, expected = (table.assign(**_filled(table)) for table in (getattr(loaded, name), getattr(results, name)))
        pd.testing.assert_frame_equal(found, expected, check_dtype=False, rtol=1e-6)
    assert loaded.run["key"] == results.run["key"]
    assert loaded.attacks["seconds"].tolist() == results.attacks["seconds"].tolist()
    loaded.save(tmp_path / "again")
    for name in COLUMNS:
        assert (tmp_path / "again" / f"{name}.csv").read_text() == (tmp_path / f"{name}.csv").read_text()


def test_the_same_results_may_be_written_again_and_others_not(results: Results, tmp_path: Path) -> None:
    results.save(tmp_path)
    results.save(tmp_path)
    other = dataclasses.replace(results, run={**results.run, "key": "other", "seed": 9})
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=r"results of another evaluation \(quick, seed 0\).*force=True"):
        other.save(tmp_path)
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    other.save(tmp_path, force=True)
    assert Results.load(tmp_path).run["seed"] == 9


def test_folders_of_other_things_are_left_alone(results: Results, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(ValueError, match=r"holds no results but thesis\.tex"):
        results.save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(ValueError, match="is a file"):
        results.save(tmp_path / "thesis.tex")
    with pytest.raises(ValueError, match="can't be written to"):
        results.save(tmp_path / "thesis.tex" / "deep")
    (tmp_path / "samples.csv").write_text("precious too")
    (tmp_path / "thesis.tex").rename(tmp_path.parent / "thesis.tex")
    with pytest.raises(ValueError, match=r"holds no results but samples\.csv"):
        results.save(tmp_path)
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "run.json").write_text("{")
    with pytest.raises(ValueError, match="not readable"):
        results.save(tmp_path / "x")


def test_a_full_disk_leaves_what_was_there(results: Results, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full: Any = OSError(errno.ENOSPC, "No space left on device")
    calls = []

    def fsync(number: int) -> None:
        calls.append(number)
        if len(calls) > 3:
            raise full

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", fsync)
        with pytest.raises(OSError, match=r"outcomes\.csv: No space left on device; free some space"):
            results.save(tmp_path)
    assert list(tmp_path.iterdir()) == []
    results.save(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    other = dataclasses.replace(results, run={**results.run, "key": "other"})
    calls.clear()
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", fsync)
        with pytest.raises(OSError, match="No space left"):
            other.save(tmp_path, force=True)
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}


def test_results_of_another_schema_or_with_a_table_gone(results: Results, tmp_path: Path) -> None:
    results.save(tmp_path)
    (tmp_path / "samples.csv").unlink()
    with pytest.raises(ValueError, match="no complete results"):
        Results.load(tmp_path)
    dataclasses.replace(results, run={**results.run, "schema_version": 99}).save(tmp_path)
    with pytest.raises(ValueError, match="schema version 99"):
        Results.load(tmp_path)
