"""The list of faults fits the source, and the command tells a fault that is found from one that is not."""

from __future__ import annotations

import ast
import subprocess
import sys

import pytest

from .__main__ import ROOT, SOURCES, Tried, listed

SAMPLE = ("linf-box", "worst-case-of-all", "unreliable-is-sound", "fc-unasked")


def test_every_mutation_changes_one_place_of_the_source_and_names_tests_that_are_there() -> None:
    mutations = listed()
    assert len({mutation.name for mutation in mutations}) == len(mutations) >= 30
    for mutation in mutations:
        text = mutation.file().read_text(encoding="utf-8")
        mutated = text.replace(mutation.old, mutation.new)
        assert ast.dump(ast.parse(mutated)) != ast.dump(ast.parse(text)), mutation.name
        assert mutation.tests


def test_all_folders_of_the_source_have_one() -> None:
    changed = {mutation.file().relative_to(ROOT).parts[:-1] for mutation in listed()}
    held = {path.relative_to(ROOT).parts[:-1] for folder in SOURCES for path in (ROOT / folder).rglob("*.py")}
    assert held - changed == {("msa_eval", "references"), ("msa_eval", "report", "plots")}  # weights, and drawings


def test_only_a_failure_of_each_test_counts() -> None:
    def tried(status: int, *failed: str) -> Tried:
        return Tried("fault", frozenset(failed), status, 0.0, "")

    assert tried(1, "a", "b", "c").found_by(["a", "b"])
    assert not tried(0).found_by(["a"])
    assert not tried(1, "a").found_by(["a", "b"])
    assert not tried(2, "a").found_by(["a"])


@pytest.mark.slow
def test_some_are_found() -> None:
    """All of them: ``python -m tests.mutations``."""
    command = [sys.executable, "-m", "tests.mutations", *SAMPLE]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    *mutated, unchanged, last = ended.stdout.splitlines()
    assert {tuple(line.split()[:2]) for line in mutated} == {("red", name) for name in SAMPLE}
    assert unchanged.startswith("green  without a mutation ")
    assert last == "5 of 5 as they should be"
