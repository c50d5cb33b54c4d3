"""The gallery shows what was broken, as the target sees it; it changes no number, and a hostile file is refused."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from toys import make_classifier, make_hpm, make_samples

from msa_eval import HPM, Results, Samples, evaluate, verify
from msa_eval.evidence import gallery
from msa_eval.evidence.folder import GALLERY
from msa_eval.evidence.proof import Proof
from msa_eval.judging import exhibits

FAST = {"attack.square.queries": 5, "attack.apgd.steps": 4, "threat.eps": 0.2, "audit.samples": 0}


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> tuple[HPM, Samples, Path]:
    folder = tmp_path_factory.mktemp("results") / "run"
    hpm, samples = make_hpm(), make_samples(make_classifier(), 24)
    evaluate(hpm, samples, protocol="quick", overrides=FAST, out=folder)
    return hpm, samples, folder


def test_it_shows_broken_samples_as_the_target_sees_them(case: tuple[HPM, Samples, Path]) -> None:
    """Clean logits are made again from the data; points lie in the ball; what is shown is broken, and counted so."""
    hpm, samples, folder = case
    results, shown = Results.load(folder), gallery.read(folder / GALLERY)
    rows = results.samples[results.samples["target"] == "defense"].set_index("index")
    assert 1 < len(shown) <= gallery.LIMIT
    assert len({one.index for one in shown}) == len(shown)
    for one in shown:
        row = rows.loc[one.index]
        assert row["clean_correct"]
        assert not row["robust"]
        assert one.logits.argmax() != row["label"]
        batch = results.batches[results.batches["batch"] == row["batch"]].sort_values("position")["index"]
        with torch.no_grad():
            logits = hpm(samples.images(torch.tensor(batch.tolist())))[row["position"]]
        assert one.clean_logits == pytest.approx(logits.numpy(), abs=1e-5)
        image = samples.x[one.index].numpy()
        assert np.abs(one.clean / 255 - image).max() <= 0.5 / 255 + 1e-6
        assert np.abs(one.delta.astype(float)).max() <= 0.2 * (1 + 1e-3)
    broken = rows[rows["clean_correct"] & ~rows["robust"]]
    assert len(set(rows.loc[[one.index for one in shown], "label"])) == min(len(shown), broken["label"].nunique())


def test_leaving_it_out_changes_no_number(case: tuple[HPM, Samples, Path], tmp_path: Path) -> None:
    hpm, samples, folder = case
    evaluate(hpm, samples, protocol="quick", overrides=FAST, out=tmp_path, save_gallery=False)
    assert not (tmp_path / GALLERY).exists()
    for path in folder.glob("*.csv"):
        assert path.read_bytes() == (tmp_path / path.name).read_bytes(), path.name


def test_the_same_evaluation_gives_the_same_bytes_and_other_results_take_it_away(
    case: tuple[HPM, Samples, Path], tmp_path: Path
) -> None:
    hpm, samples, folder = case
    evaluate(hpm, samples, protocol="quick", overrides=FAST, out=tmp_path)
    assert (tmp_path / GALLERY).read_bytes() == (folder / GALLERY).read_bytes()
    Results.load(tmp_path).save(tmp_path)
    assert (tmp_path / GALLERY).read_bytes() == (folder / GALLERY).read_bytes()
    assert Results.load(tmp_path).run["files"] == Results.load(folder).run["files"]
    (tmp_path / GALLERY).write_bytes(b"another")
    Results.load(tmp_path).save(tmp_path)
    assert not (tmp_path / GALLERY).exists()


def test_other_results_leave_a_folder_named_as_the_page_and_tell_of_old_figures(
    case: tuple[HPM, Samples, Path], tmp_path: Path
) -> None:
    results = Results.load(case[2])
    results.save(tmp_path)
    (tmp_path / "figures").mkdir()
    (tmp_path / "report.html").mkdir()
    results.save(tmp_path)
    other = dataclasses.replace(results, run=dict(results.run) | {"key": "another"})
    with pytest.warns(UserWarning, match="figures is still of the results before"):
        other.save(tmp_path, force=True)
    assert (tmp_path / "report.html").is_dir()


def test_verify_finds_a_changed_bit(case: tuple[HPM, Samples, Path], tmp_path: Path) -> None:
    hpm, samples, folder = case
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    checks = {check.name: check for check in verify(tmp_path, hpm, samples).checks}
    assert checks["hashes"].passed
    content = bytearray((tmp_path / GALLERY).read_bytes())
    content[-1] ^= 1
    (tmp_path / GALLERY).write_bytes(content)
    found = {check.name: check for check in verify(tmp_path, hpm, samples).checks}["hashes"]
    assert found.passed is False
    assert GALLERY in found.detail


def test_a_missing_gallery_is_no_tampering(case: tuple[HPM, Samples, Path], tmp_path: Path) -> None:
    hpm, samples, folder = case
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / GALLERY).unlink()
    found = {check.name: check for check in verify(tmp_path, hpm, samples).checks}["hashes"]
    assert found.passed
    assert f"{GALLERY} is missing and was not checked" in found.detail


@pytest.mark.parametrize("part", ["spread", "pack"])
def test_a_gallery_that_can_not_be_made_costs_no_evaluation(
    part: str, case: tuple[HPM, Samples, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise KeyError("broken")

    hpm, samples, folder = case
    monkeypatch.setattr(exhibits if part == "spread" else gallery, part, fail)
    with pytest.warns(UserWarning, match="no gallery could be made"):
        evaluate(hpm, samples, protocol="quick", overrides=FAST, out=tmp_path)
    assert not (tmp_path / GALLERY).exists()
    assert (tmp_path / "outcomes.csv").read_bytes() == (folder / "outcomes.csv").read_bytes()


class _Wrong:
    """A replay that says class 0 to everything."""

    batches = ((7,),)

    def logits(self, _: Proof) -> torch.Tensor:
        return torch.tensor([[1.0, 0.0]])


@pytest.mark.parametrize(("shape", "count"), [((3, 4, 4), 3), ((1, 4, 4), 3), ((2, 4, 4), 0), ((3, 2600, 4000), 1)])
def test_what_could_not_be_read_again_is_not_made(shape: tuple[int, int, int], count: int, tmp_path: Path) -> None:
    """Two channels are no picture; of 12 megapixels, 94 MB each, one fits."""
    point = torch.zeros(1, *shape)
    proof = Proof("defense", "joint", 0, "rows", torch.tensor([0]), point)
    made = exhibits.exhibit([exhibits.Candidate(proof, 1, "run", point[0], torch.ones(2))] * 3, _Wrong())  # type: ignore[arg-type]
    assert len(made) == count
    if made:
        (tmp_path / GALLERY).write_bytes(gallery.pack(made))
        assert len(gallery.read(tmp_path / GALLERY)) == count


def _parts(n: int = 2) -> dict[str, np.ndarray]:
    return {
        "clean": np.zeros((n, 3, 2, 2), np.uint8), "delta": np.zeros((n, 3, 2, 2), np.float16),
        "clean_logits": np.zeros((n, 4), np.float32), "logits": np.zeros((n, 4), np.float32),
    }  # fmt: skip


ENTRIES = [{"target": "defense", "context": "joint", "index": i} for i in range(2)]


@pytest.mark.parametrize(
    ("change", "entries", "message"),
    [
        ({}, ENTRIES[:1], "fit together"),
        ({"delta": np.zeros((2, 3, 2, 3), np.float16)}, ENTRIES, "fit together"),
        ({"delta": np.full((2, 3, 2, 2), np.nan, np.float16)}, ENTRIES, "not finite"),
        ({"clean": np.zeros((2, 3, 2, 2), np.float32)}, ENTRIES, "expected the tensors"),
        ({"more": np.zeros(1)}, ENTRIES, "expected the tensors"),
        ({}, [{}, {}], "not a readable gallery"),
        ({}, [ENTRIES[0], ENTRIES[1] | {"index": math.inf}], "no whole number"),
        ({}, [ENTRIES[0], ENTRIES[1] | {"index": True}], "no whole number"),
        ({}, 7, "not a readable gallery"),
        ({name: value[:, :0] if value.ndim == 4 else value for name, value in _parts().items()}, ENTRIES, "channels"),
    ],
)
def test_a_malformed_file_is_refused(
    change: dict[str, np.ndarray], entries: object, message: str, tmp_path: Path
) -> None:
    about = {"format_version": gallery.FORMAT_VERSION, "exhibits": entries}
    save_file(_parts() | change, tmp_path / GALLERY, metadata={"gallery": json.dumps(about)})
    with pytest.raises(ValueError, match=message):
        gallery.read(tmp_path / GALLERY)


@pytest.mark.parametrize("content", [b"", b"\x80\x04K\x01.", b"\xff" * 64])
def test_what_is_no_safetensors_file_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / GALLERY).write_bytes(content)
    with pytest.raises(ValueError, match="not a readable gallery"):
        gallery.read(tmp_path / GALLERY)
