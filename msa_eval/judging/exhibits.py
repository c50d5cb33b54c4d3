"""The choice of broken samples to be shown as pictures, with the target's answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from msa_eval.evidence.gallery import CHANNELS, LARGEST_BYTES, LIMIT, Exhibit
from msa_eval.evidence.proof import Proof
from msa_eval.judging.replay import Replay

POOL = 64
"""Batches are looked through until so many broken samples are found to choose from."""


HEADER_BYTES = 10_000
"""So much of it is left for what is no tensor."""


@dataclass(frozen=True)
class Candidate:
    """A broken sample that may be shown.

    Attributes:
        proof: the batch that breaks it, and it alone.
        label: its class.
        run: the first that broke it.
        clean: its image ``(C, H, W)``.
        clean_logits: the target's answer to it ``(k,)``.
    """

    proof: Proof
    label: int
    run: str
    clean: Tensor
    clean_logits: Tensor


def spread(labels: Sequence[int], runs: Sequence[str], limit: int = LIMIT) -> list[int]:
    """Choose places so that classes, and then runs, come up as evenly as they can; the earlier place wins a tie.

    >>> spread([3, 3, 5, 5, 7], ["a", "a", "a", "b", "a"], limit=4)
    [0, 3, 4, 1]
    """
    of_class: Counter[int] = Counter()
    of_run: Counter[str] = Counter()
    left = list(range(len(labels)))
    chosen: list[int] = []
    while left and len(chosen) < limit:
        place = min(left, key=lambda i: (of_class[labels[i]], of_run[runs[i]], i))
        left.remove(place)
        chosen.append(place)
        of_class[labels[place]] += 1
        of_run[runs[place]] += 1
    return chosen


def exhibit(candidates: Sequence[Candidate], replay: Replay) -> list[Exhibit]:
    """Choose from the candidates, and ask the target once more about each; what does not break again is not shown.

    Nor are images that are no pictures (of other than one or three channels), or more than fit into the file.
    """
    if not candidates or candidates[0].clean.shape[0] not in CHANNELS:
        return []
    each = 3 * candidates[0].clean.numel() + 8 * candidates[0].clean_logits.numel()
    limit = min(LIMIT, (LARGEST_BYTES - HEADER_BYTES) // each)
    chosen = spread([one.label for one in candidates], [one.run for one in candidates], limit)
    shown = []
    for one in (candidates[place] for place in chosen):
        proof = one.proof
        logits = replay.logits(proof)[0].float().cpu()
        if int(logits.argmax()) == one.label:
            continue
        at = int(proof.positions[0])
        point = proof.x[0] if proof.kind == "rows" else proof.x[at] if proof.own is None else proof.own[0]
        clean = one.clean.detach().cpu().float()
        shown.append(
            Exhibit(
                proof.target, proof.context, int(replay.batches[proof.batch][at]),
                clean.mul(255).round().clamp(0, 255).byte().numpy(), (point.cpu() - clean).half().numpy(),
                one.clean_logits.detach().cpu().float().numpy(), logits.numpy(),
            )
        )  # fmt: skip
    return shown
