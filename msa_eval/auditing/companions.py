"""How the answer about an image changes with the images beside it: what the sign `batch_dependence` is made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from msa_eval.attacks.ball import Ball
from msa_eval.attacks.batch import Batch
from msa_eval.auditing.sign import NO_ANSWER, Change, change

NEIGHBOURS = 8
"""Images of a batch that are asked about among other companions."""


class RegroupedBatches:
    """Clean batches, and the same images among other companions.

    Args:
        ask: the target's logits ``(B, k)`` for a batch of images.
        batches: at least one.
        ball: the perturbation set, in which points are asked about too.
        generator: a generator for one purpose.
    """

    def __init__(
        self,
        ask: Callable[[Tensor], Tensor],
        batches: Sequence[Batch],
        ball: Ball,
        generator: Callable[..., torch.Generator],
    ) -> None:
        self._ask, self._batches, self._ball, self._generator = ask, batches, ball, generator

    def changes(self) -> dict[str, Change]:
        """The change of answers when batches are permuted, cut, moved, or given other companions."""
        if sum(len(batch.y) for batch in self._batches) < 2:
            return {}
        ways: dict[str, Callable[[Batch], tuple[Tensor, Tensor]]] = {"other companions": self._among_others}
        if any(len(batch.y) > 1 for batch in self._batches):
            ways |= {"another order": self._permuted, "halves": self._halved, "single images": self._alone,
                     "points of the ball": self._in_the_ball}  # fmt: skip
        return {name: self._changed(way) for name, way in ways.items()}

    def _changed(self, way: Callable[[Batch], tuple[Tensor, Tensor]]) -> Change:
        try:
            pairs = [way(batch) for batch in self._batches]
        except (RuntimeError, ValueError, IndexError):
            return NO_ANSWER  # a batch of that shape has no answer at all
        return change(torch.cat([before for before, _ in pairs]), torch.cat([after for _, after in pairs]))

    def _permuted(self, batch: Batch) -> tuple[Tensor, Tensor]:
        order = torch.randperm(len(batch.y), generator=self._generator("order", batch.number)).to(batch.y.device)
        return self._ask(batch.x)[order], self._ask(batch.x[order])

    def _halved(self, batch: Batch) -> tuple[Tensor, Tensor]:
        parts = batch.x.tensor_split(min(2, len(batch.x)))
        return self._ask(batch.x), torch.cat([self._ask(part) for part in parts])

    def _in_the_ball(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Random points, as a whole and in halves of another order."""
        x = self._ball.random(batch.x, self._generator("moved", batch.number))
        parts = x.flip(0).tensor_split(min(2, len(x)))
        return self._ask(x), torch.cat([self._ask(part) for part in parts]).flip(0)

    def _alone(self, batch: Batch) -> tuple[Tensor, Tensor]:
        return self._ask(batch.x), torch.cat([self._ask(image) for image in batch.x.split(1)])

    def _among_others(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """A few images beside others of the data, drawn anew for each; a batch of one gets one companion."""
        generator = self._generator("companions", batch.number)
        pool = torch.cat([other.x for other in self._batches])
        asked = torch.randperm(len(batch.y), generator=generator)[:NEIGHBOURS]
        rows = []
        for i in asked.tolist():
            drawn = torch.randint(len(pool), (max(len(batch.y), 2),), generator=generator)
            mixed = pool[drawn.to(pool.device)]
            mixed[i] = batch.x[i]
            rows.append(self._ask(mixed)[i])
        return self._ask(batch.x)[asked.to(batch.y.device)], torch.stack(rows)
