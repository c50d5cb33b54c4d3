"""The page of a comparison shows all that the page of one evaluation does, side by side."""

from __future__ import annotations

import dataclasses
import io
import json
import re
from html import unescape
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from records import make_results

from msa_eval import Results
from msa_eval.cli import main
from msa_eval.evidence import gallery
from msa_eval.report.comparison import compare, load_all, only_one, render_comparison
from msa_eval.report.page import SECTIONS, render_page
from msa_eval.report.sidebyside import render_page as render_comparison_page

ROOT = Path(__file__).parents[2]
EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&"


def _samples(page: str) -> dict[str, Any]:
    found = re.search(r'id="samples-data">(.*?)</script>', page)
    assert found is not None
    held: dict[str, Any] = json.loads(found[1])
    return held


def _linked(page: str, name: str) -> pd.DataFrame:
    found = re.search(rf'download="{name}\.csv" href="data:text/csv;charset=utf-8,([^"]+)"', page)
    assert found is not None
    return pd.read_csv(io.StringIO(unquote(unescape(found[1]))))


def _exhibit(index: int) -> gallery.Exhibit:
    rng = np.random.default_rng(index)
    return gallery.Exhibit(
        "defense", "joint", index, rng.integers(256, size=(3, 8, 8)).astype(np.uint8),
        rng.random((3, 8, 8)).astype(np.float16), *(-1 - rng.random((2, 4)).astype(np.float32)),
    )  # fmt: skip


@pytest.fixture(scope="module")
def pair() -> dict[str, Results]:
    return {"a": make_results(seed=0), "b": make_results(seed=1, broken=0.1)}


@pytest.fixture(scope="module")
def page(pair: dict[str, Results]) -> str:
    return render_comparison_page(compare(pair), {"a": [_exhibit(3)], "b": [_exhibit(3), _exhibit(7)]})


def test_it_has_the_sections_of_one_evaluation(page: str, pair: dict[str, Results]) -> None:
    sections = re.findall('<section id="([^"]+)"', page)
    assert sections == ["runs", "differences", *(anchor for anchor, _ in SECTIONS[1:])]
    assert re.findall('<section id="([^"]+)"', render_page(pair["a"]))[1:] == sections[2:]
    assert all(f'href="#{anchor}"' in page for anchor in sections)
    ids = re.findall(r'<[^>]* id="([^"]+)"', page)
    assert len(ids) == len(set(ids))


def test_the_sample_table_has_a_row_a_sample_and_a_column_an_evaluation(page: str, pair: dict[str, Results]) -> None:
    data = _samples(page)
    assert data["results"] == ["a", "b"]
    for part in data["parts"]:
        for each, results in zip(part["each"], pair.values(), strict=True):
            rows = results.samples[results.samples["target"] == part["target"]].set_index("index")
            rows = rows.loc[[data["index"][at] for at in part["place"] or range(40)]]
            for fate, by, row in zip(each["fate"], each["by"], rows.to_dict(orient="records"), strict=True):
                expected = "wrong on clean" if not row["clean_correct"] else "robust" if row["robust"] else "broken"
                assert data["fates"][int(fate)] == expected
                assert (data["names"][by] if by >= 0 else "") == (row["broken_by"] if expected == "broken" else "")


def test_rows_are_matched_by_sample_and_not_by_place(pair: dict[str, Results]) -> None:
    mixed = dataclasses.replace(pair["a"], samples=pair["a"].samples.sample(frac=1, random_state=0))
    for part in _samples(render_comparison_page(compare({"a": pair["a"], "b": mixed})))["parts"]:
        assert part["each"][0] == part["each"][1]


def test_what_one_evaluation_alone_broke(page: str, pair: dict[str, Results]) -> None:
    third = make_results(seed=2, broken=0.5)
    for named in (pair, pair | {"c": third}):
        found = only_one(compare(named), "defense", "joint")
        expected = []
        for name in named:
            fates = {
                other: one.samples[one.samples["target"] == "defense"].set_index("index").sort_index()
                for other, one in named.items()
            }
            for index, row in fates[name].iterrows():
                broken = row["clean_correct"] and not row["robust"]
                if broken and all(fates[other]["robust"][index] for other in named if other != name):
                    expected.append((name, index, row["label"]))
        assert [tuple(row) for row in found.to_numpy().tolist()] == expected
        assert expected
    listed = _linked(page, "differences-defense-joint-alone")
    pd.testing.assert_frame_equal(listed, only_one(compare(pair), "defense", "joint"), check_dtype=False)
    for name, rows in listed.groupby("results"):
        assert f"<b>{name}</b>: {', '.join(map(str, rows['index']))}</p>" in page


def test_samples_that_differ_are_linked(page: str, pair: dict[str, Results]) -> None:
    right = compare(pair).right
    right = right[right["target"] == "fc"]
    linked = _linked(page, "differences-fc-joint-samples").set_index("index")
    differing = right[right["a"] != right["b"]]
    assert list(linked.index) == sorted(set(differing["index"]))
    for row in right.to_dict(orient="records"):
        if row["index"] in linked.index:
            for name in pair:
                assert linked.loc[row["index"], f"{row['metric']}: {name}"] == row[name]


def test_the_gallery_says_what_the_others_did(page: str, pair: dict[str, Results]) -> None:
    assert page.count('<figure class="exhibit">') == 3
    row = pair["b"].samples[pair["b"].samples["target"] == "defense"].set_index("index").loc[3]
    fate = (
        "wrong on clean" if not row["clean_correct"] else "robust" if row["robust"] else f"broken by {row['broken_by']}"
    )
    assert f"; in b {fate}</figcaption>" in page
    assert set(_linked(page, "gallery-2")["index"]) == {3, 7}
    many = [_exhibit(i) for i in range(12)]
    named = {str(i): pair["a"] for i in range(3)}
    crowded = render_comparison_page(compare(named), dict.fromkeys(named, many))
    assert crowded.count('<figure class="exhibit">') == 3 * 5


def test_the_audits_stand_side_by_side(pair: dict[str, Results]) -> None:
    def audited(sign: str, fired: bool) -> pd.DataFrame:
        row = {"target": "defense", "sign": sign, "fired": fired, "severity": "suspect", "reason": f"{sign} {fired}"}
        return pd.DataFrame([row, row | {"sign": "both", "fired": not fired}])

    first = dataclasses.replace(pair["a"], audit=audited("first", True))
    second = dataclasses.replace(pair["b"], audit=audited("second", True))
    page = render_comparison_page(compare({"a": first, "b": second}))
    assert "a: 1 of 2 signs fired, b: 1 of 2 signs fired" in page
    rows = re.findall(r"<code>(first|second|both)</code></td>(.*?)</tr>", page)
    assert [name for name, _ in rows] == ["first", "both", "second"]
    assert [cells.count("not looked for") for _, cells in rows] == [1, 0, 1]
    assert ">suspect<" in rows[0][1]
    assert ">no<" in rows[1][1]
    assert "first True (suspect)" in page  # among the reasons
    assert "None of these was audited" not in page
    assert "None of these was audited" in render_comparison_page(compare(pair))


@pytest.mark.parametrize(
    "odd",
    [{"n": 1}, {"classes": 1}, {"broken": 0.0}, {"broken": 1.0}, {"clean": 0.0}, {"targets": ("defense",)}],
    ids=str,
)
def test_odd_evidence_is_shown(odd: dict[str, Any]) -> None:
    comparison = compare({"a": make_results(**odd), "b": make_results(**odd, seed=1)})
    page = render_comparison_page(comparison)
    rows = sum(len(part["each"][0]["fate"]) for part in _samples(page)["parts"])
    assert rows == len(comparison.results["a"].samples)
    assert "This run kept no pictures." in page


def test_labels_with_markup_are_shown_and_not_run() -> None:
    def evil(seed: int) -> Results:
        made = make_results(seed=seed)
        return dataclasses.replace(
            made, samples=made.samples.assign(label=[f"{EVIL}{v}" for v in made.samples["label"]])
        )

    first = evil(0)
    runs = [EVIL if value and value != "clean" else value for value in first.samples["broken_by"].fillna("")]
    first = dataclasses.replace(first, samples=first.samples.assign(broken_by=runs))
    shown = {"b": [_exhibit(i) for i in range(8)]}
    page = render_comparison_page(compare({f"a{EVIL}": first, "b": evil(1)}), shown)
    assert "broken by &lt;/script&gt;" in page
    assert len(re.findall("<script", page)) == 2
    assert "<img src=x" not in page
    assert _samples(page)["label"][0].startswith(EVIL)


def test_thousands_of_samples_make_no_large_page() -> None:
    named = {name: make_results(5000, classes=1000, batch=64, seed=seed) for seed, name in enumerate("ab")}
    assert len(render_comparison_page(compare(named))) < 1_500_000


@pytest.mark.parametrize("table", ["outcomes", "attacks", "batches"])
def test_a_missing_table_takes_only_what_needs_it(table: str, pair: dict[str, Results], tmp_path: Path) -> None:
    for name, results in pair.items():
        results.save(tmp_path / name)
    (tmp_path / "b" / f"{table}.csv").unlink()
    comparison = compare(load_all([tmp_path / "a", tmp_path / "b"]))
    page, text = render_comparison_page(comparison), render_comparison(comparison)
    whole = compare(pair).table
    paper = comparison.table["metric"] == "paper"
    pd.testing.assert_frame_equal(comparison.table[~paper], whole[~paper], check_dtype=False)
    if table == "batches":
        assert "not paired" not in text
        assert "There is no such figure" not in page
        return
    assert comparison.table.loc[paper, "difference"].isna().all()
    assert f"The paper's number of b is not paired: there is no {table}.csv." in text
    assert "undefined" not in text
    assert "nan" not in text
    assert page.count("<td>not paired</td>") == 2
    assert f"There is no such figure of b for the context joint: there is no {table}.csv." in page
    assert '<figure id="spending-joint-1">' in page
    assert '<figure id="spending-joint-2">' not in page


def test_the_committed_ablation_can_be_compared(tmp_path: Path) -> None:
    folder = ROOT / "results" / "ablation-digits"
    out = tmp_path / "page.html"
    done = CliRunner().invoke(
        main, ["compare", str(folder / "full"), str(folder / "average"), str(folder / "inner"), "--out", str(out)]
    )
    assert done.exit_code == 0, done.stderr
    table = pd.read_csv(folder / "ablation.csv").set_index(["variant", "context", "metric"])
    comparison = compare(load_all([folder / "full", folder / "average", folder / "inner"]))
    mine = comparison.table[comparison.table["target"] == "defense"].set_index(["name", "context", "metric"])
    for key in mine.index:
        assert mine.loc[key, "value"] == table.loc[key, "value"]
        if key[0] != "full" and key[2] != "paper":
            assert mine.loc[key, "difference"] == pytest.approx(table.loc[key, "difference"])
    assert out.stat().st_size < 600_000
    assert out.read_text(encoding="utf-8").count("gallery.safetensors, which run.json lists, is missing") == 3
