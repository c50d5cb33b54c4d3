"""``msa-eval audit`` as a user meets it: the table, the verdict, and exit statuses."""

from __future__ import annotations

import re
import sys
from typing import Any

import pytest
from click.testing import CliRunner, Result

from msa_eval.auditing.audit import AuditReport, Sign
from msa_eval.cli import main
from msa_eval.cli.audit import render
from msa_eval.references import reference_path

DIGITS = str(reference_path("digits"))
SMALL = ("--protocol", "digits", "--limit", "12", "--set", "batches.size=12")


def _run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["audit", *arguments])


def test_the_table_of_the_digits_reference() -> None:
    result = _run(DIGITS, "--data", "digits", *SMALL, "--strict")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert re.fullmatch(r"audit of digits.safetensors under digits: 12 samples, \d+ s", lines[0])
    assert lines[2].split() == ["sign", "fired", "value", "what", "it", "means"]
    (note,) = [line for line in lines if line.startswith("batch_dependence")]
    assert note.split()[1] == "note"
    (dead,) = [line for line in lines if line.startswith("zero_gradients")]
    assert dead.split()[1:3] == ["-", "0"]
    assert lines[-1] == "verdict: sound"
    assert max(map(len, lines)) <= 100
    assert "audit: 100%" in result.stderr
    assert "clean pass: 100%" in result.stderr


def _sign(severity: Any, fired: bool = True) -> Sign:
    return Sign("state", fired, severity, 0.25, 0.1, f"A quarter of all answers is {severity}, " + "so " * 40 + "look.")


def _report(*signs: Sign) -> AuditReport:
    return AuditReport("defense", signs, 12, 1.0)


@pytest.mark.parametrize(
    ("signs", "strict", "status"),
    [
        ([_sign("unreliable")], True, 3),
        ([_sign("suspect")], True, 3),
        ([_sign("unreliable")], False, 0),
        ([_sign("note")], True, 0),
        ([_sign("unreliable", fired=False)], True, 0),
    ],
)
def test_strict_speaks_through_the_exit_status(
    monkeypatch: pytest.MonkeyPatch, signs: list[Sign], strict: bool, status: int
) -> None:
    monkeypatch.setattr(sys.modules["msa_eval.auditing.audit"], "audit", lambda *arguments, **settings: _report(*signs))
    result = _run(DIGITS, "--data", "digits", *(["--strict"] if strict else []))
    assert result.exit_code == status
    assert "verdict: " in result.stdout


def test_reasons_are_wrapped_under_the_verdict() -> None:
    text = render(_report(_sign("suspect"), _sign("unreliable"), _sign("note")), name="a", protocol="b")
    lines = text.splitlines()
    at = lines.index("verdict: unreliable")
    assert [line[:37] for line in lines[at + 1 :] if line.startswith("- ")] == [
        "- A quarter of all answers is unrelia",
        "- A quarter of all answers is suspect",
    ]
    assert max(map(len, lines)) <= 100
    assert "0.25" in lines[3]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((DIGITS, "--data", "digits", "--protocol", "digit"), "did you mean 'digits'"),
        ((DIGITS, "--data", "nowhere"), "there is no data 'nowhere'"),
        ((DIGITS, "--data", "digits", "--set", "threat.eps=-1"), "threat.eps"),
        (("nothing.safetensors", "--data", "digits"), "there is no file nothing.safetensors"),
    ],
)
def test_bad_input_is_one_line_and_status_two(arguments: tuple[str, ...], message: str) -> None:
    result = _run(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert len(re.sub("^note: computing on .*\n", "", result.stderr).strip().splitlines()) == 1
    assert result.stdout == ""


def test_the_command_is_listed() -> None:
    assert re.search(r"^  audit ", CliRunner().invoke(main, ["--help"]).stdout, re.MULTILINE)
