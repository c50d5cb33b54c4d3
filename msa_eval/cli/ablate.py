"""``msa-eval ablate``."""

from __future__ import annotations

from dataclasses import fields, replace
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from msa_eval.cli import messages, options

if TYPE_CHECKING:
    from msa_eval.hpm.finetune import FinetuneSettings

NAMES = ("full", "no-global", "average", "inner", "plain-l2", "plain-cosine")
"""Of the variants, in the order of `msa_eval.studies.ablation.VARIANTS`: the help lists them without torch."""


@click.command()
@options.target
@options.bare
@click.option("--train", required=True, help="Training data: digits, cifar10, cifar100, an .npz file or a folder.")
@options.data()
@options.protocol
@options.out
@click.option(
    "--variant",
    "variants",
    type=click.Choice(NAMES),
    multiple=True,
    help="Variants to evaluate besides full; all by default.",
)
@click.option(
    "--finetune", "given", type=options.ASSIGNMENT, multiple=True, metavar="KEY=VALUE",
    help="A setting of the fine-tuning: epochs, batch_size, lr, momentum, eps, steps, step_size, ...",
)  # fmt: skip
@click.option(
    "--train-limit", type=click.IntRange(min=1), help="Fine-tune on at most this many samples, drawn uniformly."
)
@options.limit
@options.context
@options.assignments
@options.seed
@options.device
@options.anew
@options.quiet
def ablate(
    target: options.Chosen,
    train: str,
    data: options.Data,
    protocol: str,
    out: Path,
    variants: tuple[str, ...],
    given: tuple[tuple[str, Any], ...],
    train_limit: int | None,
    limit: int | None,
    context: tuple[str, ...],
    assignments: tuple[tuple[str, Any], ...],
    seed: int,
    device: str,
    force: bool,
    quiet: bool,
    **described: Any,
) -> None:
    """Fine-tune and evaluate variants of HPM, all from TARGET (the paper's section 4.4).

    TARGET is what 'msa-eval finetune' takes. An HPM checkpoint stands for the classifier it was built on, and brings
    the settings of its fine-tuning, its seed too unless --seed is given; the paper's for CIFAR-10 are the default
    otherwise. Each variant's evidence goes to a folder of its own in OUT, with its checkpoint beside it. Stopped and
    started again with the same options, it goes on with the variants that are not done.
    """
    from msa_eval.report.text import render_ablation
    from msa_eval.studies.ablation import VARIANTS, settings_of
    from msa_eval.studies.ablation import ablate as ablate_classifier

    training = data.like(train, split="train", quiet=quiet)
    start = options.load_classifier(target, training, **described, quiet=quiet)
    settings = _changed(settings_of(start), dict(given))
    if click.get_current_context().get_parameter_source("seed") is not ParameterSource.DEFAULT:
        settings = replace(settings, seed=seed)
    try:
        ablation = ablate_classifier(
            start,
            options.drawn(training, train_limit, seed=seed),
            data.load(quiet=quiet),
            protocol=protocol,
            overrides=options.overrides(assignments, context=context, limit=limit),
            settings=settings,
            variants={name: VARIANTS[name] for name in variants or VARIANTS},
            seed=seed,
            device=device,
            out=out,
            force=force,
            progress=messages.bars(quiet),
            notify=messages.notes(quiet),
        )
    except KeyboardInterrupt as stop:
        raise type(stop)(
            f"interrupted; what is finished is in {out}, and the same command goes on from there"
        ) from None
    click.echo(render_ablation(ablation))
    click.echo(f"\nablation.csv, ablation.json, and each variant's evidence and checkpoint in {out}")
    options.check_complete(ablation.table, "variant")


def _changed(settings: FinetuneSettings, given: dict[str, Any]) -> FinetuneSettings:
    """Settings with some of them changed.

    Raises:
        ValueError: when there is no such setting, or its value is no number.
    """
    kinds = {field.name: type(getattr(settings, field.name)) for field in fields(settings) if field.name != "seed"}
    changed = {}
    for name, value in given.items():
        if name not in kinds:
            raise ValueError(f"--finetune: there is no setting {name!r}; available: {', '.join(kinds)}")
        try:
            number = Fraction(str(value))
            if kinds[name] is int and number.denominator != 1:
                raise ValueError
            changed[name] = kinds[name](number)
        except (ValueError, ZeroDivisionError, OverflowError):
            what = "a whole number" if kinds[name] is int else "a number or a fraction such as 8/255"
            raise ValueError(f"--finetune {name}: expected {what}, but got {value!r}") from None
    return replace(settings, **changed)
