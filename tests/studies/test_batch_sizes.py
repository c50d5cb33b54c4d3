"""Batch-size dependence: fires on a defence that depends on its batch, and not on one that doesn't."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from toys import make_classifier, make_hpm, make_samples

from msa_eval import Samples, verify
from msa_eval.protocols import make_protocol
from msa_eval.report import render_sizes
from msa_eval.studies.batch_sizes import batch_size_report


def _protocol() -> Any:
    content = {
        "schema": 1, "audit.samples": 0, "name": "sizes", "version": 1, "description": "A test.",
        "threat": {"norm": "Linf", "eps": 0.05},
        "attack": {"apgd": {"surrogates": ["fc-oracle", "ste"], "losses": ["margin"], "steps": 5}},
    }  # fmt: skip
    return make_protocol(content, overrides={"samples.limit": 30})


def test_a_batch_dependent_defence_is_seen_and_a_static_one_is_the_same_at_every_size(tmp_path: Path) -> None:
    hpm, classifier = make_hpm(), make_classifier()
    samples = make_samples(classifier, 40)
    seen = {
        name: batch_size_report(model, samples, protocol=_protocol(), sizes=(1, 8, 30), out=tmp_path / name)
        for name, model in {"hpm": hpm, "fc": classifier}.items()
    }
    for name, report in seen.items():
        assert report.table["batch_size"].unique().tolist() == [1, 8, 30]
        assert (report.table["n"] == 30).all()
        assert report.table["target"].unique().tolist() == ["defense"]
        written = pd.read_csv(tmp_path / name / "batch_sizes.csv")
        pd.testing.assert_frame_equal(written, report.table)
        assert sorted(path.name for path in (tmp_path / name).iterdir())[0] == "batch-1"
        assert report.results[8].run["protocol"]["overrides"] == {"samples.limit": 30, "batches.size": 8}
    clean = {name: report.table.query("metric == 'clean'")["value"] for name, report in seen.items()}
    assert clean["fc"].nunique() == 1
    assert clean["hpm"].nunique() > 1
    text = render_sizes(seen["hpm"].table)
    assert text.splitlines()[-1].split()[0] == "30"


def test_what_is_written_verifies_though_the_defence_has_a_classifier_beside_it(tmp_path: Path) -> None:
    hpm, samples = make_hpm(), make_samples(make_classifier(), 40)
    batch_size_report(hpm, samples, protocol=_protocol(), sizes=(1, 8), out=tmp_path, save_adversarial=True)
    for size in (1, 8):
        found = verify(tmp_path / f"batch-{size}", hpm, samples)
        assert [check for check in found.checks if not check.passed] == []
        assert found.replayed == found.claims > 5
        other = verify(tmp_path / f"batch-{size}", make_hpm(seed=1), samples)
        assert [check.name for check in other.checks if check.passed is False] == ["weights"]


def test_sizes_that_can_not_be_are_refused_before_any_attack() -> None:
    hpm, samples = make_hpm(), make_samples(make_classifier(), 20)
    with pytest.raises(ValueError, match="a batch of 64 needs as many samples, but there are 20"):
        batch_size_report(hpm, samples, protocol=_protocol(), sizes=(64, 256))
    for sizes in ((), (0, 8), (8, 8)):
        with pytest.raises(ValueError, match="different batch sizes of at least 1"):
            batch_size_report(hpm, samples, protocol=_protocol(), sizes=sizes)


def test_sizes_that_fit_are_taken_and_the_others_named() -> None:
    message: list[str] = []
    found = batch_size_report(
        make_hpm(),
        make_samples(make_classifier(), 12),
        protocol=_protocol(),
        sizes=(1, 8, 64, 256),
        notify=message.append,
    )
    assert list(found.results) == [1, 8]
    assert message == ["there are 12 samples, so that batches of 64, 256 are left out"]


def test_batches_of_one_are_the_context_alone() -> None:
    hpm = make_hpm()
    samples: Samples = make_samples(make_classifier(), 30)
    report = batch_size_report(hpm, samples, protocol=_protocol(), sizes=(1,))
    predictions = report.results[1].samples.set_index("index")["clean_prediction"]
    alone = [int(hpm(x.unsqueeze(0)).argmax()) for x in samples.x]
    assert predictions.tolist() == alone
