"""The numbers of a table against their definitions, and the order that must hold between them."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from records import make_results
from scipy.optimize import brentq
from scipy.stats import norm

from msa_eval.defense.contexts import JOINT, SOLO
from msa_eval.evidence import metrics
from msa_eval.evidence.metrics import Mask
from msa_eval.evidence.records import TargetRecord


@given(n=st.integers(1, 3000), share=st.floats(0, 1))
def test_the_interval_inverts_the_score_test(n: int, share: float) -> None:
    """An end p of Wilson's interval is where |p̂ - p| is 1.96 standard errors at p."""
    k = round(share * n)
    found = metrics.rate(k, n)
    z = norm.ppf(0.975)

    def excess(p: float) -> float:
        return (k / n - p) ** 2 - z**2 * p * (1 - p) / n

    inside = 1e-9  # at 0 and 1 the other root of the quadratic is the share itself
    low = 0.0 if k == 0 else brentq(excess, 0, min(k / n, 1 - inside), xtol=1e-14)
    high = 1.0 if k == n else brentq(excess, max(k / n, inside), 1, xtol=1e-14)
    assert found.value == k / n
    assert found.low == pytest.approx(low, abs=1e-9)
    assert found.high == pytest.approx(high, abs=1e-9)
    assert 0 <= found.low <= found.value <= found.high <= 1


def test_a_share_of_nothing_is_undefined() -> None:
    found = metrics.rate(0, 0)
    assert math.isnan(found.value)
    assert math.isnan(found.low)


@given(st.data())
def test_definitions_and_their_order(data: st.DataObject) -> None:
    """Verdicts of every run's every iterate, drawn at random: worst_case <= realised <= paper <= final <= clean."""
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    runs, iterates, n = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 5)), data.draw(st.integers(1, 20))
    batch = rng.integers(0, 3, n)
    clean_right = rng.random(n) < 0.8
    right = rng.random((runs, iterates, n)) < data.draw(st.floats(0, 1))

    counted = right & clean_right
    final_broken, any_broken = ~right[:, -1], (~right).any(axis=1)
    committed = clean_right.copy()
    for b in range(3):
        here = batch == b
        options = [clean_right[here], *counted[:, :, here].reshape(runs * iterates, int(here.sum()))]
        committed[here] = min(options, key=lambda option: option.sum())

    record = _record(clean_right, final_broken, any_broken, committed)
    found = {name: metric.of(record) for name, metric in metrics.METRICS.items()}
    finals = [sum(clean_right[i] and right[r, -1, i] for i in range(n)) / n for r in range(runs)]
    assert found["clean"].value == pytest.approx(sum(clean_right) / n)
    assert found["paper"].value == pytest.approx(min(finals))
    never = [all(right[r, t, i] for r in range(runs) for t in range(iterates)) for i in range(n)]
    assert found["worst_case"].value == pytest.approx(sum(a and b for a, b in zip(never, clean_right, strict=True)) / n)
    assert found["realised"].value == pytest.approx(sum(committed) / n)
    values = [one.value for one in found.values()]
    assert values == sorted(values, reverse=True)
    assert all(found["paper"].value <= final <= found["clean"].value for final in finals)


def test_the_rows_of_the_tables_give_the_same_numbers() -> None:
    for seed in range(20):
        made = make_results(30, contexts=["joint", "solo"], seed=seed)
        for row in made.summary.to_dict(orient="records"):
            samples, outcomes = (
                table[(table["target"] == row["target"]) & (table["context"] == row["context"])].sample(
                    frac=1, random_state=seed
                )
                for table in (made.samples, made.outcomes)
            )
            found = metrics.METRICS[row["metric"]].from_rows(samples, outcomes)
            assert [row["value"], row["low"], row["high"], row["n"]] == pytest.approx(list(found))


def test_a_meaning_is_that_of_the_context() -> None:
    realised = metrics.METRICS["realised"]
    assert realised.meaning_in(JOINT) != realised.meaning_in(SOLO)
    assert metrics.METRICS["clean"].meaning_in(JOINT) == metrics.METRICS["clean"].meaning_in(SOLO)


def _record(correct: Mask, final: Mask, ever: Mask, committed: Mask) -> TargetRecord:
    """What was recorded in ``joint``, as far as numbers look at it."""
    runs, n = final.shape
    index, none = np.arange(n), np.zeros(n, dtype=np.float32)
    return TargetRecord(
        "defense", "joint", index, index, index, index, np.where(correct, index, -1), none, committed,
        pd.DataFrame(
            {
                "run": [f"run {r}" for r in range(runs)], "surrogate": "ste", "attack": "apgd", "loss": "ce",
                "restart": range(runs), "forwards": 0, "backwards": 0, "decisions": 0, "seconds": 0.0, "notes": None,
            }
        ),
        surrogate_fooled=final, final_broken=final, any_broken=ever, first_iterate=np.tile(index, (runs, 1)),
        min_margin=np.tile(none, (runs, 1)), perturbation=np.tile(none, (runs, 1)),
    )  # fmt: skip
