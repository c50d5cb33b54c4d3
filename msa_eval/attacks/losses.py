"""Losses that an attack raises: one value a sample, from logits and labels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

Loss = Callable[[Tensor, Tensor], Tensor]
"""``(logits (B, k), labels (B,)) -> (B,)``, higher where the sample is closer to being misclassified."""


def ce(logits: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy.

    >>> ce(torch.zeros(1, 2), torch.tensor([0]))
    tensor([0.6931])
    """
    return F.cross_entropy(logits, y, reduction="none")


def margin_loss(logits: Tensor, y: Tensor) -> Tensor:
    """Highest other logit minus the label's: positive where the label has lost.

    >>> margin_loss(torch.tensor([[3.0, 1.0, 2.0]]), torch.tensor([0]))
    tensor([-1.])
    """
    own = logits.gather(1, y.unsqueeze(1)).squeeze(1)
    others = logits.scatter(1, y.unsqueeze(1), -torch.inf)
    return others.amax(dim=1) - own


def probability_margin(logits: Tensor, y: Tensor) -> Tensor:
    """The margin of the probabilities: it weighs a sample's classes by how likely they are (Xie et al. 2024, PMA).

    References:
        Towards Million-Scale Adversarial Robustness Evaluation With Stronger Individual Attacks, arXiv:2411.15210.

    >>> probability_margin(torch.tensor([[3.0, 3.0, 0.0]]).log(), torch.tensor([0]))
    tensor([0.])
    """
    return margin_loss(logits.softmax(dim=1), y)


def dlr(logits: Tensor, y: Tensor) -> Tensor:
    """Difference of logits ratio: the margin over the gap between first and third (Croce & Hein 2020, Eq. 6).

    Raises:
        ValueError: when there are fewer than 3 classes.

    >>> dlr(torch.tensor([[3.0, 1.0, 2.0]]), torch.tensor([0]))
    tensor([-0.5000])
    """
    if logits.shape[1] < 3:
        raise ValueError(
            f"the dlr loss needs at least 3 classes, but the model has {logits.shape[1]}; use ce or margin"
        )
    top = logits.topk(3, dim=1).values
    return margin_loss(logits, y) / (top[:, 0] - top[:, 2] + 1e-12)


def targeted_dlr(target: Tensor) -> Loss:
    """Targeted difference of logits ratio (Croce & Hein 2020, Eq. 7).

    Args:
        target: the class ``(B,)`` that each sample is pushed towards.

    Returns:
        a loss that raises ValueError when there are fewer than 4 classes.

    >>> targeted_dlr(torch.tensor([1]))(torch.tensor([[4.0, 1.0, 2.0, 2.0]]), torch.tensor([0]))
    tensor([-1.2000])
    """

    def loss(logits: Tensor, y: Tensor) -> Tensor:
        if logits.shape[1] < 4:
            raise ValueError(
                f"the dlr-targeted loss needs at least 4 classes, but the model has {logits.shape[1]}; use ce or margin"
            )
        top = logits.topk(4, dim=1).values
        own = logits.gather(1, y.unsqueeze(1)).squeeze(1)
        wanted = logits.gather(1, target.unsqueeze(1)).squeeze(1)
        return (wanted - own) / (top[:, 0] - (top[:, 2] + top[:, 3]) / 2 + 1e-12)

    return loss


def averaged(loss: Loss) -> Loss:
    """A loss of an ensemble's logits ``(S, B, k)``: the mean over its members.

    >>> averaged(margin_loss)(torch.tensor([[[1.0, 0.0]], [[0.0, 3.0]]]), torch.tensor([0]))
    tensor([1.])
    """

    def mean(logits: Tensor, y: Tensor) -> Tensor:
        return torch.stack([loss(member, y) for member in logits]).mean(dim=0)

    return mean


def side_by_side(losses: Sequence[Loss], counts: Sequence[int]) -> Loss:
    """Several losses, each of the next so many rows.

    >>> both = side_by_side([margin_loss, lambda logits, y: logits[:, 1]], [1, 1])
    >>> both(torch.tensor([[3.0, 1.0], [9.0, 5.0]]), torch.tensor([0, 0]))
    tensor([-2.,  5.])
    """

    def joined(logits: Tensor, y: Tensor) -> Tensor:
        parts = zip(losses, logits.split(list(counts)), y.split(list(counts)), strict=True)
        return torch.cat([loss(rows, labels) for loss, rows, labels in parts])

    return joined


def focused(loss: Loss, rows: Callable[[], Tensor]) -> Loss:
    """A loss that counts some samples only; the others get their mean, as companions that are to help break them.

    Args:
        loss: one value a sample.
        rows: the places ``(n,)`` of those that count by now.

    >>> first = focused(margin_loss, lambda: torch.tensor([0]))
    >>> first(torch.tensor([[3.0, 1.0], [9.0, 0.0]]), torch.tensor([0, 0]))
    tensor([-2., -2.])
    """

    def focus(logits: Tensor, y: Tensor) -> Tensor:
        value, index = loss(logits, y), rows()
        counted = value[index]
        return counted.mean().expand_as(value).index_copy(0, index, counted)

    return focus


def pooled(loss: Loss, counted: Tensor) -> Loss:
    """The mean over the samples counted, for every sample: all are companions, and none has a loss of its own.

    Args:
        loss: one value a sample.
        counted: a mask ``(B,)`` with at least one sample.

    >>> pooled(margin_loss, torch.tensor([True, False]))(torch.tensor([[3.0, 1.0], [9.0, 0.0]]), torch.tensor([0, 0]))
    tensor([-2., -2.])
    """
    rows = counted.nonzero().flatten()

    def pool(logits: Tensor, y: Tensor) -> Tensor:
        return loss(logits, y)[rows].mean().expand(len(y))

    return pool


LOSSES: Mapping[str, Loss] = {"ce": ce, "dlr": dlr, "margin": margin_loss, "probability-margin": probability_margin}
"""The untargeted losses by name."""

TARGETED = "dlr-targeted"

MALT = "dlr-malt"
"""The targeted loss in the order of `malt.rank_classes`; of logits, where samples are not decided apart."""

MIN_CLASSES: Mapping[str, int] = {
    "ce": 2, "margin": 2, "probability-margin": 2, "dlr": 3, TARGETED: 4, MALT: 4,
}  # fmt: skip
"""How many classes each loss needs."""


def most_likely_others(logits: Tensor, y: Tensor, rank: int) -> Tensor:
    """The class ``(B,)`` in place ``rank`` (from 0) among all but the label, by logits ``(B, k)``.

    >>> most_likely_others(torch.tensor([[3.0, 1.0, 2.0]]), torch.tensor([0]), 0)
    tensor([2])
    """
    return by_likelihood(logits, y)[:, rank]


def by_likelihood(logits: Tensor, y: Tensor) -> Tensor:
    """All classes ``(B, k)``, the one with the highest logit first, but the label last.

    >>> by_likelihood(torch.tensor([[3.0, 1.0, -torch.inf]]), torch.tensor([0]))
    tensor([[1, 2, 0]])
    """
    others = logits.clamp(min=torch.finfo(logits.dtype).min).scatter(1, y.unsqueeze(1), -torch.inf)
    return others.argsort(dim=1, descending=True, stable=True)
