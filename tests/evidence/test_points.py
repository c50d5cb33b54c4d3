"""Every sample's best point: judged anew in its batch it gives what the manifest says, and files hold it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch import Tensor
from toys import make_classifier, make_hpm, make_samples

from msa_eval import HPM, Results, Samples, evaluate, verify
from msa_eval.attacks.losses import margin_loss
from msa_eval.defense.contract import Defense
from msa_eval.evidence.points import Adversarial
from msa_eval.evidence.results import run_digest
from msa_eval.hashing import file_hash
from msa_eval.protocols import make_protocol
from msa_eval.report.export import export

CONTEXTS = ["joint", "solo", "alone", "composed"]
SMALL: dict[str, Any] = {
    "schema": 1, "name": "small", "version": 1, "description": "A test.", "audit.samples": 0,
    "threat": {"norm": "Linf", "eps": 0.02, "contexts": CONTEXTS}, "batches": {"size": 8},
    "attack": {
        "apgd": {
            "combine": "cascade", "steps": 3, "overtime": 4,
            "runs": ["fc-oracle:margin", "soft-hybrid:margin:companions", "ste:margin"],
        },
        "recombination": {"runs": ["fc-oracle:margin", "soft-hybrid:dlr"], "steps": 2, "sweeps": 1, "passes": 20},
        "square": {"queries": 4}, "composition": {"trials": 10},
    },
}  # fmt: skip


def _evaluate(out: Path, **overrides: Any) -> tuple[HPM, Samples]:
    hpm = make_hpm()
    samples = make_samples(make_classifier(), 16)
    if "threat__levels" in overrides:
        samples = Samples((samples.x * 255).round().to(torch.uint8), samples.y)
    protocol = make_protocol(SMALL, overrides={key.replace("__", "."): value for key, value in overrides.items()})
    evaluate(hpm, samples, protocol=protocol, out=out, save_adversarial="all", found_surrogates=False)
    return hpm, samples


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, HPM, Samples]:
    folder = tmp_path_factory.mktemp("results")
    return folder, *_evaluate(folder)


def _answers(points: Adversarial, x: Tensor, target: Defense, samples: Samples, batches: pd.DataFrame) -> Tensor:
    """The target's logits of some points ``(N, ...)``, each in the batch that the manifest names: put together here."""
    logits = []
    for row, about in enumerate(points.manifest.to_dict(orient="records")):
        at = about["position"]
        if about["companions"] == "adversarial":
            batch = points.batch(row)
        elif about["companions"] in ("clean", "any"):
            batch = samples.x[torch.tensor(batches.query(f"batch == {about['batch']}")["index"].tolist())].clone()
        elif about["companions"] == "none":
            batch, at = x[row : row + 1].clone(), 0
        else:
            others = samples.x[torch.tensor([int(i) for i in about["companions"].split()])]
            batch = torch.cat([others[:at], x[row : row + 1], others[at:]])
        batch[at] = x[row]
        with torch.no_grad():
            logits.append(target.logits(target.features(batch))[at])
    return torch.stack(logits)


@pytest.mark.parametrize("target", ["defense", "fc"])
@pytest.mark.parametrize("context", CONTEXTS)
def test_judged_anew_every_point_gives_what_the_manifest_says(
    target: str, context: str, held: tuple[Path, HPM, Samples]
) -> None:
    folder, hpm, samples = held
    results = Results.load(folder)
    points = results.adversarial(target, context)
    manifest = points.manifest
    assert manifest["index"].tolist() == list(range(16))
    assert torch.equal(points.y, samples.y)
    delta = (points.x - samples.x).flatten(1)
    assert float(delta.abs().max()) <= 0.02 + 1e-6
    assert 0 <= float(points.x.min()) <= float(points.x.max()) <= 1
    model: Any = hpm if target == "defense" else hpm.fc_target
    logits = _answers(points, points.x, model, samples, results.batches)
    assert logits.argmax(dim=1).tolist() == manifest["prediction"].tolist()
    np.testing.assert_allclose(-margin_loss(logits, samples.y).numpy(), manifest["margin"], atol=1e-5)
    assert (manifest["broken"] == (manifest["prediction"] != manifest["label"])).all()
    rows = results.samples.query(f"target == '{target}' and context == '{context}'").reset_index(drop=True)
    assert (manifest["broken"] == ~rows["robust"]).all()
    assert 0 < manifest["broken"].sum() < 16
    # The best of a sample that stands: no verified batch brought it nearer.
    stands = rows["robust"]
    np.testing.assert_allclose(manifest["margin"][stands], rows["min_margin"][stands], atol=1e-5)
    # It is the point that is nearest, not a clean image that a run had not reached.
    assert float(delta[torch.tensor(stands.tolist())].abs().amax(dim=1).min()) > 0
    named = set(results.attacks.query(f"target == '{target}' and context == '{context}'")["run"]) | {"clean"}
    assert set(manifest["run"]) <= named


def test_in_joint_a_point_lives_in_its_batch(held: tuple[Path, HPM, Samples]) -> None:
    points = Results.load(held[0]).adversarial()
    assert set(points.manifest["companions"]) == {"adversarial"}
    row = int(points.manifest["broken"].idxmin())
    batch = points.batch(row)
    assert torch.equal(batch[points.manifest["position"][row]], points.x[row])
    clean = held[2].x[torch.tensor(Results.load(held[0]).batches.query(
        f"batch == {points.manifest['batch'][row]}")["index"].tolist())]  # fmt: skip
    assert float((batch - clean).abs().max()) <= 0.02 + 1e-6


def test_the_points_are_verified(held: tuple[Path, HPM, Samples]) -> None:
    folder, hpm, samples = held
    found = verify(folder, hpm, samples)
    assert found.passed, found.checks
    assert found.checks[-1].name == "best points"


@pytest.mark.parametrize(
    ("column", "change", "message"),
    [
        ("prediction", lambda value: (value + 1) % 4, "not as points.csv says"),
        ("margin", lambda value: value + 1, "not as points.csv says"),
        ("index", lambda value: value + 1, "does not say what came of sample"),
    ],
)
def test_a_manifest_that_lies_is_found(
    column: str, change: Any, message: str, held: tuple[Path, HPM, Samples], tmp_path: Path
) -> None:
    folder, hpm, samples = held
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    table = pd.read_csv(tmp_path / "points.csv")
    table.loc[3, column] = change(table.loc[3, column])
    table.to_csv(tmp_path / "points.csv", index=False)
    with pytest.raises(ValueError, match="does not match the hash"):
        Results.load(tmp_path).adversarial()
    run = json.loads((tmp_path / "run.json").read_text())
    run["files"]["points.csv"] = file_hash(tmp_path / "points.csv")
    run["sha256"] = run_digest(run)
    (tmp_path / "run.json").write_text(json.dumps(run))
    last = verify(tmp_path, hpm, samples).checks[-1]
    assert last.passed is False
    assert message in last.detail


@pytest.mark.parametrize(
    ("image", "message"),
    [([100_000, 100_000, 100_000], "expected x of shape"), ([0, 2, 2], "states images"), ([-1, 2, 2], "states images")],
)
def test_a_shape_that_lies_takes_no_memory(
    image: list[int], message: str, held: tuple[Path, HPM, Samples], tmp_path: Path
) -> None:
    for path in held[0].iterdir():
        if path.is_file():
            (tmp_path / path.name).write_bytes(path.read_bytes())
    run = json.loads((tmp_path / "run.json").read_text())
    run["points"]["image"] = image
    (tmp_path / "run.json").write_text(json.dumps(run))
    with pytest.raises(ValueError, match=message):
        Results.load(tmp_path).adversarial()


def test_what_was_not_kept_is_refused_in_a_sentence(tmp_path: Path) -> None:
    classifier = make_classifier()
    protocol = make_protocol(SMALL, overrides={"threat.contexts": ["solo"]})
    samples = make_samples(classifier, 16)
    results = evaluate(classifier, samples, protocol=protocol, out=tmp_path, save_adversarial=True)
    for one in (results, Results.load(tmp_path)):
        with pytest.raises(ValueError, match=r'make the evaluation again with save_adversarial="all"$'):
            one.adversarial(context="solo")
    with pytest.raises(ValueError, match='save_adversarial="all" and out=FOLDER'):
        evaluate(classifier, samples, protocol=protocol).adversarial(context="solo")
    with pytest.raises(ValueError, match='True, False or "all"'):
        evaluate(classifier, samples, protocol=protocol, out=tmp_path, save_adversarial="some")
    with pytest.raises(ValueError, match="among defense, fc"):
        results.adversarial("other")


def test_other_results_take_the_points_away(tmp_path: Path) -> None:
    classifier = make_classifier()
    given: dict[str, Any] = {"protocol": make_protocol(SMALL, overrides={"threat.contexts": ["solo"]}), "out": tmp_path}
    samples = make_samples(classifier, 16)
    evaluate(classifier, samples, save_adversarial="all", **given)
    Results.load(tmp_path).save(tmp_path)
    assert len(Results.load(tmp_path).adversarial(context="solo").x) == 16
    evaluate(classifier, samples, **given)
    assert not list(tmp_path.glob("points.*"))


@pytest.mark.parametrize("context", ["joint", "solo"])
def test_arrays_hold_points_manifest_and_batches(context: str, held: tuple[Path, HPM, Samples], tmp_path: Path) -> None:
    place, notes = export(held[0], context=context, out=tmp_path)
    points = Results.load(held[0]).adversarial(context=context)
    with np.load(place / "adversarial.npz") as arrays:
        assert np.array_equal(arrays["x"], points.x.numpy())
        assert np.array_equal(arrays["y"], points.y.numpy())
        assert np.array_equal(arrays["broken"], points.manifest["broken"])
        assert [name for name in arrays if name.startswith("batch_")] == [f"batch_{one}" for one in points.groups]
        for group in points.groups:
            assert np.array_equal(arrays[f"batch_{group}"], points.companions(group).numpy())
    assert bool(points.groups) == (context == "joint")
    assert any("lives in its adversarial batch" in note for note in notes) == (context == "joint")
    pd.testing.assert_frame_equal(pd.read_csv(place / "manifest.csv", dtype={"companions": str}), points.manifest)


def test_pictures_without_levels_say_that_rounding_may_undo_breaks(
    held: tuple[Path, HPM, Samples], tmp_path: Path
) -> None:
    place, notes = export(held[0], format="png", context="solo", out=tmp_path)
    assert any("may undo breaks" in note and "threat.levels" in note for note in notes)
    again, _ = export(held[0], format="png", context="solo", out=tmp_path)
    assert again == place
    assert len(list((place / "images").rglob("*.png"))) == 16


@pytest.mark.parametrize("context", ["joint", "solo"])
def test_on_256_levels_pictures_are_judged_as_the_points_are(context: str, tmp_path: Path) -> None:
    hpm, samples = _evaluate(tmp_path / "results", threat__levels=256, threat__contexts=[context])
    place, notes = export(tmp_path / "results", format="png", context=context, out=tmp_path / "out")
    assert not any("undo" in note for note in notes)
    results = Results.load(tmp_path / "results")
    points = results.adversarial(context=context)
    manifest = pd.read_csv(place / "manifest.csv")
    read = torch.stack([_read(place / file) for file in manifest["file"]])
    assert torch.equal(read, points.x)
    for group in points.groups:
        images = [_read(path) for path in sorted((place / "batches" / str(group)).iterdir())]
        assert torch.equal(torch.stack(images), points.companions(group))
    eight = Samples(samples.images(torch.arange(16)), samples.y)
    logits = _answers(points, read, hpm, eight, results.batches)
    assert logits.argmax(dim=1).tolist() == manifest["prediction"].tolist()
    assert manifest["broken"].any()
    assert not manifest["broken"].all()


def _read(path: Path) -> Tensor:
    with Image.open(path) as image:
        pixels = torch.from_numpy(np.asarray(image).copy())
    return (pixels.permute(2, 0, 1) if pixels.ndim == 3 else pixels.unsqueeze(0)).float() / 255


def test_an_export_overwrites_nothing_else(held: tuple[Path, HPM, Samples], tmp_path: Path) -> None:
    (tmp_path / "defense-joint").mkdir()
    (tmp_path / "defense-joint" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"thesis\.txt, which is not an export"):
        export(held[0], out=tmp_path)
    with pytest.raises(ValueError, match="expected the format npz or png"):
        export(held[0], format="jpg", out=tmp_path)
