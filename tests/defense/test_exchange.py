"""Leads in mixtures of points, against every batch put together and decided as a whole."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from toys import make_hpm

from msa_eval import HPM
from msa_eval.attacks.prototype_mixtures import Mixtures
from msa_eval.hpm.model import Variant

VARIANTS = [
    Variant(), Variant(prototypes="batch"), Variant(mixer="average"), Variant(prototypes="batch", mixer="average"),
    Variant(similarity="inner"), Variant(similarity="cosine"),
]  # fmt: skip


def _case(variant: Variant) -> tuple[HPM, Tensor]:
    """A double-precision HPM with a mixer that is no multiple of the identity, and five points of each of six images.

    Images 1 and 3 are at a few points in a class of their own, which is left empty where they move.
    """
    hpm = make_hpm().double().requires_grad_(False)
    hpm.variant = variant
    generator = torch.Generator().manual_seed(5)
    hpm.mixer.weight += 0.2 * torch.randn(hpm.mixer.weight.shape, generator=generator)
    hpm.mixer.bias += 0.2 * torch.randn(hpm.mixer.bias.shape, generator=generator)
    return hpm, 1.5 * torch.randn(5, 6, 6, generator=generator, dtype=torch.float64)


def _margin(hpm: HPM, points: Tensor, chosen: list[int], row: int, y: int, toward: int) -> float:
    logits = hpm.logits(torch.stack([points[p, j] for j, p in enumerate(chosen)]))[row]
    return float(logits[y] - logits[toward])


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_exchange_is_the_best_by_the_decision_on_whole_batches(variant: Variant) -> None:
    """Image after image, by trying all its points in all batches; some classes are empty without the image."""
    hpm, points = _case(variant)
    exchange = hpm.exchange()
    assert exchange is not None
    rows, y, toward = torch.tensor([0, 2, 2, 5]), torch.tensor([1, 0, 3, 2]), torch.tensor([0, 3, 1, 1])
    generator = torch.Generator().manual_seed(1)
    chosen = torch.randint(5, (4, 6), generator=generator)
    table = exchange.table([exchange.know(z) for z in points])
    mixtures = Mixtures(exchange, table, chosen, rows, y, toward)
    expected, emptied, kept, moved = chosen.tolist(), 0, 0, 0
    for place in [None, 0, 4, 2, 1, 3, None, 2, 0]:
        mixtures.improve(place)
        for n, row in enumerate(rows.tolist()):
            image = row if place is None else [j for j in range(6) if j != row][place]
            own = int(y[n]), int(toward[n])
            tried = [[*expected[n][:image], p, *expected[n][image + 1 :]] for p in range(5)]
            margins = [_margin(hpm, points, batch, row, *own) for batch in tried]
            best = min(range(5), key=margins.__getitem__)
            better = margins[best] < margins[expected[n][image]]
            moved, kept = moved + better, kept + (not better)
            expected[n] = tried[best] if better else expected[n]
            assert mixtures.chosen[n].tolist() == expected[n]
            assert float(mixtures.margin[n]) == pytest.approx(min(margins), abs=1e-6)
            assigned = [int(hpm.fc_logits(points[p, j]).argmax()) for j, p in enumerate(expected[n])]
            others = [a for j, a in enumerate(assigned) if j != image]
            emptied += own[0] not in others or own[1] not in others
    assert emptied
    assert moved
    assert kept


def test_a_tie_moves_nothing() -> None:
    """Points in third classes serve alike, so the image stays where it is."""
    hpm, points = _case(Variant())
    points = points.clone()
    points[:, 1] = points[2, 1]
    exchange = hpm.exchange()
    assert exchange is not None
    table = exchange.table([exchange.know(z) for z in points])
    chosen = torch.full((1, 6), 3)
    mixtures = Mixtures(exchange, table, chosen, torch.tensor([0]), torch.tensor([1]), torch.tensor([2]))
    mixtures.improve(0)
    assert mixtures.chosen.tolist() == [[3] * 6]


def test_a_decision_without_a_batch_has_no_exchange() -> None:
    hpm = make_hpm()
    hpm.variant = Variant(prototypes="global")
    assert hpm.exchange() is None
