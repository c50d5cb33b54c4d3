"""The attack written for the occasion keeps to the attacker's rules, and can break things."""

from __future__ import annotations

from typing import Any

import pandas as pd
import pytest
import torch
from benchmarks.adaptive import STEPS, Adaptive, together
from toys import make_hpm, make_samples

from msa_eval.attacks import Ball

ROWS = pd.DataFrame({"index": [0, 1, 2, 3, 4, 5]})
OWN = torch.tensor([[j for j in range(6) if j != i] for i in range(6)])


def _attack(eps: float, context: str) -> Adaptive:
    hpm: Any = make_hpm().requires_grad_(False)
    pool = torch.arange(4, 20) if context == "composed" else None
    own = OWN[:, :0] if context == "alone" else OWN
    return Adaptive(hpm, make_samples(hpm, 24), Ball("Linf", eps), ROWS, own, pool, seed=0)


@pytest.mark.parametrize("context", ["solo", "alone", "composed"])
def test_points_lie_in_the_ball_and_company_in_the_pool(context: str) -> None:
    attack = _attack(0.1, context)
    points = 0
    for _ in range(4):
        for x, company in attack.attempt():
            points += 1
            assert float(attack.ball.excess(x, attack.x).max()) <= 0
            for i, beside in enumerate(company.tolist()):
                assert i not in beside
                assert len(set(beside)) == len(beside)
                if context == "composed":
                    assert set(beside) <= (set(range(6)) | set(range(4, 20)))
                else:
                    assert beside == attack.own[i].tolist()
    assert points == 4 * (STEPS + 1)


@pytest.mark.parametrize("context", ["solo", "alone", "composed"])
def test_it_breaks_what_can_be_broken_and_nothing_else(context: str) -> None:
    right = {int(i) for i in (_attack(0.1, context).lead(_attack(0.1, context).clean, None) > 0).nonzero().flatten()}
    assert set(_attack(1.0, context).run(2 * (STEPS + 1))) >= right
    assert not set(_attack(1e-6, context).run(2 * (STEPS + 1))) & right or context == "composed"
    assert _attack(1.0, context).run(STEPS) == {}  # no try fits into so few passes


def test_a_whole_batch_is_moved_and_its_survivors_break_or_do_not() -> None:
    hpm: Any = make_hpm().requires_grad_(False)
    samples = make_samples(hpm, 12)
    right = (hpm(samples.x).argmax(dim=1) == samples.y).nonzero().flatten().tolist()

    def broken(eps: float, passes: int) -> dict[int, int]:
        return together(hpm, samples.x, samples.y, right, Ball("Linf", eps), passes, seed=0)

    assert set(broken(1.0, 20 * (STEPS + 1))) == set(right)
    assert broken(1e-6, 2 * (STEPS + 1)) == broken(1.0, STEPS) == {}
