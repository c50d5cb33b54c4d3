"""A search whose features are its own: nothing counts that the target did not say in float32, in its batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toys import AskedInQueries, attacked, make_batch, make_hpm, make_samples

from msa_eval import HPM, WholeModel, evaluate
from msa_eval.attacks import Ball
from msa_eval.attacks.batch import AdversarialBatch, Batch
from msa_eval.attacks.losses import margin_loss
from msa_eval.attacks.query import SquareAttack
from msa_eval.defense import precision
from msa_eval.defense.contexts import AmongOthers, OneAtATime
from msa_eval.defense.contract import decide
from msa_eval.defense.precision import SearchPrecision, choose
from msa_eval.engine import evaluate as engine
from msa_eval.judging.judged_batch import JudgedBatch
from msa_eval.judging.outcomes import RunResult
from msa_eval.judging.search_state import Setting
from msa_eval.protocols import make_protocol
from msa_eval.surrogates import get
from msa_eval.verification.verify import verify

BALL = Ball("Linf", 0.2)


@pytest.fixture(autouse=True)
def steady() -> None:
    """Here `auto` finds what it finds."""


class Distorted(SearchPrecision):
    """A rough search whose features are off by a given share, always the same way for the same image."""

    share = 0.0

    def features(self, defense: Any, x: Tensor) -> Tensor:
        z: Tensor = defense.features(x)
        return z + self.share * torch.sin(1000 * z.detach()) * z.detach().std()


def _distorted(share: float) -> SearchPrecision:
    search = Distorted(rough=True)
    object.__setattr__(search, "share", share)
    return search


class Watched(HPM):
    """Keeps the images whose features it was asked for."""

    asked: list[Tensor]

    def features(self, x: Tensor) -> Tensor:
        self.asked.append(x.detach().clone())
        return super().features(x)


def _searched(
    search: SearchPrecision, kind: str, surrogate: str, *, early: bool = False, ball: Ball = BALL
) -> tuple[Watched, Batch, list[Tensor], RunResult, JudgedBatch]:
    """One APGD run; with the points that the attack asked about."""
    hpm: Any = make_hpm().requires_grad_(False)
    hpm.__class__ = Watched
    hpm.asked = []
    batch = make_batch(hpm, 16, seed=1)
    hpm.asked.clear()
    target = OneAtATime(hpm, batch.z) if kind == "solo" else hpm
    view = AmongOthers(hpm, batch.z) if kind == "companions" else None
    setting = Setting(view=view, keep=True, search=search, stays=early, early_stop=early)
    judged = JudgedBatch(target, get(surrogate), batch, ball, setting=setting)
    outcome, asked = attacked(judged)
    return hpm, batch, asked, outcome, judged


def _margins(hpm: HPM, batch: Batch, x: Tensor, kind: str) -> Tensor:
    """Every lead that a point shows, by fresh decisions."""
    with torch.no_grad():
        z = HPM.features(hpm, x)
        together = hpm.logits(z)
        apart = OneAtATime(hpm, batch.z).logits(z)
        among = AmongOthers(hpm, batch.z).logits(z)
    shown = {"joint": [together], "solo": [apart], "companions": [together, among]}[kind]
    return torch.stack([-margin_loss(logits, batch.y) for logits in shown]).amin(dim=0)


@pytest.mark.parametrize(
    ("kind", "early"),
    [("joint", False), ("solo", False), ("companions", False), ("joint", True), ("solo", True)],
)
@pytest.mark.parametrize("surrogate", ["soft-hybrid", "ste"])
@pytest.mark.parametrize("share", [0.0, 0.3, 3.0])
def test_only_what_the_target_says_counts(kind: str, early: bool, surrogate: str, share: float) -> None:
    """Whatever the search's features say; and where they are the target's own, all that the target says does."""
    hpm, batch, asked, outcome, judged = _searched(_distorted(share), kind, surrogate, early=early)
    margins = torch.stack([_margins(hpm, batch, x, kind) for x in asked])
    really = (margins.amin(dim=0) < 0) & batch.correct
    broken = outcome.any_broken & batch.correct
    assert bool((really | ~broken).all())
    assert bool(
        (outcome.min_margin >= torch.minimum(margins.amin(dim=0), -margin_loss(batch.logits, batch.y)) - 1e-5).all()
    )
    shown = torch.cat([margins, -margin_loss(batch.logits, batch.y).unsqueeze(0)])
    if kind in ("joint", "solo"):  # a lead that the target itself gave
        assert bool(((shown - outcome.min_margin).abs().amin(dim=0) < 1e-5).all())
    assert torch.equal(outcome.min_margin < 0, outcome.any_broken | ~batch.correct)
    assert outcome.forwards == sum(map(len, hpm.asked))
    best = judged.trace().best
    with torch.no_grad():
        of_best = OneAtATime(hpm, batch.z).logits(HPM.features(hpm, best.x))
    if kind == "solo":  # the proofs of this context
        assert bool((of_best.argmax(dim=1) != batch.y)[broken].all())
    if share == 0:
        assert torch.equal(broken, really)
        assert bool(broken.any())
    for finding in judged.trace().findings:
        if finding.own is None and kind != "solo":
            with torch.no_grad():
                assert torch.equal(finding.breaks, (hpm(finding.x).argmax(dim=1) != batch.y) & batch.correct)


@pytest.mark.parametrize("kind", ["joint", "all right", "solo", "static"])
@pytest.mark.parametrize("share", [0.0, 0.3, 3.0])
def test_only_what_the_target_says_about_a_query_counts(kind: str, share: float) -> None:
    hpm = make_hpm().requires_grad_(False)
    model: Any = hpm.fc_target if kind == "static" else hpm
    samples = make_samples(model, 16, seed=1)
    with torch.no_grad():
        z = model.features(samples.x)
        logits = decide(model, z)
    y = logits.argmax(dim=1) if kind == "all right" else samples.y
    batch = Batch(0, samples.x, y, z, logits)
    target = OneAtATime(hpm, batch.z) if kind == "solo" else model
    setting = Setting(search=_distorted(share), keep=True)
    judged = AskedInQueries(target, None, batch, BALL, mixes_rows=kind != "static", setting=setting)
    outcome = judged.finish(points := SquareAttack(40, 0.8)(judged, torch.Generator().manual_seed(0)))
    with torch.no_grad():
        shown = [-margin_loss(decide(target, model.features(x)), batch.y) for x in (batch.x, *judged.asked, points)]
    margins = torch.stack(shown)
    broken = outcome.any_broken & batch.correct
    assert bool((margins.amin(dim=0) < 0)[broken].all())
    assert float((margins - outcome.min_margin).abs().amin(dim=0).max()) < 1e-5, "a lead that the target never gave"
    if share == 0 and kind != "static":  # where rows don't interact, what is put together is not decided
        assert torch.equal(broken, (margins.amin(dim=0) < 0) & batch.correct)
    assert share > 0.3 or bool(broken.any())
    for finding in judged.trace().findings:
        with torch.no_grad():
            wrong = decide(target, model.features(finding.x)).argmax(dim=1) != batch.y
        assert bool(wrong[finding.breaks].all())


def test_no_lead_of_rounded_features_is_entered() -> None:
    """In a small ball most stand, and features far off tell of leads that the target never gave."""
    hpm, batch, asked, outcome, _ = _searched(_distorted(1.0), "solo", "ste", early=True, ball=Ball("Linf", 0.02))
    shown = torch.stack([-margin_loss(batch.logits, batch.y), *(_margins(hpm, batch, x, "solo") for x in asked)])
    assert bool(((shown - outcome.min_margin).abs().amin(dim=0) < 1e-5).all())
    assert int((~outcome.any_broken & batch.correct).sum()) > 4


def test_a_start_with_rounded_features_is_passed_again_before_it_is_judged() -> None:
    hpm = make_hpm().requires_grad_(False)
    batch = make_batch(hpm, 16, seed=1)
    target = OneAtATime(hpm, batch.z)
    far = batch.x + 0.05
    with torch.no_grad():
        start = AdversarialBatch(far, SearchPrecision("bf16", rough=True).features(hpm, far), batch.correct)
        exact = -margin_loss(target.logits(hpm.features(far)), batch.y)
    setting = Setting(start=start, counted=batch.correct, early_stop=True, search=_distorted(0.0))
    outcome = JudgedBatch(target, get("ste"), batch, BALL, setting=setting).finish(far)
    lowest = torch.minimum(exact, -margin_loss(batch.logits, batch.y))
    assert torch.equal(outcome.min_margin[batch.correct], lowest[batch.correct])
    assert outcome.forwards == int(batch.correct.sum())


def test_false_claims_cost_passes_and_nothing_else() -> None:
    """Features far off claim much that is not so, and each claim is passed again."""
    _, batch, asked, outcome, _ = _searched(_distorted(3.0), "joint", "soft-hybrid")
    assert outcome.forwards > len(batch.y) * len(asked)
    _, _, asked, exact, _ = _searched(SearchPrecision(), "joint", "soft-hybrid")
    assert exact.forwards == len(batch.y) * len(asked)


@pytest.mark.parametrize("contexts", [["joint"], ["solo", "alone"], ["composed"]])
def test_what_is_found_in_bf16_is_proved_in_float32(contexts: list[str], tmp_path: Path) -> None:
    hpm = make_hpm()
    layer = nn.Linear(12, 6, bias=False)  # with a layer to round, there is a copy to search through
    layer.weight.data = hpm.trunk.get_parameter("weight").data.T.clone()
    hpm.trunk = nn.Sequential(nn.Flatten(), layer).eval()
    samples = make_samples(hpm, 16)
    apgd = {"combine": "cascade", "surrogates": ["fc-oracle", "soft-hybrid"], "losses": ["margin"], "steps": 5}
    small = {"threat": {"norm": "Linf", "eps": 0.1, "contexts": contexts}, "batches": {"size": 8}}
    attack = {"apgd": apgd, "square": {"queries": 8}, "recombination": {"sweeps": 1, "passes": 24}}
    about = {"schema": 1, "name": "small", "version": 1, "description": "A test.", "audit": {"samples": 0}}
    protocol = make_protocol({**about, **small, "attack": attack})
    results = evaluate(
        hpm, samples, protocol=protocol, precision="bf16", out=tmp_path, save_adversarial=True, save_gallery=False
    )
    assert results.run["search"] == {"asked": "bf16", "precision": "bf16"}
    assert results.run["bf16_copy"] == ["defense", "fc"]
    assert results.run["precision"] == "float32"
    assert int((~results.samples["robust"] & results.samples["clean_correct"]).sum()) > 0
    assert verify(tmp_path, hpm, samples).passed


def test_bf16_features_are_float32_tensors_of_rounded_passes() -> None:
    hpm = make_hpm().requires_grad_(False)
    x = make_batch(hpm, 8).x.requires_grad_()
    exact, rough = hpm.features(x), SearchPrecision("bf16", rough=True).features(hpm, x)
    assert rough.dtype == torch.float32
    assert not torch.equal(exact, rough)
    assert torch.equal(rough, rough.bfloat16().float())
    torch.testing.assert_close(exact, rough, rtol=0.05, atol=0.05)
    slope, about = (torch.autograd.grad(z.sum(), x)[0] for z in (exact, rough))
    assert float((slope.sign() == about.sign()).float().mean()) > 0.9


@pytest.mark.parametrize(("gain", "most"), [(0.1, 2), (0.5, 16), (2.0, 16)])
def test_where_bf16_is_hopeless_only_a_few_images_are_tried(
    gain: float, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    def seconds(search: SearchPrecision, defense: Any, x: Tensor) -> float:
        seen.append(len(x))
        return 1 / gain if search.rough else 1.0

    monkeypatch.setattr(precision, "_seconds", seconds)
    assert choose("auto", make_hpm(), torch.rand(20, 1, 2, 6)).rough == (gain > 1)
    assert max(seen) == most


@pytest.mark.parametrize(("gain", "rough"), [(0.1, False), (1.4, False), (1.6, True)])
def test_auto_takes_what_a_trial_finds_faster(gain: float, rough: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    hpm = make_hpm().requires_grad_(False)
    monkeypatch.setattr(precision, "_seconds", lambda search, defense, x: 1 / gain if search.rough else 1.0)
    found = choose("auto", hpm, make_batch(hpm, 8).x)
    assert found.rough == rough
    assert found.about() == {"asked": "auto", "precision": "bf16" if rough else "fp32"}
    assert found.gain == pytest.approx(gain)


class Picky(nn.Module):
    """Takes float32 alone."""

    def forward(self, x: Tensor) -> Tensor:
        z = x.flatten(1) @ torch.ones(12, 6)
        if z.dtype != torch.float32:
            raise RuntimeError("float32 only")
        return z


def test_a_trunk_that_bf16_does_not_suit_is_passed_in_float32() -> None:
    hpm = make_hpm().requires_grad_(False)
    x = make_batch(hpm, 8).x
    hpm.trunk = Picky()
    assert not choose("auto", hpm, x).rough
    with pytest.raises(ValueError, match=r"can't run in bfloat16 \(float32 only\); use precision=fp32"):
        choose("bf16", hpm, x)
    assert not choose("bf16", WholeModel(hpm), x).rough
    assert choose("fp32", hpm, x) == SearchPrecision("fp32")
    with pytest.raises(ValueError, match="unknown precision 'fp16'"):
        choose("fp16", hpm, x)


def test_a_second_target_that_bf16_does_not_suit_is_passed_in_float32_too() -> None:
    hpm, other = make_hpm().requires_grad_(False), make_hpm().requires_grad_(False)
    x = make_batch(hpm, 8).x
    other.trunk = Picky().eval()
    assert SearchPrecision("auto", rough=True).of(hpm, x).rough
    assert not SearchPrecision("auto", rough=True).of(other, x).rough
    with pytest.raises(ValueError, match="float32 only"):
        SearchPrecision("bf16", rough=True).of(other, x)


def test_a_target_that_is_searched_in_float32_beside_one_that_is_not_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    hpm, other = make_hpm(), make_hpm().fc_target
    other.trunk = Picky().eval()
    monkeypatch.setattr(engine, "choose", lambda *_: SearchPrecision("auto", rough=True))
    attack = {"apgd": {"surrogates": ["ste"], "losses": ["margin"], "steps": 2}}
    small = {"threat": {"norm": "Linf", "eps": 0.1}, "batches": {"size": 8}, "audit": {"samples": 0}}
    about = {"schema": 1, "name": "small", "version": 1, "description": "A test."}
    protocol = make_protocol({**about, **small, "attack": attack})
    results = evaluate(hpm, make_samples(hpm, 16), fc=other, protocol=protocol)
    assert not results.run.get("failures")
    assert results.run["search"] == {"asked": "auto", "precision": "bf16"}
    assert results.run["fp32_search"] == ["fc"]
    assert "fp32_search" not in evaluate(hpm, make_samples(hpm, 16), fc=False, protocol=protocol).run


class Rounding(HPM):
    """Notes whether it is asked for rounded features."""

    rounded: list[bool]

    def features(self, x: Tensor) -> Tensor:
        self.rounded.append(torch.is_autocast_enabled("cpu"))
        return super().features(x)


@pytest.mark.parametrize(
    ("mixing", "context", "rounds"), [(True, "joint", False), (True, "solo", True), (False, "joint", True)]
)
def test_points_that_are_mixed_have_features_of_the_target_itself(
    mixing: bool, context: str, rounds: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "_pair", lambda *_: (1.0, 1.0))  # the trial of bf16 rounds too
    monkeypatch.setattr(precision, "bf16_copy", lambda *_: None)
    hpm: Any = make_hpm()
    hpm.__class__ = Rounding
    hpm.rounded = []
    attack = {"apgd": {"combine": "cascade", "surrogates": ["fc-oracle"], "losses": ["margin"], "steps": 3}}
    if mixing:
        attack["recombination"] = {"sweeps": 1, "passes": 24}
    small = {"threat": {"norm": "Linf", "eps": 0.1, "contexts": [context]}, "batches": {"size": 8}}
    about = {"schema": 1, "name": "small", "version": 1, "description": "A test.", "audit": {"samples": 0}}
    protocol = make_protocol({**about, **small, "attack": attack})
    hpm.rounded.clear()
    evaluate(hpm, make_samples(hpm, 16), protocol=protocol, fc=False, precision="bf16", found_surrogates=False)
    assert any(hpm.rounded) == rounds
    assert not all(hpm.rounded)


def test_a_start_that_another_run_rounded_is_passed_again_where_points_are_not() -> None:
    hpm = make_hpm().requires_grad_(False)
    batch = make_batch(hpm, 16, seed=1)
    start = AdversarialBatch(batch.x + 0.05, torch.randn_like(batch.z), batch.correct)
    setting = Setting(start=start, view=AmongOthers(hpm, start.z))
    judged = JudgedBatch(hpm, get("ste"), batch, BALL, setting=setting)
    assert judged.forwards == 16
    assert judged.start.rounded is None
    assert torch.equal(judged.start.z, hpm.features(start.x))
