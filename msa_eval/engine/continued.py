"""An evaluation that goes on from the points of another one, under a smaller radius, and leaves its own."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from msa_eval.hashing import bytes_of
from msa_eval.targets.weights import write_safetensors


@dataclass(frozen=True)
class Continued:
    """Points from which an evaluation starts one more run, after all others, and where it leaves its own.

    Attributes:
        points: by target and context, each sample's best point ``(N, C, H, W)``, in the order of the samples.
        ratio: by which perturbations are lengthened, as the radius has grown.
        out: a file for the best points of this evaluation.
    """

    points: Mapping[tuple[str, str], Tensor] = field(default_factory=dict)
    ratio: float = 1.0
    out: Path | None = None

    def of(self, target: str) -> Mapping[str, Tensor]:
        """Those of a target, by context."""
        return {context: points for (name, context), points in self.points.items() if name == target}

    def digest(self, target: str) -> str | None:
        """What the results on a target depend on; ``None`` for no points."""
        found = self.of(target)
        return digest_of(found, self.ratio) if found else None

    def leave(self, key: str, best: Mapping[tuple[str, str], Tensor]) -> None:
        """Write the best points of an evaluation with a key."""
        if self.out is not None:
            write_safetensors(self.out, {"/".join(name): points for name, points in best.items()}, {"key": key})


def digest_of(points: Mapping[str, Tensor], ratio: float) -> str:
    """SHA-256 of points by context, and of the ratio by which they are moved on."""
    parts = [f"{ratio!r}".encode(), *(bytes_of(points[context]) for context in sorted(points))]
    return hashlib.sha256(b"|".join(parts)).hexdigest()


def left_points(path: Path, key: str) -> dict[tuple[str, str], Tensor] | None:
    """The points that an evaluation of a key left in a file; ``None`` where that holds none of them."""
    try:
        with safe_open(path, framework="pt") as opened:
            if (opened.metadata() or {}).get("key") != key:
                return None
            names = [(name.partition("/")[0], name.partition("/")[2]) for name in opened.keys()]  # noqa: SIM118
            return {name: opened.get_tensor("/".join(name)) for name in names}
    except (SafetensorError, OSError):
        return None
