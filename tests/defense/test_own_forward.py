"""Which model counts where a module has a trunk, a decision and a ``forward`` of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toys import make_classifier, make_hpm, make_samples

from msa_eval import Classifier, Samples, WholeModel, audit, evaluate, verify
from msa_eval.defense.own_forward import counted
from msa_eval.report import render_table
from msa_eval.studies.batch_sizes import batch_size_report
from msa_eval.studies.crosscheck import crosscheck

QUICK: dict[str, Any] = {"attack.apgd.steps": 3, "attack.square.queries": 3, "audit.samples": 0, "threat.eps": 0.1}


class Own(Classifier):
    """A classifier whose forward is to be changed."""

    batch_dependent = False

    def __init__(self) -> None:
        plain = make_classifier()
        super().__init__(plain.trunk, plain.fc)
        self.eval()


class Inverting(Own):
    def forward(self, x: Tensor) -> Tensor:
        return self.logits(self.features(1 - x))


class OffTheGrid(Own):
    """Another model only where a pixel is not one of 256 values."""

    def forward(self, x: Tensor) -> Tensor:
        on_grid = bool(((x * 255) == (x * 255).round()).all())
        return super().forward(x) if on_grid else super().forward(x).flip(1)


class Noisy(Own):
    def logits(self, z: Tensor) -> Tensor:
        return super().logits(z) + torch.randn(len(z), 4)


class Repeatless(Noisy):
    """Its noise is drawn from a generator of its own."""

    def logits(self, z: Tensor) -> Tensor:
        return Own.logits(self, z) + 0.1 * torch.randn(len(z), 4, generator=self.generator)

    generator = torch.Generator().manual_seed(0)


class Layers(nn.Module):
    """Attributes named as a trunk and a decision are, with something between them."""

    def __init__(self, between: nn.Module) -> None:
        super().__init__()
        plain = make_classifier()
        self.features, self.between, self.logits = plain.trunk, between, plain.fc

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.logits(self.between(self.features(x)))
        return out


class Raising(Own):
    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("not meant to be called")


class Tuple(Own):
    def forward(self, x: Tensor) -> Any:
        z = self.features(x)
        return self.logits(z), z


def _on_grid() -> Samples:
    """Images in 8 bit, as they come."""
    x = (make_samples(make_classifier()).x * 255).round().to(torch.uint8)
    return Samples(x, make_classifier()(x.float() / 255).argmax(dim=1))


@pytest.mark.parametrize(
    "model", [make_classifier(), make_hpm(), Own(), Noisy(), Repeatless(), Raising(), Tuple(), Layers(nn.Identity())]
)
def test_a_trunk_whose_forward_says_the_same_counts(model: Any) -> None:
    assert counted(model.eval(), _on_grid().images(torch.arange(16))) is model


@pytest.mark.parametrize(
    ("model", "why"),
    [(Inverting(), "is not logits"), (OffTheGrid(), "another class"), (Layers(nn.ReLU()), "is not logits"),
     (Layers(nn.Unflatten(1, (6, 1))), "")],
)  # fmt: skip
def test_where_forward_says_something_else_the_whole_model_counts(model: Any, why: str) -> None:
    if not why:  # what fails as a whole is no model: the parts stay
        assert counted(model.eval(), _on_grid().images(torch.arange(16))) is model
        return
    found = counted(model.eval(), _on_grid().images(torch.arange(16)))
    assert isinstance(found, WholeModel)
    assert found.model is model
    assert why in found.why
    assert found.batch_dependent is None, "found out anew, for what was declared was of the parts"


def test_parts_that_fail_where_the_whole_does_not() -> None:
    """As in torchvision's style: what flattens stands in forward."""

    class Flattening(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.features, self.logits = nn.Conv2d(3, 6, 2), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.logits(self.features(x).flatten(1))
            return out

    found = counted(Flattening().eval(), _on_grid().images(torch.arange(16)))
    assert isinstance(found, WholeModel)
    assert "fails" in found.why


def test_what_can_not_be_evaluated_whole_is_refused() -> None:
    class Pair(Inverting):
        def forward(self, x: Tensor) -> Any:
            return x.mean()

    class Bringing(Inverting):
        surrogates: Any = {"soft": lambda defense, z: z}  # noqa: RUF012

    x = _on_grid().x.float() / 255
    with pytest.raises(ValueError, match="can't be compared with"):
        counted(Pair(), x)
    with pytest.raises(ValueError, match="its surrogates take features"):
        counted(Bringing(), x)


def test_memory_that_is_short_makes_the_batch_smaller() -> None:
    class Small(Inverting):
        def forward(self, x: Tensor) -> Tensor:
            if len(x) > 3:
                raise RuntimeError("CUDA out of memory")
            return super().forward(x)

    assert isinstance(counted(Small(), _on_grid().x.float() / 255), WholeModel)


@pytest.mark.parametrize("attribute", [512, [1, 2], torch.zeros(3)])
def test_an_attribute_that_is_no_function_is_no_trunk(attribute: Any) -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.features, self.logits = make_classifier(), attribute, attribute

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.body(x)
            return out

    model, samples = Plain().eval(), _on_grid()
    results = evaluate(model, samples, protocol="quick", overrides=QUICK)
    assert "whole" not in results.run
    right = model(samples.images(torch.arange(24))).argmax(dim=1) == samples.y
    assert results.samples["clean_correct"].mean() == float(right.float().mean())


def test_the_model_that_is_run_is_the_model_that_was_given(tmp_path: Path) -> None:
    """Every way in takes the whole model, says so, and means the same model by it."""
    model = Inverting()
    samples = make_samples(make_classifier())
    samples = Samples(1 - samples.x, samples.y)  # right on most, by its forward alone
    message: list[str] = []
    results = evaluate(
        model, samples, protocol="quick", overrides=QUICK, out=tmp_path / "own", save_adversarial=True,
        notify=message.append,
    )  # fmt: skip
    whole = evaluate(WholeModel(model), samples, protocol="quick", overrides=QUICK)
    assert results.summary["value"].tolist() == whole.summary["value"].tolist()
    assert results.summary["value"][0] > 0.5
    assert [line for line in message if "is not logits(features(x))" in line]
    assert "is not logits(features(x))" in results.run["whole"]["defense"]
    assert "the defense was evaluated as a whole" in render_table(results)
    assert "whole" not in whole.run

    assert verify(tmp_path / "own", model, samples).passed
    crosscheck(tmp_path / "own", model, samples, peers=["autoattack:apgd-ce"], steps=2)
    with pytest.warns(UserWarning, match="evaluated as a whole"):
        found = audit(model, samples, protocol="quick", overrides={"threat.eps": 0.1})
    assert next(sign for sign in found.signs if sign.name == "surrogate_disagrees").value == 0
    report = batch_size_report(
        model, samples, protocol="quick", overrides=QUICK, sizes=[24], notify=message.append, out=tmp_path / "sizes"
    )
    assert report.table["value"][0] == results.summary["value"][0]
    assert verify(tmp_path / "sizes/batch-24", model, samples).intact


def test_an_fc_with_a_forward_of_its_own() -> None:
    results = evaluate(
        make_classifier(), _on_grid(), fc=Inverting(), protocol="quick", overrides=QUICK, notify=lambda _: None
    )
    assert list(results.run["whole"]) == ["fc"]
