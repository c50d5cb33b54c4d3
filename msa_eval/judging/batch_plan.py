"""Which samples are evaluated, and which of them sit together."""

from __future__ import annotations

import torch
from torch import Tensor

from msa_eval.protocols.schema import Protocol


def select(y: Tensor, protocol: Protocol) -> Tensor:
    """Choose the samples of a protocol.

    Args:
        y: the labels of the whole data set ``(M,)``.
        protocol: its sample keys and their seed decide.

    Returns:
        indices into the data set ``(N,)``, ascending.

    Raises:
        ValueError: when nothing is left, or a class has too few samples for ``per_class``.
    """
    generator = torch.Generator().manual_seed(protocol.samples_seed)
    order = torch.randperm(len(y), generator=generator)
    if protocol.fraction is not None:
        order = order[: round(protocol.fraction * len(y))]
    if protocol.per_class is not None:
        order = _per_class(order, y, protocol.per_class)
    if protocol.limit is not None:
        order = order[: protocol.limit]
    if not len(order):
        raise ValueError(f"samples.fraction leaves none of the {len(y)} samples")
    return order.sort().values


def _per_class(order: Tensor, y: Tensor, count: int) -> Tensor:
    """The first ``count`` of each class, in the given order."""
    shuffled = y[order]
    keep = torch.zeros(len(order), dtype=torch.bool)
    for label in y.unique().tolist():
        places = (shuffled == label).nonzero().flatten()
        if len(places) < count:
            least = int(shuffled.unique(return_counts=True)[1].min())
            raise ValueError(
                f"samples.per_class asks for {count} of each class, but class {label} has {len(places)}; take so many "
                f'as each has: overrides={{"samples.per_class": {least}}}'
            )
        keep[places[:count]] = True
    return order[keep]


def plan_batches(count: int, *, size: int, seed: int) -> list[Tensor]:
    """Seat samples: a seeded shuffle, cut into batches of balanced sizes.

    Args:
        count: N, the number of samples.
        size: the largest batch allowed.
        seed: of the shuffle.

    Returns:
        places in 0..N-1, a tensor a batch; sizes differ by at most one.

    >>> {len(batch) for batch in plan_batches(2500, size=64, seed=0)}
    {62, 63}
    """
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return list(order.tensor_split(-(-count // size)))


def batch_of(victim: int, chosen: Tensor, batch_plan: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Keep the one batch in which a sample sits.

    Args:
        victim: its index in the data set.
        chosen: the indices evaluated ``(N,)``.
        batch_plan: places in 0..N-1, a tensor a batch.

    Returns:
        the indices of that batch, ascending, and the places in these of the one batch.

    Raises:
        ValueError: when the sample is not among those evaluated.

    >>> batch_of(7, torch.tensor([5, 7, 9]), [torch.tensor([2, 1]), torch.tensor([0])])
    (tensor([7, 9]), [tensor([1, 0])])
    """
    for batch_model in batch_plan:
        if bool((chosen[batch_model] == victim).any()):
            kept = chosen[batch_model].sort().values
            return kept, [torch.searchsorted(kept, chosen[batch_model])]
    raise ValueError(f"the victim, sample {victim}, is not among the {len(chosen)} samples of the protocol")
