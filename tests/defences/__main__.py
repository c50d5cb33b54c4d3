"""The collection's one command: ``python -m tests.defences [NAME ...]``, from the root of a checkout.

It evaluates each defence as a user would, prints our number beside the known one, and three counts at the end.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from pathlib import Path

from .collection import ALL, attacked, chosen, joined, read, write
from .table import TITLE, counted, evaluated, in_order, line, rows_of, save


def parser() -> argparse.ArgumentParser:
    """What the command takes."""
    made = argparse.ArgumentParser(prog="python -m tests.defences", description=__doc__)
    made.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(ALL)}; all without")
    made.add_argument("--quick", action="store_true", help="a quarter of the default protocol's passes")
    made.add_argument("--seed", type=int, default=0, help="of the evaluations, or of the attacks")
    made.add_argument("--out", type=Path, help="write the table there too, as .csv, or into a page of .md")
    made.add_argument("--rows", type=Path, help="keep rows in this .csv; the table is of all it holds")
    made.add_argument("--true", action="store_true", help="attack anew, and write what is broken too to truth.csv")
    made.add_argument("--lower", action="store_true", help="write what we break too to truth.csv")
    return made


def attack(names: list[str], seed: int) -> None:
    """Attack anew, and put what is left on file, less what was broken before."""
    for known in chosen(names):
        began, found, held = time.perf_counter(), attacked(known, seed), read()
        write(held | {known.name: joined(held.get(known.name, found), found)})
        print(f"{known.name:<23} {len(found.left)} of {found.samples} left, {time.perf_counter() - began:.1f} s")


def main() -> int:
    """Run it; 1 where the counts are not as wanted."""
    options = parser().parse_args()
    try:
        listed = chosen(options.names)
    except ValueError as error:
        parser().error(str(error))
    if options.true:
        attack(options.names, options.seed)
        return 0
    print(f"protocol msa{', a quarter of its passes' if options.quick else ''}, seed {options.seed}\n{TITLE}")
    rows = list(rows_of(options.rows)) if options.rows is not None else []
    for known in listed:
        truth = read()[known.name]
        row, left = evaluated(known, truth, quick=options.quick, seed=options.seed)
        if options.lower:
            ours = dataclasses.replace(truth, left=left, by=f"msa {options.seed}")
            write(read() | {known.name: joined(truth, ours)})
        rows = in_order([*(held for held in rows if held.defence != known.name), row], ALL)
        print(line(row), flush=True)
        for path in (options.rows, options.out):
            if path is not None:
                save(rows, path)
    counts = counted(rows)
    print(f"\n{counts}")
    return 0 if counts.met else 1


if __name__ == "__main__":
    sys.exit(main())
