"""A target in one context: its runs on a batch, each going on from what the earlier ones found."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from msa_eval.attacks.attacked_batch import AttackedBatch
from msa_eval.attacks.ball import per_image
from msa_eval.attacks.batch import Batch, CompanionPool
from msa_eval.attacks.gradient import ApgdAttack
from msa_eval.attacks.pursuit import PursuitAttack, RecombinationAttack
from msa_eval.auditing.sign import NO_ANSWER, change
from msa_eval.auditing.state_guard import StateGuard
from msa_eval.defense.contexts import CONTEXTS
from msa_eval.defense.contract import WholeModel, decide
from msa_eval.defense.micro_batches import in_smaller_parts, unwrap
from msa_eval.defense.precision import EXACT
from msa_eval.engine.messages import BatchJob, BatchResult, Failure, Made
from msa_eval.engine.schedule import OWN, Run
from msa_eval.engine.target_plan import TargetPlan
from msa_eval.errors import AttackError
from msa_eval.evidence.proof import Proof
from msa_eval.judging.batch_history import BatchHistory
from msa_eval.judging.clean_batches import CleanBatches, Pool
from msa_eval.judging.judged_batch import JudgedBatch
from msa_eval.judging.outcomes import RunResult
from msa_eval.randomness import seeded


@dataclass(frozen=True)
class BatchRunner:
    """A target in one context. It only makes runs: any process that is given it makes the same of a batch.

    Attributes:
        plan: the target.
        context: what the attacker controls.
        clean: the batches, with the target's verdicts in that context.
        pool: clean images to choose companions from, where the attacker chooses.
    """

    plan: TargetPlan
    context: str
    clean: CleanBatches
    pool: Pool | None

    @property
    def runs(self) -> Sequence[Run]:
        """The runs, in the order they are made."""
        return self.plan.runs[self.context]

    @property
    def title(self) -> str:
        """The target and the context."""
        return f"{self.plan.name} {self.context}"

    def search(self, job: BatchJob, guard: StateGuard | None = None) -> Iterator[Made]:
        """Make every run on a batch that is not made yet; a run may go on from what earlier ones found.

        A run that fails leaves nothing to the later ones.

        Args:
            job: the batch, and what is made of it already.
            guard: over the target, where it is to be noted what changed in it.
        """
        batch = self.clean.batch(job.number)
        history = BatchHistory(batch, None if self.pool is None else self.clean.own_companions_of(batch, self.pool))
        results = []
        for run in self.runs:
            made, started = job.held.get(run.name), time.perf_counter()
            if made is None:
                try:
                    if job.lost is not None:
                        raise AttackError(job.lost)
                    for attempt in in_smaller_parts(self.plan.defense, len(batch.x)):
                        with attempt:
                            made = self._make(run, batch, history, job)
                    assert made is not None
                except Exception as error:
                    yield Failure.of(self.plan.name, run.name, error, context=self.context, batch=batch.number)
                    results.append(RunResult.failed(run.name, batch, time.perf_counter() - started))
                    continue
                made = dataclasses.replace(made, seconds=time.perf_counter() - started)
                yield made
            history.add(made)
            results.append(made.without_images())
        proofs = self._proofs(batch, history) if job.keep else []
        yield BatchResult(
            tuple(results),
            history.committed,
            int((history.taken_back & ~history.broken).sum()),
            tuple(proofs),
            () if guard is None else guard.so_far(),
            self._drift(batch, history),
            tuple(history.others(proofs, **self._of(batch))) if job.every else (),
            history.best.x.cpu() if job.best else None,
        )

    def _drift(self, batch: Batch, history: BatchHistory) -> float:
        """How much the answers to the points found change in another order and in halves, if they should not at all."""
        if self.clean.batch_dependent or self.clean.draws > 1 or len(batch.y) < 2:
            return 0.0
        defense, x = self.plan.defense, history.best.x
        try:
            with seeded(0), torch.no_grad():
                together = decide(defense, defense.features(x))
                parts = [decide(defense, defense.features(part)) for part in x.flip(0).tensor_split(2)]
        except (RuntimeError, ValueError, IndexError):
            return NO_ANSWER.drift
        return change(together, torch.cat(parts).flip(0)).drift

    def _proofs(self, batch: Batch, history: BatchHistory) -> list[Proof]:
        return history.proofs(**self._of(batch))

    def _of(self, batch: Batch) -> dict[str, Any]:
        """What a proof says of its batch, and whom companions are chosen from."""
        own = self.clean.chosen[self.clean.batch_plan[batch.number]]
        pool = own if self.pool is None else torch.cat([own, self.pool.indices])
        return {
            "target": self.plan.name, "context": self.context, "number": batch.number,
            "rows_interact": self.clean.batch_dependent, "pool": pool,
        }  # fmt: skip

    def _make(self, run: Run, batch: Batch, history: BatchHistory, job: BatchJob) -> RunResult:
        """Make one run on one batch."""
        clean, context = self.clean, self.context
        together = not CONTEXTS[context].one_batch_per_sample
        target = clean.view(context, batch, history.companions)
        setting = run.setting(target, history, victim=self._victim(batch))
        shared = together and clean.batch_dependent
        keep, near = (job.keep or clean.draws > 1) and shared, job.every and shared
        names = {one.attack.name for one in self.runs} if together else set()
        mixed = bool(names & {PursuitAttack.label, RecombinationAttack.label})
        trail = PursuitAttack.label in names and not run.attack.from_history
        # External attacks are shown the target's own features; without a trunk a search has no others. Mixtures are
        # decided by the features of their points, and rounded ones decide other mixtures.
        whole = isinstance(unwrap(self.plan.defense), WholeModel)
        search = EXACT if run.loss == OWN or whole or mixed else self.plan.search
        setting = dataclasses.replace(
            setting, draws=clean.draws, eot=clean.eot, keep=keep, nearest=near, trail=trail, search=search,
            found=history.points, pool=self._companion_pool(batch, history),
        )  # fmt: skip
        judged = JudgedBatch(
            target, run.surrogate, batch, self.plan.protocol.ball, mixes_rows=clean.batch_dependent, setting=setting
        )
        generator = run.generator(self.plan.seed, self.plan.name, context, batch.number)
        attack = self._continuing(run, batch) if run.continues else run.attack
        # A stochastic target draws from the global generators: seeded here, so that the evidence can be made again.
        with seeded(generator.initial_seed()):
            points = attack(judged, generator) if bool(judged.counted.any()) else judged.start.x
            made = dataclasses.replace(judged.finish(points), run=run.name)
            return self._upheld(made, batch, history) if clean.draws > 1 else made

    def _continuing(self, run: Run, batch: Batch) -> Callable[[AttackedBatch, torch.Generator], Tensor]:
        """The search from points of another evaluation, each as much further away as the radius has grown."""
        points = self.plan.starts[self.context][self.clean.batch_plan[batch.number]].to(batch.x)
        ball = self.plan.protocol.ball
        points = ball.project(batch.x + self.plan.ratio * (points - batch.x), batch.x)
        if isinstance(run.attack, ApgdAttack):
            return functools.partial(run.attack, points=points)
        return lambda attacked, _: torch.where(per_image(attacked.counted, points), points, attacked.start.x)

    def _upheld(self, made: RunResult, batch: Batch, history: BatchHistory) -> RunResult:
        """Judge once more, on the batches that will prove it, what a run on a stochastic target was the first to break.

        What does not hold is taken back: the sample counts as unbroken in this run and stands for the next, which may
        find a better batch. No second batch of the same run is tried, for each is one more chance to pass by luck. A
        sample that a proof has broken needs no other, so what later runs say of it stays as it is.
        """
        run = BatchHistory(batch, history.companions)
        run.add(dataclasses.replace(made, any_broken=made.any_broken & ~history.broken))
        taken, upheld = torch.zeros_like(history.taken_back), []
        for proof in self._proofs(batch, run):
            holds = self.plan.replay.clearly_breaks(proof).cpu()
            taken[proof.positions[~holds].to(taken.device)] = True
            if bool(holds.any()):
                upheld.append(proof.only(holds))
        return dataclasses.replace(made.taking_back(taken, batch.correct), upheld=tuple(upheld))

    def _victim(self, batch: Batch) -> Tensor | None:
        """The one sample ``(B,)`` whose companions are moved, where the protocol names one."""
        budget = self.plan.protocol.apgd
        if budget is None or budget.victim is None:
            return None
        return (self.clean.chosen[self.clean.batch_plan[batch.number]] == budget.victim).to(batch.y.device)

    def _companion_pool(self, batch: Batch, history: BatchHistory) -> CompanionPool | None:
        """What companions are chosen from, where that is the attacker's choice."""
        if self.pool is None or history.companions is None:
            return None
        own = self.clean.chosen[self.clean.batch_plan[batch.number]].to(batch.y.device)
        identity = torch.cat([own, self.pool.indices.to(own.device)])
        classes = torch.cat([batch.logits.argmax(dim=1), self.pool.classes])
        return CompanionPool(history.companions, identity, classes, own)
