"""One command for all measurements: ``python -m tests.benchmarks NAME [options]``, from the root of a checkout."""

from __future__ import annotations

import argparse
import importlib
import runpy
import sys
from pathlib import Path

SCRIPTS = ("adaptive", "budget", "contexts", "levers", "peers", "strength")
"""Older ones, with options of their own: ``python -m tests.benchmarks budget --help``."""

OUT = Path("results/benchmarks")


def parser() -> argparse.ArgumentParser:
    """What the command takes."""
    made = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    made.epilog = f"Also: {', '.join(SCRIPTS)}, each with its own --help."
    items = made.add_subparsers(dest="item", required=True, metavar="NAME")

    def item(name: str, described: str, models: tuple[str, ...], **defaults: int) -> argparse.ArgumentParser:
        one = items.add_parser(name, help=described)
        if models:
            one.add_argument("model", choices=models)
        for option, default in defaults.items():
            one.add_argument(f"--{option}", type=int, default=default)
        one.add_argument("--out", type=Path, default=OUT)
        return one

    both, hpm = ("cifar10-wrn10-2", "resnet18", "digits"), ("cifar10-wrn10-2", "digits")
    item("overhead", "APGD over a bare loop of as many passes", both, batch=64, steps=10, repeats=7)
    one = item("paper", "the paper's protocol, ours and composed of pyautoattack", hpm,
               samples=512, batch=64, steps=40, queries=1000, chunk=128)  # fmt: skip
    one.add_argument("--msa", action="store_true", help="let our default protocol take part")
    two = item("standard", "msa and pyautoattack's standard", hpm, samples=128, batch=64, chunk=64)
    three = item("static", "a static classifier, ours and peers at equal steps", both,
                 samples=512, batch=64, steps=20, chunk=128)  # fmt: skip
    for search in (one, two, three):
        search.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of our search")
    item("growth", "time and memory against samples, classes, features, batch and context", (), steps=5, repeats=1)
    item("limit", "multiply-adds of the passes over what the trunk's convolutions reach", both,
         batch=64, steps=10, repeats=5)  # fmt: skip
    item("cluster", "one worker and two on a Ray cluster", hpm, samples=128, batch=16, repeats=2)
    item("tables", "put the files' figures into docs/research/speed.md and overhead.md", ())
    return made


def main() -> None:
    """Run one of them."""
    if len(sys.argv) > 1 and sys.argv[1] in SCRIPTS:
        name = sys.argv.pop(1)
        runpy.run_module(f"{__package__}.{name}", run_name="__main__")
        return
    options = vars(parser().parse_args())
    name = options.pop("item")
    if "model" in options:
        options["name"] = options.pop("model")
    importlib.import_module(f".{name}", __package__).run(**options)


if __name__ == "__main__":
    main()
