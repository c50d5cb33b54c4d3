"""Files that appear whole or not at all, whatever interrupts their writing."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path


def write_whole(path: str | Path, *parts: bytes) -> None:
    """Write a file whole or not at all, in a folder that is there.

    Raises:
        OSError: when it can't be written.
    """
    path = Path(path)
    write_all(path.parent, {path.name: parts})


def write_all(folder: Path, contents: Mapping[str, Iterable[bytes]]) -> None:
    """Write files whole, and all or none: each beside its place first, so that a full disk is noticed in time.

    Args:
        folder: in which they are written, in the order given.
        contents: the parts of each file by its name.

    Raises:
        OSError: when one of them can't be written.
    """
    partials = {folder / name: folder / f"{name}.part" for name in contents}
    path = folder
    try:
        for path, parts in zip(partials, contents.values(), strict=True):
            with partials[path].open("wb") as opened:
                opened.writelines(parts)
                opened.flush()
                os.fsync(opened.fileno())
        for path, partial in partials.items():
            partial.replace(path)
    except OSError as error:
        raise _not_written(path, error) from error
    finally:
        for partial in partials.values():
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """For writers that take a path: one beside the file, which takes the file's place when the block ends well.

    The folder is made where it is missing.

    Raises:
        OSError: when it can't be written.
    """
    path = Path(path)
    partial = path.with_name(f"{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        with partial.open("rb+") as opened:
            os.fsync(opened.fileno())
        partial.replace(path)
    except OSError as error:
        raise _not_written(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def _not_written(path: Path, error: OSError) -> OSError:
    hint = "; free some space" if error.errno == errno.ENOSPC else ""
    return OSError(error.errno, f"could not write {path}: {error.strerror}{hint}")
