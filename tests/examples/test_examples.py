"""The examples of the guide: each runs as a user runs it, and its table says what it is there to show."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar

from click.testing import CliRunner
from examples.purifier import Purifier, make

from msa_eval import evaluate, load_samples
from msa_eval.cli import main

FOLDER = Path(__file__).parent


def run(name: str) -> str:
    command = [sys.executable, "-P", "-W", "error", str(FOLDER / f"{name}.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def column(table: str) -> dict[str, float]:
    """The first figure of each row, by the row's name."""
    return {row: float(value) for row, value in re.findall(r"^(\S+) +(\d+\.\d) [\[(]", table, re.MULTILINE)}


def test_batch_statistics_depend_on_the_batch_and_fall_in_it() -> None:
    table = run("batch_statistics")
    joint, alone = (column(part) for part in table.split("\nalone:", 1))
    assert "[batch_dependence]" in table
    assert joint["worst_case"] < 30 < alone["worst_case"] - 10
    assert alone["clean"] > 90


def test_adaptation_that_is_set_back_is_evaluated_and_falls_one_sample_at_a_time() -> None:
    table = run("tent")
    numbers = column(table)
    assert "[batch_dependence]" in table
    assert "[state_guard]" not in table
    assert numbers["worst_case"] < numbers["paper"] - 30 < numbers["clean"] - 30


def test_companions_vote_in_label_propagation() -> None:
    table = run("label_propagation")
    numbers = column(table)
    assert "[batch_dependence]" in table
    assert numbers["worst_case"] < numbers["paper"] - 10 < numbers["clean"] - 30


def test_random_features_are_found_out_and_judged_by_the_majority() -> None:
    table = run("random_features")
    numbers = column(table)
    assert "[randomness]" in table
    assert "asked 9 times" in table
    assert numbers["worst_case"] < numbers["clean"] - 10


def test_the_purifiers_own_gradient_is_masked_and_its_surrogate_breaks_more() -> None:
    table = run("purifier")
    numbers = column(table)
    assert "no gradient through the defence's own decision" in table
    assert "Points found through bpda break 29.7 points more than the direct attack (ste)" in " ".join(table.split())
    assert numbers["worst_case"] < numbers["clean"] - 20


def test_without_its_surrogate_the_purifier_s_number_is_an_upper_bound() -> None:
    """What is found in its place breaks about as many, and the verdict says what that is worth."""

    class Bare(Purifier):
        surrogates: ClassVar[dict[str, Any]] = {}

    brought = make()
    overrides = {"threat.eps": 0.15, "samples.limit": 32, "threat.contexts": ["joint"]}
    results = {
        name: evaluate(target, load_samples("digits"), protocol="quick", overrides=overrides, **options)
        for name, target, options in (
            ("brought", brought, {}),
            ("found", Bare(brought.classifier).eval(), {}),
            ("neither", Bare(brought.classifier).eval(), {"found_surrogates": False}),
        )
    }
    left = {name: int(found.samples["robust"].sum()) for name, found in results.items()}
    assert abs(left["found"] - left["brought"]) <= 2
    assert left["neither"] > left["found"] + 2
    verdicts = {name: found.run["verdicts"]["defense"] for name, found in results.items()}
    assert [verdicts[name]["verdict"] for name in ("found", "neither")] == ["suspect", "unreliable"]
    assert any("upper bound until you bring one" in reason for reason in verdicts["found"]["reasons"])
    assert not any("upper bound" in reason for reason in verdicts["brought"]["reasons"])
    print(left, verdicts)


def test_an_example_is_a_target_of_the_command_line_too(tmp_path: Path) -> None:
    """It brings its surrogate, and is not split: that would give the surrogate features in place of images."""
    done = CliRunner().invoke(
        main,
        ["evaluate", f"{FOLDER / 'purifier.py'}:make", "--data", "digits", "--protocol", "quick", "--limit", "16",
         "--set", "threat.eps=0.15", "--out", str(tmp_path / "out"), "--quiet"],
        catch_exceptions=False,
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "bpda" in done.output
