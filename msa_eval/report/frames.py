"""What each figure shows, as a tidy table made from evidence alone."""

from __future__ import annotations

import itertools
import tomllib

import pandas as pd

from msa_eval.attacks.attacked_batch import from_history
from msa_eval.attacks.pursuit import PursuitAttack, RecombinationAttack
from msa_eval.defense.contexts import CONTEXTS
from msa_eval.evidence.metrics import rate
from msa_eval.evidence.results import Results
from msa_eval.protocols.schema import StochasticBudget
from msa_eval.report.style import NAMES


def targets_of(results: Results) -> list[str]:
    """The targets, the FC head first."""
    return sorted(results.summary["target"].unique(), key=["fc", "defense"].index)


def contexts_of(results: Results) -> list[str]:
    """The contexts, in the order they were evaluated."""
    return [str(context) for context in results.summary["context"].unique()]


def pick(table: pd.DataFrame, target: str, context: str) -> pd.DataFrame:
    """The rows of a target in a context."""
    return table[(table["target"] == target) & (table["context"] == context)]


def number(results: Results, target: str, context: str, metric: str) -> pd.Series:
    """A number of the summary: ``value``, ``low``, ``high`` and ``n``."""
    rows = pick(results.summary, target, context)
    found: pd.Series = rows[rows["metric"] == metric].iloc[0]
    return found


def lacking(results: Results, context: str, *tables: str) -> str:
    """Why there is less to show of a context than there could be: which rows the evidence does not hold.

    Args:
        results: of an evaluation.
        context: what the attacker controls.
        tables: that are needed, ``attacks`` before ``outcomes``.

    Returns:
        a clause, empty where all rows are there.
    """
    for table in tables:
        held = getattr(results, table)
        if held.empty:
            return f"there is no {table}.csv"
        for target in targets_of(results):
            rows = pick(held, target, context)
            if rows.empty:
                return f"{table}.csv has no rows of the {NAMES[target]} in the context {context}"
            if table == "outcomes" and not _every_run(results, rows, target, context):
                return f"outcomes.csv has not every run of the {NAMES[target]} in the context {context}"
    return ""


def _every_run(results: Results, outcomes: pd.DataFrame, target: str, context: str) -> bool:
    samples, attacks = (pick(table, target, context) for table in (results.samples, results.attacks))
    known = outcomes["run"].isin(attacks["run"]) & outcomes["index"].isin(samples["index"])
    return bool(known.all()) and len(outcomes) == len(attacks) * len(samples)


def waterfall(results: Results, context: str) -> pd.DataFrame:
    """From clean through what each run newly broke to the worst case.

    Returns:
        ``target``, ``step`` (``clean``, a run's name, ``worst_case``), ``before``, ``after`` (shares) and ``broken``
        (samples).
    """
    rows: list[tuple[str, str, float, float, int]] = []
    for target in targets_of(results):
        clean, worst = (float(number(results, target, context, metric)["value"]) for metric in ("clean", "worst_case"))
        right = pick(results.samples, target, context)["clean_correct"].astype(bool)
        n, left, level = len(right), int(right.sum()), clean
        rows.append((target, "clean", 1.0, clean, n - left))
        for run in pick(results.attacks, target, context).to_dict(orient="records"):
            left -= int(run["newly_broken"])
            rows.append((target, run["run"], level, left / n, int(run["newly_broken"])))
            level = left / n
        rows.append((target, "worst_case", level, worst, 0))
    return pd.DataFrame(rows, columns=["target", "step", "before", "after", "broken"])


def transfer(results: Results, context: str) -> pd.DataFrame:
    """How well each surrogate's points transfer to the target, by attack and loss.

    Returns:
        ``target``, ``surrogate``, ``attack``, ``loss``, ``runs`` (restarts made), and of the one of the lowest
        ``target_accuracy`` (its ``final``) that, ``surrogate_accuracy`` and ``any``. Runs `among_found` are left out.
    """
    rows = results.attacks[(results.attacks["context"] == context) & ~among_found(results.attacks)]
    keys = ["target", "surrogate", "attack", "loss"]
    counts = rows.groupby(keys, sort=False).size().rename("runs").reset_index()
    lowest = rows.loc[rows.sort_values("final", kind="stable").drop_duplicates(keys).index]
    best = lowest[[*keys, "surrogate_accuracy", "final", "any"]].rename(columns={"final": "target_accuracy"})
    return _in_order(counts.merge(best, on=keys), results)


def spending(results: Results, *, target: str = "defense", context: str = "joint") -> pd.DataFrame:
    """Worst case against spent passes, run after run.

    A pass is a forward pass of one image through the trunk, with or without the way back; within a run they are taken
    to be spent evenly over its iterates, of which each costs a target that answers at random several.

    Args:
        results: of an evaluation.
        target: ``defense`` or ``fc``.
        context: what the attacker controls.

    Returns:
        ``passes`` a sample, ascending from 0, and the ``worst_case`` then, a share.
    """
    samples, attacks, outcomes = (
        pick(table, target, context) for table in (results.samples, results.attacks, results.outcomes)
    )
    eot = _answers_a_gradient(results, target)
    unbroken = samples.set_index("index")["clean_correct"].astype(bool)
    n, spent, left = len(unbroken), 0.0, int(unbroken.sum())
    rows = [(0.0, left / n)]
    for run in attacks.to_dict(orient="records"):
        of_run = outcomes[outcomes["run"] == run["run"]].set_index("index").loc[unbroken.index]
        broken = unbroken & of_run["any_broken"].astype(bool)
        cost = run["forwards"] / n
        iterates = of_run["first_iterate"].dropna()
        length = max(float(iterates.max()) if len(iterates) else 0.0, 1.0) + 1
        length = max(length, cost / eot) if run["backwards"] else length
        for iterate, count in of_run.loc[broken, "first_iterate"].value_counts().sort_index().items():
            left -= int(count)
            rows.append((spent + cost * min((float(iterate) + 1) / length, 1.0), left / n))
        unbroken, spent, left = unbroken & ~broken, spent + cost, int((unbroken & ~broken).sum())
        rows.append((spent, left / n))
    return pd.DataFrame(rows, columns=["passes", "worst_case"])


def _answers_a_gradient(results: Results, target: str) -> int:
    """How many passes of a stochastic target one step of a gradient attack takes; 1 of any other."""
    if results.run.get("draws", {}).get(target, 1) <= 1:
        return 1
    protocol = tomllib.loads(results.run["protocol"]["text"])
    return int(protocol.get("stochastic", {}).get("eot", StochasticBudget.eot))


def budget(results: Results, context: str) -> pd.DataFrame:
    """`spending` of all targets: ``target``, ``passes``, ``worst_case``."""
    curves = [spending(results, target=target, context=context).assign(target=target) for target in targets_of(results)]
    return pd.concat(curves, ignore_index=True)[["target", "passes", "worst_case"]]


def per_class(results: Results, context: str) -> pd.DataFrame:
    """Accuracy class by class.

    Returns:
        ``target``, ``label``, ``n``, and of ``clean`` and ``worst_case`` each the share with its Wilson 95 % interval
        (``_low``, ``_high``).
    """
    rows = []
    for target in targets_of(results):
        for label, samples in pick(results.samples, target, context).groupby("label"):
            row: dict[str, object] = {"target": target, "label": label, "n": len(samples)}
            for metric, column in (("clean", "clean_correct"), ("worst_case", "robust")):
                found = rate(int(samples[column].sum()), len(samples))
                row |= {metric: found.value, f"{metric}_low": found.low, f"{metric}_high": found.high}
            rows.append(row)
    return pd.DataFrame(rows)


def cascades(results: Results) -> bool:
    """Whether runs start from the best points of the runs before them (``attack.apgd.combine`` is ``cascade``)."""
    attack = tomllib.loads(results.run["protocol"]["text"]).get("attack", {})
    return bool(attack.get("apgd", {}).get("combine") == "cascade")


def among_found(attacks: pd.DataFrame) -> pd.Series:
    """Whether each run is a search among, or from, what others found; its final is not one surrogate's."""
    found: pd.Series = attacks["attack"].astype(str).str.split("-").str[0].isin(from_history())
    return found


def of_others(attacks: pd.DataFrame) -> pd.Series:
    """Whether each run is a third-party attack, ``library:attack``, which starts at the clean images."""
    found: pd.Series = attacks["attack"].astype(str).str.contains(":", regex=False)
    return found


def notes(results: Results) -> pd.DataFrame:
    """What third-party attacks did that had to be corrected: the rows of ``attacks`` that have ``notes``."""
    if "notes" not in results.attacks:
        return results.attacks.iloc[:0].assign(notes=[])
    return results.attacks[results.attacks["notes"].fillna("").astype(str) != ""]


def chained(results: Results, target: str, context: str) -> set[str]:
    """The runs that start from earlier runs' points; those that gather for a recombination are each on their own."""
    attacks = pick(results.attacks, target, context)
    attacks = attacks[~of_others(attacks)]
    late = among_found(attacks)
    if not cascades(results):
        return set(attacks.loc[late, "run"])
    apart = CONTEXTS[context].one_batch_per_sample
    mixing = late & False if apart else attacks["attack"].isin([RecombinationAttack.label, PursuitAttack.label])
    return set(attacks.loc[mixing.cummax(), "run"] if mixing.any() else attacks["run"])


def breakers(results: Results, target: str, context: str) -> pd.DataFrame:
    """Which runs broke which of the samples right on their clean batch: one row per sample, one column per run.

    A chained run finds what fell before wrong at its start already, at iterate 0: that break is not its own.
    """
    right = pick(results.samples, target, context).set_index("index")["clean_correct"].astype(bool)
    rows = pick(results.outcomes, target, context)
    table = rows.pivot_table(index="index", columns="run", values="any_broken", aggfunc="max", sort=False)
    runs = list(pick(results.attacks, target, context)["run"])
    table = table.astype(bool).reindex(index=right[right].index, columns=runs, fill_value=False)
    at_start = rows[rows["first_iterate"] == 0].set_index(["index", "run"]).index
    later = chained(results, target, context)
    own, fallen = table.copy(), pd.Series(False, index=table.index)
    for run in runs:
        if run in later:
            started = pd.MultiIndex.from_product([table.index, [run]]).isin(at_start)
            own[run] = table[run] & ~(fallen & started)
        fallen |= table[run]
    return own


def agreement(results: Results, context: str) -> pd.DataFrame:
    """How many samples each run broke itself, and how many of them no other did.

    Returns:
        ``target``, ``run``, ``broken`` and ``only``; see `breakers` for what counts.
    """
    rows = []
    for target in targets_of(results):
        table = breakers(results, target, context)
        single = table.sum(axis=1) == 1
        rows += [(target, run, int(table[run].sum()), int((table[run] & single).sum())) for run in table]
    return pd.DataFrame(rows, columns=["target", "run", "broken", "only"])


def only_one(results: Results, context: str) -> pd.DataFrame:
    """The samples that one run alone broke: ``target``, ``run``, ``index``, ``label``."""
    rows = []
    for target in targets_of(results):
        table = breakers(results, target, context)
        labels = pick(results.samples, target, context).set_index("index")["label"]
        alone = table[table.sum(axis=1) == 1]
        for run, index in itertools.product(table.columns, alone.index):
            if alone.at[index, run]:
                rows.append((target, run, int(index), labels[index]))
    return pd.DataFrame(rows, columns=["target", "run", "index", "label"])


def seating(results: Results, context: str) -> pd.DataFrame:
    """Accuracy batch by batch: ``target``, ``batch``, ``size``, ``clean``, ``worst_case``."""
    rows = results.samples[results.samples["context"] == context]
    grouped = rows.groupby(["target", "batch"], sort=True)
    table = grouped.agg(size=("index", "size"), clean=("clean_correct", "mean"), worst_case=("robust", "mean"))
    return _in_order(table.reset_index(), results)


def _in_order(table: pd.DataFrame, results: Results) -> pd.DataFrame:
    """The rows of one target after those of the other, each in the order they had."""
    parts = [table[table["target"] == target] for target in targets_of(results)]
    return pd.concat(parts, ignore_index=True)
