"""Commands that evaluate, of which a part fails: status 4, the units named, and the same command makes up for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from torch import Tensor

from msa_eval import load_target
from msa_eval.attacks import query
from msa_eval.cli import main
from msa_eval.protocols import make_protocol
from msa_eval.references import reference_path
from msa_eval.studies import paper_tables
from msa_eval.studies.paper_tables import PaperModel, Reported

DIGITS = str(reference_path("digits"))
TUNED = ("--train", "digits", "--train-limit", "32", "--variant", "inner", "--finetune", "steps=1")
COMMANDS = {
    "evaluate": (("evaluate", DIGITS), {"defense": "", "fc": ""}),
    "batch-sizes": (("batch-sizes", DIGITS, "--sizes", "4,8"), {"4": "batch size 4: ", "8": "batch size 8: "}),
    "ablate": (("ablate", DIGITS, *TUNED), {"fc": "fc: ", "full": "full: ", "inner": "inner: "}),
    "paper-table": (("paper-table", "cifar10"), {"Toy": "Toy, fc: "}),
}
"""Each command, and how the text of each part that is incomplete begins."""


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Result]:
    """Run a command on a few digits under a small protocol; the paper's table has one model."""
    content = {
        "schema": 1, "name": "small", "version": 1, "description": "Small.", "audit.samples": 0,
        "samples.limit": 8, "batches.size": 8, "threat": {"norm": "Linf", "eps": 0.1},
        "attack": {"apgd": {"surrogates": ["fc-oracle"], "losses": ["ce"], "steps": 1}, "square": {"queries": 2}},
    }  # fmt: skip
    protocol = tmp_path / "small.toml"
    protocol.write_text(make_protocol(content).text())
    row = PaperModel("Toy", Reported(90.0, 60.0), Reported(80.0, 70.0))
    monkeypatch.setattr(paper_tables, "TABLES", {"cifar10": (row,)})
    monkeypatch.setattr(paper_tables, "load_target", lambda word, samples, **_: load_target(DIGITS, samples))
    monkeypatch.setattr(paper_tables, "load_protocol", lambda *_, **__: make_protocol(content))

    def made(name: str) -> Result:
        more = () if name == "paper-table" else ("--protocol", str(protocol))
        out = ("--data", "digits", "--out", str(tmp_path / "r"), "--quiet")
        return CliRunner().invoke(main, [*COMMANDS[name][0], *more, *out])

    return made


def _fail(*_: Any, **__: Any) -> Tensor:
    raise RuntimeError("out of luck")


@pytest.mark.parametrize("name", COMMANDS)
def test_a_part_that_fails_is_named_and_made_by_the_same_command(
    name: str, run: Callable[[str], Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(query, "square", _fail)
        result = run(name)
    assert result.exit_code == 4, result.output
    parts = COMMANDS[name][1]
    assert result.stderr == (
        f"Error: incomplete: parts of the evaluation of {', '.join(parts)} failed, which are named above; the same "
        f"command tries these again\n"
    )
    text = " ".join(result.stdout.split())
    for begins in parts.values():
        _, found, after = text.partition(begins or "failed: ")
        assert found, begins
        assert "target:square-margin:0 on batch 0, joint: out of luck" in after
    again = run(name)
    assert again.exit_code == 0, again.output
    assert again.stderr == ""
    assert "out of luck" not in again.stdout


@pytest.mark.parametrize(("error", "status"), [(OSError("no such device"), 4), (ValueError("no weights"), 0)])
def test_a_row_that_fails_is_an_error_and_one_without_weights_is_not(
    error: Exception, status: int, run: Callable[[str], Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(paper_tables, "load_target", fail)
    result = run("paper-table")
    assert result.exit_code == status
    assert f"Toy, fc and hpm: {error}" in result.stdout
    assert ("incomplete" in result.stdout) is (status == 4)
