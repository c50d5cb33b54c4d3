"""``msa-eval sensitivity`` as a user meets it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner, Result

from msa_eval.cli import main
from msa_eval.data import load_samples
from msa_eval.hashing import weights_hash
from msa_eval.references import reference_path
from msa_eval.sensitivity import RESNET50_FC, RESNET50_L2, empirical_cdf, isotropic_cdf, plain_l2_head
from msa_eval.targets.checkpoint import load_checkpoint, save_checkpoint
from msa_eval.targets.loading import load_target

DIGITS = str(reference_path("digits"))


def _run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["sensitivity", *map(str, arguments)])


def test_a_checkpoint_is_measured(tmp_path: Path) -> None:
    result = _run(DIGITS, "--data", "digits", "--limit", 100, "--gamma", 60, "--out", tmp_path, "--quiet")
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    rows, summary = pd.read_csv(tmp_path / "sensitivity.csv"), pd.read_csv(tmp_path / "sensitivity-summary.csv")
    assert len(rows) == 100
    assert summary["n"].tolist() == [100, 900, 1000]
    assert summary.loc[0, "condition"] == rows["condition"].mean()
    shown = re.search(r"own class +100 +(\d+\.\d) %", result.stdout)
    assert shown is not None
    assert float(shown[1]) == pytest.approx(100 * summary.loc[0, "condition"], abs=0.05)
    assert "γ = 60°" in result.stdout
    cdf = pd.read_csv(tmp_path / "cdf.csv")
    assert cdf["measured"].iloc[-1] == 1
    for name in ("figure-3.pdf", "figure-3.svg"):
        assert (tmp_path / name).stat().st_size > 5000
    about = json.loads((tmp_path / "sensitivity.json").read_text())
    assert about["weights_sha256"] == weights_hash(load_checkpoint(DIGITS).model)
    assert about["settings"]["gamma"] == 60


def test_figure_1_of_a_checkpoint(tmp_path: Path) -> None:
    more = ("--attack", 16, "--eps", "0.1, 1/5", "--steps", 2, "--batch-size", 8)
    for out, train in (("own", ()), ("train", ("--train", "digits", "--train-limit", 400))):
        result = _run(DIGITS, "--data", "digits", *train, *more, "--limit", 50, "--out", tmp_path / out, "--quiet")
        assert result.exit_code == 0, result.output
        curves = pd.read_csv(tmp_path / out / "curves.csv")
        assert sorted(curves["eps"].unique()) == [0, 0.1, 0.2]
        assert (curves["n"] == 16).all()
        assert (tmp_path / out / "figure-1.svg").is_file()
        assert "worst_case" in result.stdout


def test_measured_changes(tmp_path: Path) -> None:
    more = ("--limit", 40, "--change", "0.15", "--steps", 5)
    result = _run(DIGITS, "--data", "digits", *more, "--out", tmp_path, "--quiet")
    assert result.exit_code == 0, result.output
    rows = pd.read_csv(tmp_path / "sensitivity.csv")
    assert rows["cos_gamma"].between(0, 1).all()
    assert rows["cos_gamma"].nunique() == 40
    assert "changes by APGD within 0.15, median |cos γ| 0." in result.stdout
    assert "Eq. 13" not in result.stdout


def test_the_same_call_writes_the_same_bytes(tmp_path: Path) -> None:
    for out in ("a", "b"):
        _run(DIGITS, "--data", "digits", "--limit", 40, "--out", tmp_path / out, "--quiet")
    for name in ("sensitivity.csv", "sensitivity-summary.csv", "cdf.csv", "figure-3.pdf", "figure-3.svg"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_the_papers_figures_from_formulas(tmp_path: Path) -> None:
    result = _run("paper", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    table = pd.read_csv(tmp_path / "cdf.csv")
    np.testing.assert_allclose(table["isotropic_d2048"], isotropic_cdf(table["x"], 2048), atol=1e-12)
    np.testing.assert_allclose(
        table["empirical_resnet50"], empirical_cdf(table["x"], RESNET50_FC, RESNET50_L2), atol=1e-12
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "cdf.csv", "figure-2.pdf", "figure-2.svg", "figure-3.pdf", "figure-3.svg",
    ]  # fmt: skip
    assert re.search(r"isotropic_d3 +0\.79", result.stdout)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((DIGITS,), "give the images to measure on with --data"),
        (("nowhere.safetensors", "--data", "digits"), "there is no file nowhere.safetensors"),
        ((DIGITS, "--data", "nowhere"), "there is no data 'nowhere'"),
        (("paper", "--data", "digits"), "need no data"),
        (("paper", "--train", "digits"), "need no data"),
        ((DIGITS, "--data", "digits", "--train-limit", 5), "give --train too"),
        ((DIGITS, "--data", "digits", "--train", "digits", "--train-limit", 5), "training samples of every class"),
        ((DIGITS, "--data", "digits", "--train", "digits", "--prototypes", "global"), "leave --prototypes out"),
        ((DIGITS, "--data", "digits", "--step", "0"), "positive length"),
        ((DIGITS, "--data", "digits", "--limit", 9, "--attack", 4, "--eps", "0"), "radii above 0"),
        (("autoattack-resnet18", "--data", "digits"), "a classifier has no prototypes"),
    ],
)
def test_bad_input_is_one_line(tmp_path: Path, arguments: tuple[object, ...], message: str) -> None:
    result = _run(*arguments, "--out", tmp_path / "out", "--quiet")
    assert result.exit_code == 2, result.output
    assert isinstance(result.exception, SystemExit)
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_eps_that_is_no_list_of_numbers(tmp_path: Path) -> None:
    result = _run(DIGITS, "--data", "digits", "--eps", "1/255,x", "--out", tmp_path)
    assert result.exit_code == 2
    assert "'1/255,x' is not a list of numbers such as 1/255,2/255" in result.stderr


def test_a_plain_classifier_needs_training_data(tmp_path: Path) -> None:
    loaded = load_checkpoint(DIGITS)
    path = tmp_path / "fc.safetensors"
    save_checkpoint(path, loaded.classifier, loaded.blueprint)
    assert _run(path, "--data", "digits", "--out", tmp_path / "no", "--quiet").exit_code == 2
    result = _run(path, "--data", "digits", "--train", "digits", "--limit", 30, "--out", tmp_path / "o", "--quiet")
    assert result.exit_code == 0, result.output


OWN = """
import torch
from torch import nn

def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.Tanh(), nn.Linear(12, 10)).eval()
"""


def test_own_code_and_checkpoints_made_from_it_are_measured(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(OWN)
    word, hpm, few = f"{tmp_path / 'mine.py'}:model", tmp_path / "hpm.safetensors", ("--limit", 20, "--quiet")
    result = _run(word, "--data", "digits", "--train", "digits", *few, "--out", tmp_path / "code")
    assert result.exit_code == 0, result.output
    about = json.loads((tmp_path / "code" / "sensitivity.json").read_text())
    assert about["checkpoint"] == about["target"]["word"] == "mine.py:model"
    loaded = load_target(word, load_samples("digits"))
    assert loaded.blueprint is not None
    save_checkpoint(hpm, plain_l2_head(loaded.classifier, load_samples("digits", split="train")), loaded.blueprint)
    result = _run(hpm, "--data", "digits", *few, "--out", tmp_path / "hpm")
    assert result.exit_code == 2
    assert "--trunk" in result.stderr
    result = _run(hpm, "--data", "digits", "--trunk", word, *few, "--out", tmp_path / "hpm")
    assert result.exit_code == 0, result.output
    tables = [pd.read_csv(tmp_path / name / "sensitivity.csv") for name in ("code", "hpm")]
    pd.testing.assert_frame_equal(*tables)
    for more, message in ((("--whole",), "no fully connected head"), (("--head", "nothing"), "nothing")):
        result = _run(word, "--data", "digits", *more, *few, "--out", tmp_path / "no")
        assert result.exit_code == 2
        assert message in result.stderr
    assert "takes no weights" in _run("paper", "--trunk", word, "--out", tmp_path / "no").stderr
