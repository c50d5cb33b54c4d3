"""The audit's measurements as a step of an evaluation."""

from __future__ import annotations

import itertools

from msa_eval.auditing.audit import Sign, probe
from msa_eval.defense.micro_batches import in_smaller_parts
from msa_eval.engine.state import EvaluationState
from msa_eval.engine.target_plan import TargetPlan
from msa_eval.errors import AttackError


def probe_target(plan: TargetPlan, evaluation: EvaluationState) -> list[Sign]:
    """Measure the signs of the audit on a few clean batches; none where it fails, which is noted."""
    name = f"{plan.name}-audit"
    held: tuple[Sign, ...] | None = evaluation.store.read(name, tuple)
    if held is not None:
        return list(held)
    clean = plan.clean
    sizes = itertools.accumulate(len(indices) for indices in clean.batch_plan)
    count = max(1, sum(size <= plan.protocol.audited for size in sizes))
    batches = list(itertools.islice(clean, count))

    try:
        for attempt in in_smaller_parts(plan.defense, max(len(batch.x) for batch in batches)):
            with attempt:
                found = probe(
                    plan.defense, plan.surrogates.usable, batches, plan.protocol.ball,
                    batch_dependent=clean.batch_dependent, num_classes=clean.num_classes, seed=plan.seed,
                    followed=plan.protocol.follows_gradients, progress=evaluation.progress,
                )  # fmt: skip
    except (AttackError, MemoryError) as error:
        evaluation.fail(plan.name, "the audit", error)
        return []
    if plan.finding is not None:
        found.append(plan.finding.sign())
    evaluation.store.write(name, tuple(found))
    return found
