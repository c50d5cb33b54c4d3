"""Figure 1: accuracy against ε of an FC head and an ℓ2 head on one trunk.

References:
    Sensitivity as a Double-Edged Sword (Wang, 2026), arXiv:2606.01746, Figure 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from msa_eval.data import Samples
from msa_eval.engine.evaluate import evaluate
from msa_eval.evidence.metrics import rate
from msa_eval.evidence.results import Results
from msa_eval.hpm.model import HPM
from msa_eval.progress import Progress, silent

EPS = (0.5 / 255, 1 / 255, 2 / 255, 4 / 255, 8 / 255)
SURROGATES = ("ste", "fc-oracle")
"""The head's own gradient, and the FC head's."""
LOSSES = ("ce", "margin")
OWN = {"l2": "ste:apgd-ce:0", "fc": "fc-oracle:apgd-ce:0"}
"""The run of each head that climbs its own cross-entropy: the paper's attack."""


def accuracy_curves(
    head: HPM,
    samples: Samples,
    *,
    eps: Sequence[float] = EPS,
    steps: int = 20,
    surrogates: Sequence[str] = SURROGATES,
    losses: Sequence[str] = LOSSES,
    limit: int | None = None,
    batch_size: int = 64,
    seed: int = 0,
    device: str = "auto",
    progress: Progress = silent,
) -> pd.DataFrame:
    """Attack a plain ℓ2 head and the FC head beside it with APGD in Linf balls that grow.

    Every run stands on its own, and every iterate of every run is judged by the head it is to fool. For ε = 0 the rows
    hold the clean accuracy.

    Args:
        head: with ``global`` prototypes and its ``fc_target``; see `msa_eval.sensitivity.heads.plain_l2_head`.
        samples: test images and labels.
        eps: radii in [0, 1] pixel units, all above 0.
        steps: of each run.
        surrogates: through whose gradients the heads are attacked; ``ste`` is the head's own, and an FC head has
            ``fc-oracle`` alone.
        losses: of `msa_eval.attacks.losses.LOSSES`.
        limit: at most this many samples, drawn uniformly.
        batch_size: images a batch; both heads decide each image on its own.
        seed: of the attacks.
        device: where to compute, as for `msa_eval.evaluate`.
        progress: shows how far each run has come.

    Returns:
        one row per head, radius and run: ``head`` (``fc``, ``l2``), ``eps``, ``run``, ``value`` with its Wilson 95 %
        interval ``low`` and ``high``, ``n``. ``value`` of a run is the accuracy on the points of its highest loss, on
        samples that were right on clean images; ``any`` the accuracy over all its iterates. The runs ``own``
        (the paper's: the head's own gradient and cross-entropy) and ``worst_case`` (every iterate of every run)
        are the curves to draw.

    Raises:
        ValueError: when the head looks at the batch, or a radius is not positive.
    """
    if head.batch_dependent:
        raise ValueError("Figure 1 compares heads that decide each image alone; give one with global prototypes")
    if not eps or min(eps) <= 0:
        raise ValueError(f"expected radii above 0 (clean accuracy comes with them), but got {list(eps)}")
    rows: list[dict[str, Any]] = []
    for radius in sorted(set(eps)):
        results = evaluate(
            head,
            samples,
            protocol=_protocol(radius, steps, surrogates, losses, limit, batch_size),
            seed=seed,
            device=device,
            progress=progress,
        )
        rows += _rows(results, radius, with_clean=not rows)
    return pd.DataFrame(rows)


def _protocol(
    radius: float, steps: int, surrogates: Sequence[str], losses: Sequence[str], limit: int | None, batch_size: int
) -> Any:
    from msa_eval.protocols.loading import make_protocol

    content: dict[str, Any] = {
        "schema": 1,
        "name": "figure-1",
        "version": 1,
        "description": "APGD on an FC head and an ℓ2 head.",
        "threat": {"norm": "Linf", "eps": radius, "contexts": ["joint"]},
        "batches": {"size": batch_size, "seed": 0},
        "samples": {"seed": 0} | ({"limit": limit} if limit else {}),
        "attack": {"apgd": {"surrogates": list(surrogates), "losses": list(losses), "steps": steps, "restarts": 1}},
        "audit": {"samples": 0},
    }
    return make_protocol(content, source="figure-1")


def _rows(results: Results, radius: float, *, with_clean: bool) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for target, head in (("fc", "fc"), ("defense", "l2")):
        of_target = results.summary[results.summary["target"] == target].to_dict(orient="records")
        summary = {row["metric"]: row["value"] for row in of_target}
        attacks = results.attacks[results.attacks["target"] == target].to_dict(orient="records")
        runs = {str(row["run"]): (row["final"], row["any"]) for row in attacks}
        found = [(0.0, run, summary["clean"], np.nan) for run in ("clean", "own", "worst_case") if with_clean]
        found += [(radius, run, *both) for run, both in runs.items()]
        found += [(radius, "own", *runs[OWN[head]])] if OWN[head] in runs else []
        found.append((radius, "worst_case", summary["worst_case"], np.nan))
        n = of_target[0]["n"]
        for eps, run, value, iterates in found:
            low, high = rate(round(value * n), n)[1:3]
            rows.append({
                "head": head, "eps": eps, "run": run, "value": value, "any": iterates, "low": low, "high": high, "n": n,
            })  # fmt: skip
    return rows
