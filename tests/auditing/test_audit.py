"""Every sign of the audit on a toy where it must fire and on one where it must not."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn
from toys import make_classifier, make_hpm, make_samples

from msa_eval import HPM, Classifier, Samples, WholeModel
from msa_eval.attacks import Ball
from msa_eval.attacks.batch import Batch
from msa_eval.auditing.audit import AuditReport, Sign, StateGuard, audit, probe, signs_from, verdict_of
from msa_eval.auditing.rules import (
    gradient_free_beats_white_box,
    large_eps,
    loss_not_rising,
    one_step_beats_forty,
    surrogate_disagrees,
    transfer_beats_direct,
)
from msa_eval.auditing.weighing import weighed
from msa_eval.defense.contract import decide
from msa_eval.errors import AttackError
from msa_eval.evidence.results import Results
from msa_eval.surrogates import STE, get

COMMITTED = Path(__file__).parents[2] / "results/cifar10-wrn10-2"
OVERRIDES = {"threat.eps": 0.2, "batches.size": 24}


def _audit(target: Any, samples: Samples | None = None, **settings: Any) -> AuditReport:
    overrides = OVERRIDES | settings.pop("overrides", {})
    data = make_samples(make_classifier(), 48) if samples is None else samples
    # With surrogates found, hardly any of these toys would be masked any more.
    return audit(target, data, overrides=overrides, **{"protocol": "quick", "found_surrogates": False, **settings})


def _signs(target: Any, samples: Samples | None = None, **settings: Any) -> dict[str, Sign]:
    return {sign.name: sign for sign in _audit(target, samples, **settings).signs}


def _own(target: nn.Module, count: int = 48) -> Samples:
    """Samples labelled by the target."""
    return make_samples(target, count)


class Toy(Classifier):
    """A classifier of linear features, to be changed in one respect."""

    batch_dependent = False

    def __init__(self, classes: int = 4) -> None:
        plain = make_classifier(classes)
        super().__init__(plain.trunk, plain.fc)
        self.eval()


class OwnDecision(Toy):
    """A toy whose decision is not its FC head's: ``ste`` and ``fc-oracle`` are two attacks."""

    def fc_logits(self, z: Tensor) -> Tensor:  # type: ignore[override]
        return self.fc(z)  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def plain() -> AuditReport:
    return _audit(make_classifier(), fc=make_classifier())


def test_a_plain_classifier_is_sound(plain: AuditReport) -> None:
    """The silent side of every sign: nothing fires on a linear classifier."""
    assert [sign.name for sign in plain.signs if sign.fired] == []
    assert plain.verdict.verdict == "sound"
    assert plain.verdict.reasons == ()
    assert plain.n == 48
    assert plain.seconds > 0


def test_the_digits_reference(digits_hpm: HPM, digits: Samples) -> None:
    """HPM really looks at its batch, is neither random nor stateful, and its gradients are of use."""
    report = audit(digits_hpm, digits, protocol="digits")
    signs = {sign.name: sign for sign in report.signs}
    assert [name for name, sign in signs.items() if sign.fired] == ["batch_dependence"]
    assert signs["batch_dependence"].severity == "note"
    assert signs["large_eps"].value == 0
    assert signs["loss_not_rising"].value > 5
    assert "fc-oracle 5.8 %" in signs["surrogate_disagrees"].reason
    assert report.verdict.verdict == "sound"
    assert report.n == 120
    assert report.seconds < 120


def test_the_table(plain: AuditReport) -> None:
    frame = plain.to_frame()
    assert list(frame.columns) == ["target", "sign", "fired", "severity", "value", "threshold", "reason"]
    assert frame["target"].unique().tolist() == ["defense", "fc"]
    assert frame["sign"].is_unique is False
    assert len(frame) == len(plain.signs) + len(plain.fc.signs if plain.fc else ())
    assert frame["reason"].str.endswith(".").all()
    assert np.isfinite(frame["value"]).all()


def test_probabilities() -> None:
    model = nn.Sequential(make_classifier(), nn.Softmax(dim=1)).eval()
    sign = _signs(model)["probabilities"]
    assert sign.fired
    assert sign.severity == "suspect"


def test_a_sigmoid_is_no_softmax() -> None:
    model = nn.Sequential(make_classifier(), nn.Sigmoid()).eval()
    assert not _signs(model)["probabilities"].fired


class Noisy(nn.Module):
    """A classifier with noise on its logits, from a source of one's choice."""

    def __init__(self, source: str, scale: float = 0.3) -> None:
        super().__init__()
        self.classifier = make_classifier()
        self.source, self.scale = source, scale
        self.generator = torch.Generator().manual_seed(0)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(x)
        if self.source == "torch":
            noise = torch.randn(logits.shape)
        elif self.source == "numpy":
            noise = torch.from_numpy(np.random.standard_normal(tuple(logits.shape))).float()
        elif self.source == "python":
            noise = torch.tensor([[random.gauss(0, 1) for _ in row] for row in logits])
        else:
            noise = torch.randn(logits.shape, generator=self.generator)
        return logits + self.scale * noise


def test_randomness_that_follows_the_seed_is_a_note() -> None:
    signs = _signs(Noisy("torch").eval())
    assert signs["randomness"].fired
    assert signs["randomness"].severity == "note"
    assert "of the classes flip" in signs["randomness"].reason
    for name in ("state", "state_guard", "batch_dependence", "gradient_free_beats_white_box", "large_eps", "one_step"):
        assert not signs[name].fired, name


def test_what_chance_alone_breaks_is_no_success_of_an_attack() -> None:
    """Asked hundreds of times, noise makes any answer wrong once; that tells nothing of gradients."""
    signs = _signs(Noisy("torch", 0.5).eval(), overrides={"threat.eps": 1e-3})
    assert signs["randomness"].fired
    assert not signs["gradient_free_beats_white_box"].fired
    assert abs(signs["one_step"].value) < 0.1, "a step and forty are asked equally often"


class NoisyFeatures(Toy):
    """Noise on the features, so much that many an answer differs from the next."""

    masked = False

    def logits(self, z: Tensor) -> Tensor:
        z = (4 * z).round() / 4 + 0 * z.sum() if self.masked else z
        return super().logits(z + 0.3 * torch.randn(z.shape))


def test_single_draws_that_disagree_are_no_sign() -> None:
    model = NoisyFeatures()
    signs = _signs(model, overrides={"threat.eps": 0.1, "attack.apgd.surrogates": ["ste"]})
    assert signs["randomness"].fired
    with torch.no_grad():
        z = model.features(make_samples(make_classifier(), 48).x)
        assert (model.logits(z).argmax(dim=1) != model.logits(z).argmax(dim=1)).float().mean() > 0.1
    for name in ("surrogate_disagrees", "loss_not_rising", "large_eps", "one_step", "zero_gradients"):
        assert not signs[name].fired, signs[name].reason


def test_behind_noise_a_masked_gradient_and_another_surrogate_are_still_seen() -> None:
    masked = NoisyFeatures()
    masked.masked = True
    assert _signs(masked, overrides={"threat.eps": 0.05, "attack.apgd.surrogates": ["ste"]})["loss_not_rising"].fired
    other = {"turned": lambda defense, z: defense.fc(z).roll(1, 1)}
    overrides = {"attack.apgd.surrogates": ["soft-hybrid"], "threat.eps": 0.1}
    assert _signs(NoisyFeatures(), overrides=overrides, surrogates=other)["surrogate_disagrees"].fired


@pytest.mark.parametrize("source", ["numpy", "python"])
def test_randomness_from_other_generators_is_suspect(source: str) -> None:
    signs = _signs(Noisy(source).eval())
    assert not signs["randomness"].fired
    assert signs["state"].fired
    assert signs["state"].severity == "suspect"
    assert "NumPy" in signs["state"].reason


def test_randomness_that_no_seed_reaches_counts_as_state() -> None:
    sign = _signs(Noisy("own").eval())["state"]
    assert sign.fired
    assert sign.severity == "unreliable"


class Stateful(nn.Module):
    """A classifier whose answers move: with a plain counter, a buffer, or only when a gradient passes."""

    mean: Tensor

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.classifier = make_classifier()
        self.kind, self.count = kind, 0
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(x)
        if self.kind == "counter" or (self.kind == "gradient" and logits.requires_grad):
            self.count += 1
        elif self.kind == "buffer":
            self.mean.mul_(0.9).add_(0.1 * logits.detach().mean(dim=0))
        return logits + 0.01 * self.count * torch.arange(4) + self.mean


@pytest.mark.parametrize("kind", ["counter", "buffer", "gradient"])
def test_state(kind: str) -> None:
    signs = _signs(Stateful(kind).eval())
    for name in ("state", "state_guard"):
        assert signs[name].fired, name
        assert signs[name].severity == "unreliable"
    assert not signs["randomness"].fired


def test_a_defence_that_only_has_buffers_keeps_no_state() -> None:
    signs = _signs(Stateful("none").eval())
    assert not signs["state"].fired
    assert not signs["state_guard"].fired


def _batch(defense: Any, samples: Samples | None = None, count: int = 12) -> Batch:
    samples = samples or make_samples(make_classifier(), count)
    with torch.no_grad():
        z = defense.features(samples.x)
        return Batch(0, samples.x, samples.y, z, decide(defense, z))


def test_the_guard_names_what_changed() -> None:
    hpm = make_hpm()
    with StateGuard(hpm, batch=_batch(hpm)) as guard:
        hpm.features(_batch(hpm).x)
    assert guard.changes() == ()
    assert not guard.sign().fired
    with StateGuard(hpm, batch=_batch(hpm)) as guard:
        hpm.prototypes[0] += 1
        hpm.trunk.train()
        with torch.no_grad():
            hpm.fc.bias += 1
    sign = guard.sign()
    assert sign.fired
    for name in ("buffer prototypes", "parameter fc.bias", "training mode of trunk", "the answer of HPM"):
        assert name in sign.reason
    assert "mixer" not in sign.reason


def test_the_guard_tells_several_models_apart_and_sees_plain_attributes() -> None:
    hpm, counting = make_hpm(), WholeModel(Stateful("none").eval())
    guard = StateGuard(hpm, counting, batch=_batch(hpm))
    counting.model.count = 5
    assert guard.changes() == ("the answer of WholeModel to a clean batch",)
    hpm.prototypes[0] += 1
    assert guard.changes()[0] == "HPM 0: buffer prototypes"


def test_the_guard_does_not_hide_an_error() -> None:
    with pytest.raises(RuntimeError, match="mine"), StateGuard(make_hpm()):
        raise RuntimeError("mine")


class Mixed(Toy):
    """A decision that looks at its batch in one way."""

    def __init__(self, how: str, *, declared: bool) -> None:
        super().__init__()
        self.how, self.batch_dependent = how, declared

    def logits(self, z: Tensor) -> Tensor:
        out = super().logits(z)
        if self.how == "mean":
            return out - 0.5 * out.mean(dim=0)
        if self.how == "order":
            return out + 0.1 * torch.arange(len(z)).unsqueeze(1) * torch.arange(4)
        if self.how == "size":
            return out + (torch.arange(4) if len(z) < 13 else 0)
        if self.how == "one":
            return out / (out - out.mean(dim=0)).norm(dim=0)  # of a batch of one, not a number
        if self.how == "fails" and len(z) < 24:
            raise RuntimeError("batches of 24 only")
        return out


@pytest.mark.parametrize("how", ["mean", "order", "size", "one"])
@pytest.mark.parametrize(("declared", "severity"), [(True, "note"), (False, "unreliable")])
def test_batch_dependence(how: str, declared: bool, severity: str) -> None:
    defense = Mixed(how, declared=declared)
    sign = _probe(defense, batch_dependent=declared)["batch_dependence"]
    assert sign.fired
    assert sign.severity == severity
    assert ("batch_dependent = False" in sign.reason) is not declared


def test_only_other_companions_show_a_dependence_on_strangers() -> None:
    """Neither another order nor a cut batch brings an image together with one of another batch."""
    samples = make_samples(make_classifier(), 48)

    class Familiar(Toy):
        def logits(self, z: Tensor) -> Tensor:
            out = super().logits(z)
            means = [self.features(samples.x[i : i + 24]).mean(dim=0) for i in (0, 24)]
            strange = len(z) == 24 and all(not torch.allclose(z.mean(dim=0), mean, atol=1e-4) for mean in means)
            return out + (torch.arange(4) if strange else 0)

    sign = _probe(Familiar())["batch_dependence"]
    assert sign.fired
    assert "other companions" in sign.reason


def test_a_batch_size_without_an_answer_is_a_dependence() -> None:
    sign = _probe(Mixed("fails", declared=True), batch_dependent=True)["batch_dependence"]
    assert sign.fired
    assert sign.value == 1
    with pytest.raises(AttackError, match="batches of 24 only"):
        _probe(Mixed("fails", declared=False))


def test_a_defence_that_ignores_its_companions_may_say_otherwise() -> None:
    sign = _probe(Mixed("none", declared=True), batch_dependent=True)["batch_dependence"]
    assert not sign.fired
    assert sign.severity == "note"


def test_batch_dependence_shows_through_noise() -> None:
    class Both(Noisy):
        def forward(self, x: Tensor) -> Tensor:
            out = super().forward(x)
            return out - 5 * out.mean(dim=0)

    assert _signs(Both("torch", 0.05).eval())["batch_dependence"].fired


def _probe(defense: Any, *, batch_dependent: bool = False, samples: Samples | None = None) -> dict[str, Sign]:
    samples = samples or make_samples(make_classifier(), 48)
    batches = [_batch(defense, Samples(samples.x[i : i + 24], samples.y[i : i + 24])) for i in (0, 24)]
    found = probe(
        defense, [get("ste")], batches, Ball("Linf", 0.2), batch_dependent=batch_dependent, num_classes=4, seed=0
    )  # fmt: skip
    return {sign.name: sign for sign in found}


class Shaped(nn.Module):
    """A classifier whose gradient is zero, reversed or reversed off a grid, its answers unchanged."""

    def __init__(self, kind: str, classes: int = 4) -> None:
        super().__init__()
        self.classifier = make_classifier(classes)
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "quantised":
            x = torch.round(20 * x) / 20
        elif self.kind == "reversed":
            x = _valued(x.detach(), -x)
        elif self.kind == "grid":
            on_grid = ((64 * x.detach()).frac() == 0).all(dim=(1, 2, 3), keepdim=True)
            x = _valued(x.detach(), torch.where(on_grid, x, -x))
        elif self.kind == "infinite":
            x = x + 0 * torch.sqrt(x - x)
        return self.classifier(x)  # type: ignore[no-any-return]


def _valued(value: Tensor, gradient: Tensor) -> Tensor:
    return value + gradient - gradient.detach()


def _grid(classes: int = 4, count: int = 48) -> Samples:
    samples = make_samples(make_classifier(classes), count)
    x = (64 * samples.x).round() / 64
    with torch.no_grad():
        return Samples(x, make_classifier(classes)(x).argmax(dim=1))


@pytest.mark.parametrize("kind", ["quantised", "infinite"])
def test_zero_gradients(kind: str) -> None:
    model = Shaped(kind).eval()
    signs = _signs(model, _own(model))
    assert signs["zero_gradients"].fired
    assert signs["zero_gradients"].value == 1
    assert signs["zero_gradients"].severity == "unreliable"
    assert not signs["own_gradient_zero"].fired


def test_saturated_outputs_have_zero_gradients() -> None:
    model = nn.Sequential(make_classifier(), Times(1e4), nn.Sigmoid()).eval()
    assert _signs(model, _own(model))["zero_gradients"].fired


class Times(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * x


def test_dead_units() -> None:
    """A ReLU that is dead on clean images and around them, and one that is alive a little way off."""

    class Dead(nn.Module):
        def __init__(self, bias: float) -> None:
            super().__init__()
            self.classifier, self.bias = make_classifier(), bias

        def forward(self, x: Tensor) -> Tensor:
            return self.classifier(torch.relu(x - self.bias).amax(dim=(2, 3), keepdim=True).expand_as(x))  # type: ignore[no-any-return]

    x = 0.14 * torch.rand(48, 3, 2, 2, generator=torch.Generator().manual_seed(0)) + 0.35
    for bias, fired in ((0.9, True), (0.5, False)):
        model = Dead(bias).eval()
        with torch.no_grad():
            samples = Samples(x, model(x).argmax(dim=1))
        assert _signs(model, samples)["zero_gradients"].fired is fired


class HardDecision(OwnDecision):
    """The FC head's classes, without a gradient; or, rounded, with one that is zero."""

    def __init__(self, how: str = "detached") -> None:
        super().__init__()
        self.how = how

    def logits(self, z: Tensor) -> Tensor:
        out = self.fc(z)
        if self.how == "numpy":
            return torch.from_numpy(np.eye(4, dtype=np.float32)[out.numpy().argmax(axis=1)])
        one_hot: Tensor = nn.functional.one_hot(out.argmax(dim=1), 4).float()
        return one_hot if self.how == "detached" else one_hot + 0 * out


@pytest.mark.parametrize("how", ["detached", "zero"])
def test_only_the_own_gradient_vanishes(how: str) -> None:
    signs = _signs(HardDecision(how))
    assert signs["own_gradient_zero"].fired
    assert signs["own_gradient_zero"].severity == "note"
    for name in ("zero_gradients", "gradient_free_beats_white_box", "large_eps", "loss_not_rising"):
        assert not signs[name].fired, name


def test_no_surrogate_at_all_is_a_sign_and_no_error() -> None:
    for how in ("detached", "numpy"):

        class Bare(HardDecision):
            fc_logits = None  # type: ignore[assignment]

        report = _audit(Bare(how))
        signs = {sign.name: sign for sign in report.signs}
        assert signs["zero_gradients"].fired
        assert signs["gradient_free_beats_white_box"].severity == "unreliable"
        assert report.verdict.verdict == "unreliable"
        assert "surrogate_disagrees" not in signs


def test_a_decision_in_numpy_beside_a_surrogate() -> None:
    signs = _signs(HardDecision("numpy"))
    assert signs["own_gradient_zero"].fired
    assert not signs["zero_gradients"].fired


def test_gradient_free_beats_white_box() -> None:
    model = Shaped("quantised").eval()
    sign = _signs(model, _own(model))["gradient_free_beats_white_box"]
    assert sign.fired
    assert sign.severity == "unreliable"
    assert sign.value > 0.2


@pytest.mark.parametrize(
    ("only", "n", "fired", "severity"),
    [(0, 100, False, "suspect"), (1, 20, False, "suspect"), (2, 200, False, "suspect"), (3, 200, True, "suspect"),
     (2, 40, True, "suspect"), (2, 39, True, "unreliable"), (6, 100, True, "unreliable")],
)  # fmt: skip
def test_gradient_free_by_the_counts(only: int, n: int, fired: bool, severity: str) -> None:
    sign = gradient_free_beats_white_box(only, n)
    assert (sign.fired, sign.value) == (fired, only / n)
    if fired:
        assert sign.severity == severity
    assert gradient_free_beats_white_box(only, n, continued=True).severity == "note"


class Misleading(OwnDecision):
    """The FC head's answers with a reversed gradient; the head itself is honest."""

    def logits(self, z: Tensor) -> Tensor:
        out = self.fc(z)
        return _valued(out.detach(), -out)


def test_transfer_beats_direct() -> None:
    """A note, since the head's own gradient is true, and the figure rests on it."""
    signs = _signs(Misleading())
    assert signs["transfer_beats_direct"].fired
    assert signs["transfer_beats_direct"].severity == "note"
    assert not signs["gradient_truth"].fired
    by_itself = transfer_beats_direct(np.zeros(99, dtype=bool), {"fc-oracle": np.ones(99, dtype=bool)})
    assert (by_itself.fired, by_itself.severity) == (True, "suspect")
    assert "fc-oracle" in signs["transfer_beats_direct"].reason
    assert not signs["loss_not_rising"].fired


def test_the_direct_attack_is_made_for_comparison_where_the_protocol_has_none() -> None:
    found = _signs(Misleading(), overrides={"attack.apgd.surrogates": ["fc-oracle"]})
    assert found["transfer_beats_direct"].fired


def test_transfer_is_silent_where_the_own_gradient_is_as_good_and_where_there_is_no_other() -> None:
    sign = _signs(make_hpm())["transfer_beats_direct"]
    assert not sign.fired
    untried = _signs(make_classifier())["transfer_beats_direct"]
    assert not untried.fired
    assert untried == transfer_beats_direct(np.ones(5, dtype=bool), {})
    assert untried.reason.startswith("No transfer was tried")
    assert "No transfer" not in sign.reason


def test_transfer_must_be_more_than_chance() -> None:
    direct = np.zeros(40, dtype=bool)
    four, nine = direct.copy(), direct.copy()
    four[:4], nine[:9] = True, True
    assert not _fired(transfer_beats_direct(direct, {"a": four}))  # p = 0.0625
    assert _fired(transfer_beats_direct(direct, {"a": nine}))
    large = np.zeros(400, dtype=bool)
    large[:9] = True
    assert not _fired(transfer_beats_direct(np.zeros(400, dtype=bool), {"a": large}))  # 2 points


def _fired(sign: Sign) -> bool:
    return sign.fired


def test_what_optimises_inside_is_named() -> None:
    class Ascending(Toy):
        def logits(self, z: Tensor) -> Tensor:
            with torch.enable_grad():
                moved = z.detach().requires_grad_()
                (gradient,) = torch.autograd.grad(super().logits(moved).amax(dim=1).sum(), moved)
            return super().logits(z + 0.01 * gradient)

    sign = _signs(Ascending())["optimises_inside"]
    assert (sign.fired, sign.severity, sign.value) == (True, "note", 1)


def test_large_eps() -> None:
    model = Shaped("quantised").eval()
    sign = _signs(model, _own(model))["large_eps"]
    assert sign.fired
    assert sign.severity == "unreliable"


def test_large_eps_in_l2(plain: AuditReport) -> None:
    model = Shaped("quantised").eval()
    l2 = {"threat.norm": "L2", "threat.eps": 0.5}
    assert _signs(model, _own(model), overrides=l2)["large_eps"].fired
    sign = _signs(make_classifier(), overrides=l2)["large_eps"]
    assert not sign.fired
    assert "L2 radius 1.73" in sign.reason


def test_large_eps_that_can_not_be_answered() -> None:
    class Picky(Toy):
        def logits(self, z: Tensor) -> Tensor:
            out = super().logits(z)
            return torch.where(out.detach().abs().amax(dim=1, keepdim=True) > 3.6, out * torch.nan, out)

    with torch.no_grad():
        samples = make_samples(make_classifier(), 24)
        assert make_classifier()(samples.x).abs().max() < 3.4
    sign = _signs(Picky(), samples, overrides={"threat.eps": 0.01})["large_eps"]
    assert sign.fired
    assert "NaN or infinite" in sign.reason
    with pytest.raises(AttackError, match="NaN or infinite"):
        _signs(Picky(), samples, overrides={"threat.eps": 0.49})


@pytest.mark.parametrize(
    ("left", "n", "fired"), [(0, 1, False), (1, 1, True), (1, 12, False), (2, 12, True), (5, 100, False)]
)
def test_large_eps_by_the_counts(left: int, n: int, fired: bool) -> None:
    assert large_eps(left, n, "Linf radius 0.5").fired is fired
    assert large_eps(left, n, "Linf radius 0.5", failure="not finite").fired


def test_one_step_beats_forty() -> None:
    """The gradient is right on images of a grid only: one step starts there, forty do not."""
    signs = _signs(Shaped("grid").eval(), _grid())
    assert signs["one_step"].fired
    assert signs["one_step"].severity == "suspect"
    assert not signs["zero_gradients"].fired


def test_one_step_by_the_counts() -> None:
    assert not one_step_beats_forty({"a": 12, "b": 2}, {"a": 10, "b": 9}, 50).fired
    assert one_step_beats_forty({"a": 13, "b": 2}, {"a": 10, "b": 9}, 50).fired
    assert not one_step_beats_forty({"a": 13}, {"a": 10}, 200).fired


@pytest.mark.parametrize("kind", ["quantised", "reversed", "grid"])
def test_loss_not_rising(kind: str) -> None:
    sign = _signs(Shaped(kind).eval(), _grid())["loss_not_rising"]
    assert sign.fired
    assert sign.severity == "suspect"


@pytest.mark.parametrize("eps", [1e-4, 0.01, 0.3])
def test_loss_rises_at_any_radius(eps: float) -> None:
    assert not _signs(make_classifier(), overrides={"threat.eps": eps})["loss_not_rising"].fired
    assert loss_not_rising({"a": 0.4, "b": 3.0}).fired is False


def test_surrogate_disagrees() -> None:
    other = make_classifier(seed=3)

    class Elsewhere(OwnDecision):
        def fc_logits(self, z: Tensor) -> Tensor:
            return other.fc(z)  # type: ignore[no-any-return]

    only = {"attack.apgd.surrogates": ["fc-oracle"]}
    sign = _signs(Elsewhere(), overrides=only)["surrogate_disagrees"]
    assert sign.fired
    assert sign.severity == "suspect"
    beside = _signs(Elsewhere())["surrogate_disagrees"]
    assert not beside.fired
    assert f"fc-oracle {100 * sign.value:.1f} %" in beside.reason
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 4)).eval()
    assert not _signs(Elsewhere(), overrides=only, surrogates={"twin": make_classifier()})["surrogate_disagrees"].fired
    assert _signs(Elsewhere(), overrides=only, surrogates={"far": model})["surrogate_disagrees"].fired
    assert surrogate_disagrees({"a": 0.06, "b": 0.05}).fired is False


@pytest.mark.parametrize(
    "make",
    [
        make_hpm,
        lambda: WholeModel(make_hpm()),
        lambda: WholeModel(make_classifier(), batch_dependent=False),
        lambda: make_classifier(2),
        lambda: make_hpm(2),
        Misleading,
        HardDecision,
    ],
    ids=["hpm", "whole-hpm", "whole-classifier", "two-classes", "two-class-hpm", "misleading", "hard"],
)
@pytest.mark.parametrize("size", [1, 5])
def test_all_kinds_of_targets_and_batches(make: Any, size: int) -> None:
    target = make()
    classes = 2 if isinstance(target, nn.Module) and target.fc.out_features == 2 else 4
    samples = make_samples(make_classifier(classes), 5)
    losses = {"attack.apgd.losses": ["ce", "margin"]}
    report = _audit(target, samples, overrides={"batches.size": size, **losses})
    assert report.n == 5
    assert all(np.isfinite(sign.value) for sign in report.signs)


def test_a_single_image() -> None:
    samples = make_samples(make_classifier(), 2)
    report = _audit(make_hpm(), Samples(samples.x[1:], samples.y[1:]))
    found = {sign.name: sign for sign in report.signs}
    assert not found["batch_dependence"].fired
    assert "only one image" in found["batch_dependence"].reason


def test_the_same_seed_finds_the_same_and_global_randomness_is_left_alone() -> None:
    noisy, same, calm, hpm = Noisy("torch").eval(), Noisy("torch").eval(), Stateful("none").eval(), make_hpm()
    torch.manual_seed(3)
    np.random.seed(3)
    random.seed(3)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    samples = make_samples(hpm, 48)
    first, again = (_audit(model, samples).signs for model in (noisy, same))
    _audit(calm, samples)
    assert first == again
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])
    assert before[2] == random.getstate()
    assert _audit(hpm, samples, seed=1).signs != _audit(hpm, samples, seed=2).signs


def test_the_defence_is_left_as_it_was() -> None:
    hpm = make_hpm()
    learning = [parameter.requires_grad for parameter in hpm.parameters()]
    with StateGuard(hpm, batch=_batch(hpm)) as guard:
        _audit(hpm)
    assert guard.changes() == ()
    assert [parameter.requires_grad for parameter in hpm.parameters()] == learning


@pytest.mark.parametrize(("limit", "n"), [(1, 16), (16, 16), (31, 16), (32, 32), (1000, 48)])
def test_whole_batches_up_to_the_limit(limit: int, n: int) -> None:
    assert _audit(make_classifier(), overrides={"batches.size": 16}, limit=limit).n == n


def test_a_protocol_without_a_white_box_part_is_audited_with_the_usual_surrogates(tmp_path: Path) -> None:
    path = tmp_path / "square.toml"
    path.write_text(
        'schema = 1\nname = "s"\nversion = 1\ndescription = "d"\n[threat]\nnorm = "Linf"\neps = 0.1\n'
        "[attack.square]\nqueries = 10\n"
    )
    report = audit(make_hpm(), make_samples(make_hpm(), 12), protocol=path)
    assert "soft-hybrid" in {s.name: s for s in report.signs}["zero_gradients"].reason


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"limit": 0}, "limit >= 1"),
        ({"overrides": {"attack.apgd.surrogates": ["fc-orcale"]}}, "did you mean 'fc-oracle'"),
        ({"surrogates": {"dull": lambda defense, z: z.detach()[:, :4]}}, "'dull' has no gradient"),
        ({"device": "tpu"}, "tpu"),
    ],
)
def test_bad_input(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _audit(make_classifier(), **settings)


def test_labels_are_needed_and_models_must_be_in_evaluation_mode() -> None:
    with pytest.raises(ValueError, match="labels y"):
        audit(make_classifier(), torch.rand(4, 3, 2, 2))
    with pytest.raises(ValueError, match="training mode"):
        audit(make_classifier().train(), make_samples(make_classifier(), 4))


def _sign(severity: Any, fired: bool = True) -> Sign:
    return Sign(severity, fired, severity, 1.0, 0.0, f"This is {severity}.")


def test_the_gravest_sign_decides() -> None:
    assert verdict_of([]).verdict == "sound"
    assert verdict_of([_sign("note"), _sign("unreliable", fired=False)]).verdict == "sound"
    assert verdict_of([_sign("note"), _sign("suspect")]).reasons == ("This is suspect.",)
    both = verdict_of([_sign("suspect"), _sign("unreliable")])
    assert (both.verdict, both.reasons) == ("unreliable", ("This is unreliable.", "This is suspect."))


def _results(broken: dict[str, list[int]], right: list[int] | None = None, text: str = "") -> Results:
    """Evidence of runs named ``surrogate:attack-loss:restart`` that broke these of 40 samples."""
    n = 40
    index = np.arange(n) + 100
    correct = np.isin(np.arange(n), right) if right is not None else np.ones(n, dtype=bool)
    parts = {run: (run.split(":")[0], *run.split(":")[1].split("-"), int(run.split(":")[2])) for run in broken}
    same = {"target": "defense", "context": "joint"}
    attacks = [
        {**same, "run": run, "surrogate": s, "attack": a, "loss": loss, "restart": r, "backwards": 40 * (s != "target")}
        for run, (s, a, loss, r) in parts.items()
    ]
    outcomes = [
        pd.DataFrame({**same, "run": run, "index": index, "any_broken": np.isin(np.arange(n), hit)})
        for run, hit in broken.items()
    ]
    label = np.arange(n) % 10
    said = np.where(correct, label, (label + 1) % 10)
    samples = pd.DataFrame({**same, "index": index, "label": label, "clean_prediction": said, "clean_correct": correct})
    empty = pd.DataFrame()
    return Results(
        empty, pd.DataFrame(attacks), samples, pd.concat(outcomes), empty,
        {"protocol": {"text": text}, "targets": {"defense": {"num_classes": 10}}},
    )  # fmt: skip


def test_signs_from_evidence() -> None:
    def found(results: Results) -> dict[str, Sign]:
        return {sign.name: sign for sign in signs_from(results)}

    quiet = {"ste:apgd-ce:0": [*range(9)], "fc-oracle:apgd-ce:0": [*range(3)], "target:square-margin:0": [1, 2]}
    assert [sign.fired for sign in signs_from(_results(quiet))] == [False, False, False]
    loud = quiet | {"target:spsa-margin:0": [30, 31, 32]}
    sign = found(_results(loud))["gradient_free_beats_white_box"]
    assert (sign.fired, sign.severity, sign.value) == (True, "unreliable", 3 / 40)
    assert not found(_results(loud, right=[*range(31)]))["gradient_free_beats_white_box"].fired
    cascade = found(_results(loud, text='[attack.apgd]\ncombine = "cascade"\n'))
    assert cascade["gradient_free_beats_white_box"].severity == "note"
    assert "transfer_beats_direct" not in cascade
    transfer = quiet | {"fc-oracle:apgd-ce:0": [*range(20)]}
    assert found(_results(transfer))["transfer_beats_direct"].fired
    more_tries = transfer | {"fc-oracle:apgd-dlr:0": [3]}
    assert "transfer_beats_direct" not in found(_results(more_tries))
    assert signs_from(_results(quiet), target="fc") == []


def test_signs_from_committed_evidence() -> None:
    """7 of 2,500 samples fell to Square alone; ``paper-cifar10`` has no ``ste`` runs to compare with."""
    results = Results.load(COMMITTED)
    clean, sign = signs_from(results)
    assert (clean.name, clean.fired, clean.threshold) == ("clean_at_chance", False, 0.1)
    assert (sign.fired, sign.value) == (False, 7 / 2500)
    assert signs_from(results, target="fc")[1].value == 1 / 2500


def test_probe_takes_a_surrogate_the_protocol_does_not_name() -> None:
    hpm = make_hpm()
    hpm.requires_grad_(False)
    found = probe(
        hpm, [STE, get("soft-hybrid@2")], [_batch(hpm)], Ball("L2", 0.3), batch_dependent=True, num_classes=4, seed=4
    )  # fmt: skip
    assert "soft-hybrid@2" in {sign.name: sign for sign in found}["zero_gradients"].reason
    assert "state_guard" not in {sign.name for sign in found}


def test_where_nothing_is_left_and_where_a_gradient_is_true_signs_against_attacks_are_notes() -> None:
    astray = transfer_beats_direct(np.zeros(99, dtype=bool), {"soft": np.ones(99, dtype=bool)})
    steps = one_step_beats_forty({"ste": 50}, {"ste": 40}, 99)
    chance = Sign("batch_dependence", True, "unreliable", 0.5, 0.1, "It looks.")
    true, untrue = (Sign("gradient_truth", fired, "suspect", 0.5, 0.75, "A figure.") for fired in (False, True))

    def grave(signs: list[Sign], left: int) -> list[str]:
        return [sign.name for sign in weighed(signs, left=left) if sign.fired and sign.severity != "note"]

    assert grave([astray, steps, chance, untrue], 3) == [
        "transfer_beats_direct", "one_step", "batch_dependence", "gradient_truth"
    ]  # fmt: skip
    assert grave([astray, steps, chance, true], 3) == ["one_step", "batch_dependence"]
    assert grave([astray, steps, chance, untrue], 0) == ["batch_dependence"]


def test_a_step_through_one_that_beats_forty_through_it_is_no_fault_where_another_leads_further() -> None:
    assert one_step_beats_forty({"ste": 13, "soft": 20}, {"ste": 8, "soft": 30}, 32).fired is False
    assert one_step_beats_forty({"ste": 13, "soft": 5}, {"ste": 8, "soft": 6}, 32).fired
