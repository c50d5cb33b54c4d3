"""Worst case against the radius: closed form, order, the same runs as at one radius alone, and going on."""

from __future__ import annotations

import dataclasses
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from click.testing import CliRunner
from toys import make_classifier, make_hpm, make_samples

from msa_eval import Samples, curve, evaluate, verify
from msa_eval.cli import main
from msa_eval.engine.batch_runner import BatchRunner
from msa_eval.protocols import Protocol, make_protocol
from msa_eval.references import reference_path
from msa_eval.report.curves import draw_curves, render_curves
from msa_eval.studies import curve as study

WEAK: dict[str, Any] = {
    "schema": 1, "name": "weak", "version": 1, "description": "A test.", "audit.samples": 0,
    "threat": {"norm": "Linf", "eps": 0.1, "contexts": ["joint", "solo"]}, "batches": {"size": 8},
    "attack": {"apgd": {"combine": "cascade", "steps": 3, "runs": ["fc-oracle:ce", "ste:margin"]}},
}  # fmt: skip
QUIET: dict[str, Any] = {"notify": lambda _: None, "found_surrogates": False}


def _weak(**overrides: Any) -> Protocol:
    return make_protocol(WEAK, overrides={key.replace("__", "."): value for key, value in overrides.items()})


def test_on_a_linear_classifier_curve_and_smallest_radii_are_the_closed_form(tmp_path: Path) -> None:
    """Two classes: a sample falls where its lead is below ε times the l1 gap of the weights."""
    classifier = make_classifier(2)
    samples = make_samples(classifier, 60, seed=4)
    samples = Samples(0.4 + 0.2 * samples.x, samples.y)
    with torch.no_grad():
        gap = (classifier.fc.weight[1] - classifier.fc.weight[0]) @ classifier.trunk.weight.T  # type: ignore[operator]
        offset = classifier.fc.bias[1] - classifier.fc.bias[0]
        lead = (samples.x.flatten(1) @ gap + offset) * (2 * samples.y - 1)
        needed = (lead / gap.abs().sum()).numpy()
    radii = [0.0, 0.02, 0.04, 0.05, 0.06]
    assert np.abs(needed[:, None] - np.array(radii)).min() > 1e-5
    found = curve(
        classifier, samples, eps=[str(one) for one in reversed(radii)], out=tmp_path,
        protocol=_weak(threat__contexts=["solo"], attack__apgd__steps=20), **QUIET,
    )  # fmt: skip
    expected = [next((one for one in radii if least < one), np.nan) for least in needed]
    np.testing.assert_array_equal(found.smallest["smallest_eps"], expected)
    assert found.table["eps"].tolist() == radii
    np.testing.assert_allclose(found.table["value"], [(needed > one).mean() for one in radii])
    assert 0 < found.table["value"].min() < found.table["value"].max() < 1
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "curve.csv", keep_default_na=False), found.table)
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "smallest_eps.csv"), found.smallest)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    out = tmp_path_factory.mktemp("curve")
    hpm = make_hpm()
    return out, curve(hpm, make_samples(hpm, 16), eps=[0, 0.02, 0.04, 0.08], protocol=_weak(), out=out, **QUIET)


def test_each_level_is_the_evaluation_at_that_radius_and_one_run_more(made: tuple[Path, Any]) -> None:
    """So nothing is robust on the curve that an evaluation at its radius alone breaks, in every context."""
    _, found = made
    hpm = make_hpm()
    keys = ["target", "context", "index"]
    for eps, results in found.results.items():
        alone = evaluate(hpm, make_samples(hpm, 16), protocol=_weak(threat__eps=eps), **QUIET)
        shared = results.outcomes[results.outcomes["run"].isin(set(alone.outcomes["run"]))]
        pd.testing.assert_frame_equal(shared.reset_index(drop=True), alone.outcomes)
        more = set(results.outcomes["run"]) - set(alone.outcomes["run"])
        assert len(more) == (0 if eps == 0.02 else 2)  # of the defence one, of the FC head one
        smallest = found.smallest.merge(alone.samples, on=keys)
        assert (smallest["robust"] | (smallest["smallest_eps"] <= eps)).all()
        rows = found.table[found.table["eps"] == eps].set_index(["target", "context"])["value"]
        worst = alone.summary[alone.summary["metric"] == "worst_case"].set_index(["target", "context"])["value"]
        assert (rows <= worst[rows.index] + 1e-12).all()


def test_the_curve_never_rises_and_starts_at_the_clean_accuracy(made: tuple[Path, Any]) -> None:
    _, found = made
    for (target, context), rows in found.table.groupby(["target", "context"]):
        assert rows["value"].is_monotonic_decreasing
        clean = found.results[0.02].samples.query(f"target == '{target}' and context == '{context}'")["clean_correct"]
        assert rows["value"].iloc[0] == clean.mean()
        assert rows["newly_broken"].sum() == round((rows["value"].iloc[0] - rows["value"].iloc[-1]) * rows["n"].iloc[0])


def test_what_fell_counts_at_larger_radii_though_the_runs_there_miss_it() -> None:
    hpm = make_hpm()
    found = curve(hpm, make_samples(hpm, 16), eps=[0.02, 0.04], protocol=_weak(threat__contexts=["solo"]), **QUIET)
    first, second = found.results.values()
    fell = first.samples.query("clean_correct and not robust")
    assert len(fell)
    missed = second.samples.assign(robust=second.samples["robust"] | second.samples["clean_correct"])
    replaced = dataclasses.replace(second, samples=missed)
    table, smallest = study.tabulate([0.02, 0.04], {0.02: first, 0.04: replaced})
    held = smallest.merge(fell[["target", "context", "index"]])
    assert (held["smallest_eps"] == 0.02).all()
    values = table.set_index(["target", "context", "eps"])["value"].unstack()
    assert (values[0.04] == values[0.02]).all()


def test_the_last_run_starts_at_the_points_before_as_much_further_away(monkeypatch: pytest.MonkeyPatch) -> None:
    hpm = make_hpm()
    samples = make_samples(hpm, 16)
    seen: list[tuple[torch.Tensor, torch.Tensor, float, torch.Tensor]] = []
    continuing = BatchRunner._continuing

    def watched(self: BatchRunner, run: Any, batch: Any) -> Any:
        attack = continuing(self, run, batch)
        index = self.clean.batch_plan[batch.number]
        seen.append((batch.x, self.plan.starts[self.context][index], self.plan.ratio, attack.keywords["points"]))
        return attack

    monkeypatch.setattr(BatchRunner, "_continuing", watched)
    curve(hpm, samples, eps=[0.02, 0.04], protocol=_weak(threat__contexts=["solo"]), fc=False, **QUIET)
    assert len(seen) == 2  # batches
    for clean, before, ratio, points in seen:
        assert ratio == 2
        assert 0 < float((before - clean).abs().max()) <= 0.02 + 1e-6
        torch.testing.assert_close(points, (clean + 2 * (before - clean)).clamp(0, 1), atol=1e-6, rtol=0)


def test_stopped_it_goes_on_and_makes_no_level_twice(
    made: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hpm, calls = make_hpm(), list[float]()
    make = study.evaluate

    def stops(*given: Any, **more: Any) -> Any:
        calls.append(more["protocol"].ball.eps)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return make(*given, **more)

    monkeypatch.setattr(study, "evaluate", stops)
    given: dict[str, Any] = {"eps": [0, 0.02, 0.04, 0.08], "protocol": _weak(), "out": tmp_path, **QUIET}
    with pytest.raises(KeyboardInterrupt):
        curve(hpm, make_samples(hpm, 16), **given)
    curve(hpm, make_samples(hpm, 16), **given)
    assert calls == [0.02, 0.04, 0.08, 0.08]
    for name in ("curve.csv", "smallest_eps.csv", "eps-0.08/outcomes.csv", "eps-0.08/left.safetensors"):
        assert (tmp_path / name).read_bytes() == (made[0] / name).read_bytes(), name
    with pytest.raises(ValueError, match="holds the results of another evaluation"):
        curve(hpm, make_samples(hpm, 16), **given | {"seed": 1})


def test_the_results_of_a_level_are_verified(tmp_path: Path) -> None:
    hpm = make_hpm()
    samples = make_samples(hpm, 16)
    protocol = _weak(threat__levels=256)
    curve(hpm, samples, eps=["5/255", "10/255"], protocol=protocol, out=tmp_path, save_adversarial=True, **QUIET)
    assert verify(tmp_path / f"eps-{10 / 255:.6g}", hpm, samples).passed


def test_without_gradients_the_points_are_looked_at() -> None:
    hpm = make_hpm()
    protocol = make_protocol({key: value for key, value in WEAK.items() if key != "attack"} | {
        "attack": {"square": {"queries": 5}}})  # fmt: skip
    found = curve(hpm, make_samples(hpm, 16), eps=[0.02, 0.04], protocol=protocol, **QUIET)
    runs = found.results[0.04].attacks.query("target == 'defense'")["run"].unique().tolist()
    assert runs[:2] == ["target:square-margin:0", "target:square-margin:1"]


@pytest.mark.parametrize("eps", [[], [0], [0.1, 0.1], [-0.1, 0.1], ["inf"]])
def test_radii_that_are_none(eps: list[Any]) -> None:
    hpm = make_hpm()
    with pytest.raises(ValueError, match=r"expected (different radii|a number)"):
        curve(hpm, make_samples(hpm, 16), eps=eps, protocol=_weak(), **QUIET)


def test_the_figure_has_a_line_a_target_and_a_panel_a_context(made: tuple[Path, Any]) -> None:
    table = made[1].table
    figure = draw_curves({"": table})
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["joint", "solo"]
    (line, _) = figure.axes[0].get_lines()
    rows = table.query("context == 'joint' and target == 'defense'")
    np.testing.assert_allclose(line.get_xydata(), rows[["eps", "value"]])
    text = render_curves({"": table})
    assert len(text.splitlines()) == 3 + 2 * 4


def test_the_command_draws_and_compares(made: tuple[Path, Any], tmp_path: Path) -> None:
    protocol = tmp_path / "weak.toml"
    protocol.write_text(_weak(threat__contexts=["solo"]).text())
    given = ("--data", "digits", "--protocol", str(protocol), "--limit", "12", "--quiet", "--eps", "0,0.05,0.1")
    result = CliRunner().invoke(
        main, ["curve", str(reference_path("digits")), *given, "--norm", "linf", "--out", str(tmp_path / "digits")]
    )
    assert result.exit_code == 0, result.stderr
    assert "worst case in %" in result.stdout
    ET.parse(tmp_path / "digits" / "curve.svg")
    both = ("compare", str(made[0]), str(tmp_path / "digits"), "--out", str(tmp_path / "both.svg"))
    compared = CliRunner().invoke(main, list(both))
    assert compared.exit_code == 0, compared.stderr
    assert "digits, defence" in compared.stdout
    assert "digits is of other samples" in compared.stderr
    assert (tmp_path / "both.pdf").is_file()
    refused = CliRunner().invoke(main, ["compare", str(made[0]), str(tmp_path)])
    assert refused.exit_code == 2
    assert "holds no curve" in refused.stderr
