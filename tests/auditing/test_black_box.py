"""A target without any gradient under the protocol for it: a verdict that says what the figure means."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from toys import make_classifier, make_samples

from msa_eval import Results, evaluate
from msa_eval.auditing.audit import audit
from msa_eval.auditing.evidence_signs import gradient_free_only
from msa_eval.auditing.rules import zero_gradients
from msa_eval.protocols import load_protocol


class InNumPy(nn.Module):
    """A linear classifier that no gradient enters."""

    def __init__(self) -> None:
        super().__init__()
        self.net = make_classifier()

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return torch.from_numpy(np.ascontiguousarray(self.net(torch.from_numpy(x.detach().numpy())).numpy()))


SMALL = {"attack.square.queries": 30, "attack.spsa.queries": 17, "threat.eps": 0.2, "threat.contexts": ["joint"]}


def _evaluate(model: nn.Module) -> Results:
    samples = make_samples(make_classifier(), 24)
    return evaluate(model.eval(), samples, protocol="black-box", overrides=SMALL)


def test_a_target_without_a_gradient_is_suspect_and_the_reason_says_what_that_means() -> None:
    results = _evaluate(InNumPy())
    assert results.run["verdict"] == "suspect"
    (reason,) = results.run["verdicts"]["defense"]["reasons"]
    assert reason.startswith("No attack of the protocol follows a gradient: the figure says what about ")
    signs = results.audit.set_index("sign")
    passes = results.attacks["forwards"].sum() / 24
    assert signs.loc["gradient_free_only", "value"] == pytest.approx(passes)
    assert signs.loc["zero_gradients", "fired"]
    assert signs.loc["zero_gradients", "severity"] == "note"
    assert "gradient_free_beats_white_box" not in signs.index
    worst = results.summary.set_index("metric")["value"]
    assert worst["worst_case"] < worst["clean"]


def test_a_target_with_a_gradient_is_no_less_suspect_there() -> None:
    results = _evaluate(make_classifier())
    assert results.run["verdict"] == "suspect"
    assert not results.audit.set_index("sign").loc["zero_gradients", "fired"]


def test_the_audit_alone_never_calls_it_sound() -> None:
    report = audit(InNumPy().eval(), make_samples(make_classifier(), 24), protocol="black-box", overrides=SMALL)
    assert report.verdict.verdict == "suspect"


def test_where_gradients_are_followed_their_absence_is_grave() -> None:
    assert zero_gradients(1.0, {}).severity == "unreliable"
    assert zero_gradients(1.0, {}, followed=False).severity == "note"
    assert gradient_free_only(0).fired
    assert not load_protocol("black-box").follows_gradients
    assert load_protocol("quick").follows_gradients
    with pytest.raises(ValueError, match="or the protocol black-box"):
        evaluate(InNumPy().eval(), make_samples(make_classifier(), 24), protocol="quick", found_surrogates=False)
