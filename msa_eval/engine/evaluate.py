"""The engine: it fixes the batches, makes every run on whole batches, judges, and fills the evidence."""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from msa_eval.auditing.audit import Sign, StateGuard
from msa_eval.auditing.rules import batch_dependence_found
from msa_eval.data import Samples
from msa_eval.defense.contexts import CONTEXTS
from msa_eval.defense.contract import Defense, own_surrogates
from msa_eval.defense.precision import SearchPrecision, choose
from msa_eval.defense.weight_gradients import without_weight_gradients
from msa_eval.device import device_for
from msa_eval.engine.assembly import assembled, identity, probe_target
from msa_eval.engine.batch_runner import BatchRunner
from msa_eval.engine.collector import Collector
from msa_eval.engine.continued import Continued
from msa_eval.engine.executors import Execution, Executor, executor_of
from msa_eval.engine.inclusion import carried_proofs, carry_over, not_carried
from msa_eval.engine.messages import EvaluationState
from msa_eval.engine.output import Output, pictures, save, write_results
from msa_eval.engine.resume import ResumeStore, opened
from msa_eval.engine.target_plan import TargetPlan
from msa_eval.errors import AttackError
from msa_eval.evidence.folder import UNFINISHED
from msa_eval.evidence.provenance import defense_hash, environment, place
from msa_eval.evidence.records import TargetRecord
from msa_eval.evidence.results import Results
from msa_eval.judging.batch_plan import batch_of, plan_batches, select
from msa_eval.judging.clean_batches import CleanBatches
from msa_eval.numerics import full_precision
from msa_eval.progress import Notify, Progress, silent, ticking, warn
from msa_eval.protocols.loading import load_protocol
from msa_eval.protocols.schema import Protocol
from msa_eval.randomness import seeded
from msa_eval.surrogates.registry import SurrogateLike
from msa_eval.targets.loading import resolve
from msa_eval.targets.pair import answers, make_targets, remarks


def evaluate(
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
    out: str | Path | None = None,
    force: bool = False,
    save_adversarial: bool | str = False,
    save_gallery: bool = True,
    micro_batch: int | None = None,
    precision: str = "auto",
    deterministic: bool = False,
    engine: str | Executor = "local",
    continued: Continued | None = None,
    progress: Progress = silent,
    notify: Notify = warn,
) -> Results:
    """Find out how robust a defence is under a protocol.

    Args:
        target: an object with ``features(x)`` and ``logits(z)``, or a module from images to logits; in evaluation mode.
            Also the name of one, such as ``"hpm.safetensors"`` or ``"torchvision:resnet50"`` (see `msa_eval.targets`).
        x: images ``(N, C, H, W)``, ``(N, H, W, C)`` or ``(N, H, W)``: float in [0, 1], or uint8. Or, without ``y``,
            what holds images and labels: `Samples`, a pair ``(x, y)``, a ``DataLoader`` that doesn't shuffle, a
            ``Dataset``, a split of Hugging Face's ``datasets``, or what `load_samples` takes.
        y: labels from 0: ``(N,)``, ``(N, 1)`` or one-hot.
        protocol: the name of a shipped one, a TOML file, or a `Protocol`.
        fc: the plain classifier the defence was built on, evaluated beside it; its own ``fc_target`` by default, and
            ``False`` to leave it out.
        surrogates: more surrogates for the defence by name: functions ``(defense, features) -> logits``, or modules
            from images to logits. They come after those that the target brings in its attribute ``surrogates``.
        found_surrogates: whether to look for surrogates in the target's own code and submodules, where no gradient is
            true enough; what is found, and how, stands in ``run.json``.
        seed: of every attack; samples and batches have seeds of their own in the protocol.
        device: where to compute; modules are moved there. ``auto`` is CUDA, else MPS, else the CPU.
        overrides: values to put in place of the protocol's, by dotted key.
        out: a folder to write the results to; it is checked after the clean pass, before any attack. What is finished
            is kept there, so that the same call goes on where an earlier one was interrupted.
        force: start anew there; other results, and what is unfinished, are kept under a dated name.
        save_adversarial: keep there, for every broken sample, an adversarial batch that breaks it, confirmed by a
            pass of its own; with ``"all"`` every other sample's best point too (see `Results.adversarial`).
        save_gallery: keep there a few broken samples as pictures, for the page.
        micro_batch: pass at most so many images through the trunk at once. Without it, a pass that runs out of memory
            is made again in halves, and in halves of these. The batch that is decided is the same.
        precision: of forward passes during the search: ``fp32``, ``bf16``, or the faster of them on this machine
            (``auto``, by a short trial). Verdicts are float32 always: what a search in bf16 seems to break counts once
            it was passed again.
        deterministic: use deterministic algorithms alone, on GPUs too.
        engine: where the runs are made: ``"local"``, in this process; ``"ray"``, on the Ray cluster that this machine
            is part of; or an engine such as `msa_eval.RayEngine`. The evidence is the same.
        continued: points of another evaluation to start one more run from, and where to leave this one's own (see
            `msa_eval.studies.curve`).
        progress: shows how far each run has come.
        notify: called with what a user should know: where it goes on, which damaged results it computes again.

    Returns:
        the tables. Where a run failed on a batch, their verdict is ``incomplete``.

    Raises:
        ValueError: when target, data and protocol don't fit together.
        AttackError: when every run fails; a failure never reads as robustness.
        OSError: when the results can't be written.
    """
    if not isinstance(protocol, Protocol):
        protocol = load_protocol(protocol, overrides=overrides)
    elif overrides:
        raise ValueError("give overrides with a protocol's name or file, not with a Protocol")
    if surrogates and protocol.apgd is None:
        raise ValueError(f"protocol {protocol.name} has no attack.apgd, so it has no use for surrogates")
    output = Output(None if out is None else Path(out), force, save_adversarial, save_gallery)
    samples = Samples.of(x, y)
    protocol.ball.check_radius(math.prod(samples.shape))
    # Workers of a cluster have GPUs where these are asked for alone.
    device = "cpu" if device == "auto" and engine != "local" else device_for(device, notify)
    execution = Execution(device, micro_batch, precision, deterministic, executor_of(engine, device))
    target, named = resolve(target, samples)
    # Verdicts are float32 and searches need gradients, whatever surrounds the call.
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast(torch.device(device).type, enabled=False),
        full_precision(deterministic=deterministic),
        execution.executor,
    ):
        targets = make_targets(target, fc, samples, device, micro_batch=micro_batch)
        for remark in remarks(targets):
            notify(remark)
        started = time.perf_counter()
        weights = {name: defense_hash(model) for name, model in targets.items()}
        brought = {} if protocol.apgd is None else own_surrogates(targets["defense"])
        with without_weight_gradients(*targets.values()):
            plans = _planned(
                targets, samples, protocol, device=device, own={**brought, **(surrogates or {})}, seed=seed,
                find=found_surrogates, continued=continued, progress=progress, notify=notify,
            )  # fmt: skip
            about = identity(protocol, plans, seed, weights) | ({} if named is None else {"target": dict(named)})
            return _carried_out(
                plans, about, execution, output, continued=continued, started=started, progress=progress, notify=notify
            )


def _planned(
    targets: Mapping[str, Defense],
    samples: Samples,
    protocol: Protocol,
    *,
    device: str,
    own: Mapping[str, SurrogateLike],
    seed: int,
    find: bool,
    continued: Continued | None,
    progress: Progress,
    notify: Notify,
) -> list[TargetPlan]:
    """Each target with its clean batches and the runs that are to be made on them."""
    chosen = select(samples.y, protocol)
    batch_plan = plan_batches(len(chosen), size=protocol.batch_size, seed=protocol.batches_seed)
    if protocol.apgd is not None and protocol.apgd.victim is not None:
        chosen, batch_plan = batch_of(protocol.apgd.victim, chosen, batch_plan)
    samples = samples.decoded(chosen, progress=progress).leveled(protocol.ball.levels, chosen)
    if samples.levels is not None:
        notify(f"the images are none of {samples.levels} levels: they are rounded to these first, and evaluated so")
    plans = []
    for name, model in targets.items():
        clean = CleanBatches(
            model, samples, chosen, batch_plan, device=device, stochastic=protocol.stochastic, ball=protocol.ball,
            progress=progress,
        )  # fmt: skip
        plans.append(
            TargetPlan.enter(
                name, model, clean, protocol=protocol, own=own, seed=seed, find=find, continued=continued,
                progress=progress,
            )
        )  # fmt: skip
    for plan in plans:
        if note := answers(plan.defense):
            notify(f"of the {plan.name}: {note}")
    return plans


def _search(precision: str, plan: TargetPlan, progress: Progress) -> SearchPrecision:
    """How points are passed, by trial on the first batch's images."""
    with seeded(0), ticking(progress, 1, "trial of precisions"):
        return choose(precision, plan.defense, next(iter(plan.clean)).x)


def _fitted(search: SearchPrecision, plan: TargetPlan) -> SearchPrecision:
    with seeded(0):
        return search.of(plan.defense, next(iter(plan.clean)).x)


def _carried_out(
    plans: Sequence[TargetPlan],
    about: Mapping[str, Any],
    execution: Execution,
    output: Output,
    *,
    continued: Continued | None,
    started: float,
    progress: Progress,
    notify: Notify,
) -> Results:
    """Make all runs that are not made yet, judge the targets, and write the results."""
    search = _search(execution.precision, plans[0], progress)
    plans = [dataclasses.replace(plan, search=_fitted(search, plan)) for plan in plans]
    where = environment(execution.device) | {"search": search.about(), "deterministic": execution.deterministic}
    here = place(execution.device) | {"search": where["search"]["precision"]}
    options = output.about() | execution.about() | ({} if continued is None else {"continued": True})
    with opened(
        output.folder, about, options=options, where=here, force=output.force, device=execution.device, notify=notify,
        started=started,
    ) as store:  # fmt: skip
        evaluation = EvaluationState(progress, store, output.keep, output.every, continued is not None)
        try:
            if finished := _finished(plans, store):
                notify(f"going on in {output.folder}: {finished} of {_due(plans)} runs on a batch are finished")
            signs, collectors = _prepared(plans, evaluation, show=output.show)
            execution.executor.make([one for each in collectors.values() for one in each], evaluation)
            records = _records(plans, evaluation, signs, collectors)
            results = assembled(plans, {**about, **where}, evaluation, signs, records)
            if output.folder is None:
                return results
            results = _written(results, plans, evaluation, records, collectors, output)
            if continued is not None:
                _leave(continued, results, collectors)
        except KeyboardInterrupt as stop:
            raise type(stop)(_stopped(plans, evaluation, output)) from None
        if not evaluation.failures:
            store.finish()
        return results


Collectors = Mapping[str, Sequence[Collector]]
"""Of each target, a collector a context."""


def _prepared(
    plans: Sequence[TargetPlan], evaluation: EvaluationState, *, show: bool
) -> tuple[dict[str, list[Sign]], Collectors]:
    """The audit of each target, before any run, and what will collect its runs."""
    signs: dict[str, list[Sign]] = {}
    collectors: dict[str, list[Collector]] = {}
    for plan in plans:
        guard = StateGuard(plan.defense, batch=next(iter(plan.clean)), seed=plan.seed)
        signs[plan.name] = probe_target(plan, evaluation) if plan.protocol.audited else []
        first, *others = _runners(plan)
        shown = Collector(first, evaluation, guard, show=show and plan.name == "defense")
        collectors[plan.name] = [shown, *(Collector(runner, evaluation, guard) for runner in others)]
    return signs, collectors


def _records(
    plans: Sequence[TargetPlan], evaluation: EvaluationState, signs: dict[str, list[Sign]], collectors: Collectors
) -> list[TargetRecord]:
    """What the runs came to; what they say of the targets joins the signs, and what failed the failures."""
    records: list[TargetRecord] = []
    for plan in plans:
        made = collectors[plan.name]
        records += carry_over([collector.record() for collector in made])
        evaluation.failures += [failure for one in made for failure in one.failures]
        # A target that ignores its companions answers the same in all contexts.
        same = plan.protocol.contexts[len(made) :]
        records += [dataclasses.replace(records[-1], context=context) for context in same]
        _check_any(plan, evaluation)
        if not plan.clean.batch_dependent:
            signs[plan.name].append(batch_dependence_found(max(one.drift for one in made)))
        try:
            signs[plan.name].append(made[0].guard.sign())
        except Exception as error:
            evaluation.fail(plan.name, "the state guard", error)
    return records


def _written(
    results: Results,
    plans: Sequence[TargetPlan],
    evaluation: EvaluationState,
    records: Sequence[TargetRecord],
    collectors: Collectors,
    output: Output,
) -> Results:
    """The results, written to their folder."""
    assert output.folder is not None
    every = [one for each in collectors.values() for one in each]
    proofs = [proof for one in every for proof in one.proofs]
    clean = plans[0].clean
    carried = carried_proofs(proofs, records, [clean.chosen[places] for places in clean.batch_plan])
    best_points = not_carried([proof for one in every for proof in one.others], carried)
    write = functools.partial(
        write_results, results=results, force=output.force, plans=plans,
        proofs=[*proofs, *carried] if output.keep else None, others=best_points if output.every else None,
        pictures=pictures([shown for one in every for shown in one.exhibits()]), progress=evaluation.progress,
    )  # fmt: skip
    return save(write, output.folder)


def _leave(continued: Continued, results: Results, collectors: Collectors) -> None:
    """Leave the best points of an evaluation for one that goes on from there."""
    every = [one for each in collectors.values() for one in each]
    best = {(one.runner.plan.name, one.runner.context): one.best for one in every if one.best is not None}
    continued.leave(str(results.run["key"]), best)


def _runners(plan: TargetPlan) -> list[BatchRunner]:
    """A target in every context in which runs are made."""
    found = []
    for context in plan.searched:
        composed = CONTEXTS[context].chooses_companions and plan.clean.batch_dependent
        clean = plan.clean.seen_in(context)
        found.append(BatchRunner(plan, context, clean, clean.pool(plan.protocol.composition) if composed else None))
    return found


def _due(plans: Sequence[TargetPlan]) -> int:
    """How many runs on a batch there are to make."""
    return sum(len(plan.runs[context]) * len(plan.clean) for plan in plans for context in plan.searched)


def _finished(plans: Sequence[TargetPlan], store: ResumeStore) -> int:
    """How many of them are made, as far as their units tell."""
    names = store.names()
    runner = {f"{one.name}-{context}": len(runs) for one in plans for context, runs in one.runs.items()}
    return sum(1 if "." in name else runner.get(name.rpartition("-")[0], 0) for name in names)


def _stopped(plans: Sequence[TargetPlan], evaluation: EvaluationState, output: Output) -> str:
    """What to say when a user stops an evaluation."""
    finished = _finished(plans, evaluation.store)
    if output.folder is None or not finished:
        return ""
    how = "the same call without force=True" if output.force else "the same call"
    kept = output.folder / UNFINISHED
    return (
        f"interrupted after {finished} of {_due(plans)} runs on a batch; they are kept in {kept}, and "
        f"{how} goes on from there; no earlier results were changed"
    )


def _check_any(plan: TargetPlan, evaluation: EvaluationState) -> None:
    """Check that something was found out about a target.

    Raises:
        AttackError: when every run failed.
    """
    failed = [one for one in evaluation.failures if one.target == plan.name and one.batch is not None]
    if len(failed) == _due([plan]):
        raise AttackError(f"{failed[0].target}, run {failed[0].run}, batch {failed[0].batch}: {failed[0].error}")
