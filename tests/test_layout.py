"""The house: what may import what, which names may not be imported bare, and what a wheel must carry."""

from __future__ import annotations

import ast
import importlib.util
import os
import subprocess
import sys
import tomllib
from collections import Counter
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import msa_eval

ROOT = Path(__file__).parents[1]
_PATHS = [
    *(ROOT / "msa_eval").rglob("*.py"),
    *(path for folder in ("surrogates", "protocols") for path in (ROOT / folder).rglob("*.py")),
]
SOURCES = {
    ".".join(["msa_eval", *(part for part in parts if part not in ("msa_eval", "__init__"))]): path
    for path in _PATHS
    for parts in [path.relative_to(ROOT).with_suffix("").parts]
}
"""The files of the package by module."""

ORDER = (
    "_version device errors files hashing installation numerics progress quantity randomness untrusted",
    "data",
    "defense",
    "surrogates",
    "attacks",
    "hpm",
    "protocols targets",
    "evidence",
    "judging",
    "auditing verification",
    "engine",
    "studies",
    "report",
    "sensitivity",
    "__init__ __main__ cli doctor references",
)
"""A folder imports from lines above its own alone. Those of the first and of the last line may import each other."""

LINES, FILES = 400, 20
"""So long is a file at most, and so full a folder."""

TOO_LONG: set[str] = set()
"""Files that are still to be cut; none is to be added."""
UPWARD: set[tuple[str, str]] = set()
"""Imports that are still to be turned: attacks are to be written against an interface of their own."""

LEVELS = {name: level for level, names in enumerate(ORDER) for name in names.split()}


def _folder(module: str) -> str:
    """The folder, or the single file, of a module that stands right in the package."""
    return (module.split(".")[1:] or ["__init__"])[0]


def _imports(module: str, *, everywhere: bool) -> set[str]:
    """The files of the package that a file imports from: in functions too, or on top only."""
    tree = ast.parse(SOURCES[module].read_text())
    found = set()
    for node in ast.walk(tree) if everywhere else tree.body:
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "msa_eval":
            names = {f"{node.module}.{name.name}" for name in node.names}
            found |= {name if name in SOURCES else node.module for name in names}
        elif isinstance(node, ast.Import):
            found |= {name.name for name in node.names if name.name.split(".")[0] == "msa_eval"}
    return found


def test_dependencies_run_one_way() -> None:
    """From the foundations over the model under attack, the attacks and the evidence to the command line."""
    assert {_folder(module) for module in SOURCES} == LEVELS.keys()
    upward, excused = [], set()
    for module in SOURCES:
        mine = _folder(module)
        for other in _imports(module, everywhere=True):
            theirs = _folder(other)
            if mine == theirs or LEVELS[theirs] < LEVELS[mine]:
                continue
            if LEVELS[theirs] == LEVELS[mine] and LEVELS[mine] in (0, len(ORDER) - 1):
                continue
            if (mine, other) in UPWARD:
                excused.add((mine, other))
            else:
                upward.append(f"{module} imports {other}")
    assert not upward
    assert excused == UPWARD, "an exception that is not needed any more is to go"


def test_no_file_imports_itself_over_others() -> None:
    graph = TopologicalSorter({module: _imports(module, everywhere=False) & SOURCES.keys() for module in SOURCES})
    ordered = [*graph.static_order()]  # a CycleError names the files
    assert sorted(ordered) == sorted(SOURCES)


def test_files_and_folders_are_small() -> None:
    places = {path.relative_to(ROOT).as_posix(): len(path.read_text().splitlines()) for path in SOURCES.values()}
    assert {place for place, length in places.items() if length > LINES} == TOO_LONG
    folders = Counter(Path(place).parent.as_posix() for place in places)
    assert {folder for folder, count in folders.items() if count > FILES} == set()


def test_every_folder_is_packaged() -> None:
    with (ROOT / "pyproject.toml").open("rb") as file:
        listed = tomllib.load(file)["tool"]["setuptools"]["packages"]
    assert sorted(listed) == sorted(module for module, path in SOURCES.items() if path.name == "__init__.py")


def test_no_file_imports_the_whole_package() -> None:
    """It would be a circle: the package imports all that it exports."""
    assert [
        m for m in SOURCES if m not in ("msa_eval", "msa_eval.__main__") and "msa_eval" in _imports(m, everywhere=True)
    ] == []


@pytest.mark.parametrize("name", ["surrogates", "protocols"])
def test_the_bare_names_can_not_be_imported(name: str) -> None:
    spec = importlib.util.spec_from_file_location(name, ROOT / name / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    with pytest.raises(ImportError, match=f"msa_eval.{name}"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


def test_what_users_import_is_there() -> None:
    assert {name for name in msa_eval.__all__ if not hasattr(msa_eval, name)} == set()
    code = "import msa_eval.surrogates, msa_eval.protocols, msa_eval.attacks; print(msa_eval.__version__)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT.parent)
    assert found.stdout.strip() == msa_eval.__version__


def test_public_things_have_docstrings_and_user_errors_are_no_asserts() -> None:
    for path in SOURCES.values():
        tree = ast.parse(path.read_text())
        assert ast.get_docstring(tree), path
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                assert ast.get_docstring(node), f"{path}: {node.name}"


def test_the_benchmarks_run_from_a_checkout_whose_folder_hides_the_installed_package(tmp_path: Path) -> None:
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests/__init__.py").touch()  # as another package may have installed it
    packages = [str(tmp_path), *(path for path in sys.path if path.endswith("-packages"))]
    ended = subprocess.run(  # without site, as an editable installation would help out
        [sys.executable, "-S", "-m", "tests.benchmarks", "overhead", "digits", "--steps", "1", "--repeats", "1",
         "--batch", "8", "--out", str(tmp_path / "out")],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": os.pathsep.join(packages)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert "ours, in the engine" in (tmp_path / "out/overhead.csv").read_text()
