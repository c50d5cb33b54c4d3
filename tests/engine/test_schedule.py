"""The runs of a protocol: which, in which order, and each with random numbers of its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from toys import make_classifier, make_hpm

from msa_eval import HPM
from msa_eval.attacks.batch import Batch
from msa_eval.attacks.borderline import BorderlineAttack
from msa_eval.attacks.gradient import ApgdAttack
from msa_eval.defense.contexts import CONTEXTS
from msa_eval.defense.contract import decide
from msa_eval.engine.schedule import Run, plan_runs
from msa_eval.judging.batch_history import BatchHistory
from msa_eval.judging.usable_surrogates import select_surrogates
from msa_eval.protocols import load_protocol, make_protocol

PRODUCT = {
    "schema": 1, "name": "product", "version": 1, "description": "A test.", "threat": {"norm": "Linf", "eps": 0.1},
    "attack": {"apgd": {"surrogates": ["fc-oracle", "soft-hybrid", "ste"], "targets": 6,
                        "losses": ["ce", "dlr", "margin", "dlr-targeted"]}, "square": {"queries": 5}},
}  # fmt: skip


def _runs(
    defense: Any,
    name: str = "",
    classes: int = 4,
    context: str = "joint",
    own: Any = None,
    exchanges: bool = False,
    randomized: bool = False,
    **overrides: Any,
) -> list[Run]:
    changed = {key.replace("__", "."): value for key, value in overrides.items()}
    protocol = load_protocol(name, overrides=changed) if name else make_protocol(PRODUCT, overrides=changed)
    assert protocol.apgd is not None
    dependent = isinstance(defense, HPM)
    x = torch.rand(5, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    z = defense.features(x).detach()
    batch = Batch(0, x, torch.zeros(5, dtype=torch.long), z, decide(defense, z))
    surrogates = select_surrogates(
        protocol.apgd, defense, batch, own=own or {}, batch_dependent=dependent, recombination=protocol.recombination
    )
    return plan_runs(
        protocol, surrogates, num_classes=classes, context=CONTEXTS[context], batch_dependent=dependent,
        exchanges=exchanges, randomized=randomized,
    )  # fmt: skip


def test_surrogates_times_losses_times_restarts_and_then_square() -> None:
    runs = _runs(
        make_hpm(), "paper-cifar10", attack__apgd__restarts=2, attack__square__restarts=2,
    )  # fmt: skip
    assert [run.name for run in runs] == [
        f"{surrogate}:apgd-{loss}:{restart}"
        for surrogate in ("fc-oracle", "soft-hybrid")
        for loss in ("ce", "dlr")
        for restart in (0, 1)
    ] + ["target:square-margin:0", "target:square-margin:1"]


def test_a_targeted_loss_has_a_run_a_class_and_no_more_than_there_are() -> None:
    for classes, expected in ((4, 3), (10, 6)):
        runs = [run for run in _runs(make_hpm(), classes=classes) if run.loss == "dlr-targeted"]
        assert [run.restart for run in runs if run.surrogate_name == "ste"] == list(range(expected))


def test_a_plain_classifier_is_attacked_once_through_its_own_logits() -> None:
    names = {run.surrogate_name for run in _runs(make_classifier())}
    assert names == {"fc-oracle", "target"}


def test_random_numbers_differ_by_run_seed_target_context_and_batch() -> None:
    runs = _runs(make_hpm(), attack__apgd__restarts=3, attack__square__restarts=3)
    keys = [(0, "defense", "joint", 0), (1, "defense", "joint", 0), (0, "fc", "joint", 0), (0, "defense", "joint", 1)]
    seeds = [run.generator(*key).initial_seed() for run in runs for key in keys]
    assert len(set(seeds)) == len(runs) * len(keys)
    assert [run.generator(*key).initial_seed() for run in runs for key in keys] == seeds


@pytest.mark.parametrize(("loss", "classes"), [("dlr", 2), ("dlr-targeted", 3)])
def test_losses_that_need_more_classes(loss: str, classes: int) -> None:
    with pytest.raises(ValueError, match=f"the {loss} loss needs at least {classes + 1} classes"):
        _runs(make_hpm(), classes=classes, attack__apgd__losses=[loss])


def test_every_target_and_context_gets_as_many_runs_of_a_cascade() -> None:
    """What a target has not is made up for: its first surrogate, another start, the next target class."""
    joint, solo, static = (
        [run for run in _runs(defense, "msa", classes=10, context=context) if run.attack.name in ("apgd", "pursuit")]
        for defense, context in ((make_hpm(), "joint"), (make_hpm(), "solo"), (make_classifier(), "joint"))
    )
    assert len(solo) == len(static) == 20
    assert [run.attack.name for run in joint] == ["apgd"] * 3 + ["pursuit"]  # which has the passes of the others
    assert [run.chained for run in joint] == [False] * 3 + [True]
    for runs in (joint, solo, static):
        assert len({run.name for run in runs}) == len(runs)
    assert all(run.chained for run in solo + static)
    assert {run.moves for run in solo + static} == {"batch"}
    assert {run.surrogate_name for run in static} == {"fc-oracle"}
    ranks = [run.attack.target for run in static if run.loss == "dlr-malt" and isinstance(run.attack, ApgdAttack)]
    assert ranks == [*range(9), *range(5)]  # every class that ten offer, then the likeliest from other starts


def test_overtime_is_for_samples_decided_apart_and_comes_before_the_queries() -> None:
    both = ["frozen-assignment", "fc-oracle"]
    for defense, context, expected in (
        (make_hpm(), "joint", []), (make_hpm(), "composed", []), (make_classifier(), "joint", ["fc-oracle"]),
        (make_hpm(), "solo", both), (make_hpm(), "alone", both),
    ):  # fmt: skip
        runs = _runs(defense, "msa", classes=10, context=context)
        overtime = [run for run in runs if run.attack.name == "overtime"]
        assert [run.surrogate_name for run in overtime] == expected
        if expected:
            assert runs[-2 - len(overtime) :] == [*overtime, *runs[-2:]]
            assert [run.attack.name for run in runs[-2:]] == ["square", "spsa"]
            attacks = [run.attack for run in overtime if isinstance(run.attack, BorderlineAttack)]
            assert [attack.steps for attack in attacks] == [30] * len(expected)
            assert [attack.passes for attack in attacks] == [100 // len(expected)] * len(expected)
    assert not [r for r in _runs(make_classifier(), "msa", 10, attack__apgd__overtime=0) if r.attack.name == "overtime"]


def test_runs_that_gather_points_stand_in_for_the_others_in_joint_alone() -> None:
    """They have steps of their own, start at random, and bring surrogates that the other runs don't use."""
    gathered = {"attack__recombination__runs": ["soft-hybrid:margin", "ste:margin"], "attack__recombination__steps": 7}
    own: Any = {"mine": lambda defense, z: defense.fc_logits(z)}
    joint, solo = (
        [run for run in _runs(make_hpm(), "quick", own=own, context=context, **gathered) if run.attack.name == "apgd"]
        for context in ("joint", "solo")
    )
    assert [run.name for run in joint] == [
        "soft-hybrid:apgd-margin:0", "ste:apgd-margin:0", "mine:apgd-margin:0", "mine:apgd-dlr:0",
    ]  # fmt: skip
    assert {run.attack.steps for run in joint if isinstance(run.attack, ApgdAttack)} == {7}
    assert [run.name for run in solo] == [
        f"{name}:apgd-{loss}:0" for name in ("fc-oracle", "soft-hybrid", "ste", "mine") for loss in ("ce", "dlr")
    ]
    without_steps = _runs(make_hpm(), "quick", attack__recombination__runs=["ste:margin"])[0].attack
    usual = load_protocol("quick").apgd
    assert isinstance(without_steps, ApgdAttack)
    assert usual is not None
    assert without_steps.steps == usual.steps


def test_a_victim_whose_companions_move_is_not_pursued() -> None:
    labels = [run.attack_name for run in _runs(make_hpm(), "msa", classes=10, attack__apgd__victim=3)]
    assert "apgd-companions" in labels
    assert "pursuit" not in labels


def test_company_is_chosen_again_between_the_runs() -> None:
    """And along with the steps, towards every class, where batches that differ in one row come in closed form."""
    labels = [run.attack.name for run in _runs(make_hpm(), "msa", classes=10, context="composed")]
    assert labels[:5] == ["composition", "apgd", "apgd", "apgd", "composition"]
    assert labels[-3:] == ["composition", "square", "spsa"]
    assert (labels.count("apgd"), labels.count("composition"), labels.count("pursuit")) == (20, 8, 0)
    closed = _runs(make_hpm(), "msa", classes=10, context="composed", exchanges=True)
    assert [run.attack.name for run in closed].count("apgd") == 6
    pursuits = [run for run in closed if run.attack.name == "pursuit"]
    assert [run.restart for run in pursuits] == list(range(18))  # six classes, three times
    assert {run.surrogate_name for run in pursuits} == {"frozen-assignment"}


def test_a_cascade_ends_where_its_passes_are_spent() -> None:
    """A run that comes too late searches for nothing; one in time searches for what stands."""
    hpm = make_hpm()
    x = torch.rand(5, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    z = hpm.features(x).detach()
    logits = decide(hpm, z)
    history = BatchHistory(Batch(0, x, logits.argmax(dim=1), z, logits))
    run = next(run for run in _runs(hpm, "msa", classes=10, context="solo") if run.attack.name == "apgd")
    assert run.passes == 240
    for passes, searched in ((0, True), (5 * 240 - 1, True), (5 * 240, False)):
        history.passes = passes
        counted = run.setting(hpm, history).counted
        assert counted is not None
        assert bool(counted.all()) == bool(counted.any()) == searched
    with pytest.raises(ValueError, match="ends a cascade"):
        _runs(hpm, "quick", attack__apgd__passes=100)


def test_companions_are_moved_through_surrogates_that_reach_them() -> None:
    listed = {"attack__apgd__moves": ["companions"], "attack__apgd__losses": ["margin"]}
    runs = [run for run in _runs(make_hpm(), **listed) if run.attack.name == "apgd"]
    assert {run.moves for run in runs} == {"companions"}
    assert "fc-oracle" not in {run.surrogate_name for run in runs}
    assert {run.moves for run in _runs(make_classifier(), **listed)} == {"batch"}


def test_what_stands_is_moved_alone_where_samples_are_decided_together() -> None:
    listed = {"attack__apgd__moves": ["standing"], "attack__apgd__combine": "cascade"}
    runs = [run for run in _runs(make_hpm(), "quick", **listed) if run.attack.name == "apgd"]
    assert {run.moves for run in runs} == {"standing"}
    assert {run.attack_name for run in runs} == {"apgd-standing"}
    assert {run.moves for run in _runs(make_classifier(), "quick", **listed)} == {"batch"}


def test_a_cascade_starts_at_random_then_from_the_best_and_again_at_random_where_it_repeats() -> None:
    runs = _runs(make_hpm(), "quick", attack__apgd__combine="cascade", attack__apgd__restarts=2)
    starts = [run.attack.from_start for run in runs if isinstance(run.attack, ApgdAttack)]
    assert starts == [False, False] + [True, False] * 5
    separate = _runs(make_hpm(), "quick", attack__apgd__restarts=2)
    assert not any(run.attack.from_start for run in separate if isinstance(run.attack, ApgdAttack))
    assert not any(run.chained for run in separate)


def test_surrogates_attacked_together_are_one() -> None:
    runs = _runs(make_hpm(), "quick", attack__apgd__combine="mean")
    assert [run.name for run in runs] == ["mean:apgd-ce:0", "mean:apgd-dlr:0", "target:square-margin:0"]
    alone = _runs(make_classifier(), "quick", attack__apgd__combine="mean")
    assert [run.surrogate_name for run in alone] == ["fc-oracle", "fc-oracle", "target"]


def test_the_default_protocol_runs_on_two_classes() -> None:
    assert {run.loss for run in _runs(make_classifier(), "msa", classes=2)} == {"margin", "probability-margin"}


def test_recombination_and_composition_are_for_those_who_have_companions() -> None:
    def labels(defense: Any, context: str, *, exchanges: bool = False) -> set[str]:
        runs = _runs(defense, "msa", classes=10, context=context, exchanges=exchanges)
        return {run.attack.name for run in runs} - {"apgd", "square", "spsa"}

    assert labels(make_hpm(), "joint", exchanges=True) == {"pursuit"}
    assert labels(make_hpm(), "joint") == {"recombination", "pursuit"}
    assert labels(make_hpm(), "solo") == {"overtime"}
    assert labels(make_hpm(), "composed") == {"composition"}
    assert labels(make_classifier(), "joint") == labels(make_classifier(), "composed") == {"overtime"}


@pytest.mark.parametrize("context", ["joint", "composed"])
def test_a_randomized_target_is_given_a_run_for_samples_near_even_odds(context: str) -> None:
    names = {
        randomized: [run.name for run in _runs(make_hpm(), "msa", context=context, randomized=randomized)]
        for randomized in (False, True)
    }
    assert [name for name in names[True] if name not in names[False]] == [
        next(name for name in names[True] if ":odds-margin:0" in name)
    ]
    assert not any("odds" in run.name for run in _runs(make_hpm(), "paper-cifar10", randomized=True))
