"""The audit: short measurements of a target that show whether a robustness figure can be believed.

They use the engine's own batches, trials and surrogates. What is measured stands in `msa_eval.auditing.probes`, what
it means in `msa_eval.auditing.rules`.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from msa_eval.attacks.ball import Ball
from msa_eval.attacks.batch import Batch
from msa_eval.auditing.evidence_signs import signs_from
from msa_eval.auditing.probes import Probes
from msa_eval.auditing.sign import Sign, Verdict, verdict_of
from msa_eval.auditing.state_guard import StateGuard
from msa_eval.auditing.surrogate_search import SurrogateSearch
from msa_eval.auditing.weighing import weighed, without_advice
from msa_eval.data import Samples
from msa_eval.defense.contract import Defense, own_surrogates
from msa_eval.defense.micro_batches import in_smaller_parts
from msa_eval.defense.weight_gradients import without_weight_gradients
from msa_eval.device import device_for
from msa_eval.errors import AttackError
from msa_eval.judging.batch_plan import plan_batches, select
from msa_eval.judging.clean_batches import CleanBatches
from msa_eval.judging.usable_surrogates import Find, answer_with_gradient, select_surrogates
from msa_eval.numerics import full_precision
from msa_eval.progress import Progress, silent, warn
from msa_eval.protocols.loading import load_protocol
from msa_eval.protocols.schema import ApgdBudget, Protocol
from msa_eval.randomness import seeded
from msa_eval.surrogates.registry import Surrogate, SurrogateLike, get
from msa_eval.targets.loading import resolve
from msa_eval.targets.pair import answers, make_targets, remarks

__all__ = ["AuditReport", "Sign", "StateGuard", "Verdict", "audit", "probe", "signs_from", "verdict_of"]


@dataclass(frozen=True)
class AuditReport:
    """What an audit found.

    Attributes:
        target: ``defense`` or ``fc``.
        signs: all of them, fired or not.
        n: samples looked at.
        seconds: wall time.
        fc: the same of the plain classifier, where it was asked for.
    """

    target: str
    signs: tuple[Sign, ...]
    n: int
    seconds: float
    fc: AuditReport | None = None

    @property
    def verdict(self) -> Verdict:
        """What the signs add up to."""
        return verdict_of(self.signs)

    def to_frame(self) -> pd.DataFrame:
        """One row per sign: target, sign, fired, severity, value, threshold, reason."""
        rows = [{"target": self.target, **asdict(sign)} for sign in self.signs]
        own = pd.DataFrame(rows).rename(columns={"name": "sign"})
        return own if self.fc is None else pd.concat([own, self.fc.to_frame()], ignore_index=True)


@full_precision()
def audit(
    target: object,
    x: Samples | Tensor | Any,
    y: Tensor | Any = None,
    *,
    protocol: str | Path | Protocol = "msa",
    fc: object = None,
    surrogates: Mapping[str, SurrogateLike] | None = None,
    found_surrogates: bool = True,
    seed: int = 0,
    device: str = "auto",
    overrides: Mapping[str, Any] | None = None,
    limit: int = 128,
    progress: Progress = silent,
) -> AuditReport:
    """Look for signs that a robustness figure of a defence should not be believed.

    Args:
        target: an object with ``features(x)`` and ``logits(z)``, or a module from images to logits; in evaluation mode.
        x: `Samples`, or images ``(N, C, H, W)``: float in [0, 1], or uint8.
        y: labels ``(N,)`` from 0, unless ``x`` is `Samples`.
        protocol: the one whose figures are in question; its ball, batches and surrogates are used.
        fc: a plain classifier to audit beside the defence.
        surrogates: more surrogates for the defence by name, as for `msa_eval.evaluate`.
        found_surrogates: whether to look for more in the target's own code, as `msa_eval.evaluate` does.
        seed: of everything drawn.
        device: where to compute; modules are moved there. ``auto`` is CUDA, else MPS, else the CPU.
        overrides: values to put in place of the protocol's, by dotted key.
        limit: look at the first whole batches of the plan with at most so many samples, and at one batch at least.
        progress: shows how far it has come.

    Raises:
        ValueError: when target, data and protocol don't fit together.
        AttackError: when the defence fails on an adversarial batch.
    """
    started = time.perf_counter()
    if limit < 1:
        raise ValueError(f"expected limit >= 1, but got {limit}")
    if not isinstance(protocol, Protocol):
        protocol = load_protocol(protocol, overrides=overrides)
    elif overrides:
        raise ValueError("give overrides with a protocol's name or file, not with a Protocol")
    samples, device = Samples.of(x, y), device_for(device, warn)
    protocol.ball.check_radius(math.prod(samples.shape))
    target, _ = resolve(target, samples)
    targets = make_targets(target, False if fc is None else fc, samples, device)
    for remark in remarks(targets):
        warnings.warn(remark, stacklevel=3)
    defense, beside = targets["defense"], targets.get("fc")
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast(torch.device(device).type, enabled=False),
        without_weight_gradients(*targets.values()),
    ):
        plain = None
        if beside is not None:
            plain = _audit(
                "fc", beside, samples, protocol, {}, seed, device, limit, started, None, progress, find=found_surrogates
            )
            started = time.perf_counter()
        own = {**own_surrogates(defense), **(surrogates or {})}
        return _audit(
            "defense",
            defense,
            samples,
            protocol,
            own,
            seed,
            device,
            limit,
            started,
            plain,
            progress,
            find=found_surrogates,
        )


def _audit(
    name: str,
    defense: Defense,
    samples: Samples,
    protocol: Protocol,
    own: Mapping[str, SurrogateLike],
    seed: int,
    device: str,
    limit: int,
    started: float,
    fc: AuditReport | None,
    progress: Progress,
    *,
    find: bool,
) -> AuditReport:
    chosen = select(samples.y, protocol)
    batch_plan = plan_batches(len(chosen), size=protocol.batch_size, seed=protocol.batches_seed)
    ends = np.cumsum([len(indices) for indices in batch_plan])
    batch_plan = batch_plan[: max(int((ends <= limit).sum()), 1)]
    audited = chosen[torch.cat(batch_plan)]
    samples = samples.decoded(audited, progress=progress).leveled(protocol.ball.levels, audited)
    clean = CleanBatches(
        defense,
        samples,
        chosen,
        batch_plan,
        device=device,
        stochastic=protocol.stochastic,
        ball=protocol.ball,
        progress=progress,
    )
    batches = list(clean)
    if note := answers(defense):
        warnings.warn(f"of the {name}: {note}", stacklevel=5)
    guard = StateGuard(defense, batch=batches[0], seed=seed)
    with seeded(seed):
        search = SurrogateSearch(
            clean, protocol.ball, seed=seed, search=find and protocol.follows_gradients, progress=progress
        )  # fmt: skip
        usable = _usable(protocol.apgd or ApgdBudget(), defense, batches[0], own, search.more)
    for attempt in in_smaller_parts(defense, max(len(batch.x) for batch in batches)):
        with attempt:
            found = probe(
                defense, usable, batches, protocol.ball,
                batch_dependent=clean.batch_dependent, num_classes=clean.num_classes, seed=seed,
                followed=protocol.follows_gradients, progress=progress,
            )  # fmt: skip
    if search.finding is not None and protocol.follows_gradients:
        found.append(search.finding.sign())
    found = weighed(without_advice([*found, guard.sign()]))
    seconds = round(time.perf_counter() - started, 3)
    return AuditReport(name, tuple(found), sum(len(batch.y) for batch in batches), seconds, fc)


def _usable(
    budget: ApgdBudget, defense: Defense, batch: Batch, own: Mapping[str, SurrogateLike], find: Find
) -> Sequence[Surrogate]:  # fmt: skip
    """The surrogates that a defence offers; none where no gradient reaches the images, which is a sign of its own."""
    try:
        for attempt in in_smaller_parts(defense, len(batch.x)):
            with attempt:
                found = select_surrogates(budget, defense, batch, own=own, find=find)
        return found.usable
    except (ValueError, RuntimeError) as error:
        named = [get(name, own) for name in (*budget.names, *own)]
        usable = [s for s in named if s.applies(defense) and answer_with_gradient(s, defense, batch) is not None]
        if own or (usable and isinstance(error, ValueError)):
            raise
        return usable


def probe(
    defense: Defense,
    surrogates: Sequence[Surrogate],
    clean_batches: Sequence[Batch],
    ball: Ball,
    *,
    batch_dependent: bool,
    num_classes: int,
    seed: int,
    followed: bool = True,
    progress: Progress = silent,
) -> list[Sign]:
    """Measure all signs on some clean batches; weight gradients are expected to be off.

    The sum of a batch's losses is followed, as the attacks do, so a gradient that reaches an image from its companions
    alone counts as one.

    Args:
        defense: the target.
        surrogates: those it offers; none at all is a sign.
        clean_batches: at least one, of at least one image.
        ball: the protocol's.
        batch_dependent: whether the engine takes the target for batch-dependent.
        num_classes: k.
        seed: of everything drawn; the global generators are left as they were.
        followed: whether the protocol has attacks that follow gradients.
        progress: shows how far it has come.

    Raises:
        AttackError: when the defence or a surrogate fails on a batch.
    """
    try:
        with seeded(seed):
            probes = Probes(defense, clean_batches, ball, batch_dependent, num_classes, seed)
            return probes.measure(surrogates, progress, followed=followed)
    except (RuntimeError, IndexError) as error:
        raise AttackError(f"the audit could not be finished: {error}") from error
