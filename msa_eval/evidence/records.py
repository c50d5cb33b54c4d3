"""What every run did to every sample, as arrays."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd

from msa_eval.defense.contexts import CONTEXTS

CARRIED = "from-"
"""How the attack of a run is named that made no pass: what it broke was broken in the context that follows."""


@dataclass(frozen=True)
class TargetRecord:
    """One target in one context, over R runs and N samples; arrays are ``(N,)`` unless said otherwise.

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
        runs: one row per run, in the order they were made: ``run`` (its name), ``surrogate``, ``attack``, ``loss``,
            ``restart``, ``forwards``, ``backwards``, ``decisions``, ``seconds`` and, of a third-party attack, ``notes``
            on its faults.
        surrogate_fooled: what each run did to each sample ``(R, N)``, as in `msa_eval.judging.outcomes.RunResult`;
            where it failed nothing is broken, and margin and perturbation are NaN.
        final_broken: as `surrogate_fooled`; so are the columns that follow.
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
    runs: pd.DataFrame
    surrogate_fooled: npt.NDArray[np.bool_]
    final_broken: npt.NDArray[np.bool_]
    any_broken: npt.NDArray[np.bool_]
    first_iterate: npt.NDArray[np.int64]
    min_margin: npt.NDArray[np.float32]
    perturbation: npt.NDArray[np.float32]
    taken_back: int = 0

    @property
    def realised(self) -> npt.NDArray[np.bool_]:
        """Right on the one adversarial batch that the attacker commits to.

        Where image i alone is the attacker's, each sample has an adversarial batch of its own, and the attacker
        commits to the one that breaks it.
        """
        if not CONTEXTS[self.context].one_batch_per_sample:
            return self.committed
        return self.unbroken

    @property
    def unbroken(self) -> npt.NDArray[np.bool_]:
        """Right on the clean batch and in every batch that a run showed."""
        unbroken: npt.NDArray[np.bool_] = self.correct & ~np.logical_or.reduce(self.any_broken, axis=0)
        return unbroken

    @property
    def complete(self) -> npt.NDArray[np.bool_]:
        """The runs ``(R,)`` that failed on no batch, so that their shares mean something."""
        complete: npt.NDArray[np.bool_] = ~np.logical_or.reduce(np.isnan(self.min_margin), axis=1)
        return complete

    @property
    def correct(self) -> npt.NDArray[np.bool_]:
        """Right on the clean batch."""
        correct: npt.NDArray[np.bool_] = self.clean_prediction == self.label
        return correct
