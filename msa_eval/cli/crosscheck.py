"""``msa-eval crosscheck``."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from msa_eval.cli import messages, options
from msa_eval.cli.evaluate import evaluate


@click.command()
@click.argument("results", type=click.Path(path_type=Path))
@options.optional_target
@options.data(required=False, help="The data that was evaluated; by default as the results' command line says.")
@click.option(
    "--peer",
    "peers",
    multiple=True,
    metavar="LIBRARY:ATTACK",
    help="An attack of autoattack, torchattacks or foolbox; may be repeated.",
)
@click.option("--surrogate", "surrogates", multiple=True, help="What the attacks are run through; may be repeated.")
@click.option("--on", "targets", multiple=True, type=click.Choice(["defense", "fc"]), help="One target only.")
@options.context
@click.option("--steps", type=click.IntRange(min=1), default=40, show_default=True, help="Steps of a run.")
@click.option(
    "--passes", type=click.IntRange(min=1), help="Repeat each attack until it made this many passes per sample."
)
@click.option("--out", type=click.Path(path_type=Path), help="The table's file; crosscheck.csv in RESULTS by default.")
@options.seed
@options.device
@options.quiet
def crosscheck(
    results: Path,
    target: options.Chosen,
    data: options.Data,
    peers: tuple[str, ...],
    surrogates: tuple[str, ...],
    targets: tuple[str, ...],
    context: tuple[str, ...],
    steps: int,
    passes: int | None,
    out: Path | None,
    seed: int,
    device: str,
    quiet: bool,
) -> None:
    """Run third-party attacks on the samples that RESULTS call robust, on the same target and batches.

    Lists every sample that one of them broke. TARGET and the data are by default those of the command line in run.json.
    Exit status 0 if nothing was broken and every attack finished, otherwise 1.
    """
    from msa_eval.evidence.folder import CROSSCHECK
    from msa_eval.evidence.results import Results
    from msa_eval.files import write_whole
    from msa_eval.report.text import render_crosscheck
    from msa_eval.studies.crosscheck import crosscheck as check

    recorded = _recorded(Results.load(results).run, results) if not data.source or not target.word else {}
    target = target if target.word else recorded["target"]
    try:
        samples = (data if data.source else recorded["data"]).load(quiet=quiet)
    except ValueError as error:
        if data.source:
            raise
        raise ValueError(f"{error}, which the results' command line names; give the data with --data") from error
    path = out or results / CROSSCHECK
    if path.is_dir() or path.suffix != ".csv":
        raise ValueError(f"{path} is not the name of a table; choose one that ends in .csv")
    found = check(
        results, target.load(samples, quiet=quiet), samples, peers=peers, surrogates=surrogates, contexts=context,
        targets=targets, steps=steps, passes=passes, seed=seed, device=device, progress=messages.bars(quiet),
    )  # fmt: skip
    click.echo(render_crosscheck(found))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, found.table.to_csv(index=False, lineterminator="\n").encode())
    click.echo(f"table in {path}")
    if not found.passed:
        sys.exit(1)


def _recorded(run: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Target and data as the command line in run.json has them.

    Raises:
        ValueError: when there is none, or it would import code, which only its user may ask for.
    """
    give = f"give TARGET and --data: msa-eval crosscheck {folder} TARGET --data DATA"
    words = [str(word) for word in run.get("command", [])]
    if "evaluate" not in words:
        raise ValueError(
            f"{folder} was not made by 'msa-eval evaluate', so its model and data are not recorded; {give}"
        )
    after = words[words.index("evaluate") + 1 :]
    try:
        context = evaluate.make_context("evaluate", after, resilient_parsing=True)
    except click.ClickException as error:
        raise ValueError(f"the command line in run.json is not readable ({error.format_message()}); {give}") from error
    word, how = context.params.get("target"), {name: context.params.get(name) for name in options.LOADING}
    if not word or not context.params.get("data"):
        raise ValueError(f"the command line in run.json names no target or no data; {give}")
    if options.imports_code(str(word)) or how.get("trunk"):
        raise ValueError(f"the target, {word}, is code, which is imported only where you name it; {give}")
    read = {name: context.params.get(name) for name in options.READING}
    return {"target": options.Chosen(str(word), how), "data": options.Data(str(context.params["data"]), read)}
