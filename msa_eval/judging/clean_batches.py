"""The clean batches of a plan, with the target's features and verdicts."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from msa_eval.attacks.ball import Ball
from msa_eval.attacks.batch import Batch
from msa_eval.data import Samples
from msa_eval.defense.calling import described, not_finite
from msa_eval.defense.checks import check_trunk
from msa_eval.defense.contexts import CONTEXTS, Companions, own_companions
from msa_eval.defense.contract import Defense, WholeModel, decide, modules_of
from msa_eval.defense.micro_batches import unwrap
from msa_eval.device import onto
from msa_eval.hashing import bytes_of
from msa_eval.judging.dependence import looks_at_its_batch
from msa_eval.judging.majority import decide_by_majority
from msa_eval.progress import Progress, silent
from msa_eval.protocols.schema import CompositionBudget, StochasticBudget
from msa_eval.randomness import seeded
from msa_eval.untrusted import printable


class Pool(NamedTuple):
    """Clean images to choose companions from.

    Attributes:
        z: their features ``(P, ...)``.
        indices: their places in the data set ``(P,)``.
        classes: what the target takes them for in their own batches ``(P,)``.
    """

    z: Tensor
    indices: Tensor
    classes: Tensor


class CleanBatches:
    """The clean batches of a plan, each passed through the target once.

    Features no larger than the images are kept; others (a target without a trunk has the images themselves) are made
    again when a batch is asked for.

    Args:
        defense: the target, on the device.
        samples: the whole data set.
        chosen: the indices evaluated ``(N,)``.
        batch_plan: places in 0..N-1, a tensor a batch.
        device: where to compute.
        stochastic: how often a target that answers at random is asked.
        ball: the perturbation set, in which points are asked about too, to find out whether the decision looks at the
            whole batch.
        progress: shows how far it has come.

    Attributes:
        num_classes: k.
        batch_dependent: whether the decision may look at the whole batch.
        stochastic: whether the target answers at random.
        draws: answers to a batch that a verdict is the majority of; 1 unless the target answers at random.
        eot: answers a gradient is averaged over; 1 unless the target answers at random.

    Raises:
        ValueError: when target and data don't fit, or the target breaks the contract of `Defense`.
    """

    def __init__(
        self,
        defense: Defense,
        samples: Samples,
        chosen: Tensor,
        batch_plan: Sequence[Tensor],
        *,
        device: str,
        stochastic: StochasticBudget | None = None,
        ball: Ball | None = None,
        progress: Progress = silent,
    ) -> None:
        self.samples, self.chosen, self.batch_plan = samples, chosen, batch_plan
        self._defense, self.device = defense, device
        self._features: dict[int, Tensor] = {}
        self._logits: dict[int, Tensor] = {}
        self.draws = self.eot = 1
        with seeded(0):
            self.stochastic = self._answers_at_random()
            if self.stochastic:
                budget = stochastic or StochasticBudget()
                self.draws, self.eot = budget.draws, budget.eot
            for number in progress(range(len(batch_plan)), "clean pass"):
                self._answer(number)
        self.num_classes = self._logits[0].shape[1]
        highest = int(samples.y[chosen].max())
        if highest >= self.num_classes:
            from_one = highest == self.num_classes and int(samples.y.min()) == 1
            raise ValueError(
                f"{samples.name} has label {highest}, but the model has {self.num_classes} classes; "
                + ("count labels from 0: y - 1" if from_one else f"give labels from 0 to {self.num_classes - 1}")
            )
        first = next(iter(self))
        check_trunk(defense, first.x, first.z)
        self.batch_dependent = looks_at_its_batch(defense, first.x, first.logits, ball, stochastic=self.stochastic)

    @property
    def defense(self) -> Defense:
        """The target."""
        return self._defense

    def __len__(self) -> int:
        return len(self.batch_plan)

    def __iter__(self) -> Iterator[Batch]:
        return (self.batch(number) for number in range(len(self)))

    def batch(self, number: int) -> Batch:
        """One of them."""
        x = self._images(number)
        z = self._features[number] if number in self._features else self._trunk(x)
        y = self.samples.y[self.chosen[self.batch_plan[number]]].to(self.device)
        return Batch(number, x, y, z, self._logits[number])

    def seen_in(self, context: str) -> CleanBatches:
        """The same batches with the target's verdicts in another context."""
        seen = copy.copy(self)
        with seeded(0):
            seen._logits = {
                batch.number: batch.logits
                if CONTEXTS[context].in_clean_batch
                else self._decide(batch.number, self.view(context, batch), batch.z)
                for batch in self
            }
        return seen

    def view(self, context: str, batch: Batch, companions: Companions | None = None) -> Defense:
        """The target as an attacker in a context meets it."""
        if not self.batch_dependent:
            return self._defense
        return CONTEXTS[context].view(self._defense, batch.z, companions)

    def pool(self, budget: CompositionBudget) -> Pool:
        """Images to choose companions from, drawn from all that are evaluated."""
        generator = torch.Generator().manual_seed(len(self.chosen))
        drawn = torch.randperm(len(self.chosen), generator=generator)[: budget.pool]
        wanted = torch.zeros(len(self.chosen), dtype=torch.bool).index_fill(0, drawn, True)
        parts = [(batch, self.batch_plan[batch.number], wanted[self.batch_plan[batch.number]]) for batch in self]
        features = torch.cat([batch.z[keep.to(batch.z.device)] for batch, _, keep in parts])
        classes = torch.cat([batch.logits.argmax(dim=1)[keep.to(batch.z.device)] for batch, _, keep in parts])
        return Pool(features, self.chosen[torch.cat([batch_model[keep] for _, batch_model, keep in parts])], classes)

    def own_companions_of(self, batch: Batch, pool: Pool) -> Companions:
        """Every image of a batch among its own companions; the pool follows the batch itself."""
        index = own_companions(len(batch.x)).to(batch.z.device)
        return Companions(torch.cat([batch.z, pool.z]), index, torch.arange(len(index), device=index.device))

    def digest(self) -> str:
        """SHA-256 of all verdicts: it tells apart what weights alone do not."""
        digest = hashlib.sha256()
        for number in range(len(self)):
            digest.update(bytes_of(self._logits[number]))
        return digest.hexdigest()

    def _answers_at_random(self) -> bool:
        """Whether the first batch is answered differently twice; one that can't be answered is reported later.

        Raises:
            ValueError: when the chance is in the features, of which an evaluation draws each only once.
        """
        x = self._images(0)
        try:
            z = self._trunk(x), self._trunk(x)
            logits = decide(self._defense, z[0]), decide(self._defense, z[1])
        except (RuntimeError, IndexError, ValueError):
            return False
        if _differ(*logits) and _differ(*z):
            raise ValueError(
                "features(x) depend on chance, and a verdict would be on one draw of them; move what is random into "
                "logits(z), or make the whole a module from images to logits: msa_eval.WholeModel(defense) if it is one"
            )
        return _differ(*logits)

    def _decide(self, number: int, view: Defense, z: Tensor) -> Tensor:
        y = self.samples.y[self.chosen[self.batch_plan[number]]].to(z.device)
        return decide_by_majority(view, z, y, draws=self.draws)

    def _images(self, number: int) -> Tensor:
        return onto(self.samples.images(self.chosen[self.batch_plan[number]]), self.device)

    def _trunk(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            z = self._defense.features(x)
        if not isinstance(z, Tensor) or z.ndim < 2 or len(z) != len(x):
            raise ValueError(f"expected features of shape (B, ...) for {len(x)} images, but got {described(z)}")
        return z

    def _answer(self, number: int) -> None:
        x = self._images(number)
        try:
            z = self._trunk(x)
            logits = self._decide(number, self._defense, z)
        except (RuntimeError, IndexError) as error:
            shape = tuple(x.shape)
            raise ValueError(
                f"the model can't take a float32 batch of images of shape {shape}{self._other_dtype()}: "
                f"{printable(error)}"
            ) from error
        if wrong := not_finite(logits):
            raise ValueError(f"the model's logits on clean batch {number} are not finite: {wrong}")
        if z[0].numel() <= x[0].numel() and not isinstance(unwrap(self._defense), WholeModel):
            self._features[number] = z
        self._logits[number] = logits

    def _other_dtype(self) -> str:
        """What to do where the weights are of another dtype than images."""
        kinds = {weight.dtype for module in modules_of(self._defense) for weight in module.parameters()}
        others = sorted(str(kind).removeprefix("torch.") for kind in kinds - {torch.float32} if kind.is_floating_point)
        return f" (its weights are {others[0]}; call .float() on it)" if others else ""


def _differ(first: Tensor, second: Tensor) -> bool:
    """Whether two answers are not the same; sums in another order, as GPUs make them, are no chance."""
    return not float((first - second).abs().max()) <= 1e-5 * float(first.abs().max())
