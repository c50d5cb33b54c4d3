"""Hooks of MkDocs: links that leave docs/ lead to copies on the site, or become plain text."""

from __future__ import annotations

import posixpath
import re
import shutil
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(((?:\.\./)+[^)\s#]+)\)")
COPIED = {".svg", ".png", ".csv", ".py", ".toml"}
"""What is copied; a folder or another document becomes plain text."""


SOURCE = ROOT / "build" / "source" / "msa_eval"
"""The package in one folder, as it is installed: in the repository two of its folders stand beside it."""


def on_startup(command: str, dirty: bool) -> None:
    """Put the package together for mkdocstrings, which reads files, imports nothing and follows no links."""
    shutil.rmtree(SOURCE, ignore_errors=True)
    shutil.copytree(ROOT / "msa_eval", SOURCE, ignore=shutil.ignore_patterns("__pycache__"))
    for beside in ("surrogates", "protocols"):
        shutil.copytree(ROOT / beside, SOURCE / beside, ignore=shutil.ignore_patterns("__pycache__"))


def _outside(page: str, link: str) -> str | None:
    """The path in the repository that a link of a page of docs/ leads to, where it leaves docs/."""
    path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), link))
    return None if path.startswith("docs/") else path


def on_files(files: Any, config: Any) -> Any:
    """Add the linked files from outside docs/ to the site."""
    from mkdocs.structure.files import File

    for page in list(files.documentation_pages()):
        for _, _, link in LINK.findall(page.content_string):
            path = _outside(page.src_uri, link)
            if path and Path(path).suffix in COPIED and (ROOT / path).is_file() and not files.get_file_from_path(path):
                files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Make links that leave docs/ lead there."""

    def rewrite(found: re.Match[str]) -> str:
        mark, text, link = found.groups()
        path = _outside(page.file.src_uri, link)
        if path is None:
            return found[0]
        if not files.get_file_from_path(path):
            return text
        return f"{mark}[{text}]({posixpath.relpath(path, posixpath.dirname(page.file.src_uri) or '.')})"

    return LINK.sub(rewrite, markdown)
