"""The arithmetic of the measurements; that they are made, on toys; and no time is asserted."""

from __future__ import annotations

import math
from pathlib import Path

import pandas as pd
import pytest
import torch
from benchmarks import growth, limit, machine, overhead, paper, rivals, static, tables
from benchmarks.clock import against, in_turns
from benchmarks.passes import counted
from benchmarks.sheet import Sheet
from benchmarks.subjects import batches, subject, toy
from benchmarks.tally import Tally, until
from torch import nn

from msa_eval import evaluate

ROOT = Path(__file__).parents[2]


def test_ratios_are_taken_within_a_round_and_paced_by_the_trunk() -> None:
    table = pd.DataFrame({
        "contender": ["a", "b"] * 3, "repeat": [0, 0, 1, 1, 2, 2],
        "wall": [1.0, 2.0, 10.0, 30.0, 1.0, 2.0], "cpu": [1.0, 2.0, 10.0, 20.0, 1.0, 3.0],
        "inside": [0.5, 0.5, 5.0, 5.0, 0.5, 0.75],
    })  # fmt: skip
    found = against(table, "a")
    assert found.loc["a"].tolist() == [1, 1, 1, 1]
    assert found.loc["b"].to_dict() == {"wall": 2, "cpu": 2, "least": 2, "paced": 2}


def test_contenders_take_turns_in_both_directions() -> None:
    order: list[str] = []
    actions = {name: lambda name=name: order.append(name) for name in "ab"}  # type: ignore[misc]
    table = in_turns(actions, 2, trunk=nn.Identity(), warm=1)
    assert "".join(order) == "baabba"
    assert table["repeat"].tolist() == [0, 0, 1, 1]


def test_passes_are_counted_both_ways_and_only_while_asked() -> None:
    trunk = nn.Linear(2, 3).requires_grad_(False)
    with counted(trunk) as passes:
        x = torch.ones(5, 2, requires_grad=True)
        torch.autograd.grad(trunk(x).sum(), x)
        torch.autograd.grad(trunk(x[:2] * 2).sum(), x)
        with torch.no_grad():
            trunk(x)
    trunk(x)
    assert (passes.forwards, passes.backwards, passes.calls) == (12, 7, 3)
    assert passes.inside >= 0


def test_a_tally_adds_and_divides_all_but_seconds() -> None:
    tally = Tally(nn.Identity())
    assert tally.measure("a: x", lambda: 7) == 7
    tally.add("a: x", wall=1.0, final=3)
    tally.add("a: y", final=1)
    assert tally.parts("a: ") == ["a: x", "a: y"]
    assert tally.figures(4, "a: x", "a: y")["final"] == 1
    assert tally.figures(4, "a: x")["wall"] >= 1


def test_a_sheet_replaces_its_own_setting_and_keeps_the_others(tmp_path: Path) -> None:
    for steps, value in ((1, 10.0), (2, 20.0), (1, 30.0)):
        Sheet(tmp_path / "x.csv", model="m", steps=steps).add({"cpu": value}, contender="ours")
    table = pd.read_csv(tmp_path / "x.csv")
    assert list(table.columns) == ["model", "steps", "contender", "figure", "value"]
    assert table["value"].tolist() == [20, 30]
    assert (tmp_path / "machine.json").exists()


def test_the_machine_is_described_without_names_of_people_or_folders() -> None:
    described = machine.describe()
    assert described["cores"] >= 1
    assert described["packages"]["torch"] == torch.__version__
    assert str(Path.home()) not in str(described)


def test_the_part_of_our_runs_until_a_rivals_number() -> None:
    runs = [{"wall": 1.0, "newly_broken": 0.5}, {"wall": 3.0, "newly_broken": 0.2}]
    assert until(runs, 1.0, 0.5, of="wall") == 0.25
    assert until(runs, 1.0, 0.3, of="wall") == 1
    assert math.isnan(until(runs, 1.0, 0.2, of="wall"))


def test_square_in_one_way_is_no_part_of_the_other() -> None:
    assert paper.runs_in("square, seated", "seated")
    assert not paper.runs_in("square, seated", "shrinking")
    assert paper.runs_in("fc-oracle:apgd-ce", "shrinking")


def test_multiplications_of_layers_are_those_of_their_formulas() -> None:
    trunk = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 5))
    conv, linear = limit.layers(trunk, torch.rand(2, 3, 8, 8))
    assert conv.multiplications == 2 * 8 * 4 * 4 * 3 * 9
    assert linear.multiplications == 2 * 5 * 8 * 16
    reached = limit.Reached([conv, linear])
    reached.again(1)
    before = reached.forth, reached.back
    reached.again(3)
    assert 0 < reached.forth <= before[0]
    assert 0 < reached.back <= before[1]


@pytest.mark.parametrize("place", [0, 1])
def test_a_layer_goes_back_to_its_input_alone(place: int) -> None:
    trunk = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, groups=1), nn.Flatten(), nn.Linear(4 * 16, 5))
    layer = limit.layers(trunk, torch.rand(2, 3, 4, 4))[place]
    x = layer.x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(layer.module(x).sum(), x)
    found = layer.backward()()
    torch.testing.assert_close(found[0] if isinstance(found, tuple) else found, expected)


def test_a_bare_loop_makes_as_many_passes_as_apgd_in_the_engine() -> None:
    it = toy(samples=8, classes=10, dim=16)
    made = {}
    for name, action in overhead.contenders(it, "soft-hybrid", loss="ce", steps=3).items():
        with counted(it.fc.trunk) as passes:
            action()
        made[name] = (passes.forwards / 8, passes.backwards / 8)
    assert made == {overhead.BASE: (4, 3), "ours, the function": (4, 3), "ours, in the engine": (4, 3),
                    "pyautoattack": (5, 4)}  # fmt: skip


def test_counts_told_are_those_made_but_for_what_is_found_out_of_the_target() -> None:
    """Clean passes, and on one batch the look at its gradients; neither grows with what a run asks."""
    it = toy(samples=16, classes=10, dim=16)
    assert it.hpm is not None
    beside = []
    for steps in (3, 6):
        protocol = paper.protocol(it.ball, steps=steps, queries=4, batch=8)
        with counted(it.hpm.trunk) as passes:
            attacks = evaluate(it.hpm, it.data, protocol=protocol, fc=False, precision="fp32").attacks
        described = [int(attacks[count].sum()) for count in ("forwards", "backwards")]
        beside.append((passes.forwards - described[0], passes.backwards - described[1]))
    assert beside[0] == beside[1]
    assert 16 <= beside[0][0] <= 200 * 16
    assert 16 <= beside[0][1] <= 20 * 16


def test_composed_of_pyautoattack_is_judged_in_whole_batches() -> None:
    it = toy(samples=16, classes=10, dim=16)
    assert it.hpm is not None
    tally = Tally(it.hpm.trunk)
    paper.compose(it.hpm, it.data, it.ball, tally, steps=3, queries=4, batch=8)
    for way in ("seated", "shrinking"):
        unbroken = tally.figures(16, f"standing, {way}")
        finals = [tally.figures(16, part)["final"] for part in tally.parts("pyautoattack:") if paper.runs_in(part, way)]
        assert len(finals) == 5
        assert unbroken["worst_case"] <= min(finals) <= max(finals) <= unbroken["clean"]


def test_best_loss_moves_every_image_inside_the_ball() -> None:
    it = toy(samples=8, classes=10, dim=16)
    ((x, y),) = batches(it.data, 8)
    points = rivals.best_loss(it.fc, x, y, ball=it.ball, steps=3, loss="ce")
    assert not it.ball.excess(points, x).any()
    assert bool(((points - x).abs().amax(dim=(1, 2, 3)) > 0).all())


def test_static_and_growth_give_figures_of_all_that_is_installed(tmp_path: Path) -> None:
    static.run("digits", samples=16, batch=8, steps=2, chunk=8, precision="fp32", out=tmp_path)
    table = pd.read_csv(tmp_path / "static.csv")
    ours = table[table["contender"] == "msa-eval"].set_index("figure")["value"]
    assert 2 < ours["told forwards"] <= 4  # what is broken is passed no more
    assert ours["cpu, ours over it"] == 1
    assert set(table["contender"]) >= {"msa-eval", "pyautoattack, APGD-CE", "pyautoattack, APGD-CE best_loss"}
    figures = growth.measure(growth.Case(samples=16, dim=16, batch=8), steps=2)
    assert figures["more MiB"] >= 0
    assert figures["forwards"] >= 2 * 4 + 2


def test_figures_become_tables_between_their_marks(tmp_path: Path) -> None:
    Sheet(tmp_path / "limit.csv", model="m", steps=1, repeat=0).add({"of the limit": 0.8, "inside the trunk": 0.9})
    page = tables.fill("a <!-- limit -->old<!-- /limit --> b <!-- paper -->kept<!-- /paper -->", tmp_path)
    assert "| m | 1 | 0 | 0.80 | 0.900 |  |  |" in page
    assert "old" not in page
    assert "kept" in page
    assert tables.fill(page, tmp_path) == page


def test_the_pages_show_the_committed_files() -> None:
    page = "".join((ROOT / path).read_text(encoding="utf-8") for path in tables.PAGES)
    assert tables.fill(page, ROOT / "results/benchmarks") == page
    assert page.count("| --- |") >= len(tables.TABLES)


def test_a_reference_is_named_or_refused() -> None:
    assert len(subject("digits", 5).data) == 5
    with pytest.raises(ValueError, match="expected one of"):
        subject("vgg", 5)
