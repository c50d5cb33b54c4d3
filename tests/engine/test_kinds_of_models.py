"""Models as people bring them: whatever a model is wrapped in, its figures are those of the plain one."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from toys import make_samples

from msa_eval import Results, audit, evaluate
from msa_eval.protocols import make_protocol

PROTOCOL = make_protocol(
    {
        "schema": 1, "name": "kinds", "version": 1, "description": "A test.", "audit.samples": 16,
        "threat": {"norm": "Linf", "eps": 0.08}, "batches": {"size": 8},
        "attack": {"apgd": {"surrogates": ["ste"], "losses": ["ce"], "steps": 4}, "square": {"queries": 8}},
    }
)  # fmt: skip


def _plain() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 4)).eval()


PLAIN = _plain()
SAMPLES = make_samples(PLAIN, 16)


class Around(nn.Module):
    """The plain model, with something done before or after it."""

    def __init__(self, model: nn.Module | None = None) -> None:
        super().__init__()
        self.model = model or _plain()
        self.eval()

    def forward(self, x: Tensor) -> Any:
        return self.model(x)


class WritesIntoItsInput(Around):
    def forward(self, x: Tensor) -> Any:
        return self.model(x.sub_(0.5).div_(0.25).mul_(0.25).add_(0.5))


class StartsWithAnInPlaceLayer(Around):
    def __init__(self) -> None:
        super().__init__(nn.Sequential(nn.ReLU(inplace=True), *_plain()))


class AnswersWithADict(Around):
    def forward(self, x: Tensor) -> Any:
        return {"loss": None, "logits": self.model(x)}


class AnswersWithATuple(Around):
    def forward(self, x: Tensor) -> Any:
        return self.model(x), x.mean()


class SwitchesGradientsOn(Around):
    @torch.enable_grad()
    def forward(self, x: Tensor) -> Any:
        return self.model(x)


class Counts(Around):
    """A model that can't take an empty batch."""

    def forward(self, x: Tensor) -> Any:
        assert len(x)
        return self.model(x.view(len(x), -1))


class LooksAtItsBatch(Counts):
    def forward(self, x: Tensor) -> Any:
        out = super().forward(x)
        return out - 0.1 * out.mean(dim=0)


class CountsInParts(Around):
    """A trunk and a decision that can't take an empty batch, and no companions that matter."""

    batch_dependent = False

    def features(self, x: Tensor) -> Tensor:
        assert len(x)
        out: Tensor = self.model[:3](x.view(len(x), -1))
        return out

    def logits(self, z: Tensor) -> Tensor:
        assert len(z)
        out: Tensor = self.model[3](z.view(len(z), -1))
        return out

    def forward(self, x: Tensor) -> Any:
        return self.logits(self.features(x))


class LooksAtItsBatchInParts(CountsInParts):
    batch_dependent = True

    def logits(self, z: Tensor) -> Tensor:
        return super().logits(z - 0.1 * z.mean(dim=0))


class Trunk:
    """A defence that is no module, whose parts write into what they are given."""

    batch_dependent = False

    def __init__(self) -> None:
        self.model = _plain()

    def features(self, x: Tensor) -> Tensor:
        out: Tensor = self.model[:3](x.add_(0.25).sub_(0.25))
        return out

    def logits(self, z: Tensor) -> Any:
        return {"logits": self.model[3](z.mul_(2).div_(2))}


class Called:
    def __init__(self) -> None:
        self.model = _plain()

    def __call__(self, x: Tensor) -> Tensor:
        out: Tensor = self.model(x)
        return out


def _compiled() -> nn.Module:
    compiled: nn.Module = torch.compile(_plain(), backend="aot_eager")
    return compiled


def _compiled_in_place() -> nn.Module:
    model = Around()
    model.model.compile(backend="aot_eager")
    return model


def _exported() -> nn.Module:
    batch = torch.export.Dim("batch", min=1, max=64)
    return torch.export.export(_plain(), (torch.rand(4, 3, 2, 2),), dynamic_shapes=({0: batch},)).module()


def _frozen() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        frozen: nn.Module = torch.jit.freeze(torch.jit.script(_plain()))
    return frozen


def _function() -> Callable[[Tensor], Tensor]:
    model = _plain()
    return lambda x: model(x) + 0


def _partial() -> Any:
    return functools.partial(lambda model, x: model(x), _plain())


def _made_in_inference_mode() -> nn.Module:
    with torch.inference_mode():
        return _plain()


def _evaluated(target: Any, **options: Any) -> tuple[Results, list[str]]:
    notes: list[str] = []
    found = evaluate(target, SAMPLES, protocol=PROTOCOL, notify=notes.append, **options)
    return found, notes


@pytest.fixture(scope="module")
def plain() -> Results:
    return _evaluated(PLAIN)[0]


def _check_same(found: Results, expected: Results) -> None:
    assert found.run["verdict"] == expected.run["verdict"]
    for column in ("robust", "broken_by"):
        assert found.samples[column].tolist() == expected.samples[column].tolist()
    np.testing.assert_allclose(found.samples["min_margin"], expected.samples["min_margin"], atol=1e-5)


@pytest.mark.parametrize(
    ("make", "note"),
    [
        (WritesIntoItsInput, ""), (StartsWithAnInPlaceLayer, ""), (SwitchesGradientsOn, ""), (Counts, ""),
        (AnswersWithADict, "a dict, of which 'logits' is taken"), (AnswersWithATuple, "the first value"),
        (Trunk, "a dict, of which 'logits' is taken"), (_function, "taken for a function from images to logits"),
        (_partial, "taken for a function"), (Called, "Called, which is taken for a function"),
        (_compiled, "evaluated as it was written"), (_compiled_in_place, "evaluated as it was written"),
        (_exported, ""), (_frozen, ""), (_made_in_inference_mode, ""),
    ],
)  # fmt: skip
def test_a_model_in_any_wrapping_has_the_figures_of_the_plain_one(
    make: Callable[[], Any], note: str, plain: Results
) -> None:
    x = SAMPLES.x.clone()
    found, notes = _evaluated(make())
    _check_same(found, plain)
    assert torch.equal(SAMPLES.x, x)
    assert bool(notes) is bool(note)
    assert note in " ".join(notes)


@pytest.mark.filterwarnings("ignore:.*once per sample")
@pytest.mark.parametrize("make", [Counts, LooksAtItsBatch, CountsInParts, LooksAtItsBatchInParts])
def test_no_context_and_no_audit_passes_an_empty_batch(make: Callable[[], nn.Module]) -> None:
    every = {"threat.contexts": ["joint", "solo", "alone", "composed"], "audit.samples": 8, "batches.size": 4}
    protocol = make_protocol(PROTOCOL.values, overrides=every)
    found = evaluate(make(), SAMPLES.x[:8], SAMPLES.y[:8], protocol=protocol, notify=lambda note: None)
    assert found.run["verdict"] != "incomplete"


def test_an_audit_says_the_same() -> None:
    with pytest.warns(UserWarning, match="of which 'logits' is taken"):
        found = audit(AnswersWithADict(), SAMPLES, protocol=PROTOCOL)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        expected = audit(PLAIN, SAMPLES, protocol=PROTOCOL)
    assert found.verdict == expected.verdict
    assert [(sign.name, sign.fired) for sign in found.signs] == [(sign.name, sign.fired) for sign in expected.signs]


@contextmanager
def _default_dtype() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextmanager
def _deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    "surrounding",
    [
        _default_dtype, _deterministic, torch.inference_mode, torch.no_grad, lambda: torch.device("meta"),
        lambda: torch.autocast("cpu", torch.bfloat16), nullcontext,
    ],
)  # fmt: skip
def test_what_surrounds_a_call_changes_no_figure(
    surrounding: Callable[[], AbstractContextManager[Any]], plain: Results
) -> None:
    model = copy.deepcopy(PLAIN)
    with surrounding():
        x, y = SAMPLES.x.clone(), SAMPLES.y.clone()
        found = evaluate(model, x, y, protocol=PROTOCOL)
    _check_same(found, plain)


class InNumpy(Around):
    """A decision in NumPy, which a tensor with a gradient can't enter."""

    def forward(self, x: Tensor) -> Any:
        return torch.from_numpy(self.model(x).numpy().round(1))


class InEight(Around):
    """Weights in int8, whose products have no gradient."""

    def __init__(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            super().__init__(torch.ao.quantization.quantize_dynamic(_plain(), {nn.Linear}))  # type: ignore[attr-defined]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("make", "raised"), [(InNumpy, "Can't call numpy"), (InEight, "")])
def test_a_model_without_a_gradient_is_evaluated_and_what_its_pass_raises_is_said(
    make: Callable[[], nn.Module], raised: str
) -> None:
    found, _ = _evaluated(make())
    assert 0 <= found.summary.set_index("metric")["value"]["worst_case"] <= 1
    with pytest.raises(ValueError, match=rf"no surrogate.*{raised}.*black-box"):
        _evaluated(make(), found_surrogates=False)


@pytest.mark.parametrize(("change", "kind"), [("double", "float64"), ("half", "float16"), ("bfloat16", "bfloat16")])
def test_weights_of_another_dtype_are_named(change: str, kind: str) -> None:
    with pytest.raises(ValueError, match=rf"its weights are {kind}; call \.float\(\) on it"):
        _evaluated(getattr(_plain(), change)())


def test_labels_that_count_from_1_are_told_so() -> None:
    protocol = make_protocol(PROTOCOL.values, overrides={"audit.samples": 0})
    with pytest.raises(ValueError, match=r"label 4, but the model has 4 classes; count labels from 0: y - 1"):
        evaluate(PLAIN, SAMPLES.x, torch.arange(16) % 4 + 1, protocol=protocol)
    with pytest.raises(ValueError, match=r"label 7, but the model has 4 classes; give labels from 0 to 3"):
        evaluate(PLAIN, SAMPLES.x, torch.arange(16) % 8, protocol=protocol)


def test_all_that_takes_its_time_is_shown(tmp_path: Path) -> None:
    shown: list[str] = []

    def recorded(iterable: Iterable[Any], description: str) -> Iterable[Any]:
        shown.append(description)
        return iterable

    evaluate(_plain(), SAMPLES, protocol=PROTOCOL, out=tmp_path / "r", progress=recorded, save_adversarial="all")
    assert list(dict.fromkeys(shown)) == [
        "clean pass", "how true gradients are", "trial of precisions", "audit", "defense joint", "writing proofs",
        "writing points",
    ]  # fmt: skip
    shown.clear()
    audit(_plain(), SAMPLES, protocol=PROTOCOL, progress=recorded)
    assert shown == ["clean pass", "how true gradients are", "audit"]


def test_a_model_with_lazy_layers_is_told_to_be_passed_first() -> None:
    with pytest.raises(ValueError, match=r"has lazy layers.*pass one through it"):
        _evaluated(nn.Sequential(nn.Flatten(), nn.LazyLinear(4)).eval())


def test_a_model_without_values_is_told_to_be_loaded() -> None:
    with pytest.raises(ValueError, match=r"lies on the meta device.*load its weights first"):
        _evaluated(_plain().to("meta"))


def test_a_model_that_takes_one_size_of_batches_is_evaluated_in_these() -> None:
    fixed = torch.export.export(_plain(), (torch.rand(8, 3, 2, 2),)).module()
    found, _ = _evaluated(fixed)
    assert found.run["verdict"] != "incomplete"
    with pytest.raises(ValueError, match=r"can't take a float32 batch of images of shape \(4, 3, 2, 2\).*Guard"):
        evaluate(fixed, SAMPLES, protocol=make_protocol(PROTOCOL.values, overrides={"batches.size": 4}))


def test_what_a_model_raises_is_quoted_in_short() -> None:
    class Wordy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("shapes differ, and so on and on" + " and on" * 500)

    with pytest.raises(ValueError, match=r"\(8, 3, 2, 2\): shapes differ") as raised:
        _evaluated(Wordy().eval())
    assert len(str(raised.value).split()) < 80
