"""Surrogates made of a target's own code, its stages, or averages: candidates, not yet chosen among."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from msa_eval.attacks.ball import Ball
from msa_eval.auditing.gradient_truth import Truth
from msa_eval.defense.contract import Defense, WholeModel
from msa_eval.defense.micro_batches import is_out_of_memory, unwrap
from msa_eval.randomness import seeded
from msa_eval.surrogates.found.passing import Passing
from msa_eval.surrogates.found.smoothed import Averaged, Estimated
from msa_eval.surrogates.found.stages import (
    ClassPassedOver,
    InnerModel,
    MeanOfInner,
    PassedOver,
    Stage,
    classes_passing_on,
    stages_of,
)
from msa_eval.surrogates.found.straight_through import OwnCode
from msa_eval.surrogates.registry import Surrogate

BLIND = 0.3
"""Below this figure, a gradient estimated from the target's answers is tried."""

VARIANTS = {
    "straight-through": Passing(),
    "straight-through@keep-detach": Passing(detached=False),
    "straight-through@soft": Passing(soft=True),
    "straight-through@clamps": Passing(clamps=True),
    "straight-through@inner": Passing(inner=True),
    "straight-through@steps": Passing(blocks=False, detached=False),
    "straight-through@blocks": Passing(steps=False),
}
"""What the gradient is passed through, by the surrogate's name."""


@dataclass(frozen=True)
class Attacked:
    """What a short attack did.

    Attributes:
        margin_loss: the highest hard margin of each sample ``(B,)``.
        agreement: the share of the points on which the surrogate and the target took the sample for right or wrong
            alike; 0 where the surrogate's values are the target's own, so that they can't but agree.
    """

    margin_loss: Tensor
    agreement: float

    @property
    def broken(self) -> Tensor:
        """The samples that it broke ``(B,)``."""
        return self.margin_loss > 0


@dataclass
class Candidate:
    """A surrogate made of a target's own code.

    Attributes:
        surrogate: itself.
        how: how it was made, in words.
        always: whether a short attack decides about it, however true its gradient is.
        least: it has to be truer than that.
        truth: how true its gradient is, once that was measured.
        attacked: what a short attack through it did, once that was made.
        reason: why it is not used.
    """

    surrogate: Surrogate
    how: str
    always: bool = False
    least: float = -1.0
    truth: Truth | None = None
    attacked: Attacked | None = None
    reason: str = ""


def find_stages(defense: Defense, x: Tensor, *, seed: int) -> list[Stage]:
    """The submodules of a target that are given images; none where no hook can look into it."""
    try:
        with seeded(seed):
            return stages_of(defense, x)
    except Exception:  # a model that no hook can look into has no stages to offer
        return []


def inner_models(defense: Defense, x: Tensor, stages: Sequence[Stage], *, seed: int) -> Iterator[Candidate]:
    """Submodules that answer with logits, and don't answer what the target does of what it is given."""
    with seeded(seed), torch.no_grad():
        answer = defense.logits(defense.features(x)).float()
    scale = float(answer.abs().max()) + 1e-12
    members: list[InnerModel] = []
    for stage in stages:
        if stage.answers is None:
            continue
        same = bool(((stage.answers.float() - answer).abs().max() <= 1e-4 * scale).item())
        if same and stage.given.exact and stage.calls == 1:
            continue
        model = InnerModel(stage.module, stage.given)
        members.append(model)
        how = f"the submodule {stage.name}, which maps images to logits, by itself"
        yield Candidate(Surrogate(f"inner:{stage.name}", model, on_images=True), how, always=True)
    if len(members) > 1:
        how = f"the mean of the logits of the {len(members)} submodules that map images to logits"
        mean = Surrogate("inner:mean", MeanOfInner(tuple(members)), on_images=True, passes=len(members))
        yield Candidate(mean, how, always=True)


def own_code(defense: Defense) -> Iterator[Candidate]:
    """The target's own code, the gradient passed through more or less of what blocks it."""
    if not isinstance(unwrap(defense), WholeModel):
        how = f"the target's own decision, its gradient passed through {Passing().words}"
        yield Candidate(Surrogate("straight-through@decision", OwnCode(Passing())), how)
    for name, passing in VARIANTS.items():
        how = f"the target's own code, its gradient passed through {passing.words}"
        yield Candidate(Surrogate(name, OwnCode(passing, on_images=True), on_images=True), how)


def passed_over(defense: Defense, x: Tensor, stages: Sequence[Stage]) -> Iterator[Candidate]:
    """The target's own code, a stage of which, or all before it, is the identity on the way back."""
    for stage in stages:
        for passing, more in ((None, ""), (Passing(), "+straight-through")):
            if stage.passes_on:
                how = f"the target's own code, the stage {stage.name} the identity on the way back"
                model = PassedOver(stage, before=False, passing=passing)
                yield Candidate(Surrogate(f"bpda:{stage.name}{more}", model, on_images=True), how)
            how = f"the target's own code, all before {stage.name} the identity on the way back"
            model = PassedOver(stage, before=True, passing=passing)
            yield Candidate(Surrogate(f"bpda:before-{stage.name}{more}", model, on_images=True), how)
    for kind in classes_passing_on(defense, x):
        how = f"the target's own code, every {kind.__name__} the identity on the way back"
        yield Candidate(Surrogate(f"bpda:{kind.__name__}", ClassPassedOver(kind), on_images=True), how)


def averages(
    known: Sequence[tuple[float, Surrogate]], ball: Ball, pixels: int
) -> Iterator[Candidate]:  # fmt: skip
    """The truest of some surrogates averaged over noise, and where all are blind, an estimate from answers.

    Args:
        known: surrogates and how true each is.
        ball: the protocol's.
        pixels: values of an image.
    """
    figure, best = max(known, key=lambda pair: pair[0], default=(0.0, None))
    pixel = float(ball.eps) if ball.norm == "Linf" else ball.eps / pixels**0.5
    if best is not None and figure > 0:
        averaged = Averaged(best, pixel / 2)
        how = f"{best.name}, averaged over {averaged.draws} noisy images"
        made = Surrogate(f"smoothed:{best.name}", averaged, on_images=True, passes=averaged.draws)
        yield Candidate(made, how, least=figure)
    if figure < BLIND:
        estimated = Estimated(pixel / 2)
        how = f"the target itself, its gradient estimated from {2 * estimated.pairs} of its answers"
        yield Candidate(
            Surrogate("smoothed", estimated, on_images=True, passes=1 + 2 * estimated.pairs), how, always=True
        )


@dataclass(frozen=True)
class Guarded:
    """A surrogate that was found; where it fails on a batch, the target's answers, without a gradient, in its place."""

    surrogate: Surrogate

    def __call__(self, defense: Any, given: Tensor) -> Tensor:
        """Logits ``(B, k)`` of images or of features."""
        try:
            logits: Tensor = self.surrogate.logits(defense, given).float()
            return logits
        except Exception as error:
            if is_out_of_memory(error):
                raise
            with torch.no_grad():
                hard = defense.logits(defense.features(given) if self.surrogate.on_images else given).float()
            answer: Tensor = hard + 0 * given.flatten(1).sum(dim=1, keepdim=True)
            return answer


def guarded(surrogate: Surrogate) -> Surrogate:
    """A surrogate that never fails."""
    return replace(surrogate, logits=Guarded(surrogate))


def renamed(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Give names that are taken a number."""
    taken: dict[str, int] = {}
    for candidate in candidates:
        name = candidate.surrogate.name
        taken[name] = taken.get(name, 0) + 1
        if taken[name] > 1:
            candidate.surrogate = replace(candidate.surrogate, name=f"{name}#{taken[name]}")
    return list(candidates)
