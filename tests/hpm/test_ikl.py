"""IKL against its double sum, and its gradients against the definition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from msa_eval.hpm.ikl import ClassMeanSoftmax, ikl, soft_ce


def _logits(seed: int) -> Tensor:
    return torch.randn(6, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()


def _by_definition(n: Tensor, a: Tensor, w: Tensor, alpha: float, beta: float) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for i in range(6):
        for j in range(5):
            for k in range(5):
                total = total + w[i, j] * w[i, k] * ((n[i, j] - n[i, k]) - (a[i, j] - a[i, k])) ** 2
    cross = -(torch.softmax(n.detach(), 1) * torch.log_softmax(a, 1)).sum(1).mean()
    return beta / 4 * total / 6 + alpha * cross


@pytest.mark.parametrize(("alpha", "beta"), [(4.0, 20.0), (0.0, 20.0), (4.0, 0.0)])
def test_value_and_gradients_follow_the_definition(alpha: float, beta: float) -> None:
    n, a = _logits(0), _logits(1)
    w = torch.rand(6, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    found, expected = ikl(n, a, w, alpha=alpha, beta=beta), _by_definition(n, a, w, alpha, beta)
    torch.testing.assert_close(found, expected)
    ours = torch.autograd.grad(found, (n, a), allow_unused=True, materialize_grads=True)
    theirs = torch.autograd.grad(expected, (n, a), allow_unused=True, materialize_grads=True)
    torch.testing.assert_close(ours, theirs)
    assert (ours[0].abs().max() > 0) == (beta > 0)


def test_the_soft_cross_entropy_is_lowest_at_equal_logits() -> None:
    n = _logits(0)
    assert soft_ce(n, n) < soft_ce(n, _logits(1))
    (gradient,) = torch.autograd.grad(soft_ce(n, n), n)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), atol=1e-12, rtol=0)


def test_class_means_are_uniform_and_then_those_of_the_epoch_before() -> None:
    means = ClassMeanSoftmax(3, temperature=2.0)
    y = torch.tensor([0, 0, 2])
    logits = torch.tensor([[4.0, 0.0, 0.0], [0.0, 2.0, 0.0], [0.0, 0.0, 6.0]])
    torch.testing.assert_close(means.weights(y), torch.full((3, 3), 1 / 3))
    means.gather(logits[:2], y[:2])
    means.gather(logits[2:], y[2:])
    torch.testing.assert_close(means.weights(y), torch.full((3, 3), 1 / 3))
    means.next_epoch()
    soft = torch.softmax(logits / 2, dim=1)
    torch.testing.assert_close(means.weights(y)[0], soft[:2].mean(dim=0))
    torch.testing.assert_close(means.weights(y)[2], soft[2])
    torch.testing.assert_close(means.weights(torch.tensor([1])), torch.full((1, 3), 1 / 3))
    means.next_epoch()
    torch.testing.assert_close(means.weights(y)[2], soft[2])
