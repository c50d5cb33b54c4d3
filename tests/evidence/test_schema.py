"""Evidence that is not as it was written is refused in one sentence that names the file and the place."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from click.testing import CliRunner
from records import make_results

from msa_eval.cli import main
from msa_eval.evidence.folder import TABLES
from msa_eval.evidence.results import TRIMMED, Results
from msa_eval.evidence.schema import COLUMNS, MOST, RUN, check_run, columns_markdown

ROOT = Path(__file__).parents[2] / "results"
WRONG = {"text": 7, "dict": ["a"], "list": "a", "int": "1", "float": "1", "bool": "yes"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = make_results(
        git={"commit": "0", "dirty": False}, adversarial={"file": "a", "sha256": "0"},
        verdicts={"some": {"verdict": "sound", "reasons": []}},
        points={"file": "p", "sha256": "0", "image": [1, 8, 8]},
    )  # fmt: skip
    made.save(tmp_path / "r")
    return tmp_path / "r"


def _change(folder: Path, field: str, value: Any, *, drop: bool = False) -> None:
    run = json.loads((folder / "run.json").read_text())
    *parents, last = field.split(".")
    place = run
    for parent in parents:
        place = place.setdefault(parent, {})
    place[last] = value
    if drop:
        del place[last]
    (folder / "run.json").write_text(json.dumps(run))


def _wrong_of(kinds: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """A wrong value for every field that is checked."""
    found: list[tuple[str, Any]] = []
    for key, kind in kinds.items():
        field = f"{prefix}{key.rstrip('?')}".replace("*", "some")
        if kind is object or (key == "schema_version"):
            continue
        first = kind[0] if isinstance(kind, tuple) else kind
        name = {dict: "dict", list: "list"}.get(type(first)) or {str: "text"}.get(first) or first.__name__
        found.append((field, WRONG[name]))
        if isinstance(first, dict):
            found += _wrong_of(first, f"{field}.")
        if isinstance(first, list):
            found.append((field, [WRONG["text" if first[0] is str else first[0].__name__]]))
    return found


@pytest.mark.parametrize(("field", "value"), _wrong_of(dict(RUN)), ids=str)
def test_a_field_of_another_type_is_named(folder: Path, field: str, value: Any) -> None:
    _change(folder, field, value)
    with pytest.raises(ValueError, match=rf"run\.json: the field {field}(\[0\])? must hold .*, but holds ") as found:
        Results.load(folder)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize("field", ["key", "protocol", "protocol.text", "data.sha256", "targets.defense", "verdict"])
def test_a_missing_field_is_named(folder: Path, field: str) -> None:
    _change(folder, field, None, drop=True)
    with pytest.raises(ValueError, match=rf"run\.json: the field {field} is missing"):
        Results.load(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = ", "the field protocol.text is no TOML"),
        ("attack = 1", "the field protocol.text.attack must hold fields, but holds 1"),
        ("[stochastic]\neot = 'a'", "protocol.text.stochastic.eot must hold a whole number"),
        ("threat = [1]", "protocol.text.threat must hold fields"),
    ],
)
def test_a_protocol_that_pages_can_not_read_is_named(folder: Path, text: str, message: str) -> None:
    _change(folder, "protocol.text", text)
    with pytest.raises(ValueError, match=message):
        Results.load(folder)


@pytest.mark.parametrize("text", ["[" * 100_000, "[]", "{", "\x00", '{"schema_version": 1e999}'], ids=range(5))
def test_what_is_no_object_is_refused(folder: Path, text: str) -> None:
    (folder / "run.json").write_text(text)
    with pytest.raises(ValueError, match=r"run\.json is not|has schema version"):
        Results.load(folder)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("data.name", "\ud800", r"the field data\.name is no valid text"),
        ("python", ["3", {"x": "a\udfff"}], r"the field python\[1\]\.x is no valid text"),
        ("machine", {"\ud800": 1}, "the name of a field in machine is no valid text"),
    ],
)
def test_halves_of_letters_are_refused(folder: Path, field: str, value: object, message: str) -> None:
    """Wherever they stand: a field that nothing relies on is shown all the same."""
    _change(folder, field, value)
    with pytest.raises(ValueError, match=message):
        Results.load(folder)


def test_fields_may_be_nested_deep(folder: Path) -> None:
    """As deep as JSON is read."""
    deep: list[object] = []
    for _ in range(300):
        deep = [deep, {"x": "y"}]
    _change(folder, "more", deep)
    assert Results.load(folder).run["more"] == deep


def _cell(column: str, value: object) -> Callable[[pd.DataFrame], pd.DataFrame]:
    def change(table: pd.DataFrame) -> pd.DataFrame:
        table[column] = table[column].astype(object)
        table.loc[0, column] = value
        return table

    return change


@pytest.mark.parametrize(
    ("table", "change", "message"),
    [
        ("samples", _cell("robust", "maybe"), "must hold True or False in the column robust"),
        ("samples", _cell("robust", None), "has an empty cell in the column robust"),
        ("samples", _cell("index", 0.5), "must hold whole numbers in the column index"),
        ("samples", _cell("broken_at", 0.5), "must hold whole numbers in the column broken_at"),
        ("samples", _cell("batch", 10**30), "must hold whole numbers in the column batch"),
        ("samples", _cell("min_margin", "x"), "must hold numbers in the column min_margin"),
        ("samples", _cell("index", 1), "has two rows of the same target, context, index"),
        ("samples", lambda table: table.iloc[1:], "has not every sample of batches.csv"),
        ("samples", lambda table: table.iloc[:0], "samples.csv has no rows"),
        ("summary", _cell("value", 7.0), "must hold shares from 0 to 1 in the column value"),
        ("summary", lambda table: table.iloc[1:], "summary.csv has no clean of defense/joint"),
        ("attacks", lambda table: pd.concat([table, table]), "has two rows of the same target, context, run"),
        ("outcomes", lambda table: pd.concat([table, table]), "has two rows of the same target, context, run, index"),
        ("batches", _cell("index", 99), "has not every sample of batches.csv"),
    ],
    ids=lambda value: value if isinstance(value, str) else "change",
)
def test_a_table_that_was_changed_is_named(
    folder: Path, table: str, change: Callable[[pd.DataFrame], pd.DataFrame], message: str
) -> None:
    path = folder / f"{table}.csv"
    change(pd.read_csv(path)).to_csv(path, index=False)
    with pytest.raises(ValueError, match=message):
        Results.load(folder)


@pytest.mark.parametrize("table", TABLES)
def test_a_missing_column_is_named(folder: Path, table: str) -> None:
    path = folder / f"{table}.csv"
    held = pd.read_csv(path)
    for column in (name for name, about in COLUMNS[table].items() if not about.optional):
        held.drop(columns=column).to_csv(path, index=False)
        with pytest.raises(ValueError, match=rf"{table}\.csv has no column {column}"):
            Results.load(folder)


@pytest.mark.parametrize("table", TABLES)
def test_every_column_is_described_and_the_description_is_rendered(table: str) -> None:
    written = list(getattr(make_results(), table))
    described = [name for name, about in COLUMNS[table].items() if name in written or not about.optional]
    assert written == described, "in the order in which they are written"
    shown = [line.split("|") for line in columns_markdown().splitlines()[2:]]
    assert [name.strip(" `") for _, of, name, *_ in shown if of.strip() == f"`{table}.csv`"] == list(COLUMNS[table])
    assert all(len(cells) == 6 and all(cell.strip() for cell in cells[1:-1]) for cells in shown)


def test_an_optional_column_is_held_to_its_kind_where_it_is_there(folder: Path) -> None:
    path = folder / "attacks.csv"
    pd.read_csv(path).drop(columns="restart").to_csv(path, index=False)
    assert "restart" not in Results.load(folder).attacks
    pd.read_csv(path).assign(restart="x").to_csv(path, index=False)
    with pytest.raises(ValueError, match="must hold whole numbers in the column restart"):
        Results.load(folder)


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"\x00" * 100, b'a,"b\n', b"a\n1,2,3\n"], ids=range(5))
@pytest.mark.parametrize("table", TABLES)
def test_what_is_no_table_is_refused(folder: Path, table: str, content: bytes) -> None:
    (folder / f"{table}.csv").write_bytes(content)
    with pytest.raises(ValueError, match=rf"{table}\.csv (is not a readable table|has no column)"):
        Results.load(folder)


@pytest.mark.parametrize(("more", "read"), [(10, True), (MOST, False)])
def test_a_table_may_have_some_columns_more_and_no_hundreds(folder: Path, more: int, read: bool) -> None:
    path = folder / "attacks.csv"
    held = pd.read_csv(path)
    pd.concat([held, pd.DataFrame(0, held.index, [f"x{i}" for i in range(more)])], axis=1).to_csv(path, index=False)
    if read:
        assert len(Results.load(folder).attacks.columns) >= len(held.columns) + more
    else:
        with pytest.raises(ValueError, match=rf"attacks\.csv has \d+ columns, but {MOST} at the most are read"):
            Results.load(folder)


def test_names_that_look_like_numbers_stay_names(tmp_path: Path) -> None:
    made = make_results(runs=[("1", "2", "3", "4", 0)])
    made.save(tmp_path)
    assert set(Results.load(tmp_path).attacks["run"]) == {"1"}
    assert set(Results.load(tmp_path).samples["broken_by"].dropna()) <= {"1", "clean"}


@pytest.mark.parametrize("table", TRIMMED)
def test_a_trimmed_folder_is_read_where_that_is_asked_for(folder: Path, table: str) -> None:
    whole = Results.load(folder)
    (folder / f"{table}.csv").unlink()
    with pytest.raises(ValueError, match="no complete results"):
        Results.load(folder)
    trimmed = Results.load(folder, trimmed=True)
    pd.testing.assert_frame_equal(trimmed.samples, whole.samples)
    if table == "batches":
        both = (one.batches.sort_values("index", ignore_index=True) for one in (trimmed, whole))
        pd.testing.assert_frame_equal(*both)
    else:
        assert getattr(trimmed, table).empty


@pytest.mark.parametrize("path", sorted(path.parent for path in ROOT.glob("*/run.json")), ids=lambda path: path.name)
def test_committed_results_pass(path: Path) -> None:
    run = json.loads((path / "run.json").read_text(encoding="utf-8"))
    check_run("run.json", run)


def test_the_command_says_it_in_a_line(folder: Path, tmp_path: Path) -> None:
    _change(folder, "protocol", ["x"])
    for words in (["report", str(folder)], ["compare", str(folder), str(tmp_path)], ["tables", str(folder)]):
        done = CliRunner().invoke(main, words)
        assert done.exit_code == 2
        assert "run.json: the field protocol must hold fields, but holds ['x']" in done.stderr
