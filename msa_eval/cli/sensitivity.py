"""``msa-eval sensitivity``."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from msa_eval.cli import messages, options
from msa_eval.cli.lists import ListOf
from msa_eval.quantity import as_number

if TYPE_CHECKING:
    import pandas as pd

    from msa_eval.data import Samples
    from msa_eval.defense.architectures import Classifier
    from msa_eval.hpm.model import HPM
    from msa_eval.sensitivity.analysis import Analysis

PAPER, RESNET18 = "paper", "autoattack-resnet18"


@click.command()
@options.target
@options.data(required=False)
@click.option("--train", help="Training data: its class means take the place of the checkpoint's prototypes.")
@options.out
@click.option(
    "--prototypes",
    type=click.Choice(["hybrid", "global"]),
    help="Of an HPM checkpoint: what each batch is compared with (the default), or the data set's prototypes.",
)
@click.option("--gamma", type=click.FloatRange(0, 180), default=0.0, show_default=True,
              help="Angle between the features' change and the FC class vector, in degrees.")  # fmt: skip
@click.option("--step", type=options.NUMBER, default=1.0, show_default=True,
              help="Length of the features' change; both sensitivities are proportional to it.")  # fmt: skip
@click.option("--change", type=options.NUMBER, metavar="EPS",
              help="Measure what APGD on the FC head changes within EPS, in place of --gamma and --step.")  # fmt: skip
@options.limit
@click.option("--batch-size", type=click.IntRange(min=1), default=64, show_default=True, help="Largest batch.")
@click.option("--train-limit", type=click.IntRange(min=1), help="Use at most this many training images.")
@click.option("--attack", type=click.IntRange(min=1), metavar="N",
              help="Attack the FC head and a plain ℓ2 head over --eps too, on N samples (Figure 1).")  # fmt: skip
@click.option("--eps", type=ListOf(as_number, "numbers", "numbers such as 1/255,2/255"), show_default=True,
              default="1/510,1/255,2/255,4/255,8/255", help="Radii of --attack, in [0, 1] pixel units.")  # fmt: skip
@click.option(
    "--steps", type=click.IntRange(min=1), default=20, show_default=True, help="APGD steps of --attack and --change."
)
@options.seed
@options.quiet
def sensitivity(target: options.Chosen, data: options.Data, out: Path, **chosen: Any) -> None:
    """Measure how sensitive the FC head and the ℓ2 head of TARGET are to changes of their features.

    Writes tables and figures on the paper's sections 3.3 and 3.4: relative sensitivities S_c and sup S_d of every
    sample, how many samples fulfil the condition under which the FC head is the more sensitive one, and its expected
    share by the fitted angles and by isotropic ones.

    TARGET is what 'msa-eval evaluate' takes, with a fully connected head (give --train where it has no prototypes). It
    may also be 'autoattack-resnet18', the CIFAR-10 network that comes with AutoAttack (give --train), or 'paper', for
    Figures 2 and 3 of the paper from its formulas and its ResNet-50's angles, without data.
    """
    if target.word in (PAPER, RESNET18) and any(value for name, value in target.how.items() if name != "models"):
        raise ValueError(f"{target.word!r} is complete in itself; it takes no weights, head or code")
    if target.word == PAPER:
        if data.source or any(chosen[name] is not None for name in ("train", "attack", "change")):
            raise ValueError("'paper' stands for the paper's own figures, which need no data and no attack")
        click.echo(_paper(out))
        return
    if not data.source:
        raise ValueError("give the images to measure on with --data")
    samples = data.load(quiet=chosen["quiet"])
    training = _training(data, chosen.pop("train"), chosen.pop("train_limit"), chosen["seed"])
    click.echo(_measure(target, samples, training, out, **chosen))


def _training(data: options.Data, source: str | None, limit: int | None, seed: int) -> Samples | None:
    import torch

    if source is None:
        if limit is not None:
            raise ValueError("--train-limit applies to training data; give --train too")
        return None
    found = data.like(source, split="train")
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(seed))[:limit].sort().values
    return found.only(order)


def _paper(out: Path) -> str:
    """Write Figures 2 and 3 and their tables, and say what they show."""
    import numpy as np
    import pandas as pd

    from msa_eval.report.style import save
    from msa_eval.sensitivity.empirical import RESNET50_FC, RESNET50_L2, empirical_cdf
    from msa_eval.sensitivity.figures import DIMENSIONS, figure_2, figure_3
    from msa_eval.sensitivity.isotropic import isotropic_cdf

    x = np.linspace(0, 1, 201)
    table = pd.DataFrame({"x": x, **{f"isotropic_d{d}": isotropic_cdf(x, d) for d in DIMENSIONS}})
    table["empirical_resnet50"] = empirical_cdf(x, RESNET50_FC, RESNET50_L2)
    out.mkdir(parents=True, exist_ok=True)
    table.to_csv(out / "cdf.csv", index=False)
    save(figure_2(), out / "figure-2")
    save(figure_3(), out / "figure-3")
    shown = table[table["x"].isin((0.01, 0.05, 0.1, 0.5, 1.0))].set_index("x").T.mul(100)
    shown.columns.name = "|cos γ|"
    return (
        "how often Eq. 8 holds, in %, by |cos γ|\n"
        + shown.to_string(float_format="{:.2f}".format)
        + f"\n\ncdf.csv, figure-2 and figure-3 (PDF, SVG) in {out}"
    )


def _measure(
    target: options.Chosen,
    samples: Samples,
    train: Samples | None,
    out: Path,
    *,
    prototypes: Any,
    attack: int | None,
    eps: tuple[float, ...],
    steps: int,
    gamma: float,
    step: float,
    change: float | None,
    limit: int | None,
    batch_size: int,
    seed: int,
    quiet: bool,
) -> str:
    """Measure, write tables and figures, and say what they show."""
    from msa_eval.evidence.provenance import defense_hash, environment
    from msa_eval.report.style import save
    from msa_eval.sensitivity.analysis import analyse_model
    from msa_eval.sensitivity.curves import accuracy_curves
    from msa_eval.sensitivity.figures import figure_3
    from msa_eval.sensitivity.heads import classifier_of, plain_l2_head, with_dataset_prototypes

    if train is not None and prototypes is not None:
        raise ValueError("--train takes the place of the checkpoint's prototypes; leave --prototypes out")
    progress, around = messages.bars(quiet), environment("cpu")
    model, name, origin = _model(target, samples, quiet)
    if train is not None:
        model = plain_l2_head(classifier_of(model), train, progress=progress)
    found = analyse_model(
        model, samples, prototypes=prototypes, gamma=math.radians(gamma), step=step, eps=change,
        steps=steps, limit=limit, batch_size=batch_size, seed=seed, progress=progress,
    )  # fmt: skip
    curves = None
    if attack is not None:
        curves = accuracy_curves(
            with_dataset_prototypes(model), samples, eps=eps, steps=steps, limit=attack, batch_size=batch_size,
            seed=seed, progress=progress,
        )  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    tables = {"sensitivity": found.samples(), "sensitivity-summary": found.summary(), "cdf": found.cdf()}
    for stem, table in tables.items():
        table.to_csv(out / f"{stem}.csv", index=False)
    save(figure_3(found.fc, found.l2, measured=found), out / "figure-3")
    settings = {
        "prototypes": prototypes, "gamma": gamma, "step": step, "change": change, "limit": limit,
        "batch_size": batch_size, "attack": attack, "eps": eps, "steps": steps, "seed": seed,
    }  # fmt: skip
    about = {
        "checkpoint": name, **origin, "weights_sha256": defense_hash(model), "settings": settings,
        "data": {"name": samples.name, "n": len(samples), "sha256": samples.digest()},
        "train": None if train is None else {"name": train.name, "n": len(train), "sha256": train.digest()},
    }  # fmt: skip
    text = json.dumps(about | around, indent=2, ensure_ascii=False)
    (out / "sensitivity.json").write_text(text + "\n", encoding="utf-8")
    lines = [_table(found, f"{name} on {samples.name}", _direction(found, gamma, step, change))]
    if curves is not None:
        lines += ["", *_curves(curves, out, name)]
    written = "sensitivity.csv, sensitivity-summary.csv, cdf.csv, sensitivity.json and figure-3" + (
        ", curves.csv and figure-1" if attack else ""
    )
    return "\n".join([*lines, "", f"{written} (PDF, SVG) in {out}"])


def _model(target: options.Chosen, samples: Samples, quiet: bool) -> tuple[HPM | Classifier, str, dict[str, Any]]:
    """What is measured, its name, and how it was made.

    Raises:
        ValueError: when it can't be loaded, or has no fully connected head.
    """
    from msa_eval.defense.architectures import Classifier
    from msa_eval.hpm.model import HPM
    from msa_eval.sensitivity.heads import autoattack_resnet18

    if target.word == RESNET18:
        return autoattack_resnet18(), RESNET18, {}
    loaded = target.load(samples, quiet=quiet)
    if not isinstance(loaded.model, HPM | Classifier):
        raise ValueError(f"{loaded.word} has no fully connected head on a trunk; give a model that can be split")
    return loaded.model.eval().requires_grad_(False), loaded.word, {"target": dict(loaded.about)}


def _curves(curves: pd.DataFrame, out: Path, name: str) -> list[str]:
    from msa_eval.report.style import save
    from msa_eval.sensitivity.figures import figure_1

    curves.to_csv(out / "curves.csv", index=False)
    save(figure_1(curves, title=name), out / "figure-1")
    shown = curves.assign(eps=(255 * curves["eps"]).round(4), value=100 * curves["value"])
    wide = shown.pivot_table(index=["head", "run"], columns="eps", values="value", sort=False)
    wide = wide[sorted(wide.columns)].drop(index="clean", level="run")
    wide.columns.name = "255 ε"
    return ["accuracy in % under APGD; own: the paper's attack, worst_case: every iterate of every run",
            wide.to_string(float_format="{:.1f}".format, na_rep="-")]  # fmt: skip


def _direction(found: Analysis, gamma: float, step: float, change: float | None) -> str:
    if change is None:
        return f"γ = {gamma:g}°, ‖ε‖ = {step:g}"
    middle = found.summary()["cos_gamma"]
    return f"changes by APGD within {change:.4g}, median |cos γ| {middle[0]:.2f} (own class), {middle[1]:.2f} (others)"


def _table(found: Analysis, title: str, direction: str) -> str:
    """The summary as text."""
    summary = found.summary()
    rows = [["pairs", "n", "Eq. 8 holds", "S_c ≥ sup S_d", "S_c", "sup S_d", "θ_c", "θ_d"]]
    for row in summary.to_dict(orient="records"):
        rows.append([
            f"{row['pairs']} class" + ("es" if row["pairs"] != "own" else ""), str(row["n"]),
            f"{100 * row['condition']:.1f} %", f"{100 * row['more_sensitive']:.1f} %",
            f"{row['s_c']:.3g}", f"{row['s_d']:.3g}",
            f"{row['theta_c_mean']:.2f} ± {row['theta_c_sd']:.2f}°",
            f"{row['theta_d_mean']:.2f} ± {row['theta_d_sd']:.2f}°",
        ])  # fmt: skip
    wide = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        f"sensitivity of {title}: {len(found.labels)} samples, {found.sensitivity.s_c.shape[1]} classes, "
        f"{found.d} features; {direction}",
        "",
        *("  ".join(f"{v:<{w}}" if i == 0 else f"{v:>{w}}" for i, (v, w) in enumerate(zip(row, wide, strict=True)))
          for row in rows),
        "",
    ]  # fmt: skip
    last = summary.iloc[2]
    expected = (
        f", by the fitted angles (Eq. 13) {_percent(last['condition_empirical'])}, by isotropic ones (Eq. 29) "
        f"{_percent(last['condition_isotropic'])}"
    )
    measured = f"Eq. 8 over all pairs: measured {_percent(last['condition'])}"
    lines.append(measured + ("" if math.isnan(found.gamma) else expected))
    if undefined := int(last["undefined"]):
        lines.append(f"left out: {undefined} pairs with a zero vector, whose angles are undefined")
    lines += [f"no fit for {reason}" for reason in found.misfits]
    return "\n".join(lines)


def _percent(share: float) -> str:
    return "undefined" if math.isnan(share) else f"{100 * share:.2f} %"
