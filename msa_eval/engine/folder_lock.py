"""The lock of a folder: one process at a time goes on with an evaluation."""

from __future__ import annotations

import contextlib
import json
import os
import platform
from collections.abc import Iterator, Mapping
from io import FileIO
from pathlib import Path
from typing import Any

from msa_eval.evidence.folder import LOCK
from msa_eval.progress import Notify

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


@contextlib.contextmanager
def locked(folder: Path, notify: Notify) -> Iterator[None]:
    """Keep other processes out of a folder.

    The operating system's own lock on the file decides, so that none outlives its process; where there is no such
    lock, the process that the file names does.

    Raises:
        ValueError: when another process is at work there.
    """
    path = folder / LOCK
    with _hold(path, notify) as opened:
        try:
            with contextlib.suppress(OSError):  # on a full disk it is held without a name
                opened.truncate(0)
                opened.write(json.dumps({"pid": os.getpid(), "host": platform.node()}).encode())
            yield
        finally:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)


def _hold(path: Path, notify: Notify) -> FileIO:
    while True:
        try:
            opened = path.open("ab+", buffering=0)
        except OSError as error:
            raise ValueError(f"{path} can't be written: {error.strerror}; choose another folder") from error
        opened.seek(0)
        holder = _holder(opened.read())
        owner = f"process {holder['pid']} on {holder['host']}" if holder else "another process"
        if not _take(opened, holder):
            opened.close()
            raise ValueError(f"{path.parent} is in use by {owner}; wait until it ends, or choose another folder")
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(opened.fileno()), path.stat()):  # else its last holder just took it away
                if holder:
                    notify(f"took over the lock of {owner}, which has ended")
                return opened
        opened.close()


def _take(opened: FileIO, holder: Mapping[str, Any] | None) -> bool:
    """Whether the lock is ours now."""
    try:
        if fcntl is not None:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
    except BlockingIOError:
        return False
    except OSError:
        pass  # a file system without locks
    return holder is None or (holder["host"] == platform.node() and not _alive(int(holder["pid"])))


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _holder(content: bytes) -> dict[str, Any] | None:
    try:
        holder = json.loads(content)
    except ValueError:
        return None
    return holder if isinstance(holder, dict) and {"pid", "host"} <= holder.keys() else None
