"""``msa-eval finetune``."""

from __future__ import annotations

import tempfile
from dataclasses import fields
from pathlib import Path
from typing import Any

import click

from msa_eval.cli import messages, options


@click.command()
@options.target
@options.data(help="Training data: digits, cifar10, cifar100, an .npz or .pt file, or a folder.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The checkpoint to write.")
@options.bare
@click.option("--epochs", type=click.IntRange(min=1), default=1, show_default=True)
@click.option("--batch-size", type=click.IntRange(min=2), default=64, show_default=True)
@click.option("--lr", type=options.NUMBER, default=5e-5, show_default=True)
@click.option(
    "--momentum", type=options.NUMBER, default=0.98, show_default=True, help="Momentum of the prototypes (λ)."
)
@click.option("--eps", type=options.NUMBER, default="8/255", show_default=True, help="Linf radius in pixel units.")
@click.option(
    "--steps", type=click.IntRange(min=1), default=10, show_default=True, help="Steps of the inner maximisation."
)
@click.option("--step-size", type=options.NUMBER, default=0.003, show_default=True)
@click.option("--limit", type=click.IntRange(min=1), help="Use at most this many samples, drawn uniformly.")
@options.seed
@options.device
@options.force
@options.quiet
def finetune(
    target: options.Chosen,
    data: options.Data,
    out: Path,
    limit: int | None,
    device: str,
    force: bool,
    quiet: bool,
    **described: Any,
) -> None:
    """Put an HPM head on TARGET and fine-tune it adversarially, the trunk frozen (the paper's section 6.2).

    TARGET is what 'msa-eval evaluate' takes, or a safetensors file with a bare state dict and --architecture.
    """
    from msa_eval.hpm.finetune import FinetuneSettings, history
    from msa_eval.hpm.finetune import finetune as finetune_classifier
    from msa_eval.targets.checkpoint import save_checkpoint
    from msa_eval.targets.target import Target

    if out.exists() and not force:
        raise ValueError(f"{out} exists; choose another file, or replace it with --force")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out.parent):
            pass
    except OSError as error:
        raise ValueError(f"{out} can't be written: {error.strerror}; choose another place") from error
    chosen = FinetuneSettings(
        **{field.name: described.pop(field.name) for field in fields(FinetuneSettings) if field.name in described}
    )
    samples = data.load(split="train", quiet=quiet)
    loaded = options.load_classifier(target, samples, **described, quiet=quiet)
    samples = options.drawn(samples, limit, seed=chosen.seed)
    hpm = finetune_classifier(loaded.classifier, samples, settings=chosen, device=device, progress=messages.bars(quiet))
    assert loaded.blueprint is not None  # or it had no classifier
    origin: dict[str, Any] = {"classifier": Path(target.word).name}
    if isinstance(loaded, Target):
        origin = {"classifier": loaded.word, "target": dict(loaded.about)}
    save_checkpoint(out, hpm, loaded.blueprint, history=origin | history(chosen, samples))
    click.echo(f"fine-tuned on {len(samples)} samples of {samples.name}; HPM checkpoint in {out}")
