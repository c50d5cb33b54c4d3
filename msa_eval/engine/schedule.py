"""The runs of a protocol against one target: surrogate × loss × restart, then the query attacks."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from msa_eval.attacks.attacked_batch import Attack
from msa_eval.attacks.borderline import BorderlineAttack, OddsAttack
from msa_eval.attacks.companions import RANKS, CompanionPursuit, CompositionAttack
from msa_eval.attacks.gradient import ApgdAttack
from msa_eval.attacks.losses import MALT, MIN_CLASSES, TARGETED
from msa_eval.attacks.pursuit import PursuitAttack, RecombinationAttack, VictimAttack
from msa_eval.attacks.query import SpsaAttack, SquareAttack
from msa_eval.defense.contexts import JOINT, AmongOthers, Context
from msa_eval.defense.contract import Defense
from msa_eval.judging.batch_history import BatchHistory
from msa_eval.judging.search_state import Setting
from msa_eval.judging.usable_surrogates import UsableSurrogates
from msa_eval.protocols.checks import RunSpec
from msa_eval.protocols.schema import ApgdBudget, Protocol, RecombinationBudget, SpsaBudget, SquareBudget
from msa_eval.surrogates.ensemble import Ensemble
from msa_eval.surrogates.registry import Surrogate

COMPOSED_EVERY, COMPOSED_FIRST, COMPOSED_ROUNDS = 3, 6, 3
"""In ``composed`` companions are chosen anew after so many runs; so many are made before the pursuits, so often towards
every class, that take the place of the others."""


OWN = "own"
"""The loss of an attack of other libraries."""


@dataclass(frozen=True)
class Run:
    """One run: what is attacked, by what, from which start.

    Attributes:
        surrogate: what is attacked; ``None`` is the hard target itself.
        attack: the search.
        loss: the loss's name, or `OWN`.
        restart: which start, or which target class, from 0.
        chained: whether it goes on from earlier runs: only for samples that still stand, beside the best points.
        moves: which images it moves, as in `ApgdBudget`.
        passes: a sample, after which it searches a batch no more; it makes the verifying pass alone.
        continues: whether it starts at the points of another evaluation (see `msa_eval.engine.continued`).
    """

    surrogate: Surrogate | Ensemble | None
    attack: Attack
    loss: str
    restart: int
    chained: bool = False
    moves: str = "batch"
    passes: int | None = None
    continues: bool = False

    @property
    def surrogate_name(self) -> str:
        """The surrogate's name, or ``target``."""
        return "target" if self.surrogate is None else self.surrogate.name

    @property
    def attack_name(self) -> str:
        """The attack's name, with what it moves where that is not the whole batch."""
        return self.attack.name if self.moves == "batch" else f"{self.attack.name}-{self.moves}"

    @property
    def name(self) -> str:
        """Unique among the runs of a target."""
        attack = self.attack_name if self.loss == OWN else f"{self.attack_name}-{self.loss}"
        return f"{self.surrogate_name}:{attack}:{self.restart}"

    def generator(self, *key: object) -> torch.Generator:
        """A generator of this run's own, the same whatever ran before it.

        Args:
            key: seed, target, context and batch.
        """
        text = "/".join(map(str, (*key, self.name)))
        seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
        return torch.Generator().manual_seed(seed)

    def setting(self, defense: Defense, history: BatchHistory, *, victim: Tensor | None = None) -> Setting:
        """How this run meets a batch.

        Args:
            defense: the target.
            history: what earlier runs did to the batch.
            victim: where given, the one sample ``(B,)`` whose companions are moved.
        """
        still = history.best if self.chained else history.clean
        counted = history.unbroken if self.chained else None
        view: AmongOthers | None = None
        if self.moves == "companions":
            view = AmongOthers(defense, still.z)
            counted = victim if victim is not None else history.unbroken if self.chained else history.correct
        if self.passes is not None and history.passes >= self.passes * len(history.broken):
            counted = torch.zeros_like(history.broken)
        start = still if self.chained else None
        return Setting(
            start=start, counted=counted, stays=self.moves == "standing", early_stop=self.chained,
            known=history.broken, view=view, ranking=history.ranking,
        )  # fmt: skip


def plan_runs(
    protocol: Protocol,
    surrogates: UsableSurrogates,
    *,
    num_classes: int,
    context: Context = JOINT,
    batch_dependent: bool = True,
    caches: bool = True,
    exchanges: bool = False,
    randomized: bool = False,
) -> list[Run]:
    """All runs of a protocol against one target in one context, in the order they are made.

    Args:
        protocol: names losses and budgets.
        surrogates: the surrogates the target has.
        num_classes: k, which some losses need to be high enough.
        context: what the attacker controls.
        batch_dependent: whether the target looks at companions.
        caches: whether its decision costs less than a pass.
        exchanges: whether it has a closed form for batches that differ in one row.
        randomized: whether it answers at random.

    Raises:
        ValueError: when a loss needs more classes.
    """
    runs: list[Run] = []
    budget, mixing = protocol.apgd, protocol.recombination
    together = batch_dependent and not context.one_batch_per_sample
    if not together or (budget is not None and budget.victim is not None):
        mixing = None
    elif not caches and (mixing is None or not mixing.passes or surrogates.pursued is None):
        mixing = None  # without a trunk, nothing is mixed from what is cached
    if budget is not None and not surrogates.usable:
        return _query_runs(protocol, more=_passes_of(budget))
    if budget is not None:
        _check_losses(budget, num_classes)
        budget = budget if mixing is None else mixing.gathering(budget)
        runs += _apgd_runs(budget, surrogates, num_classes, apart=not context.one_batch_per_sample)
    if mixing is not None:
        runs += _joint_runs(mixing, surrogates, caches=caches, exchanges=exchanges)
    if budget is not None and budget.overtime and not together and not (context.chooses_companions and batch_dependent):
        runs += _borderline_runs(budget, surrogates, num_classes)
    if context.chooses_companions and batch_dependent:
        choice = CompositionAttack(protocol.composition.trials, protocol.composition.search == "greedy")
        runs = _composed_runs(runs, choice, surrogates, num_classes, pursued=exchanges and budget is not None)
    if randomized and protocol.apgd is not None and protocol.apgd.combine == "cascade":
        runs.append(Run(surrogates.exact, OddsAttack(protocol.apgd.steps), "margin", 0, chained=True))
    return runs + _query_runs(protocol)


def _joint_runs(
    mixing: RecombinationBudget, surrogates: UsableSurrogates, *, caches: bool, exchanges: bool
) -> list[Run]:
    """Mixtures of what was found, and a pursuit of each sample: from mixtures where they have a closed form."""
    pursued = surrogates.pursued if mixing.passes else None
    mixed = Run(None, RecombinationAttack(mixing.sweeps), "margin", 0, chained=True)
    if pursued is None:
        return [mixed]
    if exchanges:
        mixtures = PursuitAttack(mixing.sweeps, mixing.passes, mixing.classes)
        return [Run(pursued, mixtures, "margin", 0, chained=True)]
    pursuit = Run(pursued, VictimAttack(mixing.passes), "margin", 0, chained=True)
    return [mixed, pursuit] if caches else [pursuit]


def _borderline_runs(budget: ApgdBudget, surrogates: UsableSurrogates, num_classes: int) -> list[Run]:
    """The last passes, in equal parts: along the decision's own gradient, then along the FC head's, a smoother one."""
    targeted = MALT if any(run.loss == MALT for run in budget.runs) else TARGETED
    loss = targeted if num_classes >= MIN_CLASSES[targeted] else "margin"
    searched = [
        surrogates.exact,
        *(s for s in surrogates.usable if s.name == "fc-oracle" and s is not surrogates.exact),
    ]
    attack = BorderlineAttack(budget.overtime // len(searched), budget.steps)
    return [Run(surrogate, attack, loss, 0, chained=True) for surrogate in searched]


def _composed_runs(
    runs: list[Run], choice: CompositionAttack, surrogates: UsableSurrogates, num_classes: int, *, pursued: bool
) -> list[Run]:  # fmt: skip
    """Runs with the choice of companions before them, between them and after them.

    Where that is cheap, most of them give way to pursuits in which it goes along with the steps, class by class.
    """
    listed = runs[:COMPOSED_FIRST] if pursued else runs
    parts = [listed[i : i + COMPOSED_EVERY] for i in range(0, len(listed), COMPOSED_EVERY)]
    composed = (Run(None, choice, "margin", i, chained=True) for i in itertools.count())
    found = [next(composed), *(run for part in parts for run in (*part, next(composed)))]
    if pursued:
        turns = range(COMPOSED_ROUNDS * min(num_classes - 1, RANKS))
        found += [Run(surrogates.exact, CompanionPursuit(turn), "margin", turn, chained=True) for turn in turns]
    return found


def continuing_run(protocol: Protocol, surrogates: UsableSurrogates, runs: Sequence[Run]) -> Run:
    """The run that starts at the points of another evaluation, after all others: APGD, or a look at these points."""
    budget = protocol.apgd
    if budget is None or not surrogates.usable:
        restart = 1 + _latest(runs, "target", SquareAttack.label)
        return Run(None, SquareAttack(1, 0.8), "margin", restart, chained=True, continues=True)
    surrogate = surrogates.exact
    restart = 1 + _latest(runs, surrogate.name, ApgdAttack.label)
    return Run(surrogate, ApgdAttack("margin", budget.steps), "margin", restart, chained=True, continues=True)


def _latest(runs: Sequence[Run], surrogate: str, attack: str) -> int:
    """The last restart of a surrogate and attack with the margin loss, -1 for none."""
    same = [run for run in runs if (run.surrogate_name, run.attack_name, run.loss) == (surrogate, attack, "margin")]
    return max((run.restart for run in same), default=-1)


def _check_losses(budget: ApgdBudget, num_classes: int) -> None:
    for loss in () if budget.runs else budget.losses:
        if num_classes < MIN_CLASSES[loss]:
            raise ValueError(
                f"the {loss} loss needs at least {MIN_CLASSES[loss]} classes, but the model has {num_classes}; "
                f'use overrides={{"attack.apgd.losses": ["ce", "margin"]}}'
            )


def _apgd_runs(budget: ApgdBudget, surrogates: UsableSurrogates, num_classes: int, *, apart: bool) -> list[Run]:
    """The white-box runs; ``apart`` where images of one batch may be moved apart from each other."""
    has: dict[str, Surrogate | Ensemble] = {surrogate.name: surrogate for surrogate in surrogates.of(budget)}
    if surrogates.together is not None:
        has = {surrogates.together.name: surrogates.together}
    chained = budget.combine == "cascade"
    targeted = MALT if any(run.loss == MALT for run in budget.runs) else TARGETED
    runs: list[Run] = []
    seen: dict[tuple[str, str, str], int] = {}
    taking_turns = budget.runs and surrogates.turns and set(surrogates.turns) <= set(has)
    turns = itertools.cycle(surrogates.turns) if taking_turns else itertools.repeat("")
    for wanted in _wanted(budget, list(has), num_classes, own=surrogates.own):
        name = next(turns) or wanted.surrogate
        name = name if name in has else next(iter(has))
        moves = wanted.moves if apart and surrogates.among else "batch"
        if moves == "companions" and name not in surrogates.among:
            name = surrogates.among[0]
        loss = wanted.loss
        if budget.runs:
            loss = targeted if wanted.moves == "companions" != moves else loss
            loss = loss if num_classes >= MIN_CLASSES[loss] else "margin"
        again = seen.get((name, loss, moves), 0)
        seen[name, loss, moves] = again + 1
        attack = ApgdAttack(
            loss,
            budget.steps,
            target=again % (num_classes - 1),
            from_start=chained and bool(runs) and again == 0,
        )
        runs.append(Run(has[name], attack, loss, again, chained, moves, budget.passes))
    return runs


def _wanted(
    budget: ApgdBudget, names: Sequence[str], num_classes: int, *, own: Sequence[str]
) -> list[RunSpec]:  # fmt: skip
    """The runs a protocol lists and those of the caller's own surrogates, or every surrogate with every loss."""
    if budget.runs:
        more = [name for name in own if name not in budget.names]
        return [*budget.runs, *(RunSpec(name, loss) for name in more for loss in ("margin", "dlr"))]
    return [
        RunSpec(name, loss, moves)
        for moves in budget.moves
        for name in names
        for loss in budget.losses
        for _ in range(min(budget.targets, num_classes - 1) if loss in (TARGETED, MALT) else budget.restarts)
    ]


def _passes_of(budget: ApgdBudget) -> int:
    """Forward passes per sample that a budget's runs would take."""
    runs = len(budget.runs) or len(budget.names) * len(budget.losses) * budget.restarts
    return min(budget.passes or runs * budget.steps, runs * budget.steps) + budget.overtime


def _query_runs(protocol: Protocol, *, more: int = 0) -> list[Run]:
    """The gradient-free runs; ``more`` queries a sample where no gradient could be followed, shared by both attacks."""
    chained = protocol.apgd is not None and protocol.apgd.combine == "cascade"
    runs = []
    square_budget, spsa_budget = protocol.square, protocol.spsa
    if more:
        square_budget, spsa_budget = square_budget or SquareBudget(queries=1), spsa_budget or SpsaBudget(queries=3)
        square_budget = replace(square_budget, queries=square_budget.queries + more // 2)
        spsa_budget = replace(spsa_budget, queries=spsa_budget.queries + more // 2)
    if square_budget is not None:
        attack = SquareAttack(square_budget.queries, square_budget.p_init)
        runs += [Run(None, attack, "margin", i, chained) for i in range(square_budget.restarts)]
    if spsa_budget is not None:
        estimate = SpsaAttack(spsa_budget.queries, spsa_budget.samples)
        runs += [Run(None, estimate, "margin", i, chained) for i in range(spsa_budget.restarts)]
    return runs
