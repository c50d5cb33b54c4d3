"""What people look at shows what the tables hold."""

from __future__ import annotations

import pytest
from toys import make_classifier, make_hpm, make_samples

from msa_eval import Results, evaluate
from msa_eval.protocols import load_protocol
from msa_eval.report import render_sample, render_table


@pytest.fixture(scope="module")
def results() -> Results:
    overrides = {
        "attack.square.queries": 5, "attack.apgd.steps": 2, "threat.contexts": ["joint", "solo"], "audit.samples": 20
    }  # fmt: skip
    return evaluate(
        make_hpm(), make_samples(make_classifier(), 20), protocol=load_protocol("quick", overrides=overrides)
    )


def test_the_table_shows_every_run_and_number_of_every_context(results: Results) -> None:
    text = render_table(results)
    joint, solo = text.split("solo: accuracy")
    for part, context in ((joint, "joint"), (solo, "solo")):
        lines = {line.split()[0]: line for line in part.splitlines() if line.strip()}
        attacks = results.attacks[results.attacks["context"] == context].set_index(["target", "run"])
        for (target, run), row in attacks.iterrows():
            shown = f"{100 * row['final']:.1f} ({100 * row['any']:.1f})"
            assert shown in lines[run], (target, run)
            assert f" {row['forwards'] / 20:.1f} " in f"{lines[run]} ", (target, run)
            assert f" {row['seconds']:.1f} " in f"{lines[run]} ", (target, run)
        for row in results.summary[results.summary["context"] == context].to_dict(orient="records"):
            assert f"{100 * row['value']:.1f} [{100 * row['low']:.1f}, {100 * row['high']:.1f}]" in lines[row["metric"]]
        for _, made in results.attacks[results.attacks["context"] == context].groupby("target"):
            assert f" {made['forwards'].sum() / 20:.1f} " in lines["worst_case"] + " "
            assert f" {made['seconds'].sum():.1f} " in lines["worst_case"] + " "
    assert "(modified: attack.square.queries=5, attack.apgd.steps=2" in text


def test_the_verdict_and_the_alarm_stand_below_the_tables(results: Results) -> None:
    text = render_table(results)
    assert f"verdict on defense: {results.run['verdicts']['defense']['verdict']}" in text
    assert f"verdict on fc: {results.run['verdicts']['fc']['verdict']}" in text
    for row in results.audit.to_dict(orient="records"):
        assert (f"[{row['sign']}]" in text) >= row["fired"]
    square = results.attacks[(results.attacks["attack"] == "square") & (results.attacks["context"] == "joint")]
    added = square.set_index("target")["newly_broken"]
    assert f"broken by gradient-free attacks alone: {added['fc']} (fc), {added['defense']} (defense)" in text


def test_one_sample_is_told_in_words(results: Results) -> None:
    rows = results.samples[results.samples["context"] == "solo"].to_dict(orient="records")
    for row in rows:
        line = next(
            line for line in render_sample(results, row["index"]).splitlines() if f"{row['target']}, solo" in line
        )
        assert ("not broken" in line) == bool(row["robust"])
        assert ("wrong on the clean batch" in line) == (not row["clean_correct"])
