"""What an evaluation says of itself: its identity before the runs, its verdict after them."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from msa_eval._version import __version__
from msa_eval.auditing.audit import Sign, probe, signs_from, verdict_of
from msa_eval.auditing.weighing import weighed, without_advice
from msa_eval.defense.micro_batches import in_smaller_parts, parts_of, passed_last, unwrap
from msa_eval.engine.continued import digest_of
from msa_eval.engine.messages import EvaluationState, Failure
from msa_eval.engine.target_plan import TargetPlan
from msa_eval.errors import AttackError
from msa_eval.evidence.records import TargetRecord
from msa_eval.evidence.results import INCOMPLETE, SCHEMA_VERSION, Results
from msa_eval.evidence.tables import tabulate
from msa_eval.hashing import bytes_of
from msa_eval.protocols.schema import Protocol
from msa_eval.targets.pair import why_whole


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


def incomplete(results: Results, failures: Sequence[Failure]) -> Results:
    """Say of results in which something failed that they are incomplete, and what failed."""
    if not failures:
        return results
    verdicts = dict(results.run.get("verdicts", {}))
    for target in dict.fromkeys(failure.target for failure in failures):
        sentences = tuple(f"{failure.text}." for failure in failures if failure.target == target)
        verdicts[target] = {
            "verdict": INCOMPLETE,
            "reasons": sentences + tuple(verdicts.get(target, {}).get("reasons", ())),
        }
    for target in results.summary["target"].unique():
        verdicts.setdefault(target, {"verdict": str(results.run["verdict"]), "reasons": ()})
    named = results.summary["target"]
    summary = results.summary.assign(
        verdict=[verdicts[target]["verdict"] for target in named],
        reasons=["; ".join(verdicts[target]["reasons"]) for target in named],
    )
    failed = [dataclasses.asdict(failure) for failure in failures]
    run = dict(results.run) | {"verdict": INCOMPLETE, "verdicts": verdicts, "failed": failed}
    return dataclasses.replace(results, summary=summary, run=run)


def judged(results: Results, signs: Mapping[str, Sequence[Sign]]) -> Results:
    """Add the audit and its verdict on each target; the defence's is the results'."""
    rows, verdicts = [], {}
    for target, probed in signs.items():
        found: dict[str, Sign] = {}
        for sign in (*probed, *signs_from(results, target=target)):
            # Of what a few batches show and what all runs show, the graver counts; of clean accuracy, all samples.
            if sign.name == "clean_at_chance" or _gravity(sign) >= _gravity(found.get(sign.name, sign)):
                found[sign.name] = sign
        robust = results.samples.loc[results.samples["target"] == target, "robust"]
        kept = weighed(without_advice(found.values()), left=int(robust.sum()))
        verdicts[target] = verdict_of(kept)
        rows += [{"target": target, **dataclasses.asdict(sign)} for sign in kept]
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


def taken_back(records: Sequence[TargetRecord], draws: Mapping[str, int]) -> dict[str, dict[str, int]]:
    """How many samples of each stochastic target, by context, were called broken and did not stay so."""
    taken: dict[str, dict[str, int]] = {}
    for record in records:
        if draws[record.target] > 1:
            taken.setdefault(record.target, {})[record.context] = record.taken_back
    return taken


def identity(
    protocol: Protocol, plans: Sequence[TargetPlan], seed: int, weights: Mapping[str, str]
) -> dict[str, Any]:  # fmt: skip
    """What the results depend on, and a key made of it.

    Args:
        protocol: that they are made under.
        plans: the targets.
        seed: of everything drawn.
        weights: a hash of each target's weights before it was asked about any batch, which it may adapt to.
    """
    clean = plans[0].clean
    if len({plan.clean.num_classes for plan in plans}) > 1:
        raise ValueError(
            "defense and fc must have the same classes, but have "
            + " and ".join(str(plan.clean.num_classes) for plan in plans)
        )
    samples, chosen, batch_plan = clean.samples, clean.chosen, clean.batch_plan
    plan = hashlib.sha256(b"".join(bytes_of(chosen[indices]) + b"|" for indices in batch_plan)).hexdigest()
    decisive: dict[str, Any] = {
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
        "data": {"name": samples.name, "sha256": samples.digest(), "n": len(chosen), **samples.about()},
        "targets": {
            plan.name: {
                "type": type(unwrap(plan.defense)).__name__,
                "sha256": weights[plan.name],
                "num_classes": plan.clean.num_classes,
                "runs": list(dict.fromkeys(run.name for runs in plan.runs.values() for run in runs)),
                "not_applicable": list(plan.surrogates.missing),
                "clean_sha256": plan.clean.digest(),
                "surrogates_sha256": plan.surrogates.sha256,
            }
            for plan in plans
        },
        "batches": {"sha256": plan, "count": len(batch_plan)},
        "msa_eval": __version__,
    }
    for one in plans:
        if one.starts:
            decisive["targets"][one.name]["continued_sha256"] = digest_of(one.starts, one.ratio)
    key = hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()
    dependent = {plan.name: plan.clean.batch_dependent for plan in plans}
    draws = {plan.name: plan.clean.draws for plan in plans}
    return {"key": key} | decisive | {"batch_dependent": dependent, "draws": draws}


def assembled(
    plans: Sequence[TargetPlan],
    about: Mapping[str, Any],
    evaluation: EvaluationState,
    signs: Mapping[str, Sequence[Sign]],
    records: Sequence[TargetRecord],
) -> Results:
    """The tables, with the verdict on each target."""
    more = _remarks_on(plans, rounds=about["search"]["precision"] == "bf16")
    more["begun_elsewhere"] = evaluation.store.environments
    run = {**about, "taken_back": taken_back(records, about["draws"])}
    run |= {name: value for name, value in more.items() if value}
    results = tabulate(records, run | {"verdict": "not audited"})
    if any(signs.values()) and plans[0].protocol.audited:
        results = judged(results, signs)
    results = incomplete(results, evaluation.failures)
    return dataclasses.replace(results, run=dict(results.run) | {"seconds": round(evaluation.store.seconds, 3)})


def _remarks_on(plans: Sequence[TargetPlan], *, rounds: bool) -> dict[str, Any]:
    """What ``run.json`` says of how each target was passed, and what was found of it."""
    found = {plan.name: plan.finding.about() for plan in plans if plan.finding is not None}
    return {
        "micro_batch": {plan.name: size for plan in plans if (size := parts_of(plan.defense)) is not None},
        "channels_last": [plan.name for plan in plans if passed_last(plan.defense)],
        "bf16_copy": [plan.name for plan in plans if plan.search.trunk is not None],
        "fp32_search": [plan.name for plan in plans if rounds and not plan.search.rough],
        "whole": why_whole({plan.name: plan.defense for plan in plans}),
        "found_surrogates": {name: tried for name, tried in found.items() if tried},
    }
