"""Weights from files: safetensors, or what ``torch.load(weights_only=True)`` reads. Nothing else is unpickled."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import pickle
import pickletools
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from msa_eval.files import replacing
from msa_eval.hashing import file_hash
from msa_eval.untrusted import printable

_HOLDERS = ("state_dict", "model_state_dict", "model", "net")
"""Under what names training scripts keep the weights among other things, the likeliest first."""


_COUNTERS = ("n_averaged", "total_ops", "total_params")
"""What averaging and profilers leave among weights; it belongs to no layer."""


_STATISTICS = ("mean", "std")
"""Last names of what a normalisation in front of the model holds."""


_UNSEEN = ("PROTO", "FRAME", "PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE")
"""Opcodes of a pickle that make nothing."""


_DICTS = ("EMPTY_DICT", "DICT", "MARK", "GET", "BINGET", "LONG_BINGET")
"""Those that begin a dict; a class that was named before, as that of ordered dicts, is got from the memory."""


DEEPEST = 4
"""So deep in a file weights are looked for."""


class Weights(NamedTuple):
    """A set of weights of a file.

    Attributes:
        tensors: by name.
        notes: what their user should know, a sentence each.
        about: the file's name and hash, and which of its sets it is, for ``run.json``.
    """

    tensors: dict[str, Tensor]
    notes: tuple[str, ...]
    about: Mapping[str, Any]


def read_weights(source: str | Path) -> Weights:
    """Read a state dict, on the CPU.

    Args:
        source: a ``.safetensors`` file, or a file for ``torch.load(weights_only=True)``: a state dict, or what holds
            some. ``FILE:KEY`` takes the one of a name, such as ``ema.module``; without it the likeliest is taken, and
            the notes name the others.

    Raises:
        ValueError: when the file is missing, holds anything else, or has no such key.
    """
    path, key = split_key(source)
    if not path.is_file():
        raise ValueError(f"there is no weights file {path}")
    if path.suffix == ".safetensors":
        if key is not None:
            raise ValueError(f"{path} is a safetensors file, which holds one set of weights; leave :{key} out")
        return Weights(read_safetensors(path)[1], (), describe_file(path))
    held = read_plain(path)
    sets = dict(_sets(held))
    if not sets:
        keys = ", ".join(str(key) for key in [*held][:5]) if isinstance(held, Mapping) else type(held).__name__
        raise ValueError(
            f"{path} holds no state dict but {printable(keys) if keys else 'nothing'}; save model.state_dict()"
        )
    if key is not None and key not in sets:
        raise ValueError(f"{path} has no weights called {key!r}; it holds {_listed([*sets])}")
    taken = min(sets, key=_rank) if key is None else key
    others = [name for name in sets if name != taken]
    about = describe_file(path) | ({"weights_key": taken} if others else {})
    more = f"; weights={path}:{others[0]} takes another" if others else ""
    notes = [f"{path.name} holds {len(sets)} sets of weights ({_listed([*sets])}), of which {taken} is taken{more}"]
    return Weights(sets[taken], tuple(notes if others else ()), about)


def split_key(source: str | Path) -> tuple[Path, str | None]:
    """The file and the key of ``FILE:KEY``; the key is ``None`` where there is none.

    >>> split_key("net.pt:ema.module"), split_key("net.pt")
    ((PosixPath('net.pt'), 'ema.module'), (PosixPath('net.pt'), None))
    """
    file, separator, key = str(source).rpartition(":")
    if not separator or Path(source).is_file() or not Path(file).suffix:
        return Path(source), None
    return Path(file), key


def read_plain(path: Path) -> Any:
    """What ``torch.load(weights_only=True)`` reads from a file, on the CPU.

    Raises:
        ValueError: when it refuses the file.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what it warns of is refused, with what to do
            return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, LookupError, ValueError, zipfile.BadZipFile) as error:
        if advice := _clean_copy(path, str(error)):
            raise ValueError(advice) from error
        # The unpickler stops at a file of another kind with a bare number, or with words of its own.
        reason = str(error).splitlines()[0].split(". ")[0] if not isinstance(error, LookupError) and str(error) else ""
        if not reason or reason.startswith(("[", "Weights only")):
            reason = "it is of another kind"
        raise ValueError(
            _not_fetched(path)
            or f"{path} is not a file of plain weights that torch.load(weights_only=True) reads ({reason}); save "
            "model.state_dict(), best as safetensors"
        ) from error


def load_weights(model: nn.Module, tensors: Mapping[str, Tensor], *, source: str) -> list[str]:
    """Put weights into a model; every one must have its place and every place its weight.

    Args:
        model: gets the weights.
        tensors: its state dict; what wrappers put before all of its names is dropped where they fit without it, and
            counters that belong to no layer are left out.
        source: the name of the file, for errors.

    Returns:
        what was left out, a sentence each.

    Raises:
        ValueError: when they don't fit.
    """
    expected = model.state_dict()
    fitting, left = _fitted(tensors, set(expected))
    absent = {name for name in expected if name.endswith("num_batches_tracked")} - set(fitting)
    fitting |= {name: expected[name] for name in absent}  # old files have none, and evaluation uses none
    if wrong := misfits(model, fitting):
        unknown = [name for name in fitting if name not in expected]
        has = f"; the file has {_listed(unknown)}" if unknown and set(expected) - set(fitting) else ""
        raise ValueError(f"{source} does not fit the model: {wrong}{has}")
    model.load_state_dict(fitting)
    notes = [f"{name} in {source} belongs to no layer and is ignored" for name in left if _counts(name)]
    return notes + [
        f"{source} holds {name} = {printable([round(v, 4) for v in left[name].flatten().tolist()[:4]])}, for which the "
        f"model has no place: see that it normalises its images so itself"
        for name in left
        if not _counts(name)
    ]


def other_classes(model: nn.Module, tensors: Mapping[str, Tensor]) -> int | None:
    """The number of classes of weights that fit a model but for its number of classes; ``None`` if they don't."""
    expected = model.state_dict()
    fitting, _ = _fitted(tensors, set(expected))
    other = {
        (expected[name].shape[0], value.shape[0])
        for name, value in fitting.items()
        if name in expected and value.shape != expected[name].shape and value.ndim and expected[name].ndim
    }
    return other.pop()[1] if len(other) == 1 else None


def describe_file(path: str | Path) -> dict[str, Any]:
    """What a result says of a weights file: its name, without its folder, and its SHA-256."""
    return {"weights": Path(path).name, "weights_sha256": file_hash(path)}


def _sets(held: Any, name: str = "", depth: int = 0) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """All state dicts within what a file holds, by their dotted names; those of optimisers are none."""
    if not isinstance(held, Mapping) or not held or depth > DEEPEST:
        return
    if all(isinstance(value, Tensor) for value in held.values()):
        if all(isinstance(key, str) for key in held):
            yield name or "state_dict", dict(held)
        return
    for key, value in held.items():
        if isinstance(key, str) and not key.lower().startswith(("optim", "sched", "lr_", "scaler")):
            yield from _sets(value, f"{name}.{key}" if name else key, depth + 1)


def _rank(name: str) -> tuple[int, int]:
    """How likely a set is the one meant; the least is taken, and of equals the first."""
    first, *inner = name.split(".")
    return (_HOLDERS.index(first) if first in _HOLDERS else len(_HOLDERS)), len(inner)


def _fitted(tensors: Mapping[str, Tensor], names: set[str]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Tensors under the names of a model, and what has no place there and needs none.

    Of the prefixes under which some name of the model is found, the one is dropped under which most are.
    """
    endings = sorted(names, key=len, reverse=True)[:20]
    found = {name.removesuffix(end) for name in tensors for end in endings if name.endswith(f".{end}")}
    prefix = max(["", *sorted(found)], key=lambda one: sum(f"{one}{name}" in tensors for name in names))
    renamed, left = {}, {}
    for name, value in tensors.items():
        own = name.removeprefix(prefix) if name.startswith(prefix) else name
        last = name.rpartition(".")[2]
        if own not in names and (_counts(name) or (prefix and not name.startswith(prefix) and last in _STATISTICS)):
            left[name] = value
        else:
            renamed[own] = value
    return renamed, left


def _counts(name: str) -> bool:
    return name.rpartition(".")[2] in _COUNTERS


def _listed(names: Sequence[str]) -> str:
    return printable(", ".join(names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


_REFUSED = re.compile(r"GLOBAL ([\w.]+)")


def _clean_copy(path: Path, error: str) -> str:
    """How to make a file of plain weights of one that holds objects; empty where it holds none."""
    save = 'torch.save({weights}, "clean.pt")'
    if "TorchScript" in error:
        line = save.format(weights=f'torch.jit.load("{path.name}", map_location="cpu").state_dict()')
        return f"{path} is a TorchScript archive, of which the weights are needed alone: {line}"
    found = _REFUSED.search(error)
    if found is None or not found[1].rpartition(".")[2][:1].isupper():
        return ""  # what is no class, as getattr, belongs into no file of weights
    load = f'torch.load("{path.name}", map_location="cpu", weights_only=False)'
    keys = _top_keys(path)
    weights = f"{load}.state_dict()"
    if keys is not None:
        model = next((key for key in _HOLDERS if keys.get(key) is False), None)  # where no key holds a state dict
        held = next((key for key in _HOLDERS if keys.get(key)), None)
        weights = f'{load}["{held or model or "state_dict"}"]' + (".state_dict()" if model and not held else "")
    what = "holds" if keys is not None else "is, or holds,"
    return (
        f"{path} {what} an object of the class {printable(found[1])}, which is never unpickled here; where you trust "
        f"the file, make a clean one: {save.format(weights=weights)}"
    )


def _not_fetched(path: Path) -> str:
    """What came in place of a file that was not fetched; empty where it is something else.

    >>> _not_fetched(Path(__file__))
    ''
    """
    with path.open("rb") as file:
        start = file.read(64).lstrip()
    if not start:
        return f"{path} is empty; fetch it again"
    if start.startswith(b"version https://git-lfs"):
        return f"{path} is a Git LFS pointer, not the weights; run git lfs pull"
    if start.startswith(b"<"):
        return f"{path} is a web page, not the weights; fetch what it links to"
    return ""


def _top_keys(path: Path) -> dict[str, bool] | None:
    """Texts in a file whose outermost object is a dict, its keys among them; ``None`` where it is of another kind.

    Of each, whether a dict follows it: of a key, whether it holds one, and no other object. The pickle is read and not
    run.
    """
    with contextlib.suppress(Exception), zipfile.ZipFile(path) as archive:  # of pickletools, on a damaged file
        name = next(name for name in archive.namelist() if name.endswith("data.pkl"))
        codes = [(code.name, argument) for code, argument, _ in pickletools.genops(archive.read(name))]
        codes = [(code, argument) for code, argument in codes if code not in _UNSEEN]
        if codes[0][0] in _DICTS:
            found: dict[str, bool] = {}
            for (_, text), (code, after) in itertools.pairwise(codes):
                if isinstance(text, str):
                    is_dict = code in _DICTS or str(after).startswith("collections")
                    found[text] = found.get(text, False) or is_dict
            return found
    return None


def write_safetensors(path: str | Path, tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> None:
    """Write tensors and metadata to a safetensors file that appears whole or not at all; the same bytes each time.

    Raises:
        OSError: when it can't be written.
    """
    with replacing(path) as partial:
        try:
            save_file(dict(tensors), partial, metadata=dict(header))
        except SafetensorError as error:
            raise OSError(errno.EIO, str(error)) from error
        partial.chmod(0o644)  # safetensors makes it readable by its owner alone
        with partial.open("rb+") as opened:
            _order(opened)


def _order(opened: BinaryIO) -> None:
    """Put the metadata in order, which safetensors writes in another one each time."""
    length = int.from_bytes(opened.read(8), "little")
    header = json.loads(opened.read(length))
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    assert len(text) <= length, "the same header, in another order, is no longer"
    opened.seek(8)
    opened.write(text.ljust(length))


def read_safetensors(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Read the metadata and the tensors of a safetensors file, on the CPU.

    Raises:
        ValueError: when the file is missing or is no safetensors file.
    """
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    try:
        with safe_open(path, framework="pt", device="cpu") as opened:
            header = dict(opened.metadata() or {})
            return header, {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} is not a readable safetensors file ({printable(error)}); pickles are never loaded"
        ) from error


def misfits(model: nn.Module, tensors: Mapping[str, Tensor]) -> str:
    """What is wrong with the names, shapes and values of tensors that a model is to load; empty if nothing is."""
    expected = model.state_dict()
    problems = [f"{name} is missing" for name in expected.keys() - tensors.keys()]
    problems += [f"{name} is not part of the model" for name in tensors.keys() - expected.keys()]
    for name in expected.keys() & tensors.keys():
        if expected[name].shape != tensors[name].shape:
            problems.append(f"{name} is {tuple(tensors[name].shape)}, not {tuple(expected[name].shape)}")
        elif not bool(torch.isfinite(tensors[name]).all()):
            problems.append(f"{name} holds values that are not finite")
    more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
    return "; ".join(sorted(problems)[:3]) + more
