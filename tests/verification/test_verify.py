"""Verification: honest results pass, and every kind of tampering is found."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from proofs import make_content, make_results
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from toys import make_classifier, make_hpm, make_samples

from msa_eval import HPM, Results, Samples, evaluate
from msa_eval.attacks.ball import Ball
from msa_eval.evidence import metrics
from msa_eval.evidence.archive import read
from msa_eval.evidence.folder import ARCHIVE
from msa_eval.evidence.proof import Proof
from msa_eval.evidence.results import run_digest
from msa_eval.judging.replay import Replay
from msa_eval.verification.referee import NEAR
from msa_eval.verification.reopen import reopen
from msa_eval.verification.verify import Verification, verify

NAMES = ["run.json", "hashes", "tables", "protocol", "weights", "data", "numbers", "batches", "samples", "trunk",
         "clean", "archive", "points", "replay"]  # fmt: skip
FILES = ["run.json", "summary.csv", "attacks.csv", "samples.csv", "outcomes.csv", "batches.csv", ARCHIVE]


@pytest.fixture(scope="module")
def hpm() -> HPM:
    return make_hpm()


@pytest.fixture(scope="module")
def samples(hpm: HPM) -> Samples:
    return make_samples(hpm.fc_target, 24)


@pytest.fixture(scope="module")
def honest(hpm: HPM, samples: Samples, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("honest")
    make_results(hpm, samples, folder)
    return folder


@pytest.fixture
def folder(honest: Path, tmp_path: Path) -> Path:
    shutil.copytree(honest, tmp_path / "r")
    return tmp_path / "r"


def _failed(found: Verification) -> dict[str, str]:
    return {check.name: check.detail for check in found.checks if check.passed is False}


def _open(found: Verification) -> dict[str, str]:
    return {check.name: check.detail for check in found.checks if check.passed is None}


def _seal(folder: Path, change: Callable[[dict[str, Any]], None] = lambda run: None) -> None:
    """Make all hashes anew, as anybody can who changes a file."""
    run = json.loads((folder / "run.json").read_text())
    run["files"] = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.csv")}
    if (folder / ARCHIVE).exists() and "adversarial" in run:
        run["adversarial"]["sha256"] = hashlib.sha256((folder / ARCHIVE).read_bytes()).hexdigest()
    change(run)
    run["sha256"] = run_digest(run)
    (folder / "run.json").write_text(json.dumps(run, indent=2, ensure_ascii=False) + "\n")


def _edit(folder: Path, name: str, change: Callable[[pd.DataFrame], Any]) -> None:
    path = folder / f"{name}.csv"
    table = pd.read_csv(path)
    for column in ("broken_at", "first_iterate"):
        if column in table:
            table[column] = table[column].astype("Int64")
    changed = change(table)
    (table if changed is None else changed).to_csv(path, index=False, lineterminator="\n")


def _row(table: pd.DataFrame, context: str = "joint", target: str = "defense", **where: Any) -> int:
    """The label of the first row of these values."""
    chosen = (table["target"] == target) & (table["context"] == context)
    for column, value in where.items():
        chosen &= table[column] == value
    return int(np.flatnonzero(chosen)[0])


def _archive(folder: Path) -> tuple[list[dict[str, Any]], dict[str, Tensor], dict[str, str]]:
    with safe_open(folder / ARCHIVE, framework="pt") as opened:
        header = dict(opened.metadata())
    return json.loads(header["proofs"]), load_file(folder / ARCHIVE), header


def _rewrite(folder: Path, change: Callable[[list[dict[str, Any]], dict[str, Tensor]], None]) -> None:
    entries, tensors, header = _archive(folder)
    change(entries, tensors)
    save_file(tensors, folder / ARCHIVE, metadata={**header, "proofs": json.dumps(entries)})
    _seal(folder)


def test_honest_results_pass(honest: Path, hpm: HPM, samples: Samples) -> None:
    found = verify(honest, hpm, samples)
    assert [(check.name, check.passed) for check in found.checks] == [(name, True) for name in NAMES]
    assert found.passed
    assert found.intact
    table = Results.load(honest).samples
    assert found.claims == found.replayed == int((table["clean_correct"] & ~table["robust"]).sum()) > 30
    assert found.unproven == 0
    assert {p.kind for p in read(honest / ARCHIVE, _clean_of(honest, samples), Ball("Linf", 0.05))} == {"batch", "rows"}
    again = verify(honest, hpm, samples.x, samples.y.numpy())
    assert again.checks == found.checks


def _clean_of(folder: Path, samples: Samples) -> Callable[[int], Tensor]:
    batches = Results.load(folder).batches
    return lambda number: samples.images(torch.tensor(batches[batches["batch"] == number]["index"].tolist()))


def test_l2_and_one_context(tmp_path: Path, hpm: HPM, samples: Samples) -> None:
    make_results(hpm, samples, tmp_path, **{"threat.norm": "L2", "threat.eps": 0.2, "threat.contexts": ["solo"]})
    assert verify(tmp_path, hpm, samples).passed


def test_without_an_archive_all_else_is_checked(folder: Path, hpm: HPM, samples: Samples) -> None:
    (folder / ARCHIVE).unlink()
    _seal(folder, lambda run: run.pop("adversarial"))
    found = verify(folder, hpm, samples)
    assert _failed(found) == {}
    claims = found.claims
    assert _open(found) == {"replay": f"replayed 0 of {claims} claims: the run was made without save_adversarial=True"}
    assert not found.passed
    assert found.intact
    assert (found.replayed, found.unproven) == (0, claims)


def test_without_hashes_it_says_so(folder: Path, hpm: HPM, samples: Samples) -> None:
    run = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({k: v for k, v in run.items() if k not in ("files", "sha256")}))
    found = verify(folder, hpm, samples)
    assert found.intact
    assert not found.passed
    assert list(_open(found)) == ["hashes"]
    assert "carries no hashes" in _open(found)["hashes"]


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_is_found_in_every_file(name: str, folder: Path, hpm: HPM, samples: Samples) -> None:
    raw = (folder / name).read_bytes()
    generator = np.random.default_rng(0)
    for at, bit in zip(generator.integers(0, len(raw), 12), generator.integers(0, 8, 12), strict=True):
        flipped = bytearray(raw)
        flipped[at] ^= 1 << int(bit)
        (folder / name).write_bytes(flipped)
        found = verify(folder, hpm, samples)
        assert not found.intact, (name, at, bit)
        if name != "run.json":
            check = "archive" if name == ARCHIVE else "hashes"
            assert _failed(found)[check].startswith(f"{name} was tampered with")
    (folder / name).write_bytes(raw)
    assert verify(folder, hpm, samples).passed


@pytest.mark.parametrize("name", FILES[1:])
def test_a_missing_or_empty_file_is_found(name: str, folder: Path, hpm: HPM, samples: Samples) -> None:
    (folder / name).write_bytes(b"")
    assert not verify(folder, hpm, samples).intact
    (folder / name).unlink()
    assert not verify(folder, hpm, samples).intact
    _seal(folder)
    assert not verify(folder, hpm, samples).intact


def test_a_table_more_or_less_is_found(folder: Path, hpm: HPM, samples: Samples) -> None:
    (folder / "extra.csv").write_text("a\n1\n")
    message = {"hashes": "extra.csv was tampered with: it does not match the hash in run.json"}
    assert _failed(verify(folder, hpm, samples)) == message
    _seal(folder)
    assert verify(folder, hpm, samples).passed
    (folder / "extra.csv").unlink()
    assert _failed(verify(folder, hpm, samples)) == message


def _swap_labels(table: pd.DataFrame) -> None:
    at = [_row(table, clean_correct=right) for right in (True, False)]
    table.loc[at, "label"] = table.loc[at[::-1], "label"].to_numpy()


def _set(column: str, value: Any, **where: Any) -> Callable[[pd.DataFrame], None]:
    def change(table: pd.DataFrame) -> None:
        table.loc[_row(table, **where), column] = value

    return change


SEALED = [
    ("samples", _swap_labels, {"samples", "numbers"}, "has label, batch and position"),
    ("samples", _set("robust", False, robust=True), {"numbers", "replay"}, "robust contradicts outcomes.csv"),
    ("samples", _set("robust", True, robust=False, clean_correct=True), {"numbers", "replay"}, "robust contradicts"),
    ("samples", _set("clean_correct", True, clean_correct=False), {"numbers", "replay"}, "clean_correct is not that"),
    ("samples", _set("clean_prediction", 9, clean_correct=False), {"clean"}, "clean_prediction 9, but is"),
    ("samples", _set("broken_by", "nobody", robust=False), {"numbers"}, "broken_by contradicts"),
    ("samples", _set("broken_at", 99, robust=False, clean_correct=True), {"numbers"}, "broken_at contradicts"),
    ("samples", _set("min_margin", 0.5, robust=False, clean_correct=True), {"numbers"}, "min_margin contradicts"),
    ("samples", _set("committed_right", False, robust=True), {"numbers"}, "never broken, but not committed_right"),
    ("samples", _set("committed_right", True, robust=False, context="solo", clean_correct=True), {"numbers"},
     "broken where it alone is attacked"),
    ("samples", _set("position", 99), {"samples"}, "has label, batch and position"),
    ("samples", lambda table: table.drop(index=3), {"numbers", "samples", "clean", "replay"}, "not about the samples"),
    ("samples", lambda table: table[table["context"] != "alone"], {"numbers", "replay"}, "no rows of defense, alone"),
    ("samples", lambda table: table.drop(columns="robust"), {"tables"}, "has no column robust"),
    ("samples", _set("index", -1), {"numbers", "samples", "clean"}, "not about the samples of samples.csv"),
    ("outcomes", _set("any_broken", True, any_broken=False), {"numbers"}, "first_iterate disagree"),
    ("outcomes", _set("final_broken", True, any_broken=False), {"numbers"}, "final_broken, but not any_broken"),
    ("outcomes", _set("perturbation", 0.06), {"numbers"}, "perturbation is larger than 0.05"),
    ("outcomes", _set("surrogate_fooled", True, surrogate_fooled=False), {"numbers"}, "surrogate_accuracy of"),
    ("outcomes", _set("min_margin", -1.0, any_broken=False), {"numbers"}, "min_margin contradicts"),
    ("attacks", _set("final", 0.9), {"numbers"}, "final of"),
    ("attacks", _set("newly_broken", 0), {"numbers"}, "newly_broken of"),
    ("attacks", lambda table: table.iloc[1:], {"numbers"}, "name different runs"),
    ("summary", _set("value", 0.9, metric="worst_case"), {"numbers"}, "value of worst_case is 0.9"),
    ("summary", _set("low", 0.3, metric="worst_case"), {"numbers"}, "low of worst_case"),
    ("summary", _set("n", 25, metric="clean"), {"numbers"}, "n of clean"),
    ("summary", lambda table: table[table["metric"] != "paper"], {"numbers"}, "has no paper"),
    ("summary", lambda table: pd.concat([table, table.iloc[:1]]), {"tables"}, "two rows of the same target, context"),
    ("samples", lambda table: table.iloc[:0], {"tables"}, "samples.csv has no rows"),
    ("samples", _set("target", "another"), {"tables"}, "names the target 'another'"),
    ("batches", lambda table: table.iloc[::-1], {"batches"}, "not the plan that the protocol makes"),
    ("batches", lambda table: table.assign(position=table["position"] + 1), {"batches"}, "not the plan"),
]  # fmt: skip


@pytest.mark.parametrize(("table", "change", "checks", "message"), SEALED)
def test_a_changed_table_is_found_though_all_hashes_are_made_anew(
    table: str, change: Any, checks: set[str], message: str, folder: Path, hpm: HPM, samples: Samples
) -> None:
    _edit(folder, table, change)
    _seal(folder)
    failed = _failed(verify(folder, hpm, samples))
    assert set(failed) == checks
    assert any(message in detail for detail in failed.values()), failed


def _lie(folder: Path, *, broken: bool) -> int:
    """Tell of one sample the contrary, consistently through all tables; its index."""
    tables = {name: pd.read_csv(folder / f"{name}.csv") for name in
              ("samples", "outcomes", "attacks", "summary")}  # fmt: skip
    rows, outcomes = tables["samples"], tables["outcomes"]
    at = _row(rows, robust=broken, clean_correct=True)
    index = int(rows.loc[at, "index"])
    runs = tables["attacks"].query("target == 'defense' and context == 'joint'")["run"].tolist()
    mine = (outcomes["target"] == "defense") & (outcomes["context"] == "joint") & (outcomes["index"] == index)
    last = mine & (outcomes["run"] == runs[-1])
    if broken:
        outcomes.loc[last, ["any_broken", "first_iterate", "min_margin"]] = [True, 3, -0.5]
        rows.loc[at, ["robust", "broken_by", "broken_at", "min_margin"]] = [False, runs[-1], 3, -0.5]
    else:
        outcomes.loc[mine, ["any_broken", "final_broken", "first_iterate", "min_margin"]] = [False, False, None, 0.5]
        rows.loc[at, ["robust", "broken_by", "broken_at", "min_margin", "committed_right"]] = [
            True,
            None,
            None,
            0.5,
            True,
        ]
    _recount_by_hand(tables, runs)
    for name, table in tables.items():
        for column in ("broken_at", "first_iterate"):
            if column in table:
                table[column] = table[column].astype("Int64")
        table.to_csv(folder / f"{name}.csv", index=False, lineterminator="\n")
    _seal(folder)
    return index


def _recount_by_hand(tables: dict[str, pd.DataFrame], runs: list[str]) -> None:
    where = "target == 'defense' and context == 'joint'"
    rows, outcomes = tables["samples"].query(where), tables["outcomes"].query(where)
    right = rows["clean_correct"].to_numpy(dtype=bool)
    unbroken, finals = right.copy(), []
    for run in runs:
        part = outcomes[outcomes["run"] == run]
        ever, final = part["any_broken"].to_numpy(dtype=bool), part["final_broken"].to_numpy(dtype=bool)
        finals.append(int((right & ~final).sum()))
        at = _row(tables["attacks"], run=run)
        tables["attacks"].loc[at, ["final", "any"]] = [(right & ~final).mean(), (right & ~ever).mean()]
        tables["attacks"].loc[at, "newly_broken"] = int((unbroken & ever).sum())
        unbroken &= ~ever
    counts = {"paper": min(finals), "realised": int(rows["committed_right"].sum()), "worst_case": int(unbroken.sum())}
    for metric, count in counts.items():
        at = _row(tables["summary"], metric=metric)
        tables["summary"].loc[at, ["value", "low", "high"]] = list(metrics.rate(count, len(rows)))[:3]


@pytest.mark.parametrize("broken", [True, False])
def test_a_lie_told_through_all_tables_fails_at_the_replay(
    broken: bool, folder: Path, hpm: HPM, samples: Samples
) -> None:
    index = _lie(folder, broken=broken)
    failed = _failed(verify(folder, hpm, samples))
    reason = (
        "no valid stored batch is about it" if broken else "a stored batch breaks it, but samples.csv does not say so"
    )
    assert set(failed) == {"replay"}
    assert failed["replay"].endswith(f"; sample {index} (defense, joint): {reason}")


def test_a_break_that_is_withheld_throughout_is_not_found(folder: Path, hpm: HPM, samples: Samples) -> None:
    """What the docstring says can't be known: here the proof goes together with the claim."""
    index = _lie(folder, broken=False)
    place = Results.load(folder).batches.set_index("index").loc[index]

    def forget(entries: list[dict[str, Any]], tensors: dict[str, Tensor]) -> None:
        for i, entry in enumerate(entries):
            if (entry["target"], entry["context"], entry["batch"]) == ("defense", "joint", place["batch"]):
                kept = tensors[f"{i}/positions"] != place["position"]
                tensors[f"{i}/positions"] = tensors[f"{i}/positions"][kept if bool(kept.any()) else ~kept]

    _rewrite(folder, forget)
    assert verify(folder, hpm, samples).passed


def test_what_the_run_could_not_keep_is_told(folder: Path, hpm: HPM, samples: Samples) -> None:
    _rewrite(folder, _keeping(lambda i, entry: i > 0))
    _seal(folder, lambda run: run["adversarial"].update(left_out=2, unconfirmed=[["defense", "alone", 0, 1]]))
    failed = _failed(verify(folder, hpm, samples))
    assert (
        "claims (the run left out 2 for the archive's size, and could not confirm 1 itself); sample" in failed["replay"]
    )


def test_the_batch_of_a_victim(hpm: HPM, tmp_path: Path) -> None:
    """An evaluation of one batch of the plan."""
    samples = make_samples(hpm.fc_target, 24)
    keys = {"threat.contexts": ["joint"], "attack.apgd.moves": ["batch", "companions"], "attack.apgd.victim": 5}
    results, _ = make_results(hpm, samples, tmp_path, **keys)
    assert len(results.batches) == 8
    found = verify(tmp_path, hpm, samples)
    assert [check.name for check in found.checks if not check.passed] in ([], ["replay"])


def _keeping(
    wanted: Callable[[int, dict[str, Any]], bool],
) -> Callable[[list[dict[str, Any]], dict[str, Tensor]], None]:
    """Keep some of the proofs and number them anew."""

    def change(entries: list[dict[str, Any]], tensors: dict[str, Tensor]) -> None:
        kept = [i for i, entry in enumerate(entries) if wanted(i, entry)]
        parts = {f"{new}/{name}": tensors[f"{i}/{name}"] for new, i in enumerate(kept) for name in ("positions", "x")}
        tensors.clear()
        tensors.update(parts)
        entries[:] = [entries[i] for i in kept]

    return change


def test_a_proof_that_is_gone_is_missed(folder: Path, hpm: HPM, samples: Samples) -> None:
    _rewrite(folder, _keeping(lambda i, entry: i > 0))
    found = verify(folder, hpm, samples)
    assert list(_failed(found)) == ["replay"]
    assert "no valid stored batch is about it" in _failed(found)["replay"]
    assert found.unproven > 0


def _make_exact(folder: Path, samples: Samples) -> int:
    """Put the points of the first joint batch in place of its perturbations; which proof it is."""
    proofs = read(folder / ARCHIVE, _clean_of(folder, samples), Ball("Linf", 0.05))
    at = next(i for i, proof in enumerate(proofs) if proof.kind == "batch")

    def change(entries: Any, tensors: dict[str, Tensor]) -> None:
        tensors[f"{at}/x"] = proofs[at].x.clone()

    _rewrite(folder, change)
    return at


@pytest.mark.parametrize(
    ("value", "message"),
    [(0.2, "a point lies 0.1"), (-0.9, "outside the ball or the [0, 1] box"), (torch.nan, "NaN or infinite")],
)
def test_a_point_outside_the_ball_is_found(
    value: float, message: str, folder: Path, hpm: HPM, samples: Samples
) -> None:
    at = _make_exact(folder, samples)
    assert verify(folder, hpm, samples).passed

    def move(entries: Any, tensors: dict[str, Tensor]) -> None:
        tensors[f"{at}/x"][2, 0, 0, 0] += value

    _rewrite(folder, move)
    failed = _failed(verify(folder, hpm, samples))
    assert set(failed) == {"points", "replay"}
    assert message in failed["points"]


def test_a_point_outside_the_box_is_found_though_it_is_in_the_ball(hpm: HPM, tmp_path: Path) -> None:
    bright = make_samples(hpm.fc_target, 24)
    samples = Samples(bright.x * 0.3, make_samples(hpm.fc_target, 24).y)
    make_results(hpm, samples, tmp_path, **{"threat.contexts": ["joint"]})
    at = _make_exact(tmp_path, samples)
    clean = _clean_of(tmp_path, samples)(_archive(tmp_path)[0][at]["batch"])
    darkest = np.unravel_index(int(clean.argmin()), clean.shape)
    assert float(clean.min()) > 0.02

    def move(entries: Any, tensors: dict[str, Tensor]) -> None:
        tensors[f"{at}/x"][darkest] = -0.01

    _rewrite(tmp_path, move)
    assert "a point lies " in _failed(verify(tmp_path, hpm, samples))["points"]


@pytest.mark.parametrize("outside", [0.0, 0.2])
def test_victims_are_replayed_and_held_to_the_ball(outside: float, folder: Path, hpm: HPM, samples: Samples) -> None:
    """A joint batch written as many batches, in each of which one row is replaced by what it was already."""
    at = _make_exact(folder, samples)

    def change(entries: list[dict[str, Any]], tensors: dict[str, Tensor]) -> None:
        entries[at]["kind"] = "victims"
        tensors[f"{at}/own"] = tensors[f"{at}/x"][tensors[f"{at}/positions"].long()].clone()
        tensors[f"{at}/own"][0, 0, 0, 0] += outside

    _rewrite(folder, change)
    found = verify(folder, hpm, samples)
    assert found.passed == (outside == 0)
    assert set(_failed(found)) == ({"points", "replay"} if outside else set())


def test_a_batch_that_breaks_nothing_proves_nothing(folder: Path, hpm: HPM, samples: Samples) -> None:
    def clear(entries: list[dict[str, Any]], tensors: dict[str, Tensor]) -> None:
        for i in range(len(entries)):
            tensors[f"{i}/x"] = torch.zeros_like(tensors[f"{i}/x"])

    _rewrite(folder, clear)
    found = verify(folder, hpm, samples)
    assert found.replayed == 0
    assert list(_failed(found)) == ["replay"]
    assert "its stored batch does not break it" in _failed(found)["replay"]


def test_contexts_allow_no_more_than_they_say(folder: Path, hpm: HPM, samples: Samples) -> None:
    """A joint batch is no proof in solo; one image moved is one in both."""

    def rename(kind: str, context: str) -> Callable[[list[dict[str, Any]], Any], None]:
        def change(entries: list[dict[str, Any]], _: Any) -> None:
            entry = next(e for e in entries if e["target"] == "defense" and e["kind"] == kind)
            entry["context"] = context

        return change

    original = (folder / ARCHIVE).read_bytes()
    _rewrite(folder, rename("batch", "solo"))
    failed = _failed(verify(folder, hpm, samples))
    assert "more than one image of a batch was moved" in failed["points"]
    assert "replay" in failed
    (folder / ARCHIVE).write_bytes(original)
    _rewrite(folder, lambda entries, _: entries[0].update(target="other"))
    assert "neither such a target nor such a context" in _failed(verify(folder, hpm, samples))["points"]


def test_another_checkpoint_other_data_and_another_fc(folder: Path, hpm: HPM, samples: Samples) -> None:
    found = verify(folder, make_hpm(seed=1), samples)
    assert list(_failed(found)) == ["weights"]
    assert list(_open(found)) == ["trunk", "clean", "replay"]
    assert "the defense has other weights" in _failed(found)["weights"]
    found = verify(folder, hpm, samples, fc=make_classifier(seed=3))
    assert "the fc has other weights" in _failed(found)["weights"]
    found = verify(folder, make_classifier(), samples)
    assert _failed(found)["weights"] == "the results contain defense and fc, but the model provides defense"
    found = verify(folder, hpm, samples, fc=False)
    assert _failed(found)["weights"] == "the results contain defense and fc, but the model provides defense"
    darker = Samples(samples.x * 0.99, samples.y)
    found = verify(folder, hpm, darker)
    assert list(_failed(found)) == ["data"]
    assert list(_open(found)) == ["batches", "samples", "trunk", "clean", "replay"]


def test_results_of_the_defence_alone(tmp_path: Path, hpm: HPM, samples: Samples) -> None:
    evaluate(hpm, samples, protocol=make_content(), fc=False, out=tmp_path, save_adversarial=True, save_gallery=False)
    for beside in (None, False):
        found = verify(tmp_path, hpm, samples, fc=beside)
        assert found.passed
        assert found.claims > 10
        assert set(reopen(tmp_path, hpm, samples, fc=beside).targets) == {"defense"}
    given = verify(tmp_path, hpm, samples, fc=hpm.fc_target)
    assert _failed(given) == {"weights": "the results contain defense, but the model provides defense and fc"}


def _protocol(old: str, new: str, *, rehash: bool) -> Callable[[dict[str, Any]], None]:
    def change(run: dict[str, Any]) -> None:
        about = run["protocol"]
        assert old in about["text"]
        about["text"] = about["text"].replace(old, new)
        if rehash:
            import tomllib

            from msa_eval.protocols import make_protocol

            about["sha256"] = make_protocol(tomllib.loads(about["text"])).digest()

    return change


def test_a_changed_protocol_is_found(folder: Path, hpm: HPM, samples: Samples) -> None:
    original = (folder / "run.json").read_bytes()
    _seal(folder, _protocol("eps = 0.05", "eps = 0.04", rehash=False))
    found = verify(folder, hpm, samples)
    assert "the protocol's text in run.json was tampered with" in _failed(found)["protocol"]
    (folder / "run.json").write_bytes(original)
    _seal(folder, _protocol("eps = 0.05", "eps = 0.04", rehash=True))
    failed = _failed(verify(folder, hpm, samples))
    assert "perturbation is larger than 0.04" in failed["numbers"]
    assert "replay" in failed
    (folder / "run.json").write_bytes(original)
    _seal(folder, _protocol("size = 8", "size = 6", rehash=True))
    assert "not the plan that the protocol makes" in _failed(verify(folder, hpm, samples))["batches"]
    (folder / "run.json").write_bytes(original)
    _seal(folder, lambda run: run["batches"].update(sha256="0" * 64))
    assert "another batch plan" in _failed(verify(folder, hpm, samples))["batches"]
    for change in ({"overrides": {"threat.eps": 0.01}}, {"modified": True}):
        (folder / "run.json").write_bytes(original)
        _seal(folder, lambda run, change=change: run["protocol"].update(change))
        assert "overrides" in _failed(verify(folder, hpm, samples))["protocol"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda run: run.pop("protocol"), "the field protocol is missing"),
        (lambda run: run.update(targets=[]), "the field targets must hold fields"),
        (lambda run: run["targets"].update(fc=3), "the field targets.fc must hold fields"),
        (lambda run: run["targets"].update(more={}), "the field targets.more.sha256 is missing"),
        (lambda run: run.update(schema_version=9), "schema version 9, but this release reads 1"),
        (lambda run: run.update(adversarial=[1]), "the field adversarial must hold"),
        (lambda run: run["protocol"].update(text="["), "Invalid"),
        (lambda run: run["protocol"].update(text="a = " + "[" * 5000), ""),
    ],
)
def test_a_run_json_with_holes(change: Any, message: str, folder: Path, hpm: HPM, samples: Samples) -> None:
    _seal(folder, change)
    found = verify(folder, hpm, samples)
    assert not found.intact
    assert any(message in detail for detail in _failed(found).values())


def test_an_archive_that_run_json_does_not_tell_of_or_that_is_elsewhere(
    folder: Path, hpm: HPM, samples: Samples
) -> None:
    original = (folder / "run.json").read_bytes()
    _seal(folder, lambda run: run.pop("adversarial"))
    assert "run.json does not list adversarial.safetensors" in _failed(verify(folder, hpm, samples))["archive"]
    (folder / "run.json").write_bytes(original)
    _seal(folder, lambda run: run["adversarial"].update(file="../r/adversarial.safetensors"))
    assert "is not there" in _failed(verify(folder, hpm, samples))["archive"]


def test_a_near_tie_is_called_one(folder: Path, hpm: HPM, samples: Samples, monkeypatch: pytest.MonkeyPatch) -> None:
    genuine = Replay.logits

    def tied(replay: Replay, proof: Proof) -> Tensor:
        logits = genuine(replay, proof)
        y = replay.labels(proof)
        logits[0] = -1.0
        logits[0, y[0]] += 1e-7
        return logits

    monkeypatch.setattr(Replay, "logits", tied)
    failed = _failed(verify(folder, hpm, samples))
    assert list(failed) == ["replay"]
    assert NEAR in failed["replay"]


def test_what_is_no_input_at_all(folder: Path, hpm: HPM, samples: Samples, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no complete results: there is no run\.json"):
        verify(tmp_path / "none", hpm, samples)
    with pytest.raises(ValueError, match="labels y"):
        verify(folder, hpm, samples.x)
    with pytest.raises(ValueError, match="training mode"):
        verify(folder, make_hpm().train(), samples)
    (folder / "run.json").write_text("[" * 100_000)
    assert "not readable" in _failed(verify(folder, hpm, samples))["run.json"]
    (folder / "run.json").write_text("[]")
    assert "not the run.json" in _failed(verify(folder, hpm, samples))["run.json"]


class ByMean(nn.Module):
    """A whole model without a trunk that looks at its batch."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = make_classifier()
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x - 0.5 * x.mean(dim=0) + 0.25)
        return out


@pytest.mark.filterwarnings("ignore:the defense has no trunk")
def test_a_model_without_a_trunk(tmp_path: Path) -> None:
    model = ByMean()
    samples = make_samples(model, 16)
    make_results(
        model, samples, tmp_path, watched=model,
        **{"attack.apgd.surrogates": ["ste"], "threat.contexts": ["joint", "alone"]},
    )  # fmt: skip
    found = verify(tmp_path, model, samples)
    assert found.passed, found
    assert found.claims > 0


def test_a_static_target_is_proven_in_all_contexts_at_once(tmp_path: Path) -> None:
    classifier = make_classifier()
    samples = make_samples(classifier, 16)
    make_results(classifier, samples, tmp_path)
    everything = verify(tmp_path, classifier, samples)
    assert everything.passed

    _rewrite(tmp_path, _keeping(lambda i, entry: entry["context"] == "joint"))
    found = verify(tmp_path, classifier, samples)
    assert found.passed
    assert found.replayed == everything.replayed > 0


def _replay(defense: Any, count: int = 30, size: int = 6) -> Replay:
    samples = make_samples(make_classifier(), count)
    return Replay(defense, samples, list(torch.arange(count).split(size)), device="cpu")


class Ordered(nn.Module):
    """A defence that cares who sits where."""

    def features(self, x: Tensor) -> Tensor:
        return x.flatten(1)[:, :4]

    def logits(self, z: Tensor) -> Tensor:
        return z + z.cumsum(dim=0).roll(1, dims=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.logits(self.features(x))


@pytest.mark.parametrize("make", [make_hpm, Ordered])
def test_every_kind_of_proof_is_the_batch_made_by_hand(make: Any) -> None:
    defense = make().eval()
    replay = _replay(defense)
    clean, samples = replay.images(2), replay.samples
    generator = torch.Generator().manual_seed(0)
    positions = torch.tensor([5, 0, 2])
    x, rows = torch.rand(clean.shape, generator=generator), torch.rand(3, 3, 2, 2, generator=generator)
    companions = torch.stack([torch.randperm(12, generator=generator)[:5] for _ in positions])
    about = ("defense", "joint", 2)
    cases = {
        Proof(*about, "batch", positions, x): [(x, p) for p in (5, 0, 2)],
        Proof(*about, "rows", positions, rows): [(_put(clean, p, r), p) for p, r in zip((5, 0, 2), rows, strict=True)],
        Proof(*about, "victims", positions, x, rows): [
            (_put(x, p, r), p) for p, r in zip((5, 0, 2), rows, strict=True)
        ],
        Proof("defense", "solo", 2, "rows", positions, rows): [
            (_put(clean, p, r), p) for p, r in zip((5, 0, 2), rows, strict=True)
        ],
        Proof("defense", "alone", 2, "rows", positions, rows): [(r.unsqueeze(0), 0) for r in rows],
        Proof("defense", "composed", 2, "rows", positions, rows, companions=companions): [
            (torch.cat([samples.x[c[:p]], r.unsqueeze(0), samples.x[c[p:]]]), p)
            for p, r, c in zip((5, 0, 2), rows, companions, strict=True)
        ],
    }  # fmt: skip
    for proof, batches in cases.items():
        with torch.no_grad():
            expected = torch.stack([defense(batch)[at] for batch, at in batches])
        torch.testing.assert_close(replay.logits(proof), expected, atol=1e-5, rtol=1e-5)
        assert replay.labels(proof).tolist() == samples.y[[17, 12, 14]].tolist()


def _put(batch: Tensor, at: int, row: Tensor) -> Tensor:
    changed = batch.clone()
    changed[at] = row
    return changed


@pytest.mark.parametrize(
    ("companions", "message"),
    [
        ([0, 1, 2, 3, 30], "not all in the data set"),
        ([0, 1, 2, 3, -1], "not all in the data set"),
        ([0, 1, 2, 3, 3], "not different images other than itself"),
        ([0, 1, 2, 3, 13], "not different images other than itself"),
    ],
)
def test_companions_are_other_images_of_the_data(companions: list[int], message: str, hpm: HPM) -> None:
    replay = _replay(hpm)
    proof = Proof(
        "defense",
        "composed",
        2,
        "rows",
        torch.tensor([1]),
        replay.images(2)[1:2],
        companions=torch.tensor([companions]),
    )
    with pytest.raises(ValueError, match=f"companions of sample 13 are {message}"):
        replay.logits(proof)


def test_a_replay_passes_each_clean_image_once(hpm: HPM) -> None:
    """What makes it take seconds: clean features are kept, and a row costs one pass of one image."""
    replay = _replay(hpm)
    trunk: Any = hpm.trunk
    for number in range(5):
        replay.clean_logits(number, "joint")
    trunk.images = 0
    for context in ("joint", "solo", "alone"):
        replay.clean_logits(3, context)
    positions = torch.arange(4)
    replay.logits(Proof("defense", "solo", 3, "rows", positions, torch.rand(4, 3, 2, 2)))
    companions = torch.arange(5).expand(4, 5)
    replay.logits(Proof("defense", "composed", 3, "rows", positions, torch.rand(4, 3, 2, 2), companions=companions))
    assert trunk.images == 8


def test_a_trunk_that_looks_at_the_batch_is_refused(folder: Path, hpm: HPM, samples: Samples) -> None:
    class Peeking(HPM):
        def features(self, x: Tensor) -> Tensor:
            return super().features(x) + 0.1 * len(x)

    peeking = Peeking(hpm.trunk, hpm.fc).eval()
    peeking.load_state_dict(hpm.state_dict())
    found = verify(folder, peeking, samples)
    assert list(_failed(found)) == ["trunk"]
    assert list(_open(found)) == ["clean", "replay"]


def test_saving_again_replaces_hashes_and_forgets_the_archive(folder: Path, hpm: HPM, samples: Samples) -> None:
    results = Results.load(folder)
    results.save(folder)
    assert verify(folder, hpm, samples).passed
    without = {name: value for name, value in results.run.items() if name != "adversarial"}
    dataclasses.replace(results, run=without).save(folder)
    assert not (folder / ARCHIVE).exists()
    assert verify(folder, hpm, samples).intact


def test_what_an_interrupted_run_left_does_not_block_the_next(tmp_path: Path) -> None:
    (tmp_path / ARCHIVE).write_bytes(b"half of")
    (tmp_path / f"{ARCHIVE}.part").write_bytes(b"half of")
    hpm = make_hpm()
    evaluate(
        hpm, make_samples(hpm.fc_target, 8), out=tmp_path,
        protocol=make_content(**{"attack.apgd.steps": 1, "threat.contexts": ["joint"]}),
    )  # fmt: skip
    assert not (tmp_path / ARCHIVE).exists()
