"""The committed ablations agree with their samples and with what the document shows of them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pandas as pd
import pytest
from scipy.stats import binomtest

from msa_eval import Ablation, load_checkpoint
from msa_eval.hashing import weights_hash
from msa_eval.references import reference_path
from msa_eval.report import render_ablation
from msa_eval.studies.ablation import FULL, VARIANTS

ROOT = Path(__file__).parents[2]
FOLDERS = sorted((ROOT / "results").glob("ablation-*"))
ids = [folder.name for folder in FOLDERS]


def _samples(folder: Path, variant: str, context: str) -> pd.DataFrame:
    target = "fc" if variant == "fc" else "defense"
    table = pd.read_csv(folder / (FULL if variant == "fc" else variant) / "samples.csv")
    return table[(table["target"] == target) & (table["context"] == context)].set_index("index")


@pytest.mark.parametrize("folder", FOLDERS, ids=ids)
def test_the_table_follows_from_the_samples(folder: Path) -> None:
    table = Ablation.load(folder).table
    assert {"fc", FULL, "no-global", "plain-l2"} <= set(table["variant"]) <= {"fc", *VARIANTS}
    columns = {"clean": "clean_correct", "realised": "committed_right", "worst_case": "robust"}
    full = table[table["variant"] == FULL].set_index(["context", "metric"])["value"]
    for row in table.to_dict(orient="records"):
        samples = _samples(folder, row["variant"], row["context"])
        assert row["n"] == len(samples)
        if row["metric"] in columns:
            right = int(samples[columns[row["metric"]]].sum())
            interval = binomtest(right, len(samples)).proportion_ci(method="wilson")
            assert [row["value"], row["low"], row["high"]] == pytest.approx([right / len(samples), *interval], abs=1e-9)
        assert row["difference"] == pytest.approx(row["value"] - full[row["context"], row["metric"]], abs=1e-12)


@pytest.mark.parametrize("folder", FOLDERS, ids=ids)
def test_all_variants_share_start_samples_batches_and_protocol(folder: Path) -> None:
    about = Ablation.load(folder).about
    name = folder.name.removeprefix("ablation-")
    assert about["classifier"]["sha256"] == weights_hash(load_checkpoint(reference_path(name)).classifier)
    assert about["git"]["dirty"] is False
    plans = set()
    done = {variant: noted for variant, noted in about["variants"].items() if "key" in noted}
    assert {"fc", *done} == set(Ablation.load(folder).table["variant"])
    for variant, noted in done.items():
        run = json.loads((folder / variant / "run.json").read_text(encoding="utf-8"))
        assert run["key"] == noted["key"]
        assert run["targets"]["defense"]["sha256"] == noted["sha256"]
        assert run["git"]["dirty"] is False
        plans.add((run["protocol"]["sha256"], run["seed"], run["data"]["sha256"], run["batches"]["sha256"]))
        for file in ("summary.csv", "attacks.csv", "samples.csv"):
            assert hashlib.sha256((folder / variant / file).read_bytes()).hexdigest() == run["files"][file]
    wanted = (about["protocol"]["sha256"], about["seed"], about["test"]["sha256"])
    assert [plan[:3] for plan in plans] == [wanted]
    assert sum(path.stat().st_size for path in folder.rglob("*")) < 2**21


@pytest.mark.parametrize("folder", FOLDERS, ids=ids)
def test_the_document_shows_the_table_and_the_pairs(folder: Path) -> None:
    text = (ROOT / "docs/research/ablation.md").read_text(encoding="utf-8")
    ablation = Ablation.load(folder)
    assert render_ablation(ablation) in text
    part = text.partition(f"results/{folder.name}/")[2]
    for variant in (name for name in ablation.table["variant"].unique() if name != FULL):
        cells = []
        for context in ("joint", "solo"):
            full, other = (_samples(folder, name, context)["robust"] for name in (FULL, variant))
            only_full, only_other = int((full & ~other).sum()), int((other & ~full).sum())
            p = binomtest(only_full, only_full + only_other).pvalue if only_full + only_other else 1.0
            cells.append(f"{only_full} : {only_other} ({p:.2g})")
        assert f"| {variant} | {cells[0]} | {cells[1]} |" in part, (variant, cells)
