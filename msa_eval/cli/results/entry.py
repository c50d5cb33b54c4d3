"""``msa-eval entry``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from msa_eval.cli import options


@click.command()
@click.argument("results", type=click.Path(path_type=Path))
@click.option("--target", default="defense", show_default=True, help="Target whose numbers are used: defense or fc.")
@click.option("--context", help="Context whose numbers are used; the first one by default.")
@click.option(
    "--about", type=options.ASSIGNMENT, multiple=True, metavar="KEY=VALUE",
    help="A field that only the author knows: name, authors, link, venue, architecture, additional_data, ...",
)  # fmt: skip
@click.option("--out", type=click.Path(path_type=Path), help="The .json file to write; printed by default.")
@options.force
def entry(
    results: Path,
    target: str,
    context: str | None,
    about: tuple[tuple[str, Any], ...],
    out: Path | None,
    force: bool,
) -> None:
    """Write RESULTS as an entry for RobustBench's leaderboard.

    It belongs in RobustBench's folder model_info/DATASET/NORM. The worst case is given under "external", as figures
    of adaptive evaluations do there; AutoAttack's own number is not claimed.
    """
    from msa_eval.evidence.results import Results
    from msa_eval.report.entry import robustbench_entry

    made = robustbench_entry(Results.load(results), target=target, context=context, about=dict(about))
    text = json.dumps(made, indent=2, ensure_ascii=False)
    if out is None:
        click.echo(text)
        return
    if out.exists() and not force:
        raise ValueError(f"{out} exists; choose another file, or replace it with --force")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text + "\n", encoding="utf-8")
    click.echo(f"RobustBench entry in {out}")
