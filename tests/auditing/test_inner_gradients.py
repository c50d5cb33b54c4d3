"""Whether a target optimises while it answers is found out by trying."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import grad as imported
from toys import make_classifier, make_samples

from msa_eval import WholeModel
from msa_eval.auditing.inner_gradients import counting_gradients
from msa_eval.defense.contract import decide


class Adapting(nn.Module):
    """Moves its images before it answers, as anti-adversary layers and test-time adaptation do."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.classifier, self.how = make_classifier(), how

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "none":
            return self.classifier(x)  # type: ignore[no-any-return]
        with torch.enable_grad():
            delta = torch.zeros_like(x, requires_grad=True)
            for _ in range(2):
                delta = self._moved(x, delta)
        return self.classifier(x + delta.detach())  # type: ignore[no-any-return]

    def _moved(self, x: Tensor, delta: Tensor) -> Tensor:
        if self.how == "function":
            return delta + 0.01 * torch.func.grad(lambda d: self.classifier(x + d).amax(dim=1).sum())(delta)
        total = self.classifier(x + delta).amax(dim=1).sum()
        if self.how == "imported":
            return delta + 0.01 * imported(total, delta)[0]
        optimiser = torch.optim.SGD([delta], lr=0.01)
        total.neg().backward()
        optimiser.step()
        return delta.detach().requires_grad_()


@pytest.mark.parametrize(("how", "passes"), [("none", 0), ("imported", 2), ("backward", 2), ("function", 2)])
def test_inner_gradients_are_counted_under_no_grad_too(how: str, passes: int) -> None:
    model, x = WholeModel(Adapting(how).eval()), make_samples(make_classifier()).x
    run = torch.autograd._engine_run_backward  # type: ignore[attr-defined]
    with counting_gradients() as made:
        decide(model, x)
    assert made.count == passes
    assert torch.autograd._engine_run_backward is run  # type: ignore[attr-defined]
    with pytest.raises(ValueError), counting_gradients():  # noqa: PT011
        raise ValueError
    assert torch.autograd._engine_run_backward is run  # type: ignore[attr-defined]
