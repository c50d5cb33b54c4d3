"""The committed figures' tables agree with the formulas, with themselves and with what the documentation says."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from msa_eval.hashing import weights_hash
from msa_eval.references import reference_path
from msa_eval.sensitivity import RESNET50_FC, RESNET50_L2, empirical_cdf, isotropic_cdf
from msa_eval.targets.checkpoint import load_checkpoint

ROOT = Path(__file__).parents[2]
FOLDERS = sorted(path.parent for path in (ROOT / "results/figure-1").glob("*/sensitivity.json"))
CURVES = [folder for folder in FOLDERS if (folder / "curves.csv").is_file()]


def test_they_are_there() -> None:
    assert {folder.name for folder in CURVES} == {"autoattack-resnet18", "cifar10-wrn10-2"}


def test_the_papers_figures_follow_from_the_formulas() -> None:
    table = pd.read_csv(ROOT / "results/figure-2-3/cdf.csv")
    for column in table.columns.drop(["x", "empirical_resnet50"]):
        np.testing.assert_allclose(
            table[column], isotropic_cdf(table["x"], int(column.removeprefix("isotropic_d"))), atol=1e-10
        )
    np.testing.assert_allclose(
        table["empirical_resnet50"], empirical_cdf(table["x"], RESNET50_FC, RESNET50_L2), atol=1e-9
    )


@pytest.mark.parametrize("folder", CURVES, ids=lambda folder: folder.name)
def test_the_documentation_shows_the_curves(folder: Path) -> None:
    text = (ROOT / "docs/research/sensitivity.md").read_text(encoding="utf-8")
    curves = pd.read_csv(folder / "curves.csv")
    for head, title in (("fc", "FC"), ("l2", "ℓ2")):
        for run, name in (("own", "own"), ("worst_case", "worst case")):
            rows = curves[(curves["head"] == head) & (curves["run"] == run)].sort_values("eps")
            cells = " | ".join(f"{100 * value:.1f}" for value in rows["value"])
            assert f"| {title}, {name} | {cells} |" in text


@pytest.mark.parametrize("folder", CURVES, ids=lambda folder: folder.name)
def test_worst_cases_are_the_least_and_fall_with_eps(folder: Path) -> None:
    curves = pd.read_csv(folder / "curves.csv")
    for _, rows in curves.groupby("head"):
        worst = rows[rows["run"] == "worst_case"].sort_values("eps")["value"].tolist()
        assert worst == sorted(worst, reverse=True)
        for _, at in rows[rows["eps"] > 0].groupby("eps"):
            runs = at[at["run"] != "worst_case"]
            assert at.loc[at["run"] == "worst_case", "value"].item() <= runs["any"].min()


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_the_summary_follows_from_the_samples(folder: Path) -> None:
    rows = pd.read_csv(folder / "sensitivity.csv")
    summary = pd.read_csv(folder / "sensitivity-summary.csv").set_index("pairs")
    assert summary.loc["own", "condition"] == pytest.approx(rows["condition"].mean())
    assert summary.loc["other", "condition"] == pytest.approx(rows["condition_others"].mean())
    assert summary.loc["own", "more_sensitive"] == pytest.approx(rows["more_sensitive"].mean())
    assert (
        rows["ratio"] - np.abs(np.cos(np.radians(rows["theta_c"]))) / np.sin(np.radians(rows["theta_d"]))
    ).abs().max() < 1e-9


def test_they_say_where_they_come_from() -> None:
    for folder in FOLDERS:
        about = json.loads((folder / "sensitivity.json").read_text(encoding="utf-8"))
        assert not any(argument.startswith("/") for argument in about["command"])
        assert about["git"]["dirty"] is False
    # The trunk and both heads of the reference as they are packaged, but the class means are those of training data.
    text = (ROOT / "results/figure-1/cifar10-wrn10-2/sensitivity.json").read_text(encoding="utf-8")
    assert json.loads(text)["weights_sha256"] != weights_hash(load_checkpoint(reference_path("cifar10-wrn10-2")).model)
