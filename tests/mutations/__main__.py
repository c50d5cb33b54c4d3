"""Does every fault of the list turn a test red? ``python -m tests.mutations [NAME ...] [--jobs 2]``, from the root.

Each mutation is made in a copy of the source, and the tests that it names are run on that copy: each of them has to
fail. Without a mutation all of them have to pass.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: several copies are tested at once

import argparse
import contextlib
import importlib
import multiprocessing
import shutil
import sys
import tempfile
import time
import tomllib
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = ("msa_eval", "protocols", "surrogates")
LIST = Path(__file__).with_name("mutations.toml")


@dataclass(frozen=True)
class Mutation:
    """A fault.

    Attributes:
        name: of it.
        about: what would go unnoticed.
        old: a piece of the source that occurs once.
        new: what stands in its place.
        tests: the node ids, without parameters, of those that find it.
    """

    name: str
    about: str
    old: str
    new: str
    tests: tuple[str, ...]

    def file(self, root: Path = ROOT) -> Path:
        """The source file that holds the piece.

        Raises:
            ValueError: when there is none, or the piece occurs more than once.
        """
        files = [path for folder in SOURCES for path in sorted((root / folder).rglob("*.py"))]
        found = [path for path in files for _ in range(path.read_text(encoding="utf-8").count(self.old))]
        if len(found) != 1:
            raise ValueError(f"mutation {self.name}: its old text occurs {len(found)} times in the source, not once")
        return found[0]


def node(test: str) -> str:
    """The node id of a test, without parameters.

    Raises:
        ValueError: when there is none of that name, or several.
    """
    file, _, function = test.rpartition("::")
    head = f"\ndef {function}("
    found = [path for path in sorted((ROOT / "tests").rglob(f"{file or 'test_*'}.py"))
             if head in path.read_text(encoding="utf-8")]  # fmt: skip
    if len(found) != 1:
        raise ValueError(f"there are {len(found)} tests {test}, not one")
    return f"{found[0].relative_to(ROOT).as_posix()}::{function}"


def listed() -> list[Mutation]:
    """All mutations of the list."""
    with LIST.open("rb") as file:
        entries = tomllib.load(file)["mutation"]
    return [Mutation(**{**entry, "tests": tuple(map(node, entry["tests"]))}) for entry in entries]


@dataclass(frozen=True)
class Tried:
    """What came of tests on a copy.

    Attributes:
        name: of the mutation.
        failed: the tests that failed.
        status: pytest's exit status.
        seconds: that it took.
        output: pytest's.
    """

    name: str
    failed: frozenset[str]
    status: int
    seconds: float
    output: str

    def found_by(self, tests: Collection[str]) -> bool:
        """Whether each of these tests ran and failed; a copy that can't be imported was found by none."""
        return self.status == pytest.ExitCode.TESTS_FAILED and self.failed >= {*tests}


class _Failures:
    """Collects the node ids of tests that fail."""

    def __init__(self) -> None:
        self.failed: set[str] = set()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note a failure, in the test or in what it is given."""
        if report.failed:
            self.failed.add(report.nodeid.partition("[")[0])


def attempt(name: str, mutation: Mutation | None, tests: tuple[str, ...]) -> Tried:
    """Run tests on a copy of the source with a mutation, or without one; in a process of its own."""
    started, failures = time.perf_counter(), _Failures()
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        copy.mkdir()
        for path in ROOT.iterdir():
            if path.name in (*SOURCES, "tests"):
                shutil.copytree(path, copy / path.name, ignore=shutil.ignore_patterns("__pycache__"))
            elif not path.name.startswith((".", "build")):
                (copy / path.name).symlink_to(path)
        if mutation is not None:
            file = mutation.file(copy)
            file.write_text(file.read_text(encoding="utf-8").replace(mutation.old, mutation.new), encoding="utf-8")
        os.chdir(copy)
        sys.path.insert(0, str(copy))
        os.environ["PYTHONPATH"] = os.pathsep.join([str(copy), *filter(None, [os.environ.get("PYTHONPATH")])])
        sys.dont_write_bytecode = True
        log = Path(folder) / "log"
        with log.open("w", encoding="utf-8") as to, contextlib.redirect_stdout(to), contextlib.redirect_stderr(to):
            arguments = [f"--rootdir={copy}", "-q", "-p", "no:cacheprovider", "-n", "0", *tests]
            status = int(pytest.main(["-o", "addopts=--import-mode=importlib", *arguments], plugins=[failures]))
        output = log.read_text(encoding="utf-8")
        os.chdir(ROOT)
    return Tried(name, frozenset(failures.failed), status, time.perf_counter() - started, output)


def _attempt(job: tuple[str, Mutation | None, tuple[str, ...]]) -> Tried:
    return attempt(*job)


def run(mutations: list[Mutation], jobs: int) -> int:
    """Try mutations, print a line each, and count those that no test found."""
    for module in ("matplotlib.figure", "pandas", "scipy.stats", "torch"):  # once, for all processes forked from here
        importlib.import_module(module)
    every = tuple(dict.fromkeys(test for mutation in mutations for test in mutation.tests))
    work = [*((mutation.name, mutation, mutation.tests) for mutation in mutations), ("without a mutation", None, every)]
    alive = 0
    with multiprocessing.get_context("fork").Pool(jobs, maxtasksperchild=1) as pool:
        for (_, mutation, tests), tried in zip(work, pool.imap(_attempt, work), strict=True):
            passed = tried.status == 0 if mutation is None else tried.found_by(tests)
            alive += not passed
            word = ("green" if mutation is None else "red") if passed else "WRONG"
            print(f"{word:6} {tried.name:50} {tried.seconds:6.1f} s", flush=True)
            if not passed:
                survived = ", ".join(sorted({*tests} - tried.failed)) if mutation else ", ".join(sorted(tried.failed))
                print(f"       pytest ended with {tried.status}; {'passed' if mutation else 'failed'}: {survived}")
                print("       " + "\n       ".join(tried.output.splitlines()[-12:]), flush=True)
    return alive


def main() -> None:
    """Try those that are named, or all."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutations", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="of mutations; all by default")
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    mutations = listed()
    if unknown := {*options.names} - {mutation.name for mutation in mutations}:
        parser.error(f"there is no mutation {', '.join(sorted(unknown))}")
    chosen = [mutation for mutation in mutations if not options.names or mutation.name in options.names]
    alive = run(chosen, options.jobs)
    print(f"{len(chosen) + 1 - alive} of {len(chosen) + 1} as they should be")
    sys.exit(bool(alive))


if __name__ == "__main__":
    main()
