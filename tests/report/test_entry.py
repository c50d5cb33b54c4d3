"""RobustBench's entries: its fields, its reader, and nothing claimed that was not measured."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from msa_eval import Results
from msa_eval.cli import main
from msa_eval.report.entry import FIELDS, robustbench_entry

COMMITTED = Path(__file__).parents[2] / "results" / "cifar10-wrn10-2"


@pytest.fixture(scope="module")
def results() -> Results:
    return Results.load(COMMITTED)


def test_numbers_are_those_of_the_summary(results: Results) -> None:
    entry = robustbench_entry(results, about={"name": "A paper", "dataset": "cifar10", "footnote": "Ours."})
    assert tuple(entry) == FIELDS
    summary = results.summary.set_index(["target", "metric"])["value"]
    assert float(entry["external"]) == pytest.approx(100 * summary["defense", "worst_case"], abs=0.005)
    assert float(entry["clean_acc"]) == pytest.approx(100 * summary["defense", "clean"], abs=0.005)
    assert entry["eps"] == "8/255"
    assert entry["dataset"] == "cifar10"
    assert entry["unreliable"] is False
    assert "autoattack_acc" not in entry
    assert entry["footnote"].startswith("Ours. Evaluated with msa-eval")
    assert "paper-cifar10 v1, modified (Linf, context joint)" in entry["footnote"]
    assert "of 2500 samples" in entry["footnote"]
    fc = robustbench_entry(results, target="fc")
    assert fc["dataset"] is None  # its data was an .npz file
    assert float(fc["external"]) == pytest.approx(100 * summary["fc", "worst_case"], abs=0.005)


def test_an_unreliable_verdict_is_said(results: Results) -> None:
    run = dict(results.run) | {"verdicts": {"defense": {"verdict": "unreliable"}}}
    assert robustbench_entry(dataclasses.replace(results, run=run))["unreliable"] is True


def test_what_makes_no_entry(results: Results) -> None:
    with pytest.raises(ValueError, match="no field 'colour'"):
        robustbench_entry(results, about={"colour": "red"})
    with pytest.raises(ValueError, match="external is measured"):
        robustbench_entry(results, about={"external": "99.9"})
    with pytest.raises(ValueError, match="no other/joint in these results; there is defense/joint, fc/joint"):
        robustbench_entry(results, target="other")
    run = dict(results.run) | {"target": {"random_weights": True}}
    with pytest.raises(ValueError, match="random weights"):
        robustbench_entry(dataclasses.replace(results, run=run))


@pytest.mark.skipif(importlib.util.find_spec("robustbench") is None, reason="needs pip install '.[robustbench]'")
def test_robustbench_reads_it_and_ranks_by_it(
    results: Results, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from msa_eval.installation.imports import import_robustbench

    import_robustbench()
    from robustbench.utils import list_available_models

    monkeypatch.chdir(tmp_path)
    out = tmp_path / "model_info" / "cifar10" / "Linf" / "Standard.json"
    about = ["name=A paper", "link=here", "venue=Unpublished", "architecture=WideResNet-10-2"]
    done = CliRunner().invoke(
        main, ["entry", str(COMMITTED), "--out", str(out), *(word for field in about for word in ("--about", field))]
    )
    assert done.exit_code == 0, done.stderr
    list_available_models("cifar10", "Linf")
    shown = capsys.readouterr().out
    entry = json.loads(out.read_text())
    assert f"{entry['external']}%" in shown
    assert "WideResNet-10-2" in shown


def test_the_command(tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["entry", str(COMMITTED)])
    assert json.loads(done.stdout)["clean_acc"]
    (tmp_path / "e.json").write_text("{}")
    done = CliRunner().invoke(main, ["entry", str(COMMITTED), "--out", str(tmp_path / "e.json")])
    assert done.exit_code == 2
    assert "exists; choose another file" in done.stderr
    done = CliRunner().invoke(main, ["entry", str(tmp_path)])
    assert done.exit_code == 2
    assert "holds no complete results" in done.stderr
