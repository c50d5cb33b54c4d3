"""Every sample's best point, broken or not: ``points.safetensors`` and its manifest ``points.csv``.

A point is that of the lowest margin of the sample's label over all verified batches; of a broken sample, one that
breaks it. The file is an archive (see `msa_eval.evidence.archive`) in which points are kept as they are, so that nobody
needs the clean images to read it. The manifest says what the target answered to each point as it is stored, beside its
companions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch import Tensor

from msa_eval.attacks.ball import Ball
from msa_eval.attacks.losses import margin_loss
from msa_eval.defense.contexts import CONTEXTS
from msa_eval.evidence import archive
from msa_eval.evidence.folder import POINTS, POINTS_TABLE
from msa_eval.evidence.proof import Proof
from msa_eval.hashing import file_hash

ADVERSARIAL, CLEAN, NONE, ANY = "adversarial", "clean", "none", "any"
"""Who sits beside a point: the images of an adversarial batch, the clean ones of its batch of the plan, nobody, or
whoever, for the target ignores companions. Where they were chosen, the manifest lists their indices."""

COLUMNS = (
    "target", "context", "index", "label", "prediction", "broken", "margin", "run", "batch", "position", "companions",
    "group",
)  # fmt: skip


class Kept(NamedTuple):
    """What is kept of every sample.

    Attributes:
        table: the manifest, one row per sample, target and context in which runs were made.
        written: what became of the file.
        image: the shape of an image.
    """

    table: pd.DataFrame
    written: archive.Written
    image: tuple[int, ...]

    def about(self) -> dict[str, Any]:
        """What ``run.json`` says of it."""
        counts = {"samples": self.written.samples, "left_out": self.written.left_out}
        return {"file": POINTS, "sha256": self.written.sha256, "bytes": self.written.bytes, **counts} | {
            "image": list(self.image)
        }


def write(
    path: str | Path,
    proofs: Iterable[Proof],
    clean_images: Callable[[int], Tensor],
    ball: Ball,
    *,
    answer: Callable[[Proof], tuple[Tensor, Tensor]],
    indices: Callable[[Proof], Tensor],
    batch_dependent: Mapping[str, bool],
    limit_bytes: int = archive.LIMIT_BYTES,
) -> Kept:
    """Write the best points, and ask the target once more about each as it is stored.

    Args:
        path: the file.
        proofs: each the best points of some samples.
        clean_images: the clean batch ``(B, C, H, W)`` of a number.
        ball: the perturbation set.
        answer: logits of a proof's positions ``(n, k)``, each in its batch, and their labels ``(n,)``.
        indices: of a proof's samples in the data set ``(n,)``.
        batch_dependent: by target, whether it looks at companions.
        limit_bytes: of the file; what would go over it is left out and counted.

    Raises:
        OSError: when the file can't be written.
    """
    proofs = list(proofs)
    runs = {
        (one.target, one.context, one.batch, place): run
        for one in proofs
        for place, run in zip(one.positions.tolist(), one.runs, strict=True)
    }
    written = archive.write(
        path, proofs, clean_images, ball, confirm=lambda proof: torch.ones_like(proof.positions, dtype=torch.bool),
        exact=set(batch_dependent), limit_bytes=limit_bytes,
    )  # fmt: skip
    rows = []
    for group, proof in enumerate(archive.read(path, clean_images, ball)):
        logits, y = (part.cpu() for part in answer(proof))
        rows += [
            (
                proof.target, proof.context, index, label, prediction, prediction != label, lead,
                runs[proof.target, proof.context, proof.batch, place], proof.batch, place, who, group,
            )
            for index, label, prediction, lead, place, who in zip(
                indices(proof).tolist(), y.tolist(), logits.argmax(dim=1).tolist(), (-margin_loss(logits, y)).tolist(),
                proof.positions.tolist(), _companions(proof, batch_dependent[proof.target]), strict=True,
            )
        ]  # fmt: skip
    table = pd.DataFrame(rows, columns=list(COLUMNS)).sort_values(["target", "context", "index"], ignore_index=True)
    return Kept(table, written, tuple(clean_images(0).shape[1:]))


def _companions(proof: Proof, batch_dependent: bool) -> list[str]:
    if proof.companions is not None:
        return [" ".join(map(str, row)) for row in proof.companions.tolist()]
    if proof.kind != "rows":
        return [ADVERSARIAL] * len(proof.positions)
    alone = not CONTEXTS[proof.context].has_companions
    return [ANY if not batch_dependent else NONE if alone else CLEAN] * len(proof.positions)


@dataclass(frozen=True)
class Adversarial:
    """Every sample's best point against one target in one context, broken or not.

    A point is what it is beside its companions. In ``joint`` that is an adversarial batch, which `batch` gives; in
    ``solo`` the clean images of its batch, and in ``composed`` clean images of the data set, whose indices the manifest
    lists.

    Attributes:
        x: the points ``(N, C, H, W)``, float32 in [0, 1].
        y: their labels ``(N,)``.
        manifest: one row per point, in the same order: ``index`` in the data set, ``label``, ``prediction`` of the
            target, whether it is ``broken`` there, the ``margin`` by which its label leads, the ``run`` that found it,
            its ``batch`` and ``position`` in the plan, its ``companions`` and the ``group``, which points of one
            adversarial batch share.
        levels: the number of levels of the grid that the points lie on; ``None``: they lie on none.
    """

    x: Tensor
    y: Tensor
    manifest: pd.DataFrame
    levels: int | None
    _opened: archive.Archive

    @property
    def groups(self) -> list[int]:
        """The numbers of the adversarial batches."""
        rows = self.manifest[self.manifest["companions"] == ADVERSARIAL]
        return sorted(set(rows["group"].tolist()))

    def batch(self, row: int) -> Tensor:
        """The adversarial batch in which a point lives ``(B, C, H, W)``, the point in its place.

        Args:
            row: of the manifest.

        Raises:
            ValueError: when its companions are others than those of an adversarial batch.
        """
        about = self.manifest.iloc[row]
        if about["companions"] != ADVERSARIAL:
            raise ValueError(f"the companions of sample {about['index']} are not adversarial but {about['companions']}")
        images = self.companions(int(about["group"])).clone()
        images[int(about["position"])] = self.x[row]
        return images

    def companions(self, group: int) -> Tensor:
        """The images of an adversarial batch ``(B, C, H, W)``; a point of its group takes its own place among them."""
        return self._opened[group].x


def read(
    folder: Path, run: Mapping[str, Any], ball: Ball, sizes: Mapping[int, int], *, target: str, context: str
) -> Adversarial:
    """Read the best points of the results in a folder; the files are taken for hostile.

    Args:
        folder: of the results.
        run: their ``run.json``.
        ball: of their protocol.
        sizes: of the batches of the plan, by number.
        target: ``defense`` or ``fc``.
        context: what the attacker controls.

    Raises:
        ValueError: when they were not kept, or are not those that ``run.json`` names.
    """
    opened, table = reopen(folder, run, ball, sizes)
    if not run.get("batch_dependent", {}).get(target, True) and len(table):
        held = table[table["target"] == target]
        context = str(held["context"].iloc[0]) if len(held) else context  # it answers the same in all
    manifest = table[(table["target"] == target) & (table["context"] == context)].reset_index(drop=True)
    if manifest.empty:
        raise ValueError(f"{folder} has no points of {target} in {context}")
    own: dict[tuple[int, int], Tensor] = {}
    for group in sorted(set(manifest["group"].tolist())):
        proof = opened[group]
        points = proof.own if proof.own is not None else proof.x if proof.kind == "rows" else proof.x[proof.positions]
        own |= {(group, place): point for place, point in zip(proof.positions.tolist(), points, strict=True)}
    wanted = list(zip(manifest["group"].tolist(), manifest["position"].tolist(), strict=True))
    if missing := [place for place in wanted if place not in own]:
        raise ValueError(f"{POINTS_TABLE} names point {missing[0]}, which {POINTS} does not hold")
    x = torch.stack([own[place] for place in wanted])
    if bool((x < 0).any()) or bool((x > 1).any()):
        raise ValueError(f"{POINTS} holds points outside [0, 1]")
    return Adversarial(x, torch.tensor(manifest["label"].tolist()), manifest, ball.levels, opened)


def reopen(
    folder: Path, run: Mapping[str, Any], ball: Ball, sizes: Mapping[int, int]
) -> tuple[archive.Archive, pd.DataFrame]:
    """The file of points and its manifest, as for `read`.

    Raises:
        ValueError: as for `read`.
    """
    about = run.get("points")
    if about is None:
        raise ValueError(
            f'{folder} holds no points of every sample; make the evaluation again with save_adversarial="all"'
        )
    path = folder / POINTS
    if not path.is_file() or file_hash(path) != about["sha256"]:
        raise ValueError(f"{POINTS}, which run.json names, is missing or does not match the hash there")
    shape = tuple(about["image"])
    if not shape or min(shape) < 1:
        raise ValueError(f"run.json states images of shape {shape} in points")

    def blank(number: int) -> Tensor:
        if number not in sizes:
            raise LookupError(number)
        return torch.zeros(1).expand(sizes[number], *shape)  # which takes no memory, whatever the file claims

    table = _manifest(folder / POINTS_TABLE, run)
    opened = archive.Archive(path, blank, ball)
    if len(table) and not 0 <= table["group"].min() <= table["group"].max() < len(opened):
        raise ValueError(f"{POINTS_TABLE} names batches that {POINTS} does not hold")
    return opened, table


def _manifest(path: Path, run: Mapping[str, Any]) -> pd.DataFrame:
    if not path.is_file() or file_hash(path) != run.get("files", {}).get(path.name):
        raise ValueError(f"{path.name}, which run.json names, is missing or does not match the hash there")
    kinds: dict[str, Any] = dict.fromkeys(("target", "context", "run", "companions"), str)
    kinds |= dict.fromkeys(("index", "label", "prediction", "batch", "position", "group"), "int64")
    try:
        table = pd.read_csv(path, dtype=kinds | {"broken": bool, "margin": float}, keep_default_na=False)
    except (ValueError, OverflowError, RecursionError) as error:
        raise ValueError(f"{path.name} is not a readable manifest") from error
    if missing := [column for column in COLUMNS if column not in table]:
        raise ValueError(f"{path.name} has no column {missing[0]}")
    return table
