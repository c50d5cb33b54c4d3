"""An evaluation attacks through surrogates that it finds in a masked target, and leaves a plain one as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor, nn

from msa_eval import Results, Samples, evaluate, verify

OVERRIDES = {
    "threat.eps": 0.06, "batches.size": 16, "attack.apgd.steps": 8, "attack.square.queries": 5, "audit.samples": 16,
}  # fmt: skip


class Net(nn.Module):
    """A small net; how it takes its images is for subclasses."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(144, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)  # type: ignore[no-any-return]


class Blocked(Net):
    """Nine tenths of the image are looked at without a gradient."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            most = 0.9 * x
        return self.net(most + 0.1 * x.flip(-1).flip(-1).detach() + 0 * x)  # type: ignore[no-any-return]


class Alone(Net):
    """Nothing of it is differentiable, and no submodule is asked."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.net[3].weight[:, :36]
        rows = [[float(value) for value in row] for row in x.flatten(1).tolist()]
        return torch.tensor(rows) @ weight.detach().T


def samples(model: nn.Module, count: int = 32) -> Samples:
    x = 0.2 + 0.6 * torch.rand(count, 1, 6, 6, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return Samples(x, model(x).argmax(1), "random")


def run(model: nn.Module, **settings: Any) -> Results:
    overrides = OVERRIDES | settings.pop("overrides", {})
    options = {"protocol": "quick", "precision": "fp32"} | settings
    return evaluate(model, samples(model), overrides=overrides, **options)


def value(results: Results) -> float:
    summary = results.summary
    return float(summary[summary["metric"] == "worst_case"]["value"].iloc[0])


def gradient_truth(results: Results) -> pd.Series[Any]:
    audit = results.audit
    assert audit is not None
    return audit[audit["sign"] == "gradient_truth"].iloc[0]


def test_what_is_found_breaks_more_and_is_written_down(tmp_path: Path) -> None:
    model = Blocked().eval()
    without = run(model, found_surrogates=False)
    found = run(model, out=tmp_path / "out", save_adversarial=True)
    assert value(found) < value(without) - 0.2
    assert "straight-through" in set(found.attacks["surrogate"])
    about = found.run["found_surrogates"]["defense"]["straight-through"]
    assert about["kept"]
    assert about["truth"] > 0.95
    assert "no_grad" in about["how"]
    assert gradient_truth(found)["severity"] == "suspect"
    assert "upper bound" in gradient_truth(found)["reason"]
    assert found.run["verdict"] == "suspect"
    assert gradient_truth(without)["fired"]
    assert without.run["verdict"] == "unreliable"
    assert "found_surrogates" not in without.run
    assert verify(tmp_path / "out", model, samples(model)).passed


def test_a_plain_model_s_evidence_is_what_it_would_be_without() -> None:
    model = Net().eval()
    found, without = run(model), run(model, found_surrogates=False)
    for name in ("summary", "samples", "outcomes", "batches", "audit"):
        pd.testing.assert_frame_equal(getattr(found, name), getattr(without, name))
    assert found.run["key"] == without.run["key"]
    assert "found_surrogates" not in found.run
    assert gradient_truth(found)["value"] > 0.97


def test_in_a_cascade_what_is_found_takes_turns() -> None:
    model = Blocked().eval()
    budget = {
        "attack.apgd.overtime": 0,
        "attack.apgd.passes": 30,
        "attack.spsa.queries": 3,
        "threat.contexts": ["joint"],
    }
    found = run(model, protocol="msa", overrides=budget)
    white = found.attacks[found.attacks["attack"] == "apgd"]["surrogate"].tolist()
    assert white.count("straight-through") >= 2
    assert white[0] == "straight-through"


def test_where_no_gradient_can_be_followed_queries_get_the_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Alone().eval()
    results = run(model)
    assert set(results.attacks["surrogate"]) == {"smoothed", "target"}
    monkeypatch.setattr("msa_eval.auditing.surrogate_search._Search._choose", lambda *_: ([], 0.0))
    blind = run(model)
    assert set(blind.attacks["attack"]) == {"square", "spsa"}
    asked = int(blind.attacks["forwards"].sum()) / 32
    assert asked > OVERRIDES["attack.apgd.steps"]
    assert blind.run["verdict"] == "unreliable"
    assert gradient_truth(blind)["value"] == 0
