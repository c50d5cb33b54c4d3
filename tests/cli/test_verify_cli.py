"""``msa-eval verify`` as a user meets it."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from proofs import make_results

from msa_eval import HPM, Samples
from msa_eval.cli import main
from msa_eval.evidence.folder import ARCHIVE
from msa_eval.references import reference_path

DIGITS = str(reference_path("digits"))


@pytest.fixture(scope="module")
def honest(digits_hpm: HPM, digits: Samples, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    overrides = {"threat.contexts": ["joint", "solo"], "threat.eps": 0.15, "samples.limit": 40, "batches.size": 20}
    make_results(digits_hpm, digits, folder, **overrides)
    return folder


@pytest.fixture
def folder(honest: Path, tmp_path: Path) -> Path:
    shutil.copytree(honest, tmp_path / "r")
    return tmp_path / "r"


def _verify(folder: Path, *more: str, checkpoint: str = DIGITS) -> Result:
    return CliRunner().invoke(main, ["verify", str(folder), checkpoint, "--data", "digits", *more])


def test_honest_results_are_verified(folder: Path) -> None:
    result = _verify(folder)
    assert result.exit_code == 0, result.output
    *checks, last = result.stdout.splitlines()
    assert len(checks) == 14
    assert all(line.startswith("ok ") for line in checks)
    claims = int(last.split()[1])
    assert claims > 10
    assert last.startswith(f"verified: {claims} of {claims} broken samples replayed in ")
    assert last.endswith("that a sample is robust can't be proven by replay: breaks that were withheld are not found")
    assert "replay" in result.stderr
    assert _verify(folder, "--quiet").stderr == ""


def test_tampering_is_named_and_exits_with_1(folder: Path) -> None:
    path = folder / "samples.csv"
    path.write_text(path.read_text().replace("True", "False", 1))
    result = _verify(folder, "--quiet")
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit)
    lines = result.stdout.splitlines()
    assert "FAILED  hashes    samples.csv was tampered with: it does not match the hash in run.json" in lines
    assert lines[-1].startswith("FAILED: ")


def test_results_without_an_archive_are_not_verified(tmp_path: Path) -> None:
    evaluated = CliRunner().invoke(
        main,
        ["evaluate", DIGITS, "--data", "digits", "--protocol", "quick", "--out", str(tmp_path / "r"), "--quiet",
         "--limit", "20", "--set", "attack.square.queries=4", "--set", "attack.apgd.steps=3"],
    )  # fmt: skip
    assert evaluated.exit_code == 0, evaluated.output
    result = _verify(tmp_path / "r", "--quiet")
    assert result.exit_code == 1
    *checks, replay, last = result.stdout.splitlines()
    assert all(line.startswith("ok ") for line in checks)
    assert replay.startswith("--      replay    replayed 0 of ")
    assert replay.endswith("claims: the run was made without --save-adversarial")
    assert last.startswith("not verified: 0 of ")


def test_bad_input_exits_with_2(folder: Path, tmp_path: Path) -> None:
    for result, message in {
        _verify(tmp_path / "none"): "holds no complete results: there is no run.json",
        _verify(folder, checkpoint=str(folder / ARCHIVE)): "no msa-eval checkpoint",
        _verify(folder, "--device", "warp"): "device 'warp' can't be used",
    }.items():
        assert result.exit_code == 2
        assert message in result.stderr
        assert len(re.sub("^note: computing on .*\n", "", result.stderr).strip().splitlines()) == 1
