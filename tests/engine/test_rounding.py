"""Whole evaluations in bfloat16: every verdict they enter is what the target says of these very points in float32."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toys import make_classifier, make_hpm, make_samples

from msa_eval import evaluate
from msa_eval.attacks.batch import AdversarialBatch, Batch
from msa_eval.attacks.losses import margin_loss
from msa_eval.defense.contract import decide
from msa_eval.judging.judge import Judge
from msa_eval.judging.judged_batch import JudgedBatch
from msa_eval.judging.outcomes import RunResult
from msa_eval.protocols import make_protocol

RUNS = ["fc-oracle:margin", "soft-hybrid@0.3:dlr-targeted", "ste:margin", "fc-oracle:ce"]
MOVES = ["fc-oracle:margin", "soft-hybrid@0.3:margin:companions", "ste:margin", "frozen-assignment:dlr:standing"]
OWN = ["soft-hybrid@0.3:margin", "mine:margin:standing", "mine:margin"]


class Answers:
    """What was entered beside what the target says: the largest difference, and how many verdicts were entered."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.entered, self.off = 0, 0.0
        enter, enter_companions, finish = Judge.enter, Judge.enter_companions, JudgedBatch.finish
        lowest: dict[Judge, Tensor] = {}

        def entered(judge: Judge, point: AdversarialBatch, logits: Tensor, **iterate: Any) -> None:
            self._compare(judge.batch, logits, exact := self._exact(judge, judge.state.target, point.x))
            shown = torch.where(self._placed(judge.batch, logits), judge.batch.logits, exact)
            margin = -margin_loss(shown, judge.batch.y)
            lowest[judge] = torch.minimum(lowest[judge], margin) if judge in lowest else margin
            enter(judge, point, logits, **iterate)

        def entered_companions(judge: Judge, point: AdversarialBatch, logits: Tensor, **iterate: Any) -> None:
            view: Any = judge.setting.view
            with torch.no_grad():
                beside = view.beside(judge.state.target.features(judge.state.start.x))
            self._compare(judge.batch, logits, exact := self._exact(judge, beside, point.x))
            lowest[judge] = torch.minimum(lowest[judge], -margin_loss(exact, judge.batch.y))
            enter_companions(judge, point, logits, **iterate)

        def finished(judged: JudgedBatch, x: Tensor) -> RunResult:
            outcome = finish(judged, x)
            if not judged.among_others:  # whose own rows stay, so that their leads are no points' own
                clean = -margin_loss(judged.batch.logits, judged.batch.y)
                self._note(outcome.min_margin - torch.minimum(lowest[judged._judge], clean))
            return outcome

        monkeypatch.setattr(Judge, "enter", entered)
        monkeypatch.setattr(Judge, "enter_companions", entered_companions)
        monkeypatch.setattr(JudgedBatch, "finish", finished)

    @staticmethod
    def _exact(judge: Judge, target: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            return decide(target, judge.state.target.features(x))

    @staticmethod
    def _placed(batch: Batch, logits: Tensor) -> Tensor:
        """The rows that nothing is entered of: they stand as they were on the clean batch."""
        return (logits == batch.logits).all(dim=1, keepdim=True)

    def _compare(self, batch: Batch, logits: Tensor, exact: Tensor) -> None:
        self.entered += 1
        self._note((logits - exact) * ~self._placed(batch, logits))

    def _note(self, difference: Tensor) -> None:
        self.off = max(self.off, float(difference.abs().max()))


def _evaluated(model: nn.Module, contexts: list[str], apgd: Mapping[str, Any], own: Any = None) -> Any:
    attack = {"apgd": {"combine": "cascade", "steps": 5, **apgd}, "square": {"queries": 10}}
    small = {"threat": {"norm": "Linf", "eps": 0.03, "contexts": contexts}, "batches": {"size": 8}}
    about = {"schema": 1, "name": "small", "version": 1, "description": "A test.", "audit": {"samples": 0}}
    protocol = make_protocol({**about, **small, "attack": attack})
    samples = make_samples(model, 24)  # type: ignore[arg-type]
    return evaluate(model, samples, protocol=protocol, surrogates=own, fc=False, precision="bf16")


@pytest.mark.parametrize(
    ("kind", "contexts", "apgd", "own"),
    [
        ("static", ["joint"], {"runs": RUNS, "overtime": 60}, False),
        ("static", ["joint"], {"runs": RUNS, "passes": 10}, False),  # used up: the last runs search for none
        ("hpm", ["joint"], {"runs": MOVES}, False),
        ("hpm", ["joint"], {"runs": OWN}, True),
        ("hpm", ["solo", "alone"], {"runs": RUNS, "overtime": 60}, False),
        ("hpm", ["composed"], {"runs": RUNS}, False),
        ("hpm", ["joint"], {"combine": "mean", "surrogates": ["fc-oracle", "ste"], "losses": ["margin"]}, False),
    ],
)
def test_every_verdict_is_the_targets_own(
    kind: str, contexts: list[str], apgd: Mapping[str, Any], own: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_hpm() if kind == "hpm" else make_classifier()
    answers = Answers(monkeypatch)
    other = nn.Sequential(nn.Flatten(), nn.Linear(12, 4))
    nn.init.normal_(other.get_parameter("1.weight"), generator=torch.Generator().manual_seed(0))
    results = _evaluated(model, contexts, apgd, {"mine": other.eval()} if own else None)
    assert not results.run.get("failures")
    assert answers.entered > 5
    assert answers.off < 1e-4


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
@pytest.mark.parametrize("dependent", [False, True])
def test_a_search_gives_features_in_the_targets_own_type(dtype: torch.dtype, dependent: bool) -> None:
    class Typed(nn.Module):
        batch_dependent = dependent

        def __init__(self) -> None:
            super().__init__()
            self.whole = make_classifier()

        def features(self, x: Tensor) -> Tensor:
            return self.whole.features(x).to(dtype)

        def logits(self, z: Tensor) -> Tensor:
            return self.whole.logits(z.float())

        def forward(self, x: Tensor) -> Tensor:
            return self.logits(self.features(x))

    results = _evaluated(Typed().eval(), ["joint"], {"surrogates": ["ste"], "losses": ["margin"]})
    assert not results.run.get("failures")
    assert set(results.attacks["forwards"] > 0) == {True}
