"""Results with an archive, made the slow way: every batch that passed the trunk is decided again by hand."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from msa_eval import Results, Samples, WholeModel, evaluate
from msa_eval.evidence.archive import Written, write
from msa_eval.evidence.folder import ARCHIVE
from msa_eval.evidence.proof import Proof, cover
from msa_eval.judging.replay import Replay
from msa_eval.protocols import make_protocol


def make_content(**overrides: Any) -> Any:
    content = {
        "schema": 1, "audit.samples": 0, "name": "proofs", "version": 1, "description": "A test.",
        "threat": {"norm": "Linf", "eps": 0.05, "contexts": ["joint", "solo", "alone"]},
        "batches": {"size": 8},
        "attack": {"apgd": {"surrogates": ["fc-oracle", "soft-hybrid"], "losses": ["dlr"], "steps": 10}},
    }  # fmt: skip
    return make_protocol(content, overrides=overrides)


@contextmanager
def watching(module: nn.Module) -> Iterator[list[Tensor]]:
    """Collect every batch of images that a module is given."""
    seen: list[Tensor] = []
    hook = module.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].detach().clone()))
    try:
        yield seen
    finally:
        hook.remove()


def replays_of(results: Results, targets: dict[str, Any], samples: Samples) -> dict[str, Replay]:
    batch_plan = [torch.tensor(rows["index"].tolist()) for _, rows in results.batches.groupby("batch")]
    return {name: Replay(target, samples, batch_plan, device="cpu") for name, target in targets.items()}


def prove(results: Results, replays: dict[str, Replay], points: list[Tensor], protocol: Any) -> list[Proof]:
    """Proofs of all samples called broken, from the points that were seen."""
    claims = results.samples[results.samples["clean_correct"] & ~results.samples["robust"]]
    proofs = []
    for (target, context, number), rows in claims.groupby(["target", "context", "batch"]):
        replay = replays[target]
        clean = replay.images(number)
        due = torch.zeros(len(clean), dtype=torch.bool)
        due[rows["position"].tolist()] = True
        whole = context == "joint" and replay.batch_dependent
        candidates = []
        for x in points:
            if x.shape != clean.shape or float(protocol.ball.excess(x.detach(), clean).max()) > 0:
                continue
            proof = Proof(target, context, number, "batch" if whole else "rows", torch.arange(len(clean)), x)
            candidates.append((replay.breaks(proof) & due, proof))
        proofs += [proof.only(mask) for mask, proof in cover(candidates)]
    return proofs


def make_results(
    target: Any, samples: Samples, folder: Path, *, watched: nn.Module | None = None, **overrides: Any
) -> tuple[Results, Written]:
    """Evaluate a target and save its results with an archive."""
    protocol = make_content(**overrides)
    with watching(watched or target.trunk) as points:
        results = evaluate(target, samples, protocol=protocol)
    targets = {"defense": WholeModel(target) if watched is target else target}
    if hasattr(target, "fc_target"):
        targets["fc"] = target.fc_target
    replays = replays_of(results, targets, samples)
    proofs = prove(results, replays, points, protocol)
    written = write(
        folder / ARCHIVE, proofs, replays["defense"].images, protocol.ball,
        confirm=lambda proof: replays[proof.target].breaks(proof),
    )  # fmt: skip
    results = dataclasses.replace(results, run={**results.run, "adversarial": written.about(ARCHIVE)})
    results.save(folder)
    return results, written
