"""The collection is what it says: enough of each kind, known numbers that are found again, and counts that hold."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from defences.adaptive import Effort, alone
from defences.batches import decide
from defences.collection import ALL, Truth, attacked, chosen, joined, read
from defences.exact import additive, linear_l2
from defences.table import Row, counted, evaluated, in_order, rows_of, save
from torch import nn

from msa_eval.attacks import Ball

QUICK = ("mlp", "natural-cnn", "half-detached-features")
"""Whose attacks take a second or two."""

EVALUATED = ("linear", "natural-cnn", "own-forward", "rounding", "threshold")
"""Evaluated in the tests: two honest, three masked."""


def test_there_are_enough_of_each_kind() -> None:
    masked = [known for known in ALL.values() if known.masked]
    assert len(ALL) >= 24
    assert len(ALL) - len(masked) >= 10
    assert {known.level for known in masked} >= {"pixels", "features", "logits", "model"}
    assert {known.behaviour for known in masked} == {"static", "batch", "stochastic"}
    assert {known.behaviour for known in ALL.values() if not known.masked} == {"static", "batch", "stochastic"}
    assert {known.part for known in masked} == {True, False}
    assert sum(known.exact for known in masked) >= 3


def test_each_has_a_number_on_file() -> None:
    held = read()
    assert set(held) == set(ALL)
    for name, truth in held.items():
        assert ALL[name].shared or truth.samples == len(ALL[name].samples())
        assert all(0 <= index < truth.samples for index in truth.left)


@pytest.mark.parametrize("name", ALL)
def test_it_knows_clean_images(name: str, request: pytest.FixtureRequest) -> None:
    """But for the one whose labels are another order; what is left was right on clean images."""
    known = ALL[name]
    if known.shared:
        request.getfixturevalue("shared")
    data = known.samples()
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        answers = decide(known.build(), data.x)
    right = answers.argmax(dim=1) == data.y
    if known.never_sound:
        assert float(right.float().mean()) < 0.2
    else:
        assert float(right.float().mean()) > 0.5
    if known.behaviour != "stochastic":
        assert right[list(read()[name].left)].all()


@pytest.mark.parametrize("name", [name for name, known in ALL.items() if known.exact])
def test_closed_forms_are_found_again(name: str) -> None:
    assert attacked(ALL[name]) == read()[name]


@pytest.mark.parametrize("name", QUICK)
def test_what_attacks_leave_is_found_again(name: str) -> None:
    """To a sample: float arithmetic differs between machines."""
    again = set(attacked(ALL[name]).left)
    assert len(again ^ set(read()[name].left)) <= 1


def test_no_gradient_beats_the_closed_form_and_the_attack_reaches_it() -> None:
    known = ALL["linear"]
    data, model = known.samples(), known.build()
    assert torch.equal(alone(model, [model], data.x, data.y, known.ball), additive(
        known.build().double(), data.x, data.y, known.ball, torch.tensor([0.0, 1.0])
    ))  # fmt: skip


def test_the_closed_form_refuses_a_network() -> None:
    known = ALL["mlp"]
    data = known.samples()
    with pytest.raises(AssertionError, match="no sum over pixels"):
        additive(known.build().double(), data.x[:2], data.y[:2], known.ball, torch.tensor([0.0, 1.0]))


def test_the_l2_form_of_two_pixels() -> None:
    """A lead of 0.3 along (1, 1): the nearest break is at 0.3 / sqrt 2, unless the box ends before."""
    weight, bias = torch.tensor([[1.0, 1.0], [0.0, 0.0]]), torch.tensor([0.0, 0.7])
    x, y = torch.tensor([[[[0.5, 0.5]]], [[[0.05, 0.95]]]]), torch.tensor([0, 0])
    reach = 0.3 / math.sqrt(2)
    assert linear_l2(weight, bias, x, y, Ball("L2", reach + 0.01)).tolist() == [False, True]
    assert linear_l2(weight, bias, x, y, Ball("L2", reach - 0.01)).tolist() == [True, True]
    corner = math.hypot(0.05, 0.25)  # the first pixel ends at 0, the second has to give the rest
    assert linear_l2(weight, bias, x, y, Ball("L2", corner + 0.01)).tolist() == [False, False]
    assert linear_l2(weight, bias, x, y, Ball("L2", corner - 0.01)).tolist() == [False, True]


def test_pixels_are_changed_one_at_a_time_where_no_gradient_leads() -> None:
    """A step function of three pixels, whose gradient is zero: all three have to be moved."""

    def score(v: torch.Tensor) -> torch.Tensor:
        up = (v.flatten(1)[:, :3] > 0.55).double().sum(dim=1)
        return torch.stack([2.5 - up, up - 2.5], dim=1)

    x, y = torch.full((1, 1, 8, 8), 0.5), torch.tensor([0])
    flat = nn.Sequential(nn.Flatten(), nn.Linear(64, 2)).requires_grad_(False)
    flat[1].weight.zero_()
    for eps, left in ((0.1, False), (0.04, True)):
        assert alone(score, [flat], x, y, Ball("Linf", eps), effort=Effort(steps=3, restarts=1)).tolist() == [left]


ROW = Row("any", "masked", "", "static", "alone", 0, 64, 60, 30, 30, "sound", "", 1.0, "")


def test_counts() -> None:
    high = dataclasses.replace(ROW, ours=31)
    assert counted([ROW, dataclasses.replace(high, verdict="suspect")]).met
    assert counted([high]).masked_and_sound == ("any",)
    assert not counted([high]).too_high
    assert counted([dataclasses.replace(ROW, never_sound=True)]).masked_and_sound == ("any",)
    low = dataclasses.replace(ROW, ours=29)
    assert counted([low]).reached == ("any",)
    assert counted([dataclasses.replace(low, exact=True)]).impossible == ("any",)
    assert not counted([dataclasses.replace(low, exact=True)]).met
    far = dataclasses.replace(ROW, kind="honest", ours=33)
    assert counted([far]).too_high == ("any",)
    doubted = dataclasses.replace(ROW, kind="honest", verdict="suspect")
    assert counted([doubted]).met
    assert not counted([doubted, doubted]).met


def test_a_row_is_evaluated() -> None:
    row, left = evaluated(ALL["linear"], read()["linear"], quick=True)
    assert row.known == len(read()["linear"].left) <= row.ours == len(left)
    assert set(read()["linear"].left) <= set(left)
    assert (row.verdict, row.kind, row.clean) == ("sound", "honest", 59)


def test_a_page_has_the_table_in_its_place(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- table -->\nold\n<!-- /table -->\nafter\n")
    for _ in range(2):
        save([dataclasses.replace(ROW, defence="one", exact=True)], page)
        text = page.read_text()
        assert text.startswith("before\n<!-- table -->\n| defence |")
        assert "| one | masked |  | alone | 60 of 64 | 30 | 30 (exact) | sound |" in text
        assert text.endswith("<!-- /table -->\nafter\n")
        assert "old" not in text


def test_rows_are_kept_from_one_call_to_the_next(tmp_path: Path) -> None:
    rows = [dataclasses.replace(ROW, defence=name, exact=name == "linear") for name in ("linear", "mlp")]
    save(rows, tmp_path / "rows.csv")
    held = list(rows_of(tmp_path / "rows.csv"))
    known = [len(read()[row.defence].left) for row in rows]
    assert held == [dataclasses.replace(row, known=count) for row, count in zip(rows, known, strict=True)]
    assert [row.defence for row in in_order(held, ["mlp", "linear"])] == ["mlp", "linear"]
    assert not list(rows_of(tmp_path / "none.csv"))


def test_what_one_search_broke_stays_broken() -> None:
    held, found = Truth("any", 4, (0, 1, 2), "attack 0"), Truth("any", 4, (1, 2, 3), "msa 5")
    assert joined(held, found) == Truth("any", 4, (1, 2), "attack 0, msa 5")
    assert joined(held, held) == held
    exact = dataclasses.replace(held, by="closed form")
    assert joined(exact, found) == exact


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="no defence rounding-up; expected some of"):
        chosen(["rounding-up"])


@pytest.mark.slow
def test_the_three_counts_of_a_few_rows() -> None:
    """The whole table takes half an hour; ``python -m tests.defences`` makes it and exits with the same counts."""
    rows = [evaluated(ALL[name], read()[name], quick=True)[0] for name in EVALUATED]
    counts = counted(rows)
    assert counts.met, counts
    assert {row.defence for row in rows if row.ours >= 0} == set(EVALUATED)
