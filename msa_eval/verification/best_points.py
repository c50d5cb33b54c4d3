"""The check of what was kept of every sample, broken or not."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from msa_eval.attacks.losses import margin_loss
from msa_eval.evidence.points import reopen
from msa_eval.evidence.proof import Proof
from msa_eval.verification.checks import none_of
from msa_eval.verification.referee import NEAR_TIE, Referee


def check_points(folder: Path, run: Mapping[str, Any], referee: Referee, samples: pd.DataFrame) -> tuple[str, None]:
    """Ask the real targets about every point that was kept, and hold the answers against what the manifest states.

    A sample that the results call robust may not be broken by its own best point, unless by a near tie; of a target
    that answers at random neither is compared.

    Args:
        folder: the results.
        run: their ``run.json``.
        referee: the targets.
        samples: rows of samples.csv.

    Raises:
        ValueError: when something does not hold.
    """
    batch_plan = next(iter(referee.replays.values())).batches
    sizes = {number: len(indices) for number, indices in enumerate(batch_plan)}
    opened, table = reopen(folder, run, referee.protocol.ball, sizes)
    robust = samples.set_index(["target", "context", "index"])["robust"].to_dict()
    columns = ["group", "position", "index", "prediction", "margin"]
    stated = {(row["group"], row["position"]): row for row in table[columns].to_dict(orient="records")}
    faults, count = [], 0
    for group, proof in enumerate(opened):
        rows = {place: stated.get((group, place), {}) for place in proof.positions.tolist()}
        count += len(rows)
        faults += list(_faults(proof, rows, referee, robust))
    none_of(faults)
    if count != len(table):
        raise ValueError(f"points.csv has {len(table)} rows, but there are {count} points")
    return f"{count} points in the ball, answered as stated", None


def _faults(
    proof: Proof, rows: Mapping[int, Mapping[Hashable, Any]], referee: Referee, robust: Mapping[Any, bool]
) -> Iterator[str]:
    where = f"{proof.target}, {proof.context}, batch {proof.batch}"
    replay = referee.replays.get(proof.target)
    if replay is None:
        yield f"{where}: there is no such target"
        return
    if (misplaced := referee.misplaced(proof, replay)) is not None:
        yield f"{where}: {misplaced}"
        return
    logits, y = replay.logits(proof), replay.labels(proof)
    margins, size = -margin_loss(logits, y), logits.abs().amax(dim=1)
    indices = replay.batches[proof.batch][proof.positions].tolist()
    found = zip(rows.items(), indices, logits.argmax(dim=1).tolist(), margins.tolist(), size.tolist(), strict=True)
    for (_, row), index, prediction, margin, scale in found:
        if row.get("index") != index:
            yield f"{where}: points.csv does not say what came of sample {index}"
        elif replay.draws == 1 and abs(margin) >= NEAR_TIE * scale:
            if row["prediction"] != prediction or abs(row["margin"] - margin) > 1e-3 * scale:
                answer = f"{prediction} with margin {margin:.4g}"
                yield f"{where}: sample {index} is answered {answer}, not as points.csv says"
            elif margin < 0 and robust.get((proof.target, proof.context, index)):
                yield f"{where}: its own best point breaks sample {index}, which samples.csv calls robust"
