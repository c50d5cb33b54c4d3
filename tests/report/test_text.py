"""What people look at shows what the tables hold."""

from __future__ import annotations

import pytest
from toys import make_classifier, make_hpm, make_samples

from msa_eval import Results, evaluate
from msa_eval.protocols import load_protocol
from msa_eval.report import render_sample, render_table
from msa_eval.report.statements import statements


@pytest.fixture(scope="module")
def results() -> Results:
    overrides = {
        "attack.square.queries": 5, "attack.apgd.steps": 2, "threat.contexts": ["joint", "solo"], "audit.samples": 20
    }  # fmt: skip
    return evaluate(
        make_hpm(), make_samples(make_classifier(), 20), protocol=load_protocol("quick", overrides=overrides)
    )


def test_the_table_shows_every_run_and_number_of_every_context(results: Results) -> None:
    text = render_table(results, all_runs=True)
    joint, solo = text.split("solo: final")
    for part, context in ((joint, "joint"), (solo, "solo")):
        lines = {line.split("  ")[0]: line for line in part.splitlines() if line.strip()}
        attacks = results.attacks[results.attacks["context"] == context].set_index(["target", "run"])
        for (target, run), row in attacks.iterrows():
            shown = f"{100 * row['final']:.1f} ({100 * row['any']:.1f})"
            assert shown in lines[run], (target, run)
            assert f" {row['forwards'] / 20:.1f} " in f"{lines[run]} ", (target, run)
            assert f" {row['seconds']:.1f} " in f"{lines[run]} ", (target, run)
        for row in results.summary[results.summary["context"] == context].to_dict(orient="records"):
            assert f"{100 * row['value']:.1f} [{100 * row['low']:.1f}, {100 * row['high']:.1f}]" in lines[row["metric"]]
        for _, made in results.attacks[results.attacks["context"] == context].groupby("target"):
            assert f" {made['forwards'].sum() / 20:.1f} " in lines["all runs"] + " "
            assert f" {made['seconds'].sum():.1f} " in lines["all runs"] + " "
    assert "(modified: attack.square.queries=5, attack.apgd.steps=2" in text


def test_runs_that_broke_nothing_new_share_a_line_with_what_they_cost(results: Results) -> None:
    joint = render_table(results).split("solo: final")[0]
    attacks = results.attacks[results.attacks["context"] == "joint"]
    new = attacks.groupby("run", sort=False)["newly_broken"].sum()
    assert {run for run in new.index if f"\n{run} " in joint} == set(new.index[new > 0])
    (line,) = (line for line in joint.splitlines() if "runs that broke nothing new" in line)
    assert line.startswith(f"{(new == 0).sum()} runs")
    for target, rows in attacks[attacks["run"].isin(new.index[new == 0])].groupby("target"):
        assert f" {rows['forwards'].sum() / 20:.1f} " in f"{line} ", target


def test_what_is_to_be_quoted_stands_last_and_says_what_the_tables_do(results: Results) -> None:
    text = render_table(results)
    assert max(map(len, text.splitlines())) <= 100
    marked = [line for line in text.splitlines() if line.startswith("> ")]
    assert text.endswith("\n".join(marked))
    said = " ".join(line.removeprefix("> ") for line in marked)
    assert said == " ".join(statements(results))
    assert len(statements(results)) == 4
    for row in results.summary[results.summary["metric"] == "worst_case"].to_dict(orient="records"):
        assert f"{100 * row['value']:.1f} % [{100 * row['low']:.1f}, {100 * row['high']:.1f}]" in said
    assert f"The verdict is {results.run['verdicts']['defense']['verdict']}:" in said
    for row in results.audit[results.audit["target"] == "defense"].to_dict(orient="records"):
        assert (row["sign"] in said) == (row["fired"] and row["severity"] != "note")


def test_without_an_fc_head_nothing_is_compared_and_without_an_audit_nothing_is_believed() -> None:
    overrides = {"attack.square.queries": 5, "attack.apgd.steps": 2, "audit.samples": 0}
    alone = evaluate(
        make_hpm(), make_samples(make_classifier(), 20), protocol=load_protocol("quick", overrides=overrides), fc=False
    )
    said = statements(alone)
    assert len(said) == 3
    assert not any("FC" in sentence for sentence in said)
    assert said[-1].startswith("The verdict is not audited: nothing says")


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
