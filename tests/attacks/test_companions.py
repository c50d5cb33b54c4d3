"""The choice of company against trying everything, and against real batches."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from toys import make_batch, make_hpm, make_samples

from msa_eval import HPM, evaluate
from msa_eval.attacks import Ball
from msa_eval.attacks.batch import CompanionPool
from msa_eval.attacks.companions import ALL, CompanionSearch, _margin, descend
from msa_eval.attacks.losses import margin_loss
from msa_eval.defense.contexts import Companions, OneAtATime
from msa_eval.judging.judged_batch import JudgedBatch
from msa_eval.protocols import make_protocol
from msa_eval.surrogates import get

BALL = Ball("Linf", 0.2)


def _margin_in(hpm: HPM, rows: list[Tensor], seat: int, y: Tensor) -> float:
    """The lead of one row in a batch put together by hand."""
    with torch.no_grad():
        return float(-margin_loss(hpm.logits(torch.stack(rows)), y.expand(len(rows)))[seat])


def test_one_place_is_searched_as_trying_everything_would() -> None:
    hpm = make_hpm()
    batch = make_batch(hpm, 4)
    pool = torch.randn(10, 6, generator=torch.Generator().manual_seed(3))
    start = torch.tensor([[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 0, 1]])
    companions = Companions(pool, start, torch.arange(4))
    found, margins = descend(
        hpm, batch.z, batch.y, companions, places=[1], candidates=lambda place, now: torch.arange(10).expand(4, -1)
    )
    for i in range(4):
        tried = []
        for j in range(10):
            beside = [pool[start[i, 0]], pool[j], pool[start[i, 2]]]
            tried.append(_margin_in(hpm, [*beside[:i], batch.z[i], *beside[i:]], i, batch.y[i]))
        assert float(margins[i]) == pytest.approx(min(tried), abs=1e-5)
        assert int(found.index[i, 1]) == min(range(10), key=tried.__getitem__)
        assert found.index[i, [0, 2]].tolist() == start[i, [0, 2]].tolist()


def test_a_descent_never_climbs_and_comes_close_to_the_best_of_all() -> None:
    hpm = make_hpm()
    batch = make_batch(hpm, 3, seed=2)
    pool = torch.randn(5, 6, generator=torch.Generator().manual_seed(5))
    companions = Companions(pool, torch.tensor([[0, 1]] * 3), torch.arange(3))
    everywhere = torch.arange(5).expand(3, -1)
    _, at_first = descend(hpm, batch.z, batch.y, companions, places=[], candidates=lambda p, c: everywhere)
    _, margins = descend(hpm, batch.z, batch.y, companions, places=[0, 1, 0, 1], candidates=lambda p, c: everywhere)
    assert bool((margins <= at_first).all())
    for i in range(3):
        best = min(
            _margin_in(hpm, [*[pool[a], pool[b]][:i], batch.z[i], *[pool[a], pool[b]][i:]], i, batch.y[i])
            for a, b in itertools.product(range(5), repeat=2)
        )
        assert best - 1e-5 <= float(margins[i]) <= float(at_first[i]) + 1e-6


@pytest.mark.parametrize("search", ["greedy", "random", "pursuit"])
def test_company_is_of_clean_images_none_twice_and_never_the_sample(search: str) -> None:
    hpm = make_hpm().requires_grad_(False)
    batch = make_batch(hpm, 8)
    others = make_samples(hpm, 30, seed=9)
    with torch.no_grad():
        pool = torch.cat([batch.z, hpm.features(others.x), batch.z[:3]])
    identity = torch.cat([torch.arange(8), torch.arange(100, 130), torch.arange(3)])
    classes = torch.randint(4, (len(identity),), generator=torch.Generator().manual_seed(8))
    index = torch.stack([torch.tensor([j for j in range(8) if j != i]) for i in range(8)])
    companions = Companions(pool, index, torch.arange(8))
    judged = JudgedBatch(OneAtATime(hpm, companions), get("frozen-assignment"), batch, BALL)
    attack = CompanionSearch(
        CompanionPool(companions, identity, classes, torch.arange(8)), trials=80, greedy=search == "greedy"
    )
    generator = torch.Generator().manual_seed(0)
    outcome = judged.finish(
        attack.pursue(judged, generator, turn=4) if search == "pursuit" else attack.choose(judged, generator)
    )
    assert judged.trace().companions is not None
    for i, row in enumerate(judged.trace().companions):
        who = identity[row].tolist()
        assert len(set(who)) == 7
        assert i not in who
        beside = list(pool[row])
        own = judged.trace().best.z[i]
        margin = _margin_in(hpm, [*beside[:i], own, *beside[i:]], i, batch.y[i])
        assert margin == pytest.approx(float(outcome.min_margin[i]), abs=1e-5)
    assert bool((outcome.min_margin <= -margin_loss(batch.logits, batch.y) + 1e-6).all())
    assert bool((outcome.min_margin < -margin_loss(batch.logits, batch.y) - 1e-3).any())
    assert (float(outcome.perturbation.max()) == 0) == (search != "pursuit")


def _gathering(pool: int, *, seats: int = 4) -> tuple[CompanionSearch, Tensor]:
    """Two rows with ``seats`` companions each; the pool holds every image twice, of classes 0, 1, 2 in turn."""
    identity = torch.arange(pool).repeat(2)
    companions = Companions(
        torch.zeros(2 * pool, 3), torch.arange(seats).repeat(2, 1), torch.zeros(2, dtype=torch.long)
    )
    attack = CompanionSearch(CompanionPool(companions, identity, identity % 3, torch.tensor([0, 1])))
    return attack, torch.tensor([0, 1])


@pytest.mark.parametrize("sizes", [(ALL, None), (0, None), (None, 0), (1, ALL), (0, 1), (2, 1)])
def test_company_is_gathered_with_so_many_images_of_the_two_classes(sizes: tuple[int | None, int | None]) -> None:
    attack, y = _gathering(18)
    toward = torch.tensor([1, 2])
    index = attack._gathered(y, toward, attack.pool.own, sizes, torch.Generator().manual_seed(0))
    assert index is not None
    for i, row in enumerate(index):
        classes, who = attack.pool.classes[row].tolist(), attack.pool.identity[row].tolist()
        for aim, size in zip((y, toward), sizes, strict=True):
            if size is not None:
                assert classes.count(int(aim[i])) == min(size, 4 - (sizes == (1, ALL)))
        assert len(set(who)) == 4
        assert i not in who


def test_where_a_class_has_too_few_images_others_fill_up_and_a_small_pool_gathers_nothing() -> None:
    attack, y = _gathering(9)
    crowd = attack._gathered(y, y + 1, attack.pool.own, (ALL, None), torch.Generator())
    assert crowd is not None
    assert [int((attack.pool.classes[row] == label).sum()) for row, label in zip(crowd, y, strict=True)] == [2, 2]
    attack, y = _gathering(4)
    assert attack._gathered(y, y + 1, attack.pool.own, (ALL, None), torch.Generator()) is None


def test_images_of_the_two_classes_are_offered_as_often_as_all_others() -> None:
    attack, y = _gathering(400, seats=60)
    attack = replace(attack, pool=replace(attack.pool, classes=attack.pool.identity % 40))
    offers = attack.pool.classes[attack._offers(y, torch.tensor([7, 7]), torch.Generator().manual_seed(0))]
    for row, label in zip(offers, y, strict=True):  # half of them from the whole pool, a quarter from either class
        for aim in (int(label), 7):
            assert float((row == aim).float().mean()) == pytest.approx(0.25 + 0.5 / 40, abs=0.05)
        assert len(row.unique()) == 40


class Hill:
    """A defence whose label leads by more, the fewer companions are of its class, until the last of them has gone."""

    def features(self, x: Tensor) -> Tensor:
        return x

    def logits(self, z: Tensor) -> Tensor:
        count = float((z[:, 0] == 0).sum())
        return torch.tensor([[2.0 if count == 0 else 9.0 - count, 0.0, -5.0]]).expand(len(z), 3)


def test_company_goes_from_a_crowd_to_none_where_every_single_step_is_worse() -> None:
    pool = torch.arange(18.0).remainder(3).unsqueeze(1).repeat(2, 1)
    companions = Companions(pool, torch.tensor([[3, 6, 9, 12]] * 2), torch.tensor([0, 0]))
    z, y, toward = torch.ones(2, 1), torch.zeros(2, dtype=torch.long), torch.ones(2, dtype=torch.long)
    by_one, margins = descend(
        Hill(), z, y, companions, places=range(4),
        candidates=lambda place, now: torch.tensor([[1 + 3 * place, 2 + 3 * place]] * 2), toward=toward,
    )  # fmt: skip
    assert by_one.index.tolist() == companions.index.tolist()
    assert margins.tolist() == [5.0, 5.0]
    attack = _gathering(18)[0]
    attack = replace(attack, pool=replace(attack.pool, companions=companions))
    judged: Any = SimpleNamespace(target=Hill(), latest=SimpleNamespace(z=z), batch=SimpleNamespace(y=y))
    found = attack._towards(judged, companions, toward, torch.tensor([0, 1]), torch.Generator().manual_seed(0))
    assert not bool((pool[found.index] == 0).any())


def test_no_lead_over_a_class_is_below_that_of_an_answer_that_is_wrong() -> None:
    logits, y, toward = torch.tensor([[1.0, 0.5, 2.0], [1.0, 0.5, 0.0]]), torch.tensor([0, 0]), torch.tensor([1, 1])
    assert _margin(logits, y, toward).tolist() == [-math.inf, 0.5]
    assert _margin(logits, y, None).tolist() == [-1.0, 0.5]


def test_a_descent_towards_a_class_lowers_the_lead_over_that_class() -> None:
    hpm = make_hpm()
    batch = make_batch(hpm, 4)
    pool = torch.randn(10, 6, generator=torch.Generator().manual_seed(3))
    companions = Companions(pool, torch.tensor([[0, 1, 2]] * 4), torch.arange(4))
    for aim in range(1, 4):
        toward = (batch.y + aim) % 4
        found, margins = descend(
            hpm, batch.z, batch.y, companions, places=[0], toward=toward,
            candidates=lambda place, now: torch.arange(10).expand(4, -1),
        )  # fmt: skip
        for i in range(4):
            tried = []
            for j in range(10):
                rows = [pool[j], pool[1], pool[2]]
                with torch.no_grad():
                    logits = hpm.logits(torch.stack([*rows[:i], batch.z[i], *rows[i:]]))[i]
                right = int(logits.argmax()) == int(batch.y[i])
                tried.append(float(logits[batch.y[i]] - logits[toward[i]]) if right else -math.inf)
            assert float(margins[i]) == pytest.approx(min(tried), abs=1e-5)
            assert int(found.index[i, 0]) == min(range(10), key=tried.__getitem__)


def _protocol(**overrides: Any) -> Any:
    content = {
        "schema": 1, "audit.samples": 0, "name": "composed", "version": 1, "description": "A test.",
        "threat": {"norm": "Linf", "eps": 0.05, "contexts": ["joint", "solo", "composed"]},
        "batches": {"size": 8},
        "attack": {"apgd": {"runs": ["soft-hybrid:margin", "ste:margin:companions"], "combine": "cascade", "steps": 8},
                   "recombination": {"sweeps": 1}, "composition": {"trials": 40, "pool": 20}},
    }  # fmt: skip
    return make_protocol(content, overrides=overrides)


def test_batches_of_one_are_attacked_by_every_run_that_is_listed() -> None:
    """There is nothing to mix, and no company: joint and composed are alone."""
    hpm = make_hpm()
    changed = {"batches.size": 1, "threat.contexts": ["joint", "alone"], "attack.recombination.runs": ["ste:margin"]}
    results = evaluate(hpm, make_samples(hpm, 12), protocol=_protocol(**changed), fc=False, seed=1)
    runs = results.attacks.groupby("context")["run"].agg(list)
    assert runs["joint"] == runs["alone"]
    assert len(runs["joint"]) == 2


def test_the_engine_composes_and_recombines() -> None:
    hpm = make_hpm()
    results = evaluate(hpm, make_samples(hpm, 30), protocol=_protocol(), seed=1)
    attacks = results.attacks[results.attacks["target"] == "defense"].groupby("context")["attack"].agg(list)
    assert attacks["joint"] == ["apgd", "apgd-companions", "recombination"]
    assert attacks["composed"] == ["composition", "apgd", "apgd", "composition", *["pursuit"] * 9]
    value = results.summary.set_index(["target", "context", "metric"])["value"]["defense"]
    assert value["composed", "clean"] == value["joint", "clean"]
    assert value["composed", "worst_case"] < value["solo", "worst_case"]
    static = results.attacks[(results.attacks["target"] == "fc")]
    assert set(static["attack"]) == {"apgd"}
