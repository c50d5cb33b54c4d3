"""Replaying a proof: the hard target decides the real batch, with no closed form and no word of the engine's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from msa_eval.attacks.ball import Ball
from msa_eval.data import Samples
from msa_eval.defense.checks import check_trunk
from msa_eval.defense.contexts import CONTEXTS
from msa_eval.defense.contract import Defense, decide
from msa_eval.evidence.proof import Proof
from msa_eval.judging.dependence import looks_at_its_batch
from msa_eval.judging.majority import JUDGE, JUDGE_SIGMAS, telling_draw
from msa_eval.randomness import seeded


class Replay:
    """A target that answers for proofs, in float32 and in batches put together image by image.

    Features come from the trunk, each image passed once; clean ones smaller than the images are kept.

    Args:
        defense: the target, on the device, in evaluation mode.
        samples: the whole data set.
        batches: the plan: indices into the data set in batch order, a tensor a batch.
        device: where to compute.
        draws: answers that the verdict on a stochastic target is the majority of; a proof is asked about `JUDGE` times
            as often.
        ball: the perturbation set, as for `CleanBatches`.
        batch_dependent: whether the target looks at its batch, where that was found out before.

    Raises:
        ValueError: when features depend on more than their own image, so that rows can't be exchanged.
    """

    def __init__(
        self,
        defense: Defense,
        samples: Samples,
        batches: Sequence[Tensor],
        *,
        device: str,
        draws: int = 1,
        ball: Ball | None = None,
        batch_dependent: bool | None = None,
    ) -> None:
        self.samples, self.batches = samples, batches
        self._defense, self._device, self.draws = defense, device, draws
        self._kept: dict[int, Tensor] = {}
        x = self._images(batches[0])
        z = self._features(x)
        check_trunk(defense, x, z)
        if batch_dependent is None:
            batch_dependent = draws > 1 or looks_at_its_batch(defense, x, decide(defense, z), ball)
        self.batch_dependent = batch_dependent or draws > 1

    def images(self, number: int) -> Tensor:
        """The clean batch ``(B, C, H, W)`` of a number.

        Raises:
            LookupError: when the plan has none of that number.
        """
        if number < 0:
            raise LookupError(number)
        return self._images(self.batches[number])

    def labels(self, proof: Proof) -> Tensor:
        """The labels of the samples that a proof breaks ``(n,)``."""
        return self.samples.y[self.batches[proof.batch][proof.positions]].to(self._device)

    def clean_logits(self, number: int, context: str) -> Tensor:
        """The target's answer to a clean batch ``(B, k)``, or to each of its images in the batch of its own."""
        z = self._clean_features(self.batches[number])
        if CONTEXTS[context].in_clean_batch or not self.batch_dependent:
            return decide(self._defense, z)
        own = (CONTEXTS[context].decided_in(z, row, at) for at, row in enumerate(z))
        return torch.stack([decide(self._defense, batch)[at] for batch, at in own])

    def logits(self, proof: Proof) -> Tensor:
        """The target's answer to the rows that a proof is about ``(n, k)``, each in its batch.

        Of a stochastic target it is the draw of the median margin, so that it tells the majority.

        Raises:
            ValueError: when the companions of a composed batch are not others of the data set.
        """
        with seeded(0):
            return telling_draw(self._answers(proof), self.labels(proof))

    def breaks(self, proof: Proof) -> Tensor:
        """Which of a proof's positions the target gets wrong ``(n,)``."""
        return self.logits(proof).argmax(dim=1) != self.labels(proof)

    def clearly_breaks(self, proof: Proof) -> Tensor:
        """Which of them a stochastic target gets wrong so often ``(n,)`` that a replay will find them wrong too.

        Its draws are fresh ones, from the generators as they stand: a sample judged twice gets two judgements.
        """
        logits = telling_draw(self._answers(proof), self.labels(proof), sigmas=JUDGE_SIGMAS)
        return logits.argmax(dim=1) != self.labels(proof)

    def _answers(self, proof: Proof) -> Tensor:
        """As many answers as it takes ``(r, n, k)``."""
        count = 1 if self.draws == 1 else self.draws * JUDGE
        x = self._features(proof.x.to(self._device))
        if proof.kind == "batch":
            return torch.stack([decide(self._defense, x)[proof.positions] for _ in range(count)])
        rows = x if proof.own is None else self._features(proof.own.to(self._device))
        each = [
            torch.stack([decide(self._defense, z)[at] for _ in range(count)]) for z, at in self._batches(proof, x, rows)
        ]
        return torch.stack(each, dim=1)

    def _batches(self, proof: Proof, x: Tensor, rows: Tensor) -> Iterator[tuple[Tensor, int]]:
        """The features of each real batch, and where the row in question sits in it."""
        context = CONTEXTS[proof.context]
        if proof.companions is not None and context.has_companions:
            yield from self._composed(proof, rows, proof.companions)
            return
        others = x
        if proof.kind != "victims" and context.has_companions:
            others = self._clean_features(self.batches[proof.batch])
        for row, at in zip(rows, proof.positions.tolist(), strict=True):
            yield context.decided_in(others, row, at)

    def _composed(self, proof: Proof, rows: Tensor, companions: Tensor) -> Iterator[tuple[Tensor, int]]:
        samples = self.batches[proof.batch][proof.positions].tolist()
        for row, at, own, index in zip(rows, proof.positions.tolist(), samples, companions, strict=True):
            if not len(index):
                yield row.unsqueeze(0), at
                continue
            if int(index.min()) < 0 or int(index.max()) >= len(self.samples):
                raise ValueError(f"the companions of sample {own} are not all in the data set")
            if len(index.unique()) < len(index) or bool((index == own).any()):
                raise ValueError(f"the companions of sample {own} are not different images other than itself")
            z = self._clean_features(index)
            yield torch.cat([z[:at], row.unsqueeze(0), z[at:]]), at

    def _images(self, index: Tensor) -> Tensor:
        return self.samples.images(index).to(self._device)

    def _features(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self._defense.features(x)

    def _clean_features(self, index: Tensor) -> Tensor:
        """Features ``(B, ...)`` of images of the data set, each passed through the trunk once if it can be kept."""
        missing = torch.tensor([i for i in index.tolist() if i not in self._kept], dtype=torch.long)
        if len(missing):
            x = self._images(missing)
            z = self._features(x)
            if z[0].numel() >= x[0].numel():
                return z  # nothing is ever kept, so all were missing
            self._kept |= dict(zip(missing.tolist(), z, strict=True))
        return torch.stack([self._kept[i] for i in index.tolist()])
