"""Attacks of other libraries, behind guards: pyautoattack, torchattacks and foolbox.

An attack is run on a `BatchModel`, which answers each image in its place in the whole batch, and what
it returns is held to the ball, the box and float32 before anybody judges it (see
`msa_eval.attacks.external.sanitize`). A library is imported when one of its attacks is asked for, and not before.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from msa_eval.attacks.ball import Ball
from msa_eval.attacks.external.adapter import LibraryAttack

LIBRARIES: Mapping[str, tuple[str, str]] = {
    "autoattack": ("pyautoattack", "pip install pyautoattack==0.2.0"),
    "torchattacks": ("torchattacks", "pip install --no-deps torchattacks==3.5.1"),
    "foolbox": ("foolbox", "pip install 'msa-eval[foolbox]'"),
}
"""By the name that protocols use: the package, and how it is installed.

torchattacks is best installed without what it asks for: it pins an old ``requests`` that it needs for downloads only.
Its wheel also carries an old ``robustbench/`` that overwrites the real one, whichever was installed last.
"""


def installed(library: str) -> str | None:
    """The version of a library's package here, or ``None``."""
    try:
        return importlib.metadata.version(LIBRARIES[library][0])
    except importlib.metadata.PackageNotFoundError:
        return None


def library_of(name: str) -> str:
    """The library of an external attack's name.

    Raises:
        ValueError: when there is none of that name, or no attack is named.

    >>> library_of("foolbox:LinfPGD")
    'foolbox'
    """
    library, _, attack = name.partition(":")
    if library not in LIBRARIES or not attack:
        close = difflib.get_close_matches(library, LIBRARIES, n=1)
        hint = f" (did you mean {close[0]}:{attack or 'NAME'}?)" if close and close[0] + ":" != name else ""
        raise ValueError(f"unknown peer {name!r}{hint}; expected library:attack, of {', '.join(LIBRARIES)}")
    return library


def find(name: str, ball: Ball, options: Mapping[str, Any] | None = None) -> LibraryAttack:
    """An attack of other libraries, ready to be run.

    Args:
        name: ``library:attack``, such as ``autoattack:fab-t``, ``torchattacks:PGD`` or ``foolbox:LinfPGD``.
        ball: the perturbation set; its radius and, where the attack knows several, its norm are passed on.
        options: of the attack, by the names that its authors gave them.

    Raises:
        ValueError: when there is no such attack or option, or the library is not installed.
    """
    library = library_of(name)
    library_attack: LibraryAttack = _adapter(library).make(name.partition(":")[2], ball, options or {})
    return library_attack


def _adapter(library: str) -> ModuleType:
    package, command = LIBRARIES[library]
    try:
        importlib.import_module(package)
    except ImportError as error:
        raise ValueError(f"{package} can't be imported ({error}); install it with: {command}") from error
    return importlib.import_module(f"msa_eval.attacks.external.{library}")
