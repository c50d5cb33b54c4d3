"""``threat.levels``: every point that is judged lies on the grid, whichever attack, context and target it is for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from toys import make_classifier, make_hpm, make_samples

from msa_eval import Samples, evaluate, verify
from msa_eval.attacks.external.libraries import installed
from msa_eval.attacks.grid import off_grid
from msa_eval.data.levels import onto_levels
from msa_eval.engine.ray_executor import _flat, _shared
from msa_eval.evidence.folder import ARCHIVE
from msa_eval.evidence.results import run_digest
from msa_eval.hashing import file_hash
from msa_eval.judging.break_record import BreakRecord
from msa_eval.protocols import Protocol, load_protocol, make_protocol

SMALL: dict[str, Any] = {
    "schema": 1, "name": "small", "version": 1, "description": "A test.", "audit.samples": 0,
    "threat": {"norm": "Linf", "eps": 0.1, "levels": 256, "contexts": ["joint", "solo", "alone", "composed"]},
    "batches": {"size": 8},
    "attack": {
        "apgd": {
            "combine": "cascade", "steps": 3, "overtime": 6,
            "runs": ["fc-oracle:margin", "ste:margin:companions", "ste:dlr-malt"],
        },
        "recombination": {"runs": ["soft-hybrid:margin"], "steps": 2, "passes": 30, "sweeps": 1, "classes": 2},
        "square": {"queries": 5}, "spsa": {"queries": 5}, "composition": {"trials": 10},
    },
}  # fmt: skip


def _small(**overrides: Any) -> Protocol:
    return make_protocol(SMALL, overrides={key.replace("__", "."): value for key, value in overrides.items()})


@pytest.fixture
def judged(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How far from the grid each batch was that a verdict was entered on."""
    seen: list[float] = []
    for name in ("enter", "enter_companions", "prefer"):
        enter = getattr(BreakRecord, name)

        def watched(self: BreakRecord, *given: Any, _enter: Any = enter, **more: Any) -> None:
            point = next(one for one in given if hasattr(one, "z"))
            seen.append(off_grid(point.x, self._ball.levels or 2))
            _enter(self, *given, **more)

        monkeypatch.setattr(BreakRecord, name, watched)
    return seen


def _eight_bits(samples: Samples) -> Samples:
    return Samples((samples.x * 255).round().to(torch.uint8), samples.y)


@pytest.mark.parametrize("norm", ["Linf", "L2", "L1"])
def test_every_attack_is_judged_on_the_grid_in_every_context(norm: str, judged: list[float], tmp_path: Path) -> None:
    hpm = make_hpm()
    samples = _eight_bits(make_samples(hpm, 16))
    eps = {"Linf": 0.1, "L2": 0.3, "L1": 0.8}[norm]
    protocol = _small(threat__norm=norm, threat__eps=eps)
    results = evaluate(
        hpm, samples, protocol=protocol, fc=False, found_surrogates=False, out=tmp_path, save_adversarial=True
    )
    assert {"apgd", "pursuit", "square", "spsa", "overtime", "composition"} <= set(results.attacks["attack"])
    assert (~results.samples["robust"] & results.samples["clean_correct"]).any()
    assert len(judged) > 100
    assert max(judged) == 0
    found = verify(tmp_path, hpm, samples)
    assert found.passed, found.checks
    assert any("on the grid of 256 levels" in check.detail for check in found.checks)
    points = [part for name, part in load_file(tmp_path / ARCHIVE).items() if name.endswith(("/x", "/own"))]
    assert {part.dtype for part in points} == {torch.uint8}


@pytest.mark.skipif(not installed("autoattack"), reason="pyautoattack is not installed")
def test_attacks_of_others_are_judged_on_the_grid(judged: list[float]) -> None:
    classifier = make_classifier()
    protocol = make_protocol({
        "schema": 1, "name": "peers", "version": 1, "description": "A test.", "audit.samples": 0,
        "threat": {"norm": "Linf", "eps": 0.1, "levels": 256}, "batches": {"size": 8},
        "attack": {"peers": [{"name": "autoattack:apgd-ce", "steps": 3}, {"name": "autoattack:square", "queries": 5}]},
    })  # fmt: skip
    evaluate(classifier, _eight_bits(make_samples(classifier, 16)), protocol=protocol)
    assert judged
    assert max(judged) == 0


def test_images_off_the_grid_are_rounded_first_and_that_is_said(tmp_path: Path) -> None:
    hpm = make_hpm()
    samples, notes = make_samples(hpm, 16), list[str]()
    given: dict[str, Any] = {
        "protocol": _small(threat__contexts=["joint"], threat__levels=17),
        "fc": False,
        "found_surrogates": False,
    }
    results = evaluate(hpm, samples, out=tmp_path, save_adversarial=True, notify=notes.append, **given)
    assert any("17 levels" in note for note in notes)
    assert results.run["data"]["prepared"] == "rounded to 17 levels"
    assert results.run["data"]["sha256"] == samples.digest()
    rounded = Samples(onto_levels(samples.x, 17), samples.y)
    same = evaluate(hpm, rounded, **given)
    assert "prepared" not in same.run["data"]
    assert results.outcomes.equals(same.outcomes)
    assert verify(tmp_path, hpm, samples).passed


def test_workers_round_the_images_too() -> None:
    samples = make_samples(make_classifier(), 12)
    index = torch.tensor([3, 1, 7])
    leveled = samples.decoded(index).leveled(17, index)
    sent = _shared(_flat(leveled))
    assert torch.equal(sent.images(index), onto_levels(samples.images(index), 17))
    assert not torch.equal(sent.images(index), samples.images(index))


def test_a_stored_point_off_the_grid_is_found(tmp_path: Path) -> None:
    """Of a grid finer than a byte's, whose points are kept as they are: one is moved within the ball."""
    hpm = make_hpm()
    samples = make_samples(hpm, 16)
    protocol = _small(threat__contexts=["solo"], threat__levels=1001)
    results = evaluate(
        hpm,
        samples,
        protocol=protocol,
        fc=False,
        found_surrogates=False,
        out=tmp_path,
        save_adversarial=True,
        notify=lambda _: None,
    )
    assert verify(tmp_path, hpm, samples).passed
    path = tmp_path / ARCHIVE
    tensors = load_file(path)
    with safe_open(path, framework="pt") as opened:
        header = opened.metadata()
    batch_model = torch.tensor(results.batches.query("batch == 0").sort_values("position")["index"].tolist())
    clean = onto_levels(samples.x, 1001)[batch_model][tensors["0/positions"]]
    tensors["0/x"] += 3e-4 * (clean - tensors["0/x"]).sign()
    save_file(tensors, path, header)
    run = json.loads((tmp_path / "run.json").read_text())
    run["adversarial"]["sha256"] = file_hash(path)
    run["sha256"] = run_digest(run)
    (tmp_path / "run.json").write_text(json.dumps(run))
    (points,) = [check for check in verify(tmp_path, hpm, samples).checks if check.name == "points"]
    assert points.passed is False
    assert "off the grid of 1001 levels" in points.detail


def test_without_levels_a_protocol_is_what_it_was() -> None:
    """The digest that ``msa`` had before there were levels can't be pinned, for the file changes; its keys can."""
    plain = load_protocol("msa")
    assert "threat.levels" not in plain.values
    assert plain.ball.levels is None
    assert repr(plain.ball) == "Ball(norm='Linf', eps=0.03137254901960784)"  # seeds of the audit go by it
    assert load_protocol("msa", overrides={"threat.levels": 256}).digest() != plain.digest()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"threat.levels": 1}, "threat.levels: expected a whole number, at least 2"),
        ({"threat.levels": 2**20}, "from 2 to 65536"),
        ({"threat.levels": 256, "threat.eps": "0.5/255"}, r"less than one step of threat.levels = 256 \(1/255\)"),
    ],
)
def test_levels_that_are_none(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_protocol("msa", overrides=given)
