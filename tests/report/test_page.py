"""The page says what the evidence says, to the digit, whatever the evidence is and whoever wrote it."""

from __future__ import annotations

import base64
import dataclasses
import html
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from records import RUNS, make_results

from msa_eval import Results
from msa_eval.evidence import gallery
from msa_eval.evidence.folder import GALLERY
from msa_eval.report import draw_curves, render_page, write_page
from msa_eval.report.comparison import compare
from msa_eval.report.figures import write_figures
from msa_eval.report.inline import inline_svg, script_json
from msa_eval.report.page import SECTIONS
from msa_eval.report.sidebyside import render_page as render_comparison_page

ROOT = Path(__file__).parents[2]
EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&"


class Reader(HTMLParser):
    """Reads a page back: numbers, headings, tags, texts by id, and links."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.numbers: dict[tuple[str, str, str], tuple[str, str]] = {}
        self.sections: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, str] = {}
        self._cell: tuple[str, str, str] | None = None
        self._inside: list[str | None] = []
        self._value = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        held = dict(attrs)
        self.tags.append((tag, held))
        if tag == "section":
            self.sections.append(str(held["id"]))
        if "data-metric" in held:
            self._cell = (str(held["data-target"]), str(held["data-context"]), str(held["data-metric"]))
            self.numbers[self._cell] = ("", "")
        if tag == "data":
            self._value = str(held["value"])
        if tag in ("pre", "script", "dd", "h1"):
            self._inside.append(held.get("id") or tag)

    def handle_endtag(self, tag: str) -> None:
        if tag == "td":
            self._cell = None
        if tag in ("pre", "script", "dd", "h1"):
            self._inside.pop()

    def handle_data(self, data: str) -> None:
        if self._cell is not None:
            self.numbers[self._cell] = (self._value, self.numbers[self._cell][1] + data)
        if self._inside and self._inside[-1]:
            name = self._inside[-1]
            self.texts[name] = self.texts.get(name, "") + data


def _check_numbers(page: str, results: Results) -> None:
    """All numbers of the summary stand on the page, exactly and as they are rounded, with their intervals."""
    found = Reader(page).numbers
    assert len(found) == len(results.summary)
    for row in results.summary.to_dict(orient="records"):
        value, text = found[row["target"], row["context"], row["metric"]]
        assert float(value) == row["value"]
        assert text == f"{100 * row['value']:.1f} [{100 * row['low']:.1f}, {100 * row['high']:.1f}]"


@pytest.mark.parametrize(
    "name",
    [
        "cifar10-wrn10-2",
        pytest.param("digits", marks=pytest.mark.slow),
        pytest.param("cifar10-wrn10-2-msa", marks=pytest.mark.slow),
    ],
)
def test_the_committed_runs_read_back_as_their_summaries(name: str, tmp_path: Path) -> None:
    path = write_page(ROOT / "results" / name, tmp_path / "page.html")
    page, results = path.read_text(encoding="utf-8"), Results.load(ROOT / "results" / name)
    _check_numbers(page, results)
    headline = results.summary.set_index(["target", "context", "metric"]).loc[("defense", "joint", "worst_case")]
    big = re.search(r'<div class="big defense"><data value="([^"]+)">([\d.]+)</data> %</div>', page)
    assert big is not None
    assert (float(big[1]), big[2]) == (headline["value"], f"{100 * headline['value']:.1f}")
    assert path.stat().st_size < 800_000
    attacks = pd.read_csv(ROOT / "results" / name / "attacks.csv")
    matrix = _linked(page, "transfer-joint")
    for row in matrix.to_dict(orient="records"):
        mine = attacks[(attacks["context"] == "joint") & (attacks["target"] == row["target"])]
        mine = mine[(mine["surrogate"] == row["surrogate"]) & (mine["loss"] == row["loss"])]
        assert row["target_accuracy"] in mine.loc[mine["attack"] == row["attack"], "final"].round(10).tolist()


def _linked(page: str, name: str) -> pd.DataFrame:
    """The data behind a figure's link."""
    found = re.search(rf'download="{name}\.csv" href="data:text/csv;charset=utf-8,([^"]+)"', page)
    assert found is not None
    return pd.read_csv(io.StringIO(unquote(html.unescape(found[1]))))


@pytest.fixture(scope="module")
def page() -> str:
    return render_page(make_results(contexts=("joint", "solo")), [_exhibit(0)])


def test_sections_come_in_the_order_asked_for(page: str) -> None:
    assert Reader(page).sections == [anchor for anchor, _ in SECTIONS]
    assert [anchor for anchor, _ in SECTIONS] == [
        "verdict", "waterfall", "transfer", "spending", "classes", "agreement", "gallery", "batches", "samples",
        "provenance",
    ]  # fmt: skip


def test_every_figure_has_a_text_alternative_and_its_data(page: str) -> None:
    svgs = re.findall(r'<svg role="img" aria-labelledby="([^"]+)"', page)
    assert len(svgs) == len(re.findall("<svg", page)) == 12
    for alt in svgs:
        message = re.search(rf'<desc id="{alt}">([^<]{{40,}})</desc>', page)
        assert message is not None, alt
        assert len(_linked(page, alt.removesuffix("-alt")))
    ids = [held["id"] for _, held in Reader(page).tags if "id" in held]
    assert len(ids) == len(set(ids))


def test_the_same_evidence_gives_the_same_bytes(tmp_path: Path) -> None:
    make_results().save(tmp_path / "r")
    first = write_page(tmp_path / "r").read_bytes()
    assert write_page(tmp_path / "r", tmp_path / "elsewhere/page.html").read_bytes() == first
    assert not list((tmp_path / "r").glob("*.part"))


def test_nothing_is_fetched(page: str) -> None:
    reader = Reader(page)
    names = ("src", "href", "xlink:href", "srcset", "action")
    loads = [(tag, held[name]) for tag, held in reader.tags for name in names if held.get(name)]
    assert loads
    assert all(str(target).startswith(("data:", "#")) for _, target in loads)
    assert not re.search(r"@import|url\((?!#)", page)
    (policy,) = [held["content"] for tag, held in reader.tags if held.get("http-equiv") == "Content-Security-Policy"]
    assert str(policy).startswith("default-src 'none'; img-src data:;")
    assert "'unsafe-inline'" not in str(policy).split("script-src")[1]


def _evil() -> Results:
    runs = [(f"{EVIL}:apgd:0", EVIL, f"apgd{EVIL}", EVIL, 0), *RUNS]
    results = make_results(runs=runs)
    protocol = dict(results.run["protocol"]) | {
        "name": EVIL, "text": f"# {EVIL}\n" + results.run["protocol"]["text"], "overrides": {EVIL: EVIL}
    }  # fmt: skip
    run = dict(results.run) | {
        "protocol": protocol, "command": ["msa-eval", EVIL], "verdict": EVIL,
        "verdicts": {target: {"verdict": EVIL, "reasons": [EVIL]} for target in ("defense", "fc")},
        "targets": {target: {"type": EVIL, "sha256": EVIL} for target in ("defense", "fc")}, "packages": {EVIL: EVIL},
        "data": {"name": EVIL, "sha256": EVIL, "n": 40}, "device": EVIL, "files": {EVIL: EVIL},
    }  # fmt: skip
    audit = pd.DataFrame([{"target": "defense", "sign": EVIL, "fired": True, "severity": EVIL, "reason": EVIL}])
    samples = results.samples.assign(label=[f"{EVIL}{label}" for label in results.samples["label"]])
    return dataclasses.replace(results, run=run, audit=audit, samples=samples)


def _check_harmless(page: str, scripts: int) -> None:
    reader = Reader(page)
    tags = [tag for tag, _ in reader.tags]
    assert tags.count("script") == scripts
    assert "img" not in tags
    assert not [held for _, held in reader.tags if any(name.startswith("on") for name in held)]
    assert "alert(1)" in page


def test_names_with_markup_are_shown_and_not_run() -> None:
    page = render_page(_evil())
    _check_harmless(page, scripts=2)
    reader = Reader(page)
    assert EVIL in reader.texts["protocol"]
    assert reader.texts["h1"].count(EVIL) == 3
    assert "alert(1)" in reader.texts["command"]
    assert f"{EVIL}:apgd:0" in json.loads(reader.texts["samples-data"])["names"]
    _check_harmless(render_comparison_page(compare({EVIL: _evil(), f"2{EVIL}": _evil()})), scripts=2)


@pytest.mark.parametrize("column", ["target", "context"])
@pytest.mark.parametrize("table", ["summary", "attacks", "samples", "outcomes"])
def test_a_target_or_context_that_there_is_not_is_refused(table: str, column: str, tmp_path: Path) -> None:
    """They would end up in the page's ids, unescaped, and in paths of figures."""
    make_results().save(tmp_path / "r")
    path = tmp_path / "r" / f"{table}.csv"
    held = pd.read_csv(path)
    held[column] = held[column].replace({"joint": "../../out", "fc": EVIL})
    held.to_csv(path, index=False)
    with pytest.raises(ValueError, match=f"{table}.csv names the {column} .* expected one of"):
        Results.load(tmp_path / "r")


def test_figures_keep_their_texts_and_escape_their_names() -> None:
    """A number in a text is a name's and stays whole, and so does a colour; in tags both are changed."""
    figure = draw_curves({"s@0.125 #1a1a1a": pd.DataFrame({"passes": [1, 2], "worst_case": [0.9, 0.5]})}, "0.98765")
    svg = str(inline_svg(figure, '"><img src=x>\\1', "ALT 0.98765 <b>"))
    for text in (">s@0.125 #1a1a1a 50.0</text>", ">0.98765</text>", '-alt">ALT 0.98765 &lt;b&gt;</desc>'):
        assert text in svg
    assert "<img" not in svg
    assert not re.search(r"\d\.\d{3}|#1a1a1a", "".join(re.findall(r"<[^>]*>", svg)))


def test_json_in_a_script_is_not_a_number_and_no_tag() -> None:
    text = str(script_json({"a": [float("inf"), float("nan"), -0.5, EVIL, None]}))
    assert "<" not in text
    assert json.loads(text) == {"a": [None, None, -0.5, EVIL, None]}


@pytest.mark.parametrize(
    "odd",
    [
        {"n": 1}, {"classes": 1}, {"broken": 0.0}, {"broken": 1.0}, {"clean": 0.0}, {"targets": ("defense",)},
        {"batch": 1},
    ],
    ids=str,
)  # fmt: skip
def test_odd_evidence_is_shown(odd: dict[str, Any], tmp_path: Path) -> None:
    make_results(**odd).save(tmp_path)
    page = write_page(tmp_path).read_text(encoding="utf-8")
    _check_numbers(page, Results.load(tmp_path))
    assert "This run kept no pictures" in page
    assert "was not audited" in page
    rows = json.loads(Reader(page).texts["samples-data"])
    assert sum(len(part["each"][0]["fate"]) for part in rows["parts"]) == len(Results.load(tmp_path).samples)


def test_thousands_of_samples_and_classes_make_no_large_page() -> None:
    results = make_results(5000, classes=1000, batch=64)
    page = render_page(results)
    assert len(page) < 800_000
    _check_numbers(page, results)


def test_missing_numbers_are_called_undefined() -> None:
    results = make_results()
    blank = dataclasses.replace(
        results, summary=results.summary.assign(value=np.nan, low=np.nan, high=np.nan),
        samples=results.samples.assign(min_margin=np.nan),
    )  # fmt: skip
    page = render_page(blank)
    assert "undefined" in page
    rows = json.loads(Reader(page).texts["samples-data"])
    assert set(rows["parts"][0]["each"][0]["margin"]) == {None}


def test_the_sample_table_holds_the_evidence(page: str) -> None:
    results = make_results(contexts=("joint", "solo"))
    data = json.loads(Reader(page).texts["samples-data"])
    rows = results.samples.set_index(["target", "context", "index"])
    broke = results.outcomes[results.outcomes["any_broken"]].groupby(["target", "context", "index"]).size()
    seen = 0
    for part in data["parts"]:
        (each,) = part["each"]
        for i, at in enumerate(part["place"] or range(40)):
            key = (part["target"], part["context"], data["index"][at])
            row = rows.loc[key]
            fate = "wrong on clean" if not row["clean_correct"] else "robust" if row["robust"] else "broken"
            assert data["fates"][int(each["fate"][i])] == fate
            assert (data["label"][at], data["batch"][at], data["position"][at]) == tuple(
                row[["label", "batch", "position"]]
            )
            assert each["prediction"][i] == row["clean_prediction"]
            if fate == "broken":
                assert data["names"][each["by"][i]] == row["broken_by"]
                assert each["at"][i] == row["broken_at"]
                assert each["runs"][i] == broke[key]
            assert each["margin"][i] == pytest.approx(row["min_margin"], rel=1e-2)
            seen += 1
    assert seen == len(rows)


def test_stochastic_results_say_so() -> None:
    page = render_page(make_results(draws={"defense": 9, "fc": 1}, taken_back={"defense": {"joint": 3}}))
    assert "Answers a verdict" in page
    assert "defence 9" in page
    assert "defence joint 3" in page


def _exhibit(index: int, shape: tuple[int, int, int] = (3, 8, 8), classes: int = 4) -> gallery.Exhibit:
    rng = np.random.default_rng(index)
    clean, delta = rng.integers(256, size=shape).astype(np.uint8), (rng.random(shape) * 0.1 - 0.05).astype(np.float16)
    logits = -rng.random((2, classes)).astype(np.float32) - 1
    return gallery.Exhibit("defense", "joint", index, clean, delta, logits[0], logits[1])


def test_the_gallery_shows_pixels_and_distances(tmp_path: Path) -> None:
    one = _exhibit(5)
    make_results().save(tmp_path, gallery=gallery.pack([one]))
    page = write_page(tmp_path).read_text(encoding="utf-8")
    pictures = [np.asarray(Image.open(io.BytesIO(base64.b64decode(found)))) for found in
                re.findall(r'<img src="data:image/png;base64,([^"]+)"', page)]  # fmt: skip
    assert len(pictures) == 3
    clean = one.clean.transpose(1, 2, 0)
    delta = one.delta.astype(float).transpose(1, 2, 0)
    assert (pictures[0] == clean).all()
    assert np.abs(pictures[1] - (clean / 255 + delta).clip(0, 1) * 255).max() <= 0.51
    scale = 0.5 / np.abs(delta).max()
    assert np.abs(pictures[2] - (0.5 + delta * scale) * 255).max() <= 0.51
    assert f"difference × {scale:.2g}" in page
    assert "Distance to the prototype" in page
    table = _linked(page, "gallery")
    assert table["clean"].tolist() == pytest.approx((-one.clean_logits).tolist())
    assert table["adversarial"].tolist() == pytest.approx((-one.logits).tolist())
    assert table["class"].tolist() == [0, 1, 2, 3]
    assert set(zip(table["target"], table["context"], table["index"], table["unit"], strict=True)) == {
        ("defense", "joint", 5, "Distance to the prototype")
    }
    for value in one.logits:
        assert f"<td>{-value:.2f}</td>" in page
    label = Results.load(tmp_path).samples.set_index("index")["label"][5].iloc[0]
    assert f"Sample 5: {label} taken for {one.logits.argmax()}" in page


def test_logits_that_are_no_distances_are_called_logits() -> None:
    assert "Distance to the prototype" not in render_page(
        make_results(), [dataclasses.replace(_exhibit(1), logits=np.ones(4))]
    )


def test_one_exhibit_with_a_positive_logit_decides_for_all() -> None:
    shown = [_exhibit(0), dataclasses.replace(_exhibit(1), logits=np.array([1.0, 2.0, 3.0, -4.0], np.float32))]
    page = render_page(make_results(), shown)
    assert page.count("<caption>Logit</caption>") == 2
    assert "The largest logit decides" in page
    table = _linked(page, "gallery")
    assert set(table["unit"]) == {"Logit"}
    assert table["adversarial"].tolist() == pytest.approx([*shown[0].logits, *shown[1].logits])


def test_large_pictures_are_scaled_down() -> None:
    page = render_page(make_results(classes=1000), [_exhibit(i, (3, 224, 224), 1000) for i in range(12)])
    assert len(page) < 900_000
    sizes = re.findall(r'<img src="data:image/jpeg[^>]*width="(\d+)" height="(\d+)"', page)
    assert set(sizes) == {("128", "128")}
    assert len(sizes) == 36


@pytest.mark.parametrize(
    ("listed", "there", "message"),
    [
        (b"nothing", b"nothing", "not a readable gallery"),
        (gallery.pack([_exhibit(999)]), gallery.pack([_exhibit(999)]), "is not of these results"),
        (gallery.pack([_exhibit(1)]), gallery.pack([_exhibit(2)]), "does not match the hash in run.json"),
        (None, gallery.pack([_exhibit(2)]), "does not match the hash in run.json"),
        (gallery.pack([_exhibit(1)]), None, "which run.json lists, is missing"),
    ],
    ids=("no gallery", "another's sample", "another gallery", "not listed", "missing"),
)
def test_a_gallery_that_is_not_of_these_results_is_left_out(
    listed: bytes | None, there: bytes | None, message: str, tmp_path: Path
) -> None:
    make_results().save(tmp_path, gallery=listed)
    (tmp_path / GALLERY).unlink(missing_ok=True)
    if there is not None:
        (tmp_path / GALLERY).write_bytes(there)
    page = write_page(tmp_path).read_text(encoding="utf-8")
    assert "There are no pictures" in page
    assert message in page
    assert "<img" not in page
    if listed is None:  # figures read it as the page does
        with pytest.warns(UserWarning, match=f"no figure of broken samples: .*{message}"):
            written = write_figures(tmp_path, tmp_path / "out")
        assert len(written) == 18
        assert not list((tmp_path / "out").glob("gallery.*"))


def test_what_is_no_results_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no complete results"):
        write_page(tmp_path)
    make_results().save(tmp_path)
    (tmp_path / "samples.csv").unlink()
    with pytest.raises(ValueError, match="no complete results"):
        write_page(tmp_path)
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("table", "gone"),
    [("outcomes", {"spending", "agreement"}), ("attacks", {"waterfall", "transfer", "spending", "agreement"})],
)
def test_what_a_missing_table_takes_away_is_said(table: str, gone: set[str], tmp_path: Path) -> None:
    results = make_results()
    results.save(tmp_path)
    (tmp_path / f"{table}.csv").unlink()
    page = write_page(tmp_path).read_text(encoding="utf-8")
    _check_numbers(page, results)
    assert page.count(f"There is no such figure for the context joint: there is no {table}.csv.") == len(gone)
    assert {kind for kind in gone if f'<figure id="{kind}-joint"' in page} == set()
    assert page.count("<svg") == 6 - len(gone)
    (part, _) = json.loads(Reader(page).texts["samples-data"])["parts"]
    assert set(part["each"][0]["runs"]) == {None}
    assert set(part["each"][0]["fate"]) == {"0", "1", "2"}


def test_runs_that_are_missing_from_a_table_are_said(tmp_path: Path) -> None:
    results = make_results(contexts=("joint", "solo"))
    lost = results.outcomes[(results.outcomes["context"] == "solo") & (results.outcomes["run"] == RUNS[0][0])]
    fewer = dataclasses.replace(
        results, outcomes=results.outcomes.drop(lost.index),
        attacks=results.attacks[(results.attacks["context"] != "solo") | (results.attacks["target"] != "fc")],
    )  # fmt: skip
    page = render_page(fewer)
    assert page.count("for the context solo: attacks.csv has no rows of the FC head in the context solo.") == 4
    assert "no such figure for the context joint" not in page
    page = render_page(dataclasses.replace(fewer, attacks=results.attacks))
    assert page.count("for the context solo: outcomes.csv has not every run of the FC head in the context solo.") == 2


def test_the_comparison_reads_back_as_its_table() -> None:
    comparison = compare({"a": make_results(seed=0), "b": make_results(seed=1, broken=0.1)})
    page = render_comparison_page(comparison)
    for target in ("defense", "fc"):
        data = _linked(page, f"differences-{target}-joint")
        mine = comparison.table[comparison.table["target"] == target].reset_index(drop=True)
        pd.testing.assert_frame_equal(data, mine, check_dtype=False)
    values = [
        float(value)
        for value in re.findall(r'<td><data value="(-?[\d.e-]+)">[+\-\d.]+</data> <span class="soft">\[[+\-0]', page)
    ]
    assert values == comparison.table.loc[comparison.table["name"] == "b", "difference"].tolist()
    assert "Bonett &amp; Price" in page
