"""solo and alone against running the whole batch once a sample."""

from __future__ import annotations

import ast
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor, nn
from toys import make_classifier, make_hpm, make_samples

from msa_eval import HPM, Samples, Variant, WholeModel, evaluate, verify
from msa_eval.defense.contexts import (
    CONTEXTS,
    AmongOthers,
    Companions,
    Context,
    OneAtATime,
    decide_each,
    decide_offers,
)
from msa_eval.defense.contract import as_defense
from msa_eval.evidence.proof import Proof
from msa_eval.judging.clean_batches import CleanBatches
from msa_eval.judging.replay import Replay
from msa_eval.protocols import make_protocol
from msa_eval.surrogates import get


def _by_hand(defense: Any, z: Tensor, companions: Tensor | None, decide: Any) -> Tensor:
    """Row i of the decision on the companions with row i replaced: a whole batch once a sample."""
    rows = []
    for i in range(len(z)):
        if companions is None:
            rows.append(decide(defense, z[i : i + 1])[0])
        else:
            batch = companions.clone()
            batch[i] = z[i]
            rows.append(decide(defense, batch)[i])
    return torch.stack(rows)


@pytest.fixture(params=["toy", "digits"])
def case(request: pytest.FixtureRequest, digits_hpm: HPM, digits: Samples) -> tuple[HPM, Tensor, Tensor]:
    """A defence, clean features and other features."""
    if request.param == "toy":
        generator = torch.Generator().manual_seed(0)
        return make_hpm(), torch.randn(9, 6, generator=generator), torch.randn(9, 6, generator=generator)
    with torch.no_grad():
        return digits_hpm, digits_hpm.features(digits.x[:40]), digits_hpm.features(digits.x[100:140])


NAMES = ["ste", "soft-hybrid", "soft-hybrid@0.05", "frozen-assignment", "frozen-prototypes", "fc-oracle"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("context", ["solo", "alone"])
def test_the_closed_form_is_the_batch_once_a_sample(name: str, context: str, case: Any) -> None:
    hpm, clean, z = case
    surrogate = get(name)
    companions = clean if context == "solo" else None
    with torch.no_grad():
        found = surrogate.logits(CONTEXTS[context].view(hpm, clean), z)
        expected = _by_hand(hpm, z, companions, surrogate.logits)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("context", ["solo", "alone"])
def test_its_gradient_is_that_of_the_loop(name: str, context: str) -> None:
    hpm, surrogate = make_hpm(), get(name)
    generator = torch.Generator().manual_seed(0)
    clean, z = torch.randn(7, 6, generator=generator), torch.randn(7, 6, generator=generator).requires_grad_()
    weight = torch.randn(7, 4, generator=generator)

    values, gradients = zip(
        *(
            (value, torch.autograd.grad((value * weight).sum(), z)[0])
            for defense in (hpm, Plain(hpm))
            for value in [surrogate.logits(CONTEXTS[context].view(defense, clean), z)]
        ),
        strict=True,
    )
    torch.testing.assert_close(*values, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-4)


class Plain:
    """A defence without its closed form."""

    def __init__(self, hpm: HPM) -> None:
        self.hpm = hpm

    def features(self, x: Tensor) -> Tensor:
        return self.hpm.features(x)

    def fc_logits(self, features: Tensor) -> Tensor:
        return self.hpm.fc_logits(features)

    def logits(self, features: Tensor, **settings: Any) -> Tensor:
        return self.hpm.logits(features, **settings)


@pytest.mark.parametrize("name", NAMES)
def test_among_others_is_the_batch_once_a_sample_and_so_is_its_gradient(name: str) -> None:
    """The row stays, its companions move: the gradient goes to the companions alone."""
    hpm, surrogate = make_hpm().requires_grad_(False), get(name)
    generator = torch.Generator().manual_seed(0)
    own, z = torch.randn(7, 6, generator=generator), torch.randn(7, 6, generator=generator).requires_grad_()
    weight = torch.randn(7, 4, generator=generator)
    views = [AmongOthers(hpm, own), AmongOthers(Plain(hpm), own)]
    values = [surrogate.logits(view, z) for view in views]
    with torch.no_grad():
        by_hand = torch.stack(
            [surrogate.logits(hpm, torch.cat([z[:i], own[i : i + 1], z[i + 1 :]]))[i] for i in range(7)]
        )
    torch.testing.assert_close(values[0], by_hand, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(values[1], by_hand, atol=1e-5, rtol=1e-5)
    if name in ("fc-oracle", "frozen-prototypes"):  # no companion changes these, so there is nothing to follow
        assert not values[0].requires_grad
        return
    gradients = [torch.autograd.grad((value * weight).sum(), z)[0] for value in values]
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-4)
    one = torch.autograd.grad((surrogate.logits(views[0], z)[2] * weight[2]).sum(), z)[0]
    assert float(one[2].abs().max()) < 1e-12 * float(one.abs().max())
    assert float(one.abs().max()) > 0


@pytest.mark.parametrize("plain", [False, True])
def test_company_is_seated_in_the_order_of_the_batch(plain: bool) -> None:
    hpm = make_hpm()
    generator = torch.Generator().manual_seed(0)
    pool, z = torch.randn(20, 6, generator=generator), torch.randn(3, 6, generator=generator)
    index, seats = torch.randint(20, (3, 4), generator=generator), torch.tensor([4, 0, 2])
    with torch.no_grad():
        found = decide_each(Plain(hpm) if plain else hpm, z, Companions(pool, index, seats))
        for i, seat in enumerate(seats.tolist()):
            beside = pool[index[i]]
            batch = torch.cat([beside[:seat], z[i : i + 1], beside[seat:]])
            torch.testing.assert_close(found[i], hpm.logits(batch)[seat], atol=1e-5, rtol=1e-5)


def test_where_the_closed_form_could_be_wrong_the_defence_itself_decides() -> None:
    """A closed form that rounds towards a break: near ties are asked of the batch, clear verdicts are not."""

    class Rounding:
        asked = 0

        def logits(self, z: Tensor) -> Tensor:
            self.asked += 1
            return torch.cat([z, torch.zeros_like(z), torch.full_like(z, -5)], dim=1)

        def logits_one_at_a_time(self, z: Tensor, companions: Tensor | None) -> Tensor:
            return torch.cat([z, torch.full_like(z, 2e-5), torch.full_like(z, -5)], dim=1)

    defense: Any = Rounding()
    z = torch.tensor([[1.0], [1e-5], [-1.0]])
    with torch.no_grad():
        assert decide_each(defense, z, z).argmax(dim=1).tolist() == [0, 0, 1]
    assert defense.asked == 1


@pytest.mark.parametrize(
    "variant", [Variant(prototypes="batch"), Variant(prototypes="global"), Variant(mixer="average"),
                Variant(similarity="inner"), Variant(similarity="cosine")]
)  # fmt: skip
def test_the_closed_form_of_every_variant(variant: Variant) -> None:
    plain = make_hpm()
    hpm = HPM(plain.trunk, plain.fc, variant=variant).eval()
    hpm.prototypes.copy_(plain.prototypes)
    generator = torch.Generator().manual_seed(0)
    clean, z = torch.randn(7, 6, generator=generator), torch.randn(7, 6, generator=generator)
    with torch.no_grad():
        found = hpm.logits_one_at_a_time(z, clean)
        torch.testing.assert_close(found, _by_hand(hpm, z, clean, HPM.logits), atol=1e-5, rtol=1e-5)


def test_a_class_that_the_replaced_row_alone_belonged_to_vanishes() -> None:
    """The hard case of one row out: nothing but rounding is left of its prototype, and ε must not blow it up."""
    hpm = make_hpm()
    clean = torch.randn(50, 6, generator=torch.Generator().manual_seed(0)) + 100
    with torch.no_grad():
        hpm.fc.bias[0] -= 1e6
        clean[3] = -clean[3]
        hpm.fc.weight[0] = -1e5
        z = clean.clone()
        z[3] = clean[4]
        torch.testing.assert_close(
            hpm.logits_one_at_a_time(z, clean), _by_hand(hpm, z, clean, HPM.logits), atol=1e-3, rtol=1e-5
        )


def test_a_context_alters_the_target_where_each_sample_has_a_batch_of_its_own() -> None:
    hpm, z = make_hpm(), torch.randn(3, 6)
    for context in CONTEXTS.values():
        view = context.view(hpm, z)
        assert isinstance(view, OneAtATime) if context.one_batch_per_sample else view is hpm


@pytest.mark.parametrize("context", ["joint", "solo", "alone", "composed"])
def test_a_static_target_is_left_as_it_is(context: str) -> None:
    defense, samples = as_defense(make_classifier()), make_samples(make_classifier(), 6)
    clean = CleanBatches(defense, samples, torch.arange(6), [torch.arange(6)], device="cpu")
    assert clean.view(context, clean.batch(0)) is defense


@pytest.mark.parametrize("context", ["joint", "solo", "composed"])
def test_a_static_target_answers_every_proof_alike(context: str) -> None:
    """One from a stranger may be of a kind that is never written in its context."""
    defense, samples = as_defense(make_classifier()), make_samples(make_classifier(), 6)
    replay = Replay(defense, samples, [torch.arange(6)], device="cpu")
    own = samples.x[:1]
    proof = Proof("defense", context, 0, "victims", torch.tensor([1]), samples.x, own=own)
    torch.testing.assert_close(replay.logits(proof), defense.logits(defense.features(own)))


def test_no_other_file_compares_with_the_name_of_a_context() -> None:
    """So a context is added here alone."""
    root = Path(__file__).parents[2]
    found = []
    for path in [path for folder in ("msa_eval", "protocols", "surrogates") for path in (root / folder).rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Compare | ast.BinOp | ast.MatchValue):
                names = {one.value for one in ast.walk(node) if isinstance(one, ast.Constant)} & CONTEXTS.keys()
                found += [f"{path}:{node.lineno} compares with {name}" for name in names]
    assert found == []


class ByMean(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = make_classifier()
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x - 0.5 * x.mean(dim=0) + 0.25)
        return out


def _protocol(**overrides: Any) -> Any:
    content = {
        "schema": 1, "audit.samples": 0, "name": "contexts", "version": 1, "description": "A test.",
        "threat": {"norm": "Linf", "eps": 0.05, "contexts": ["joint", "solo", "alone"]},
        "batches": {"size": 8},
        "attack": {"apgd": {"surrogates": ["fc-oracle", "soft-hybrid", "ste"], "losses": ["dlr"], "steps": 8},
                   "square": {"queries": 15}},
    }  # fmt: skip
    return make_protocol(content, overrides=overrides)


@pytest.mark.filterwarnings("ignore:the defense has no trunk")
@pytest.mark.parametrize("make", [make_hpm, ByMean])
def test_every_table_has_every_context_and_the_laws_hold(make: Any) -> None:
    model = make()
    samples = make_samples(model, 22)
    results = evaluate(model, samples, protocol=_protocol())
    for (_, context), rows in results.summary.groupby(["target", "context"]):
        value = rows.set_index("metric")["value"]
        assert value["worst_case"] <= value["realised"] <= value["paper"] <= value["clean"]
        assert context == "joint" or value["realised"] == value["worst_case"]
    for table in (results.summary, results.attacks, results.samples, results.outcomes):
        assert list(table["context"].unique()) == ["joint", "solo", "alone"]
    clean = results.samples[results.samples["target"] == "defense"].set_index(["context", "index"])["clean_prediction"]
    pd.testing.assert_series_equal(clean["joint"], clean["solo"])
    with torch.no_grad():
        alone = torch.cat([model(x.unsqueeze(0)) for x in samples.x]).argmax(dim=1)
    assert clean["alone"].tolist() == alone.tolist()


def test_alone_is_joint_in_batches_of_one() -> None:
    """Two ways to the same verdicts on the clean batch, and to the same worst case where the attack is strong."""
    hpm = make_hpm()
    samples = make_samples(hpm, 12)
    keys = {"attack.apgd.steps": 40, "threat.eps": 0.1}
    alone = evaluate(hpm, samples, protocol=_protocol(**keys, **{"threat.contexts": ["alone"]}))
    ones = evaluate(hpm, samples, protocol=_protocol(**keys, **{"threat.contexts": ["joint"], "batches.size": 1}))
    for metric in ("clean", "worst_case"):
        first, second = (
            results.summary.set_index(["target", "metric"])["value"]["defense", metric] for results in (alone, ones)
        )
        assert first == pytest.approx(second, abs=1 / 12 + 1e-9 if metric == "worst_case" else 1e-12)


@pytest.mark.filterwarnings("ignore:the defense has no trunk")
def test_a_verdict_in_solo_is_that_of_the_batch_with_one_row_replaced(running: list[Any]) -> None:
    """The final batches of a run, judged again by hand on images, without any cached feature."""
    model = ByMean()
    samples = make_samples(model, 8)
    found: list[Tensor] = []

    def spy(defense: Any, z: Tensor) -> Tensor:
        if running:
            found.append(z.detach().clone())
        out: Tensor = defense.logits(z)
        return out

    results = evaluate(
        model, samples, surrogates={"spy": spy},
        protocol=_protocol(**{"threat.contexts": ["solo"], "attack.apgd.surrogates": ["spy"], "batches.size": 8}),
    )  # fmt: skip
    order = results.batches["index"].tolist()
    x, y, final = samples.x[order], samples.y[order], found[8]  # the start, and where each of eight steps ended
    with torch.no_grad():
        logits = _by_hand(WholeModel(model), final, x, lambda defense, batch: defense.logits(batch))
    rows = results.outcomes[results.outcomes["run"] == "spy:apgd-dlr:0"].set_index("index")
    assert rows.loc[order, "final_broken"].tolist() == (logits.argmax(dim=1) != y).tolist()


@dataclass(frozen=True)
class Twin(Context):
    """The image sits beside the first of its clean batch."""

    def view(self, defense: Any, z: Tensor, companions: Companions | None = None) -> Any:
        first = torch.zeros(len(z), 1, dtype=torch.long)
        return OneAtATime(defense, Companions(z, first, seats=1 - first.flatten()))

    def decided_in(self, clean: Tensor, row: Tensor, at: int) -> tuple[Tensor, int]:
        return torch.stack([clean[0], row]), 1


class Astray(Twin):
    """Its proofs are replayed in other batches than it was searched in."""

    def decided_in(self, clean: Tensor, row: Tensor, at: int) -> tuple[Tensor, int]:
        return torch.stack([clean[-1], row, clean[-1]]), 1


@pytest.mark.parametrize("kind", [Twin, Astray])
def test_a_context_of_ones_own_is_one_object(kind: type[Twin], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the protocol's key to the replay of its proofs; and `verify` finds two batches that are not the same."""
    monkeypatch.setitem(CONTEXTS, "twin", kind("twin", "the one image, beside the first", "the target is wrong on it"))
    hpm = make_hpm().requires_grad_(False)
    samples = make_samples(hpm, 32)
    protocol = make_protocol({
        "schema": 1, "name": "twin", "version": 1, "description": "A test.", "threat.norm": "Linf", "threat.eps": 0.05,
        "threat.contexts": ["joint", "twin"], "batches.size": 8, "attack.apgd.surrogates": ["ste"],
        "attack.apgd.losses": ["margin"], "attack.apgd.steps": 5, "audit.samples": 0,
    })  # fmt: skip
    results = evaluate(
        hpm, samples, protocol=protocol, fc=False, precision="fp32", out=tmp_path, save_adversarial=True
    )  # fmt: skip
    rows = results.samples[results.samples["context"] == "twin"].sort_values(["batch", "position"])
    z = hpm.features(samples.x)
    firsts = rows.groupby("batch")["index"].transform("first")
    clean = [int(hpm.logits(z[[one, own]])[1].argmax()) for one, own in zip(firsts, rows["index"], strict=True)]
    assert rows["clean_correct"].tolist() == [one == own for one, own in zip(clean, rows["label"], strict=True)]
    assert 0 < int(rows["robust"].sum()) < int(rows["clean_correct"].sum())
    assert verify(tmp_path, hpm, samples, fc=False).passed == (kind is Twin)


def test_the_cost_without_a_trunk_is_named() -> None:
    protocol = _protocol(**{"threat.contexts": ["alone"], "attack.apgd.steps": 1, "attack.square.queries": 1})
    with pytest.warns(UserWarning, match=r"as the batch has images \(up to 8\)"):
        evaluate(ByMean(), make_samples(make_classifier(), 8), protocol=protocol)
    with warnings.catch_warnings(record=True) as caught:
        evaluate(make_hpm(), make_samples(make_classifier(), 8), protocol=protocol)
    assert caught == []


def test_a_static_target_is_attacked_once_for_all_contexts() -> None:
    classifier = make_classifier()
    samples = make_samples(classifier, 10)
    trunk: Any = classifier.trunk
    passes = []
    for contexts in (["joint"], ["joint", "solo", "alone"]):
        trunk.images = 0
        results = evaluate(classifier, samples, protocol=_protocol(**{"threat.contexts": contexts}), precision="fp32")
        passes.append(trunk.images)
    assert passes[0] == passes[1]
    values = results.summary.pivot_table(index="metric", columns="context", values="value").loc[["clean", "worst_case"]]
    assert values.nunique(axis=1).eq(1).all()


class InOrder:
    """A decision by the row's place in its batch and by the rows before it: nothing may be put elsewhere."""

    def logits(self, z: Tensor) -> Tensor:
        place = torch.arange(len(z)).unsqueeze(1)
        return z[:, :3].cumsum(dim=0) * (1 + place)


@pytest.mark.parametrize("defense", [make_hpm(), Plain(make_hpm()), InOrder()], ids=["closed form", "loop", "in order"])
@pytest.mark.parametrize("place", [0, 2, None])
def test_offers_are_decided_each_in_a_batch_of_its_own(defense: Any, place: int | None) -> None:
    """For a place of the company and for the row's own, against batches put together by hand."""
    generator = torch.Generator().manual_seed(0)
    pool, z = torch.randn(20, 6, generator=generator), torch.randn(4, 6, generator=generator)
    companions = Companions(pool, torch.randint(20, (4, 3), generator=generator), torch.tensor([0, 3, 1, 2]))
    offers = torch.randint(20, (4, 5), generator=generator)
    found = decide_offers(defense, z, companions, offers, place=place)
    assert found.shape[:2] == (4, 5)
    for i, seat in enumerate(companions.seats.tolist()):
        for w in range(5):
            beside, own = list(pool[companions.index[i]]), z[i]
            if place is None:
                own = pool[offers[i, w]]
            else:
                beside[place] = pool[offers[i, w]]
            with torch.no_grad():
                whole = defense.logits(torch.stack([*beside[:seat], own, *beside[seat:]]))
            torch.testing.assert_close(found[i, w], whole[seat], rtol=1e-5, atol=1e-5)
