"""The targets of an evaluation: which of the two are made, and how."""

from __future__ import annotations

import pytest
from torch import nn
from toys import make_classifier, make_hpm

from msa_eval.defense import WholeModel
from msa_eval.memory import InParts
from msa_eval.targets.pair import make_targets


def test_a_classifier_is_made_where_the_defence_has_one_unless_it_is_left_out_or_given() -> None:
    hpm, other = make_hpm(), make_classifier(seed=3)
    both = make_targets(hpm, None, "cpu")
    assert list(both) == ["defense", "fc"]
    assert both["defense"].whole is hpm  # type: ignore[attr-defined]
    assert list(make_targets(hpm, False, "cpu")) == ["defense"]
    assert list(make_targets(make_classifier(), None, "cpu")) == ["defense"]
    given = make_targets(hpm, other, "cpu")
    assert given["fc"].whole is other  # type: ignore[attr-defined]


def test_what_results_are_of_limits_what_is_made_but_not_what_is_given() -> None:
    hpm, other = make_hpm(), make_classifier(seed=3)
    assert list(make_targets(hpm, None, "cpu", only=["defense"])) == ["defense"]
    assert list(make_targets(hpm, None, "cpu", only=["fc", "defense"])) == ["defense", "fc"]
    assert list(make_targets(hpm, other, "cpu", only=["defense"])) == ["defense", "fc"]


def test_parts_are_of_trunks_and_both_targets_move_to_the_device() -> None:
    whole = nn.Sequential(nn.Flatten(), nn.Linear(12, 4)).eval()
    parts = make_targets(make_hpm(), whole, "cpu", micro_batch=3)
    defense = parts["defense"]
    assert isinstance(defense, InParts)
    assert defense.size == 3
    assert isinstance(parts["fc"], WholeModel)
    with pytest.raises(ValueError, match="can't be passed in parts"):
        make_targets(whole, None, "cpu", micro_batch=3)
    hpm, beside = make_hpm(), make_classifier()
    make_targets(hpm, beside, "meta")
    assert {p.device.type for module in (hpm, beside) for p in module.parameters()} == {"meta"}
