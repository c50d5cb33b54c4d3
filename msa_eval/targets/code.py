"""The user's own code as a target: ``module:callable`` or ``path/to/file.py:callable``.

It is imported, so it runs: a target word of this kind is the only way to make that happen, and the results say so.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import importlib.util
import inspect
import sys
from pathlib import Path
from types import ModuleType

from torch import nn

from msa_eval.defense.contract import has_trunk

POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def make(word: str) -> tuple[object, Path | None]:
    """Import the user's code and call what it names; a model or a defence in its place is taken as it is.

    So is a function that has to be given one thing, which can only be images.

    The folder of the file, or the current one, is put last on ``sys.path``, so that the code finds its neighbours.

    Args:
        word: ``module:callable`` or ``path/to/file.py:callable``; dots lead to attributes.

    Returns:
        what it returned, and the file it is defined in.

    Raises:
        ValueError: when there is no such file, module or callable, when it fails, or when it returns anything but a
            model or a defence.
    """
    with contextlib.redirect_stdout(sys.stderr):  # what it prints is not part of our output
        return _make(word)


def source(word: str) -> Path | None:
    """The file of code that was made, if it has one."""
    place = word.rpartition(":")[0]
    file = place if place.endswith(".py") else getattr(sys.modules.get(place), "__file__", None)
    return Path(file) if file is not None and Path(file).is_file() else None


def _make(word: str) -> tuple[object, Path | None]:
    place, _, name = word.rpartition(":")
    module = _from_file(Path(place), word) if place.endswith(".py") else _from_module(place, word)
    found: object = module
    for part in name.split("."):
        if not hasattr(found, part):
            names = [key for key in vars(found) if not key.startswith("_")] if hasattr(found, "__dict__") else []
            close = difflib.get_close_matches(part, names, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"{place} has no {part!r}{hint}")
        found = getattr(found, part)
    if isinstance(found, type) or not (isinstance(found, nn.Module) or has_trunk(found) or _takes_images(found)):
        if not callable(found):
            raise ValueError(f"{word} is a {type(found).__name__}, not a function that returns a model")
        try:
            found = found()
        except Exception as error:
            raise ValueError(f"{word} failed when it was called without arguments: {_said(error)}") from error
    if not (callable(found) or has_trunk(found)) or isinstance(found, type):
        raise ValueError(
            f"{word} returned a {type(found).__name__}; expected a module or function from images to logits, or an "
            f"object with features(x) and logits(z)"
        )
    file = getattr(module, "__file__", None)
    return found, None if file is None else Path(file)


def _takes_images(found: object) -> bool:
    """Whether something can only be the model itself: a function, or the like, that has to be given one thing."""
    if isinstance(found, type) or not callable(found):
        return False
    try:
        parameters = inspect.signature(found).parameters.values()
    except (TypeError, ValueError):
        return False
    return sum(one.default is one.empty and one.kind in POSITIONAL for one in parameters) == 1


def _from_file(path: Path, word: str) -> ModuleType:
    if not path.is_file():
        folder = path.parent
        names = [entry.name for entry in folder.glob("*.py")] if folder.is_dir() else []
        close = difflib.get_close_matches(path.name, names, n=1)
        hint = f"; did you mean {folder / close[0]}?" if close else ""
        raise ValueError(f"there is no file {path}{hint}")
    _reachable(path.resolve().parent)
    # A name of its own, so that a file called torch.py hides nothing.
    name = f"msa_eval_target_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path} can't be imported")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise ValueError(f"{word} can't be imported: {_said(error)}") from error
    return module


def _from_module(name: str, word: str) -> ModuleType:
    _reachable(Path.cwd())
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise ValueError(f"{word} can't be imported: {_said(error)}") from error
        raise ValueError(
            f"{word}: there is no module {error.name!r}; expected module:callable, path/to/file.py:callable, or one of "
            f"robustbench:NAME, torchvision:NAME, timm:NAME and hf:NAME{_meant(name)}"
        ) from error
    except Exception as error:
        raise ValueError(f"{word} can't be imported: {_said(error)}") from error


def _meant(name: str) -> str:
    close = difflib.get_close_matches(name, ["robustbench", "torchvision", "timm"], n=1)
    return f"; did you mean {close[0]}:...?" if close else ""


def _reachable(folder: Path) -> None:
    if str(folder) not in sys.path:
        sys.path.append(str(folder))


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
