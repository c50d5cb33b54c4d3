"""The engine: it fixes the batches, makes every run on whole batches, judges, and fills the evidence."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from msa_eval.protocols.contexts import in_context
from msa_eval.protocols.evidence import SCHEMA_VERSION, Results, RunRecord, TargetRecord, claim_folder, tabulate
from msa_eval.protocols.plan import plan_batches, select
from msa_eval.protocols.provenance import defense_hash, environment
from msa_eval.protocols.runs import Run, applicable, plan_runs
from msa_eval.protocols.spec import Protocol, load_protocol
from msa_eval.protocols.trial import AttackError, Batch, Outcome, Trial
from msa_eval.surrogates import Surrogate
from msa_eval.surrogates.registry import Decision
from torch import Tensor

import msa_eval
from msa_eval.attacks.losses import margin
from msa_eval.data import Samples
from msa_eval.defense import (
    Defense,
    as_defense,
    decide,
    looks_batch_dependent,
    modules_of,
    without_weight_gradients,
)
from msa_eval.progress import Progress, silent


def evaluate(
    target: object,
    x: Samples | Tensor | Any,
    y: Tensor | Any = None,
    *,
    protocol: str | Path | Protocol = "quick",
    fc: object = None,
    surrogates: Mapping[str, Decision | Surrogate] | None = None,
    seed: int = 0,
    device: str = "cpu",
    overrides: Mapping[str, Any] | None = None,
    out: str | Path | None = None,
    force: bool = False,
    progress: Progress = silent,
) -> Results:
    """Find out how robust a defence is under a protocol.

    Args:
        target: an object with ``features(x)`` and ``logits(z)``, or a module from images to logits; in evaluation mode.
        x: `Samples`, or images ``(N, C, H, W)``: float in [0, 1], or uint8.
        y: labels ``(N,)`` from 0, unless ``x`` is `Samples`.
        protocol: the name of a shipped one, a TOML file, or a `Protocol`.
        fc: the plain classifier the defence was built on, evaluated beside it; its own ``fc_target`` by default.
        surrogates: more surrogates for the defence, as functions ``(defense, features) -> logits`` by name.
        seed: of every attack; samples and batches have seeds of their own in the protocol.
        device: where to compute; modules are moved there.
        overrides: values to put in place of the protocol's, by dotted key.
        out: a folder to write the results to; it is checked before anything is computed.
        force: write over other results there.
        progress: shows how far each run has come.

    Returns:
        the tables.

    Raises:
        ValueError: when target, data and protocol don't fit together.
        AttackError: when an attack or the defence fails on a batch; a failure never reads as robustness.
        OSError: when the results can't be written.
    """
    started = time.perf_counter()
    samples = x if isinstance(x, Samples) else Samples(_tensor(x), _tensor(y))
    if not isinstance(protocol, Protocol):
        protocol = load_protocol(protocol, overrides=overrides)
    elif overrides:
        raise ValueError("give overrides with a protocol's name or file, not with a Protocol")
    defense = as_defense(target)
    targets = {"defense": defense}
    plain = fc if fc is not None else getattr(defense, "fc_target", None)
    if plain is not None:
        targets["fc"] = as_defense(plain)
    _move(targets.values(), device)

    chosen = select(samples.y, protocol)
    seats = plan_batches(len(chosen), size=protocol.batch_size, seed=protocol.batches_seed)
    with without_weight_gradients(*targets.values()):
        entrants = [
            _Entrant.enter(
                name,
                model,
                protocol=protocol,
                own=(surrogates or {}) if name == "defense" else {},
                clean=_CleanBatches(model, samples, chosen, seats, device=device),
                seed=seed,
            )
            for name, model in targets.items()
        ]
        about = _identity(protocol, entrants, seed)
        if out is not None:
            claim_folder(Path(out), about["key"], force=force)
        records = [record for entrant in entrants for record in entrant.evaluate(protocol, progress)]
    seconds = round(time.perf_counter() - started, 3)
    results = tabulate(records, about | environment(device) | {"seconds": seconds, "verdict": "not audited"})
    if out is not None:
        results.save(out, force=force)
    return results


def _tensor(values: Any) -> Tensor:
    return values if isinstance(values, Tensor) else torch.tensor(np.asarray(values))


class _CleanBatches:
    """The clean batches of a plan with the target's features and verdicts, each computed once.

    Features smaller than the images are kept; others (a target without a trunk has the images themselves) are made
    again when a batch is asked for.
    """

    def __init__(
        self, defense: Defense, samples: Samples, chosen: Tensor, seats: Sequence[Tensor], *, device: str
    ) -> None:
        self.samples, self.chosen, self.seats = samples, chosen, seats
        self._defense, self._device = defense, device
        self._features: dict[int, Tensor] = {}
        self._logits: dict[int, Tensor] = {}
        for number in range(len(seats)):
            self._answer(number)
        self.num_classes = self._logits[0].shape[1]
        declared: bool | None = getattr(defense, "batch_dependent", None)
        self.batch_dependent = self._probe() if declared is None else bool(declared)
        highest = int(samples.y[chosen].max())
        if highest >= self.num_classes:
            raise ValueError(
                f"{samples.name} has label {highest}, but the model has {self.num_classes} classes (labels from 0)"
            )

    def __len__(self) -> int:
        return len(self.seats)

    def __iter__(self) -> Iterator[Batch]:
        for number, seat in enumerate(self.seats):
            x = self._images(number)
            z = self._features[number] if number in self._features else self._trunk(x)
            y = self.samples.y[self.chosen[seat]].to(self._device)
            yield Batch(number, x, y, z, self._logits[number])

    def seen_in(self, context: str) -> _CleanBatches:
        """The same batches with the target's verdicts in another context."""
        seen = copy.copy(self)
        seen._logits = {
            batch.number: decide(self.view(context, batch), batch.z) if context == "alone" else batch.logits
            for batch in self
        }
        return seen

    def view(self, context: str, batch: Batch) -> Defense:
        """The target as an attacker in a context meets it."""
        return in_context(self._defense, context, batch.z, batch_dependent=self.batch_dependent)

    def _probe(self) -> bool:
        first = next(iter(self))
        return looks_batch_dependent(self._defense, first.z, first.logits)

    def _images(self, number: int) -> Tensor:
        return self.samples.images(self.chosen[self.seats[number]]).to(self._device)

    def _trunk(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            z = self._defense.features(x)
        if not isinstance(z, Tensor) or z.ndim < 2 or len(z) != len(x):
            raise ValueError(f"expected features of shape (B, ...) for {len(x)} images, but got {_describe(z)}")
        return z

    def _answer(self, number: int) -> None:
        x = self._images(number)
        try:
            z = self._trunk(x)
            logits = decide(self._defense, z)
        except (RuntimeError, IndexError) as error:
            raise ValueError(f"the model can't take images of shape {tuple(x.shape)}: {error}") from error
        if logits.ndim != 2 or len(logits) != len(x) or logits.shape[1] < 2:
            raise ValueError(f"expected logits of shape (B, k) for {len(x)} images, but got {_describe(logits)}")
        if not bool(torch.isfinite(logits).all()):
            raise ValueError(f"the model's logits on clean batch {number} are not finite")
        if z[0].numel() < x[0].numel():
            self._features[number] = z
        self._logits[number] = logits


@dataclass(frozen=True)
class _Entrant:
    """A target ready for its runs."""

    name: str
    defense: Defense
    clean: _CleanBatches
    runs: Sequence[Run]
    skipped: Sequence[str]
    seed: int

    @classmethod
    def enter(
        cls,
        name: str,
        defense: Defense,
        *,
        protocol: Protocol,
        own: Mapping[str, Decision | Surrogate],
        clean: _CleanBatches,
        seed: int,
    ) -> _Entrant:
        usable, skipped = applicable(protocol.apgd, defense, own) if protocol.apgd else ([], [])
        runs = plan_runs(protocol, usable, num_classes=clean.num_classes)
        return cls(name, defense, clean, runs, skipped, seed)

    def evaluate(self, protocol: Protocol, progress: Progress) -> Iterator[TargetRecord]:
        """Make every run in every context; a target that ignores its companions answers the same in all."""
        first, *others = protocol.contexts
        record = self._evaluate(first, protocol, progress)
        yield record
        for context in others:
            if self.clean.batch_dependent:
                yield self._evaluate(context, protocol, progress)
            else:
                yield dataclasses.replace(record, context=context)

    def _evaluate(self, context: str, protocol: Protocol, progress: Progress) -> TargetRecord:
        """Make every run on every batch."""
        clean = self.clean.seen_in(context)
        seats, chosen, samples = clean.seats, clean.chosen, clean.samples
        committed = [batch.correct for batch in clean]
        records = []
        for place, run in enumerate(self.runs, start=1):
            started = time.perf_counter()
            outcomes = []
            for batch in progress(clean, f"{self.name} {context} {place}/{len(self.runs)} {run.name}"):
                outcome = self._attempt(run, batch, context, protocol)
                outcomes.append(outcome)
                if int(outcome.committed.sum()) < int(committed[batch.number].sum()):
                    committed[batch.number] = outcome.committed
            records.append(_record(run, outcomes, seats, time.perf_counter() - started))

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
            committed=placed(committed),
            runs=records,
        )

    def _attempt(self, run: Run, batch: Batch, context: str, protocol: Protocol) -> Outcome:
        target = self.clean.view(context, batch)
        trial = Trial(target, run.surrogate, batch, protocol.ball, mixes_rows=self.clean.batch_dependent)
        generator = run.generator(self.seed, self.name, context, batch.number)
        try:
            return trial.finish(run.attack(trial, generator))
        except Exception as error:
            raise AttackError(f"{self.name}, run {run.name}, batch {batch.number}: {error}") from error


def _record(run: Run, outcomes: Sequence[Outcome], seats: Sequence[Tensor], seconds: float) -> RunRecord:
    def joined(get: Callable[[Outcome], Tensor]) -> Any:
        return _place([get(outcome) for outcome in outcomes], seats)

    return RunRecord(
        name=run.name,
        surrogate=run.surrogate_name,
        attack=run.label,
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


def _move(targets: Any, device: str) -> None:
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device {device!r} was asked for, but CUDA is not available here; use --device cpu")
    for target in targets:
        for module in modules_of(target):
            module.to(device)


def _identity(protocol: Protocol, entrants: Sequence[_Entrant], seed: int) -> dict[str, Any]:
    """What the results depend on, and a key made of it."""
    clean = entrants[0].clean
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
                "runs": [run.name for run in entrant.runs],
                "not_applicable": list(entrant.skipped),
            }
            for entrant in entrants
        },
        "batches": {"sha256": plan, "count": len(seats)},
        "msa_eval": msa_eval.__version__,
    }
    key = hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()
    dependent = {entrant.name: entrant.clean.batch_dependent for entrant in entrants}
    return {"key": key} | decisive | {"batch_dependent": dependent}


def _describe(value: object) -> str:
    return f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
