"""Whether a target looks at its batch is found out where attacks go, whatever it says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toys import LinearTrunk, make_classifier, make_hpm, make_samples

from msa_eval import Classifier, Samples, WholeModel, evaluate, verify
from msa_eval.attacks.ball import Ball
from msa_eval.auditing.rules import batch_dependence_found
from msa_eval.defense.contract import decide
from msa_eval.judging.dependence import looks_at_its_batch

BALL = Ball("Linf", 0.1)


def _samples() -> Samples:
    """Images in 8 bit, labelled by the classifier."""
    x = (make_samples(make_classifier(), 32).x * 255).round().to(torch.uint8)
    return Samples(x, make_classifier()(x.float() / 255).argmax(dim=1))


class OffTheGrid(nn.Module):
    """It looks at its batch only where a pixel is none of 256 values."""

    def __init__(self) -> None:
        super().__init__()
        self.classifier = make_classifier()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.classifier(x)
        moved = bool(((x * 255) != (x * 255).round()).any())
        return out - 2 * out.mean(dim=0) if moved else out


class OffTheGridTrunk(Classifier):
    """The same with a trunk, whose features are the images."""

    batch_dependent = False

    def __init__(self) -> None:
        super().__init__(nn.Flatten(), nn.Linear(12, 4))
        self.inner = OffTheGrid()
        self.eval()

    def logits(self, z: Tensor) -> Tensor:
        return self.inner(z.view(-1, 3, 2, 2))  # type: ignore[no-any-return]


class Afar(nn.Module):
    """It looks at its batch only far from the clean images: where random points don't go, but steps do."""

    def __init__(self, samples: Samples, *, beyond: float) -> None:
        super().__init__()
        self.classifier, self.beyond = make_classifier(), beyond
        self.clean = samples.images(torch.arange(len(samples)))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.classifier(x)
        with torch.no_grad():
            far = torch.cdist(x.flatten(1), self.clean.flatten(1)).amin(dim=1).max() > self.beyond
        return out - 2 * out.mean(dim=0) if bool(far) else out


def _asked(defense: Any, ball: Ball | None = BALL, **options: Any) -> bool:
    x = _samples().images(torch.arange(24))
    with torch.no_grad():
        return looks_at_its_batch(defense, x, decide(defense, defense.features(x)), ball, **options)


@pytest.mark.parametrize("declared", [None, False])
def test_what_looks_at_its_batch_off_the_grid_alone_is_found(declared: bool | None) -> None:
    defense = WholeModel(OffTheGrid().eval(), batch_dependent=declared)
    assert not _asked(defense, None), "clean images don't show it"
    if declared is False:
        with pytest.warns(UserWarning, match="says batch_dependent = False"):
            assert _asked(defense)
    else:
        assert _asked(defense)
    with pytest.warns(UserWarning, match="OffTheGridTrunk says batch_dependent = False"):
        assert _asked(OffTheGridTrunk())


def test_points_that_steps_reach_show_what_random_ones_do_not() -> None:
    samples = _samples()
    x = samples.images(torch.arange(24))
    size = (BALL.random(x, torch.Generator().manual_seed(0)) - x).flatten(1).norm(dim=1).max()
    corner = 0.1 * 12**0.5
    assert size < 0.98 * corner
    assert _asked(WholeModel(Afar(samples, beyond=0.98 * corner).eval()))
    assert not _asked(WholeModel(Afar(samples, beyond=1.02 * corner).eval()))


@pytest.mark.filterwarnings("error")
def test_what_does_not_look_is_left_alone_and_what_says_it_does_is_believed() -> None:
    assert not _asked(make_classifier())
    assert not _asked(WholeModel(make_classifier()))
    assert not _asked(WholeModel(nn.Sequential(nn.Flatten(), nn.BatchNorm1d(12)).eval()))
    assert _asked(make_hpm())
    assert _asked(WholeModel(make_classifier(), batch_dependent=True))
    assert _asked(WholeModel(make_classifier()), stochastic=True)
    assert not _asked(make_classifier(), stochastic=True)


def test_one_image_has_no_companions() -> None:
    x = _samples().images(torch.arange(1))
    with torch.no_grad():
        plain = make_classifier()
        assert not looks_at_its_batch(plain, x, plain(x), BALL)
        assert looks_at_its_batch(WholeModel(plain), x, plain(x), BALL)


def test_a_decision_that_no_gradient_may_enter() -> None:
    class InNumpy(Classifier):
        batch_dependent = False

        def logits(self, z: Tensor) -> Tensor:
            return torch.from_numpy(self.fc(z).numpy().round(1))

    plain = make_classifier()
    assert not _asked(InNumpy(plain.trunk, plain.fc))


class OffTheGridFeatures(LinearTrunk):
    def forward(self, x: Tensor) -> Tensor:
        z = super().forward(x)
        return z - z.mean(dim=0) if bool(((x * 255) != (x * 255).round()).any()) else z


def test_a_trunk_that_mixes_its_batch_off_the_grid_is_refused() -> None:
    plain = make_classifier()
    with pytest.raises(ValueError, match=r"move that part into logits"):
        _asked(Classifier(OffTheGridFeatures(), plain.fc).eval())


def test_an_evaluation_takes_it_for_what_it_is_and_verifies(tmp_path: Path) -> None:
    samples = _samples()
    overrides = {"attack.apgd.steps": 5, "attack.square.queries": 10, "threat.eps": 0.1, "batches.size": 16}
    model = WholeModel(OffTheGrid().eval(), batch_dependent=False)
    with pytest.warns(UserWarning, match="evaluated as a target that looks at its batch"):
        results = evaluate(
            model, samples, protocol="quick", overrides=overrides, out=tmp_path / "r", save_adversarial=True
        )
    assert results.run["batch_dependent"] == {"defense": True}
    assert results.run["adversarial"]["unconfirmed"] == []
    row = results.audit.set_index("sign").loc["batch_dependence"]
    assert (bool(row["fired"]), row["severity"]) == (True, "note")
    with pytest.warns(UserWarning, match="evaluated as a target that looks at its batch"):
        assert verify(tmp_path / "r", model, samples).passed

    overrides |= {"audit.samples": 16}
    still = evaluate(make_classifier(), samples, protocol="quick", overrides=overrides)
    row = still.audit.set_index("sign").loc["batch_dependence"]
    assert (bool(row["fired"]), row["severity"]) == (False, "unreliable")


class AtTheEnd(Classifier):
    """It looks at its batch from a switch on, as one may that looks at points only a long search finds."""

    batch_dependent, looking = False, False

    def logits(self, z: Tensor) -> Tensor:
        out = super().logits(z)
        return out - 2 * out.mean(dim=0) if self.looking else out


def test_points_that_the_search_found_are_asked_about_in_other_company(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = make_classifier()
    model = AtTheEnd(plain.trunk, plain.fc).eval()

    def measure(*_: Any, **__: Any) -> list[Any]:
        model.looking = True  # the audit is over, and the runs begin
        return []

    monkeypatch.setattr("msa_eval.engine.assembly.probe", measure)
    overrides = {"attack.apgd.steps": 3, "attack.square.queries": 3, "threat.eps": 0.1}
    results = evaluate(model, _samples(), protocol="quick", overrides=overrides)
    row = results.audit.set_index("sign").loc["batch_dependence"]
    assert (bool(row["fired"]), row["severity"]) == (True, "unreliable")
    assert "the points found" in row["reason"]
    assert results.run["verdict"] == "unreliable"


def test_the_sign_of_the_points_found() -> None:
    assert [batch_dependence_found(drift).fired for drift in (0.0, 1e-4, 0.01, float("nan"))] == [
        False, False, True, True
    ]  # fmt: skip
