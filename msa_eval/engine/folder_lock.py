"""The lock of a folder: one process at a time goes on with an evaluation."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, SoftFileLock, Timeout

from msa_eval.evidence.folder import HOLDER, LOCK
from msa_eval.progress import Notify


@contextlib.contextmanager
def locked(folder: Path, notify: Notify) -> Iterator[None]:
    """Keep other processes out of a folder.

    The operating system's own lock decides, so that none outlives its process; where a file system has no such lock,
    the process that the file beside it names does.

    Raises:
        ValueError: when another process is at work there, or the folder can't be written.
    """
    lock, name = FileLock(folder / LOCK), SoftFileLock(folder / HOLDER)
    owner, ours = _owner(folder / HOLDER), False
    with contextlib.ExitStack() as held:
        try:
            with contextlib.suppress(OSError):  # a file system without locks
                held.enter_context(lock.acquire(blocking=False))
                ours = True
                (folder / HOLDER).unlink(missing_ok=True)
            with contextlib.suppress(*[OSError] if ours else []):  # on a full disk it is held without a name
                held.enter_context(name.acquire(blocking=False))
        except Timeout as error:
            raise ValueError(
                f"{folder} is in use by {owner or 'another process'}; wait until it ends, or choose another folder"
            ) from error
        except OSError as error:
            raise ValueError(f"{folder / LOCK} can't be written: {error.strerror}; choose another folder") from error
        if owner:
            notify(f"took over the lock of {owner}, which has ended")
        held.callback((folder / LOCK).unlink, missing_ok=True)  # while it is held
        release = held.pop_all()
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # on a disk that can't be written any more; the system's own lock ends
            release.close()


def _owner(path: Path) -> str | None:
    """The process that a lock names; ``None`` where it names none."""
    try:
        pid, host = path.read_text(encoding="utf-8", errors="replace").splitlines()[:2]
    except (OSError, ValueError):
        return None
    return f"process {pid} on {host}"
