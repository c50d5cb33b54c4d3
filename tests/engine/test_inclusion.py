"""What is broken in a narrower context is broken in the wider ones, with proofs that say so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from toys import make_classifier, make_hpm, make_samples

from msa_eval import HPM, Results, Samples, evaluate, verify
from msa_eval.evidence.archive import Archive
from msa_eval.judging.batch_plan import plan_batches
from msa_eval.protocols import load_protocol

# Few queries on whole batches: what is found in joint differs from what is found in solo.
SMALL: dict[str, Any] = {
    "attack.square.queries": 15, "attack.spsa.queries": 9, "threat.eps": 0.08, "batches.size": 8, "audit.samples": 8,
    "threat.contexts": ["joint", "solo", "alone", "composed"], "attack.composition.trials": 4,
}  # fmt: skip
CARRIED = "target:from-solo:0"


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory) -> tuple[Results, HPM, Samples]:
    folder = tmp_path_factory.mktemp("results")
    hpm, samples = make_hpm(), make_samples(make_classifier(), 40)
    results = evaluate(
        hpm, samples, protocol="black-box", overrides=SMALL, fc=False, out=folder, save_adversarial="all"
    )
    return results, hpm, samples


def _robust(results: Results, context: str) -> Any:
    return results.samples[results.samples["context"] == context].set_index("index")["robust"]


def _carried(results: Results, context: str) -> Any:
    rows = results.outcomes[(results.outcomes["context"] == context) & (results.outcomes["run"] == CARRIED)]
    return rows.set_index("index")["any_broken"]


@pytest.mark.parametrize("context", ["joint", "composed"])
def test_no_sample_is_robust_in_a_context_that_was_broken_in_a_narrower_one(
    context: str, held: tuple[Results, HPM, Samples]
) -> None:
    results, _, _ = held
    own = results.outcomes.query(f"context == '{context}' and run != '{CARRIED}'").groupby("index")["any_broken"].any()
    missed = ~own & results.samples.query("context == 'solo'").set_index("index")["clean_correct"]
    missed &= ~_robust(results, "solo")
    assert missed.any(), "the case shows nothing"
    assert not (_robust(results, context) & ~_robust(results, "solo")).any()
    assert _carried(results, context).equals(missed.rename("any_broken"))
    row = results.attacks.query(f"context == '{context}' and run == '{CARRIED}'").iloc[0]
    assert row["newly_broken"] == missed.sum()
    assert row[["forwards", "backwards", "decisions"]].sum() == 0
    assert row["final"] == row["surrogate_accuracy"]  # the paper's number is of the runs that were made


def test_nothing_is_carried_to_a_context_that_is_no_wider(held: tuple[Results, HPM, Samples]) -> None:
    runs = held[0].attacks.groupby("context")["run"].agg(set)
    assert CARRIED not in runs["solo"] | runs["alone"]


def test_what_was_carried_over_verifies(held: tuple[Results, HPM, Samples]) -> None:
    results, hpm, samples = held
    assert results.folder is not None
    found = verify(results.folder, hpm, samples, fc=False)
    assert found.passed, [check for check in found.checks if not check.passed]
    assert found.claims == found.replayed == int((~results.samples["robust"] & results.samples["clean_correct"]).sum())


def test_a_composed_proof_names_the_batch_it_came_from(held: tuple[Results, HPM, Samples]) -> None:
    results, _, samples = held
    assert results.folder is not None
    plan = plan_batches(40, size=8, seed=0)
    ball = load_protocol("black-box", overrides=SMALL).ball
    archive = Archive(results.folder / "adversarial.safetensors", lambda number: samples.x[plan[number]], ball)
    carried = _carried(results, "composed")
    seen = []
    for proof in archive:
        for row, at in enumerate(proof.positions.tolist()):
            index = int(plan[proof.batch][at])
            if proof.context == "composed" and carried[index]:
                assert proof.companions is not None
                assert proof.companions[row].tolist() == [i for i in plan[proof.batch].tolist() if i != index]
                seen.append(index)
    assert sorted(seen) == carried[carried].index.tolist()


@pytest.mark.parametrize("context", ["joint", "composed"])
def test_every_sample_has_one_best_point(context: str, held: tuple[Results, HPM, Samples]) -> None:
    results, _, samples = held
    points = results.adversarial(context=context)
    assert points.manifest["index"].tolist() == list(range(len(samples)))
    broken = results.samples.query(f"context == '{context}'")["robust"].to_numpy()
    assert (points.manifest["broken"].to_numpy() == ~broken).all()
    assert torch.equal(points.y, samples.y)


def test_an_evaluation_whose_wider_search_is_weaker_says_so(held: tuple[Results, HPM, Samples]) -> None:
    signs = held[0].audit.set_index("sign").loc["weaker_than_narrower"]
    share = max(_carried(held[0], context).mean() for context in ("joint", "composed"))
    assert signs["fired"]
    assert signs["value"] == pytest.approx(share)
    assert any("narrower context" in reason for reason in held[0].run["verdicts"]["defense"]["reasons"])


def test_where_nothing_is_missed_no_run_is_added(tmp_path: Path) -> None:
    hpm, samples = make_hpm(), make_samples(make_classifier(), 8)
    overrides = SMALL | {"threat.eps": 1e-6, "threat.contexts": ["joint", "solo"]}
    results = evaluate(hpm, samples, protocol="black-box", overrides=overrides, fc=False, out=tmp_path)
    assert CARRIED not in set(results.attacks["run"])
    assert "weaker_than_narrower" not in set(results.audit["sign"])
