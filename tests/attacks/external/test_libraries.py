"""The adapters: each library's attacks as their authors run them, and the same points through a seat."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toys import make_classifier, make_samples

from msa_eval import Samples
from msa_eval.attacks.ball import Ball
from msa_eval.attacks.external import LIBRARIES, BatchModel, Found, find, installed, run_guarded

BALL = Ball("Linf", 0.06)
SEED = 11
N = 10


class RowByRow(nn.Module):
    """A classifier whose rounding is the same in batches of any size, so that points can be compared bit by bit."""

    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.classifier(row) for row in x.split(1)])


@pytest.fixture(scope="module")
def model() -> nn.Module:
    with torch.random.fork_rng():
        return RowByRow(make_classifier(5, inputs=108)).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def samples(model: nn.Module) -> Samples:
    return make_samples(model, N, shape=(3, 6, 6))


def _run_guarded(name: str, model: nn.Module, samples: Samples, *, ball: Ball = BALL, seed: int = SEED, turn: int = 0,
          **options: Any) -> tuple[Found, BatchModel]:  # fmt: skip
    batch_model = BatchModel(lambda x, rows: model(x), samples.x, samples.y, ball, classes=5)
    return run_guarded(find(name, ball, options), batch_model, seed=seed, turn=turn), batch_model


def _wrong(model: nn.Module, points: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        return model(points).argmax(dim=1) != y


AUTOATTACK = {
    "apgd-ce": {"steps": 100}, "apgd-dlr": {}, "apgd-t": {"targets": 4}, "fab": {}, "fab-t": {"targets": 4},
    "square": {"queries": 200},
}  # fmt: skip


@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize("name", AUTOATTACK)
def test_autoattack_finds_the_points_that_it_finds_by_itself(
    name: str, norm: Any, model: nn.Module, samples: Samples
) -> None:
    """pyautoattack's own evaluation, on the model itself; images it gives back clean have a point in their place."""
    from pyautoattack import AutoAttack

    ball = Ball(norm, 0.06 if norm == "Linf" else 0.4)
    suite = AutoAttack(model, eps=ball.eps, norm=norm, seed=SEED, version="custom", attacks=[name])
    suite.apgd.n_restarts = suite.fab.n_restarts = 1
    suite.apgd_targeted.n_target_classes = suite.fab.n_target_classes = 4
    suite.square.n_queries = 200
    with torch.random.fork_rng():
        direct = suite.run_standard_evaluation(samples.x.clone(), samples.y.clone(), batch_size=N)[0]
    found, _ = _run_guarded(name=f"autoattack:{name}", model=model, samples=samples, ball=ball, **AUTOATTACK[name])
    moved = (direct != samples.x).flatten(1).any(dim=1)
    assert 2 < moved.sum() < N
    assert torch.equal(found.x[moved], direct[moved])
    assert torch.equal(_wrong(model, found.x, samples.y), _wrong(model, direct, samples.y))


@pytest.mark.parametrize("name", ["apgd-t", "square"])
def test_autoattack_starts_elsewhere_with_another_seed(name: str, model: nn.Module, samples: Samples) -> None:
    first, again, other = (
        _run_guarded(
            f"autoattack:{name}", model, samples, seed=seed, **({"queries": 50} if name == "square" else {"steps": 5})
        )
        for seed in (1, 1, 2)
    )
    assert torch.equal(first[0].x, again[0].x)
    assert not torch.equal(first[0].x, other[0].x)


def test_fab_draws_nothing_and_says_so(model: nn.Module, samples: Samples) -> None:
    first, other = (_run_guarded("autoattack:fab-t", model, samples, seed=seed, steps=10)[0] for seed in (1, 2))
    assert torch.equal(first.x, other.x)
    assert not find("autoattack:fab-t", BALL).starts


def test_steps_and_targets_cost_what_they_should(model: nn.Module, samples: Samples) -> None:
    few, many = (_run_guarded("autoattack:apgd-t", model, samples, steps=10, targets=n)[1].images for n in (1, 4))
    assert few < many <= N + 4 * N * 11
    few, many = (_run_guarded("autoattack:apgd-ce", model, samples, steps=n)[1].images for n in (10, 30))
    right = int((~_wrong(model, samples.x, samples.y)).sum())
    assert (few, many) == (N + 11 * right, N + 31 * right)


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_missing_library_gives_the_command(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from msa_eval.attacks.external import libraries as package

    monkeypatch.setattr(package, "LIBRARIES", {library: ("no_such_package", LIBRARIES[library][1])})
    with pytest.raises(ValueError, match=r"no_such_package can't be imported .*; install it with: pip install"):
        find(f"{library}:any", BALL)
    assert installed(library) is None


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("PGD", {"steps": 20}), ("FGSM", {}), ("BIM", {"steps": 10, "alpha": "2/255"}), ("APGD", {"loss": "dlr"}),
        ("APGDT", {}), ("FAB", {"multi_targeted": True}), ("Square", {"n_queries": 100}), ("Jitter", {}),
        ("VMIFGSM", {"N": 3}),
    ],
)  # fmt: skip
def test_torchattacks_finds_the_points_that_it_finds_by_itself(
    name: str, options: dict[str, Any], model: nn.Module, samples: Samples
) -> None:
    peer = pytest.importorskip("torchattacks")
    found, batch_model = _run_guarded(f"torchattacks:{name}", model, samples, **options)
    used = {option: 2 / 255 if value == "2/255" else value for option, value in options.items()}
    steps = options.get("steps", 10)
    if name in ("PGD", "Jitter", "VMIFGSM"):
        used |= {"alpha": 2.5 * BALL.eps / steps}
    used |= {"seed": SEED} if name in ("APGD", "APGDT", "FAB", "Square") else {}
    used |= {"n_classes": 5} if name in ("APGDT", "FAB") else {}
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        direct = getattr(peer, name)(model, eps=BALL.eps, **used)(samples.x.clone(), samples.y.clone()).detach()
    moved = (direct != samples.x).flatten(1).any(dim=1)
    assert moved.sum() > 3
    inside = BALL.excess(direct, samples.x) <= 0
    assert inside.all()
    assert torch.equal(found.x[moved], direct[moved])
    assert batch_model.images > 0


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("LinfPGD", {"steps": 20}), ("LinfPGD", {"steps": 20, "targeted": True}), ("LinfFastGradientAttack", {}),
        ("LinfBasicIterativeAttack", {"steps": 5, "rel_stepsize": 0.3}), ("LInfFMNAttack", {"steps": 30}),
        ("LinfDeepFoolAttack", {}), ("LinfAdditiveUniformNoiseAttack", {}),
    ],
)  # fmt: skip
def test_foolbox_finds_the_points_that_it_finds_by_itself(
    name: str, options: dict[str, Any], model: nn.Module, samples: Samples
) -> None:
    peer = pytest.importorskip("foolbox")
    found, batch_model = _run_guarded(f"foolbox:{name}", model, samples, turn=1, **options)
    given = dict(options)
    criterion = peer.Misclassification(samples.y)
    if given.pop("targeted", False):
        with torch.no_grad():
            others = model(samples.x).scatter(1, samples.y.unsqueeze(1), -torch.inf)
        criterion = peer.TargetedMisclassification(others.topk(2, dim=1).indices[:, 1])
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        shown = peer.PyTorchModel(model, bounds=(0, 1), device="cpu")
        direct = getattr(peer.attacks, name)(**given)(shown, samples.x.clone(), criterion, epsilons=BALL.eps)[1]
    moved = (direct != samples.x).flatten(1).any(dim=1)
    assert moved.sum() > 3
    assert torch.equal(found.x[moved], direct[moved])
    assert batch_model.images > 0


def test_torchattacks_names_and_options_are_checked() -> None:
    pytest.importorskip("torchattacks")
    with pytest.raises(ValueError, match="torchattacks has no attack 'PDG'; did you mean 'PGD'"):
        find("torchattacks:PDG", BALL)
    with pytest.raises(ValueError, match=r"has no option 'step' \(did you mean 'steps'\?\); it takes: alpha, steps"):
        find("torchattacks:PGD", BALL, {"step": 3})
    with pytest.raises(ValueError, match="has no option 'eps'"):
        find("torchattacks:PGD", BALL, {"eps": 1.0})


def test_foolbox_names_and_options_are_checked() -> None:
    pytest.importorskip("foolbox")
    with pytest.raises(ValueError, match="foolbox has no attack 'LInfPGD'; did you mean 'LinfPGD'"):
        find("foolbox:LInfPGD", BALL)
    with pytest.raises(ValueError, match="expected steps to be a whole number"):
        find("foolbox:LinfPGD", BALL, {"steps": "many"})
    with pytest.raises(ValueError, match="foolbox:VirtualAdversarialAttack needs steps; give it"):
        find("foolbox:VirtualAdversarialAttack", BALL)
    assert find("foolbox:VirtualAdversarialAttack", BALL, {"steps": 3}).options["steps"] == 3


def test_torchattacks_leaves_the_ball_and_is_told(model: nn.Module, samples: Samples) -> None:
    pytest.importorskip("torchattacks")
    found, _ = _run_guarded("torchattacks:CW", model, samples, steps=50)
    assert any(fault.kind == "outside" and fault.count > 0 for fault in found.faults)
    assert not BALL.excess(found.x, samples.x).any()
