"""The verdict of an evaluation, end to end: in the tables, in run.json, in the text, and in the exit status."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor, nn
from toys import make_classifier, make_hpm, make_samples

from msa_eval import HPM, Classifier, Results, evaluate, verify
from msa_eval.auditing.rules import unconfirmed_breaks
from msa_eval.evidence import archive
from msa_eval.protocols import make_protocol
from msa_eval.report import render_table


def _protocol(**overrides: Any) -> Any:
    content = {
        "schema": 1, "name": "judged", "version": 1, "description": "A test.", "audit.samples": 16,
        "threat": {"norm": "Linf", "eps": 0.05}, "batches": {"size": 8},
        "attack": {"apgd": {"runs": ["ste:margin", "ste:margin"], "combine": "cascade", "steps": 10},
                   "square": {"queries": 10}},
    }  # fmt: skip
    return make_protocol(content, overrides=overrides)


class Learning(HPM):
    """Its prototypes go on moving while it is evaluated."""

    def logits(self, z: Tensor, *arguments: Any, **settings: Any) -> Tensor:
        with torch.no_grad():
            self.prototypes.mul_(0.999).add_(0.001 * z.detach().mean())
        return super().logits(z, *arguments, **settings)


class Blurred(nn.Module):
    """A classifier behind random noise."""

    def __init__(self, inner: nn.Module, sigma: float) -> None:
        super().__init__()
        self.inner, self.sigma = inner, sigma
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x + self.sigma * torch.randn_like(x))
        return out


class Rounded(Classifier):
    """Features on a coarse grid: the gradient is zero nearly everywhere, and what there is comes from elsewhere."""

    def features(self, x: Tensor) -> Tensor:
        z = super().features(x)
        return (z * 4).round() / 4 + 0 * z


def test_a_sound_classifier_is_called_sound_everywhere(tmp_path: Path) -> None:
    classifier = make_classifier()
    results = evaluate(classifier, make_samples(classifier, 32), protocol=_protocol(), out=tmp_path / "r")
    assert results.run["verdict"] == "sound"
    summary = pd.read_csv(tmp_path / "r" / "summary.csv", keep_default_na=False)
    assert set(summary["verdict"]) == {"sound"}
    assert set(summary["reasons"]) == {""}
    run = json.loads((tmp_path / "r" / "run.json").read_text())
    assert run["verdicts"]["defense"] == {"verdict": "sound", "reasons": []}
    assert "verdict on defense: sound" in render_table(results)
    pd.testing.assert_frame_equal(Results.load(tmp_path / "r").audit, results.audit, check_dtype=False)


def test_a_defence_that_changes_itself_is_caught_and_what_changed_is_named() -> None:
    plain = make_hpm()
    learning = Learning(plain.trunk, plain.fc).eval()
    learning.prototypes.copy_(plain.prototypes)
    results = evaluate(learning, make_samples(plain, 16), protocol=_protocol(), fc=False)
    assert results.run["verdict"] == "unreliable"
    signs = results.audit.set_index("sign")
    assert bool(signs.loc["state_guard", "fired"])
    assert "buffer prototypes" in signs.loc["state_guard", "reason"]
    assert "buffer prototypes" in results.summary["reasons"].iloc[0]
    assert "verdict on defense: unreliable" in render_table(results)

    still = evaluate(plain, make_samples(plain, 16), protocol=_protocol(), fc=False)
    assert not bool(still.audit.set_index("sign").loc["state_guard", "fired"])


def test_masked_gradients_are_no_robustness() -> None:
    plain = make_classifier()
    rounded = Rounded(plain.trunk, plain.fc).eval()
    samples = make_samples(plain, 32)
    protocol = _protocol(**{"threat.eps": 0.1})
    results = evaluate(rounded, samples, protocol=protocol, found_surrogates=False)
    assert results.run["verdict"] == "unreliable"
    assert bool(results.audit.set_index("sign").loc["zero_gradients", "fired"])
    found = evaluate(rounded, samples, protocol=protocol)
    assert not bool(found.audit.set_index("sign").loc["zero_gradients", "fired"])
    robust = [float(one.summary.set_index("metric").loc["worst_case", "value"]) for one in (found, results)]
    assert robust[0] < robust[1]


def test_a_stochastic_defence_is_asked_nine_times_and_the_evidence_can_be_made_again(tmp_path: Path) -> None:
    plain = make_classifier()
    samples = make_samples(plain, 16)
    torch.manual_seed(0)
    found = [
        evaluate(Blurred(plain, 0.05), samples, protocol=_protocol(), save_adversarial=True, out=tmp_path / name)
        for name in ("a", "b")
    ]
    assert found[0].run["draws"] == {"defense": 9}
    pd.testing.assert_frame_equal(found[0].outcomes, found[1].outcomes)
    assert bool(found[0].audit.set_index("sign").loc["randomness", "fired"])
    checked = verify(tmp_path / "a", Blurred(plain, 0.05), samples)
    assert checked.claims > 0
    assert checked.replayed == checked.claims, [check for check in checked.checks if not check.passed]

    steady = evaluate(Blurred(plain, 0.0), samples, protocol=_protocol())
    assert steady.run["draws"] == {"defense": 1}
    assert not bool(steady.audit.set_index("sign").loc["randomness", "fired"])


def test_draws_and_expectation_can_be_set() -> None:
    plain = make_classifier()
    protocol = _protocol(**{"stochastic.draws": 3, "stochastic.eot": 2, "audit.samples": 0})
    results = evaluate(Blurred(plain, 0.05), make_samples(plain, 8), protocol=protocol)
    assert results.run["draws"] == {"defense": 3}
    row = results.attacks.iloc[0]
    assert row["forwards"] == 8 * (2 * 11 + 1)
    assert results.run["verdict"] == "not audited"
    with pytest.raises(ValueError, match="an odd number"):
        _protocol(**{"stochastic.draws": 4})


class Tired(Classifier):
    """Once it is tired it answers for the nearest clean image: what broke it does so no more."""

    batch_dependent, tired = False, False
    clean: Tensor

    def logits(self, z: Tensor) -> Tensor:
        return super().logits(self.clean[torch.cdist(z, self.clean).argmin(dim=1)] if self.tired else z)


@pytest.mark.parametrize("tires", [True, False])
def test_breaks_that_can_not_be_confirmed_are_a_reason_against_sound(
    tires: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = make_classifier()
    model = Tired(plain.trunk, plain.fc).eval()
    samples = make_samples(plain, 16)
    with torch.no_grad():
        model.clean = plain.features(samples.x)
    kept = archive.write

    def write(*arguments: Any, **options: Any) -> Any:
        model.tired = tires
        return kept(*arguments, **options)

    monkeypatch.setattr("msa_eval.evidence.archive.write", write)
    results = evaluate(model, samples, protocol=_protocol(), out=tmp_path / "r", save_adversarial=True)
    broken = int((results.samples["clean_correct"] & ~results.samples["robust"]).sum())
    assert broken > 2
    assert len(results.run["adversarial"]["unconfirmed"]) == (broken if tires else 0)
    row = results.audit.set_index("sign").loc["unconfirmed_breaks"]
    assert bool(row["fired"]) is tires
    assert row["value"] == tires
    assert (results.run["verdict"] == "sound") is not tires
    assert results.run["verdicts"]["defense"]["verdict"] == results.summary["verdict"][0] == results.run["verdict"]
    assert ("could not be broken again" in results.summary["reasons"][0]) is tires
    assert verify(tmp_path / "r", model, samples).passed is not tires
    assert Results.load(tmp_path / "r").run["verdict"] == results.run["verdict"]


def test_unconfirmed_breaks_by_the_counts() -> None:
    assert not unconfirmed_breaks(0, 40).fired
    assert unconfirmed_breaks(0, 40, left_out=3).severity == "suspect"
    assert [unconfirmed_breaks(n, 40).severity for n in (1, 2, 3)] == ["suspect", "suspect", "unreliable"]


def test_the_table_says_that_no_transfer_was_tried() -> None:
    protocol = _protocol(**{"audit.samples": 8, "samples.limit": 8})
    quick: Any = {"protocol": "quick", "overrides": {"audit.samples": 8, "samples.limit": 8, "threat.eps": 0.05}}
    plain, hpm = make_classifier(), make_hpm()
    assert "No transfer was tried" in render_table(evaluate(plain, make_samples(plain), protocol=protocol))
    assert "No transfer" not in render_table(evaluate(hpm, make_samples(hpm), fc=False, **quick))
