"""Tables of plain text, made from evidence alone."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

import pandas as pd

from msa_eval.attacks.attacked_batch import gradient_free
from msa_eval.attacks.external.faults import LOUD
from msa_eval.auditing.rules import NO_TRANSFER
from msa_eval.evidence.metrics import METRICS
from msa_eval.evidence.results import Results
from msa_eval.report import frames
from msa_eval.report.statements import statements
from msa_eval.studies.ablation import Ablation
from msa_eval.studies.crosscheck import Crosscheck

WIDTH = 100
"""Columns of a table in a terminal."""

_Rows = Mapping[tuple[str, str], Mapping[Hashable, Any]]
"""Rows of `attacks` by target and run."""


def render_table(results: Results, *, all_runs: bool = False) -> str:
    """The tables of an evaluation as text, at most 100 columns wide: the FC head beside the defence, in percent.

    Runs show ``final (any)``: right on the final batch, and on every iterate; and what they cost, in forward passes of
    the trunk per sample and in seconds. Numbers come with their Wilson 95 % interval. What is to be quoted comes last.

    Args:
        results: of an evaluation.
        all_runs: whether runs that broke no new sample have a line each; by default they share one.
    """
    targets = sorted(results.summary["target"].unique(), key=["fc", "defense"].index)
    contexts = list(results.summary["context"].unique())
    tables = [_context_table(results, context, targets, all_runs=all_runs) for context in contexts]
    said = [line for text in statements(results) for line in _quoted(text)]
    return "\n\n".join([_title(results), *tables, _verdicts(results, targets), "\n".join(said)])


def _quoted(text: str) -> list[str]:
    """A sentence in marked lines; a number stays beside its unit, and an interval whole."""
    held = re.sub(r" (?=%)|(?<=\[[\d.]{3},) |(?<=\[[\d.]{4},) ", "\N{NO-BREAK SPACE}", text)
    lines = textwrap.wrap(held, WIDTH, initial_indent="> ", subsequent_indent="> ")
    return [line.replace("\N{NO-BREAK SPACE}", " ") for line in lines]


def _verdicts(results: Results, targets: list[str]) -> str:
    """The verdict on each target's numbers with its reasons, and what else the audit noticed."""
    if not len(results.audit):
        return "\n".join([f"verdict: {results.run['verdict']}", *_failures(results, targets)])
    lines = []
    for target in reversed(targets):
        lines.append(f"verdict on {target}: {results.run['verdicts'][target]['verdict']}")
        lines += _failures(results, [target])
        fired = results.audit[(results.audit["target"] == target) & results.audit["fired"]]
        untried = results.audit[(results.audit["target"] == target) & (results.audit["reason"] == NO_TRANSFER)]
        lines += ["  " + NO_TRANSFER] if len(untried) else []
        for row in fired.to_dict(orient="records"):
            described = f"{row['severity']}: {row['reason']} [{row['sign']}]"
            lines += textwrap.wrap(described, WIDTH, initial_indent="  ", subsequent_indent="    ")
    return "\n".join(lines)


def _failures(results: Results, targets: list[str]) -> list[str]:
    """What failed on some targets, a line each."""
    lines = []
    for failed in results.run.get("failed", ()):
        if failed["target"] in targets:
            where = "" if failed["batch"] is None else f" on batch {failed['batch']}, {failed['context']}"
            described = f"failed: {failed['target']}, {failed['run']}{where}: {failed['error']}"
            lines += textwrap.wrap(described, WIDTH, initial_indent="  ", subsequent_indent="    ")
    return lines


def _alarm(attacks: _Rows, targets: list[str]) -> list[str]:
    """What gradient-free attacks broke that no run before them had: where gradients are sound, next to nothing."""
    free = [(target, row["newly_broken"]) for (target, _), row in attacks.items() if row["attack"] in gradient_free()]
    added = {target: sum(newly for of, newly in free if of == target) for target in targets}
    if not free:
        return []
    return ["broken by gradient-free attacks alone: " + ", ".join(f"{added[t]} ({t})" for t in targets)]


def _title(results: Results) -> str:
    run = results.run
    protocol = run["protocol"]
    changed = " (modified: " + ", ".join(f"{k}={v}" for k, v in protocol["overrides"].items()) + ")"
    title = (
        f"protocol {protocol['name']} v{protocol['version']}{changed if protocol['modified'] else ''}, "
        f"{named_data(run)}: {run['data']['n']} samples {in_batches(run)}, seed {run['seed']}"
    )
    return f"{textwrap.fill(title, WIDTH, subsequent_indent='  ')}{_untrained(run)}{_whole(run)}"


def in_batches(run: Mapping[str, Any]) -> str:
    """In how many batches the samples are."""
    count = run["batches"]["count"]
    return "in 1 batch" if count == 1 else f"in {count} batches"


def named_data(run: Mapping[str, Any]) -> str:
    """The name of the data, and what was done to its images."""
    prepared = run["data"].get("prepared")
    return f"{run['data']['name']}, {prepared}" if prepared else str(run["data"]["name"])


def _whole(run: Mapping[str, Any]) -> str:
    """Which targets count whole although they have a trunk, and why, a line each."""
    described = [f"the {name} was evaluated as a whole, because {why}" for name, why in run.get("whole", {}).items()]
    return "".join(f"\n{line}" for each in described for line in textwrap.wrap(each, WIDTH, subsequent_indent="  "))


def _untrained(run: Mapping[str, Any]) -> str:
    random = run.get("target", {}).get("random_weights")
    return "\nRANDOM WEIGHTS: these numbers say nothing about a trained model" if random else ""


def _context_table(results: Results, context: str, targets: list[str], *, all_runs: bool) -> str:
    """The runs in a context, and below them the numbers that sum them up."""
    attacks = results.attacks[results.attacks["context"] == context]
    found = {(row["target"], row["run"]): row for row in attacks.to_dict(orient="records")}
    named = list(dict.fromkeys(run for _, run in found))
    idle = [] if all_runs else _idle(found, named, targets)
    shown = [run for run in named if run not in idle]

    def costs(names: Iterable[str], accuracy: Callable[[str], str]) -> list[str]:
        return [cell for target in targets for cell in (accuracy(target), *_cost(results, found, target, names))]

    def accuracy_in(run: str) -> Callable[[str], str]:
        return lambda target: _accuracy(found.get((target, run)))

    rows = [[name, *costs([name], accuracy_in(name))] for name in shown]
    if idle:
        rows.append([f"{len(idle)} runs that broke nothing new", *costs(idle, lambda _: "")])
    rows.append(["all runs", *costs(named, lambda _: "")])
    columns = [f"{context}: final (any)", *(cell for target in targets for cell in (f"{target}, %", "passes", "s"))]
    numbers = [
        [metric, *(_interval(frames.number(results, target, context, metric)) for target in targets)]
        for metric in METRICS
    ]
    heads = [f"{context}: accuracy [95 %]", *(f"{target}, %" for target in targets)]
    return "\n".join(
        [*_aligned(columns, rows), "", *_aligned(heads, numbers), *_alarm(found, targets), *_faults(results, context)]
    )


def _idle(found: _Rows, named: Sequence[str], targets: Sequence[str]) -> list[str]:
    """Runs that broke no new sample of any target; those that failed are not among them."""

    def is_idle(row: Mapping[Hashable, Any] | None) -> bool:
        return row is None or (row["newly_broken"] == 0 and not pd.isna(row["final"]))

    idle = [name for name in named if all(is_idle(found.get((target, name))) for target in targets)]
    return idle if len(idle) > 1 else []


def _accuracy(row: Mapping[Hashable, Any] | None) -> str:
    if row is None:
        return "-"
    return "failed" if pd.isna(row["final"]) else f"{100 * row['final']:.1f} ({100 * row['any']:.1f})"


def _interval(row: pd.Series) -> str:
    return f"{100 * row['value']:.1f} [{100 * row['low']:.1f}, {100 * row['high']:.1f}]"


def _cost(results: Results, found: _Rows, target: str, names: Iterable[str]) -> list[str]:
    """Forward passes per sample, and seconds."""
    made = [found[target, name] for name in names if (target, name) in found]
    passes = sum(row["forwards"] for row in made) / results.run["data"]["n"]
    seconds = sum(row["seconds"] for row in made)
    return [f"{passes:.1f}", "" if pd.isna(seconds) else f"{seconds:.1f}"] if made else ["", ""]


def _aligned(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table of text: the first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in (heads, *rows)) for i in range(len(heads))]
    first, *others = widths
    return [
        "  ".join(
            [row[0].ljust(first), *(cell.rjust(width) for cell, width in zip(row[1:], others, strict=True))]
        ).rstrip()
        for row in (heads, *rows)
    ]


def _faults(results: Results, context: str) -> list[str]:
    """What third-party attacks did that had to be corrected; the rest is in ``attacks.csv``."""
    lines = []
    for row in frames.notes(results).to_dict(orient="records"):
        loud = [note for note in str(row["notes"]).split("; ") if note.partition(":")[0] in LOUD]
        if loud and row["context"] == context:
            described = f"{row['run']} ({row['target']}): {'; '.join(loud)}"
            lines += textwrap.wrap(described, WIDTH, subsequent_indent="  ", break_on_hyphens=False)
    return lines


def render_sample(results: Results, index: int) -> str:
    """What happened to one sample, a line a target and context.

    Args:
        results: of an evaluation.
        index: of the sample in the data set.
    """
    lines = []
    for row in results.samples[results.samples["index"] == index].to_dict(orient="records"):
        if not row["clean_correct"]:
            fate = "wrong on the clean batch"
        elif row["robust"]:
            fate = f"not broken, smallest lead of its label {row['min_margin']:.3g}"
        else:
            fate = f"broken by {row['broken_by']} at iterate {row['broken_at']}"
        lines.append(f"sample {index}, {row['target']}, {row['context']}: {fate}")
    return "\n".join(lines)


def render_crosscheck(found: Crosscheck) -> str:
    """What peers broke of what results call robust: one row per target, context, peer and surrogate, and the list."""
    shown = found.table[["target", "context", "peer", "surrogate", "samples", "broken", "passes", "seconds"]]
    lines = [shown.rename(columns={"samples": "called robust", "broken": "only by peer"}).to_string(index=False)]
    for row in found.table.to_dict(orient="records"):
        where = f"{row['peer']} through {row['surrogate']} ({row['target']}, {row['context']})"
        loud = [note for note in str(row["notes"]).split("; ") if note.partition(":")[0] in LOUD]
        more = [f"{row['unconfirmed']} samples were broken, but not when replayed"] if row["unconfirmed"] else []
        described = [f"FAILED: {row['error']}"] if row["error"] else []
        for note in (*loud, *more, *described):
            lines += textwrap.wrap(f"{where}: {note}", WIDTH, subsequent_indent="  ", break_on_hyphens=False)
    if found.left_out:
        lines.append(f"not installed, so left out: {', '.join(found.left_out)}")
    each = found.found.groupby(["target", "context", "index", "label"], sort=True)
    lines.append(f"broken by peers alone: {len(each)}" + (", each on its real batch and replayed" if len(each) else ""))
    for (target, context, index, label), rows in each:
        by = ", ".join(f"{row['peer']} through {row['surrogate']}" for row in rows.to_dict(orient="records"))
        lines.append(f"  sample {index} (label {label}), {target}, {context}: {by}")
    return "\n".join(lines)


def render_sizes(table: pd.DataFrame) -> str:
    """Batch-size dependence as text: one row per batch size, in percent with 95 % intervals.

    Args:
        table: of a `msa_eval.studies.batch_sizes.SizeReport`.
    """
    cells = [
        f"{100 * row['value']:.1f} [{100 * row['low']:.1f}, {100 * row['high']:.1f}]"
        for row in table.to_dict(orient="records")
    ]
    wide = table.assign(cell=cells).pivot_table(
        index=["context", "batch_size"], columns="metric", values="cell", aggfunc="first", sort=False
    )  # fmt: skip
    heading = "accuracy in % by batch size, with 95 % intervals"
    return "\n".join([heading, wide[list(METRICS)].to_string(), *_verdicts_by(table, "batch_size", "batch size ")])


def render_ablation(ablation: Ablation) -> str:
    """The table of an ablation as text: one row per variant with its parts, in percent, with differences to ``full``.

    Only the worst case shows its 95 % interval; the others' are in ``ablation.csv``.
    """
    about, table = ablation.about, ablation.table
    protocol = about["protocol"]
    changed = "".join(f", {key}={value}" for key, value in protocol["overrides"].items())
    lines = [
        f"ablation under {protocol['name']} v{protocol['version']}{changed}, seed {about['seed']}: fine-tuned on "
        f"{about['train']['n']} samples ({about['train']['name']}), evaluated on {about['n']} ({about['test']['name']})"
    ]
    for context, rows in table.groupby("context", sort=False):
        cells = [_difference(row) for row in rows.to_dict(orient="records")]
        wide = rows.assign(cell=cells).pivot_table(
            index="variant", columns="metric", values="cell", aggfunc="first", sort=False
        )  # fmt: skip
        parts = [_parts(about["variants"].get(name, {}).get("switches")) for name in wide.index]
        wide = wide[list(METRICS)].rename_axis(index=None, columns=None)
        wide.insert(0, "parts", parts)
        lines += ["", f"{context}: accuracy in %, in parentheses the difference to full", wide.to_string()]
    return "\n".join([*lines, *_verdicts_by(table, "variant")])


def _verdicts_by(table: pd.DataFrame, of: str, word: str = "") -> list[str]:
    """The verdict on the numbers of each value of a column with its reasons, or one line where all are sound."""
    if "verdict" not in table:
        return []
    if set(table["verdict"]) == {"sound"}:
        return ["", "verdict on all: sound"]
    lines = [""]
    for row in table.drop_duplicates(of).to_dict(orient="records"):
        because = f": {row['reasons']}" if row["reasons"] else ""
        lines += textwrap.wrap(f"verdict on {word}{row[of]}: {row['verdict']}{because}", WIDTH, subsequent_indent="  ")
    return lines


def _difference(row: Mapping[Hashable, Any]) -> str:
    interval = f" [{100 * row['low']:.1f}, {100 * row['high']:.1f}]" if row["metric"] == "worst_case" else ""
    difference = "" if row["variant"] == "full" else f" ({100 * row['difference']:+.1f})"
    return f"{100 * row['value']:.1f}{interval}{difference}"


def _parts(switches: Mapping[str, str] | None) -> str:
    """What a variant is made of; a plain head has no mixer."""
    if switches is None:
        return "fully connected"
    parts = dict(switches)
    if parts["prototypes"] == "global":
        del parts["mixer"]
    return ", ".join(parts.values())


def render_paper_table(table: pd.DataFrame, *, dataset: str) -> str:
    """The paper's numbers next to the measured ones as text, in percent with 95 % intervals, and why a row is empty.

    Args:
        table: of `msa_eval.studies.paper_tables.paper_table`.
        dataset: whose table it is.
    """
    rows: list[dict[str, str]] = []
    described: dict[tuple[str, str], list[str]] = {}
    for row in table.to_dict(orient="records"):
        cells = {"model": row["model"], "head": row["head"]}
        for ours, theirs in (("clean", "reported_clean"), ("paper", "reported_robust"), ("worst_case", None)):
            if theirs is not None:
                cells[f"{theirs.removeprefix('reported_')}, reported"] = f"{row[theirs]:.1f}"
            shown = f"{row[ours]:.1f} [{row[f'{ours}_low']:.1f}, {row[f'{ours}_high']:.1f}]" if row["n"] else "-"
            cells[{"clean": "measured", "paper": "measured (paper)"}.get(ours, ours)] = shown
        rows.append(cells | {"n": str(row["n"] or "-"), "verdict": row["verdict"] or "-"})
        if row["note"]:
            described.setdefault((row["model"], row["note"]), []).append(row["head"])
    notes = [
        line
        for (model, note), heads in described.items()
        for line in textwrap.wrap(
            f"{model}, {' and '.join(heads)}: {note}", WIDTH, subsequent_indent="  ",
            break_long_words=False, break_on_hyphens=False,
        )
    ]  # fmt: skip
    frame = pd.DataFrame(rows).to_string(index=False)
    return f"{dataset}: accuracy in %, as the paper reports it and as measured here\n{frame}" + "".join(
        f"\n{line}" for line in ["", *notes] if notes
    )
