"""What is imported when: the command line answers without torch, and a thing is imported when it is asked for."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

import msa_eval
from msa_eval.cli import COMMANDS
from msa_eval.cli.ablate import NAMES
from msa_eval.studies.ablation import VARIANTS

ROOT = Path(__file__).parents[1]
HEAVY = ["jinja2", "matplotlib", "numpy", "pandas", "PIL", "safetensors", "scipy", "sklearn", "torch", "tqdm"]
ANSWERS = """
import io, json, sys
from contextlib import redirect_stderr, redirect_stdout
from msa_eval.cli import main
calls, heavy = json.loads(sys.argv[1])
for call in calls:
    printed = io.StringIO()
    with redirect_stdout(printed), redirect_stderr(printed):
        try:
            main(call, prog_name="msa-eval")
        except SystemExit as ended:
            status = ended.code
    print(json.dumps([call, status, printed.getvalue(), sorted({*sys.modules} & {*heavy})]))
"""


def _python(code: str, *arguments: str) -> list[Any]:
    """What a program prints, a JSON value a line."""
    command = [sys.executable, "-P", "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_help_version_and_a_mistyped_command_import_nothing_heavy() -> None:
    calls = [["--version"], ["evalaute"], ["--help"], *([name, "--help"] for name in COMMANDS)]
    for (call, status, printed, heavy), asked in zip(_python(ANSWERS, json.dumps([calls, HEAVY])), calls, strict=True):
        assert call == asked
        assert heavy == [], f"msa-eval {' '.join(call)} imports {heavy}"
        assert status == (2 if call == ["evalaute"] else 0)
        expected = {"--version": msa_eval.__version__, "evalaute": "No such command 'evalaute'"}.get(call[0], "Usage: ")
        assert expected in printed


def test_a_thing_is_imported_when_it_is_asked_for() -> None:
    code = """
import json, sys
import msa_eval
def found():
    print(json.dumps(sorted(name for name in sys.modules if name in sys.argv[1:])))
found()
msa_eval.HPM
found()
msa_eval.evaluate
found()
"""
    before, model, evaluation = _python(code, *HEAVY, "scipy.stats")
    assert before == []
    assert "torch" in model
    assert {"pandas", "scipy", "matplotlib", "sklearn"}.isdisjoint(model)
    assert "pandas" in evaluation
    assert {"scipy.stats", "matplotlib", "jinja2", "PIL", "sklearn"}.isdisjoint(evaluation)


def test_no_file_or_folder_is_called_as_what_users_import() -> None:
    """Whichever of the two was imported last would be found under the name."""
    places = {path.stem for folder in (ROOT / "msa_eval", ROOT) for path in folder.iterdir() if path.name[0] != "."}
    assert places.isdisjoint(msa_eval.__all__)
    assert places > {"hpm", "engine", "protocols"}


def test_every_file_of_the_command_line_is_a_command() -> None:
    files = {path.stem.replace("_", "-") for path in (ROOT / "msa_eval/cli").rglob("*.py")}
    assert [*COMMANDS] == sorted(files - {"--init--", "lists", "messages", "options"})
    assert (*VARIANTS,) == NAMES


def test_what_type_checkers_see_is_what_there_is() -> None:
    tree = ast.parse((ROOT / "msa_eval/__init__.py").read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test))
    seen = {
        name.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for name in node.names
    }  # fmt: skip
    assert seen == msa_eval._HOMES
    assert sorted(seen) == sorted(msa_eval.__all__)
    assert {*msa_eval.__all__} <= {*dir(msa_eval)}
    for name, home in seen.items():
        assert getattr(msa_eval, name) is getattr(import_module(home), name)
    with pytest.raises(AttributeError, match="module 'msa_eval' has no attribute 'evalute'"):
        _ = msa_eval.evalute
    with pytest.raises(ImportError, match="cannot import name 'evalute'"):
        from msa_eval import evalute  # noqa: F401


def test_the_version_is_that_of_the_project() -> None:
    with (ROOT / "pyproject.toml").open("rb") as file:
        assert tomllib.load(file)["project"]["version"] == msa_eval.__version__
