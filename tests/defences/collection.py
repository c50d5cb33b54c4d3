"""All defences with known answers, and the numbers known of them."""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from . import batches, colour, honest, masked_features, masked_logits, masked_pixels, stochastic
from .adaptive import SEED
from .known import Known

ALL: dict[str, Known] = {
    known.name: known
    for module in (honest, masked_pixels, masked_features, masked_logits, batches, stochastic, colour)
    for known in module.DEFENCES
}

TRUTH = Path(__file__).with_name("truth.csv")
"""A row a defence: how many samples are left, which, and by what attack."""


@dataclass(frozen=True)
class Truth:
    """What is known of a defence's number.

    Attributes:
        name: of the defence.
        samples: N.
        left: indices of the samples that nothing known breaks; in closed form, that nothing breaks.
        by: ``closed form``; or ``attack`` for the one written for it, ``msa`` for the engine, and their seeds.
    """

    name: str
    samples: int
    left: tuple[int, ...]
    by: str


def read(path: Path = TRUTH) -> dict[str, Truth]:
    """The numbers on file."""
    if not path.exists():
        return {}
    with path.open(newline="") as file:
        return {
            row["defence"]: Truth(row["defence"], int(row["samples"]), tuple(map(int, row["which"].split())), row["by"])
            for row in csv.DictReader(file)
        }


def write(truths: dict[str, Truth], path: Path = TRUTH) -> None:
    """Put them on file, in the collection's order."""
    with path.open("w", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(("defence", "context", "norm", "eps", "samples", "left", "by", "which"))
        for name, known in ALL.items():
            if name in truths:
                of = truths[name]
                rows.writerow((name, known.context, known.norm, known.eps, of.samples, len(of.left), of.by,
                               " ".join(map(str, of.left))))  # fmt: skip


def attacked(known: Known, seed: int = 0) -> Truth:
    """The number by the attack written for it, found anew."""
    held = SEED.set(seed)
    left = known.left()
    SEED.reset(held)
    return Truth(
        known.name,
        len(left),
        tuple(left.nonzero().flatten().tolist()),
        "closed form" if known.exact else f"attack {seed}",
    )


def joined(held: Truth, found: Truth) -> Truth:
    """What is known of one defence by both; a closed form stays what it is."""
    if held.by == "closed form":
        return held
    left = tuple(sorted(set(held.left) & set(found.left)))
    if left == held.left:
        return held
    return Truth(held.name, held.samples, left, f"{held.by}, {found.by}")


def chosen(names: Sequence[str]) -> list[Known]:
    """The defences of these names, or all whose images are there.

    Raises:
        ValueError: when there is none of a name.
    """
    if unknown := sorted(set(names) - set(ALL)):
        raise ValueError(f"there is no defence {', '.join(unknown)}; expected some of {', '.join(ALL)}")
    there = "MSA_EVAL_SHARED" in os.environ
    return [ALL[name] for name in names] if names else [known for known in ALL.values() if there or not known.shared]


torch.set_num_threads(1)  # the nets are so small that more threads wait for each other
