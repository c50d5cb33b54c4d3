"""The improved Kullback-Leibler loss.

References:
    Decoupled Kullback-Leibler Divergence Loss (Cui et al., 2024), arXiv:2305.13948.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def ikl(clean: Tensor, adversarial: Tensor, weights: Tensor, *, alpha: float = 4.0, beta: float = 20.0) -> Tensor:
    """The improved KL loss between clean and adversarial logits.

    ``(β/4) mean_i Σ_jk w_j w_k (Δn_jk - Δa_jk)² + α mean_i CE(softmax(n), softmax(a))`` with ``Δ_jk`` the difference of
    logits j and k. The double sum is ``2 (Σ_j w_j)(Σ_j w_j u_j²) - 2 (Σ_j w_j u_j)²`` with ``u = n - a``, so no
    ``(B, k, k)`` tensor is made. Gradients pass through both arguments in the first term, through ``adversarial`` alone
    in the second.

    Args:
        clean: logits ``n`` ``(B, k)``.
        adversarial: logits ``a`` ``(B, k)``.
        weights: ``w`` ``(B, k)``, the class-mean softmax of each sample's label.
        alpha: weight of the second term; 4 in the authors' CIFAR settings.
        beta: weight of the first; 20 in the authors' CIFAR settings.

    Returns:
        a scalar.

    >>> logits = torch.tensor([[1.0, -1.0]])
    >>> ikl(logits, logits, torch.full((1, 2), 0.5), alpha=0.0)
    tensor(0.)
    """
    u = clean - adversarial
    spread = 2 * (weights.sum(dim=1) * (weights * u**2).sum(dim=1) - (weights * u).sum(dim=1) ** 2)
    return beta / 4 * spread.mean() + alpha * soft_ce(clean, adversarial)


def soft_ce(clean: Tensor, adversarial: Tensor) -> Tensor:
    """Mean cross-entropy of adversarial logits ``(B, k)`` under the softmax of clean ones, which get no gradient."""
    return F.cross_entropy(adversarial, torch.softmax(clean.detach(), dim=1))


class ClassMeanSoftmax:
    """The mean softmax of each class, gathered over an epoch and used in the next; uniform before the first.

    Args:
        num_classes: k.
        temperature: of the softmax; 4 in the authors' settings.
    """

    def __init__(self, num_classes: int, *, temperature: float = 4.0) -> None:
        self.temperature = temperature
        self.means = torch.full((num_classes, num_classes), 1 / num_classes)
        self._clear()

    def _clear(self) -> None:
        self._sum = torch.zeros_like(self.means)
        self._count = torch.zeros(len(self.means), 1)

    @torch.no_grad()
    def gather(self, logits: Tensor, y: Tensor) -> None:
        """Add a batch of logits ``(B, k)`` with labels ``(B,)``."""
        soft = torch.softmax(logits.detach().cpu() / self.temperature, dim=1)
        self._sum.index_add_(0, y.cpu(), soft)
        self._count.index_add_(0, y.cpu(), torch.ones(len(y), 1))

    def next_epoch(self) -> None:
        """Use what was gathered; a class that did not occur keeps its mean."""
        self.means = torch.where(self._count > 0, self._sum / self._count.clamp(min=1), self.means)
        self._clear()

    def weights(self, y: Tensor) -> Tensor:
        """The weights ``(B, k)`` of labels ``(B,)``."""
        return self.means.to(y.device)[y]
