"""The table: our number beside what is known, and the three counts that hold the verdicts to it."""

from __future__ import annotations

import csv
import dataclasses
import math
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch

from msa_eval import evaluate

from .collection import Truth, read
from .known import Known

MARGIN = 2
"""So many samples above the known number a number may stand without a warning."""

CHEAP = {"attack.apgd.passes": 90, "attack.apgd.overtime": 10, "attack.recombination.passes": 120}
"""Of the default protocol, for a first look: a quarter of its passes."""


@dataclass(frozen=True)
class Row:
    """One defence, evaluated.

    Attributes:
        defence: its name.
        kind: ``honest``, ``masked`` or ``masked in part``.
        by: the mechanism that masks it, and at what level.
        behaviour: ``static``, ``batch`` or ``stochastic``.
        context: of the evaluation.
        seed: of the evaluation.
        samples: N.
        clean: how many are right on clean batches.
        ours: how many the evaluation leaves, or -1 where it refused.
        known: how many are left by all that is known.
        verdict: of the evaluation.
        through: the surrogates that broke samples, and how many each.
        seconds: it took.
        reasons: of the verdict.
        exact: whether what is known is a closed form.
        never_sound: whether no number of it can be believed.
    """

    defence: str
    kind: str
    by: str
    behaviour: str
    context: str
    seed: int
    samples: int
    clean: int
    ours: int
    known: int
    verdict: str
    through: str
    seconds: float
    reasons: str
    exact: bool = False
    never_sound: bool = False

    @property
    def too_high(self) -> int:
        """By how many samples the number stands above what is known."""
        return self.ours - self.known

    @property
    def masked(self) -> bool:
        """Whether it hides its gradient, in part or in full."""
        return self.kind != "honest"

    @property
    def unfit(self) -> bool:
        """Whether its number is not to be called sound."""
        return self.too_high > 0 or self.never_sound


def evaluated(known: Known, truth: Truth, *, quick: bool = False, seed: int = 0) -> tuple[Row, tuple[int, ...]]:
    """Evaluate one as a user would, with nothing said but the ball and the context; the row, and which are left."""
    data = known.samples()
    overrides = {
        "threat.norm": known.norm, "threat.eps": known.eps, "threat.contexts": [known.context],
        "batches.size": len(data) if known.context == "joint" else 64, **(CHEAP if quick else {}),
    }  # fmt: skip
    row = Row(
        defence=known.name, kind=known.kind, by=f"{known.masked}, {known.level}" if known.masked else "",
        behaviour=known.behaviour, context=known.context, seed=seed, samples=len(data), clean=-1, ours=-1,
        known=len(truth.left), verdict="refused", through="", seconds=math.nan, reasons="",
        exact=known.exact, never_sound=known.never_sound,
    )  # fmt: skip
    began = time.perf_counter()
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            results = evaluate(known.build(), data, seed=seed, overrides=overrides, fc=False)
        except ValueError as error:
            return dataclasses.replace(row, reasons=str(error)), tuple(range(len(data)))
    found = results.samples
    broke = results.attacks.groupby("surrogate")["newly_broken"].sum().sort_values(ascending=False, kind="stable")
    verdict = results.run["verdicts"]["defense"]
    row = dataclasses.replace(
        row, clean=int(found["clean_correct"].sum()), ours=int(found["robust"].sum()), verdict=verdict["verdict"],
        through=", ".join(f"{name} {n}" for name, n in broke.items() if n), reasons="; ".join(verdict["reasons"]),
        seconds=round(time.perf_counter() - began, 1),
    )  # fmt: skip
    return row, tuple(found.loc[found["robust"].astype(bool), "index"].tolist())


@dataclass(frozen=True)
class Counts:
    """What the table is judged by; names of defences.

    Attributes:
        masked_and_sound: masked, called sound, and the number stands above what is known (0 wanted).
        honest_and_not_sound: honest and called anything but sound (at most 1).
        too_high: called sound, and the number stands above what is known by more than two samples (0).
        impossible: the number stands below a closed form (0, or a judgement is wrong).
        reached: masked, called sound, and the number is what is known.
        warned: masked and called anything but sound.
    """

    masked_and_sound: tuple[str, ...]
    honest_and_not_sound: tuple[str, ...]
    too_high: tuple[str, ...]
    impossible: tuple[str, ...]
    reached: tuple[str, ...]
    warned: tuple[str, ...]

    @property
    def met(self) -> bool:
        """Whether all are as wanted."""
        return not (self.masked_and_sound or self.too_high or self.impossible) and len(self.honest_and_not_sound) <= 1

    def __str__(self) -> str:
        def told(names: tuple[str, ...]) -> str:
            return f"{len(names)} ({', '.join(names)})" if names else "0"

        return "\n".join((
            f"masked, called sound, and above the known number: {told(self.masked_and_sound)}; 0 wanted",
            f"honest and called anything but sound: {told(self.honest_and_not_sound)}; at most 1",
            f"called sound more than {MARGIN} samples above the known number: {told(self.too_high)}; 0 wanted",
            f"below a closed form: {told(self.impossible)}; 0, or a judgement is wrong",
            f"masked and sound at the known number: {len(self.reached)}; masked and warned of: {len(self.warned)}",
        ))  # fmt: skip


def counted(rows: Iterable[Row]) -> Counts:
    """Judge a table."""
    rows = list(rows)
    sound = [row for row in rows if row.verdict == "sound"]
    return Counts(
        masked_and_sound=tuple(r.defence for r in sound if r.masked and r.unfit),
        honest_and_not_sound=tuple(r.defence for r in rows if not r.masked and r.verdict != "sound"),
        too_high=tuple(r.defence for r in sound if r.too_high > MARGIN),
        impossible=tuple(r.defence for r in rows if r.exact and -1 < r.ours < r.known),
        reached=tuple(r.defence for r in sound if r.masked and not r.unfit),
        warned=tuple(r.defence for r in rows if r.masked and r.verdict != "sound"),
    )


HEAD = ("defence", "kind", "by", "context", "clean", "ours", "known", "verdict", "through", "seconds")


def markdown(rows: Sequence[Row]) -> str:
    """The table and its counts as Markdown."""
    lines = [f"| {' | '.join(HEAD)} |", f"|{' --- |' * len(HEAD)}"]
    for row in rows:
        cells = asdict(row)
        if row.verdict == "refused":
            cells |= {"clean": "", "ours": "", "seconds": ""}
        cells |= {"clean": f"{cells['clean']} of {row.samples}", "known": f"{row.known}{' (exact)' * row.exact}"}
        lines.append(f"| {' | '.join(str(cells[name]) for name in HEAD)} |")
    return "\n".join([*lines, "", "```", str(counted(rows)), "```"])


TITLE = f"{'defence':<23} {'kind':<14} in    clean ours known  {'verdict':<10} seconds  through"


def line(row: Row) -> str:
    """One row as it is printed, with a mark where a number too high is called sound."""
    mark = "!" if row.verdict == "sound" and row.unfit else " "
    return (
        f"{row.defence:<23} {row.kind:<14} {row.context:<5} {row.clean:>5} {row.ours:>4} {row.known:>5}{mark} "
        f"{row.verdict:<10} {row.seconds:>7.1f}  {row.through}"
    )


START, END = "<!-- table -->", "<!-- /table -->"
"""Between these a page has its table."""


def save(rows: Sequence[Row], path: Path) -> None:
    """Write CSV; or Markdown where the name says so, into its place in a page that has one."""
    if path.suffix == ".md":
        page = path.read_text() if path.exists() else f"{START}\n{END}\n"
        before, _, rest = page.partition(START)
        path.write_text(f"{before}{START}\n{markdown(rows)}\n{END}{rest.partition(END)[2]}")
        return
    with path.open("w", newline="") as file:
        out = csv.DictWriter(file, [field.name for field in fields(Row)], lineterminator="\n")
        out.writeheader()
        out.writerows(asdict(row) for row in rows)


def rows_of(path: Path) -> Iterator[Row]:
    """The rows of a CSV file, as `save` writes it; none where there is none. Known numbers are what is known today."""
    if not path.exists():
        return
    truths, kinds = read(), {"int": int, "float": float, "bool": "True".__eq__, "str": str}
    with path.open(newline="") as file:
        for held in csv.DictReader(file):
            row = Row(**{field.name: kinds[str(field.type)](held[field.name]) for field in fields(Row)})
            yield dataclasses.replace(row, known=len(truths[row.defence].left)) if row.defence in truths else row


def in_order(rows: Iterable[Row], names: Iterable[str]) -> list[Row]:
    """Rows in the order of names."""
    place = {name: number for number, name in enumerate(names)}
    return sorted(rows, key=lambda row: place.get(row.defence, len(place)))
