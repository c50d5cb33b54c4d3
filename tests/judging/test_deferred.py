"""Where a device computes while the host goes on: nothing waits for a value, and the same is found."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from toys import make_batch, make_classifier, make_hpm

from msa_eval.attacks import Ball
from msa_eval.attacks.batch import AdversarialBatch, Batch
from msa_eval.attacks.gradient import ApgdAttack
from msa_eval.attacks.losses import margin_loss
from msa_eval.defense.contract import decide
from msa_eval.defense.precision import SearchPrecision
from msa_eval.judging.deferred import Deferred
from msa_eval.judging.judged_batch import JudgedBatch
from msa_eval.judging.outcomes import RunResult
from msa_eval.judging.search_state import Setting
from msa_eval.surrogates import get

BALL = Ball("Linf", 0.2)
YES, NO = torch.tensor(True), torch.tensor(False)


@pytest.fixture
def asynchronous(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the CPU for a device that computes while the host goes on."""
    monkeypatch.setattr("msa_eval.device.ASYNCHRONOUS", ("cpu",))


class _Reads(TorchDispatchMode):
    """Counts what makes the host wait for a device: reading a value, or a shape that depends on values."""

    def __init__(self) -> None:
        super().__init__()
        self.met: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique"):
            self.met.append(name)
        if name in ("index", "index_put", "index_put_"):
            self.met += [name for index in args[1] if index is not None and index.dtype == torch.bool]
        return func(*args, **(kwargs or {}))


def _trace(when: Callable[[Deferred, list[str]], None]) -> list[str]:
    done: list[str] = []
    when(Deferred(), done)
    return done


def _steps(waiting: Deferred, done: list[str]) -> None:
    def first() -> None:
        done.append("first")
        waiting.when(NO, lambda: done.append("never"), lambda: done.append("what came of it"))

    waiting.when(YES, first)
    waiting.when(NO, lambda: done.append("never"))
    done.append("asked")
    waiting.settle()
    done.append("settled")
    waiting.finish()


def test_on_a_cpu_all_is_done_at_once() -> None:
    assert _trace(_steps) == ["first", "what came of it", "asked", "settled"]


@pytest.mark.usefixtures("asynchronous")
def test_elsewhere_it_is_done_when_settled_and_what_comes_of_it_a_step_later() -> None:
    assert _trace(_steps) == ["asked", "first", "settled", "what came of it"]


def test_the_counter_sees_what_makes_a_host_wait() -> None:
    x = torch.arange(4.0)
    for read in (lambda: bool(x.any()), x.nonzero, lambda: x[x > 1], lambda: x.sum().item()):
        with _Reads() as reads:
            read()
        assert reads.met
    with _Reads() as reads:
        torch.where(x > 1, x, 0).sum()
    assert not reads.met


def _attack(judged: JudgedBatch, steps: int = 12) -> RunResult:
    return judged.finish(ApgdAttack("margin", steps=steps)(judged, torch.Generator().manual_seed(0)))


@pytest.mark.usefixtures("asynchronous")
@pytest.mark.parametrize("loss", ["ce", "dlr", "margin", "dlr-targeted"])
@pytest.mark.parametrize("surrogate", ["fc-oracle", "soft-hybrid", "ste", "frozen-assignment"])
@pytest.mark.parametrize("keep", [False, True])
def test_no_step_on_a_whole_batch_waits_for_a_value(surrogate: str, loss: str, keep: bool) -> None:
    """But where a finding is kept: those it makes needless are looked for."""
    hpm = make_hpm().requires_grad_(False)
    batch = make_batch(hpm, 24)
    met, finds = [], 0
    for steps in (3, 12):
        judged = JudgedBatch(hpm, get(surrogate), batch, BALL, setting=Setting(keep=keep))
        attack = ApgdAttack(loss, steps=steps)
        with _Reads() as reads:
            points = attack(judged, torch.Generator().manual_seed(0))
        met.append(len(reads.met))
        outcome = judged.finish(points)
        assert bool(outcome.any_broken.any())
        finds = len(set(outcome.first_iterate[outcome.any_broken].tolist())) if keep else 0
    assert met[1] - met[0] <= finds * (finds - 1) / 2


@pytest.mark.usefixtures("asynchronous")
def test_a_search_waits_only_where_the_batch_that_is_passed_changes() -> None:
    classifier = make_classifier().requires_grad_(False)
    batch = make_batch(classifier, 24)
    judged = JudgedBatch(classifier, get("ste"), batch, BALL, mixes_rows=False, setting=Setting(early_stop=True))
    with _Reads() as reads:
        ApgdAttack("margin", steps=12)(judged, torch.Generator().manual_seed(0))
    outcome = judged.finish(judged.start.x)
    broke_at = set(outcome.first_iterate[outcome.any_broken & batch.correct].tolist())
    assert broke_at
    assert len(reads.met) <= 2 + 4 * len(broke_at)


def _both(
    monkeypatch: pytest.MonkeyPatch, make: Callable[[], JudgedBatch]
) -> tuple[JudgedBatch, RunResult, JudgedBatch, RunResult]:
    at_once = make()
    expected = _attack(at_once)
    with monkeypatch.context() as patch:
        patch.setattr("msa_eval.device.ASYNCHRONOUS", ("cpu",))
        late = make()
        found = _attack(late)
    return at_once, expected, late, found


def _checked(defense: Any, batch: Batch, judged: JudgedBatch, outcome: RunResult) -> None:
    """What was found breaks what it says, passed anew in its batch, and each sample's lead is that of its point."""
    proven = torch.zeros_like(outcome.any_broken)
    for finding in judged.trace().findings:
        with torch.no_grad():
            wrong = decide(defense, defense.features(finding.x)).argmax(dim=1) != batch.y
        assert bool(wrong[finding.breaks].all())
        proven = proven | finding.breaks
    assert torch.equal(proven, outcome.any_broken & batch.correct)


@pytest.mark.parametrize("surrogate", ["fc-oracle", "soft-hybrid", "ste"])
def test_a_whole_batch_is_judged_the_same(surrogate: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hpm = make_hpm().requires_grad_(False)
    batch = make_batch(hpm, 24)

    def make() -> JudgedBatch:
        return JudgedBatch(hpm, get(surrogate), batch, BALL, setting=Setting(keep=True, trail=True))

    at_once, expected, late, found = _both(monkeypatch, make)
    for name in ("any_broken", "first_iterate", "min_margin", "final_broken", "committed", "perturbation"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    assert (found.forwards, found.backwards, found.decisions) == (
        expected.forwards, expected.backwards, expected.decisions,
    )  # fmt: skip
    assert torch.equal(late.trace().best.x, at_once.trace().best.x)
    assert torch.equal(late.trace().best.z, at_once.trace().best.z)
    _checked(hpm, batch, late, found)


@pytest.mark.parametrize("rough", [False, True])
def test_decided_apart_a_sample_stays_where_it_broke(rough: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is passed a step or two more, and what is broken, where, and by how much is the same."""
    classifier = make_classifier().requires_grad_(False)
    batch = make_batch(classifier, 24)
    search, asked = SearchPrecision("bf16", rough=rough), list[Tensor]()

    def make() -> JudgedBatch:
        setting = Setting(early_stop=True, keep=True, search=search)
        judged = JudgedBatch(classifier, get("ste"), batch, BALL, mixes_rows=False, setting=setting)
        judge_point = judged._judge.iterate
        asked.clear()

        def watched(point: AdversarialBatch, logits: Tensor) -> None:
            asked.append(point.x)
            judge_point(point, logits)

        judged._judge.iterate = watched  # type: ignore[method-assign]
        return judged

    at_once, expected, late, found = _both(monkeypatch, make)
    assert bool((expected.any_broken & batch.correct).any())
    assert torch.equal(found.any_broken, expected.any_broken)
    with torch.no_grad():
        margins = torch.stack([-margin_loss(classifier(x), batch.y) for x in (batch.x, *asked, late.start.x)])
    assert float((margins - found.min_margin).abs().amin(dim=0).max()) < 1e-6, "a lead that no point has"
    assert torch.equal(found.first_iterate, expected.first_iterate)
    assert torch.equal(found.final_broken, expected.final_broken)
    gone = expected.any_broken & batch.correct
    assert torch.equal(late.start.x[gone], at_once.start.x[gone])
    extra = found.forwards - expected.forwards
    assert 0 < extra <= 4 * int(gone.sum())
    _checked(classifier, batch, late, found)


@pytest.mark.parametrize("rough", [False, True])
def test_what_a_batch_with_standing_images_claims_is_confirmed(rough: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    hpm = make_hpm().requires_grad_(False)
    batch = make_batch(hpm, 24)
    search = SearchPrecision("bf16", rough=rough)

    def make() -> JudgedBatch:
        counted = torch.arange(24) % 3 > 0
        setting = Setting(counted=counted, stays=True, early_stop=True, keep=True, search=search)
        return JudgedBatch(hpm, get("soft-hybrid"), batch, BALL, setting=setting)

    _, expected, late, found = _both(monkeypatch, make)
    assert bool((expected.any_broken & batch.correct).any())
    assert int((found.any_broken & batch.correct).sum()) >= int((expected.any_broken & batch.correct).sum()) - 2
    _checked(hpm, batch, late, found)


@pytest.mark.usefixtures("asynchronous")
def test_nothing_piles_up_over_the_queries_of_a_search() -> None:
    hpm = make_hpm().requires_grad_(False)
    batch = make_batch(hpm, 24)
    judged = JudgedBatch(hpm, None, batch, BALL, setting=Setting(keep=True))
    rows = batch.correct
    generator = torch.Generator().manual_seed(0)
    for _ in range(6):
        points: Tensor = BALL.random(batch.x, generator)
        judged.propose(points[rows], rows)
        judged.accept(rows)
        assert len(judged._later._waiting) <= 8
