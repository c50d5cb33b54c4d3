"""Tables for people, made from evidence alone."""

from __future__ import annotations

import pandas as pd

from msa_eval.protocols.evidence import Results


def render_table(results: Results) -> str:
    """The table of an evaluation as text: the FC head's column beside the defence's, in percent.

    Runs show ``final (any)``: right on the final batch, and on every iterate. The numbers below them come with their
    Wilson 95 % interval.
    """
    targets = sorted(results.summary["target"].unique(), key=["fc", "defense"].index)
    contexts = list(results.summary["context"].unique())
    return "\n\n".join([_title(results), *(_context_table(results, context, targets) for context in contexts)])


def _title(results: Results) -> str:
    run = results.run
    protocol = run["protocol"]
    changed = " (modified: " + ", ".join(f"{k}={v}" for k, v in protocol["overrides"].items()) + ")"
    return (
        f"protocol {protocol['name']} v{protocol['version']}{changed if protocol['modified'] else ''}, "
        f"{run['data']['name']}: {run['data']['n']} samples in {run['batches']['count']} batches, seed {run['seed']}"
    )


def _context_table(results: Results, context: str, targets: list[str]) -> str:
    summary = {
        (row["target"], row["metric"]): row
        for row in results.summary.to_dict(orient="records")
        if row["context"] == context
    }
    attacks = {
        (row["target"], row["run"]): row
        for row in results.attacks.to_dict(orient="records")
        if row["context"] == context
    }

    def number(target: str, metric: str) -> str:
        row = summary[target, metric]
        return f"{100 * row['value']:.1f} [{100 * row['low']:.1f}, {100 * row['high']:.1f}]"

    def shown(target: str, name: str) -> str:
        if (target, name) not in attacks:
            return "-"
        row = attacks[target, name]
        return f"{100 * row['final']:.1f} ({100 * row['any']:.1f})"

    rows = {"clean": [number(target, "clean") for target in targets]}
    for name in dict.fromkeys(run for _, run in attacks):
        rows[name] = [shown(target, name) for target in targets]
    for metric in ("paper", "realised", "worst_case"):
        rows[metric] = [number(target, metric) for target in targets]
    frame = pd.DataFrame.from_dict(rows, orient="index", columns=targets)
    return f"{context}: accuracy in %, runs as final (any), numbers with their 95 % interval\n{frame.to_string()}"
