"""The runs of a protocol: which, in which order, and each with random numbers of its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from msa_eval.protocols import load_protocol
from msa_eval.protocols.runs import Run, offer, plan_runs
from msa_eval.protocols.trial import Batch
from toys import make_classifier, make_hpm

from msa_eval.defense import decide


def _runs(defense: Any, name: str = "digits", classes: int = 4, **overrides: Any) -> list[Run]:
    protocol = load_protocol(name, overrides={key.replace("__", "."): value for key, value in overrides.items()})
    assert protocol.apgd is not None
    x = torch.rand(5, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    z = defense.features(x).detach()
    batch = Batch(0, x, torch.zeros(5, dtype=torch.long), z, decide(defense, z))
    return plan_runs(protocol, offer(protocol.apgd, defense, batch, own={}), num_classes=classes)


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
