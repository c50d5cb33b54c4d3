"""The engine on real and toy defences: laws, determinism, both targets, and bad input."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from toys import make_classifier, make_hpm, make_samples

from msa_eval import HPM, AttackError, Classifier, Results, Samples, Variant, evaluate
from msa_eval.defense.architectures import Normalize
from msa_eval.defense.weight_gradients import PROBED
from msa_eval.judging.batch_plan import plan_batches
from msa_eval.judging.clean_batches import CleanBatches
from msa_eval.protocols import load_protocol, make_protocol
from msa_eval.surrogates import Surrogate

SMALL: dict[str, Any] = {
    "schema": 1,
    "audit.samples": 0,
    "name": "small",
    "version": 1,
    "description": "A test.",
    "threat": {"norm": "Linf", "eps": 0.1},
    "batches": {"size": 8},
    "attack": {
        "apgd": {"surrogates": ["fc-oracle", "soft-hybrid", "ste"], "losses": ["ce", "dlr"], "steps": 6},
        "square": {"queries": 12},
    },
}


def _small(**overrides: Any) -> Any:
    return make_protocol(SMALL, overrides={key.replace("__", "."): value for key, value in overrides.items()})


class BatchMean(nn.Module):
    """A dynamic model without a trunk: it subtracts the batch's mean."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = make_classifier()
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x - x.mean(dim=0) + 0.5)
        return out


class Noisy(nn.Module):
    """A stochastic model."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = make_classifier()
        self.generator = torch.Generator().manual_seed(0)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        noise = torch.randn(x.shape, generator=self.generator)
        out: Tensor = self.inner(x + 0.05 * noise)
        return out


def _check_laws(results: Results) -> None:
    for target, rows in results.summary.groupby("target"):
        value = rows.set_index("metric")["value"]
        runs = results.attacks[results.attacks["target"] == target]
        assert value["worst_case"] <= value["realised"] <= value["paper"] <= value["clean"]
        assert value["paper"] == runs["final"].min()
        assert (runs["any"] <= runs["final"]).all()
        assert (runs["final"] <= value["clean"]).all()
        assert (value["worst_case"] <= runs["any"]).all()
        assert (rows["low"] <= rows["value"]).all()
        assert (rows["value"] <= rows["high"]).all()
        lost = (value["clean"] - value["worst_case"]) * rows["n"].iloc[0]
        assert runs["newly_broken"].sum() == round(lost)


@pytest.mark.parametrize("make", [make_hpm, make_classifier, BatchMean, Noisy])
@given(seed=st.integers(0, 1000), eps=st.floats(0.01, 0.49), norm=st.sampled_from(["Linf", "L2"]))
@settings(max_examples=4, deadline=None)
def test_the_laws_hold_on_every_kind_of_defence(
    make: Callable[[], nn.Module], seed: int, eps: float, norm: str
) -> None:
    model = make()
    samples = make_samples(model, 20, seed=seed)
    _check_laws(evaluate(model, samples, protocol=_small(threat__eps=eps, threat__norm=norm), seed=seed))


def test_the_tables_follow_from_each_other(digits_hpm: HPM, digits: Samples, tmp_path: Path) -> None:
    """Every number again, from the CSVs alone, by its definition."""
    protocol = load_protocol(
        "digits",
        overrides={
            "samples.limit": 90, "attack.square.queries": 40, "attack.apgd.steps": 8, "attack.apgd.passes": 60,
            "attack.apgd.overtime": 10, "attack.recombination.passes": 60, "audit.samples": 0,
        },
    )  # fmt: skip
    evaluate(digits_hpm, digits, protocol=protocol, out=tmp_path)
    tables = {name: pd.read_csv(tmp_path / f"{name}.csv") for name in ("summary", "attacks", "samples", "outcomes")}
    for target in ("defense", "fc"):
        samples, outcomes, attacks, summary = (
            tables[name][tables[name]["target"] == target] for name in ("samples", "outcomes", "attacks", "summary")
        )
        value = summary.set_index("metric")["value"]
        samples = samples.set_index("index")
        right = samples["clean_prediction"] == samples["label"]
        assert (right == samples["clean_correct"]).all()
        by_run = {run: rows.set_index("index") for run, rows in outcomes.groupby("run", sort=False)}
        ever = pd.concat([rows["any_broken"] for rows in by_run.values()], axis=1).any(axis=1)
        assert (samples["robust"] == (right & ~ever)).all()
        finals = {run: (right & ~rows["final_broken"]).mean() for run, rows in by_run.items()}
        assert value["clean"] == pytest.approx(right.mean(), abs=1e-12)
        assert value["worst_case"] == pytest.approx((right & ~ever).mean(), abs=1e-12)
        assert value["paper"] == pytest.approx(min(finals.values()), abs=1e-12)
        assert value["realised"] == pytest.approx(samples["committed_right"].mean(), abs=1e-12)
        for row in attacks.itertuples():
            rows = by_run[str(row.run)]
            assert row.final == pytest.approx(finals[str(row.run)], abs=1e-12)
            assert row.any == pytest.approx((right & ~rows["any_broken"]).mean(), abs=1e-12)
            assert row.surrogate_accuracy == pytest.approx((~rows["surrogate_fooled"]).mean(), abs=1e-12)
        for index, sample in samples[right & ever].iterrows():
            first = next(run for run, rows in by_run.items() if rows.loc[index, "any_broken"])
            assert sample["broken_by"] == first
            assert sample["broken_at"] == by_run[first].loc[index, "first_iterate"]
        assert (samples.loc[~right, "broken_by"] == "clean").all()
        assert samples.loc[right & ~ever, "broken_by"].isna().all()
        lows = pd.concat([rows["min_margin"] for rows in by_run.values()], axis=1).min(axis=1)
        assert (samples["min_margin"] <= lows + 1e-7).all()
        assert ((samples["min_margin"] > 0) == samples["robust"]).all()
        assert outcomes["perturbation"].between(0, 0.15 + 1e-6).all()


def test_the_same_seed_gives_identical_tables(digits_hpm: HPM, digits: Samples, tmp_path: Path) -> None:
    """All files byte for byte."""
    overrides = {
        "samples.limit": 24, "attack.square.queries": 10, "attack.spsa.queries": 5, "attack.apgd.steps": 3,
        "attack.apgd.passes": 30, "attack.apgd.overtime": 5, "attack.recombination.passes": 30, "audit.samples": 12,
        "batches.size": 12,
    }  # fmt: skip
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        evaluate(digits_hpm, digits, protocol="digits", overrides=overrides, seed=seed, out=tmp_path / name)

    def text(run: str, table: str) -> bytes:
        return (tmp_path / run / f"{table}.csv").read_bytes()

    for table in ("summary", "attacks", "samples", "outcomes", "batches", "audit"):
        assert text("a", table) == text("b", table)
    assert text("a", "outcomes") != text("c", "outcomes")
    assert text("a", "batches") == text("c", "batches")


def test_both_targets_stand_in_every_table(digits_hpm: HPM, digits: Samples) -> None:
    results = evaluate(
        digits_hpm, digits, protocol="paper-cifar10",
        overrides={"samples.limit": 40, "attack.square.queries": 5, "attack.apgd.steps": 3, "audit.samples": 0},
    )  # fmt: skip
    runs = results.attacks.groupby("target")["run"].apply(list)
    both = ["fc-oracle:apgd-ce:0", "fc-oracle:apgd-dlr:0"]
    soft = ["soft-hybrid:apgd-ce:0", "soft-hybrid:apgd-dlr:0"]
    assert runs["defense"] == [*both, *soft, "target:square-margin:0"]
    assert runs["fc"] == [*both, "target:square-margin:0"]
    for table in (results.summary, results.attacks, results.samples, results.outcomes):
        assert set(table["target"]) == {"defense", "fc"}
    assert results.run["targets"]["fc"]["not_applicable"] == ["soft-hybrid"]
    alone = evaluate(
        digits_hpm.fc_target, digits, protocol="paper-cifar10",
        overrides={"audit.samples": 0, "samples.limit": 40, "attack.square.queries": 5, "attack.apgd.steps": 3},
    )  # fmt: skip
    assert alone.run["targets"]["defense"]["sha256"] == results.run["targets"]["fc"]["sha256"]
    fc = results.samples[results.samples["target"] == "fc"]["clean_prediction"].tolist()
    assert alone.samples["clean_prediction"].tolist() == fc


def test_a_certain_result_at_both_ends_of_epsilon() -> None:
    """Nothing breaks where the ball is smaller than every margin, and all where nearly every image fits into it."""
    hpm = make_hpm()
    samples = make_samples(hpm, 24)
    with torch.no_grad():
        clean = hpm(samples.x)
    top = clean.topk(2, dim=1).values
    keep = (clean.argmax(dim=1) == samples.y) & (top[:, 0] - top[:, 1] > 1e-3)
    sure = Samples(samples.x[keep][:8], samples.y[keep][:8])

    def worst(eps: float) -> tuple[float, float]:
        value = evaluate(hpm, sure, protocol=_small(threat__eps=eps, attack__apgd__steps=40)).summary.set_index(
            ["target", "metric"]
        )["value"]
        return value["defense", "clean"], value["defense", "worst_case"]

    clean_share, at_nothing = worst(1e-6)
    assert at_nothing == clean_share > 0
    assert worst(0.49)[1] == 0


def test_worst_case_on_a_linear_classifier_is_the_closed_form() -> None:
    """Two classes: exactly the samples with a margin above 2ε times half the l1 gap of the weights survive."""
    classifier = make_classifier(2)
    samples = make_samples(classifier, 200, seed=4)
    samples = Samples(0.4 + 0.2 * samples.x, samples.y)
    eps = 0.05
    with torch.no_grad():
        gap = (classifier.fc.weight[1] - classifier.fc.weight[0]) @ classifier.trunk.weight.T  # type: ignore[operator]
        offset = classifier.fc.bias[1] - classifier.fc.bias[0]
        margin = (samples.x.flatten(1) @ gap + offset) * (2 * samples.y - 1)
    survives = margin > eps * gap.abs().sum()
    clear = (margin - eps * gap.abs().sum()).abs() > 1e-4
    assert 0.1 < survives.float().mean() < 0.9
    results = evaluate(classifier, samples, protocol=_small(
        threat__eps=eps, attack__apgd__losses=["ce", "margin"], attack__apgd__steps=20
    ))  # fmt: skip
    robust = torch.tensor(results.samples["robust"].tolist())
    assert torch.equal(robust[clear], survives[clear])


def test_batches_stay_whole_and_in_order(digits: Samples) -> None:
    """A target that knows its batches: every run shows it the same companions, sample by sample."""
    seen: set[tuple[int, ...]] = set()

    class Nosy(Classifier):
        def logits(self, z: Tensor) -> Tensor:
            seen.add((len(z),))
            return super().logits(z)

        def forward(self, x: Tensor) -> Tensor:
            raise NotImplementedError  # or it would be compared, in a batch of another size

    plain = make_classifier(10, inputs=64)
    nosy = Nosy(plain.trunk, plain.fc).eval()
    nosy.batch_dependent = True
    results = evaluate(nosy, Samples(digits.x[:20], digits.y[:20]), protocol=_small())
    assert seen == {(PROBED,), (6,), (7,)}  # a few images are asked about beforehand: whether it takes gradients
    assert results.batches["batch"].value_counts().sort_index().tolist() == [7, 7, 6]
    places = results.samples[["index", "batch", "position"]].merge(results.batches, on=["index", "batch", "position"])
    assert len(places) == 20


def test_a_users_own_surrogate_attacks_beside_the_protocols(digits_hpm: HPM, digits: Samples) -> None:
    overrides = {
        "audit.samples": 0,
        "samples.limit": 40,
        "attack.square.queries": 5,
        "attack.apgd.steps": 3,
        "threat.eps": 0.15,
    }
    own = {"sharp": lambda defense, z: defense.logits(z, "soft", temperature=0.1)}
    results = evaluate(digits_hpm, digits, protocol="quick", overrides=overrides, surrogates=own)
    assert "sharp:apgd-ce:0" in set(results.attacks["run"])
    assert "sharp:apgd-ce:0" not in set(results.attacks[results.attacks["target"] == "fc"]["run"])


def test_any_defence_from_the_outside(digits: Samples) -> None:
    """An object that is no module, with its own plain classifier beside it; arrays instead of samples."""
    plain = make_classifier(10, inputs=64)

    class Dynamic:
        def features(self, x: Tensor) -> Tensor:
            return plain.features(x)

        def logits(self, z: Tensor) -> Tensor:
            return plain.logits(z - z.mean(dim=0))

    results = evaluate(Dynamic(), digits.x[:30].numpy(), digits.y[:30].numpy(), protocol=_small(), fc=plain)
    runs = results.attacks.groupby("target")["surrogate"].unique()
    assert list(runs["defense"]) == ["ste", "target"]
    assert list(runs["fc"]) == ["fc-oracle", "target"]
    _check_laws(results)


def test_batch_dependence_is_recorded() -> None:
    def found(target: object) -> dict[str, bool]:
        samples = make_samples(make_classifier(), 10)
        record: dict[str, bool] = evaluate(target, samples, protocol=_small()).run["batch_dependent"]
        return record

    assert found(make_hpm()) == {"defense": True, "fc": False}
    assert found(BatchMean()) == {"defense": True}
    assert found(nn.Sequential(nn.Flatten(), nn.Linear(12, 4)).eval()) == {"defense": False}


def test_models_are_left_as_they_were() -> None:
    hpm = make_hpm()
    before = {name: value.clone() for name, value in hpm.state_dict().items()}
    learning = [p.requires_grad for p in hpm.parameters()]
    evaluate(hpm, make_samples(make_classifier(), 10), protocol=_small())
    assert all(torch.equal(before[name], value) for name, value in hpm.state_dict().items())
    assert [p.requires_grad for p in hpm.parameters()] == learning
    assert all(p.grad is None for p in hpm.parameters())
    assert not hpm.training


def test_the_global_random_state_is_neither_read_nor_changed() -> None:
    hpm, samples = make_hpm(), make_samples(make_classifier(), 10)
    torch.manual_seed(0)
    state = torch.random.get_rng_state()
    first = evaluate(hpm, samples, protocol=_small())
    assert torch.equal(state, torch.random.get_rng_state())
    torch.manual_seed(1)
    assert evaluate(hpm, samples, protocol=_small()).outcomes.equals(first.outcomes)


def test_a_failure_is_an_error_and_writes_nothing(tmp_path: Path, running: list[Any]) -> None:
    class Raising(Classifier):
        def logits(self, z: Tensor) -> Tensor:
            if running:
                raise RuntimeError("out of luck")
            return super().logits(z)

    plain = make_classifier()
    with pytest.raises(AttackError, match=r"defense, run ste:apgd-ce:0, batch 0: out of luck"):
        evaluate(
            Raising(plain.trunk, plain.fc).eval(), make_samples(plain), out=tmp_path / "r",
            protocol=_small(attack__apgd__surrogates=["ste"]),
            surrogates={"ste": Surrogate("ste", lambda defense, z: defense.logits(z))},
        )  # fmt: skip
    assert list((tmp_path / "r").iterdir()) == []


class _Nan(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)[:, :3] * torch.nan


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: evaluate(make_classifier(2), _samples(2), protocol=_small()), "dlr loss needs at least 3 classes"),
        (lambda: evaluate(make_classifier(3), _samples(3), protocol=_small(
            attack__apgd__losses=["dlr-targeted"])), "at least 4 classes"),
        (lambda: evaluate(make_classifier(4), _samples(7), protocol=_small()), "label [456], but the model has 4"),
        (lambda: evaluate(make_classifier().train(), _samples(4), protocol=_small()), "training mode"),
        (lambda: evaluate(_Nan().eval(), _samples(3), protocol=_small()), "not finite"),
        (lambda: evaluate(nn.Identity().eval(), _samples(3), protocol=_small()), r"logits of shape \(8, k\)"),
        (lambda: evaluate(nn.Linear(5, 3).eval(), _samples(3), protocol=_small()), "can't take a float32 batch of"),
        (lambda: evaluate(make_classifier(), _samples(4), protocol="quik"), "did you mean 'quick'"),
        (lambda: evaluate(make_classifier(), _samples(4), protocol=_small(
            attack__apgd__surrogates=["fc-orcale"])), "did you mean 'fc-oracle'"),
        (lambda: evaluate(make_classifier(), torch.rand(3, 3, 2, 2) * 255, torch.arange(3)), r"images in \[0, 1\]"),
        (lambda: evaluate(make_classifier(), torch.rand(3, 3, 2, 2), torch.arange(2)), "one label per image"),
        (lambda: evaluate(make_classifier(), _samples(4), protocol=_small(), overrides={"a": 1}), "with a Protocol"),
    ],
)  # fmt: skip
def test_bad_input_is_named(call: Callable[[], Results], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def _samples(classes: int) -> Samples:
    return make_samples(make_classifier(classes), 24)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_where_there_is_none() -> None:
    with pytest.raises(ValueError, match="CUDA is not available"):
        evaluate(make_classifier(), _samples(4), protocol=_small(), device="cuda")


def test_a_naturally_trained_resnet_comes_out_at_zero(cifar10: Samples) -> None:
    """AutoAttack's own ResNet-18 keeps nothing at 4/255 (at 2/255 pyautoattack leaves one of these images too)."""
    examples = pytest.importorskip("pyautoattack.examples.resnet")
    path = Path(examples.__file__).with_name("model_test.pt")
    model = examples.ResNet18()
    model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    results = evaluate(
        model.eval(), Samples(cifar10.x[:4], cifar10.y[:4]), protocol="quick",
        overrides={"audit.samples": 0, "threat.eps": "4/255", "attack.square.queries": 5, "attack.apgd.steps": 10},
        found_surrogates=False,
    )  # fmt: skip
    value = results.summary.set_index("metric")["value"]
    assert value["clean"] > 0.7
    assert value["worst_case"] == 0


def test_results_that_can_not_be_written_are_rescued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk fills up during the evaluation: the error says where the results went, and they are all there."""
    save = Results.save

    def full(self: Results, folder: Path, **settings: Any) -> None:
        if Path(folder) == tmp_path / "r":
            raise OSError(28, "could not write r/outcomes.csv: No space left on device")
        save(self, folder, **settings)

    monkeypatch.setattr(Results, "save", full)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(OSError, match=r"No space left on device; the results are in (\S+) instead") as caught:
        evaluate(make_classifier(), _samples(4), protocol=_small(), out=tmp_path / "r")
    rescued = str(caught.value).split(" in ")[-1].removesuffix(" instead")
    assert Results.load(rescued).summary["n"].iloc[0] == 24


def test_numpy_types_do_not_leak_into_run_json(tmp_path: Path) -> None:
    evaluate(make_classifier(), _samples(4), protocol=_small(), out=tmp_path, seed=int(np.int64(3)))
    assert Results.load(tmp_path).run["seed"] == 3


class _HardOnly:
    """A decision through an argmax: no gradient at all."""

    batch_dependent = False

    def __init__(self) -> None:
        self.plain = make_classifier()

    def features(self, x: Tensor) -> Tensor:
        return self.plain.features(x)

    def logits(self, z: Tensor) -> Tensor:
        return nn.functional.one_hot(self.plain.logits(z).argmax(dim=1), 4).float()


def test_a_decision_without_gradient_is_attacked_through_what_has_one() -> None:
    hard = _HardOnly()
    samples = make_samples(hard.plain, 20)
    with pytest.raises(ValueError, match="give a differentiable one of your own"):
        evaluate(hard, samples, protocol=_small(), found_surrogates=False)
    found = evaluate(hard, samples, protocol=_small())
    assert any(name.startswith("straight-through") for name in found.attacks["surrogate"])
    own = {"soft": lambda defense, z: defense.plain.fc(z)}
    results = evaluate(hard, samples, protocol=_small(), surrogates=own, found_surrogates=False)
    assert set(results.attacks["surrogate"]) == {"soft", "target"}
    assert "ste" in results.run["targets"]["defense"]["not_applicable"]
    with pytest.raises(ValueError, match="surrogate 'blind' has no gradient"):
        evaluate(hard, samples, protocol=_small(), surrogates={"blind": lambda defense, z: z.detach()})


def test_a_model_of_the_users_own_is_a_surrogate() -> None:
    hpm, base = make_hpm(), make_classifier(seed=5)
    results = evaluate(hpm, make_samples(hpm, 20), protocol=_small(), surrogates={"base": base})
    row = results.attacks.set_index(["target", "run"]).loc[("defense", "base:apgd-ce:0")]
    assert row["forwards"] == 2 * 20 * (6 + 2)
    assert row["backwards"] == 20 * 6


def test_own_surrogates_may_be_named_in_the_protocol_and_are_the_defences_alone() -> None:
    own = {"mine": lambda defense, z: 2 * defense.fc_logits(z)}
    hpm = make_hpm()
    protocol = _small(attack__apgd__surrogates=["mine", "fc-oracle"])
    results = evaluate(hpm, make_samples(hpm, 12), protocol=protocol, surrogates=own, found_surrogates=False)
    runs = results.attacks.groupby("target")["surrogate"]
    assert set(runs.get_group("defense")) == {"mine", "fc-oracle", "target"}
    assert set(runs.get_group("fc")) == {"fc-oracle", "target"}


def test_what_decides_differently_has_another_key(tmp_path: Path) -> None:
    """Same weights, other decisions: variants, a normalisation, a changed surrogate function."""
    samples = make_samples(make_classifier(), 12)
    plain = make_hpm()

    def variant(similarity: str) -> HPM:
        hpm = HPM(plain.trunk, plain.fc, variant=Variant(similarity=similarity)).eval()  # type: ignore[arg-type]
        hpm.prototypes.copy_(plain.prototypes)
        return hpm

    def key(target: object, **own: Any) -> str:
        found: str = evaluate(target, samples, protocol=_small(), surrogates=own or None).run["key"]
        return found

    keys = [
        *(key(variant(similarity)) for similarity in ("l2", "inner", "cosine")),
        *(key(Classifier(nn.Sequential(Normalize([0.5] * 3, [std] * 3), plain.trunk), plain.fc).eval())
          for std in (1.0, 0.1)),
        key(plain, mine=lambda defense, z: defense.fc_logits(z)),
        key(plain, mine=lambda defense, z: -defense.fc_logits(z)),
    ]  # fmt: skip
    assert len(set(keys)) == len(keys)
    assert key(plain) == key(variant("l2"))


def test_a_call_inside_autocast_or_inference_mode_gives_the_same() -> None:
    hpm = make_hpm()
    samples = make_samples(hpm, 16)
    first = evaluate(hpm, samples, protocol=_small())
    for surrounding in (torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad(), torch.inference_mode()):
        with surrounding:
            again = evaluate(hpm, samples, protocol=_small())
        pd.testing.assert_frame_equal(again.outcomes, first.outcomes)


class _Tuple(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


class _InTraining:
    """Its module hides in a list."""

    def __init__(self) -> None:
        self.parts = [nn.Sequential(nn.Flatten(), nn.BatchNorm1d(12), nn.Linear(12, 4))]

    def features(self, x: Tensor) -> Tensor:
        out: Tensor = self.parts[0](x)
        return out

    def logits(self, z: Tensor) -> Tensor:
        return z


ONLY_SQUARE = {key: value for key, value in SMALL.items() if key != "attack"} | {"attack": {"square": {"queries": 3}}}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: evaluate(_Tuple().eval(), _samples(4), protocol=_small()), "but got a tuple"),
        (lambda: evaluate(_InTraining(), _samples(4), protocol=_small()), "training mode"),
        (lambda: evaluate(make_classifier(), torch.rand(3, 3, 2, 2), protocol=_small()), "labels y"),
        (lambda: evaluate(make_hpm(4), _samples(4), protocol=_small(), fc=make_classifier(7)), "the same classes"),
        (lambda: evaluate(make_hpm(), _samples(4), protocol=_small(), device="warp"), "can't be used here"),
        (lambda: evaluate(make_hpm(), _samples(4), protocol=make_protocol(ONLY_SQUARE), surrogates={
            "mine": lambda defense, z: z}), "no use for surrogates"),
    ],
)  # fmt: skip
def test_more_bad_input_is_named(call: Callable[[], Results], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_a_cascade_searches_only_for_what_still_stands() -> None:
    """On a static target each run passes the standing samples until they break, and at the end those that do not."""
    classifier = make_classifier()
    samples = make_samples(classifier, 30)
    keys = {"attack__apgd__runs": ["fc-oracle:margin"] * 4, "attack__apgd__combine": "cascade"}
    removed = {"attack.apgd.surrogates", "attack.apgd.losses", "attack.apgd.restarts"}
    content = {key: value for key, value in _small().values.items() if key not in removed}
    content |= {key.replace("__", "."): value for key, value in keys.items()} | {"threat.eps": 0.05}
    results = evaluate(classifier, samples, protocol=make_protocol(content))
    runs = results.attacks[results.attacks["attack"] == "apgd"]
    still = set(results.samples.loc[results.samples["clean_correct"], "index"])
    began = len(still)
    steps = content["attack.apgd.steps"]
    for row in runs.to_dict(orient="records"):
        outcomes = results.outcomes[results.outcomes["run"] == row["run"]]
        first = outcomes.loc[outcomes["first_iterate"] >= 0, "first_iterate"]
        broken = first[outcomes["any_broken"] & outcomes["index"].isin(still)] + 1
        unbroken = len(still) - len(broken)
        searched = broken.sum() + unbroken * (steps + 1)
        assert searched <= row["forwards"] <= searched + unbroken  # what ends where it began was passed before
        assert row["backwards"] == broken.clip(upper=steps).sum() + unbroken * steps
        still -= set(outcomes.loc[outcomes["any_broken"], "index"])
    assert len(still) < began
    values = results.summary.set_index("metric")["value"]
    assert values["worst_case"] <= values["realised"] <= values["paper"] <= values["clean"]


def test_a_victim_alone_is_searched_for_and_its_batch_alone_is_evaluated() -> None:
    hpm = make_hpm()
    samples = make_samples(hpm, 30)
    content = {"attack.apgd.moves": ["companions"], "attack.apgd.surrogates": ["soft-hybrid", "ste"],
               "batches.size": 10, "threat.eps": 0.2}  # fmt: skip
    whole = evaluate(hpm, samples, protocol=make_protocol({**_small().values, **content}), fc=False)
    broken = whole.samples[whole.samples["clean_correct"] & ~whole.samples["robust"]]
    victim = int(broken["index"].iloc[0])
    one = evaluate(
        hpm, samples, protocol=make_protocol({**_small().values, **content, "attack.apgd.victim": victim}), fc=False
    )
    batch = set(whole.batches[whole.batches["batch"] == int(broken["batch"].iloc[0])]["index"])
    assert set(one.samples["index"]) == batch
    assert not bool(one.samples.set_index("index").loc[victim, "robust"])


def test_companions_moved_for_one_break_it_where_its_own_image_is_clean() -> None:
    """The find of a companions run, made again by hand: the victim's image is clean, the others lie in the ball."""
    hpm = make_hpm()
    samples = make_samples(hpm, 24)
    content = {**_small().values, "attack.apgd.moves": ["companions"], "attack.apgd.surrogates": ["ste"],
               "batches.size": 24, "threat.eps": 0.25}  # fmt: skip
    for key in [key for key in content if key.startswith("attack.square")]:
        content.pop(key)
    seen: list[tuple[Tensor, Tensor]] = []
    original = HPM.logits_one_at_a_time

    class Watched(HPM):
        def logits_one_at_a_time(self, z: Tensor, companions: Tensor | None, *args: Any, **settings: Any) -> Tensor:
            assert companions is not None
            seen.append((z.detach(), companions.detach()))
            return original(self, z, companions, *args, **settings)

    watched = Watched(hpm.trunk, hpm.fc).eval()
    watched.prototypes.copy_(hpm.prototypes)
    results = evaluate(watched, samples, protocol=make_protocol(content), fc=False)
    order = results.batches["index"].tolist()
    clean = hpm.features(samples.x[order])
    broken = torch.zeros(24, dtype=torch.bool)
    for own, others in seen:
        torch.testing.assert_close(own, clean)
        for i in range(24):
            batch = others.clone()
            batch[i] = own[i]
            broken[i] |= bool(hpm.logits(batch)[i].argmax() != samples.y[order[i]])
    rows = results.outcomes.groupby("index")["any_broken"].any().loc[order]
    assert bool((torch.tensor(rows.to_numpy()) | ~broken).all())
    assert bool(
        (broken & torch.tensor(results.samples.set_index("index").loc[order, "clean_correct"].to_numpy())).any()
    )


def test_clean_features_as_large_as_the_images_are_made_once() -> None:
    """The packaged digits have 64 features for 64 pixels."""
    classifier = make_classifier(inputs=12, dim=12)
    samples = make_samples(classifier, 24)
    trunk: Any = classifier.trunk
    batch_plan = plan_batches(24, size=8, seed=0)
    clean = CleanBatches(classifier, samples, torch.arange(24), batch_plan, device="cpu")
    trunk.images = 0
    assert all(torch.equal(batch.z, classifier.features(batch.x)) for batch in clean)
    assert trunk.images == 24  # those of the line above
