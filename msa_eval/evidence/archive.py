"""The archive of adversarial batches: what breaks each broken sample, in one safetensors file.

Points are kept as perturbations, in as few bytes as the hard target lets pass: a rounded point is another point, and
may no longer break what the point itself broke. So every proof is replayed as it will be read before it is written,
and takes the first encoding, from the smallest to the exact one, in which it still holds:

- ``int8``: the perturbation in 127ths of ε, for Linf (what lies on the border of the ball or the box comes back exact);
- ``float16``: the perturbation;
- ``float32``: the points themselves.

Where the protocol's points lie on a grid of up to 256 levels they are kept as ``uint8``, by the numbers of their
levels, which is exact and takes one byte too.

A perturbation is added to the clean image and projected into the ball, which is the protocol's: the file names none.
The tensor's type says which encoding it has. The file's metadata holds the format, its version and a list of proofs;
proof i has the tensors ``i/positions``, ``i/x`` and, by its kind, ``i/own`` or ``i/companions``. Nothing is unpickled.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from msa_eval.attacks.ball import Ball
from msa_eval.data.levels import from_level, level_of
from msa_eval.defense.contexts import CONTEXTS
from msa_eval.evidence.proof import Broken, Proof
from msa_eval.hashing import file_hash
from msa_eval.targets.weights import write_safetensors
from msa_eval.untrusted import printable

FORMAT = "msa-eval-adversarial"


FORMAT_VERSION = 1


LIMIT_BYTES = 2_000_000_000
"""The largest archive that is written, unless the caller says otherwise."""


KINDS = ("batch", "rows", "victims")


_STEPS = 127


BYTE = 256
"""Levels whose numbers a byte holds."""


_ENTRY_BYTES = 400
"""What a proof takes up in the file's header, at most: four tensors at 100 bytes each."""


@dataclass(frozen=True)
class Written:
    """What became of the proofs.

    Attributes:
        bytes: size of the file.
        sha256: of the file.
        proofs: how many are in it.
        samples: how many samples they break.
        left_out: how many samples' proofs would have gone over the limit.
        unconfirmed: the samples that even the exact points don't break when they are replayed.
    """

    bytes: int
    sha256: str
    proofs: int
    samples: int
    left_out: int
    unconfirmed: tuple[Broken, ...]

    def about(self, file: str) -> dict[str, Any]:
        """What ``run.json`` says of the archive."""
        counts = {"proofs": self.proofs, "samples": self.samples, "left_out": self.left_out}
        return {"file": file, "sha256": self.sha256, "bytes": self.bytes} | counts | {
            "unconfirmed": [list(sample) for sample in self.unconfirmed]
        }  # fmt: skip


def write(
    path: str | Path,
    proofs: Iterable[Proof],
    clean_images: Callable[[int], Tensor],
    ball: Ball,
    *,
    confirm: Callable[[Proof], Tensor],
    exact: Collection[str] = (),
    limit_bytes: int = LIMIT_BYTES,
) -> Written:
    """Write proofs to one safetensors file, each in the smallest encoding in which it still holds.

    Args:
        path: the file; it appears whole or not at all.
        proofs: in the order in which they are kept as long as there is room.
        clean_images: the clean batch ``(B, C, H, W)`` of a number.
        ball: the perturbation set.
        confirm: replays a proof, on the CPU, on the real target: which of its positions are broken ``(n,)``.
        exact: the targets whose points are kept as they are: stochastic ones, of which no other batch was judged.
        limit_bytes: of the file; a proof that would go over it is left out and counted.

    Raises:
        ValueError: when a proof is malformed.
        OSError: when the file can't be written.
    """
    kept: list[dict[str, Any]] = []
    tensors: dict[str, Tensor] = {}
    unconfirmed: list[Broken] = []
    size, samples, left_out = 1000, 0, 0
    for proof in proofs:
        clean = _clean(clean_images, proof.batch)
        settled, rest = _settle(_checked(proof, clean), clean, ball, confirm, exact=proof.target in exact)
        unconfirmed += [Broken(proof.target, proof.context, proof.batch, int(p)) for p in rest.positions]
        for held, entry, parts in settled:
            needed = sum(part.nbytes for part in parts.values()) + _ENTRY_BYTES + len(json.dumps(entry))
            if size + needed > limit_bytes:
                left_out += held
                continue
            tensors |= {f"{len(kept)}/{name}": part for name, part in parts.items()}
            kept.append(entry)
            size, samples = size + needed, samples + held
    header = {"format": FORMAT, "format_version": str(FORMAT_VERSION), "proofs": json.dumps(kept)}
    write_safetensors(path, tensors, header)
    return Written(Path(path).stat().st_size, file_hash(path), len(kept), samples, left_out, tuple(unconfirmed))


def read(path: str | Path, clean_images: Callable[[int], Tensor], ball: Ball) -> list[Proof]:
    """Read all proofs of a file that `write` wrote; see `Archive`, which reads one at a time.

    Raises:
        ValueError: when the file is no such archive, or a proof in it doesn't fit its clean batch.
    """
    return list(Archive(path, clean_images, ball))


class Archive:
    """The proofs of a file, read one at a time; the file is taken for hostile.

    Args:
        path: the file.
        clean_images: the clean batch ``(B, C, H, W)`` of a number; `LookupError` where there is none.
        ball: the perturbation set.

    Raises:
        ValueError: here or when it is iterated over, when the file is no such archive or a proof is malformed.
    """

    def __init__(self, path: str | Path, clean_images: Callable[[int], Tensor], ball: Ball) -> None:
        self.path = Path(path)
        self._clean_images = clean_images
        self._ball = ball
        if not self.path.is_file():
            raise ValueError(f"there is no file {self.path}")
        try:
            with self._open() as opened:
                self._entries = _entries(opened.metadata() or {})
                _check_tensors(opened, self._entries)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{self.path} is not a readable safetensors file ({printable(error)})") from error
        except ValueError as error:
            raise ValueError(f"{self.path}: {printable(error)}") from error

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Proof]:
        with self._open() as opened:
            for i in range(len(self)):
                yield self._proof(opened, i)

    def __getitem__(self, number: int) -> Proof:
        with self._open() as opened:
            return self._proof(opened, number)

    def _open(self) -> Any:
        return safe_open(self.path, framework="pt", device="cpu")

    def _proof(self, opened: Any, i: int) -> Proof:
        entry = self._entries[i]
        try:
            parts = {name: opened.get_tensor(f"{i}/{name}") for name in _parts(entry)}
            clean = _clean(self._clean_images, entry["batch"])
            proof = _checked(Proof(**entry, **parts), clean)
            return _recode(proof, clean, functools.partial(_decode, ball=self._ball))
        except (SafetensorError, ValueError) as error:
            raise ValueError(f"{self.path}: proof {i}: {printable(error)}") from error


def _settle(
    proof: Proof, clean: Tensor, ball: Ball, confirm: Callable[[Proof], Tensor], *, exact: bool
) -> tuple[list[tuple[int, dict[str, Any], dict[str, Tensor]]], Proof]:
    """Encode a proof: what is stored (number of samples, entry, tensors), and what could not be confirmed.

    Rows stand each for themselves and may take different encodings; a batch holds as a whole or moves on to the next.
    """
    settled = []
    encodings = _encodings(ball, exact=exact)
    for dtype in encodings:
        coded = _recode(proof, clean, functools.partial(_encode, ball=ball, dtype=dtype))
        holds = confirm(_recode(coded, clean, functools.partial(_decode, ball=ball))).cpu()
        if proof.kind != "rows" and dtype != encodings[-1] and not bool(holds.all()):
            continue
        if bool(holds.any()):
            settled.append((int(holds.sum()), _entry(proof), _stored(coded.only(holds))))
        proof = proof.only(~holds)
        if not len(proof.positions):
            break
    return settled, proof


def _encodings(ball: Ball, *, exact: bool) -> list[torch.dtype]:
    """From the smallest to the exact one."""
    if ball.levels is not None:
        return [torch.uint8] if ball.levels <= BYTE else [torch.float32]
    return [*([] if exact else [torch.int8, torch.float16] if ball.norm == "Linf" else [torch.float16]), torch.float32]


def _encode(points: Tensor, clean: Tensor, *, ball: Ball, dtype: torch.dtype) -> Tensor:
    if dtype == torch.float32:
        return points.float().clone()
    if dtype == torch.uint8:
        return level_of(points, ball.levels or BYTE).to(torch.uint8)
    if dtype == torch.float16:
        return (points - clean).half()
    steps = ((points - clean) * (_STEPS / max(ball.eps, 1e-30))).round().clamp(-_STEPS, _STEPS)
    # On the border of the ball or the box a whole ε is projected back to the point itself.
    steps[points <= ball.project(clean - ball.eps, clean)] = -_STEPS
    steps[points >= ball.project(clean + ball.eps, clean)] = _STEPS
    return torch.where(points == clean, 0, steps).to(torch.int8)


def _decode(stored: Tensor, clean: Tensor, *, ball: Ball) -> Tensor:
    if stored.dtype == torch.int8 and ball.norm != "Linf":
        raise ValueError(f"8-bit perturbations are for Linf, but the protocol's norm is {ball.norm}")
    if stored.is_floating_point() and not bool(torch.isfinite(stored).all()):
        raise ValueError("it holds NaN or infinite values")
    if stored.dtype == torch.uint8:
        if ball.levels is None or (stored.numel() and int(stored.max()) >= ball.levels):
            raise ValueError(f"8-bit points lie on a grid, but the protocol's has {ball.levels or 'no'} levels")
        return from_level(stored, ball.levels)
    if stored.dtype == torch.float32:
        return stored
    delta = stored.float() / _STEPS * ball.eps if stored.dtype == torch.int8 else stored.float()
    return ball.project(clean + delta, clean)


def _recode(proof: Proof, clean: Tensor, code: Callable[[Tensor, Tensor], Tensor]) -> Proof:
    """The proof with each of its images put through a function of itself and the clean image in its place."""
    own = clean[proof.positions]
    return dataclasses.replace(
        proof,
        x=code(proof.x, own if proof.kind == "rows" else clean),
        own=None if proof.own is None else code(proof.own, own),
    )


def _clean(clean_images: Callable[[int], Tensor], number: int) -> Tensor:
    try:
        return clean_images(number).detach().cpu().float()
    except LookupError as error:
        raise ValueError(f"there is no batch {number} in the plan") from error


def _checked(proof: Proof, clean: Tensor) -> Proof:
    """A proof on the CPU that fits its clean batch, with positions to index by.

    Raises:
        ValueError: when it doesn't.
    """
    _check_entry(_entry(proof))
    parts = {name: part.detach().cpu() for name, part in _tensors(proof).items()}
    if parts.keys() != set(_parts(_entry(proof))):
        raise ValueError(f"expected {', '.join(_parts(_entry(proof)))}, but got {', '.join(parts)}")
    if parts["positions"].ndim != 1:
        raise ValueError(f"expected positions of one dimension, but got shape {tuple(parts['positions'].shape)}")
    n, size, image = len(parts["positions"]), len(clean), tuple(clean.shape[1:])
    shapes = {
        "positions": (n,), "x": (n if proof.kind == "rows" else size, *image), "own": (n, *image),
        "companions": (n, size - 1),
    }  # fmt: skip
    for name, part in parts.items():
        if tuple(part.shape) != shapes[name]:
            raise ValueError(f"expected {name} of shape {shapes[name]}, but got {tuple(part.shape)}")
    positions = parts["positions"].long()
    if not n or len(positions.unique()) < n or int(positions.min()) < 0 or int(positions.max()) >= size:
        raise ValueError(f"expected different positions in a batch of {size}, but got {positions.tolist()}")
    companions = parts["companions"].long() if "companions" in parts else None
    return dataclasses.replace(proof, positions=positions, x=parts["x"], own=parts.get("own"), companions=companions)


def _entry(proof: Proof) -> dict[str, Any]:
    return {"target": proof.target, "context": proof.context, "batch": int(proof.batch), "kind": proof.kind}


def _check_entry(entry: Any) -> None:
    if not isinstance(entry, dict) or entry.keys() != {"target", "context", "batch", "kind"}:
        raise ValueError("expected target, context, batch and kind")
    if not isinstance(entry["target"], str):
        raise ValueError("expected the name of a target")
    if entry["context"] not in list(CONTEXTS):  # it may be anything, a list too
        raise ValueError(f"unknown context {entry['context']!r:.40}; expected one of {', '.join(CONTEXTS)}")
    if entry["kind"] not in KINDS:
        raise ValueError(f"unknown kind {entry['kind']!r:.40}; expected one of {', '.join(KINDS)}")
    if isinstance(entry["batch"], bool) or not isinstance(entry["batch"], int) or entry["batch"] < 0:
        raise ValueError(f"expected the number of a batch, but got {entry['batch']!r:.40}")


def _parts(entry: Mapping[str, Any]) -> list[str]:
    """The tensors that a proof has."""
    more = ["own"] if entry["kind"] == "victims" else []
    if entry["kind"] == "rows" and CONTEXTS[entry["context"]].chooses_companions:
        more.append("companions")
    return ["positions", "x", *more]


def _tensors(proof: Proof) -> dict[str, Tensor]:
    parts = {"positions": proof.positions, "x": proof.x, "own": proof.own, "companions": proof.companions}
    return {name: part for name, part in parts.items() if part is not None}


def _entries(metadata: Mapping[str, str]) -> list[dict[str, Any]]:
    """The list of proofs in the file's metadata."""
    if metadata.get("format") != FORMAT:
        raise ValueError("it is a safetensors file, but no archive of adversarial batches")
    if metadata.get("format_version") != str(FORMAT_VERSION):
        raise ValueError(
            f"it has archive format version {metadata.get('format_version')}, but this release reads {FORMAT_VERSION}"
        )
    try:
        entries = json.loads(metadata.get("proofs", ""))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its list of proofs is not readable: {error}") from error
    if not isinstance(entries, list):
        raise ValueError("its list of proofs is not a list")
    for i, entry in enumerate(entries):
        try:
            _check_entry(entry)
        except (ValueError, TypeError) as error:
            raise ValueError(f"proof {i}: {error}") from error
    return entries


def _check_tensors(opened: Any, entries: Sequence[Mapping[str, Any]]) -> None:
    """Compare names and types before any tensor is read."""
    expected = {f"{i}/{name}" for i, entry in enumerate(entries) for name in _parts(entry)}
    found = set(opened.keys())
    if missing := expected - found:
        raise ValueError(f"tensor {min(missing)} is missing")
    if strange := found - expected:
        raise ValueError(f"tensor {min(strange)!r:.40} belongs to no proof")
    for name in sorted(found):
        types = ("I8", "U8", "F16", "F32") if name.endswith(("/x", "/own")) else ("I32",)
        dtype = opened.get_slice(name).get_dtype()
        if dtype not in types:
            raise ValueError(f"expected tensor {name} to be of type {' or '.join(types)}, but got {dtype}")


def _stored(proof: Proof) -> dict[str, Tensor]:
    """Its tensors as they are written; indices take 32 bits."""
    return {name: (part if name in ("x", "own") else part.int()).contiguous() for name, part in _tensors(proof).items()}
