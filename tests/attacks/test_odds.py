"""More passes where a randomized target is wrong about half of the time, against a target whose odds are known."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from msa_eval import as_defense
from msa_eval.attacks import Ball
from msa_eval.attacks.batch import AdversarialBatch, Batch
from msa_eval.attacks.borderline import NEAR, OddsAttack, wrong_share
from msa_eval.judging.judged_batch import JudgedBatch
from msa_eval.judging.search_state import Setting
from msa_eval.surrogates import get

PIXELS, EPS, SIGMA = 24, 0.1, 1.0


class NoisyGradient:
    """Wrong where the pixels' sum and a normal draw are above 0; the gradient has a normal draw of its own on top."""

    batch_dependent = False

    def features(self, x: Tensor) -> Tensor:
        return x.flatten(1)

    def logits(self, z: Tensor) -> Tensor:
        wrong = (z - 0.5).sum(dim=1) + SIGMA * torch.randn(len(z))
        wrong = wrong + (4 * torch.randn_like(z) * (z - z.detach())).sum(dim=1)
        return torch.stack([-wrong, torch.zeros_like(wrong)], dim=1)


def _attacked(best: Tensor, start: Tensor) -> JudgedBatch:
    """Of samples of given odds at the ball's best corner and where earlier runs have come to, both in deviations."""
    own: Any = as_defense(NoisyGradient())
    x = (0.5 - EPS + best / PIXELS).view(-1, 1, 1, 1).expand(-1, 1, 4, 6).contiguous()
    reached = (0.5 + start / PIXELS).view(-1, 1, 1, 1).expand_as(x).contiguous()
    y = torch.zeros(len(x), dtype=torch.long)
    z = own.features(x)
    batch = Batch(0, x, y, z, torch.tensor([[1.0, 0.0]]).repeat(len(x), 1))
    setting = Setting(
        start=AdversarialBatch(reached, own.features(reached)), counted=batch.correct, draws=9, eot=4, early_stop=True
    )
    return JudgedBatch(own, get("ste"), batch, Ball("Linf", EPS), mixes_rows=False, setting=setting)


def test_the_share_of_wrong_answers_is_estimated() -> None:
    deviations = torch.tensor([-2.0, -0.5, 0.0, 0.5])
    torch.manual_seed(0)
    share = wrong_share(_attacked(deviations, deviations))
    expected = torch.distributions.Normal(0.0, 1.0).cdf(deviations)
    assert share.tolist() == pytest.approx(expected.tolist(), abs=4 * (0.25 / 99) ** 0.5)


def test_those_near_even_odds_are_broken_where_that_is_possible_and_the_rest_is_left() -> None:
    """At best the odds are 84 %, 84 % and 31 %; the second starts from odds of 7 %, so nothing is spent on it."""
    torch.manual_seed(0)
    attacked = _attacked(torch.tensor([1.0, 1.0, -0.5]), torch.tensor([-0.25, -1.5, -0.5]))
    seen: list[list[bool]] = []
    search_for = attacked.search_for
    attacked.search_for = lambda rows: (seen.append(rows.tolist()), search_for(rows))[1]  # type: ignore[method-assign]
    points = OddsAttack(steps=20)(attacked, torch.Generator().manual_seed(0))
    outcome = attacked.finish(points)
    assert outcome.any_broken.tolist() == [True, False, False]
    assert seen[0][0]
    assert not any(rows[1] for rows in seen)
    assert torch.distributions.Normal(0.0, 1.0).cdf(torch.tensor(-1.5)) < NEAR


def test_it_breaks_what_a_gradient_of_few_draws_does_not() -> None:
    """The same steps along a gradient that is averaged over 4 draws come less near the corner, and break fewer."""
    best, start = torch.full((24,), 0.7), torch.full((24,), -0.4)
    broken = []
    for draws in (4, 16):
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr("msa_eval.attacks.borderline.EOT", draws)
            torch.manual_seed(0)
            attacked = _attacked(best, start)
            outcome = attacked.finish(OddsAttack(steps=6)(attacked, torch.Generator().manual_seed(0)))
            broken.append(int(outcome.any_broken.sum()))
    assert broken[1] > broken[0]
