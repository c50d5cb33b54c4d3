"""A folder with one subfolder of images per class; what is evaluated is decoded, and nothing else."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from msa_eval.data.pixels import Preparation, is_colour, read_picture
from msa_eval.data.samples import Decoder, Samples
from msa_eval.untrusted import check_inside, printable

SHOWN = 20
"""So many classes are listed in a note."""


def read_folder(path: Path, prepare: Preparation, classes: Path | None) -> Samples:
    """Samples of a folder of class folders.

    The labels are the places of the class folders in their order: by number where all names are numbers, and else by
    name.

    Args:
        path: the folder.
        prepare: what is done to every image.
        classes: a file with the model's own order of classes (see `read_classes`), of which the folders are some.

    Raises:
        ValueError: when the folder is not like that, or a class folder is not among the classes.
    """
    folders = _class_folders(path)
    files = [(file, folder.name) for folder in folders for file in _files(folder, path)]
    if not files:
        raise ValueError(f"{path}: the class folders hold no images")
    labels = {folder.name: label for label, folder in enumerate(folders)}
    names = [printable(folder.name) for folder in folders]
    if classes is not None:
        names, known = read_classes(classes)
        labels = {folder.name: _label(folder.name, known, classes) for folder in folders}
    colour = any(is_colour(file) for file, _ in files)

    def read(number: int) -> torch.Tensor:
        return read_picture(files[number][0], prepare, colour=colour)

    return Samples(
        Decoder(len(files), read, lambda number: str(files[number][0])),
        torch.tensor([labels[folder] for _, folder in files]),
        path.resolve().name,
        classes=names,
        prepared=str(prepare),
        notes=[_mapping(labels)],
    )


def read_classes(path: Path) -> tuple[list[str], Mapping[str, int]]:
    """The classes of a model in its own order, and the label of every name of theirs.

    Args:
        path: a text file with a class a line, whose whole line and first word are its names; or a ``.json`` file with
            a list of names, or an object from labels to names, or to lists of names.

    Raises:
        ValueError: when the file is missing, or not like that.
    """
    try:
        text = path.read_text(encoding="utf-8")
        named = _from_json(json.loads(text)) if path.suffix == ".json" else _from_lines(text)
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is not a list of classes, one per line: {printable(error)}") from error
    labels: dict[str, int] = {}
    for label, names in enumerate(named):
        for name in names:
            if labels.setdefault(name, label) != label and name == names[0]:
                raise ValueError(f"{path} names the class {printable(name)} twice, as {labels[name]} and as {label}")
    return [printable(names[0]) for names in named], labels


def _from_lines(text: str) -> list[list[str]]:
    lines = text.strip().splitlines()
    if not lines or not all(line.strip() for line in lines):
        raise ValueError("a line is empty, and the number of a line is the label")
    return [list(dict.fromkeys([line.strip(), line.split()[0]])) for line in lines]


def _from_json(held: Any) -> list[list[str]]:
    if isinstance(held, Mapping):
        held = [held[str(label)] if str(label) in held else _missing(label) for label in range(len(held))]
    found = [entry if isinstance(entry, list) else [entry] for entry in held]
    if not found or not all(names and all(isinstance(name, str) for name in names) for names in found):
        raise ValueError("expected a list of names, or an object from labels to names")
    return found


def _missing(label: int) -> Any:
    raise ValueError(f"label {label} is missing")


def _label(folder: str, known: Mapping[str, int], source: Path) -> int:
    if folder in known:
        return known[folder]
    close = difflib.get_close_matches(folder, known, n=1)
    hint = f" (did you mean {printable(close[0])}?)" if close else ""
    raise ValueError(f"the class folder {printable(folder)} is not in {source}{hint}; its lines name the folders")


def _mapping(labels: Mapping[str, int]) -> str:
    shown = [f"{printable(name)} = {label}" for name, label in list(labels.items())[:SHOWN]]
    more = f" and {len(labels) - SHOWN} more" if len(labels) > SHOWN else ""
    return f"labels by class folder: {', '.join(shown)}{more}"


def _class_folders(path: Path) -> list[Path]:
    folders = [entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith((".", "__"))]
    for folder in folders:
        check_inside(folder, path)
    if not folders:
        raise ValueError(f"{path} has no subfolders; expected one folder of images per class")
    return sorted(folders, key=_by_number if all(folder.name.isdecimal() for folder in folders) else _by_name)


def _by_number(folder: Path) -> tuple[int, str]:
    return int(folder.name), folder.name


def _by_name(folder: Path) -> str:
    return folder.name


def _files(folder: Path, root: Path) -> Sequence[Path]:
    files = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    for file in files:
        if not check_inside(file, root).is_file():
            inner = f"; give one part of the data, as {folder}" if file.is_dir() else ""
            raise ValueError(f"{file} is not a readable image: it is no file{inner}")
    return files
