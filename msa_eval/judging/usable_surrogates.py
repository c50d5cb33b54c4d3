"""Which surrogates of a protocol a target can offer, tried on a clean batch."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from msa_eval.attacks.batch import Batch
from msa_eval.defense.contexts import AmongOthers
from msa_eval.defense.contract import Defense, WholeModel
from msa_eval.defense.micro_batches import is_out_of_memory
from msa_eval.device import onto
from msa_eval.hashing import bytes_of
from msa_eval.protocols.schema import ApgdBudget, RecombinationBudget
from msa_eval.surrogates.builtin import STE
from msa_eval.surrogates.ensemble import Ensemble, ensemble
from msa_eval.surrogates.registry import Surrogate, SurrogateLike, get


@dataclass(frozen=True)
class UsableSurrogates:
    """Which surrogates of a protocol a target has.

    Attributes:
        usable: those it has, in order.
        missing: the names of those it has not.
        sha256: over the usable ones' answers on a clean batch, so that a changed function is noticed.
        among: the names of those whose gradient reaches the companions of an image.
        together: those of ``attack.apgd`` as an ensemble, where there are several.
        pursued: those of ``among`` that a pursuit follows in turn; of a target without a trunk, the best one whose
            gradient reaches companions.
        own: the names of the caller's own.
        turns: where surrogates were found, the names that the runs of a list take in turn.
    """

    usable: Sequence[Surrogate]
    missing: Sequence[str]
    sha256: str
    among: Sequence[str] = ()
    together: Ensemble | None = None
    pursued: Surrogate | Ensemble | None = None
    own: Sequence[str] = ()
    turns: Sequence[str] = ()

    @property
    def exact(self) -> Surrogate:
        """The one with the hard decision's own gradient almost everywhere, or the last; of those found, the first."""
        if self.turns:
            return next(s for s in self.usable if s.name == self.turns[0])
        return next((s for s in self.usable if s.name == "frozen-assignment"), self.usable[-1])

    def of(self, budget: ApgdBudget) -> list[Surrogate]:
        """Those that the white-box runs of a budget use: the ones it names and the caller's, or what there is."""
        has = {surrogate.name: surrogate for surrogate in self.usable}
        named = [has[name] for name in dict.fromkeys([*self.turns, *budget.names, *self.own]) if name in has]
        return named or [self.usable[0]]


@dataclass(frozen=True)
class More:
    """Surrogates that were found for a target.

    Attributes:
        surrogates: they, the best first.
        beside: the name of the best of those there were, which takes turns with them; ``None`` if it is of no use.
        looked: whether any were looked for: then none at all is no mistake.
    """

    surrogates: Sequence[Surrogate] = ()
    beside: str | None = None
    looked: bool = False

    @property
    def turns(self) -> tuple[str, ...]:
        """The names of all, one that there was after each that was found."""
        if not self.surrogates:
            return ()
        beside = () if self.beside is None else (self.beside,)
        return tuple(name for found in self.surrogates for name in (found.name, *beside))


Find = Callable[[Sequence[Surrogate]], More]
"""Looks for more surrogates, given those that there are, each with a gradient."""


def select_surrogates(
    budget: ApgdBudget,
    defense: Defense,
    batch: Batch,
    *,
    own: Mapping[str, SurrogateLike],
    use_own: bool = True,
    batch_dependent: bool = True,
    recombination: RecombinationBudget | None = None,
    find: Find | None = None,
) -> UsableSurrogates:
    """Find the surrogates of a protocol that a defence can offer.

    A surrogate is offered when the defence has what it needs and a gradient reaches the images: a decision through a
    hard argmax has none. The caller's own come after the protocol's. Where none is left, ``ste`` is tried.

    Args:
        budget: names them.
        defense: the target.
        batch: a clean batch to try them on.
        own: the caller's own.
        use_own: whether they are for this target.
        batch_dependent: whether the target looks at companions.
        recombination: names more of them.
        find: looks for more.

    Raises:
        ValueError: when a name is unknown, one of the caller's own has no gradient, or none is left.
    """
    recombination = recombination or RecombinationBudget()
    gathering = recombination.gathering(budget)
    names = list(dict.fromkeys([*gathering.names, *budget.names, *own]))
    known = [get(name, own) for name in names if use_own or name not in own]
    answers = {s.name: answer_with_gradient(s, defense, batch) for s in known if s.applies(defense)}
    usable = [s for s in known if answers.get(s.name) is not None]
    if dull := [s.name for s in known if s.name in own and s not in usable]:
        raised = raised_by(next(s for s in known if s.name == dull[0]), defense, batch)
        raise ValueError(
            f"surrogate {dull[0]!r} has no gradient with respect to the images{raised}, so it can't be attacked"
        )
    if not usable:
        answers["ste"] = answer_with_gradient(STE, defense, batch)
        usable = [] if answers["ste"] is None else [STE]
    more = More() if find is None else find(usable)
    for surrogate in more.surrogates:
        answers[surrogate.name] = answer_with_gradient(surrogate, defense, batch)
    usable = [*(s for s in more.surrogates if answers[s.name] is not None), *usable]
    if not usable and more.looked:
        return UsableSurrogates((), [s.name for s in known], "")
    if not usable:
        raise ValueError(
            f"no surrogate of the protocol has a gradient with respect to the images{raised_by(STE, defense, batch)}; "
            "give a differentiable one of your own (surrogates={...}), or the protocol black-box, which follows none"
        )
    digest = hashlib.sha256()
    for surrogate in usable:
        answer = answers[surrogate.name]
        assert answer is not None
        digest.update(bytes_of(answer.float()))
    surrogates = UsableSurrogates(
        usable,
        [s.name for s in known if s not in usable],
        digest.hexdigest(),
        own=[s.name for s in usable if s.name in own],
        turns=more.turns,
    )
    if budget.combine == "mean" and len(attacked := surrogates.of(budget)) > 1:
        surrogates = replace(surrogates, together=ensemble(budget.combine, attacked, defense, batch.x, batch.z))
    moves = {*budget.moves, *(run.moves for run in (*budget.runs, *gathering.runs))}
    pursues = batch_dependent and len(batch.x) > 1 and recombination.passes and budget.victim is None
    if pursues and isinstance(defense, WholeModel):
        return replace(surrogates, pursued=next((s for s in usable if _reaches(s, defense, batch)), None))
    if batch_dependent and len(batch.x) > 1 and (moves != {"batch"} or recombination.passes):
        view = AmongOthers(defense, batch.z)
        among = [s for s in usable if not s.on_images and answer_with_gradient(s, view, batch, moves=True) is not None]
        surrogates = replace(surrogates, among=[s.name for s in among])
        if among:
            pursued = among[0] if len(among) == 1 else ensemble("pursued", among, defense, batch.x, batch.z)
            surrogates = replace(surrogates, pursued=pursued)
    return surrogates


def raised_by(surrogate: Surrogate, defense: Defense, batch: Batch) -> str:
    """What a pass with a gradient raises, as a part of a sentence; empty where it raises nothing."""
    x = batch.x.detach().requires_grad_()
    try:
        surrogate.logits(defense, x if surrogate.on_images else defense.features(x))
    except RuntimeError as error:
        return f" (a pass with a gradient raises: {' '.join(str(error).split())[:200]})"
    return ""


def answer_with_gradient(
    surrogate: Surrogate, defense: Defense, batch: Batch, *, moves: bool = False
) -> Tensor | None:  # fmt: skip
    """The surrogate's logits on a clean batch, or ``None`` where no gradient leads back to the images.

    Where it has to move them it must not be zero throughout.
    """
    x = batch.x.detach().requires_grad_()
    try:
        logits = surrogate.logits(defense, x if surrogate.on_images else defense.features(x))
        gradient = torch.autograd.grad(logits.sum(), x, allow_unused=True)[0] if logits.requires_grad else None
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        with torch.no_grad():  # a decision in NumPy, which a tensor with a gradient can't enter, answers here
            surrogate.logits(defense, batch.x if surrogate.on_images else batch.z)
        return None
    dead = gradient is None or (moves and not bool((gradient != 0).any()))
    return None if dead else logits.detach()


def _reaches(surrogate: Surrogate, defense: Defense, batch: Batch) -> bool:
    """Whether the gradient of one image's logits leads to its companions, beside the grid of clean images."""
    beside = 0.01 * torch.rand(batch.x.shape, generator=torch.Generator().manual_seed(0))
    x = (batch.x.detach() + onto(beside, batch.x.device)).clamp(0, 1).requires_grad_()
    logits = surrogate.logits(defense, x if surrogate.on_images else defense.features(x))
    (gradient,) = torch.autograd.grad(logits[0].sum(), x, allow_unused=True)
    return gradient is not None and bool((gradient[1:] != 0).any())
