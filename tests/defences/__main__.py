"""The collection's one command: ``python -m tests.defences [NAME ...]``, from the root of a checkout.

It evaluates each defence as a user would, prints our number beside the known one, and three counts at the end.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from pathlib import Path

from .collection import ALL, Truth, attacked, chosen, read, write
from .table import TITLE, Row, counted, evaluated, line, save


def parser() -> argparse.ArgumentParser:
    """What the command takes."""
    made = argparse.ArgumentParser(prog="python -m tests.defences", description=__doc__)
    made.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(ALL)}; all without")
    made.add_argument("--quick", action="store_true", help="a quarter of the default protocol's passes")
    made.add_argument("--seed", type=int, default=0, help="of the evaluations")
    made.add_argument("--out", type=Path, help="write the table there too, as .csv, or into a page of .md")
    made.add_argument("--true", action="store_true", help="attack anew, and write what is left to truth.csv")
    made.add_argument("--lower", action="store_true", help="where our number is the lower one, write it to truth.csv")
    return made


def lowered(truth: Truth, left: tuple[int, ...], seed: int) -> Truth:
    """What is known once the samples that we broke are out of it."""
    both = tuple(sorted(set(truth.left) & set(left)))
    return dataclasses.replace(truth, left=both, by=f"{truth.by}, msa seed {seed}")


def attack(names: list[str]) -> None:
    """Recompute the known numbers."""
    for known in chosen(names):
        began, truth = time.perf_counter(), attacked(known)
        write(read() | {known.name: truth})
        print(f"{known.name:<22} {len(truth.left)} of {truth.samples} left, {time.perf_counter() - began:.1f} s")


def main() -> int:
    """Run it; 1 where the counts are not as wanted."""
    options = parser().parse_args()
    try:
        listed = chosen(options.names)
    except ValueError as error:
        parser().error(str(error))
    if options.true:
        attack(options.names)
        return 0
    print(f"protocol msa{', a quarter of its passes' if options.quick else ''}, seed {options.seed}\n{TITLE}")
    rows: list[Row] = []
    for known in listed:
        truth = read()[known.name]
        row, left = evaluated(known, truth, quick=options.quick, seed=options.seed)
        if options.lower and set(truth.left) - set(left) and not known.exact:
            write(read() | {known.name: lowered(truth, left, options.seed)})
        rows.append(row)
        print(line(row), flush=True)
        if options.out is not None:
            save(rows, options.out)
    counts = counted(rows)
    print(f"\n{counts}")
    return 0 if counts.met else 1


if __name__ == "__main__":
    sys.exit(main())
