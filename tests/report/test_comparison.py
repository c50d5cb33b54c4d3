"""Paired differences against numbers worked by hand, and evaluations that can't be paired are refused."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from records import make_results
from scipy.stats import norm

from msa_eval import Results
from msa_eval.report.comparison import compare, load_all, paired, render_comparison


def _masks(both: int, lost: int, gained: int, neither: int) -> tuple[np.ndarray, np.ndarray]:
    first = [True] * (both + lost) + [False] * (gained + neither)
    second = [True] * both + [False] * lost + [True] * gained + [False] * neither
    return np.array(first, dtype=bool), np.array(second, dtype=bool)


@pytest.mark.parametrize(("lost", "gained"), [(0, 0), (0, 6), (1, 6), (6, 1), (5, 5), (12, 2), (40, 60)])
def test_the_test_is_the_binomial_tail_summed_by_hand(lost: int, gained: int) -> None:
    """Of m changed samples, twice the probability of as few as the rarer kind, at odds of one half; at most 1."""
    m, rarer = lost + gained, min(lost, gained)
    tail = sum(math.comb(m, k) for k in range(rarer + 1)) / 2**m
    assert paired(*_masks(20, lost, gained, 20)).p == pytest.approx(min(1.0, 2 * tail), rel=1e-12)


def test_a_published_example() -> None:
    """Agresti's approval ratings (Categorical Data Analysis, table 10.1): 150 lost, 86 gained of 1,600.

    He gives the difference -0.04; a Wald interval without the added samples is -0.059 to -0.021.
    """
    found = paired(*_masks(794, 150, 86, 570))
    assert found.difference == -64 / 1600
    assert (found.low, found.high) == pytest.approx((-0.059, -0.021), abs=6e-4)
    assert found.p == pytest.approx(3.7e-5, rel=0.05)


def test_the_interval_is_bonett_and_prices() -> None:
    """Worked by hand: n = 18, 6 lost and 1 gained: (7 and 2) / 20, so -0.25 ± 1.96 * sqrt((0.45 - 0.0625) / 20)."""
    found = paired(*_masks(5, 6, 1, 6))
    half = norm.ppf(0.975) * math.sqrt((0.45 - 0.0625) / 20)
    assert (found.low, found.high) == pytest.approx((-0.25 - half, -0.25 + half))
    assert (found.lost, found.gained) == (6, 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("n", "p_lost", "p_gained"), [(30, 0.1, 0.2), (100, 0.02, 0.1), (250, 0.3, 0.05), (60, 0.05, 0.05)]
)
def test_the_interval_covers_what_it_should(n: int, p_lost: float, p_gained: float) -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for lost, gained, _ in rng.multinomial(n, [p_lost, p_gained, 1 - p_lost - p_gained], size=4000):
        found = paired(*_masks(n - lost - gained, lost, gained, 0))
        hits += found.low <= p_gained - p_lost <= found.high
    assert 0.93 <= hits / 4000 <= 0.99  # with few changes it errs on the wide side


@pytest.mark.parametrize(("lost", "gained"), [(0, 0), (0, 10), (10, 0), (3, 4)])
def test_the_interval_holds_the_difference_and_stays_in_range(lost: int, gained: int) -> None:
    found = paired(*_masks(0, lost, gained, 10 - lost - gained))
    assert -1 <= found.low <= found.difference <= found.high <= 1
    swapped = paired(*_masks(0, gained, lost, 10 - lost - gained))
    assert (swapped.low, swapped.high) == pytest.approx((-found.high, -found.low))
    assert swapped.p == found.p


def test_nothing_is_undefined() -> None:
    found = paired(np.zeros(0, dtype=bool), np.zeros(0, dtype=bool))
    assert all(math.isnan(value) for value in (found.difference, found.low, found.high, found.p))


def test_differences_are_those_of_the_summaries_and_of_the_samples() -> None:
    first, second, third = make_results(seed=0), make_results(seed=1, broken=0.1), make_results(seed=2)
    comparison = compare({"a": first, "b": second, "c": third})
    for row in comparison.table.to_dict(orient="records"):
        results = {"a": first, "b": second, "c": third}[row["name"]]
        key = ["target", "context", "metric"]
        number = results.summary.set_index(key).loc[tuple(row[name] for name in key)]
        base = first.summary.set_index(key).loc[tuple(row[name] for name in key)]
        assert row["value"] == number["value"]
        if row["name"] == "a":
            assert math.isnan(row["difference"])
            continue
        assert row["difference"] == pytest.approx(number["value"] - base["value"], abs=1e-12), row
        assert row["gained"] - row["lost"] == round(40 * row["difference"])
    right = comparison.right
    mine = right[(right["target"] == "defense") & (right["metric"] == "worst_case")].set_index("index")
    samples = second.samples[second.samples["target"] == "defense"].set_index("index")
    assert (mine["b"] == samples["robust"]).all()


def test_the_text_shows_every_number() -> None:
    comparison = compare({"a": make_results(seed=0), "b": make_results(seed=1, broken=0.1)})
    text = render_comparison(comparison)
    for row in comparison.table.to_dict(orient="records"):
        assert f"{100 * row['value']:.1f} [{100 * row['low']:.1f}, {100 * row['high']:.1f}]" in text
        if row["name"] == "b" and round(100 * row["difference"], 1):
            assert f"{100 * row['difference']:+.1f} [" in text


def test_samples_are_paired_by_index_and_not_by_row() -> None:
    results = make_results()
    shuffled = Results(
        results.summary, results.attacks, results.samples.sample(frac=1, random_state=0),
        results.outcomes.sample(frac=1, random_state=1), results.batches.sample(frac=1, random_state=2), results.run,
    )  # fmt: skip
    table = compare({"a": results, "b": shuffled}).table
    assert (table.loc[table["name"] == "b", ["lost", "gained"]] == 0).all(axis=None)


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (make_results(30), "40 samples and b has 30, 30 of them the same"),
        (make_results(data={"name": "others", "sha256": "3" * 64, "n": 40}), "different data"),
        (make_results(contexts=("solo",)), "no context in common"),
    ],
)
def test_what_can_not_be_paired_is_refused(second: Results, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compare({"a": make_results(), "b": second})
    with pytest.raises(ValueError, match="at least two"):
        compare({"a": second})


def test_notes_say_in_what_they_differ() -> None:
    first = make_results()
    protocol = first.run["protocol"] | {"sha256": "4", "text": first.run["protocol"]["text"].replace("8/255", "4/255")}
    second = make_results(protocol=protocol, seed=5)
    notes = " ".join(compare({"a": first, "b": second}).notes)
    assert "The protocols differ" in notes
    assert "Linf of radius 8/255, Linf of radius 4/255" in notes
    assert "defences differ" not in notes
    weights = first.run["targets"] | {"defense": {"type": "HPM", "sha256": "5"}}
    assert "defences differ" in " ".join(compare({"a": first, "b": _with(first, weights)}).notes)


def _with(results: Results, targets: dict[str, object]) -> Results:
    run = dict(results.run) | {"targets": targets}
    return Results(results.summary, results.attacks, results.samples, results.outcomes, results.batches, run)


def test_folders_of_one_name_are_told_apart(tmp_path: Path) -> None:
    for name in ("x/run", "y/run"):
        make_results().save(tmp_path / name)
    assert list(load_all([tmp_path / "x/run", tmp_path / "y/run"])) == ["x/run", "y/run"]
    with pytest.raises(ValueError, match="given twice"):
        load_all([tmp_path / "x/run", tmp_path / "x/../x/run"])
    with pytest.raises(ValueError, match="no complete results"):
        load_all([tmp_path / "x/run", tmp_path])


@pytest.mark.parametrize("name", ["index", "target", "metric", "context"])
def test_a_folder_named_as_a_column_is_named_by_more_of_its_path(name: str, tmp_path: Path) -> None:
    first, second = make_results(seed=0), make_results(seed=1)
    first.save(tmp_path / "x" / name)
    second.save(tmp_path / "x/b")
    loaded = load_all([tmp_path / "x" / name, tmp_path / "x/b"])
    assert list(loaded) == [f"x/{name}", "x/b"]
    right, expected = compare(loaded).right, compare({"a": first, "b": second}).right
    assert right.to_numpy().tolist() == expected.to_numpy().tolist()
    with pytest.raises(ValueError, match=f"no evaluation can be called '{name}'"):
        compare({name: first, "b": second})


def test_what_is_left_out_and_other_heads_are_noted() -> None:
    first, second = make_results(contexts=("joint", "solo")), make_results(contexts=("joint", "alone"))
    text = render_comparison(compare({"a": first, "b": second}))
    assert "Not all have them, so these are left out: context solo of a; context alone of b." in text
    assert "FC heads differ" not in text
    alone = make_results(contexts=("joint", "solo"), targets=("defense",))
    text = render_comparison(compare({"a": first, "b": alone}))
    assert "left out: FC head of a." in text
    targets = dict(first.run["targets"]) | {"fc": {"type": "Classifier", "sha256": "9" * 64}}
    other = dataclasses.replace(first, run=dict(first.run) | {"targets": targets})
    notes = compare({"a": first, "b": other}).notes
    assert list(notes) == ["The FC heads differ (their weights have different hashes)."]


def test_tables_survive_a_round_through_the_disk(tmp_path: Path) -> None:
    first, second = make_results(seed=0), make_results(seed=1)
    first.save(tmp_path / "a")
    second.save(tmp_path / "b")
    loaded = compare(load_all([tmp_path / "a", tmp_path / "b"])).table
    pd.testing.assert_frame_equal(loaded, compare({"a": first, "b": second}).table, check_dtype=False)
