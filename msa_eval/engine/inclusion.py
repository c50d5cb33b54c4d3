"""What is broken in one context is broken in every context that includes it: the evidence is carried over."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from msa_eval.defense.contexts import CONTEXTS, own_companions
from msa_eval.engine.schedule import OWN
from msa_eval.evidence.proof import Proof
from msa_eval.evidence.records import CARRIED, TargetRecord


def carry_over(records: Sequence[TargetRecord]) -> list[TargetRecord]:
    """The records of a target in all contexts, each with what was broken in the contexts that it includes.

    A context gets a run more for each context from which something is carried over: a run that made no pass, and whose
    points are that context's.
    """
    held = {record.context: record for record in records}
    found = []
    for record in records:
        narrower = [held[name] for name in CONTEXTS[record.context].includes if name in held]
        found.append(functools.reduce(_with_breaks_of, narrower, record))
    return found


def _with_breaks_of(wide: TargetRecord, narrow: TargetRecord) -> TargetRecord:
    carried = wide.unbroken & narrow.any_broken.any(axis=0)
    if not carried.any():
        return wide
    first, places = narrow.any_broken.argmax(axis=0), np.arange(len(carried))
    row = {
        "surrogate_fooled": ~wide.correct,
        "final_broken": np.zeros_like(carried),
        "any_broken": carried,
        "first_iterate": np.where(carried, narrow.first_iterate[first, places], 0),
        "min_margin": np.where(carried, np.fmin.reduce(narrow.min_margin, axis=0), wide.clean_margin),
        "perturbation": np.where(carried, narrow.perturbation[first, places], 0),
    }
    attack = f"{CARRIED}{narrow.context}"
    about = {
        "run": f"target:{attack}:0", "surrogate": "target", "attack": attack, "loss": OWN, "restart": 0,
        "forwards": 0, "backwards": 0, "decisions": 0, "seconds": 0.0, "notes": None,
    }  # fmt: skip
    arrays: dict[str, Any] = {
        name: np.vstack([getattr(wide, name), values.astype(getattr(wide, name).dtype)]) for name, values in row.items()
    }
    runs = pd.DataFrame([*wide.runs.to_dict(orient="records"), about])
    return dataclasses.replace(wide, runs=runs, **arrays)


def carried_proofs(proofs: Sequence[Proof], records: Sequence[TargetRecord], batches: Sequence[Tensor]) -> list[Proof]:
    """The proofs of what was carried over, as proofs of the contexts that it was carried to.

    Args:
        proofs: of all targets and contexts.
        records: with what was carried over.
        batches: the plan: indices into the data set in batch order, a tensor a batch.
    """
    return [
        proof.only(keep)
        for record in records
        for place, run in enumerate(record.runs["run"])
        if (narrow := _origin(str(record.runs["attack"].iloc[place]))) is not None
        for proof in (
            _in_context(proof, record.context, str(run), batches[proof.batch])
            for proof in proofs
            if (proof.target, proof.context) == (record.target, narrow)
        )
        if bool((keep := _positions(proof, record, place)).any())
    ]


def not_carried(others: Sequence[Proof], carried: Sequence[Proof]) -> list[Proof]:
    """Of the best points of unbroken samples, those of samples for which no proof was carried over."""
    found = []
    for other in others:
        keep = torch.ones(len(other.positions), dtype=torch.bool)
        for proof in carried:
            if (proof.target, proof.context, proof.batch) == (other.target, other.context, other.batch):
                keep &= ~torch.isin(other.positions.cpu(), proof.positions.cpu())
        if bool(keep.any()):
            found.append(other.only(keep.to(other.positions.device)))
    return found


def _origin(attack: str) -> str | None:
    """The context from which a run carries breaks over; ``None`` for every other run."""
    return attack.removeprefix(CARRIED) if attack.startswith(CARRIED) else None


def _in_context(proof: Proof, context: str, run: str, indices: Tensor) -> Proof:
    """A proof of single rows among the clean images of their batch, as one of a context that includes it."""
    companions = None
    if CONTEXTS[context].chooses_companions:
        companions = indices[own_companions(len(indices))][proof.positions.cpu()]
    return dataclasses.replace(
        proof, context=context, companions=companions, runs=(run,) * len(proof.positions) if proof.runs else ()
    )


def _positions(proof: Proof, record: TargetRecord, place: int) -> Tensor:
    """Which of a proof's samples a run broke ``(n,)``."""
    broken = record.any_broken[place] & (record.batch == proof.batch)
    return torch.isin(proof.positions, torch.from_numpy(record.position[broken]).to(proof.positions.device))
