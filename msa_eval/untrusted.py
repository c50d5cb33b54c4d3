"""Files from strangers: what holds for all that is read of them."""

from __future__ import annotations

from pathlib import Path

LONGEST = 200
"""Messages quote at most this many letters of a text from a file."""


def printable(text: object) -> str:
    r"""A text or an error that a file gave, in a line that can be printed.

    >>> print(printable("a\n b\x1b[31m"), printable(KeyError()))
    a b\x1b[31m KeyError
    """
    line = " ".join(str(text).split()) or type(text).__name__
    line = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in line[: LONGEST + 1])
    return line if len(line) <= LONGEST else f"{line[:LONGEST]}\N{HORIZONTAL ELLIPSIS}"


def check_inside(path: Path, folder: Path) -> Path:
    """A file or folder of a folder: a link must not lead out of it.

    Raises:
        ValueError: when it does.
    """
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{path} is a link that leads out of {folder}; put the file itself there")
    return path
