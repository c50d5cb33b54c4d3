"""The house: what may import what, which names may not be imported bare, and what a wheel must carry."""

from __future__ import annotations

import ast
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

import msa_eval

ROOT = Path(__file__).parents[1]
SOURCES = {
    **{f"msa_eval.{p.relative_to(ROOT / 'msa_eval').with_suffix('').as_posix().replace('/', '.')}": p
       for p in (ROOT / "msa_eval").rglob("*.py")},
    **{f"msa_eval.{folder}.{p.stem}": p
       for folder in ("surrogates", "protocols") for p in (ROOT / folder).glob("*.py")},
}  # fmt: skip
FLOORS = {
    "architectures": 0, "data": 0, "defense": 0, "hpm": 0, "checkpoint": 0, "ikl": 0, "progress": 0,
    "attacks": 1, "surrogates": 1, "finetune": 2, "protocols": 3, "report": 4, "references": 4,
    "sensitivity": 5, "cli": 6,
}  # fmt: skip


def _floor(module: str) -> int | None:
    parts = module.split(".")
    return FLOORS.get(parts[1]) if len(parts) > 1 else None


def test_dependencies_run_one_way() -> None:
    """Defence and data, then attacks and surrogates, fine-tuning, the engine, the report, the command line."""
    upwards = []
    for module, path in SOURCES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("msa_eval."):
                mine, theirs = _floor(module), _floor(node.module)
                if mine is not None and theirs is not None and theirs > mine:
                    upwards.append(f"{module} imports {node.module}")
    assert not upwards
    assert len(SOURCES) > 25


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
