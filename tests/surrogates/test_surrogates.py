"""Surrogates by their definitions, and the registry."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from toys import make_classifier, make_hpm

from msa_eval import WholeModel
from msa_eval.surrogates import Surrogate, available, get, register


def _features() -> torch.Tensor:
    return torch.randn(7, 6, generator=torch.Generator().manual_seed(0), requires_grad=True)


def test_each_is_its_definition() -> None:
    hpm, z = make_hpm(), _features()
    assert torch.equal(get("fc-oracle").logits(hpm, z), hpm.fc(z))
    assert torch.equal(get("soft-hybrid").logits(hpm, z), hpm.logits(z, "soft"))
    assert torch.equal(get("ste").logits(hpm, z), hpm.logits(z))


def test_which_have_the_hard_forward_value() -> None:
    hpm, z = make_hpm(), _features()
    with torch.no_grad():
        hard = hpm.logits(z, "frozen")
        same = {name: torch.equal(get(name).logits(hpm, z), hard) for name in [*available(), "soft-hybrid@0.5"]}
    assert {name for name in same if same[name]} == {"ste", "frozen-assignment", "frozen-prototypes"}


def test_the_frozen_gradients_are_those_of_their_constants() -> None:
    hpm, z = make_hpm(), _features()
    hard, prototypes = hpm.fc(z).argmax(dim=1), hpm.hybrid_prototypes(z).detach()
    p = torch.nn.functional.one_hot(hard, 4).float()
    expected = {
        "frozen-assignment": hpm.compare(z, hpm.mix(hpm.batch_prototypes(z, p))),
        "frozen-prototypes": hpm.compare(z, prototypes),
    }
    for name, logits in expected.items():
        ours, theirs = (
            torch.autograd.grad(values.logsumexp(dim=1).sum(), z, retain_graph=True)[0]
            for values in (get(name).logits(hpm, z), logits)
        )
        torch.testing.assert_close(ours, theirs)


def test_a_temperature_changes_the_soft_hybrid_and_one_is_the_plain_one() -> None:
    hpm, z = make_hpm(), _features()
    assert torch.equal(get("soft-hybrid@1").logits(hpm, z), get("soft-hybrid").logits(hpm, z))
    assert torch.equal(get("soft-hybrid@0.1").logits(hpm, z), hpm.logits(z, "soft", temperature=0.1))
    for name in ("soft-hybrid@x", "soft-hybrid@0", "soft-hybrid@-1", "soft-hybrid@nan"):
        with pytest.raises(ValueError, match=r"number after the @|positive temperature"):
            get(name)


@pytest.mark.parametrize("name", [*available(), "soft-hybrid@0.5"])
def test_all_are_differentiable(name: str) -> None:
    hpm, z = make_hpm(), _features()
    (gradient,) = torch.autograd.grad(get(name).logits(hpm, z).logsumexp(dim=1).sum(), z)
    assert torch.isfinite(gradient).all()
    assert gradient.abs().max() > 0


def test_the_soft_and_straight_through_gradients_differ() -> None:
    hpm, z = make_hpm(), _features()
    soft, hard = (torch.autograd.grad(get(name).logits(hpm, z)[:, 0].sum(), z)[0] for name in ("soft-hybrid", "ste"))
    assert not torch.allclose(soft, hard)


def test_who_can_offer_what() -> None:
    offers = {
        type(defense).__name__: [name for name in available() if get(name).applies(defense)]
        for defense in (make_hpm(), make_classifier(), WholeModel(nn.Flatten()))
    }
    assert offers == {
        "HPM": ["fc-oracle", "frozen-assignment", "frozen-prototypes", "soft-hybrid", "ste"],
        "Classifier": ["fc-oracle"],
        "WholeModel": ["ste"],
    }


def test_a_users_own_surrogate_is_a_function() -> None:
    found = get("mine", {"mine": lambda defense, z: 2 * defense.fc_logits(z)})
    hpm, z = make_hpm(), _features()
    assert torch.equal(found.logits(hpm, z), 2 * hpm.fc(z))
    assert not found.on_images
    renamed = get("mine", {"mine": Surrogate("other", lambda defense, z: z)})
    assert renamed.name == "mine"
    model = nn.Flatten()
    assert get("base", {"base": model}).on_images


def test_names_are_unique_and_unknown_ones_are_explained() -> None:
    with pytest.raises(ValueError, match="already a surrogate 'ste'"):
        register(Surrogate("ste", lambda defense, z: z))
    with pytest.raises(ValueError, match="did you mean 'soft-hybrid'"):
        get("soft-hybird")
