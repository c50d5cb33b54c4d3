"""What third-party attacks do and should not: the kinds of faults, and how each is reported."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace

TOLD = {
    "outside": "{count} points left the ball by up to {size:.3g} and were projected",
    "dtype": "{count} points came in {detail} and were converted to float32",
    "rounded": "{count} points were rounded to whole grey levels",
    "mode": "the model's training mode was changed in {count} batches and put back",
    "clean": "{count} samples came back clean, and the point shown with the highest loss is used instead",
    "unmoved": "{count} samples were never moved",
    "seed": "the global generators were seeded in {count} batches, ours are kept apart",
    "logits": "the logits handed out were overwritten in {count} batches, they are copies",
}
"""The kinds of faults, and how each is reported."""

LOUD = ("outside", "dtype", "rounded", "mode")
"""Those that a table tells; the others are an attack's habit, and change nothing here."""


class ExternalAttackError(RuntimeError):
    """An attack of other libraries failed in a way that must never read as robustness."""


@dataclass(frozen=True)
class Fault:
    """Something that an attack did and should not have.

    Attributes:
        kind: what.
        count: of how many samples, or in how many batches.
        size: how far, where that is a question.
        detail: what exactly.
    """

    kind: str
    count: int
    size: float = 0.0
    detail: str = ""


def describe_faults(faults: Iterable[Fault]) -> tuple[str, ...]:
    """Faults in words, each after its kind, those of one kind added up.

    >>> describe_faults([Fault("outside", 2, 0.5), Fault("outside", 1, 0.25)])
    ('outside: 3 points left the ball by up to 0.5 and were projected',)
    """
    merged: dict[tuple[str, str], Fault] = {}
    for fault in faults:
        one = merged.get((fault.kind, fault.detail), Fault(fault.kind, 0, 0.0, fault.detail))
        one = replace(one, count=one.count + fault.count, size=max(one.size, fault.size))
        merged[fault.kind, fault.detail] = one
    ordered = sorted(merged.values(), key=lambda fault: list(TOLD).index(fault.kind))
    return tuple(f"{fault.kind}: {TOLD[fault.kind].format(**asdict(fault))}" for fault in ordered)
