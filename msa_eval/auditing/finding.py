"""What is known of a target's gradients, and what was found in place of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from msa_eval.auditing.gradient_truth import Truth
from msa_eval.auditing.sign import Sign
from msa_eval.auditing.truth_sign import gradient_truth
from msa_eval.surrogates.registry import Surrogate


@dataclass(frozen=True)
class Tried:
    """A candidate that was tried.

    Attributes:
        name: as tables would call it.
        how: how it was made, in words.
        truth: how true its gradient is; ``None`` where it failed.
        broken: samples that a short attack through it broke, of those tried; ``None`` where it was not attacked.
        kept: whether it is used.
        reason: why it is not.
    """

    name: str
    how: str
    truth: float | None
    broken: int | None
    kept: bool
    reason: str = ""


@dataclass(frozen=True)
class Finding:
    """What is known of a target's gradients.

    Attributes:
        surrogates: those found and kept, the best first.
        truths: how true each gradient is, by name: of the surrogates there were, and of those kept.
        tried: all candidates, in the order they were made.
        signal: the share of the hard target's changes that a gradient could predict.
        agreement: where that is little: the share of the points of a short attack on which the best surrogate's class
            is the target's.
        failure: what went wrong, where nothing could be measured.
        interacting: whether the target looks at its batch.
        brought: whether some surrogates are the target's own, beside its plain gradient.
        unreached: whether companions change answers, and no gradient of the target's own reaches them.
    """

    surrogates: Sequence[Surrogate]
    truths: dict[str, Truth]
    tried: Sequence[Tried] = ()
    signal: float = 1.0
    agreement: float = 1.0
    failure: str = ""
    interacting: bool = False
    brought: bool = False
    unreached: bool = False

    def sign(self) -> Sign:
        """What it means for a figure."""
        figures = {name: truth.figure for name, truth in self.truths.items()}
        kept = {surrogate.name for surrogate in self.surrogates}
        return gradient_truth(
            {name: figure for name, figure in figures.items() if name not in kept},
            found={name: figure for name, figure in figures.items() if name in kept},
            signal=self.signal,
            agreement=self.agreement,
            brought=self.brought,
            interacting=self.interacting,
            unreached=self.unreached,
            tried=[one.name for one in self.tried if one.truth is not None and one.name not in kept],
            failure=self.failure,
        )

    def about(self) -> dict[str, Any]:
        """What `run.json` says of the surrogates that were tried, the ones that are used first."""
        return {
            one.name: asdict(one) for one in sorted(self.tried, key=lambda one: not one.kept) if one.truth is not None
        }

    @property
    def best(self) -> float:
        """The truest gradient's figure; 0 where there is none."""
        return max((truth.figure for truth in self.truths.values()), default=0.0)
