"""The paper's tables of robust accuracy: what it reports, and the same rows measured here.

References:
    Sensitivity as a Double-Edged Sword (Wang, 2026), arXiv:2606.01746, section 6.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from msa_eval.data import Samples
from msa_eval.engine.evaluate import evaluate
from msa_eval.errors import AttackError
from msa_eval.evidence.results import INCOMPLETE, Results
from msa_eval.hpm.model import HPM
from msa_eval.progress import Notify, Progress, silent, warn
from msa_eval.protocols.loading import load_protocol
from msa_eval.targets.loading import load_target
from msa_eval.targets.target import Target
from msa_eval.targets.zoos import full_name


class Reported(NamedTuple):
    """Accuracies in percent, as the paper prints them."""

    clean: float
    robust: float


@dataclass(frozen=True)
class PaperModel:
    """A row of the paper.

    Attributes:
        name: in robustbench.
        fc: what the paper reports of the model as it is.
        hpm: and of HPM on its trunk.
    """

    name: str
    fc: Reported
    hpm: Reported


TABLES: Mapping[str, tuple[PaperModel, ...]] = {
    "cifar10": (
        PaperModel("Cui2023Decoupled_WRN-28-10", Reported(92.9, 67.7), Reported(91.8, 69.8)),
        PaperModel("Wang2023Better_WRN-70-16", Reported(93.4, 71.3), Reported(92.0, 72.9)),
        PaperModel("Jia2022LAS-AT_70_16", Reported(85.3, 58.0), Reported(82.8, 63.6)),
        PaperModel("Bartoldson2024Adversarial_WRN-94-16", Reported(93.7, 74.1), Reported(91.9, 76.4)),
    ),
    "cifar100": (
        PaperModel("Cui2023Decoupled_WRN-28-10", Reported(73.1, 38.6), Reported(72.9, 39.4)),
        PaperModel("Wang2023Better_WRN-70-16", Reported(73.6, 42.7), Reported(73.6, 43.1)),
        PaperModel("Jia2022LAS-AT_34_20", Reported(65.9, 31.5), Reported(65.9, 33.3)),
    ),
    "imagenet": (
        PaperModel("Xu2024MIMIR_Swin-L", Reported(78.5, 58.3), Reported(78.0, 60.6)),
        PaperModel("Amini2024MeanSparse_ConvNeXt-L", Reported(77.8, 58.5), Reported(76.1, 60.5)),
        PaperModel("Singh2023Revisiting_ConvNeXt-T-ConvStem", Reported(72.8, 48.1), Reported(68.4, 49.6)),
        PaperModel("Mo2022When_ViT-B", Reported(68.0, 33.0), Reported(67.7, 35.7)),
    ),
}
"""By data set; robust accuracy at ℓ∞ 8/255, on ImageNet 4/255."""

MEASURED = ("clean", "paper", "worst_case")


def paper_table(
    dataset: str,
    samples: Samples,
    *,
    models: str | Path = "models",
    random_weights: bool = False,
    overrides: Mapping[str, Any] | None = None,
    seed: int = 0,
    device: str = "auto",
    out: str | Path | None = None,
    force: bool = False,
    progress: Progress = silent,
    notify: Notify = warn,
) -> pd.DataFrame:
    """Run the paper's protocol over the paper's models, as far as their weights are to be had.

    HPM heads are not published. One that was made by ``msa-eval finetune robustbench:NAME@DATASET`` is taken from
    ``NAME-hpm.safetensors`` beside the weights, and its FC head is evaluated with it.

    Args:
        dataset: ``cifar10``, ``cifar100`` or ``imagenet``.
        samples: its test set.
        models: robustbench's folder of weights; the files are in ``DATASET/Linf/NAME.pt`` there.
        random_weights: use randomly initialised models, to try the pipeline; the table says so.
        overrides: values to put in place of the protocol's, such as ``{"samples.limit": 64}``.
        seed: of every attack.
        device: where to compute, as for `msa_eval.evaluate`.
        out: a folder that gets ``paper_table.csv`` and a folder of results a model.
        force: write over other results there.
        progress: shows how far each run has come.
        notify: as for `msa_eval.evaluate`.

    Returns:
        one row per model and head (``fc``, ``hpm``): ``reported_clean``, ``reported_robust`` and the measured
        ``clean``, ``paper`` and ``worst_case`` with their 95 % intervals, all in percent, ``n``, ``verdict`` and a
        ``note`` that says why a row could not run. The verdict is ``incomplete`` where something failed, which the
        note names.

    Raises:
        ValueError: when there is no such table, or the protocol's overrides are wrong.
    """
    if dataset not in TABLES:
        raise ValueError(f"the paper has no table of {dataset!r}; available: {', '.join(TABLES)}")
    protocol = load_protocol(f"paper-{dataset}", overrides=overrides)
    rows: list[dict[str, Any]] = []
    for model in TABLES[dataset]:
        word = f"robustbench:{model.name}@{dataset}/Linf"
        checkpoint = Path(models) / dataset / "Linf" / f"{model.name}-hpm.safetensors"
        standing = checkpoint.is_file() and not random_weights
        make = f"msa-eval finetune {word} --data {dataset} --models {models} --out {checkpoint}"
        missing = f"no HPM head; make one with: {make}"
        try:
            if standing:
                target = load_target(checkpoint, samples)
                _check_made_from(checkpoint, target, word)
            else:
                target = load_target(word, samples, random_weights=random_weights, models=models)
            results = evaluate(
                target, samples, protocol=protocol, seed=seed, device=device, force=force, progress=progress,
                notify=notify,
                out=None if out is None else Path(out) / model.name,
            )  # fmt: skip
        except (ValueError, AttackError, MemoryError, RuntimeError, OSError) as error:  # out of memory is one of them
            reason = " ".join(str(error).split()) or type(error).__name__
            verdict = "" if isinstance(error, ValueError) else INCOMPLETE
            rows += [_row(model, head, note=reason, verdict=verdict) for head in ("fc", "hpm")]
        else:
            note = "random weights" if target.about.get("random_weights") else ""
            rows.append(_row(model, "fc", results, "fc" if standing else "defense", note))
            rows.append(_row(model, "hpm", results, "defense", note) if standing else _row(model, "hpm", note=missing))
        if out is not None:
            Path(out).mkdir(parents=True, exist_ok=True)
            pd.DataFrame(rows).to_csv(Path(out) / "paper_table.csv", index=False, lineterminator="\n")
    return pd.DataFrame(rows)


def _check_made_from(checkpoint: Path, target: Target, word: str) -> None:
    made_from = "" if target.blueprint is None else target.blueprint.architecture
    family, _, name = made_from.partition(":")
    if family != "robustbench" or full_name(name) != word:
        raise ValueError(f"{checkpoint.name} was made from {made_from}, not from {word}")
    if not isinstance(target.model, HPM):
        raise ValueError(f"{checkpoint.name} holds no HPM head; make one with msa-eval finetune {word}")


def _row(
    model: PaperModel, head: str, results: Results | None = None, target: str = "", note: str = "", verdict: str = ""
) -> dict[str, Any]:
    reported: Reported = getattr(model, head)
    row: dict[str, Any] = {
        "model": model.name, "head": head, "reported_clean": reported.clean, "reported_robust": reported.robust
    }  # fmt: skip
    row |= dict(_measured(results, target))
    if results is not None:
        verdict, reasons = _verdict(results, target)
        note = "; ".join([note] * bool(note) + reasons * (verdict == INCOMPLETE))
    return row | {"verdict": verdict, "note": note}


def _measured(results: Results | None, target: str) -> Iterator[tuple[str, float]]:
    """The measured numbers in percent; NaN where there are none."""
    found = {}
    if results is not None:
        chosen = results.summary[results.summary["target"] == target]
        found = {row["metric"]: row for row in chosen.to_dict(orient="records")}
    for metric in MEASURED:
        for column, name in (("value", metric), ("low", f"{metric}_low"), ("high", f"{metric}_high")):
            yield name, round(100 * found[metric][column], 4) if found else float("nan")
    yield "n", found["clean"]["n"] if found else 0


def _verdict(results: Results, target: str) -> tuple[str, list[str]]:
    """The verdict on a target's numbers, and the reasons for it."""
    verdicts = results.run.get("verdicts", {})
    found = verdicts[target] if target in verdicts else {"verdict": results.run["verdict"], "reasons": ()}
    return str(found["verdict"]), [str(reason) for reason in found["reasons"]]
