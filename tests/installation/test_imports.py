"""Others' packages: the pins, and imports that work in spite of what is wrong with them."""

from __future__ import annotations

import importlib.util
import itertools
import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from msa_eval.installation.imports import PINS

ROOT = Path(__file__).parents[2]


def test_the_extra_is_what_the_reasons_are_for() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["optional-dependencies"]["robustbench"] == list(PINS)


def _unexplained(text: str) -> list[str]:
    """The requirements of a ``pyproject.toml`` that keep later releases out and don't say why.

    The reason is a comment at the end of the line, or above it, or stands in `PINS`.
    """
    message = tomllib.loads(text)
    project = message["project"]
    asked = [*message["build-system"]["requires"], *project["dependencies"]]
    asked += [one for extra in project["optional-dependencies"].values() for one in extra]
    lines = text.splitlines()
    explained = {
        line for above, line in itertools.pairwise(["", *lines]) if "#" in line or above.strip().startswith("#")
    }
    held = [one for one in asked if any(part.operator not in (">=", ">") for part in Requirement(one).specifier)]
    return [
        one for one in held
        if one not in PINS and not all(line in explained for line in lines if json.dumps(one) in line)
    ]  # fmt: skip


def test_every_pin_says_why() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    assert _unexplained(text) == []
    bare = "\n".join(line.partition("#")[0] for line in text.splitlines())
    assert [Requirement(one).name for one in _unexplained(bare)] == [
        "torch", "pyautoattack", "torchattacks", "pytest", "mkdocs", "mkdocs-material", "mkdocstrings",
        "mkdocstrings-python", "mkdocs-click", "ruff", "mypy",
    ]  # fmt: skip


def _python(code: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-W", "error", "-c", code]  # the installed package, not the folder
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.skipif(importlib.util.find_spec("robustbench") is None, reason="needs pip install '.[robustbench]'")
def test_robustbench_is_imported_in_a_new_process_without_a_warning() -> None:
    done = _python(
        "from msa_eval.installation.imports import import_robustbench; import_robustbench(); "
        "import robustbench, torchvision, sys; "
        "print(robustbench.benchmark.__name__, sys.modules['autoattack'].__name__)"
    )
    assert done.stdout == "benchmark pyautoattack\n", done.stderr
    assert done.stderr == ""


def test_what_is_not_installed_says_how_to_install_it() -> None:
    """A finder that hides the packages stands for an environment without them."""
    done = _python(
        "import sys\n"
        "class Hidden:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('torchvision', 'timm', 'robustbench'):\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Hidden())\n"
        "from msa_eval import load_target, load_samples\n"
        "for word in ('torchvision:resnet18', 'timm:resnet18', 'robustbench:Standard'):\n"
        "    try:\n"
        "        load_target(word)\n"
        "    except ValueError as error:\n"
        "        print(error)\n"
    )
    lines = done.stdout.splitlines()
    assert len(lines) == 3, done.stderr
    assert all("install it with: pip install 'msa-eval[robustbench]'" in line for line in lines)
