"""Installed packages, held to their own records and to each other's requirements.

A wheel may write into another package's folder, and then neither pip nor an import says so. What a package consists of
stands in its ``RECORD`` (name and hash of each file), what it needs in its ``METADATA``.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import importlib.util
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.machinery import PathFinder
from importlib.metadata import Distribution
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit
from urllib.request import url2pathname

from packaging.requirements import InvalidRequirement, Requirement

Command = tuple[str, ...]
"""What to run: a program and its arguments."""

SearchPath = Sequence[str] | None
"""Where to look for packages, ``sys.path`` by default."""


class Altered(NamedTuple):
    """Files of a package that are not as its record says; paths as in the record."""

    changed: tuple[str, ...]
    missing: tuple[str, ...]
    recorded: int

    def __str__(self) -> str:
        """How many, and the first few."""
        said = [
            f"{len(names)} {what} ({', '.join(names[:2])}{', ...' if len(names) > 2 else ''})"
            for what, names in (("changed", self.changed), ("missing", self.missing))
            if names
        ]
        return f"of its {self.recorded} files {' and '.join(said)}" if said else f"its {self.recorded} files are whole"


def find(name: str, path: SearchPath = None) -> Distribution | None:
    """The distribution that is installed by that name, the first one on the path."""
    for found in Distribution.discover(name=name, path=list(sys.path if path is None else path)):
        if found.read_text("METADATA") or found.read_text("PKG-INFO"):
            return found
    return None


def altered(found: Distribution, package: str) -> Altered | None:
    """Hold the files of an import package to the record of the distribution they came with.

    Files outside of that package's folder are left out: scripts are written at installation, and careless wheels share
    a ``tests`` folder, or another package's.

    Returns:
        what differs; ``None`` where the record has no file of that package, as in an editable installation.
    """
    # Not `found.files`, which leaves out missing ones from Python 3.12 on.
    rows = [row for row in csv.reader((found.read_text("RECORD") or "").splitlines()) if len(row) >= 2 and row[1]]
    mine = [(name, digest) for name, digest, *_ in rows if name.split("/")[0] == package]
    files = {name: (Path(str(found.locate_file(name))), digest) for name, digest in mine}
    missing = tuple(name for name, (file, _) in files.items() if not file.is_file())
    changed = tuple(name for name, (file, digest) in files.items() if name not in missing and not _is(file, digest))
    return Altered(changed, missing, len(files)) if files else None


def _is(file: Path, digest: str) -> bool:
    algorithm, _, expected = digest.partition("=")
    found = hashlib.new(algorithm, file.read_bytes()).digest()
    return base64.urlsafe_b64encode(found).rstrip(b"=") == expected.rstrip("=").encode()


def shadow(found: Distribution, package: str, path: SearchPath = None) -> Path | None:
    """The folder of that name which is imported in place of the distribution's own; ``None`` where it is its own."""
    imported = folder(package, path)
    own = Path(str(found.locate_file(package)))
    return imported if imported is not None and imported.resolve() != own.resolve() else None


def stray(package: str, host: str, path: SearchPath = None) -> Path | None:
    """The folder of a package that is imported, where it came with the distribution ``host``; ``None`` if not so."""
    found, imported = find(host, path), folder(package, path)
    if found is None or imported is None:
        return None
    return imported if imported.resolve() == Path(str(found.locate_file(package))).resolve() else None


def folder(package: str, path: SearchPath = None) -> Path | None:
    """The folder that a package would be imported from."""
    spec = PathFinder.find_spec(package, None if path is None else list(path))
    places = list(spec.submodule_search_locations or ()) if spec is not None else []
    return Path(places[0]) if places else None


def wrong_with(name: str, path: SearchPath = None) -> str:
    """What is wrong with the files of an installed package of the same import name; empty if nothing is.

    >>> wrong_with("click")
    ''
    """
    found = find(name, path)
    differs = None if found is None else altered(found, name)
    if found is None or differs is None:
        return ""
    if (other := shadow(found, name, path)) is not None:
        return f"another package's folder is imported in its place: {other}"
    return str(differs) if differs.changed or differs.missing else ""


def pip(*arguments: str) -> tuple[Command, ...]:
    """The commands that run pip in this environment, which may have to be given one first."""
    install = (sys.executable, "-m", "pip", *arguments)
    return (install,) if importlib.util.find_spec("pip") else ((sys.executable, "-m", "ensurepip"), install)


def reinstall(found: Distribution) -> tuple[Command, ...]:
    """The commands that put a distribution's files back, the same version from where it came, and touch no other."""
    return pip("install", "--force-reinstall", "--no-deps", origin(found) or f"{found.name}=={found.version}")


def origin(found: Distribution) -> str:
    """The URL that a distribution was installed from, where it was one and is still there (PEP 610)."""
    about = json.loads(found.read_text("direct_url.json") or "{}")
    url = str(about.get("url", ""))
    if "vcs_info" in about:
        return f"{about['vcs_info']['vcs']}+{url}@{about['vcs_info']['commit_id']}"
    parts = urlsplit(url)
    return url if parts.scheme != "file" or Path(url2pathname(parts.path)).exists() else ""


def requirements(found: Distribution, path: SearchPath = None) -> list[Requirement]:
    """What a distribution asks for here: the base, and its extras that are called like an installed package."""
    extras = [extra for extra in found.metadata.get_all("Provides-Extra") or () if find(extra, path)]
    return list(_asked(found, extras))


def unmet(top: Requirement, path: SearchPath = None, excused: Iterable[tuple[str, str]] = ()) -> list[str]:
    """Where a requirement, or one of those that follow from it, is not met by what is installed.

    Args:
        top: the first requirement.
        path: where to look for packages.
        excused: pairs of a package and one that it only says it needs.
    """
    return list(_walk(top, path, set(excused))[1])


def followed(tops: Iterable[Requirement], path: SearchPath = None) -> Mapping[str, str]:
    """The versions of all installed packages that requirements lead to, by name."""
    return {name: version for top in tops for name, version in _walk(top, path, set())[0].items()}


def _walk(top: Requirement, path: SearchPath, excused: set[tuple[str, str]]) -> tuple[dict[str, str], list[str]]:
    versions: dict[str, str] = {}
    wrong: list[str] = []
    seen: set[tuple[str, str]] = set()
    ahead = [(top, "msa-eval")]
    while ahead:
        requirement, asker = ahead.pop()
        if (str(requirement), asker) in seen or (asker.split()[0], requirement.name) in excused:
            continue
        seen.add((str(requirement), asker))
        found = find(requirement.name, path)
        wanted = f"{asker} needs {requirement.name}{requirement.specifier}"
        if found is None:
            wrong.append(f"{wanted}, which is not installed")
            continue
        versions[requirement.name] = found.version
        if not requirement.specifier.contains(found.version, prereleases=True):
            wrong.append(f"{wanted}, but {found.version} is installed")
        else:
            ahead += [(child, f"{found.name} {found.version}") for child in _asked(found, requirement.extras)]
    return versions, wrong


def _asked(found: Distribution, extras: Iterable[str]) -> Iterator[Requirement]:
    for text in found.requires or ():
        try:
            requirement = Requirement(text)
        except InvalidRequirement:  # of old metadata
            continue
        marker = requirement.marker
        if marker is None or any(marker.evaluate({"extra": extra}) for extra in ("", *extras)):
            yield requirement
