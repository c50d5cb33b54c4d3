"""How an evaluation is carried out, and where its results go: what `evaluate` takes one by one, in two parts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from msa_eval.engine.executors import Executor


@dataclass(frozen=True)
class Execution:
    """How an evaluation is carried out; `evaluate` describes each.

    Attributes:
        device: where to compute.
        micro_batch: how many images go through the trunk at once; ``None``: as many as fit.
        precision: that a search passes its points in.
        deterministic: whether only deterministic algorithms are used.
        executor: makes the runs.
    """

    device: str
    micro_batch: int | None
    precision: str
    deterministic: bool
    executor: Executor

    def about(self) -> dict[str, Any]:
        """What an unfinished evaluation has to share with the one that goes on from it."""
        return {
            "micro_batch": self.micro_batch, "precision": self.precision, "deterministic": self.deterministic,
        }  # fmt: skip


@dataclass(frozen=True)
class Output:
    """Where the results go, and what is kept beside the tables; `evaluate` describes each.

    Attributes:
        folder: of the results; ``None``: they are returned alone.
        force: whether to start anew there.
        save_adversarial: whether adversarial batches are kept; with ``"all"``, every other sample's best point too.
        gallery: whether pictures are kept.

    Raises:
        ValueError: when adversarial batches are to be kept, and there is no folder.
    """

    folder: Path | None
    force: bool
    save_adversarial: bool | str
    gallery: bool

    def __post_init__(self) -> None:
        if self.save_adversarial not in (False, True, "all"):
            raise ValueError(f'expected save_adversarial to be True, False or "all", but got {self.save_adversarial!r}')
        if self.save_adversarial and self.folder is None:
            raise ValueError("save_adversarial keeps adversarial batches beside the tables; give a folder as out")

    @property
    def keep(self) -> bool:
        """Whether an adversarial batch is kept for every broken sample."""
        return bool(self.save_adversarial)

    @property
    def every(self) -> bool:
        """Whether every other sample's best point is kept too."""
        return self.save_adversarial == "all"

    @property
    def show(self) -> bool:
        """Whether pictures are kept."""
        return self.gallery and self.folder is not None

    def about(self) -> dict[str, Any]:
        """What an unfinished evaluation has to share with the one that goes on from it."""
        return {"save_adversarial": self.save_adversarial, "gallery": self.show}
