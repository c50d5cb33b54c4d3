"""A target under a protocol: its runs, and the contexts in which they are made."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from msa_eval.auditing.finding import Finding
from msa_eval.auditing.surrogate_search import SurrogateSearch
from msa_eval.defense.contexts import CONTEXTS
from msa_eval.defense.contract import Defense, WholeModel
from msa_eval.defense.micro_batches import in_smaller_parts
from msa_eval.defense.precision import EXACT, SearchPrecision
from msa_eval.engine.continued import Continued
from msa_eval.engine.external_runs import external_runs
from msa_eval.engine.schedule import Run, continuing_run, plan_runs
from msa_eval.judging.clean_batches import CleanBatches
from msa_eval.judging.replay import Replay
from msa_eval.judging.usable_surrogates import UsableSurrogates, select_surrogates
from msa_eval.progress import Progress, silent
from msa_eval.protocols.schema import Protocol
from msa_eval.randomness import seeded
from msa_eval.surrogates.registry import SurrogateLike


@dataclass(frozen=True)
class TargetPlan:
    """A target ready for its runs."""

    name: str
    defense: Defense
    clean: CleanBatches
    runs: Mapping[str, Sequence[Run]]
    surrogates: UsableSurrogates
    protocol: Protocol
    seed: int
    search: SearchPrecision = EXACT
    finding: Finding | None = None
    starts: Mapping[str, Tensor] = field(default_factory=dict)
    ratio: float = 1.0

    @classmethod
    def enter(
        cls,
        name: str,
        defense: Defense,
        clean: CleanBatches,
        *,
        protocol: Protocol,
        own: Mapping[str, SurrogateLike],
        seed: int,
        find: bool = True,
        continued: Continued | None = None,
        progress: Progress = silent,
    ) -> TargetPlan:
        """Plan the runs of a target; the caller's own surrogates are the defence's.

        Args:
            name: ``defense`` or ``fc``.
            defense: the target.
            clean: its clean batches.
            protocol: what is to be run.
            own: the caller's own surrogates.
            seed: of everything drawn.
            find: whether to look for surrogates where the target's own gradients are not true.
            continued: points of another evaluation to go on from.
            progress: shows how far it has come.
        """
        surrogates, finding = UsableSurrogates((), (), ""), None
        if protocol.apgd is not None:
            together = any(not CONTEXTS[context].one_batch_per_sample for context in protocol.contexts)
            search = SurrogateSearch(
                clean, protocol.ball, seed=seed, search=find, together=together, progress=progress
            )  # fmt: skip
            batch = next(iter(clean))
            with seeded(seed):
                for attempt in in_smaller_parts(defense, len(batch.x)):
                    with attempt:
                        surrogates = select_surrogates(
                            protocol.apgd, defense, batch, own=own, use_own=name == "defense",
                            batch_dependent=clean.batch_dependent, recombination=protocol.recombination,
                            find=search.more,
                        )  # fmt: skip
            finding = search.finding
        companions = clean.batch_dependent and max(map(len, clean.batch_plan)) > 1
        runs = {
            context: plan_runs(
                protocol, surrogates, num_classes=clean.num_classes, context=CONTEXTS[context],
                batch_dependent=companions, caches=not isinstance(defense, WholeModel),
                exchanges=hasattr(defense, "logits_with"), randomized=clean.draws > 1,
            )
            for context in protocol.contexts
        }  # fmt: skip
        if protocol.peers:
            # After all others, so that they change nothing in our own runs.
            with seeded(seed):
                more = external_runs(
                    protocol.peers, protocol.ball, defense, next(iter(clean)), num_classes=clean.num_classes,
                    own=own, use_own=name == "defense",
                )  # fmt: skip
            runs = {context: [*made, *more] for context, made in runs.items()}
        apart = any(CONTEXTS[context].one_batch_per_sample for context in protocol.contexts)
        if isinstance(defense, WholeModel) and clean.batch_dependent and apart:
            warnings.warn(
                f"the {name} has no trunk, so solo, alone and composed query it once per sample: every pass costs "
                f"as many passes of a batch as the batch has images (up to {protocol.batch_size})",
                stacklevel=2,
            )
        starts = {} if continued is None else continued.of(name)
        runs = {
            context: [*made, continuing_run(protocol, surrogates, made)] if context in starts else made
            for context, made in runs.items()
        }
        ratio = 1.0 if continued is None else continued.ratio
        return cls(name, defense, clean, runs, surrogates, protocol, seed, finding=finding, starts=starts, ratio=ratio)

    @functools.cached_property
    def replay(self) -> Replay:
        """The target as it answers for proofs."""
        clean = self.clean
        batches = [clean.chosen[indices] for indices in clean.batch_plan]
        return Replay(
            self.defense, clean.samples, batches, device=clean.device, draws=clean.draws,
            batch_dependent=clean.batch_dependent,
        )  # fmt: skip

    @property
    def searched(self) -> Sequence[str]:
        """The contexts in which runs are made; in the others a target that ignores its companions answers the same."""
        return self.protocol.contexts if self.clean.batch_dependent else self.protocol.contexts[:1]
