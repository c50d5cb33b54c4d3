"""One call of a target's code: it gets a copy, and its answer is taken without the traces of its making."""

from __future__ import annotations

import dataclasses
from collections import namedtuple
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from msa_eval.defense.calling import call, logits_in, no_logits, not_finite

LOGITS, FEATURES = torch.zeros(4, 3), torch.zeros(4, 9)
Heads = namedtuple("Heads", "logits aux")


@dataclasses.dataclass
class Output:
    logits: Tensor


def test_code_that_writes_into_what_it_is_given_changes_only_a_copy() -> None:
    x = torch.rand(4, 3).requires_grad_()
    before = x.detach().clone()
    out: Tensor = call(lambda x: x.sub_(0.5).mul_(2), x)
    (gradient,) = torch.autograd.grad(out.sum(), x)
    assert torch.equal(x.detach(), before)
    assert torch.equal(gradient, torch.full_like(x, 2))


def test_answers_carry_no_gradient_where_gradients_are_off() -> None:
    weight = torch.ones(3, requires_grad=True)

    @torch.enable_grad()
    def enabled(x: Tensor) -> Tensor:
        return x * weight

    @torch.inference_mode()
    def inferred(x: Tensor) -> Tensor:
        return x * weight

    with torch.no_grad():
        assert not call(enabled, LOGITS).requires_grad
        assert not call(inferred, LOGITS).is_inference()
    assert call(enabled, LOGITS).requires_grad


def test_code_may_ask_for_the_gradient_of_what_it_is_given() -> None:
    def adapting(x: Tensor) -> Tensor:
        x.requires_grad_()
        with torch.enable_grad():
            (x**2).sum().backward()
        assert x.grad is not None
        return x.detach() - x.grad

    x = torch.ones(2, 3)
    with torch.no_grad():
        assert torch.equal(call(adapting, x), -x)
    assert torch.equal(call(adapting, x.requires_grad_()), -x)


@pytest.mark.parametrize("wrapped", [lambda z: z, lambda z: {"logits": z}])
def test_an_empty_batch_is_never_passed(wrapped: Callable[[Tensor], Any]) -> None:
    def reshaping(x: Tensor) -> Any:
        return wrapped(x.view(len(x), -1))

    none = torch.zeros(0, 3, 2, 2, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="0 elements"):
        reshaping(none)
    found = call(reshaping, none)
    assert (found.shape, found.dtype) == ((0, 12), torch.float64)


@pytest.mark.parametrize("error", [KeyError("head"), TypeError("no"), AssertionError("guard"), AttributeError("x")])
def test_errors_of_other_kinds_become_one_that_names_them(error: Exception) -> None:
    def failing(x: Tensor) -> Tensor:
        raise error

    with pytest.raises(RuntimeError, match=f"^{type(error).__name__}: "):
        call(failing, LOGITS)
    with pytest.raises(ValueError, match="own words"):
        call(lambda x: (_ for _ in ()).throw(ValueError("own words")), LOGITS)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (LOGITS, ""),
        ({"features": FEATURES, "logits": LOGITS}, "a dict, of which 'logits'"),
        ({"feat": FEATURES, "out": LOGITS}, "a dict, of which 'out'"),
        (Output(LOGITS), "an Output, of which 'logits'"),
        (Heads(LOGITS, LOGITS), "a Heads, of which 'logits'"),
        ((LOGITS, torch.zeros(())), "a tuple, of which the first value of shape (B, k)"),
        ([LOGITS, LOGITS + 1], "a list, of which the first value"),
        (LOGITS.to_sparse(), ""),
        (LOGITS.numpy(), "a NumPy array, which has no gradient"),
    ],
)
def test_logits_are_taken_out_of_what_holds_them(answer: Any, said: str) -> None:
    taken = logits_in(answer)
    assert torch.equal(taken.value, LOGITS)
    assert said in taken.note
    assert bool(taken.note) is bool(said)


@pytest.mark.parametrize("answer", [(FEATURES, LOGITS), {"a": FEATURES, "b": LOGITS}, (), None, "logits"])
def test_what_could_be_anything_is_not_guessed_at(answer: Any) -> None:
    assert logits_in(answer).value is answer


@pytest.mark.parametrize(
    ("answer", "advice"),
    [
        (torch.zeros(4, 1), r"at least 2 classes.*return torch\.cat\(\[-z, z\], 1\)"),
        (torch.zeros(4), r"return torch\.cat\(\[-z\.view\(-1, 1\), z\.view"),
        (torch.zeros(4, dtype=torch.long), "not the class's number"),
        (torch.zeros(4, 3, 1, 1), r"return z\.flatten\(1\)"),
        (torch.zeros(4, 3, 5), "one row of logits per image"),
        (torch.zeros(3, 5), "one row of logits per image"),
        ((FEATURES, LOGITS), r"a tuple of shapes \(4, 9\), \(4, 3\); return the logits alone"),
        (LOGITS.to(torch.complex64), "return real numbers"),
        (None, "but got nothing; return the logits"),
        (torch.nn.Linear(2, 2), "but got a Linear; a function that makes the model must need no argument"),
    ],
)
def test_an_answer_without_logits_is_told_what_to_return(answer: Any, advice: str) -> None:
    said = no_logits(answer, 4)
    assert len(said.splitlines()) == 1
    with pytest.raises(ValueError, match=advice):
        raise ValueError(said)


def test_logits_are_left_in_peace() -> None:
    assert no_logits(LOGITS, 4) == ""
    assert not_finite(LOGITS) == ""


@pytest.mark.parametrize(("value", "advice"), [(-torch.inf, "such as -1e9"), (torch.inf, "scale"), (torch.nan, "NaN")])
def test_what_is_not_finite_is_named(value: float, advice: str) -> None:
    assert advice in not_finite(torch.tensor([[0.0, value]]))


def test_a_default_device_of_the_callers_is_set_while_the_code_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    made: Callable[[Tensor], Tensor] = lambda x: torch.zeros(1)  # noqa: E731
    assert call(made, LOGITS).device.type == "cpu"
    monkeypatch.setattr("msa_eval.defense.calling.callers_device", lambda: torch.device("meta"))
    assert call(made, LOGITS).device.type == "meta"


def test_a_gradient_finds_its_way_through_the_answer_to_an_empty_batch() -> None:
    empty = torch.zeros(0, 3, requires_grad=True)
    answer = call(lambda x: 2 * x, empty)
    (gradient,) = torch.autograd.grad(answer.sum(), empty)
    assert answer.shape == gradient.shape == (0, 3)
