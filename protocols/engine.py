"""The engine: it fixes the batches, makes every run on whole batches, judges, and fills the evidence."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from msa_eval.protocols import archive, gallery
from msa_eval.protocols.archive import Proof
from msa_eval.protocols.audit import Sign, StateGuard, probe, signs_from, verdict_of
from msa_eval.protocols.clean import CleanBatches
from msa_eval.protocols.entrant import Entrant, Evaluated
from msa_eval.protocols.evidence import (
    ARCHIVE,
    NEW_ARCHIVE,
    SCHEMA_VERSION,
    Results,
    TargetRecord,
    claim_folder,
    tabulate,
)
from msa_eval.protocols.gallery import Exhibit
from msa_eval.protocols.plan import batch_of, plan_batches, select
from msa_eval.protocols.provenance import defense_hash, environment
from msa_eval.protocols.spec import Protocol, load_protocol
from msa_eval.surrogates.registry import Own
from torch import Tensor

import msa_eval
from msa_eval.data import Samples
from msa_eval.defense import Defense, as_defense, brought_by, modules_of, without_weight_gradients
from msa_eval.device import check_device
from msa_eval.progress import Progress, silent
from msa_eval.targets import resolve


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
    save_gallery: bool = True,
    progress: Progress = silent,
) -> Results:
    """Find out how robust a defence is under a protocol.

    Args:
        target: an object with ``features(x)`` and ``logits(z)``, or a module from images to logits; in evaluation mode.
            Also the name of one, such as ``"hpm.safetensors"`` or ``"torchvision:resnet50"`` (see `msa_eval.targets`).
        x: `Samples`, or images ``(N, C, H, W)``: float in [0, 1], or uint8.
        y: labels ``(N,)`` from 0, unless ``x`` is `Samples`.
        protocol: the name of a shipped one, a TOML file, or a `Protocol`.
        fc: the plain classifier the defence was built on, evaluated beside it; its own ``fc_target`` by default, and
            ``False`` to leave it out.
        surrogates: more surrogates for the defence by name: functions ``(defense, features) -> logits``, or modules
            from images to logits. They come after those that the target brings in its attribute ``surrogates``.
        seed: of every attack; samples and batches have seeds of their own in the protocol.
        device: where to compute; modules are moved there.
        overrides: values to put in place of the protocol's, by dotted key.
        out: a folder to write the results to; it is checked after the clean pass, before any attack.
        force: write over other results there.
        save_adversarial: keep there, for every broken sample, an adversarial batch that breaks it, confirmed by a
            pass of its own.
        save_gallery: keep there a few broken samples as pictures, for the page.
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
    if save_adversarial and out is None:
        raise ValueError("save_adversarial keeps adversarial batches beside the tables; give a folder as out")
    samples = Samples.of(x, y)
    device = check_device(device)
    target, named = resolve(target, samples)
    # Verdicts are float32 and searches need gradients, whatever surrounds the call.
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(torch.device(device).type, enabled=False):
        targets = _targets(target, fc, device)
        brought = {} if protocol.apgd is None else brought_by(targets["defense"])
        return _evaluate(
            targets,
            samples,
            protocol=protocol,
            named=named,
            own={**brought, **(surrogates or {})},
            seed=seed,
            device=device,
            out=None if out is None else Path(out),
            force=force,
            keep=save_adversarial,
            show=save_gallery and out is not None,
            progress=progress,
        )


def _evaluate(
    targets: Mapping[str, Defense],
    samples: Samples,
    *,
    protocol: Protocol,
    named: Mapping[str, Any] | None,
    own: Mapping[str, Own],
    seed: int,
    device: str,
    out: Path | None,
    force: bool,
    keep: bool,
    show: bool,
    progress: Progress,
) -> Results:
    started = time.perf_counter()
    chosen = select(samples.y, protocol)
    seats = plan_batches(len(chosen), size=protocol.batch_size, seed=protocol.batches_seed)
    if protocol.apgd is not None and protocol.apgd.victim is not None:
        chosen, seats = batch_of(protocol.apgd.victim, chosen, seats)
    with without_weight_gradients(*targets.values()):
        entrants = [
            Entrant.enter(
                name,
                model,
                CleanBatches(model, samples, chosen, seats, device=device, stochastic=protocol.stochastic),
                protocol=protocol, own=own, seed=seed,
            )
            for name, model in targets.items()
        ]  # fmt: skip
        about = _identity(protocol, entrants, seed) | ({} if named is None else {"target": dict(named)})
        if out is not None:
            claim_folder(out, about["key"], force=force)
        signs: dict[str, list[Sign]] = {}
        done: list[Evaluated] = []
        for entrant in entrants:
            guard = StateGuard(entrant.defense, batch=next(iter(entrant.clean)), seed=seed)
            signs[entrant.name] = _probe(entrant) if protocol.audited else []
            done += entrant.evaluate(progress, keep=keep, show=show and entrant.name == "defense")
            signs[entrant.name].append(guard.sign())
        records = [one.record for one in done]
        about |= {"taken_back": _taken_back(records, about["draws"])}
        results = tabulate(records, about | environment(device) | {"verdict": "not audited"})
        if protocol.audited:
            results = _judged(results, signs)
        results = _timed(results, started)
        if out is not None:
            proofs = [proof for one in done for proof in one.proofs] if keep else None
            exhibits = [shown for one in done for shown in one.exhibits]
            write = functools.partial(
                _write, results=results, force=force, entrants=entrants, proofs=proofs, pictures=_pictures(exhibits)
            )
            results = _save(write, out)
    return results


def _probe(entrant: Entrant) -> list[Sign]:
    """Measure the signs of the audit on a few clean batches."""
    clean = entrant.clean
    sizes = itertools.accumulate(len(seat) for seat in clean.seats)
    count = max(1, sum(size <= entrant.protocol.audited for size in sizes))
    return probe(
        entrant.defense, entrant.offers.usable, list(itertools.islice(clean, count)), entrant.protocol.ball,
        batch_dependent=clean.batch_dependent, num_classes=clean.num_classes, seed=entrant.seed,
    )  # fmt: skip


def _judged(results: Results, signs: Mapping[str, Sequence[Sign]]) -> Results:
    """Add the audit and its verdict on each target; the defence's is the results'."""
    rows, verdicts = [], {}
    for target, probed in signs.items():
        found: dict[str, Sign] = {}
        for sign in (*probed, *signs_from(results, target=target)):
            # Of what a few batches show and what all runs show, the graver counts.
            if sign.name not in found or _gravity(sign) >= _gravity(found[sign.name]):
                found[sign.name] = sign
        verdicts[target] = verdict_of(found.values())
        rows += [{"target": target, **dataclasses.asdict(sign)} for sign in found.values()]
    summary = results.summary.assign(
        verdict=[verdicts[target].verdict for target in results.summary["target"]],
        reasons=["; ".join(verdicts[target].reasons) for target in results.summary["target"]],
    )
    run = dict(results.run) | {
        "verdict": verdicts["defense"].verdict,
        "verdicts": {target: dataclasses.asdict(verdict) for target, verdict in verdicts.items()},
    }
    audit = pd.DataFrame(rows).rename(columns={"name": "sign"})
    return dataclasses.replace(results, summary=summary, audit=audit, run=run)


def _gravity(sign: Sign) -> int:
    return ("note", "suspect", "unreliable").index(sign.severity) + 1 if sign.fired else 0


def _timed(results: Results, started: float) -> Results:
    return dataclasses.replace(
        results, run=dict(results.run) | {"seconds": round(time.perf_counter() - started, 3)}
    )  # fmt: skip


def _pictures(exhibits: Sequence[Exhibit]) -> bytes | None:
    """The gallery's content; where it can't be made, the evaluation is worth no less."""
    try:
        return gallery.pack(exhibits) if exhibits else None
    except Exception as error:
        warnings.warn(f"no gallery could be made of what was broken: {error}", stacklevel=2)
        return None


def _save(write: Callable[[Path], Results], out: Path) -> Results:
    """Write the results, and where that fails now, after all the work, write them to a temporary folder instead."""
    try:
        return write(out)
    except OSError as error:
        rescue = Path(tempfile.mkdtemp(prefix="msa-eval-"))
        write(rescue)
        raise OSError(error.errno, f"{error.strerror}; the results are in {rescue} instead") from error


def _write(
    out: Path,
    *,
    results: Results,
    force: bool,
    entrants: Sequence[Entrant],
    proofs: Sequence[Proof] | None,
    pictures: bytes | None,
) -> Results:
    """Write the tables and, where they are kept, the adversarial batches, each replayed on its target first."""
    if proofs is None:
        results.save(out, force=force, gallery=pictures)
        return results
    replays = {entrant.name: entrant.replay for entrant in entrants}
    path = out / NEW_ARCHIVE
    try:
        written = archive.write(
            path, proofs, next(iter(replays.values())).images, entrants[0].protocol.ball,
            confirm=lambda proof: replays[proof.target].breaks(proof),
            exact={name for name, replay in replays.items() if replay.draws > 1},
        )  # fmt: skip
        results = dataclasses.replace(results, run=dict(results.run) | {"adversarial": written.about(ARCHIVE)})
        results.save(out, force=force, archive=path, gallery=pictures)
    finally:
        path.unlink(missing_ok=True)
    return results


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


def _taken_back(records: Sequence[TargetRecord], draws: Mapping[str, int]) -> dict[str, dict[str, int]]:
    """How many samples of each stochastic target, by context, were called broken and did not stay so."""
    taken: dict[str, dict[str, int]] = {}
    for record in records:
        if draws[record.target] > 1:
            taken.setdefault(record.target, {})[record.context] = record.taken_back
    return taken


def _identity(protocol: Protocol, entrants: Sequence[Entrant], seed: int) -> dict[str, Any]:
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
    draws = {entrant.name: entrant.clean.draws for entrant in entrants}
    return {"key": key} | decisive | {"batch_dependent": dependent, "draws": draws}
