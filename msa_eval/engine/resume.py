"""The units of an evaluation: what is finished is kept on disk, so that another process can go on from there.

A unit is a run on a batch; when all runs of a batch are made, they give way to one unit for the batch. While an
evaluation is under way its folder holds ``unfinished/``, with a file a unit and ``evaluation.json``, which says what
they belong to, and ``.lock``, which says who is at work. Both go when the results have been written in full.

A file is a line with the SHA-256 of all that follows, a line of JSON that names the evaluation's key and the unit, and
what `msa_eval.engine.serialization` makes of the unit. It is written beside its place, synced, and moved there, so
that a unit is there whole or not at all; one that was changed is reported and computed again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from msa_eval.engine.folder_lock import locked
from msa_eval.engine.serialization import pack, unpack
from msa_eval.evidence.diff import differences
from msa_eval.evidence.folder import UNFINISHED, claim_folder, set_aside
from msa_eval.files import write_whole
from msa_eval.progress import Notify, warn

T = TypeVar("T")


ABOUT = "evaluation.json"

FORMAT = 2
"""Of what is kept; it names classes, so it counts up when one of them changes."""


class ResumeStore:
    """The finished units of one evaluation; without a folder, nothing is kept.

    Args:
        folder: of the units.
        key: what they belong to.
        device: where tensors that were not on the CPU return to.
        notify: called with what is damaged or gone.
        started: when the evaluation was begun, by `time.perf_counter`.

    Attributes:
        environments: where other processes worked on it, as far as that differs from where this one does.
    """

    def __init__(
        self,
        folder: Path | None = None,
        key: str = "",
        *,
        device: str = "cpu",
        notify: Notify = warn,
        started: float | None = None,
    ) -> None:
        self.folder, self._key, self._device, self.notify = folder, key, device, notify
        self._started, self._before = time.perf_counter() if started is None else started, 0.0
        self.environments: list[Mapping[str, Any]] = []
        self._held = self.names()
        self._reported: set[str] = set()

    @property
    def seconds(self) -> float:
        """Wall time so far, with that of the processes before, as far as their units tell."""
        return self._before + time.perf_counter() - self._started

    def made_at(self, where: Mapping[str, Any], here: Mapping[str, Any]) -> None:
        """Note a place where units are made, beside the one where this process runs; reported once."""
        if where == here or where in self.environments:
            return
        self.environments.append(where)
        self.notify(f"some of it is made elsewhere ({differences({'where': here}, {'where': where})}), so it may "
                    f"differ by rounding from one made in one place")  # fmt: skip
        if self.folder is not None:
            stated = json.loads((self.folder / ABOUT).read_bytes())
            _write(self.folder / ABOUT, json.dumps(stated | {"where": [*stated["where"], where]}).encode())

    def names(self) -> set[str]:
        """Of the units that are there."""
        return set() if self.folder is None else {path.stem for path in self.folder.glob("*.unit")}

    def read(self, name: str, kind: type[T]) -> T | None:
        """A finished unit of a kind, or ``None`` where there is none; one that is damaged or gone is reported."""
        if self.folder is None:
            return None
        path = self._path(name)
        try:
            value, seconds = self._decode(path.read_bytes(), name)
            if not isinstance(value, kind):
                raise ValueError("it does not hold what it should")
        except FileNotFoundError:
            self._miss(name)
            return None
        except (ValueError, TypeError, KeyError, RecursionError, OSError) as error:
            self._reported.add(name.partition(".")[0])
            self.notify(f"{path} is damaged ({error}): that unit is computed again")
            return None
        self._before = max(self._before, seconds)
        return value

    def _miss(self, name: str) -> None:
        """Tell of a unit that is not there, once a batch, where later ones of its series are."""
        batch, runner = name.partition(".")[0], name.rpartition("-")[0]
        later = [held for held in self._held if held.rpartition("-")[0] == runner and held > name]
        if batch not in self._reported and any("." in name or not held.startswith(f"{batch}.") for held in later):
            self._reported.add(batch)
            self.notify(f"unit {name} is not there, though later ones are; what is missing is computed again")

    def write(self, name: str, value: Any) -> None:
        """Keep a finished unit.

        Args:
            name: ``runner-number`` for a batch, ``runner-number.number`` for a run on it.
            value: as `pack` takes it.

        Raises:
            OSError: when it can't be written.
        """
        if self.folder is None:
            return
        about = {"key": self._key, "unit": name, "seconds": round(self.seconds, 3)}
        parts = (json.dumps(about).encode() + b"\n", *pack(value))
        digest = hashlib.sha256()
        for part in parts:
            digest.update(part)
        _write(self._path(name), digest.hexdigest().encode() + b"\n", *parts)

    def drop(self, *names: str) -> None:
        """Take units away that another one stands for."""
        for name in names if self.folder is not None else ():
            self._path(name).unlink(missing_ok=True)

    def finish(self) -> None:
        """Take all away: the results have been written."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, name: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{name}.unit"

    def _decode(self, content: bytes, name: str) -> tuple[Any, float]:
        digest, _, body = content.partition(b"\n")
        if hashlib.sha256(body).hexdigest().encode() != digest:
            raise ValueError("its checksum does not match")
        line, _, packed = body.partition(b"\n")
        about = json.loads(line)
        if about["key"] != self._key or about["unit"] != name:
            raise ValueError("it is a unit of something else")
        return unpack(packed, device=self._device), float(about["seconds"])


@contextlib.contextmanager
def opened(
    out: Path | None,
    about: Mapping[str, Any],
    *,
    options: Mapping[str, Any],
    where: Mapping[str, Any],
    force: bool,
    device: str,
    notify: Notify,
    started: float | None = None,
) -> Iterator[ResumeStore]:
    """The units of an evaluation in a results folder, which no other process works in meanwhile.

    Args:
        out: the folder; where there is none, no unit is kept.
        about: what the results depend on, and its ``key``.
        options: what the units depend on besides.
        where: packages and machine, which units should not depend on, but may.
        force: start anew, and keep what the folder holds under a dated name.
        device: where it is made.
        notify: called with what a user should know.
        started: when it was begun, by `time.perf_counter`.

    Raises:
        ValueError: when the folder holds another evaluation or other files, is in use, or can't be written.
    """
    if out is None:
        yield ResumeStore(notify=notify, started=started)
        return
    claim_folder(out, about, force=force)
    with locked(out, notify):
        if force and (moved := set_aside(out, about["key"])):
            notify(f"what {out} held is kept in {moved}")
        claim_folder(out, about, force=force)  # another process may have finished meanwhile
        stated = {**about, "options": dict(options), "where": [dict(where)]}
        store = ResumeStore(*_begun(out / UNFINISHED, stated), device=device, notify=notify, started=started)
        store.environments = stated["where"][1:]
        if store.environments:
            places = differences({"where": store.environments[0]}, {"where": dict(where)})
            notify(f"it was begun elsewhere ({places}), so it may differ by rounding from one made in one place")
        try:
            yield store
        finally:
            if not store.names():
                store.finish()


def _begun(folder: Path, stated: dict[str, Any]) -> tuple[Path, str]:
    """The folder of units, made if need be, and their key; where nothing tells whose they are, each of them will.

    Where other processes worked elsewhere, that is added to ``where``.

    Raises:
        ValueError: when they belong to another evaluation, or an older release kept them in another form.
    """
    stated["format"] = FORMAT
    key = hashlib.sha256(json.dumps([stated["key"], stated["options"]], sort_keys=True).encode()).hexdigest()
    stated["key"] = key
    try:
        held = json.loads((folder / ABOUT).read_bytes())
    except (OSError, ValueError, RecursionError):
        held = None
    if isinstance(held, dict) and held.get("format") != FORMAT:
        raise ValueError(
            f"{folder.parent} holds an unfinished evaluation of another release, which kept finished runs in another "
            f"form; finish it with that release, or start anew with force=True, which keeps it under a dated name"
        )
    if isinstance(held, dict) and held.get("key") != key:
        raise ValueError(
            f"{folder.parent} holds another evaluation, unfinished, which differs in {differences(held, stated)}; "
            f"choose another folder, or start anew with force=True, which keeps it under a dated name"
        )
    others = held.get("where", []) if isinstance(held, dict) else []
    stated["where"] += [place for place in others if place not in stated["where"]]
    folder.mkdir(exist_ok=True)
    _write(folder / ABOUT, json.dumps(stated).encode())
    return folder, key


def _write(path: Path, *parts: bytes) -> None:
    try:
        write_whole(path, *parts)
    except OSError as error:
        kept = "the units finished before are kept, and the same command goes on from there"
        raise OSError(error.errno, f"{error.strerror}; {kept}") from error
