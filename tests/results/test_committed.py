"""The committed runs agree with themselves, with the packaged weights and with what the README says of them."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from xml.etree import ElementTree

import pandas as pd
import pytest
from matplotlib.figure import Figure

from msa_eval import HPM, Results, Samples, load_checkpoint, load_samples, verify
from msa_eval.hashing import weights_hash
from msa_eval.protocols import load_protocol, make_protocol
from msa_eval.references import reference_path
from msa_eval.report import draw_curves, draw_waterfall, frames, to_svg

ROOT = Path(__file__).parents[2]
FOLDERS = sorted(path.parent for path in (ROOT / "results").glob("*/run.json") if path.parent.name != "demo")


def test_the_runs_are_there() -> None:
    assert {"cifar10-wrn10-2", "cifar10-wrn10-2-msa", "digits"} <= {folder.name for folder in FOLDERS}


@pytest.mark.parametrize(("folder", "name"), [("digits", "digits"), ("cifar10-wrn10-2-msa", "msa")])
def test_they_carry_the_protocol_they_were_made_under_which_is_ours_or_an_older_one(folder: str, name: str) -> None:
    run = Results.load(ROOT / "results" / folder).run
    now = load_protocol(name, overrides=run["protocol"]["overrides"])
    then = make_protocol(tomllib.loads(run["protocol"]["text"]))
    assert (run["protocol"]["sha256"], run["protocol"]["version"]) == (then.digest(), then.version)
    assert then.name == name
    assert (then.digest() == now.digest()) == (then.version == now.version)
    assert then.version <= now.version
    assert set(run["protocol"]["overrides"]) <= {"threat.contexts", "samples.limit"}


def test_no_image_of_cifar10_is_committed() -> None:
    kept = [path.name for folder in FOLDERS if folder.name.startswith("cifar10") for path in folder.iterdir()]
    assert not {"gallery.safetensors", "report.html", "figures"} & set(kept)


def test_the_cifar10_run_is_proven_by_its_archive(shared: Path) -> None:
    hpm = load_checkpoint(reference_path("cifar10-wrn10-2")).model
    checked = verify(ROOT / "results/cifar10-wrn10-2-msa", hpm, load_samples(str(shared / "data/cifar10/test.npz")))
    assert [check for check in checked.checks if not check.passed] == []
    assert checked.claims == checked.replayed > 300


def test_the_digits_run_is_proven_by_its_archive(digits_hpm: HPM, digits: Samples) -> None:
    """Every broken sample of every context, replayed on the packaged defence; and the tables counted again."""
    checked = verify(ROOT / "results/digits", digits_hpm, digits)
    assert [check for check in checked.checks if not check.passed] == []
    samples = Results.load(ROOT / "results/digits").samples
    assert checked.claims == checked.replayed == int((samples["clean_correct"] & ~samples["robust"]).sum())
    assert set(samples["context"]) == {"joint", "solo", "alone", "composed"}


def test_the_readme_shows_the_digits_run() -> None:
    results = Results.load(ROOT / "results/digits")
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    joint = results.summary[results.summary["context"] == "joint"]
    for metric, rows in joint.groupby("metric"):
        values = rows.set_index("target").to_dict(orient="index")
        cells = [f"{100 * v['value']:.1f} [{100 * v['low']:.1f}, {100 * v['high']:.1f}]" for v in
                 (values["fc"], values["defense"])]  # fmt: skip
        line = next(line for line in text.splitlines() if line.startswith(f"{metric} "))
        assert all(cell in line for cell in cells)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_numbers_follow_from_the_samples(folder: Path) -> None:
    results = Results.load(folder)
    for (target, context), rows in results.samples.groupby(["target", "context"]):
        value = results.summary.set_index(["target", "context", "metric"])["value"].sort_index()[target, context]
        outcomes = results.outcomes[(results.outcomes["target"] == target) & (results.outcomes["context"] == context)]
        correct = rows.set_index("index")["clean_correct"]
        finals = [(correct & ~run.set_index("index")["final_broken"]).mean() for _, run in outcomes.groupby("run")]
        ever = outcomes.groupby("index")["any_broken"].any()
        expected = {
            "clean": correct.mean(),
            "paper": min(finals),
            "realised": rows["committed_right"].mean(),
            "worst_case": (correct & ~ever).mean(),
        }
        assert value.to_dict() == pytest.approx(expected, abs=1e-12)
        assert expected["worst_case"] <= expected["realised"] <= expected["paper"] <= expected["clean"]
    assert len(results.batches) == results.run["data"]["n"]


def test_the_cifar10_run_is_of_the_packaged_defence_under_the_papers_protocol() -> None:
    run = Results.load(ROOT / "results/cifar10-wrn10-2").run
    model = load_checkpoint(reference_path("cifar10-wrn10-2")).model
    assert run["targets"]["defense"]["sha256"] == weights_hash(model)
    protocol = load_protocol("paper-cifar10", overrides=run["protocol"]["overrides"])
    assert run["protocol"]["sha256"] == protocol.digest()
    assert list(run["protocol"]["overrides"]) == ["attack.square.queries"]
    assert protocol.square is not None
    assert protocol.square.queries >= 1000
    assert run["data"]["n"] == 2500
    assert run["git"]["dirty"] is False


def test_the_page_and_the_chart_show_the_committed_numbers() -> None:
    results = Results.load(ROOT / "results/cifar10-wrn10-2")
    lines = (
        (ROOT / "docs/research/measured.md").read_text(encoding="utf-8").replace("*", "").replace("`", "").splitlines()
    )
    for metric, rows in results.summary.groupby("metric"):
        cells = {
            row["target"]: f"{100 * row['value']:.1f} [{100 * row['low']:.1f}, {100 * row['high']:.1f}]"
            for row in rows.to_dict(orient="records")
        }
        assert f"| {metric} | {cells['fc']} | {cells['defense']} |" in lines
    _check_drawn("cifar10-wrn10-2.svg", draw_waterfall(frames.waterfall(results, "joint")))


@pytest.mark.parametrize("reference", ["digits", "cifar10-wrn10-2"])
def test_the_budget_charts_show_their_tables(reference: str) -> None:
    table = pd.read_csv(ROOT / f"results/benchmarks/budget-{reference}.csv")
    rows = table[table["target"] == "defense"]
    curves = {str(name): curve for name, curve in rows.groupby("contender", sort=False)}
    name = f"benchmarks/budget-{reference}.svg"
    root = ElementTree.parse(ROOT / "results" / name).getroot()
    (title,) = [text for text in _texts(root) if "worst case in %, by passes" in text]
    _check_drawn(name, draw_curves(curves, title))


def _check_drawn(name: str, figure: Figure) -> None:
    """A committed chart is this figure: the same texts, and the same lines to a tenth of a point.

    Bytes would be too much to ask: another release of matplotlib may write the same otherwise.
    """
    committed = ElementTree.parse(ROOT / "results" / name).getroot()
    drawn = ElementTree.fromstring(to_svg(figure))
    assert _texts(committed) == _texts(drawn)
    assert _points(committed) == pytest.approx(_points(drawn), abs=0.1)


def _texts(root: ElementTree.Element) -> list[str]:
    return ["".join(node.itertext()) for node in root.iter() if node.tag.endswith("}text")]


def _points(root: ElementTree.Element) -> list[float]:
    paths = [str(node.get("d")) for node in root.iter() if node.tag.endswith("}path")]
    return [float(number) for path in paths for number in re.findall(r"-?\d+(?:\.\d+)?", path)]
