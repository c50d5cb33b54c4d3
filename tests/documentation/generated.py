"""The parts of the documentation that are made from the code: python -m tests.documentation.generated writes them anew.

A part stands between ``<!-- generated: NAME -->`` and ``<!-- /generated -->``.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING
from pathlib import Path

from msa_eval.evidence.schema import columns_markdown
from msa_eval.protocols.loading import load_protocol, shipped
from msa_eval.protocols.validation import KEYS, Key

DOCS = Path(__file__).parents[2] / "docs"
OF_THE_FILE = {
    "schema": "version of this format; this release reads 1.",
    "source": "where the protocol comes from, such as a paper's section.",
}


def meanings(kind: type) -> dict[str, str]:
    """What a class's docstring says of each of its attributes or arguments."""
    text = inspect.getdoc(kind) or ""
    part = re.search(r"^(?:Attributes|Args):\n(.*?)(?:\n\n|\n\S|\Z)", text + "\n", re.MULTILINE | re.DOTALL)
    assert part, kind
    entries = re.findall(r"^    (\w+): (.*?)(?=^    \w+: |\Z)", part[1] + "\n", re.MULTILINE | re.DOTALL)
    return {name: " ".join(meaning.split()).replace("``", "`") for name, meaning in entries}


def _default(key: Key) -> str:
    if key.default is MISSING:
        return "required"
    if key.default is None or key.default == ():
        return ""
    shown = list(key.default) if isinstance(key.default, tuple) else key.default
    return f"`{str(shown).replace(chr(39), chr(34))}`"


def _held(key: Key) -> str:
    try:
        key.check(object())
    except ValueError as error:
        return str(error).replace(" and below 2^63", "")
    raise AssertionError(key)


def keys_markdown() -> str:
    """Every key of a protocol: what it may hold, its default and its meaning."""
    lines = ["| key | holds | default | meaning |", "| --- | --- | --- | --- |"]
    for name, key in KEYS.items():
        meaning = OF_THE_FILE.get(name) or meanings(key.kind)[key.field]
        lines.append(f"| `{name}` | {_held(key)} | {_default(key)} | {meaning} |")
    return "\n".join(lines)


def protocols_markdown() -> str:
    """The protocols that come with the package."""
    lines = ["| protocol | version | what it is |", "| --- | --- | --- |"]
    for name in shipped():
        protocol = load_protocol(name)
        lines.append(f"| `{name}` | {protocol.version} | {protocol.description} |")
    return "\n".join(lines)


PARTS: Mapping[str, Callable[[], str]] = {
    "columns": columns_markdown,
    "protocol-keys": keys_markdown,
    "protocols": protocols_markdown,
}
MARKED = re.compile(r"(<!-- generated: ([\w-]+) -->\n).*?(<!-- /generated -->)", re.DOTALL)


def current(text: str) -> str:
    """A page's text with its generated parts made anew."""
    return MARKED.sub(lambda found: f"{found[1]}\n{PARTS[found[2]]()}\n\n{found[3]}", text)


if __name__ == "__main__":
    for path in sorted(DOCS.rglob("*.md")):
        before = path.read_text(encoding="utf-8")
        if (after := current(before)) != before:
            path.write_text(after, encoding="utf-8")
            print(path)
