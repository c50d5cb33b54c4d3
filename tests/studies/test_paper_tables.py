"""The paper's table: its own numbers, the measured ones beside them, and why a row is empty."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from click.testing import CliRunner

from msa_eval import HPM, Samples, load_target, save_checkpoint
from msa_eval.cli import main
from msa_eval.report import render_paper_table
from msa_eval.studies import paper_tables
from msa_eval.studies.paper_tables import TABLES, PaperModel, Reported, paper_table

NEEDS = pytest.mark.skipif(
    importlib.util.find_spec("robustbench") is None, reason="needs pip install '.[robustbench]': no robustbench"
)
NAME = "Addepalli2022Efficient_RN18"
FAST = {
    "samples.fraction": 1.0,
    "samples.limit": 4,
    "attack.apgd.steps": 1,
    "attack.square.queries": 1,
    "audit.samples": 0,
}


def test_the_papers_numbers() -> None:
    """Every cell of the paper's main table, written down a second time as HPM's gains."""
    gains = {
        dataset: [(round(m.hpm.robust - m.fc.robust, 1), round(m.hpm.clean - m.fc.clean, 1)) for m in models]
        for dataset, models in TABLES.items()
    }
    assert gains == {
        "cifar10": [(2.1, -1.1), (1.6, -1.4), (5.6, -2.5), (2.3, -1.8)],
        "cifar100": [(0.8, -0.2), (0.4, 0.0), (1.8, 0.0)],
        "imagenet": [(2.3, -0.5), (2.0, -1.7), (1.5, -4.4), (2.7, -0.3)],
    }


@NEEDS
def test_every_name_is_one_of_robustbench() -> None:
    from msa_eval.installation.imports import import_robustbench

    import_robustbench()
    from robustbench.model_zoo import model_dicts

    for dataset, kinds in model_dicts.items():
        linf = next(models for norm, models in kinds.items() if norm.value == "Linf")
        assert {model.name for model in TABLES[dataset.value]} <= set(linf)


@pytest.fixture
def samples() -> Samples:
    x = torch.rand(12, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return Samples(x, torch.arange(12) % 10, "random")


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two small models in the paper's place; nothing is downloaded."""
    from msa_eval.installation.imports import import_robustbench

    import_robustbench()

    def fail(*_: Any) -> None:
        raise OSError("no network")

    monkeypatch.setattr("robustbench.utils.download_gdrive_new", fail)
    rows = (
        PaperModel(NAME, Reported(90.0, 60.0), Reported(80.0, 70.0)),
        PaperModel("Rade2021Helper_R18_ddpm", Reported(91.0, 61.0), Reported(81.0, 71.0)),
    )
    monkeypatch.setattr(paper_tables, "TABLES", dict(TABLES) | {"cifar10": rows})


@NEEDS
@pytest.mark.usefixtures("table")
def test_rows_are_measured_or_say_why_not(samples: Samples, tmp_path: Path) -> None:
    folder = tmp_path / "models" / "cifar10" / "Linf"
    folder.mkdir(parents=True)
    target = load_target(f"robustbench:{NAME}", samples, random_weights=True)
    torch.save(
        {**{n.removeprefix("body."): v for n, v in target.classifier.trunk.state_dict().items()},
         **{f"linear.{n}": v for n, v in target.classifier.fc.state_dict().items()}}, folder / f"{NAME}.pt",
    )  # fmt: skip
    found = paper_table("cifar10", samples, models=tmp_path / "models", overrides=FAST, out=tmp_path / "out")
    rows = found.set_index(["model", "head"])
    measured = rows.loc[(NAME, "fc")]
    assert measured["n"] == 4
    assert 0 <= measured["worst_case"] <= measured["paper"] <= measured["clean"] <= 100
    summary = pd.read_csv(tmp_path / "out" / NAME / "summary.csv").set_index("metric")["value"]
    assert measured["clean"] == pytest.approx(100 * summary["clean"])
    assert (measured["reported_clean"], measured["reported_robust"]) == (90.0, 60.0)
    assert "no HPM head; make one with: msa-eval finetune robustbench:" in rows.loc[(NAME, "hpm"), "note"]
    assert f"@cifar10/Linf --data cifar10 --models {tmp_path}" in rows.loc[(NAME, "hpm"), "note"]
    for head in ("fc", "hpm"):
        absent = rows.loc[("Rade2021Helper_R18_ddpm", head)]
        assert math.isnan(absent["worst_case"])
        assert f"put Rade2021Helper_R18_ddpm.pt into {folder}" in absent["note"]
    assert len(pd.read_csv(tmp_path / "out" / "paper_table.csv")) == 4

    text = render_paper_table(found, dataset="cifar10")
    assert f"{measured['clean']:.1f} [" in text
    assert "Rade2021Helper_R18_ddpm, fc and hpm: the weights of" in " ".join(text.split())

    hpm = HPM(target.classifier.trunk, target.classifier.fc).eval()
    assert target.blueprint is not None
    save_checkpoint(folder / f"{NAME}-hpm.safetensors", hpm, target.blueprint)
    both = paper_table("cifar10", samples, models=tmp_path / "models", overrides=FAST).set_index(["model", "head"])
    assert both.loc[(NAME, "hpm"), "n"] == 4
    assert both.loc[(NAME, "fc"), "clean"] == measured["clean"]
    assert both.loc[(NAME, "hpm"), "note"] == ""


@NEEDS
@pytest.mark.usefixtures("table")
def test_an_hpm_head_of_another_model_is_not_taken(samples: Samples, tmp_path: Path) -> None:
    folder = tmp_path / "cifar10" / "Linf"
    target = load_target(f"robustbench:{NAME}@cifar100", samples, random_weights=True)
    assert target.blueprint is not None
    hpm = HPM(target.classifier.trunk, target.classifier.fc).eval()
    save_checkpoint(folder / f"{NAME}-hpm.safetensors", hpm, target.blueprint)
    note = paper_table("cifar10", samples, models=tmp_path, overrides=FAST).loc[0, "note"]
    assert f"{NAME}-hpm.safetensors was made from robustbench:{NAME}@cifar100, not from" in note


@pytest.mark.usefixtures("table")
@NEEDS
@pytest.mark.parametrize("error", [RuntimeError("CUDA out of memory"), OSError("disk full")])
def test_a_model_that_fails_leaves_the_others_and_every_row_is_written(
    error: Exception, samples: Samples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = []

    def fail(*_: Any, **__: Any) -> None:
        file = tmp_path / "paper_table.csv"
        written.append(len(pd.read_csv(file)) if file.is_file() else 0)
        raise error

    monkeypatch.setattr(paper_tables, "load_target", fail)
    found = paper_table("cifar10", samples, out=tmp_path)
    assert set(found["note"]) == {str(error)}
    assert written == [0, 2]
    assert len(pd.read_csv(tmp_path / "paper_table.csv")) == 4


@NEEDS
@pytest.mark.usefixtures("table")
@pytest.mark.filterwarnings("ignore:'saved_variables' is deprecated")  # in robustbench's Swish
def test_the_command_marks_random_weights(samples: Samples, tmp_path: Path) -> None:
    import numpy as np

    np.savez(tmp_path / "d.npz", x=(255 * samples.x).byte().numpy(), y=samples.y.numpy())
    sets = [word for key, value in FAST.items() for word in ("--set", f"{key}={value}")]
    done = CliRunner().invoke(
        main, ["paper-table", "cifar10", "--data", str(tmp_path / "d.npz"), "--random-weights", "--limit", "2", *sets,
               "--out", str(tmp_path / "out"), "--quiet"],
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    assert f"{NAME}, fc: random weights" in done.stdout


def test_no_such_table(samples: Samples) -> None:
    with pytest.raises(ValueError, match="no table of 'mnist'; available: cifar10, cifar100, imagenet"):
        paper_table("mnist", samples)
