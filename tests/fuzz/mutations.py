"""Files that are nearly valid, and files that are not at all; every choice is the given `random.Random`'s."""

from __future__ import annotations

import csv
import io
import json
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from fuzz.readers import MARK, pack_header

INTEGERS = (0, 1, -1, 2, 127, 255, 256, 2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64, -(2**63), 10**30)
TEXTS = (
    "", "\x00", MARK, "\n", "../../../etc/passwd", "/etc/passwd", "C:\\x", "NaN", "inf", "-1", "1e999", "True", "é",
    "\u202e", "x" * 300, "%s{0}", "defense", "fc", "joint", "solo", "hpm", "classifier", "wideresnet", "digits-cnn",
    "module:callable", "os:system", "pickle", "\ud800",
)  # fmt: skip
KEYS = ("depth", "width", "cut", "mean", "std", "exhibits", "index", "shape", "dtype", "data_offsets", "__class__")


class Payload:
    """What unpickling it would do."""

    def __init__(self, canary: str) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.mkdir, (Path(self.canary),)


def value(random: Random, depth: int = 0) -> Any:
    """Any JSON value."""
    kind = random.randrange(9 if depth < 3 else 6)
    if kind in (0, 1):
        return random.choice(INTEGERS)
    if kind == 2:
        return random.choice((0.5, -0.5, 1e308, float("nan"), float("inf")))
    if kind in (3, 4):
        return random.choice(TEXTS)
    if kind == 5:
        return random.choice((None, True, False))
    if kind == 6:
        return [value(random, depth + 1) for _ in range(random.randrange(4))]
    return {random.choice(KEYS + TEXTS): value(random, depth + 1) for _ in range(random.randrange(4))}


def tree(random: Random, root: Any) -> Any:
    """A JSON value with one place of it changed, taken away, doubled or nested."""
    if isinstance(root, str) and root[:1] in "{[" and random.random() < 0.9:
        try:  # JSON in a text, as in the metadata of safetensors
            return json.dumps(tree(random, json.loads(root)))
        except ValueError:
            return value(random)
    if not isinstance(root, dict | list) or not root or random.random() < 0.15:
        return value(random)
    keys: list[Any] = list(root) if isinstance(root, dict) else list(range(len(root)))
    key = random.choice(keys)
    changed = dict(root) if isinstance(root, dict) else list(root)
    what = random.randrange(6)
    if what == 0:
        del changed[key]
    elif what == 1:
        changed[key] = value(random)
    elif what == 2 and isinstance(changed, dict):
        changed[random.choice(KEYS + TEXTS)] = changed[key]
    elif what == 3 and isinstance(changed, list):
        changed += changed * random.randrange(1, 4)
    else:
        changed[key] = tree(random, changed[key])
    return changed


def raw(random: Random, content: bytes) -> bytes:
    """Bytes with a few changes."""
    held = bytearray(content)
    for _ in range(random.choice((1, 1, 2, 4, 8))):
        at = random.randrange(len(held) + 1)
        size = random.choice((1, 1, 2, 4, 8, 16, 64))
        what = random.randrange(6)
        if what == 0 and held:
            held[at % len(held)] ^= 1 << random.randrange(8)
        elif what == 1:
            del held[at : at + size]
        elif what == 2:
            held[at:at] = random.randbytes(size)
        elif what == 3:
            held[at : at + size] = (random.choice(INTEGERS) % 2 ** (8 * size)).to_bytes(
                size, random.choice(("little", "big"))
            )
        elif what == 4:
            held[at:at] = held[at : at + size] * random.choice((1, 2, 100))
        else:
            held[at : at + size] = random.choice(TEXTS).encode("utf-8", "surrogatepass")
    return bytes(held[: random.randrange(len(held) + 1)] if random.random() < 0.1 else held)


def safetensors(random: Random, content: bytes) -> bytes:
    """A file with another header, of the right or of a wrong length."""
    (size,) = struct.unpack_from("<Q", content)
    header = json.loads(content[8 : 8 + size])
    for _ in range(random.choice((1, 1, 2))):
        header = tree(random, header)
    made = pack_header(header, content[8 + size :])
    if random.random() < 0.1:
        made = struct.pack("<Q", random.choice(INTEGERS) % 2**64) + made[8:]
    return made


def json_file(random: Random, content: bytes) -> bytes:
    """Another JSON file."""
    return json.dumps(tree(random, json.loads(content))).encode()


def table(random: Random, content: bytes) -> bytes:
    """A CSV with another cell, row or column."""
    rows = list(csv.reader(io.StringIO(content.decode())))
    row = random.choice(rows)
    what = random.randrange(6)
    if what == 0:
        rows.remove(row)
    elif what == 1:
        rows.append(list(row))
    elif what == 2:
        rows = [[cell for i, cell in enumerate(line) if i != 1] for line in rows]
    else:
        texts = (*TEXTS, *map(str, INTEGERS), random.choice(random.choice(rows)))
        row[random.randrange(len(row))] = random.choice(texts)
    held = io.StringIO()
    csv.writer(held, lineterminator="\n").writerows(rows)
    return held.getvalue().encode("utf-8", "surrogatepass")


def npz(random: Random, content: bytes) -> bytes:
    """An archive with other members, headers that lie, and other ways of packing."""
    with zipfile.ZipFile(io.BytesIO(content)) as opened:
        members = {name: opened.read(name) for name in opened.namelist()}
    name = random.choice(list(members))
    what = random.randrange(6)
    if what == 0:
        members[name] = raw(random, members[name])
    elif what in (1, 2):
        members[name] = _npy(random)
    elif what == 3:
        members[random.choice(("../../x.npy", "/tmp/x.npy", "z.npy", "y"))] = members.pop(name)
    elif what == 4:
        members[name] = members[name] + random.randbytes(random.choice((1, 1000)))
    packed = random.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2))
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w", packed) as made:
        for name, text in members.items():
            made.writestr(name, text)
    return raw(random, held.getvalue()) if what == 5 else held.getvalue()


def _npy(random: Random) -> bytes:
    """An array with any header."""
    sizes = [random.choice((0, 1, 2, 3, 4, 8, 2**20, 2**40, -1)) for _ in range(random.randrange(6))]
    dtype = random.choice(("|u1", "<f4", ">f4", "<f8", "<f2", "<i8", "<u8", "|b1", "|O", "<c8", "<U4", "|V0", "<M8[s]"))
    held = io.BytesIO()
    header = {"descr": dtype, "fortran_order": random.random() < 0.2, "shape": tuple(sizes)}
    np.lib.format.write_array_header_1_0(held, header)  # type: ignore[arg-type]
    return held.getvalue() + random.randbytes(random.choice((0, 8, 96, 1024)))


def toml(random: Random, content: bytes) -> bytes:
    """A protocol with another line, key or value."""
    lines = content.decode().splitlines()
    at = random.randrange(len(lines))
    key, equals, _ = lines[at].partition(" = ")
    what = random.randrange(5)
    if what == 0:
        del lines[at]
    elif what == 1:
        lines.insert(at, random.choice(lines))
    elif what == 2 and equals:
        lines[at] = f"{json.dumps(random.choice(TEXTS))}{equals}1"
    else:
        held = value(random)
        text = "{}" if held is None or isinstance(held, dict) else json.dumps(held)
        lines[at] = f"{key}{equals or ' = '}{text}"
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def scratch(random: Random, canary: str) -> bytes:
    """A file that was never valid."""
    what = random.randrange(6)
    if what == 0:
        return random.randbytes(random.choice((0, 1, 8, 100)))
    if what == 1:
        return pickle.dumps(Payload(canary))
    if what == 2:
        return b"[" * 100_000
    if what == 3:
        return json.dumps(value(random)).encode()
    if what == 4:
        return pack_header(value(random), b"")
    return "\n".join(f"{random.choice(TEXTS)} = {random.choice(TEXTS)}" for _ in range(5)).encode(
        "utf-8", "surrogatepass"
    )


BY_SUFFIX: dict[str, Callable[[Random, bytes], bytes]] = {
    ".safetensors": safetensors, ".json": json_file, ".csv": table, ".npz": npz, ".toml": toml, ".img": raw,
}  # fmt: skip


def mutated(random: Random, files: dict[str, bytes], canary: str) -> dict[str, bytes]:
    """The files, one of them changed in a way that goes with its kind, as bytes, replaced, or gone."""
    name = random.choice(sorted(files))
    how = random.randrange(20)
    if how == 0:
        return {other: content for other, content in files.items() if other != name}
    if how == 1:
        return files | {name: scratch(random, canary)}
    change = raw if how < 6 else BY_SUFFIX[Path(name).suffix]
    return files | {name: change(random, files[name])}
