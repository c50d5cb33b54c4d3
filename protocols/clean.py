"""The clean batches of a plan, with the target's features and verdicts."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator, Sequence

import torch
from msa_eval.protocols.contexts import in_context
from msa_eval.protocols.trial import Batch
from torch import Tensor

from msa_eval.data import Samples
from msa_eval.defense import Defense, WholeModel, check_trunk, decide, describe, looks_batch_dependent


class CleanBatches:
    """The clean batches of a plan, each passed through the target once.

    Features smaller than the images are kept; others (a target without a trunk has the images themselves) are made
    again when a batch is asked for.

    Args:
        defense: the target, on the device.
        samples: the whole data set.
        chosen: the indices evaluated ``(N,)``.
        seats: places in 0..N-1, a tensor a batch.
        device: where to compute.

    Raises:
        ValueError: when target and data don't fit, or the target breaks the contract of `Defense`.
    """

    def __init__(
        self, defense: Defense, samples: Samples, chosen: Tensor, seats: Sequence[Tensor], *, device: str
    ) -> None:
        self.samples, self.chosen, self.seats = samples, chosen, seats
        self._defense, self._device = defense, device
        self._features: dict[int, Tensor] = {}
        self._logits: dict[int, Tensor] = {}
        for number in range(len(seats)):
            self._answer(number)
        self.num_classes = self._logits[0].shape[1]
        highest = int(samples.y[chosen].max())
        if highest >= self.num_classes:
            raise ValueError(
                f"{samples.name} has label {highest}, but the model has {self.num_classes} classes (labels from 0)"
            )
        first = next(iter(self))
        check_trunk(defense, first.x, first.z)
        declared: bool | None = getattr(defense, "batch_dependent", True)
        if declared is None and isinstance(defense, WholeModel):
            declared = looks_batch_dependent(defense, first.x, first.logits)
        self.batch_dependent = declared is not False

    def __len__(self) -> int:
        return len(self.seats)

    def __iter__(self) -> Iterator[Batch]:
        for number, seat in enumerate(self.seats):
            x = self._images(number)
            z = self._features[number] if number in self._features else self._trunk(x)
            y = self.samples.y[self.chosen[seat]].to(self._device)
            yield Batch(number, x, y, z, self._logits[number])

    def seen_in(self, context: str) -> CleanBatches:
        """The same batches with the target's verdicts in another context."""
        seen = copy.copy(self)
        seen._logits = {
            batch.number: decide(self.view(context, batch), batch.z) if context == "alone" else batch.logits
            for batch in self
        }
        return seen

    def view(self, context: str, batch: Batch) -> Defense:
        """The target as an attacker in a context meets it."""
        return in_context(self._defense, context, batch.z, batch_dependent=self.batch_dependent)

    def digest(self) -> str:
        """SHA-256 of all verdicts: it tells apart what weights alone do not."""
        digest = hashlib.sha256()
        for number in range(len(self)):
            digest.update(self._logits[number].cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def _images(self, number: int) -> Tensor:
        return self.samples.images(self.chosen[self.seats[number]]).to(self._device)

    def _trunk(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            z = self._defense.features(x)
        if not isinstance(z, Tensor) or z.ndim < 2 or len(z) != len(x):
            raise ValueError(f"expected features of shape (B, ...) for {len(x)} images, but got {describe(z)}")
        return z

    def _answer(self, number: int) -> None:
        x = self._images(number)
        try:
            z = self._trunk(x)
            logits = decide(self._defense, z)
        except (RuntimeError, IndexError) as error:
            shape = tuple(x.shape)
            raise ValueError(f"the model can't take a float32 batch of images of shape {shape}: {error}") from error
        if not bool(torch.isfinite(logits).all()):
            raise ValueError(f"the model's logits on clean batch {number} are not finite")
        if z[0].numel() < x[0].numel():
            self._features[number] = z
        self._logits[number] = logits
