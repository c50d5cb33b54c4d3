"""A target under a protocol: its runs, made on every batch in every context."""

from __future__ import annotations

import dataclasses
import functools
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from msa_eval.protocols.archive import Proof
from msa_eval.protocols.clean import CleanBatches, Pool, seeded
from msa_eval.protocols.composition import CompositionAttack
from msa_eval.protocols.evidence import RunRecord, TargetRecord
from msa_eval.protocols.gallery import POOL, Candidate, Exhibit, exhibit
from msa_eval.protocols.history import History
from msa_eval.protocols.offers import Offers, offer
from msa_eval.protocols.peering import peer_runs
from msa_eval.protocols.pursuit import PursuitAttack
from msa_eval.protocols.replay import Replay
from msa_eval.protocols.runs import OWN, Attack, Run, plan_runs
from msa_eval.protocols.spec import Protocol
from msa_eval.protocols.trial import AttackError, Batch, Outcome, Trace, Trial
from msa_eval.surrogates.registry import Own
from torch import Tensor

from msa_eval.attacks.losses import margin
from msa_eval.defense import Defense, WholeModel
from msa_eval.peers import told
from msa_eval.progress import Progress, ticking


class Evaluated(NamedTuple):
    """A target in one context, all runs made.

    Attributes:
        record: what the tables are made of.
        proofs: an adversarial batch for every broken sample, where these are kept; of a target that ignores companions,
            in its first context only.
        exhibits: a few broken samples to be looked at, where these are asked for.
    """

    record: TargetRecord
    proofs: list[Proof]
    exhibits: list[Exhibit]


@dataclass(frozen=True)
class Entrant:
    """A target ready for its runs."""

    name: str
    defense: Defense
    clean: CleanBatches
    runs: Mapping[str, Sequence[Run]]
    offers: Offers
    protocol: Protocol
    seed: int

    @classmethod
    def enter(
        cls,
        name: str,
        defense: Defense,
        clean: CleanBatches,
        *,
        protocol: Protocol,
        own: Mapping[str, Own],
        seed: int,
    ) -> Entrant:
        """Plan the runs of a target; the caller's own surrogates are the defence's."""
        offers = Offers((), (), "")
        if protocol.apgd is not None:
            with seeded(seed):
                offers = offer(
                    protocol.apgd, defense, next(iter(clean)), own=own, use_own=name == "defense",
                    batch_dependent=clean.batch_dependent, recombination=protocol.recombination,
                )  # fmt: skip
        companions = clean.batch_dependent and max(map(len, clean.seats)) > 1
        runs = {
            context: plan_runs(
                protocol, offers, num_classes=clean.num_classes, context=context,
                batch_dependent=companions, caches=not isinstance(defense, WholeModel),
                exchanges=hasattr(defense, "logits_with"),
            )
            for context in protocol.contexts
        }  # fmt: skip
        if protocol.peers:
            # After all others, so that they change nothing in our own runs.
            with seeded(seed):
                more = peer_runs(
                    protocol.peers, protocol.ball, defense, next(iter(clean)), num_classes=clean.num_classes,
                    own=own if name == "defense" else {},
                )  # fmt: skip
            runs = {context: [*made, *more] for context, made in runs.items()}
        if isinstance(defense, WholeModel) and clean.batch_dependent and set(protocol.contexts) - {"joint"}:
            warnings.warn(
                f"the {name} has no trunk, so solo, alone and composed ask it once a sample: every pass costs as many "
                f"passes of a batch as the batch has images (up to {protocol.batch_size})",
                stacklevel=2,
            )
        return cls(name, defense, clean, runs, offers, protocol, seed)

    @functools.cached_property
    def replay(self) -> Replay:
        """The target as it answers for proofs."""
        clean = self.clean
        batches = [clean.chosen[seat] for seat in clean.seats]
        return Replay(self.defense, clean.samples, batches, device=clean.device, draws=clean.draws)

    def evaluate(self, progress: Progress, *, keep: bool = False, show: bool = False) -> Iterator[Evaluated]:
        """Make every run in every context; a target that ignores its companions answers the same in all.

        Args:
            progress: shows how far each context has come.
            keep: whether to keep an adversarial batch for every broken sample.
            show: whether to make exhibits, in the first context.
        """
        first, *others = self.protocol.contexts
        done = self._evaluate(first, progress, keep=keep, show=show)
        yield done
        for context in others:
            if self.clean.batch_dependent:
                yield self._evaluate(context, progress, keep=keep)
            else:
                yield Evaluated(dataclasses.replace(done.record, context=context), [], [])

    def _evaluate(self, context: str, progress: Progress, *, keep: bool, show: bool = False) -> Evaluated:
        """Make every run on every batch, batch after batch: a run may go on from what earlier ones found."""
        clean = self.clean.seen_in(context)
        seats, chosen, samples = clean.seats, clean.chosen, clean.samples
        runs = self.runs[context]
        pool = clean.pool(self.protocol.composition) if context == "composed" and clean.batch_dependent else None
        committed, taken_back = [], 0
        proofs: list[Proof] = []
        candidates: list[Candidate] = []
        outcomes: dict[str, list[Outcome]] = {run.name: [] for run in runs}
        seconds = dict.fromkeys(outcomes, 0.0)
        with ticking(progress, len(clean) * len(runs), f"{self.name} {context}") as tick:
            for batch in clean:
                history = History(batch, None if pool is None else clean.own_company(batch, pool))
                looking = show and len(candidates) < POOL
                for run in runs:
                    tick()
                    started = time.perf_counter()
                    outcomes[run.name].append(self._attempt(run, batch, context, history, pool, keep=keep or looking))
                    seconds[run.name] += time.perf_counter() - started
                committed.append(history.committed)
                taken_back += int((history.taken_back & ~history.broken).sum())
                found = self._proofs(context, batch, history, pool) if keep or looking else []
                proofs += found if keep else []
                if looking:
                    candidates += _candidates(found, batch, {name: made[-1] for name, made in outcomes.items()})

        def placed(values: Sequence[Tensor]) -> Any:
            return _place(values, seats)

        record = TargetRecord(
            target=self.name,
            context=context,
            index=chosen.numpy(),
            label=samples.y[chosen].numpy(),
            batch=placed([torch.full((len(seat),), number) for number, seat in enumerate(seats)]),
            position=placed([torch.arange(len(seat)) for seat in seats]),
            clean_prediction=placed([batch.logits.argmax(dim=1) for batch in clean]),
            clean_margin=placed([-margin(batch.logits, batch.y) for batch in clean]),
            committed=placed(committed),
            taken_back=taken_back,
            runs=[_record(run, outcomes[run.name], seats, seconds[run.name]) for run in runs],
        )
        return Evaluated(record, proofs, self._exhibits(candidates))

    def _exhibits(self, candidates: Sequence[Candidate]) -> list[Exhibit]:
        """Pictures of some of the candidates; where they can't be made, the evaluation is worth no less."""
        try:
            return exhibit(candidates, self.replay) if candidates else []
        except Exception as error:
            warnings.warn(f"no gallery could be made of what was broken: {error}", stacklevel=2)
            return []

    def _proofs(self, context: str, batch: Batch, history: History, pool: Pool | None) -> list[Proof]:
        own = self.clean.chosen[self.clean.seats[batch.number]]
        return history.proofs(
            self.name, context, batch.number, rows_interact=self.clean.batch_dependent,
            pool=own if pool is None else torch.cat([own, pool.indices]),
        )  # fmt: skip

    def _attempt(
        self, run: Run, batch: Batch, context: str, history: History, pool: Pool | None, *, keep: bool
    ) -> Outcome:
        """Make one run on one batch, and enter it in the batch's history."""
        clean = self.clean
        target = clean.view(context, batch, history.company)
        setting = run.setting(target, history, victim=self._victim(batch))
        keep = (keep or clean.draws > 1) and context == "joint" and clean.batch_dependent
        trail = context == "joint" and run.attack is not None and any(o.label == "pursuit" for o in self.runs[context])
        setting = dataclasses.replace(setting, draws=clean.draws, eot=clean.eot, keep=keep, trail=trail)
        trial = Trial(
            target, run.surrogate, batch, self.protocol.ball, mixes_rows=clean.batch_dependent, setting=setting
        )
        generator = run.generator(self.seed, self.name, context, batch.number)
        attack = run.attack or self._choice(run, batch, history, pool)
        try:
            # A stochastic target draws from the global generators: seeded here, so that the evidence can be made again.
            with seeded(generator.initial_seed()):
                points = attack(trial, generator) if bool(trial.counted.any()) else trial.start.x
                outcome = trial.finish(points)
                trace = trial.trace()
                if clean.draws > 1:
                    outcome = self._upheld(outcome, trace, context, batch, history, pool)
        except Exception as error:
            raise AttackError(f"{self.name}, run {run.name}, batch {batch.number}: {error}") from error
        history.add(outcome, trace)
        return outcome

    def _upheld(
        self, outcome: Outcome, trace: Trace, context: str, batch: Batch, history: History, pool: Pool | None
    ) -> Outcome:
        """Judge once more, on the batches that will prove it, what a run on a stochastic target was the first to break.

        What does not hold is taken back: the sample counts as unbroken in this run and stands for the next, which may
        find a better batch. No second batch of the same run is tried, for each is one more chance to pass by luck. A
        sample that a proof has broken needs no other, so what later runs say of it stays as it is.
        """
        run = History(batch, history.company)
        run.add(dataclasses.replace(outcome, any_broken=outcome.any_broken & ~history.broken), trace)
        taken = torch.zeros_like(history.taken_back)
        for proof in self._proofs(context, batch, run, pool):
            holds = self.replay.clearly_breaks(proof).cpu()
            taken[proof.positions[~holds].to(taken.device)] = True
            if bool(holds.any()):
                history.upheld.append(proof.only(holds))
        history.taken_back = history.taken_back | taken
        return outcome.taking_back(taken, batch.correct)

    def _victim(self, batch: Batch) -> Tensor | None:
        """The one sample ``(B,)`` whose companions are moved, where the protocol names one."""
        if self.protocol.apgd is None or self.protocol.apgd.victim is None:
            return None
        return (self.clean.chosen[self.clean.seats[batch.number]] == self.protocol.apgd.victim).to(batch.y.device)

    def _choice(self, run: Run, batch: Batch, history: History, pool: Pool | None) -> Attack:
        """An attack that chooses from what is cached."""
        if pool is None:
            budget = self.protocol.recombination
            assert budget is not None
            passes = budget.passes if run.surrogate is not None else 0
            return PursuitAttack(history.points, budget.sweeps, passes, budget.classes)
        assert history.company is not None
        own = self.clean.chosen[self.clean.seats[batch.number]].to(batch.y.device)
        choice = self.protocol.composition
        identity = torch.cat([own, pool.indices.to(own.device)])
        composition = CompositionAttack(history.company, identity, own, choice.trials, choice.search == "greedy")
        return functools.partial(composition.pursue, turn=run.restart) if run.label == "pursuit" else composition


def _candidates(proofs: Sequence[Proof], batch: Batch, outcomes: Mapping[str, Outcome]) -> list[Candidate]:
    """The samples of a batch that are broken, in batch order, each with the first run that broke it."""
    first: dict[int, str] = {}
    for run, outcome in reversed(list(outcomes.items())):
        first |= dict.fromkeys(outcome.any_broken.nonzero().flatten().tolist(), run)
    single = {int(at): proof.only(proof.positions == at) for proof in proofs for at in proof.positions}
    return [
        Candidate(proof, int(batch.y[at]), first[at], batch.x[at], batch.logits[at])
        for at, proof in sorted(single.items())
        if at in first
    ]


def _record(run: Run, outcomes: Sequence[Outcome], seats: Sequence[Tensor], seconds: float) -> RunRecord:
    def joined(get: Callable[[Outcome], Tensor]) -> Any:
        return _place([get(outcome) for outcome in outcomes], seats)

    return RunRecord(
        name=run.name,
        surrogate=run.surrogate_name,
        attack=run.attack_name,
        loss=run.loss,
        restart=run.restart,
        surrogate_fooled=joined(lambda outcome: outcome.surrogate_fooled),
        final_broken=joined(lambda outcome: outcome.final_broken),
        any_broken=joined(lambda outcome: outcome.any_broken),
        first_iterate=joined(lambda outcome: outcome.first_iterate),
        min_margin=joined(lambda outcome: outcome.min_margin),
        perturbation=joined(lambda outcome: outcome.perturbation),
        forwards=sum(outcome.forwards for outcome in outcomes),
        backwards=sum(outcome.backwards for outcome in outcomes),
        decisions=sum(outcome.decisions for outcome in outcomes),
        seconds=seconds,
        notes=told(fault for outcome in outcomes for fault in outcome.faults) if run.loss == OWN else None,
    )


def _place(values: Sequence[Tensor], seats: Sequence[Tensor]) -> Any:
    """Join values a batch into one array ``(N,)``, in the order of the samples."""
    joined = torch.cat([value.cpu() for value in values]).numpy()
    placed = np.empty_like(joined)
    placed[torch.cat(list(seats)).numpy()] = joined
    return placed
