"""What can be a defence, and what an evaluation leaves behind."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toys import make_classifier, make_hpm, make_samples

from msa_eval import WholeModel, as_defense, evaluate
from msa_eval.defense.checks import check_trunk, looks_batch_dependent
from msa_eval.defense.contract import decide, left_training, modules_of, own_surrogates
from msa_eval.defense.weight_gradients import without_weight_gradients


class Custom:
    """No module itself."""

    def __init__(self, inputs: int = 4) -> None:
        self.trunk = nn.Linear(inputs, 3).eval()

    def features(self, x: Tensor) -> Tensor:
        out: Tensor = self.trunk(x.flatten(1))
        return out

    def logits(self, z: Tensor) -> Tensor:
        return z


def test_what_fits_is_taken_as_it_is() -> None:
    hpm, custom = make_hpm(), Custom()
    assert as_defense(hpm) is hpm
    assert as_defense(custom) is custom


def test_a_plain_module_is_wrapped() -> None:
    model, x = nn.Flatten(), torch.rand(2, 1, 2, 2)
    defense = as_defense(model)
    assert isinstance(defense, WholeModel)
    assert defense.batch_dependent is None
    assert torch.equal(defense.logits(defense.features(x)), model(x))


class _ByMean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) - x.flatten(1).mean(dim=0)


class _ByPlace(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) * torch.linspace(1, 2, len(x)).unsqueeze(1)


class _ByChance(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) + torch.rand(len(x), 1)


class _Masked(nn.Module):
    """One class is switched off: its huge logit must not hide how far the others move."""

    def forward(self, x: Tensor) -> Tensor:
        z = x.flatten(1)[:, :4]
        return torch.cat([z - 0.1 * z.mean(dim=0), torch.full((len(x), 1), -1e9)], dim=1)


class _Neighbours(nn.Module):
    """It needs five images to answer at all."""

    def forward(self, x: Tensor) -> Tensor:
        z = x.flatten(1)
        return z - torch.cdist(z, z).topk(5, dim=1, largest=False).values.mean(dim=1, keepdim=True)


@pytest.mark.parametrize(
    ("model", "dependent"),
    [(_ByMean(), True), (_ByPlace(), True), (_ByChance(), True), (make_hpm(), True), (make_classifier(), False),
     (nn.Sequential(nn.Flatten(), nn.BatchNorm1d(12)).eval(), False), (_Masked(), True), (_Neighbours(), True)],
)  # fmt: skip
def test_batch_dependence_is_found_out(model: nn.Module, dependent: bool) -> None:
    defense, x = WholeModel(model), torch.rand(6, 3, 2, 2)
    assert looks_batch_dependent(defense, x, decide(defense, x)) is dependent


def test_a_trunk_that_looks_at_its_batch_is_refused() -> None:
    x = torch.rand(6, 3, 2, 2)

    class Mixing(Custom):
        def features(self, x: Tensor) -> Tensor:
            z = super().features(x)
            return z - z.mean(dim=0)

    custom, mixing = Custom(12), Mixing(12)
    with torch.no_grad():
        check_trunk(custom, x, custom.features(x))
        check_trunk(make_hpm(), x, make_hpm().features(x))
        with pytest.raises(ValueError, match=r"move that part into logits"):
            check_trunk(mixing, x, mixing.features(x))


def test_modules_are_found_wherever_they_are_kept() -> None:
    @dataclass(slots=True)
    class Slotted:
        parts: list[object]
        more: dict[str, object]

    one, two, three = nn.Linear(1, 1), nn.Linear(1, 1), nn.Linear(1, 1)
    thing = Slotted([one, (two, 3)], {"deep": WholeModel(three)})
    thing.parts.append(thing)
    assert modules_of(thing) == [one, two, three]
    assert modules_of(object()) == []


ONE, TWO = nn.Linear(1, 1), nn.Linear(1, 1)


def _by_a_global(x: Tensor) -> Tensor:
    out: Tensor = TWO(_inner(x))
    return out


def _inner(x: Tensor) -> Tensor:
    out: Tensor = ONE(torch.relu(x))
    return out


def test_modules_are_found_in_what_a_function_names() -> None:
    class Called:
        def __call__(self, x: Tensor) -> Tensor:
            return _inner(x)

    own = nn.Linear(1, 1)
    assert set(modules_of(_by_a_global)) == {ONE, TWO}
    assert modules_of(WholeModel(lambda x: own(x) + 1)) == [own]
    assert modules_of(functools.partial(lambda model, x: model(x), own)) == [own]
    assert modules_of(own.forward) == [own]
    assert modules_of(Called()) == [ONE]
    assert modules_of(torch.relu) == []


@pytest.mark.parametrize(
    ("thing", "message"),
    [
        (3, "but got int"), (Custom, "class Custom"), (nn.Linear(1, 1).state_dict(), "a state dict; load it"),
        (nn.ModuleList([nn.Flatten()]), "mean of its logits"), ([nn.Flatten()], "mean of its logits"),
    ],
)  # fmt: skip
def test_what_can_not_be_a_defence(thing: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        as_defense(thing)


def test_weight_gradients_come_back_as_they_were() -> None:
    custom, hpm = Custom(), make_hpm()
    hpm.fc.requires_grad_(False)
    before = [p.requires_grad for p in hpm.parameters()]
    with pytest.raises(KeyError), without_weight_gradients(custom, hpm):  # noqa: PT012 (the state inside counts)
        assert not any(p.requires_grad for model in [*modules_of(custom), hpm] for p in model.parameters())
        raise KeyError
    assert [p.requires_grad for p in hpm.parameters()] == before
    assert custom.trunk.weight.requires_grad


def test_a_model_in_training_mode_is_refused() -> None:
    custom = Custom()
    custom.trunk.train()
    with pytest.raises(ValueError, match=r"call \.eval\(\)"), without_weight_gradients(custom):
        pass


def test_what_was_left_in_training_mode_is_named() -> None:
    class Depth(nn.Module):
        """Of a user: nobody knows what it does in training mode."""

    parts = nn.Sequential(nn.Linear(12, 4), nn.Dropout(0.5), nn.Dropout(0.0), nn.BatchNorm1d(4), Depth(), nn.ReLU())
    assert left_training(WholeModel(parts.eval())) == []
    for part in parts:
        part.train()
    assert left_training(WholeModel(parts)) == ["1 (Dropout)", "3 (BatchNorm1d)", "4 (Depth)"]


def test_an_evaluation_and_an_audit_name_what_was_left_in_training_mode() -> None:
    dropping = nn.Sequential(make_classifier(), nn.Dropout(0.3)).eval()
    samples, message = make_samples(make_classifier()), list[str]()
    overrides = {"attack.apgd.steps": 1, "attack.square.queries": 1, "threat.eps": 0.1}
    evaluate(dropping, samples, protocol="quick", overrides=overrides | {"audit.samples": 0}, notify=message.append)
    assert message == []
    dropping[1].train()
    results = evaluate(dropping, samples, protocol="quick", overrides=overrides, notify=message.append)
    assert message == ["parts of the defense are in training mode: 1 (Dropout)"]
    row = results.audit.set_index("sign").loc["training_mode"]
    assert (bool(row["fired"]), row["severity"]) == (True, "note")
    assert "1 (Dropout)" in row["reason"]


class _Rounding(nn.Module):
    """Its own gradient is zero; what it brings has one."""

    def __init__(self) -> None:
        super().__init__()
        self.classifier = make_classifier()

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(x.round())

    def smooth(self, x: Tensor) -> Tensor:
        return self.classifier(x)

    surrogates: Any = {"smooth": smooth}  # noqa: RUF012 - as a user writes it


def test_a_module_brings_surrogates_of_its_own_images() -> None:
    model = _Rounding().eval()
    x = torch.rand(4, 3, 2, 2)
    whole = as_defense(model)
    assert torch.equal(own_surrogates(whole)["smooth"](whole, x), model.smooth(x))
    samples = make_samples(model.classifier)
    results = evaluate(model, samples, protocol="quick", overrides={"attack.square.queries": 5})
    assert {"ste", "smooth"} <= set(results.attacks["surrogate"])
    given = evaluate(
        model, samples, protocol="quick", overrides={"attack.square.queries": 5},
        surrogates={"smooth": lambda defense, x: model.classifier(x)},
    )  # fmt: skip
    assert results.summary["value"].tolist() == given.summary["value"].tolist()


def test_a_trunks_surrogate_gets_the_defence_and_its_features() -> None:
    class Halved:
        def __init__(self) -> None:
            self.classifier = make_classifier()

        def features(self, x: Tensor) -> Tensor:
            return self.classifier.features(x)

        def logits(self, z: Tensor) -> Tensor:
            return self.classifier.logits(z).round()

        surrogates: Any = {"soft": lambda defense, z: defense.classifier.logits(z)}  # noqa: RUF012

    defense = Halved()
    results = evaluate(defense, make_samples(defense.classifier), protocol="quick", overrides={"samples.limit": 12})
    assert "soft" in set(results.attacks["surrogate"])


@pytest.mark.parametrize("brought", [[], {"soft": 3}, {3: abs}])
def test_what_is_brought_must_be_functions_by_name(brought: Any) -> None:
    model = _Rounding().eval()
    model.surrogates = brought
    with pytest.raises(ValueError, match="surrogate"):
        evaluate(model, make_samples(model.classifier), protocol="quick")
