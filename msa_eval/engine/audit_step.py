"""The audit's measurements as a step of an evaluation."""

from __future__ import annotations

import itertools

from msa_eval.auditing.audit import Sign, probe
from msa_eval.defense.micro_batches import fitting
from msa_eval.engine.state import Work
from msa_eval.engine.target_plan import Entrant
from msa_eval.errors import AttackError


def probe_target(entrant: Entrant, work: Work) -> list[Sign]:
    """Measure the signs of the audit on a few clean batches; none where it fails, which is noted."""
    name = f"{entrant.name}-audit"
    held: tuple[Sign, ...] | None = work.units.read(name, tuple)
    if held is not None:
        return list(held)
    clean = entrant.clean
    sizes = itertools.accumulate(len(seat) for seat in clean.seats)
    count = max(1, sum(size <= entrant.protocol.audited for size in sizes))
    batches = list(itertools.islice(clean, count))

    def measure() -> list[Sign]:
        return probe(
            entrant.defense, entrant.offers.usable, batches, entrant.protocol.ball,
            batch_dependent=clean.batch_dependent, num_classes=clean.num_classes, seed=entrant.seed,
            followed=entrant.protocol.follows_gradients, progress=work.progress,
        )  # fmt: skip

    try:
        found = fitting(entrant.defense, max(len(batch.x) for batch in batches), measure)
    except (AttackError, MemoryError) as error:
        work.fail(entrant.name, "the audit", error)
        return []
    if entrant.finding is not None:
        found.append(entrant.finding.sign())
    work.units.write(name, tuple(found))
    return found
