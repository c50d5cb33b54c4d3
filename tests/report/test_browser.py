"""The page in a real browser: it loads in silence, fetches nothing, and its table sorts and filters."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pytest
from records import make_results

from msa_eval import Results
from msa_eval.evidence import gallery
from msa_eval.report import compare, write_page
from msa_eval.report.sidebyside import write_comparison

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
EVIL = "</script><script>document.title='evil'</script><img src=x onerror=\"document.title='evil'\">"


@pytest.fixture(scope="module")
def browser() -> Iterator[Chrome]:
    if CHROMIUM is None or DRIVER is None:
        pytest.skip("there is no chromium with its chromedriver here")
    selenium = pytest.importorskip("selenium.webdriver")
    options = selenium.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-extensions"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    service = selenium.ChromeService(DRIVER, env={**os.environ, "SE_AVOID_STATS": "true"})
    driver = selenium.Chrome(options=options, service=service)
    yield driver
    driver.quit()


def _requests(browser: Chrome) -> list[str]:
    entries = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    return [entry["params"]["request"]["url"] for entry in entries if entry["method"] == "Network.requestWillBeSent"]


def _open(browser: Chrome, path: Path, *, width: int = 1280, scheme: str = "light") -> None:
    """Load a page, and check what holds of all: no error, nothing fetched, pictures with a size, no sideways scroll."""
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    browser.get("about:blank")
    browser.get_log("performance")
    browser.get_log("browser")
    browser.get(path.as_uri())
    assert browser.get_log("browser") == []
    fetched = [url for url in _requests(browser) if not url.startswith("data:")]
    assert set(fetched) == {path.as_uri()}
    assert (
        browser.execute_script(
            "return performance.getEntriesByType('resource').filter((r) => !r.name.startsWith('data:')).length"
        )
        == 0
    )
    sizes = browser.execute_script(
        "return [...document.querySelectorAll('svg, img')].map((s) => [s.getBoundingClientRect().width, "
        "s.getBoundingClientRect().height, s.closest('figure').getBoundingClientRect().width])"
    )
    assert sizes
    for wide, high, room in sizes:
        assert 30 < wide <= room
        assert high > 10 + 0.05 * wide
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width


def _rows(browser: Chrome) -> list[list[str]]:
    rows: list[list[str]] = browser.execute_script(
        "const rows = document.querySelectorAll('#samples-table tbody tr');"
        "return [...rows].map((row) => [...row.cells].map((cell) => cell.textContent))"
    )
    return rows


def _told(browser: Chrome) -> str:
    return str(browser.execute_script("return document.querySelector('#samples-table [role=status]').textContent"))


def _filter(browser: Chrome, key: str, value: str) -> None:
    from selenium.webdriver.support.select import Select

    Select(browser.find_element("css selector", f"[data-filter={key}]")).select_by_value(value)


@pytest.fixture(scope="module")
def results() -> Results:
    return make_results(300, batch=60, contexts=("joint", "solo"))


@pytest.fixture(scope="module")
def page(results: Results, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("results")
    rng = np.random.default_rng(0)
    shown = [
        gallery.Exhibit(
            "defense", "joint", i, rng.integers(256, size=(3, 8, 8)).astype(np.uint8),
            rng.random((3, 8, 8)).astype(np.float16), *(rng.random((2, 4)).astype(np.float32)),
        )
        for i in range(3)
    ]  # fmt: skip
    results.save(folder, gallery=gallery.pack(shown))
    return write_page(folder)


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "light"), (390, "dark")])
def test_it_loads_in_silence_and_fits(browser: Chrome, page: Path, width: int, scheme: str) -> None:
    _open(browser, page, width=width, scheme=scheme)
    ground = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    ink = browser.execute_script("return getComputedStyle(document.querySelector('figure svg text')).fill")
    dark = [sum(int(part) for part in colour[4:-1].split(",")) < 200 for colour in (ground, ink)]
    assert dark == ([True, False] if scheme == "dark" else [False, True])


def test_links_lead_to_the_data(browser: Chrome, page: Path, results: Results) -> None:
    _open(browser, page)
    text = browser.execute_script(
        "const link = document.querySelector('#waterfall-joint a[download]');"
        "return [link.download, decodeURIComponent(link.href.split(',').slice(1).join(','))]"
    )
    assert text[0] == "waterfall-joint.csv"
    worst = results.summary.set_index(["target", "context", "metric"])["value"]["defense", "joint", "worst_case"]
    assert str(text[1]).splitlines()[-1].split(",")[:2] == ["defense", "worst_case"]
    assert float(str(text[1]).splitlines()[-1].split(",")[3]) == pytest.approx(worst)


def test_it_sorts(browser: Chrome, page: Path, results: Results) -> None:
    _open(browser, page)
    assert _told(browser) == "1\u201350 of 1200 rows"
    button = browser.find_element("css selector", "th[data-key=margin] button")
    button.click()
    margins = results.samples["min_margin"].sort_values()
    assert [float(row[11]) for row in _rows(browser)] == pytest.approx(margins.iloc[:50].tolist(), rel=1e-2)
    assert browser.find_element("css selector", "th[data-key=margin]").get_attribute("aria-sort") == "ascending"
    button.click()
    assert [float(row[11]) for row in _rows(browser)] == pytest.approx(margins.iloc[::-1].iloc[:50].tolist(), rel=1e-2)
    browser.find_element("css selector", "th[data-key=by] button").click()
    names = [row[8] for row in _rows(browser)]
    assert names == sorted(names)
    assert "\u2013" not in names  # what is missing comes last
    assert len(browser.find_elements("css selector", "th[aria-sort]")) == 1


def test_it_filters_and_turns_pages(browser: Chrome, page: Path, results: Results) -> None:
    _open(browser, page)
    _filter(browser, "target", "FC head")
    _filter(browser, "context", "solo")
    _filter(browser, "fate", "broken")
    samples = results.samples
    wanted = samples[(samples["target"] == "fc") & (samples["context"] == "solo")]
    wanted = wanted[wanted["clean_correct"] & ~wanted["robust"]]
    seen = _rows(browser)
    assert _told(browser) == f"1\u201350 of {len(wanted)} rows"
    while browser.find_element("xpath", "//button[text()='Next']").is_enabled():
        browser.find_element("xpath", "//button[text()='Next']").click()
        seen += _rows(browser)
    assert [int(row[2]) for row in seen] == wanted["index"].tolist()
    assert {(row[0], row[1], row[7]) for row in seen} == {("FC head", "solo", "broken")}
    _filter(browser, "by", wanted["broken_by"].iloc[0])
    assert {row[8] for row in _rows(browser)} == {wanted["broken_by"].iloc[0]}
    for key in ("by", "fate", "context", "target"):
        _filter(browser, key, "")
    browser.find_element("css selector", "[data-filter=index]").send_keys("7")
    assert [row[2] for row in _rows(browser)] == ["7"] * 4
    browser.find_element("css selector", "[data-filter=index]").send_keys("77777")
    assert _rows(browser) == []
    assert _told(browser) == "no row fits"


def test_samples_that_one_run_alone_broke(browser: Chrome, page: Path) -> None:
    _open(browser, page)
    browser.find_element("css selector", "[data-filter=only]").click()
    assert {row[10] for row in _rows(browser)} == {"1"}


def test_without_scripts_the_page_says_where_the_rows_are(browser: Chrome, page: Path) -> None:
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        browser.get(page.as_uri())
        assert "samples.csv" in browser.find_element("id", "samples-table").text
        assert len(browser.find_elements("css selector", "figure svg")) == 12
    finally:
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})


@pytest.mark.parametrize(
    "odd",
    [
        pytest.param({"n": 5000, "classes": 1000, "batch": 64}, id="thousands of samples"),
        pytest.param({"runs": [(f"{EVIL}:0", EVIL, EVIL, EVIL, 0)], "command": [EVIL], "evil": True}, id="markup"),
        pytest.param({"classes": 1}, id="one class", marks=pytest.mark.slow),
        pytest.param({"broken": 0.0}, id="none broken", marks=pytest.mark.slow),
        pytest.param({"broken": 1.0}, id="all broken", marks=pytest.mark.slow),
        pytest.param({"n": 1}, id="one sample", marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_odd_evidence_loads(browser: Chrome, odd: dict[str, Any], tmp_path: Path) -> None:
    evil = odd.pop("evil", False) if (odd := dict(odd)) else False
    results = make_results(**odd)
    if evil:
        results.samples["label"] = pd.Series([f"{EVIL}{label}" for label in results.samples["label"]], dtype=object)
        protocol = dict(results.run["protocol"]) | {"name": EVIL, "text": f"# {EVIL}"}
        results = Results(
            results.summary, results.attacks, results.samples, results.outcomes, results.batches,
            dict(results.run) | {"protocol": protocol, "verdict": EVIL},
        )  # fmt: skip
    results.save(tmp_path)
    _open(browser, write_page(tmp_path), width=390)
    assert "evil" not in browser.title.replace(EVIL, "")
    assert len(_rows(browser)) == min(len(results.samples), 50)
    if evil:
        assert _rows(browser)[0][3].startswith(EVIL)


def test_the_comparison_loads(browser: Chrome, tmp_path: Path) -> None:
    comparison = compare({"a": make_results(seed=0), f"b{EVIL}": make_results(seed=1)})
    path = write_comparison(comparison, tmp_path / "compare.html")
    for width in (1400, 390):
        _open(browser, path, width=width)
    assert len(browser.find_elements("css selector", "figure svg")) == 2 + 2 * 6
    assert "evil" not in browser.title.replace(EVIL, "")


def test_the_samples_of_a_comparison_stand_side_by_side(browser: Chrome, tmp_path: Path) -> None:
    first, second = make_results(300, seed=0), make_results(300, seed=1, broken=0.1)
    path = write_comparison(compare({"a": first, "b": second}), tmp_path / "compare.html")
    _open(browser, path, scheme="dark")
    assert _told(browser) == "1\u201350 of 600 rows"
    browser.find_element("css selector", "[data-filter=differ]").click()
    _filter(browser, "target", "defence")
    fates = {}
    for name, results in (("a", first), ("b", second)):
        rows = results.samples[results.samples["target"] == "defense"].set_index("index")
        broken = rows["robust"].map({True: "robust", False: "broken"})
        fates[name] = broken.where(rows["clean_correct"], "wrong on clean")
    table = pd.DataFrame(fates)
    wanted = table[table["a"] != table["b"]]
    seen = _rows(browser)
    assert _told(browser) == f"1\u201350 of {len(wanted)} rows"
    assert [(int(row[2]), row[4], row[7]) for row in seen] == list(wanted.iloc[:50].itertuples(name=None))
    _filter(browser, "fate-1", "robust")
    _filter(browser, "fate-2", "broken")
    expected = wanted[(wanted["a"] == "robust") & (wanted["b"] == "broken")]
    assert [int(row[2]) for row in _rows(browser)] == list(expected.index)[:50]
    _filter(browser, "fate-1", "")
    _filter(browser, "fate-2", "")
    browser.find_element("css selector", "th[data-key=margin-2] button").click()
    margins = second.samples[second.samples["target"] == "defense"].set_index("index")["min_margin"]
    assert [float(row[9]) for row in _rows(browser)] == pytest.approx(
        margins[wanted.index].sort_values().iloc[:50].tolist(), rel=1e-2
    )
    assert len(browser.find_elements("css selector", "th[aria-sort]")) == 1
    groups = browser.find_elements("css selector", "#samples-table th.group")
    assert [group.text for group in groups] == ["a", "b"]


@pytest.mark.slow
def test_thousands_of_samples_side_by_side_load(browser: Chrome, tmp_path: Path) -> None:
    named = {name: make_results(5000, classes=1000, batch=64, seed=seed) for seed, name in enumerate("ab")}
    path = write_comparison(compare(named), tmp_path / "compare.html")
    _open(browser, path, width=390)
    assert len(_rows(browser)) == 50
    assert _told(browser) == "1\u201350 of 10000 rows"
