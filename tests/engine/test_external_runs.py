"""Third-party attacks as runs of a protocol: their rows, contexts, notes, and what they leave alone."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from pyautoattack import AutoAttack
from torch import Tensor, nn
from toys import make_hpm, make_samples

from msa_eval import HPM, AttackError, Results, Samples, evaluate
from msa_eval.attacks.ball import Ball
from msa_eval.attacks.batch import Batch
from msa_eval.attacks.external import LibraryAttack, attack, find
from msa_eval.defense.contract import decide
from msa_eval.engine import external_runs
from msa_eval.judging.judged_batch import JudgedBatch
from msa_eval.protocols import load_protocol, make_protocol
from msa_eval.report import render_page, render_table
from msa_eval.surrogates import FC_ORACLE
from msa_eval.verification.verify import verify

EPS = 0.06


@pytest.fixture(scope="module")
def hpm() -> HPM:
    with torch.random.fork_rng():
        return make_hpm()


@pytest.fixture(scope="module")
def samples(hpm: HPM) -> Samples:
    return make_samples(hpm.fc_target, 20)


def _protocol(*peers: dict[str, Any], contexts: tuple[str, ...] = ("joint",), **more: Any) -> Any:
    content = {
        "schema": 1, "audit.samples": 0, "name": "peers", "version": 1, "description": "A test.",
        "threat": {"norm": "Linf", "eps": EPS, "contexts": list(contexts)}, "batches": {"size": 10},
    } | ({"attack": {"peers": list(peers)}} if peers else {})  # fmt: skip
    return make_protocol(content, overrides=more)


def _toy(monkeypatch: pytest.MonkeyPatch, search: Any, **about: Any) -> None:
    toy = LibraryAttack("autoattack:square", lambda model, x, y, seed, turn: search(model, x, y), **about)
    monkeypatch.setattr(external_runs, "find", lambda name, ball, options: toy)


def test_apgd_t_through_fc_finds_the_points_of_a_direct_call(hpm: HPM, samples: Samples) -> None:
    x, y = samples.x[:10], samples.y[:10]
    with torch.no_grad():
        z = hpm.features(x)
        judged = JudgedBatch(hpm, FC_ORACLE, Batch(0, x, y, z, decide(hpm, z)), Ball("Linf", EPS))
    made = attack.ExternalAttack(find("autoattack:apgd-t", judged.ball, {"steps": 100, "targets": 3}))
    points = made(judged, torch.Generator().manual_seed(7))
    suite = AutoAttack(hpm.fc_target, eps=EPS, norm="Linf", seed=7, version="custom", attacks=["apgd-t"])
    suite.apgd_targeted.n_target_classes = 3
    with torch.random.fork_rng():
        direct = suite.run_standard_evaluation(x.clone(), y.clone(), batch_size=10)[0]
    moved = (direct != x).flatten(1).any(dim=1)
    assert moved.sum() > 4
    assert (points[moved] - direct[moved]).abs().max() < 1e-6
    outcome = judged.finish(points)
    with torch.no_grad():
        assert torch.equal(outcome.final_broken, hpm(points).argmax(dim=1) != y)


def test_each_peer_and_surrogate_has_rows_in_every_context(hpm: HPM, samples: Samples, tmp_path: Path) -> None:
    protocol = _protocol(
        {"name": "autoattack:apgd-t", "steps": 5, "surrogates": ["fc-oracle", "ste"], "restarts": 2},
        {"name": "autoattack:square", "queries": 30},
        {"name": "autoattack:fab-t", "steps": 5},
        contexts=("joint", "solo", "alone", "composed"),
    )
    evaluate(hpm, samples, protocol=protocol, out=tmp_path, save_adversarial=True)
    results = Results.load(tmp_path)
    of_defense = [
        "fc-oracle:autoattack:apgd-t:0", "fc-oracle:autoattack:apgd-t:1", "ste:autoattack:apgd-t:0",
        "ste:autoattack:apgd-t:1", "target:autoattack:square:0", "fc-oracle:autoattack:fab-t:0",
        "soft-hybrid:autoattack:fab-t:0",
    ]  # fmt: skip
    of_fc = [name for name in of_defense if not name.startswith(("ste", "soft"))]
    for target, names in (("defense", of_defense), ("fc", of_fc)):
        for context in protocol.contexts:
            rows = results.attacks[(results.attacks["target"] == target) & (results.attacks["context"] == context)]
            ours = ["target:composition-margin:0"] if (target, context) == ("defense", "composed") else []
            assert rows["run"].tolist() == ours + names
            peers = rows[rows["loss"] == "own"]
            gradient = ~peers["run"].str.startswith("target")
            assert (peers["forwards"] > 0).all()
            assert (peers.loc[gradient, "backwards"] > 0).all()
            assert (peers.loc[~gradient, "backwards"] == 0).all()
            outcomes = results.outcomes[
                (results.outcomes["target"] == target) & (results.outcomes["context"] == context)
            ]
            assert set(outcomes["run"]) == set(rows["run"])
            assert len(outcomes) == 20 * len(rows)
    assert results.attacks["newly_broken"].sum() > 10
    found = verify(tmp_path, hpm, samples)
    assert found.passed, [check for check in found.checks if not check.passed]
    assert found.replayed == found.claims > 20


def test_peers_change_nothing_in_our_own_runs(hpm: HPM, samples: Samples) -> None:
    own = {"attack.apgd.runs": ["fc-oracle:margin", "soft-hybrid:dlr"], "attack.apgd.combine": "cascade",
           "attack.apgd.steps": 5, "attack.recombination.passes": 20, "attack.square.queries": 10,
           "threat.contexts": ["joint", "solo"]}  # fmt: skip
    peers = [{"name": "autoattack:apgd-ce", "steps": 5, "surrogates": ["ste"]}]
    without = evaluate(hpm, samples, protocol=_protocol(**own))
    beside = evaluate(hpm, samples, protocol=_protocol(**own, **{"attack.peers": peers}))
    mine = beside.attacks["loss"] != "own"
    assert (~mine).sum() == 4
    same = ["target", "context", "run", "final", "any", "newly_broken", "forwards", "backwards", "decisions"]
    pd.testing.assert_frame_equal(
        beside.attacks.loc[mine, same].reset_index(drop=True), without.attacks[same].reset_index(drop=True)
    )
    assert "notes" not in without.attacks


def test_leaving_the_ball_is_in_the_row_the_table_and_the_page(
    hpm: HPM, samples: Samples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _toy(monkeypatch, lambda model, x, y: x + 0.1, gradient_free=True)
    evaluate(hpm, samples, protocol=_protocol({"name": "autoattack:square"}), out=tmp_path)
    results = Results.load(tmp_path)
    message = "20 points left the ball by up to 0.04 and were projected"
    attacked = {  # where rows are decided apart, only what is right to begin with
        "defense": 20,
        "fc": int(results.samples.query("target == 'fc' and context == 'joint'")["clean_correct"].sum()),
    }
    notes = dict(zip(results.attacks["target"], results.attacks["notes"], strict=True))
    assert notes == {name: f"outside: {message.replace('20', str(count), 1)}" for name, count in attacked.items()}
    assert (results.outcomes["perturbation"] <= EPS + 1e-6).all()
    table = " ".join(render_table(results).split())
    assert f"target:autoattack:square:0 (defense): outside: {message}" in table
    page = render_page(results)
    assert "What third-party attacks did that had to be corrected (2 runs)" in page
    assert message in page


def test_without_a_fault_nothing_is_told(
    hpm: HPM, samples: Samples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _toy(monkeypatch, lambda model, x, y: (x + 0.05).clamp(0, 1), gradient_free=True)
    evaluate(hpm, samples, protocol=_protocol({"name": "autoattack:square"}), out=tmp_path)
    results = Results.load(tmp_path)
    assert results.attacks["notes"].tolist() == ["", ""]
    assert "outside" not in render_table(results)
    assert "What third-party attacks did" not in render_page(results)


def test_a_peer_that_fails_is_an_error(hpm: HPM, samples: Samples, monkeypatch: pytest.MonkeyPatch) -> None:
    _toy(monkeypatch, lambda model, x, y: x * torch.nan, gradient_free=True)
    with pytest.raises(
        AttackError, match="run target:autoattack:square:0, batch 0: it returned 10 points that are not"
    ):
        evaluate(hpm, samples, protocol=_protocol({"name": "autoattack:square"}))


def test_a_model_without_a_trunk_is_attacked_through_its_own_gradient(hpm: HPM, samples: Samples) -> None:
    protocol = _protocol({"name": "autoattack:apgd-t", "steps": 5}, contexts=("joint", "solo"))
    results = evaluate(hpm.fc_target, samples, protocol=protocol)
    whole = evaluate(nn.Sequential(hpm.trunk, hpm.fc).eval(), samples, protocol=protocol)
    assert set(whole.attacks["run"]) == {"ste:autoattack:apgd-t:0"}
    assert whole.summary["value"].tolist() == results.summary["value"].tolist()


class _Noisy(nn.Module):
    """An FC head whose logits are jittered anew each time."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        logits = self.model(x)
        return logits + 0.3 * torch.randn_like(logits)


def test_chance_in_a_target_is_not_seeded_away(
    hpm: HPM, samples: Samples, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A peer that waits for a lucky draw, and seeds it again for the verdict, breaks no more than an honest one."""

    def lucky(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        worst = torch.full(y.shape, -torch.inf)
        for seed in range(20):
            torch.manual_seed(seed)
            with torch.no_grad():
                worst = worst.maximum((model(x).argmax(dim=1) != y).float())
        torch.manual_seed(0)
        return x

    _toy(monkeypatch, lucky, gradient_free=True)
    target = _Noisy(hpm.fc_target).eval()
    results = evaluate(
        target, samples, protocol=_protocol({"name": "autoattack:square"}), out=tmp_path, save_adversarial=True
    )
    assert results.run["draws"] == {"defense": 9}
    assert results.attacks["any"].iloc[0] == results.summary.set_index("metric")["value"]["clean"]
    assert "seed: the global generators were seeded in 2 batches" in results.attacks["notes"].iloc[0]


def test_the_same_seed_gives_the_same_rows(hpm: HPM, samples: Samples) -> None:
    protocol = _protocol({"name": "autoattack:square", "queries": 40}, {"name": "autoattack:apgd-dlr", "steps": 5})
    first, again, other = (evaluate(hpm, samples, protocol=protocol, seed=seed) for seed in (0, 0, 1))
    pd.testing.assert_frame_equal(first.outcomes, again.outcomes)
    assert not first.outcomes.equals(other.outcomes)


@pytest.mark.parametrize(
    ("peer", "message"),
    [
        ({"name": "autoattack:apgd-t", "surrogates": ["target"]}, "follows gradients, and the hard target has none"),
        ({"name": "autoattack:fab-t", "restarts": 2}, "starts at the clean images and draws nothing"),
        ({"name": "autoattack:fab-t", "surrogates": ["fc-orcale"]}, "did you mean 'fc-oracle'"),
        ({"name": "autoattack:fab-t", "step": 3}, r"did you mean 'steps'\?\); it takes: steps, targets"),
    ],
)
def test_mistakes_are_told_before_any_attack(
    peer: dict[str, Any], message: str, hpm: HPM, samples: Samples, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attack.ExternalAttack, "__call__", lambda *_: pytest.fail("an attack was made"))
    with pytest.raises(ValueError, match=message):
        evaluate(hpm, samples, protocol=_protocol(peer))


def test_too_few_classes_for_apgd_t() -> None:
    with torch.random.fork_rng():
        three = make_hpm(3)
    samples = make_samples(three.fc_target, 10)
    with pytest.raises(ValueError, match="autoattack:apgd-t needs at least 4 classes, but the model has 3"):
        evaluate(three, samples, protocol=_protocol({"name": "autoattack:apgd-t"}))


@pytest.mark.parametrize(
    ("peers", "message"),
    [
        ([], "expected tables"),
        (["autoattack:fab"], "expected tables"),
        ([{"steps": 3}], r"expected tables .* \(a text\)"),
        ([{"name": "foolbx:LinfPGD"}], r"unknown peer 'foolbx:LinfPGD' \(did you mean foolbox:LinfPGD\?\)"),
        ([{"name": "foolbox"}], r"unknown peer 'foolbox' \(did you mean foolbox:NAME\?\); expected library:attack"),
        ([{"name": "autoattack:fab", "restarts": 0}], "a whole number, at least 1"),
        ([{"name": "autoattack:fab", "surrogates": "ste"}], "a list of different names"),
        ([{"name": "autoattack:fab", "steps": [3]}], "and a number, a text, true or false for steps"),
    ],
)
def test_the_file_is_checked(peers: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_protocol(dict(_protocol({"name": "autoattack:fab"}).values) | {"attack.peers": peers})


def test_a_protocol_with_peers_survives_its_own_text(tmp_path: Path) -> None:
    text = """
schema = 1
name = "with-peers"
version = 1
description = "Ours and others'."
[threat]
norm = "Linf"
eps = "8/255"
[attack.square]
queries = 10
[[attack.peers]]
name = "autoattack:fab-t"
surrogates = ["fc-oracle", "soft-hybrid"]
steps = 50
[[attack.peers]]
name = "torchattacks:PGD"
alpha = "2/255"
random_start = false
"""
    (tmp_path / "p.toml").write_text(text)
    protocol = load_protocol(tmp_path / "p.toml")
    first, second = protocol.peers
    assert first == ("autoattack:fab-t", ("fc-oracle", "soft-hybrid"), 1, {"steps": 50})
    assert second == ("torchattacks:PGD", (), 1, {"alpha": "2/255", "random_start": False})
    again = make_protocol(tomllib.loads(protocol.text()))
    assert again.digest() == protocol.digest()
    assert again.peers == protocol.peers
    changed = load_protocol("quick", overrides={"attack.peers": [{"name": "autoattack:square"}]})
    assert changed.modified
    assert [peer.name for peer in changed.peers] == ["autoattack:square"]
