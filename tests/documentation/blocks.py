"""The code blocks of README and documentation, and how each is run.

pytest-examples runs Python alone, and mktestdocs compares no output. Here commands run in this process, in one folder a
page, and what a page shows of their output is compared with it.

A block that can't run in a test has ``<!-- not run: WHY -->`` in front of it.
"""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise, takewhile
from pathlib import Path
from typing import Any

import click
from click.testing import CliRunner

from msa_eval.cli import main

ROOT = Path(__file__).parents[2]
MANUAL = [ROOT / "README.md", *sorted(path for path in (ROOT / "docs").rglob("*.md") if path.parent.name != "research")]
NOTES = sorted((ROOT / "docs" / "research").glob("*.md"))
_BLOCK = re.compile(
    r"(?:^<!-- not run: (?P<why>[^\n]*) -->\n)?^```(?P<language>\w*)(?P<info>[^\n]*)\n(?P<source>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e-?\d+)?")


@dataclass(frozen=True)
class Block:
    """A block of a page.

    Attributes:
        page: where it stands.
        line: in which line it begins.
        language: ``bash``, ``python``, ``text``, ``toml`` or none.
        source: what it holds.
        title: the file that it is the content of, if any.
        why: the reason why it is not run, if any.
    """

    page: Path
    line: int
    language: str
    source: str
    title: str = ""
    why: str = ""

    @property
    def place(self) -> str:
        """Page and line."""
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def commands(self) -> list[list[str]]:
        """The words of each command of a bash block: lines may go on after a backslash."""
        lines = self.source.replace("\\\n", " ").splitlines()
        return [words for line in lines if (words := shlex.split(line, comments=True))]


def blocks(page: Path) -> Iterator[Block]:
    """All blocks of a page, in order."""
    text = page.read_text(encoding="utf-8")
    for found in _BLOCK.finditer(text):
        title = re.search(r'title="([^"]+)"', found["info"])
        line = text.count("\n", 0, found.start("language")) + 1
        yield Block(page, line, found["language"], found["source"], title[1] if title else "", found["why"] or "")


def mistake(words: list[str]) -> str:
    """What click finds wrong in a command of msa-eval, whether or not it is run; empty where nothing is."""
    try:
        _parse(words)
    except click.UsageError as error:
        return f"{shlex.join(words)}: {error.format_message()}"
    return ""


def _parse(words: list[str]) -> None:
    arguments = words[words.index("msa-eval") + 1 :]
    command = main.get_command(click.Context(main), arguments[0])
    if command is None:
        raise click.UsageError(f"there is no command {arguments[0]}")
    while isinstance(command, click.Group) and len(arguments) > 1 and arguments[1] in command.commands:
        command, arguments = command.commands[arguments[1]], arguments[1:]
    given = list(takewhile(lambda word: not re.fullmatch(r"[;|>&]+", word), arguments[1:]))
    command.make_context(command.name, given, resilient_parsing=False)


def missing(quoted: str, printed: str) -> list[str]:
    """The lines that a page quotes and that were not printed, or not in this order; numbers may differ by little.

    Lines of ``...`` stand for any. Other machines round otherwise, so a number may differ by 7 (one of 16 samples, in
    %) or by a tenth.
    """
    ahead = iter([" ".join(line.split()) for line in printed.splitlines()])
    wanted = [" ".join(line.split()) for line in quoted.splitlines()]
    return [line for line in wanted if line not in ("", "...") and not any(_alike(line, found) for found in ahead)]


def _alike(one: str, other: str) -> bool:
    if _NUMBER.sub("#", one) != _NUMBER.sub("#", other):
        return False
    pairs = zip(_NUMBER.findall(one), _NUMBER.findall(other), strict=True)
    return all(abs(float(a) - float(b)) <= max(7.0, 0.1 * abs(float(a))) for a, b in pairs)


@dataclass
class Session:
    """What runs the blocks of a page, in a folder of its own.

    Attributes:
        folder: the working folder.
        names: what Python blocks have defined.
        printed: what the last block that was run printed.
    """

    folder: Path
    names: dict[str, Any] = field(default_factory=lambda: {"__name__": "__docs__"})
    printed: str = ""

    def run(self, block: Block) -> list[str]:
        """Run a block, or compare it with what was printed; returns the lines that it quotes and were not printed.

        Raises:
            AssertionError: when a command fails.
        """
        if block.title:
            (self.folder / block.title).write_text(block.source, encoding="utf-8")
        elif block.language == "python":
            self._clear(re.findall(r'\bout="([^"]+)"', block.source))
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                exec(compile(block.source, block.place, "exec"), self.names)
            self.printed = out.getvalue()
        elif block.language == "bash":
            self.printed = "".join(self.command(words, block) for words in block.commands)
        elif block.language == "text" and self.printed:
            return [f"{block.place}: {line}" for line in missing(block.source, self.printed)]
        return []

    def command(self, words: list[str], block: Block) -> str:
        """Run a command of msa-eval, and return what it printed."""
        assert words[0] == "msa-eval", f"{block.place}: only commands of msa-eval can run: {words}"
        self._clear([value for option, value in pairwise(words) if option == "--out"])
        few = ["--steps", "2"] if words[1] == "crosscheck" and "--steps" not in words else []
        done = CliRunner().invoke(main, [*words[1:], *few])
        fine = (0, 1) if words[1] in ("crosscheck", "doctor") else (0,)
        assert done.exit_code in fine, f"{block.place}: {shlex.join(words)}\n{done.output}\n{done.exception!r}"
        return done.stdout

    def _clear(self, outs: list[str]) -> None:
        """Take away what is to be written: pages name the same folder or file several times."""
        for path in (self.folder / out for out in outs):
            shutil.rmtree(path, ignore_errors=True)
            if path.is_file():
                path.unlink()
