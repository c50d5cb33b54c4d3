"""Every figure shows what the tables hold, counted here another way."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
from records import RUNS, make_results
from scipy.stats import binomtest

from msa_eval import Results
from msa_eval.report import draw_curves, frames, spending, to_svg
from msa_eval.report.plots.catalog import Chart, charts

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def results() -> Results:
    return make_results(contexts=("joint", "solo"))


def _texts(svg: str) -> list[str]:
    return ["".join(node.itertext()) for node in ElementTree.fromstring(svg).iter() if node.tag.endswith("}text")]


def _number(results: Results, target: str, context: str, metric: str) -> float:
    table = results.summary.set_index(["target", "context", "metric"])["value"]
    return float(table[target, context, metric])


def test_the_waterfall_falls_from_clean_to_the_worst_case(results: Results) -> None:
    for context, target in itertools.product(("joint", "solo"), ("fc", "defense")):
        data = frames.waterfall(results, context)
        rows = data[data["target"] == target]
        assert rows["after"].iloc[0] == _number(results, target, context, "clean")
        assert rows["after"].iloc[-1] == _number(results, target, context, "worst_case")
        assert rows["before"].iloc[-1] == pytest.approx(rows["after"].iloc[-1])
        assert list(rows["before"].iloc[1:]) == list(rows["after"].iloc[:-1])
        assert (rows["before"] - rows["after"]).iloc[1:-1].tolist() == pytest.approx(rows["broken"].iloc[1:-1] / 40)
        assert rows["step"].tolist()[1:-1] == results.attacks["run"].unique().tolist()


def test_the_matrix_shows_the_restart_that_leaves_the_fewest(results: Results) -> None:
    data = frames.transfer(results, "joint").set_index(["target", "surrogate", "attack", "loss"])
    attacks = results.attacks[results.attacks["context"] == "joint"]
    assert len(data) == 2 * 3
    for key, rows in attacks.groupby(["target", "surrogate", "attack", "loss"]):
        lowest = rows[rows["final"] == rows["final"].min()]
        assert data.loc[key, "target_accuracy"] == rows["final"].min()
        assert data.loc[key, "surrogate_accuracy"] in set(lowest["surrogate_accuracy"])
        assert data.loc[key, "runs"] == len(rows)


def test_classes_add_up_and_have_wilson_intervals(results: Results) -> None:
    data = frames.per_class(results, "solo")
    for target, rows in data.groupby("target"):
        assert (rows["n"] * rows["worst_case"]).sum() / 40 == pytest.approx(
            _number(results, str(target), "solo", "worst_case")
        )
        assert (rows["n"] * rows["clean"]).sum() / 40 == pytest.approx(_number(results, str(target), "solo", "clean"))
    for row in data.to_dict(orient="records"):
        interval = binomtest(round(row["n"] * row["clean"]), row["n"]).proportion_ci(method="wilson")
        assert (row["clean_low"], row["clean_high"]) == pytest.approx((interval.low, interval.high))


def test_agreement_counts_the_samples_that_one_run_alone_broke(results: Results) -> None:
    data = frames.agreement(results, "joint").set_index(["target", "run"])
    alone = frames.only_one(results, "joint")
    outcomes = results.outcomes[results.outcomes["context"] == "joint"]
    samples = results.samples[results.samples["context"] == "joint"].set_index(["target", "index"])
    for target in ("fc", "defense"):
        broke: dict[int, set[str]] = {}
        for row in outcomes[outcomes["target"] == target].to_dict(orient="records"):
            if row["any_broken"] and samples.loc[(target, row["index"]), "clean_correct"]:
                broke.setdefault(row["index"], set()).add(row["run"])
        assert broke
        for run in outcomes["run"].unique():
            assert data.loc[(target, run), "broken"] == sum(run in runs for runs in broke.values())
            mine = {index for index, runs in broke.items() if runs == {run}}
            assert data.loc[(target, run), "only"] == len(mine)
            listed = alone[(alone["target"] == target) & (alone["run"] == run)]
            assert set(listed["index"]) == mine
            assert all(
                samples.loc[(target, row["index"]), "label"] == row["label"] for row in listed.to_dict("records")
            )


CASCADE = [
    ("a:apgd-margin:0", "a", "apgd", "margin", 0), ("b:apgd-margin:0", "b", "apgd", "margin", 0),
    ("b:overtime-margin:0", "b", "overtime", "margin", 0),
    ("pursued:pursuit-margin:0", "pursued", "pursuit", "margin", 0),
    ("target:spsa-margin:0", "target", "spsa", "margin", 0),
]  # fmt: skip
"""What each of five runs finds of six samples: the iterate at which they are first wrong."""
FIRST = {
    "a:apgd-margin:0": [3, 0, None, None, None, None], "b:apgd-margin:0": [0, 0, 5, None, None, None],
    "b:overtime-margin:0": [0, 0, 0, 0, None, None], "pursued:pursuit-margin:0": [0, 7, 0, 0, 2, None],
    "target:spsa-margin:0": [0, 0, 0, 0, 0, None],
}  # fmt: skip


def _cascade(context: str, *, runs: list[str], combine: str = "cascade") -> Results:
    """Evidence of a cascade in which the runs find what `FIRST` says; all samples are right when clean."""
    listed = [run for run in CASCADE if run[0] in runs]
    made = make_results(6, clean=1.0, contexts=(context,), targets=("defense",), runs=listed)
    first = pd.array(
        [FIRST[run][i] for run, i in zip(made.outcomes["run"], made.outcomes["index"], strict=True)], "Int64"
    )
    outcomes = made.outcomes.assign(first_iterate=first, any_broken=~pd.isna(first))
    text = f'[attack.apgd]\ncombine = "{combine}"\n'
    run = dict(made.run) | {"protocol": dict(made.run["protocol"]) | {"text": text}}
    return dataclasses.replace(made, outcomes=outcomes, run=run)


def _broke(results: Results, context: str) -> dict[str, tuple[int, int]]:
    rows = frames.agreement(results, context).to_dict(orient="records")
    return {row["run"]: (row["broken"], row["only"]) for row in rows}


def test_what_a_chained_run_finds_broken_at_its_start_is_not_its_own() -> None:
    """By hand from `FIRST`: all runs are chained in solo, those from the pursuit on in joint."""
    solo = _cascade("solo", runs=[name for name in FIRST if "pursuit" not in name])
    assert _broke(solo, "solo") == {
        "a:apgd-margin:0": (2, 2), "b:apgd-margin:0": (1, 1), "b:overtime-margin:0": (1, 1),
        "target:spsa-margin:0": (1, 1),
    }  # fmt: skip
    assert len(frames.only_one(solo, "solo")) == 5
    names = ["a:apgd-margin:0", "b:apgd-margin:0", "pursued:pursuit-margin:0", "target:spsa-margin:0"]
    assert _broke(_cascade("joint", runs=names), "joint") == {
        names[0]: (2, 0), names[1]: (3, 1), names[2]: (3, 2), names[3]: (0, 0),
    }  # fmt: skip
    assert _broke(_cascade("joint", runs=names, combine="separate"), "joint")[names[3]] == (5, 0)


def test_a_run_of_the_committed_cascade_that_broke_nothing_new_broke_nothing() -> None:
    results = Results.load(ROOT / "results/digits")
    runs = results.attacks.set_index(["target", "context", "run"])["newly_broken"]
    data = frames.agreement(results, "solo").to_dict(orient="records")
    assert [row["broken"] for row in data] == [runs[row["target"], "solo", row["run"]] for row in data]
    assert all(row["broken"] == row["only"] for row in data)


def test_the_matrix_leaves_out_what_searches_among_found_points() -> None:
    results = _cascade("joint", runs=list(FIRST))
    assert frames.transfer(results, "joint")["attack"].tolist() == ["apgd", "apgd", "spsa"]
    message = {chart.kind: chart.caption for chart in charts(results)}
    assert "includes what earlier runs broke" in message["transfer"]
    assert "wrong at its start (iterate 0) does not count" in message["agreement"]


def test_batches_add_up(results: Results) -> None:
    data = frames.seating(results, "joint")
    assert data.groupby("target")["size"].sum().to_dict() == {"fc": 40, "defense": 40}
    for target, rows in data.groupby("target"):
        share = (rows["size"] * rows["worst_case"]).sum() / 40
        assert share == pytest.approx(_number(results, str(target), "joint", "worst_case"))


def test_the_curve_of_spent_passes_ends_at_the_worst_case(results: Results) -> None:
    for target in ("defense", "fc"):
        curve = spending(results, target=target, context="joint")
        assert curve["passes"].is_monotonic_increasing
        assert curve["worst_case"].is_monotonic_decreasing
        assert curve.iloc[0].tolist() == [0.0, _number(results, target, "joint", "clean")]
        runs = results.attacks[(results.attacks["target"] == target) & (results.attacks["context"] == "joint")]
        worst = _number(results, target, "joint", "worst_case")
        assert curve.iloc[-1].tolist() == pytest.approx([runs["forwards"].sum() / 40, worst])


def test_a_stochastic_target_spends_several_passes_an_iterate() -> None:
    """Ten passes a sample at two answers a gradient are five iterates: the break at iterate 3 comes after 8 passes."""
    made = make_results(1, clean=1.0, targets=("defense",), runs=RUNS[:1])
    outcomes = made.outcomes.assign(any_broken=True, first_iterate=pd.array([3], "Int64"))
    protocol = dict(made.run["protocol"]) | {"text": "[stochastic]\neot = 2\n"}
    for draws, passes in ((9, 8.0), (1, 4.0)):
        run = dict(made.run) | {"protocol": protocol, "draws": {"defense": draws}}
        curve = spending(dataclasses.replace(made, outcomes=outcomes, run=run))
        assert curve["passes"].tolist()[1] == pytest.approx(passes)


def test_figures_come_in_the_pages_order_for_every_context(results: Results) -> None:
    listed = list(charts(results))
    kinds = ["waterfall", "transfer", "spending", "classes", "agreement", "batches"]
    assert [(one.kind, one.context) for one in listed] == list(itertools.product(kinds, ("joint", "solo")))
    assert len({one.name for one in listed}) == len(listed)


@pytest.mark.parametrize("kind", ["waterfall", "transfer", "spending", "classes", "agreement", "batches"])
def test_every_figure_is_drawn_and_told(results: Results, kind: str) -> None:
    (chart,) = [one for one in charts(results) if one.kind == kind and one.context == "joint"]
    texts = _texts(to_svg(chart.figure()))
    assert "defence" in texts
    assert "FC head" in texts
    assert "defence" in chart.alt
    assert "FC head" in chart.alt
    assert to_svg(chart.figure()) == to_svg(chart.figure())


def test_numbers_stand_in_the_waterfall_and_the_matrix(results: Results) -> None:
    drawn: dict[str, Chart] = {one.kind: one for one in charts(results) if one.context == "joint"}
    waterfall = _texts(to_svg(drawn["waterfall"].figure()))
    assert f"{100 * _number(results, 'defense', 'joint', 'worst_case'):.1f}" in waterfall
    for broken in results.attacks.loc[results.attacks["context"] == "joint", "newly_broken"]:
        assert not broken or f"\N{MINUS SIGN}{broken}" in waterfall
    matrix = _texts(to_svg(drawn["transfer"].figure()))
    for row in drawn["transfer"].data.to_dict(orient="records"):
        assert f"{100 * row['target_accuracy']:.1f}" in matrix
        assert f"{100 * row['surrogate_accuracy']:.1f}" in matrix


@pytest.mark.parametrize(
    "odd",
    [
        {"classes": 1000, "n": 2000}, {"targets": ("defense",), "n": 1, "classes": 1},
        {"runs": [("<run> & $x^2$ \u6f22" * 9, "a$_b" * 20, "x", "<y>" * 20, 0)]},
    ],
    ids=("many classes", "one sample", "names"),
)  # fmt: skip
def test_odd_evidence_is_drawn(odd: dict[str, object]) -> None:
    for chart in charts(make_results(**odd)):  # type: ignore[arg-type]
        assert to_svg(chart.figure()).endswith("</svg>\n")
        assert chart.alt


@pytest.mark.parametrize(("n", "message"), [(200, "batch (hollow"), (201, "batches, in order")])
def test_many_batches_are_drawn_as_curves(n: int, message: str) -> None:
    results = make_results(n, batch=1)
    (chart,) = [one for one in charts(results) if one.kind == "batches"]
    svg = to_svg(chart.figure())
    assert any(text.startswith(message) for text in _texts(svg))
    assert (svg.count("<use") > 4 * 200) == (n == 200)
    (axes,) = chart.figure().axes
    lines = [line.get_ydata() for line in axes.get_lines()]
    drawn = [*lines[0], *lines[1]]
    rows = chart.data[chart.data["target"] == "fc"]
    assert sorted(drawn) == sorted([*rows["clean"], *rows["worst_case"]])


def test_missing_numbers_are_drawn() -> None:
    results = make_results()
    attacks = results.attacks.assign(surrogate_accuracy=np.nan, final=np.nan)
    summary = results.summary.assign(value=np.nan, low=np.nan, high=np.nan)
    blank = Results(summary, attacks, results.samples, results.outcomes, results.batches, results.run)
    for chart in charts(blank):
        assert to_svg(chart.figure())


def test_many_curves_have_their_names_at_their_ends() -> None:
    curves = {
        f"c{i} $ <a>": pd.DataFrame({"passes": [0, 10, 100], "worst_case": [0.9, 0.5, i / 20]}) for i in range(18)
    }
    figure = draw_curves(curves, "title & more")
    texts = _texts(to_svg(figure))
    assert "title & more" in texts
    assert [f"c{i} $ <a> {5 * i:.1f}" in texts for i in range(18)] == [True] * 18
