"""The targets of an evaluation: which of the two are made, and how."""

from __future__ import annotations

import pytest
from torch import nn
from toys import make_classifier, make_hpm, make_samples

from msa_eval.defense.contract import WholeModel
from msa_eval.defense.micro_batches import MicroBatched
from msa_eval.targets.pair import make_targets

SAMPLES = make_samples(make_classifier())


def test_a_classifier_is_made_where_the_defence_has_one_unless_it_is_left_out_or_given() -> None:
    hpm, other = make_hpm(), make_classifier(seed=3)
    both = make_targets(hpm, None, SAMPLES, "cpu")
    assert list(both) == ["defense", "fc"]
    assert both["defense"].whole is hpm  # type: ignore[attr-defined]
    assert list(make_targets(hpm, False, SAMPLES, "cpu")) == ["defense"]
    assert list(make_targets(make_classifier(), None, SAMPLES, "cpu")) == ["defense"]
    given = make_targets(hpm, other, SAMPLES, "cpu")
    assert given["fc"].whole is other  # type: ignore[attr-defined]


def test_what_results_are_of_limits_what_is_made_but_not_what_is_given() -> None:
    hpm, other = make_hpm(), make_classifier(seed=3)
    assert list(make_targets(hpm, None, SAMPLES, "cpu", only=["defense"])) == ["defense"]
    assert list(make_targets(hpm, None, SAMPLES, "cpu", only=["fc", "defense"])) == ["defense", "fc"]
    assert list(make_targets(hpm, other, SAMPLES, "cpu", only=["defense"])) == ["defense", "fc"]


def test_parts_are_of_trunks_and_both_targets_move_to_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = nn.Sequential(nn.Flatten(), nn.Linear(12, 4)).eval()
    parts = make_targets(make_hpm(), whole, SAMPLES, "cpu", micro_batch=3)
    defense = parts["defense"]
    assert isinstance(defense, MicroBatched)
    assert defense.size == 3
    assert isinstance(parts["fc"], WholeModel)
    with pytest.raises(ValueError, match="can't be passed in parts"):
        make_targets(whole, None, SAMPLES, "cpu", micro_batch=3)
    moved: list[tuple[nn.Module, object]] = []
    monkeypatch.setattr(nn.Module, "to", lambda self, device: moved.append((self, device)))
    hpm, beside = make_hpm(), make_classifier()
    make_targets(hpm, beside, SAMPLES, "cpu")
    assert moved == [(hpm, "cpu"), (beside, "cpu")]
