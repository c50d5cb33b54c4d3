"""The commands that show results: what they write, what they print, and how they refuse."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from records import make_results

from msa_eval.cli import main
from msa_eval.cli.evaluate import write_report
from msa_eval.references import reference_path
from msa_eval.report import page as pages

FAST = ("--limit", "24", "--set", "attack.square.queries=4", "--set", "attack.spsa.queries=3",
        "--set", "attack.apgd.steps=2", "--set", "attack.apgd.passes=20", "--set", "attack.apgd.overtime=2",
        "--set", "attack.recombination.passes=20", "--set", "audit.samples=0")  # fmt: skip


def _run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def _evaluate(out: Path, *more: str) -> Result:
    given = ("--data", "digits", "--protocol", "digits", "--out", out, *FAST, *more)
    return _run("evaluate", reference_path("digits"), *given)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_results().save(tmp_path / "run")
    return tmp_path / "run"


def test_evaluate_writes_the_page_with_its_gallery(tmp_path: Path) -> None:
    result = _evaluate(tmp_path / "r")
    assert result.exit_code == 0
    assert f"page in {tmp_path / 'r' / 'report.html'}" in result.stdout
    page = (tmp_path / "r" / "report.html").read_bytes()
    assert page.count(b"<img") == 3 * 12
    again = _run("report", tmp_path / "r")
    assert re.fullmatch(rf"page in {tmp_path / 'r' / 'report.html'}, \d+ kB\n", again.stdout)
    assert (tmp_path / "r" / "report.html").read_bytes() == page


@pytest.mark.slow
def test_the_gallery_can_be_left_out(tmp_path: Path) -> None:
    assert _evaluate(tmp_path / "r", "--no-gallery").exit_code == 0
    assert not (tmp_path / "r" / "gallery.safetensors").exists()
    assert "This run kept no pictures" in (tmp_path / "r" / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("error", [RuntimeError("no\nink"), OSError(28, "No space left"), KeyboardInterrupt()])
def test_a_page_that_fails_costs_no_results(
    error: BaseException, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(pages, "render_page", fail)
    write_report(folder)
    message = capsys.readouterr()
    assert message.out == ""
    assert message.err.startswith("Warning: no page was written (")
    assert len(message.err.splitlines()) == 1
    assert not (folder / "report.html").exists()


def test_a_page_of_other_results_does_not_stay(folder: Path, tmp_path: Path) -> None:
    assert _run("report", folder).exit_code == 0
    make_results(seed=1, key="another").save(folder, force=True)
    assert not (folder / "report.html").exists()


def test_figures_are_written_with_their_data(folder: Path, tmp_path: Path) -> None:
    result = _run("figures", folder, "--out", tmp_path / "f")
    assert result.exit_code == 0
    kinds = ("waterfall", "transfer", "spending", "classes", "agreement", "batches")
    expected = {tmp_path / "f" / f"{kind}-joint{suffix}" for kind in kinds for suffix in (".pdf", ".svg", ".csv")}
    assert {Path(line) for line in result.stdout.splitlines()} == expected == set((tmp_path / "f").iterdir())
    for path in (tmp_path / "f").glob("*.pdf"):
        (box,) = re.findall(rb"/MediaBox \[ 0 0 ([\d.]+) ([\d.]+) \]", path.read_bytes())
        assert float(box[0]) == pytest.approx(3.3 * 72, abs=0.01)


@pytest.mark.parametrize("style", ["latex", "markdown", "csv"])
def test_tables_are_printed(folder: Path, style: str) -> None:
    result = _run("tables", folder, "--format", style)
    assert result.exit_code == 0
    assert "HPM" in result.stdout
    assert result.stderr == ""


def test_compare_prints_and_writes(folder: Path, tmp_path: Path) -> None:
    make_results(seed=1).save(tmp_path / "other")
    result = _run("compare", folder, tmp_path / "other", "--out", tmp_path / "c.html")
    assert result.exit_code == 0
    assert "differences to run in points" in result.stdout
    assert re.search(rf"page in {re.escape(str(tmp_path / 'c.html'))}, \d+ kB\n$", result.stdout)
    assert (tmp_path / "c.html").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("report", "nowhere"), "no complete results"),
        (("figures", "nowhere"), "no complete results"),
        (("tables", "nowhere"), "no complete results"),
        (("compare", "nowhere", "elsewhere"), "no complete results"),
        (("compare", "run"), "at least two"),
        (("compare", "run", "run"), "given twice"),
        (("compare", "run", "less"), "can't be paired"),
        (("compare", "run", "less", "--out", "run"), "is a folder"),
        (("report", "run", "--out", "run"), "is a folder"),
        (("figures", "run", "--out", "run/run.json"), "is a file"),
        (("figures", "run", "--out", "run"), "holds results"),
        (("report", "run", "--out", "run/summary.csv"), "ends in .html"),
        (("compare", "run", "less", "--out", "run/run.json"), "ends in .html"),
    ],
)
def test_mistakes_are_told_in_a_line(
    arguments: tuple[str, ...], message: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_results(20).save(tmp_path / "less")
    monkeypatch.chdir(tmp_path)
    result = _run(*arguments)
    assert result.exit_code == 2
    assert re.search(message, result.stderr)
    assert len(result.stderr.strip().splitlines()) == 1
    assert result.stdout == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["less", "run"]
