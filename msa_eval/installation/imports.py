"""Third-party packages that need help before they can be imported: the pins, the alias, and why.

`PINS` are the extras of ``pyproject.toml`` with the reason for each; a test holds the two together. Nothing here is
imported before a target of that package is asked for.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from msa_eval.installation import records

PINS = {
    "robustbench==1.1.1": "the release whose model definitions are tested here",
    "timm==1.0.9": "robustbench 1.1.1 asks for this very release; its models are built on timm's classes",
    "torchvision>=0.21": "older ones don't go with torch 2.6, the oldest torch allowed",
    "setuptools<81": "robustbench/loaders.py imports pkg_resources, which setuptools 81 and later may not have",
}
"""The extra ``[robustbench]``, and why each pin stands."""

EXCUSED = {
    ("torchattacks", "requests"): "only its old copy of robustbench imports it",
    ("torchattacks", "torchvision"): "only its old copy of robustbench imports it",
}
"""Pairs of a package and one that it says it needs, and why it does without."""

_INSTALL = "pip install 'msa-eval[robustbench]'"


def import_robustbench() -> ModuleType:
    """Import robustbench.

    Its ``eval.py`` imports a module ``autoattack``, which on PyPI is called ``pyautoattack``: that is put in its place
    first, where there is none of that name. The wheel of torchattacks 3.5.1 carries an old ``robustbench`` that is
    written over this one, and imports without a word; so its files are held to its record first.

    Raises:
        ValueError: when it is not installed, or is not whole.
    """
    if wrong := records.wrong_with("robustbench"):
        raise ValueError(
            f"robustbench is not whole ({wrong}): another package has overwritten it, as torchattacks 3.5.1 does; "
            f"'msa-eval doctor --fix' mends it"
        )
    if records.find("robustbench") is None and (other := records.stray("robustbench", "torchattacks")) is not None:
        raise ValueError(f"robustbench is not installed ({other} is an old copy in torchattacks); {_remedy(None)}")
    import_torchvision()
    with _quietly():
        _alias("autoattack", "pyautoattack")
        try:
            importlib.import_module("robustbench.utils")
            return importlib.import_module("robustbench")
        except ImportError as error:
            raise ValueError(f"robustbench can't be imported ({error}); {_remedy(error)}") from error


def import_timm() -> ModuleType:
    """Import timm, which imports torchvision.

    Raises:
        ValueError: when it is not installed.
    """
    import_torchvision()
    with _quietly():
        try:
            return importlib.import_module("timm")
        except ImportError as error:
            raise ValueError(f"timm can't be imported ({error}); install it with: {_INSTALL}") from error


def import_transformers() -> Any:
    """Import Hugging Face's transformers.

    Raises:
        ValueError: when it is not installed.
    """
    with _quietly():
        try:
            return importlib.import_module("transformers")
        except ImportError as error:
            raise ValueError(
                f"transformers can't be imported ({error}); install it with: pip install 'msa-eval[hf]'"
            ) from error


def import_torchvision() -> ModuleType:
    """Import torchvision, with or without its compiled operators.

    PyPI's wheels carry operators compiled for the CUDA build of one torch release. Beside a CPU build, or another
    release, they can't be loaded, and torchvision then fails while it describes operators that are not there
    ("operator torchvision::nms does not exist"). No classifier needs them (they are for detection), so they go
    undescribed. What does need one says so itself ("Couldn't load custom C++ ops").

    Raises:
        ValueError: when it is not installed, or fails for another reason.
    """
    with _quietly():
        try:
            return importlib.import_module("torchvision")
        except ImportError as error:
            raise ValueError(f"torchvision can't be imported ({error}); install it with: {_INSTALL}") from error
        except RuntimeError as error:
            if "torchvision::" not in str(error):
                raise ValueError(f"torchvision can't be imported: {error}") from error
            for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
                del sys.modules[name]
            with _without_descriptions():
                return importlib.import_module("torchvision")


@contextmanager
def _without_descriptions() -> Iterator[None]:
    """Let torchvision's operators go undescribed while it is imported."""
    import torch.library

    describe = torch.library.register_fake

    def skip(op: Any, func: Any = None, /, **options: Any) -> Any:
        if isinstance(op, str) and op.startswith("torchvision::"):
            return func if func is not None else lambda function: function
        return describe(op, func, **options)

    torch.library.register_fake = skip
    try:
        yield
    finally:
        torch.library.register_fake = describe


def _alias(name: str, real: str) -> None:
    """Make a module and its submodule ``state`` importable by another name, unless there is one of that name."""
    try:
        importlib.import_module(name)
    except ModuleNotFoundError:
        sys.modules[name] = importlib.import_module(real)
        sys.modules[f"{name}.state"] = importlib.import_module(f"{real}.state")


def _remedy(error: ImportError | None) -> str:
    if error is not None and error.name == "pkg_resources":
        return f"it needs an older setuptools: pip install '{next(pin for pin in PINS if 'setuptools' in pin)}'"
    return f"install it with: {_INSTALL}"


@contextmanager
def _quietly() -> Iterator[None]:
    """Third-party packages warn about what their authors should change; users of this one need not see it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
