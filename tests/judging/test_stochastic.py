"""Targets that answer at random: what chance broke in many looks is taken back, what holds can be replayed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from scipy.stats import binom
from torch import Tensor, nn
from toys import make_classifier, make_samples

from msa_eval import Classifier, Results, Samples, WholeModel, evaluate, verify
from msa_eval.judging.majority import CONFIRM, CONFIRM_SIGMAS, JUDGE, JUDGE_SIGMAS, clear_majority, telling_draw
from msa_eval.judging.outcomes import RunResult
from msa_eval.judging.replay import Replay
from msa_eval.protocols import make_protocol

TABLES = ("summary", "attacks", "samples", "outcomes", "batches")


class Coins(nn.Module):
    """Two classes. Each image carries its chance of a wrong answer, which no perturbation moves but the first one.

    The first pixel, rounded, is the chance of an image that was changed; a clean one is wrong in 1 of 20 answers.
    """

    batch_dependent = True

    def __init__(self, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.generator = generator
        self.eval()

    def features(self, x: Tensor) -> Tensor:
        return x.flatten(1)

    def logits(self, z: Tensor) -> Tensor:
        clean = (z[:, 1:] == 0.5).all(dim=1)
        chance = torch.where(clean, 0.05, (z[:, 0].detach() * 20).round() / 20)
        drawn = torch.rand(len(z), generator=self.generator)
        margin = (1 + z.mean(dim=1) + 0.01 * drawn) * torch.where(drawn < chance, -1.0, 1.0)
        return torch.stack([margin, -margin], dim=1)


def _coins(*chances: float, each: int) -> Samples:
    x = torch.full((len(chances) * each, 1, 2, 2), 0.5)
    x[:, 0, 0, 0] = torch.tensor(chances).repeat(each)
    return Samples(x, torch.zeros(len(x), dtype=torch.long), "coins")


def _protocol(steps: int, queries: int, *contexts: str, **overrides: Any) -> Any:
    content = {
        "schema": 1, "name": "coins", "version": 1, "description": "A test.", "audit.samples": 0,
        "threat": {"norm": "Linf", "eps": 0.01, "contexts": list(contexts or ["joint"])}, "batches": {"size": 48},
        "attack": {"apgd": {"runs": ["ste:margin", "ste:margin"], "combine": "cascade", "steps": steps},
                   "square": {"queries": queries}, "composition": {"pool": 8, "trials": 3}},
    }  # fmt: skip
    return make_protocol(content, overrides=overrides)


def _broken_by_chance(results: Results, samples: Samples, context: str = "joint") -> dict[float, tuple[int, int]]:
    """How many of the samples with each chance are broken, and how many there are."""
    rows = results.samples[results.samples["context"] == context]
    rows = rows[rows["clean_correct"]]
    chance = samples.x[:, 0, 0, 0].numpy()[rows["index"]].round(2)
    broken = ~rows["robust"].to_numpy()
    return {round(float(c), 2): (int(broken[chance == c].sum()), int((chance == c).sum())) for c in np.unique(chance)}


def _check_verified(folder: Path, target: object, samples: Samples) -> None:
    checked = verify(folder, target, samples)
    assert checked.passed, [check for check in checked.checks if not check.passed]
    assert checked.replayed == checked.claims > 0


@pytest.mark.parametrize("own", [False, True])
def test_hundreds_of_looks_break_what_is_mostly_wrong_and_nothing_else(own: bool, tmp_path: Path) -> None:
    """Majorities of 9 and of 99 broke half of those with a chance of 0.4 here, and all of those with 0.45."""
    target = Coins(torch.Generator().manual_seed(0) if own else None)
    samples = _coins(0.4, 0.45, 0.5, 0.6, 0.8, each=9)
    results = evaluate(target, samples, protocol=_protocol(40, 40), save_adversarial=True, out=tmp_path)
    found = _broken_by_chance(results, samples)
    assert found == {0.4: (0, 9), 0.45: (0, 9), 0.5: (0, 9), 0.6: (9, 9), 0.8: (9, 9)}
    # Some were called broken and taken back, and every table says the same: what a run keeps was upheld.
    assert results.run["taken_back"]["defense"]["joint"] > 0
    assert (results.attacks["any"] >= 0.6).all()
    # With a generator of its own, which no seed reaches, the replay draws other answers and still confirms.
    assert results.run["adversarial"]["unconfirmed"] == []
    _check_verified(tmp_path, target, samples)


@pytest.mark.parametrize("context", ["solo", "alone", "composed"])
def test_every_context_judges_the_batches_that_prove(context: str, tmp_path: Path) -> None:
    samples = _coins(0.45, 0.8, each=3)
    results = evaluate(Coins(), samples, protocol=_protocol(12, 12, context), save_adversarial=True, out=tmp_path)
    assert _broken_by_chance(results, samples, context) == {0.45: (0, 3), 0.8: (3, 3)}
    _check_verified(tmp_path, Coins(), samples)


def test_the_tables_do_not_depend_on_whether_proofs_are_kept(tmp_path: Path) -> None:
    samples = _coins(0.5, 0.8, each=6)
    for name in ("kept", "not"):
        evaluate(Coins(), samples, protocol=_protocol(20, 20), out=tmp_path / name, save_adversarial=name == "kept")
    for table in TABLES:
        assert (tmp_path / "kept" / f"{table}.csv").read_bytes() == (tmp_path / "not" / f"{table}.csv").read_bytes()


def test_what_proves_a_break_is_kept_as_it_was_judged(tmp_path: Path) -> None:
    evaluate(Coins(), _coins(0.8, each=6), protocol=_protocol(5, 5), save_adversarial=True, out=tmp_path)
    with safe_open(tmp_path / "adversarial.safetensors", framework="pt") as opened:
        points = [opened.get_slice(name).get_dtype() for name in opened.keys() if name.endswith("/x")]  # noqa: SIM118
    assert points
    assert set(points) == {"F32"}


def test_a_sample_that_is_taken_back_stands_for_the_next_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The first judgement is made to fail: the second run of the cascade searches on, and its break is upheld."""
    upheld, judged = Replay.clearly_breaks, []

    def second(self: Replay, proof: Any) -> Tensor:
        judged.append(proof)
        return upheld(self, proof) & (len(judged) > 1)

    monkeypatch.setattr(Replay, "clearly_breaks", second)
    samples = _coins(0.9, each=4)
    results = evaluate(Coins(), samples, protocol=_protocol(5, 5), save_adversarial=True, out=tmp_path)
    assert [proof.positions.tolist() for proof in judged] == [[0, 1, 2, 3]] * 2
    # What proves the breaks is the batch that was upheld, not the one that was not.
    with safe_open(tmp_path / "adversarial.safetensors", framework="pt") as opened:
        assert torch.equal(opened.get_tensor("0/x"), judged[1].x)
    assert not torch.equal(judged[0].x, judged[1].x)
    first, *_ = results.attacks.to_dict(orient="records")
    assert (first["any"], first["final"], first["newly_broken"]) == (1, 1, 0)
    assert set(results.samples["broken_by"]) == {results.attacks["run"][1]}
    assert results.run["taken_back"] == {"defense": {"joint": 0}}
    _check_verified(tmp_path, Coins(), samples)


def test_what_no_judgement_upholds_is_unbroken_everywhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(Replay, "clearly_breaks", lambda _, proof: torch.zeros(len(proof.positions), dtype=torch.bool))
    samples = _coins(0.9, each=6)
    results = evaluate(
        Coins(), samples, protocol=_protocol(5, 5, "joint", "solo"), save_adversarial=True, out=tmp_path
    )  # fmt: skip
    assert results.run["taken_back"] == {"defense": {"joint": 6, "solo": 6}}
    assert (results.summary["value"] == 1).all()
    assert not results.outcomes["final_broken"].any()
    assert not results.outcomes["any_broken"].any()
    assert results.outcomes["first_iterate"].isna().all()
    assert (results.samples["min_margin"] >= 0).all()
    checked = verify(tmp_path, Coins(), samples)
    assert checked.passed, [check for check in checked.checks if not check.passed]
    assert checked.claims == 0


def test_a_steady_target_has_nothing_taken_back() -> None:
    classifier = make_classifier()
    results = evaluate(classifier, make_samples(classifier), protocol=_protocol(2, 2))
    assert results.run["taken_back"] == {}


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_the_order_of_the_numbers_survives_what_is_taken_back(data: st.DataObject) -> None:
    """Outcomes of any batches shown: right on clean ≥ final ≥ committed ≥ never broken, before and after."""
    n, iterates = 6, data.draw(st.integers(1, 4))
    flags = st.lists(st.booleans(), min_size=n, max_size=n)
    correct = torch.tensor(data.draw(flags))
    wrong = torch.tensor([data.draw(flags) for _ in range(iterates)])
    rights = [correct, *(correct & ~shown for shown in wrong)]
    ever = wrong.any(dim=0)
    outcome = RunResult(
        surrogate_fooled=ever, final_broken=wrong[-1], any_broken=ever,
        first_iterate=torch.where(ever, wrong.long().argmax(dim=0), -1), min_margin=torch.where(ever, -1.0, 1.0),
        perturbation=torch.zeros(n), committed=min(rights, key=lambda right: int(right.sum())),
        forwards=0, backwards=0, decisions=0, taken_back=torch.zeros_like(ever),
    )  # fmt: skip
    taken = torch.tensor(data.draw(flags)) & ever & correct
    left = outcome.taking_back(taken, correct)
    never, final = correct & ~left.any_broken, correct & ~left.final_broken
    assert never.sum() <= left.committed.sum() <= final.sum() <= correct.sum()
    assert not (never & ~left.committed).any()
    assert not (left.committed & ~correct).any()
    assert not (left.final_broken & ~left.any_broken).any()
    assert torch.equal(left.any_broken, ever & ~taken)
    assert torch.equal(left.first_iterate >= 0, left.any_broken)
    assert torch.equal(left.min_margin < 0, left.any_broken)
    if not taken.any():
        assert torch.equal(left.committed, outcome.committed)


def test_how_often_chance_passes_and_how_often_a_replay_refutes_what_passed() -> None:
    """By the binomial law, for the draws of the default: what `msa_eval.judging.majority` and the README state."""
    looks, judged = 9 * CONFIRM, 9 * JUDGE
    assert (looks, clear_majority(looks, CONFIRM_SIGMAS)) == (99, 60)
    needed = clear_majority(judged, JUDGE_SIGMAS)
    assert (judged, needed) == (999, 563)

    def passes(chance: Any) -> Any:
        return binom.sf(needed - 1, judged, chance)

    assert passes(0.5) < 1 / 30_000
    assert passes(0.49) < 1 / 400_000
    assert passes(0.6) > 0.99
    chances = np.linspace(0, 1, 2001)
    refuted = passes(chances) * binom.cdf(judged // 2, judged, chances)
    assert refuted.max() < 1 / 1900


@given(st.data(), st.integers(0, 20), st.floats(0, 4))
@settings(max_examples=100, deadline=None)
def test_the_telling_draw_is_wrong_where_clearly_most_are(data: st.DataObject, half: int, sigmas: float) -> None:
    draws = 2 * half + 1
    numbers = st.integers(-2, 2)
    drawn = torch.tensor(data.draw(st.lists(st.tuples(numbers, numbers), min_size=draws, max_size=draws)))
    label = torch.tensor([data.draw(st.integers(0, 1))])
    sigmas = min(sigmas, draws**0.5 - 1e-6)  # beyond, not even all of them are clearly most
    message = telling_draw(drawn.float().unsqueeze(1), label, sigmas=sigmas)
    wrong = int((drawn.argmax(dim=1) != label).sum())
    # The lower end of the Wilson interval is above 1/2 exactly where the score test rejects 1/2.
    assert bool(message.argmax(dim=1) != label) == ((wrong / draws - 0.5) / (0.25 / draws) ** 0.5 > sigmas)


class _Shaky(Classifier):
    """Its features are random."""

    sigma = 0.05

    def features(self, x: Tensor) -> Tensor:
        return super().features(x + self.sigma * torch.randn_like(x))


@pytest.mark.parametrize("sigma", [0.05, 1e-5])
def test_random_features_are_refused_and_judged_as_a_whole_model(sigma: float) -> None:
    plain = make_classifier()
    shaky = _Shaky(plain.trunk, plain.fc).eval()
    shaky.sigma = sigma
    samples = make_samples(plain, 8)
    with pytest.raises(ValueError, match=r"depend on chance.* msa_eval\.WholeModel\(defense\)"):
        evaluate(shaky, samples, protocol=_protocol(2, 2))
    results = evaluate(WholeModel(shaky), samples, protocol=_protocol(2, 2))
    assert results.run["draws"] == {"defense": 9}
