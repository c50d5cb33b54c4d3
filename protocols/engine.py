"""The engine: it fixes the batches, makes every run on whole batches, judges, and fills the evidence."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from msa_eval.protocols.clean import CleanBatches, seeded
from msa_eval.protocols.composition import CompositionAttack, RecombinationAttack
from msa_eval.protocols.evidence import SCHEMA_VERSION, Results, RunRecord, TargetRecord, claim_folder, tabulate
from msa_eval.protocols.history import History
from msa_eval.protocols.plan import batch_of, plan_batches, select
from msa_eval.protocols.provenance import defense_hash, environment
from msa_eval.protocols.runs import Attack, Offers, Run, offer, plan_runs
from msa_eval.protocols.spec import Protocol, load_protocol
from msa_eval.protocols.trial import AttackError, Batch, Outcome, Trial
from msa_eval.surrogates.registry import Own
from torch import Tensor

import msa_eval
from msa_eval.attacks.losses import margin
from msa_eval.data import Samples
from msa_eval.defense import Defense, WholeModel, as_defense, modules_of, without_weight_gradients
from msa_eval.device import check_device
from msa_eval.progress import Progress, silent


def evaluate(
    target: object,
    x: Samples | Tensor | Any,
    y: Tensor | Any = None,
    *,
    protocol: str | Path | Protocol = "msa",
    fc: object = None,
    surrogates: Mapping[str, Own] | None = None,
    seed: int = 0,
    device: str = "cpu",
    overrides: Mapping[str, Any] | None = None,
    out: str | Path | None = None,
    force: bool = False,
    save_adversarial: bool = False,
    progress: Progress = silent,
) -> Results:
    """Find out how robust a defence is under a protocol.

    Args:
        target: an object with ``features(x)`` and ``logits(z)``, or a module from images to logits; in evaluation mode.
        x: `Samples`, or images ``(N, C, H, W)``: float in [0, 1], or uint8.
        y: labels ``(N,)`` from 0, unless ``x`` is `Samples`.
        protocol: the name of a shipped one, a TOML file, or a `Protocol`.
        fc: the plain classifier the defence was built on, evaluated beside it; its own ``fc_target`` by default, and
            ``False`` to leave it out.
        surrogates: more surrogates for the defence by name: functions ``(defense, features) -> logits``, or modules
            from images to logits.
        seed: of every attack; samples and batches have seeds of their own in the protocol.
        device: where to compute; modules are moved there.
        overrides: values to put in place of the protocol's, by dotted key.
        out: a folder to write the results to; it is checked after the clean pass, before any attack.
        force: write over other results there.
        save_adversarial: keep there, for every broken sample, an adversarial batch that breaks it, confirmed by a
            pass of its own.
        progress: shows how far each run has come.

    Returns:
        the tables.

    Raises:
        ValueError: when target, data and protocol don't fit together.
        AttackError: when an attack or the defence fails on a batch; a failure never reads as robustness.
        OSError: when the results can't be written.
    """
    if not isinstance(protocol, Protocol):
        protocol = load_protocol(protocol, overrides=overrides)
    elif overrides:
        raise ValueError("give overrides with a protocol's name or file, not with a Protocol")
    if surrogates and protocol.apgd is None:
        raise ValueError(f"protocol {protocol.name} has no attack.apgd, so it has no use for surrogates")
    samples = Samples.of(x, y)
    device = check_device(device)
    # Verdicts are float32 and searches need gradients, whatever surrounds the call.
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(torch.device(device).type, enabled=False):
        return _evaluate(
            _targets(target, fc, device),
            samples,
            protocol=protocol,
            own=surrogates or {},
            seed=seed,
            device=device,
            out=None if out is None else Path(out),
            force=force,
            progress=progress,
        )


def _evaluate(
    targets: Mapping[str, Defense],
    samples: Samples,
    *,
    protocol: Protocol,
    own: Mapping[str, Own],
    seed: int,
    device: str,
    out: Path | None,
    force: bool,
    progress: Progress,
) -> Results:
    started = time.perf_counter()
    chosen = select(samples.y, protocol)
    seats = plan_batches(len(chosen), size=protocol.batch_size, seed=protocol.batches_seed)
    if protocol.apgd is not None and protocol.apgd.victim is not None:
        chosen, seats = batch_of(protocol.apgd.victim, chosen, seats)
    with without_weight_gradients(*targets.values()):
        entrants = [
            _Entrant.enter(
                name,
                model,
                CleanBatches(model, samples, chosen, seats, device=device, stochastic=protocol.stochastic),
                protocol=protocol, own=own, seed=seed,
            )
            for name, model in targets.items()
        ]  # fmt: skip
        about = _identity(protocol, entrants, seed)
        if out is not None:
            claim_folder(out, about["key"], force=force)
        records = [record for entrant in entrants for record in entrant.evaluate(progress)]
    seconds = round(time.perf_counter() - started, 3)
    results = tabulate(records, about | environment(device) | {"seconds": seconds, "verdict": "not audited"})
    if out is not None:
        _save(results, out, force)
    return results


def _save(results: Results, out: Path, force: bool) -> None:
    """Write the results, and where that fails now, after all the work, write them to a temporary folder instead."""
    try:
        results.save(out, force=force)
    except OSError as error:
        rescue = tempfile.mkdtemp(prefix="msa-eval-")
        results.save(rescue)
        raise OSError(error.errno, f"{error.strerror}; the results are in {rescue} instead") from error


def _targets(target: object, fc: object, device: str) -> dict[str, Defense]:
    """The defence and the plain classifier it was built on, on the device."""
    defense = as_defense(target)
    targets = {"defense": defense}
    plain = getattr(defense, "fc_target", None) if fc is None else fc
    if plain is not None and plain is not False:
        targets["fc"] = as_defense(plain)
    for module in (module for entrant in targets.values() for module in modules_of(entrant)):
        module.to(device)
    return targets


@dataclass(frozen=True)
class _Entrant:
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
    ) -> _Entrant:
        """Plan the runs of a target; the caller's own surrogates are the defence's."""
        offers = Offers((), (), "")
        if protocol.apgd is not None:
            with seeded(seed):
                offers = offer(
                    protocol.apgd, defense, next(iter(clean)), own=own, use_own=name == "defense",
                    batch_dependent=clean.batch_dependent,
                )  # fmt: skip
        runs = {
            context: plan_runs(
                protocol, offers, num_classes=clean.num_classes, context=context,
                batch_dependent=clean.batch_dependent, caches=not isinstance(defense, WholeModel),
            )
            for context in protocol.contexts
        }  # fmt: skip
        if isinstance(defense, WholeModel) and clean.batch_dependent and set(protocol.contexts) - {"joint"}:
            warnings.warn(
                f"the {name} has no trunk, so solo, alone and composed ask it once a sample: every pass costs as many "
                f"passes of a batch as the batch has images (up to {protocol.batch_size})",
                stacklevel=2,
            )
        return cls(name, defense, clean, runs, offers, protocol, seed)

    def evaluate(self, progress: Progress) -> Iterator[TargetRecord]:
        """Make every run in every context; a target that ignores its companions answers the same in all."""
        first, *others = self.protocol.contexts
        record = self._evaluate(first, progress)
        yield record
        for context in others:
            if self.clean.batch_dependent:
                yield self._evaluate(context, progress)
            else:
                yield dataclasses.replace(record, context=context)

    def _evaluate(self, context: str, progress: Progress) -> TargetRecord:
        """Make every run on every batch, batch after batch: a run may go on from what earlier ones found."""
        clean = self.clean.seen_in(context)
        seats, chosen, samples = clean.seats, clean.chosen, clean.samples
        runs = self.runs[context]
        pool = clean.pool(self.protocol.composition) if context == "composed" and clean.batch_dependent else None
        histories = []
        outcomes: dict[str, list[Outcome]] = {run.name: [] for run in runs}
        seconds = dict.fromkeys(outcomes, 0.0)
        bar = iter(progress(range(len(clean) * len(runs)), f"{self.name} {context}"))
        for batch in clean:
            history = History(batch, None if pool is None else clean.own_company(batch, pool[0]))
            for run in runs:
                next(bar)
                started = time.perf_counter()
                outcome = self._attempt(run, batch, context, history, pool)
                seconds[run.name] += time.perf_counter() - started
                history.add(outcome)
                outcomes[run.name].append(outcome)
            histories.append(history)
        next(bar, None)

        def placed(values: Sequence[Tensor]) -> Any:
            return _place(values, seats)

        return TargetRecord(
            target=self.name,
            context=context,
            index=chosen.numpy(),
            label=samples.y[chosen].numpy(),
            batch=placed([torch.full((len(seat),), number) for number, seat in enumerate(seats)]),
            position=placed([torch.arange(len(seat)) for seat in seats]),
            clean_prediction=placed([batch.logits.argmax(dim=1) for batch in clean]),
            clean_margin=placed([-margin(batch.logits, batch.y) for batch in clean]),
            committed=placed([history.committed for history in histories]),
            runs=[_record(run, outcomes[run.name], seats, seconds[run.name]) for run in runs],
        )

    def _attempt(
        self, run: Run, batch: Batch, context: str, history: History, pool: tuple[Tensor, Tensor] | None
    ) -> Outcome:
        clean = self.clean
        target = clean.view(context, batch, history.company)
        setting = run.setting(target, history, victim=self._victim(batch))
        setting = dataclasses.replace(setting, draws=clean.draws, eot=clean.eot)
        trial = Trial(
            target, run.surrogate, batch, self.protocol.ball, mixes_rows=clean.batch_dependent, setting=setting
        )
        generator = run.generator(self.seed, self.name, context, batch.number)
        attack = run.attack or self._choice(run, batch, history, pool)
        try:
            # A stochastic target draws from the global generators: seeded here, so that the evidence can be made again.
            with seeded(generator.initial_seed()):
                points = attack(trial, generator) if bool(trial.counted.any()) else trial.start.x
                return trial.finish(points)
        except Exception as error:
            raise AttackError(f"{self.name}, run {run.name}, batch {batch.number}: {error}") from error

    def _victim(self, batch: Batch) -> Tensor | None:
        """The one sample ``(B,)`` whose companions are moved, where the protocol names one."""
        if self.protocol.apgd is None or self.protocol.apgd.victim is None:
            return None
        return (self.clean.chosen[self.clean.seats[batch.number]] == self.protocol.apgd.victim).to(batch.y.device)

    def _choice(self, run: Run, batch: Batch, history: History, pool: tuple[Tensor, Tensor] | None) -> Attack:
        """An attack that chooses from what is cached."""
        if run.label == "recombination":
            assert self.protocol.recombination is not None
            return RecombinationAttack(history.points, self.protocol.recombination.sweeps)
        assert pool is not None
        assert history.company is not None
        own = self.clean.chosen[self.clean.seats[batch.number]].to(batch.y.device)
        budget = self.protocol.composition
        identity = torch.cat([own, pool[1].to(own.device)])
        return CompositionAttack(history.company, identity, own, budget.trials, budget.search == "greedy")


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
    )


def _place(values: Sequence[Tensor], seats: Sequence[Tensor]) -> Any:
    """Join values a batch into one array ``(N,)``, in the order of the samples."""
    joined = torch.cat([value.cpu() for value in values]).numpy()
    placed = np.empty_like(joined)
    placed[torch.cat(list(seats)).numpy()] = joined
    return placed


def _identity(protocol: Protocol, entrants: Sequence[_Entrant], seed: int) -> dict[str, Any]:
    """What the results depend on, and a key made of it."""
    clean = entrants[0].clean
    if len({entrant.clean.num_classes for entrant in entrants}) > 1:
        raise ValueError(
            "defense and fc must have the same classes, but have "
            + " and ".join(str(entrant.clean.num_classes) for entrant in entrants)
        )
    samples, chosen, seats = clean.samples, clean.chosen, clean.seats
    plan = hashlib.sha256(b"".join(chosen[seat].numpy().tobytes() + b"|" for seat in seats)).hexdigest()
    decisive = {
        "schema_version": SCHEMA_VERSION,
        "seed": seed,
        "protocol": {
            "name": protocol.name,
            "version": protocol.version,
            "modified": protocol.modified,
            "overrides": dict(protocol.overrides),
            "sha256": protocol.digest(),
            "text": protocol.text(),
        },
        "data": {"name": samples.name, "sha256": samples.digest(), "n": len(chosen)},
        "targets": {
            entrant.name: {
                "type": type(entrant.defense).__name__,
                "sha256": defense_hash(entrant.defense),
                "num_classes": entrant.clean.num_classes,
                "runs": list(dict.fromkeys(run.name for runs in entrant.runs.values() for run in runs)),
                "not_applicable": list(entrant.offers.missing),
                "clean_sha256": entrant.clean.digest(),
                "surrogates_sha256": entrant.offers.sha256,
            }
            for entrant in entrants
        },
        "batches": {"sha256": plan, "count": len(seats)},
        "msa_eval": msa_eval.__version__,
    }
    key = hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()
    dependent = {entrant.name: entrant.clean.batch_dependent for entrant in entrants}
    return {"key": key} | decisive | {"batch_dependent": dependent}
