"""What every run did to every sample, as arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from msa_eval.defense.contexts import CONTEXTS


@dataclass(frozen=True)
class RunRecord:
    """One run over all samples; arrays are ``(N,)`` in the order of `TargetRecord.index`.

    The fields are those of `msa_eval.judging.outcomes.Outcome`, joined over batches. Where it failed, nothing is
    broken, and margin and perturbation are NaN. ``notes`` are its faults in words; ``None`` for our own attacks.
    """

    name: str
    surrogate: str
    attack: str
    loss: str
    restart: int
    surrogate_fooled: npt.NDArray[np.bool_]
    final_broken: npt.NDArray[np.bool_]
    any_broken: npt.NDArray[np.bool_]
    first_iterate: npt.NDArray[np.int64]
    min_margin: npt.NDArray[np.float32]
    perturbation: npt.NDArray[np.float32]
    forwards: int
    backwards: int
    decisions: int
    seconds: float
    notes: tuple[str, ...] | None = None

    @property
    def whole(self) -> bool:
        """Whether it failed on no batch, so that its shares mean something."""
        return not bool(np.isnan(self.min_margin).any())


@dataclass(frozen=True)
class TargetRecord:
    """One target in one context; arrays are ``(N,)``.

    Attributes:
        target: ``defense`` or ``fc``.
        context: what the attacker controls.
        index: places in the data set, ascending.
        label: of each sample.
        batch: the batch each sits in.
        position: its place there.
        clean_prediction: the target's answer on the clean batch.
        clean_margin: its logit margin there.
        committed: in ``joint``, right on the one adversarial batch that leaves the fewest of its batch right.
        runs: in the order they were made.
        taken_back: how many samples of a stochastic target were called broken, but no break was upheld.
    """

    target: str
    context: str
    index: npt.NDArray[np.int64]
    label: npt.NDArray[np.int64]
    batch: npt.NDArray[np.int64]
    position: npt.NDArray[np.int64]
    clean_prediction: npt.NDArray[np.int64]
    clean_margin: npt.NDArray[np.float32]
    committed: npt.NDArray[np.bool_]
    runs: Sequence[RunRecord]
    taken_back: int = 0

    @property
    def realised(self) -> npt.NDArray[np.bool_]:
        """Right on the one adversarial batch that the attacker commits to.

        Where image i alone is the attacker's, each sample has an adversarial batch of its own, and the attacker
        commits to the one that breaks it.
        """
        if not CONTEXTS[self.context].one_batch_per_sample:
            return self.committed
        never: npt.NDArray[np.bool_] = self.correct & ~np.stack([run.any_broken for run in self.runs]).any(axis=0)
        return never

    @property
    def correct(self) -> npt.NDArray[np.bool_]:
        """Right on the clean batch."""
        correct: npt.NDArray[np.bool_] = self.clean_prediction == self.label
        return correct
