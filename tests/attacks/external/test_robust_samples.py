"""No peer breaks a sample that we call robust, on the same batches: in 40 steps, or in three times our queries."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted
from pyautoattack.square import SquareAttack
from torch import Tensor, nn

from msa_eval import HPM, Results, Samples

EPS, STEPS, QUERIES = 0.15, 40, 300


def _apgd(model: nn.Module, x: Tensor, y: Tensor, loss: str) -> Tensor:
    attack = APGDAttack(model, n_iter=STEPS, norm="Linf", eps=EPS, loss=loss, device="cpu")
    attack.init_hyperparam(x)
    found: Tensor = attack.attack_single_run(x, y)[0]
    return found


def _apgd_targeted(model: nn.Module, x: Tensor, y: Tensor, rank: int) -> Tensor:
    attack = APGDAttack_targeted(model, n_iter=STEPS, norm="Linf", eps=EPS, device="cpu")
    attack.init_hyperparam(x)
    with torch.no_grad():
        attack.y_target = model(x).sort(dim=1)[1][:, -rank]
    found: Tensor = attack.attack_single_run(x, y)[0]
    return found


def _square(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    attack = SquareAttack(model, norm="Linf", eps=EPS, n_queries=QUERIES, seed=0, device="cpu", loss="margin")
    attack.init_hyperparam(x)
    with torch.no_grad():
        found: Tensor = attack.attack_single_run(x, y)[1]
    return found


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:there are .* points with zero gradient")
def test_no_peer_breaks_what_we_call_robust(digits_hpm: HPM, digits: Samples, demo: Any) -> None:
    """pyautoattack through the defence's own logits and through the FC head, judged in the demo's batches."""
    results = Results.load(demo.out)
    peers = {
        "apgd-ce": lambda *case: _apgd(*case, loss="ce"),
        "apgd-dlr": lambda *case: _apgd(*case, loss="dlr"),
        "apgd-t": lambda *case: _apgd_targeted(*case, rank=2),
        "square": _square,
    }
    found = []
    for target, model in (("defense", digits_hpm), ("fc", digits_hpm.fc_target)):
        robust = results.samples[results.samples["target"] == target].set_index("index")["robust"]
        assert robust.sum() > (0 if target == "defense" else 30)
        for _, seats in results.batches.groupby("batch"):
            index = seats["index"].tolist()
            x, y = digits.x[index], digits.y[index]
            for name, peer in peers.items():
                with torch.random.fork_rng():
                    torch.manual_seed(0)
                    points = peer(model, x, y)
                with torch.no_grad():
                    wrong = model((x + (points - x).clamp(-EPS, EPS)).clamp(0, 1)).argmax(dim=1) != y
                found += [
                    (target, name, i) for i, broken in zip(index, wrong.tolist(), strict=True) if broken and robust[i]
                ]
    assert found == []
