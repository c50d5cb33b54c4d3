"""The results of an evaluation on disk: tables, archive and gallery."""

from __future__ import annotations

import dataclasses
import tempfile
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from msa_eval.attacks.ball import Ball
from msa_eval.auditing.audit import Sign
from msa_eval.auditing.rules import unconfirmed_breaks
from msa_eval.engine.target_plan import TargetPlan
from msa_eval.evidence import archive, gallery, points
from msa_eval.evidence.folder import ARCHIVE, NEW_ARCHIVE, NEW_POINTS
from msa_eval.evidence.gallery import Exhibit
from msa_eval.evidence.proof import Proof
from msa_eval.evidence.results import INCOMPLETE, Results
from msa_eval.judging.replay import Replay
from msa_eval.progress import Progress


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


def _confirmed(results: Results, written: archive.Written) -> Results:
    """Add to the audit whether all breaks were confirmed; a target whose were not is sound no more."""
    for target in results.audit["target"].unique() if len(results.audit) else ():
        rows = results.samples[results.samples["target"] == target]
        sign = unconfirmed_breaks(
            sum(one.target == target for one in written.unconfirmed),
            int((rows["clean_correct"] & ~rows["robust"]).sum()),
            left_out=written.left_out if target == "defense" else 0,
        )
        results = _with_sign(results, target, sign)
    return results


def _with_sign(results: Results, target: str, sign: Sign) -> Results:
    """Add a sign to the audit of a target that is judged already."""
    row = pd.DataFrame([{"target": target, **dataclasses.asdict(sign)}]).rename(columns={"name": "sign"})
    results = dataclasses.replace(results, audit=pd.concat([results.audit, row], ignore_index=True))
    verdicts = dict(results.run["verdicts"])
    held = verdicts[target]
    if not sign.fired or sign.severity == "note":
        return results
    ranks = ("sound", "suspect", "unreliable", INCOMPLETE)
    graver = max(held["verdict"], sign.severity, key=ranks.index)
    verdicts[target] = {"verdict": graver, "reasons": (*held["reasons"], sign.reason)}
    named = results.summary["target"] == target
    summary = results.summary.assign(
        verdict=results.summary["verdict"].mask(named, graver),
        reasons=results.summary["reasons"].mask(named, "; ".join(verdicts[target]["reasons"])),
    )
    first = {"verdict": graver} if target == "defense" and results.run["verdict"] != INCOMPLETE else {}
    return dataclasses.replace(results, summary=summary, run=dict(results.run) | {"verdicts": verdicts} | first)


def pictures(exhibits: Sequence[Exhibit]) -> bytes | None:
    """The gallery's content; where it can't be made, the evaluation is worth no less."""
    try:
        return gallery.pack(exhibits) if exhibits else None
    except Exception as error:
        warnings.warn(f"no gallery could be made of what was broken: {error}", stacklevel=2)
        return None


def save(write: Callable[[Path], Results], out: Path) -> Results:
    """Write the results, and where that fails now, after all the work, write them to a temporary folder instead."""
    try:
        return write(out)
    except OSError as error:
        rescue = Path(tempfile.mkdtemp(prefix="msa-eval-"))
        write(rescue)
        raise OSError(error.errno, f"{error.strerror}; the results are in {rescue} instead") from error


def write_results(
    out: Path,
    *,
    results: Results,
    force: bool,
    plans: Sequence[TargetPlan],
    proofs: Sequence[Proof] | None,
    others: Sequence[Proof] | None,
    pictures: bytes | None,
    progress: Progress,
) -> Results:
    """Write the tables and, where they are kept, the adversarial batches, each replayed on its target first.

    Args:
        out: the folder.
        results: what is written.
        force: whether other results there are replaced.
        plans: the targets.
        proofs: adversarial batches for all that is broken; ``None`` where they are not kept.
        others: where every other sample came nearest to falling; ``None`` where none is kept.
        pictures: the content of the gallery.
        progress: shows how far it has come.
    """
    results = dataclasses.replace(results, folder=out)
    if proofs is None:
        results.save(out, force=force, gallery=pictures)
        return results
    replays = {plan.name: plan.replay for plan in plans}
    path, ball = out / NEW_ARCHIVE, plans[0].protocol.ball
    try:
        written = archive.write(
            path, progress(proofs, "writing proofs"), next(iter(replays.values())).images, ball,
            confirm=lambda proof: replays[proof.target].breaks(proof),
            exact={name for name, replay in replays.items() if replay.draws > 1},
        )  # fmt: skip
        results = dataclasses.replace(results, run=dict(results.run) | {"adversarial": written.about(ARCHIVE)})
        results = _confirmed(results, written)
        kept = None
        if others is not None:
            kept = _best_points(out / NEW_POINTS, progress([*proofs, *others], "writing points"), replays, ball)
            results = dataclasses.replace(results, run=dict(results.run) | {"points": kept.about()})
        results.save(
            out, force=force, archive=path, gallery=pictures,
            points=None if kept is None else (out / NEW_POINTS, kept.table),
        )  # fmt: skip
    finally:
        path.unlink(missing_ok=True)
        (out / NEW_POINTS).unlink(missing_ok=True)
    return results


def _best_points(path: Path, proofs: Iterable[Proof], replays: Mapping[str, Replay], ball: Ball) -> points.Kept:
    """Write every sample's best point, each judged once more as it is stored."""
    first = next(iter(replays.values()))
    return points.write(
        path, proofs, first.images, ball,
        answer=lambda proof: (replays[proof.target].logits(proof), replays[proof.target].labels(proof)),
        indices=lambda proof: first.batches[proof.batch][proof.positions],
        batch_dependent={name: replay.batch_dependent for name, replay in replays.items()},
    )  # fmt: skip
