"""The cross-check fires where a weakened protocol leaves what a peer breaks, and is silent where it leaves nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from click.testing import CliRunner, Result
from torch import nn
from toys import make_hpm, make_samples

from msa_eval import HPM, Results, Samples, evaluate
from msa_eval.attacks.external import LibraryAttack
from msa_eval.cli import main
from msa_eval.evidence.folder import CROSSCHECK
from msa_eval.protocols import load_protocol
from msa_eval.references import reference_path
from msa_eval.studies import crosscheck as module
from msa_eval.studies.crosscheck import crosscheck

DIGITS = str(reference_path("digits"))
WEAK = {"samples.limit": 24, "batches.size": 12, "audit.samples": 0, "threat.contexts": ["joint", "solo", "composed"],
        "attack.apgd.steps": 1, "attack.composition.trials": 1, "attack.composition.pool": 8,
        "attack.square.queries": 1}  # fmt: skip


@pytest.fixture(scope="module")
def weak(digits_hpm: HPM, digits: Samples, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of a protocol of one step; digits have 10 classes, so the evidence leaves much to be broken."""
    folder = tmp_path_factory.mktemp("weak") / "r"
    protocol = load_protocol("quick", overrides=WEAK | {"threat.eps": 0.15})
    evaluate(digits_hpm, digits, protocol=protocol, out=folder, save_gallery=False)
    run = json.loads((folder / "run.json").read_text())
    assert Results.load(folder).run["key"] == run["key"]
    return folder


@pytest.fixture(scope="module")
def strong(digits_hpm: HPM, digits: Samples, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("strong") / "r"
    protocol = load_protocol("digits", overrides={"samples.limit": 16, "audit.samples": 0})
    evaluate(digits_hpm, digits, protocol=protocol, out=folder, save_gallery=False)
    return folder


def test_what_a_weak_protocol_leaves_is_found_on_the_real_batch(weak: Path, digits_hpm: HPM, digits: Samples) -> None:
    found = crosscheck(weak, digits_hpm, digits, peers=["autoattack:apgd-t"], surrogates=["fc-oracle"], steps=10)
    rows = Results.load(weak).samples
    assert not found.passed
    assert found.table[["target", "context"]].to_numpy().tolist() == [
        ["defense", "joint"],
        ["defense", "solo"],
        ["fc", "joint"],
    ]
    for row in found.table.to_dict(orient="records"):
        of_it = rows[(rows["target"] == row["target"]) & (rows["context"] == row["context"])]
        robust = set(of_it.loc[of_it["robust"], "index"])
        which = {int(index) for index in row["which"].split()}
        assert row["samples"] == len(robust)
        assert row["broken"] == len(which) > 0
        assert which <= robust
        assert (row["unconfirmed"], row["error"], row["runs"]) == (0, "", 2)
    assert len(found.found) == found.table["broken"].sum()
    labels = dict(zip(found.found["index"], found.found["label"], strict=True))
    assert all(int(digits.y[index]) == label for index, label in labels.items())


def test_a_strong_protocol_leaves_nothing(strong: Path, digits_hpm: HPM, digits: Samples) -> None:
    found = crosscheck(strong, digits_hpm, digits, peers=["autoattack:apgd-ce", "autoattack:fab-t"], steps=10)
    assert found.passed
    assert found.found.empty
    assert found.table["samples"].min() > 0
    assert found.table["surrogate"].tolist() == ["fc-oracle", "ste"] * 2 + ["fc-oracle"] * 2


def test_peers_are_run_on_a_surrogate_that_the_target_brings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hpm = make_hpm()
    monkeypatch.setattr(hpm, "surrogates", {"smooth": lambda defense, z: defense.fc_logits(z)}, raising=False)
    samples = make_samples(hpm.fc_target, 12)
    protocol = load_protocol("quick", overrides=WEAK | {"samples.limit": 12, "threat.contexts": ["joint"]})
    evaluate(hpm, samples, protocol=protocol, out=tmp_path / "r", save_gallery=False)
    found = crosscheck(
        tmp_path / "r", hpm, samples, peers=["autoattack:apgd-ce"], surrogates=["smooth"], steps=2
    ).table  # fmt: skip
    assert found[["target", "surrogate"]].to_numpy().tolist() == [["defense", "smooth"], ["fc", "ste"]]
    assert not found["error"].any()
    with pytest.raises(ValueError, match="unknown surrogate 'smoth'; did you mean 'smooth'"):
        crosscheck(tmp_path / "r", hpm, samples, peers=["autoattack:apgd-ce"], surrogates=["smoth"], steps=2)


def test_passes_are_spent_by_further_starts(weak: Path, digits_hpm: HPM, digits: Samples) -> None:
    how: dict[str, Any] = {"peers": ["autoattack:apgd-ce"], "surrogates": ["ste"], "targets": ["defense"],
                           "contexts": ["solo"], "steps": 3}  # fmt: skip
    once, often = (crosscheck(weak, digits_hpm, digits, passes=n, **how).table.iloc[0] for n in (1, 30))
    assert once["runs"] == 2
    assert often["runs"] > 6
    assert often["broken"] >= once["broken"]
    assert once["passes"] < 8 < often["passes"]


def test_a_claim_that_no_replay_confirms_does_not_count(
    weak: Path, digits_hpm: HPM, digits: Samples, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        module.Replay, "breaks", lambda self, proof: torch.zeros(len(proof.positions), dtype=torch.bool)
    )
    found = crosscheck(
        weak, digits_hpm, digits, peers=["autoattack:apgd-t"], targets=["defense"], contexts=["joint"], steps=5
    )
    assert found.found.empty
    assert (found.table["broken"] == 0).all()
    assert found.table["unconfirmed"].max() > 0


def _check(folder: Path, *more: str) -> Result:
    return CliRunner().invoke(main, ["crosscheck", str(folder), *more])


GIVEN = (DIGITS, "--data", "digits", "--quiet")
ONE = ("--peer", "autoattack:apgd-t", "--on", "defense", "--context", "joint", "--steps", "10")


@pytest.fixture
def folder(weak: Path, tmp_path: Path) -> Path:
    shutil.copytree(weak, tmp_path / "r")
    return tmp_path / "r"


def test_the_command_lists_what_was_broken_and_exits_with_1(folder: Path) -> None:
    result = _check(folder, *GIVEN, *ONE)
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit)
    table = pd.read_csv(folder / CROSSCHECK, dtype=str, keep_default_na=False)
    assert table["surrogate"].tolist() == ["fc-oracle", "ste"]
    both = {index for row in table["which"] for index in row.split()}
    assert f"broken by peers alone: {len(both)}, each on its real batch and replayed" in result.stdout
    for index in both:
        assert f"  sample {index} (label " in result.stdout
    assert f"table in {folder / CROSSCHECK}" in result.stdout
    verified = CliRunner().invoke(main, ["verify", str(folder), DIGITS, "--data", "digits", "--quiet"])
    assert "ok      hashes " in verified.stdout  # the table is no evidence, so it is no forgery either


def test_the_command_exits_with_0_where_nothing_was_broken(strong: Path, tmp_path: Path) -> None:
    out = tmp_path / "c.csv"
    result = _check(strong, *GIVEN, *ONE, "--out", str(out))
    assert result.exit_code == 0, result.output
    assert "broken by peers alone: 0\n" in result.stdout
    assert out.is_file()


def test_the_command_takes_target_and_data_from_the_results(tmp_path: Path) -> None:
    folder = tmp_path / "r"
    settings = [part for key, value in {**WEAK, "samples.limit": 10, "threat.contexts": ["joint"]}.items()
                for part in ("--set", f"{key}={json.dumps(value)}")]  # fmt: skip
    made = ["evaluate", DIGITS, "--data", "digits", "--protocol", "quick", "--out", str(folder), *settings, "--quiet"]
    assert CliRunner().invoke(main, made).exit_code == 0
    run = json.loads((folder / "run.json").read_text())
    run["command"] = ["msa-eval", *made]
    from msa_eval.evidence.results import run_digest

    run["sha256"] = run_digest(run)
    (folder / "run.json").write_text(json.dumps(run))
    result = _check(folder, *ONE, "--quiet")
    assert result.exit_code in (0, 1)
    assert "table in" in result.stdout


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (
            ["msa-eval", "evaluate", "models.py:make", "--data", "digits", "--out", "r"],
            "is code, which is imported only",
        ),
        (["msa-eval", "evaluate", "hpm.safetensors", "--trunk", "t.py:make", "--data", "digits"], "is code, which"),
        (["pytest"], "was not made by 'msa-eval evaluate'"),
        (["msa-eval", "evaluate", "--data", "digits"], "names no target or no data"),
        (["msa-eval", "evaluate", DIGITS, "--data", "gone.npz", "--out", "r"], "no file gone.npz, which the results'"),
    ],
)
def test_code_is_not_imported_because_a_file_says_so(folder: Path, command: list[str], message: str) -> None:
    run = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(run | {"command": command}))
    result = _check(folder)
    assert result.exit_code == 2
    assert message in result.stderr
    assert "--data" in result.stderr


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--peer", "autoattack:fabt"), "did you mean 'fab-t'"),
        (("--peer", "nothing"), "unknown peer 'nothing'"),
        (("--context", "alone"), "the results have no context 'alone'; they have joint, solo, composed"),
        (("--out", "table.txt"), "choose one that ends in .csv"),
        (("--peer", "autoattack:apgd-ce", "--surrogate", "softhybrid"), "did you mean 'soft-hybrid'"),
    ],
)
def test_mistakes_are_told_in_a_line(folder: Path, more: tuple[str, ...], message: str) -> None:
    result = _check(folder, *GIVEN, *more)
    assert result.exit_code == 2
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_other_data_and_changed_results_are_refused(folder: Path, digits_hpm: HPM, digits: Samples) -> None:
    other = Samples(digits.x[:300], digits.y[:300], "others")
    with pytest.raises(ValueError, match="is not the data the results are about"):
        crosscheck(folder, digits_hpm, other)
    with pytest.raises(ValueError, match="the results contain defense and fc"):
        crosscheck(folder, nn.Sequential(digits_hpm.trunk, digits_hpm.fc).eval(), digits)
    path = folder / "samples.csv"
    path.write_text(path.read_text().replace("True", "False", 1))
    with pytest.raises(ValueError, match=r"samples\.csv was tampered with"):
        crosscheck(folder, digits_hpm, digits)
    with pytest.raises(ValueError, match="holds no complete results"):
        crosscheck(folder / "none", digits_hpm, digits)


def test_a_peer_that_fails_is_told_and_never_reads_as_nothing_found(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from msa_eval.engine import external_runs

    toy = LibraryAttack("autoattack:square", lambda model, x, y, seed, turn: x * torch.nan, gradient_free=True)
    monkeypatch.setattr(external_runs, "find", lambda name, ball, options: toy)
    result = _check(folder, *GIVEN, "--peer", "autoattack:square", "--on", "defense", "--context", "joint")
    assert result.exit_code == 1
    message = " ".join(result.stdout.split())
    assert (
        "autoattack:square through target (defense, joint): FAILED: it returned 12 points that are not finite"
        in message
    )
    assert "broken by peers alone: 0" in message
