"""Guards around an attack of others: what it may not do is undone, and told.

Some attacks return clean images as adversarial ones, change a model's mode, round to float16 or to whole grey levels,
seed the global generators, write into the logits they are given, or leave the ball. None of that may reach a verdict.
"""

from __future__ import annotations

import contextlib
import io
import random
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from msa_eval.peers.peer import Peer
    from msa_eval.peers.seat import Seat

TOLD = {
    "outside": "{count} points left the ball by up to {size:.3g} and were projected",
    "dtype": "{count} points came in {detail} and were converted to float32",
    "rounded": "{count} points were rounded to whole grey levels",
    "mode": "the model's training mode was changed in {count} batches and put back",
    "clean": "{count} samples came back clean, and the point shown that its model liked least stands in",
    "unmoved": "{count} samples were never moved",
    "seed": "the global generators were seeded in {count} batches, ours are kept apart",
    "logits": "the logits handed out were written into in {count} batches, they are copies",
}
"""The kinds of faults, and how each is told."""

LOUD = ("outside", "dtype", "rounded", "mode")
"""Those that a table tells; the others are an attack's habit, and change nothing here."""


class PeerError(RuntimeError):
    """An attack of others failed in a way that must never read as robustness."""


@dataclass(frozen=True)
class Fault:
    """Something that an attack did and should not have.

    Attributes:
        kind: what.
        count: of how many samples, or in how many batches.
        size: how far, where that is a question.
        detail: what exactly.
    """

    kind: str
    count: int
    size: float = 0.0
    detail: str = ""


class Found(NamedTuple):
    """What a peer returned, made sound.

    Attributes:
        x: points ``(n, C, H, W)`` inside the ball and the box, in float32.
        faults: what had to be mended, or was noticed.
    """

    x: Tensor
    faults: tuple[Fault, ...]


def told(faults: Iterable[Fault]) -> tuple[str, ...]:
    """Faults in words, each after its kind, those of one kind added up.

    >>> told([Fault("outside", 2, 0.5), Fault("outside", 1, 0.25)])
    ('outside: 3 points left the ball by up to 0.5 and were projected',)
    """
    merged: dict[tuple[str, str], Fault] = {}
    for fault in faults:
        one = merged.get((fault.kind, fault.detail), Fault(fault.kind, 0, 0.0, fault.detail))
        one = replace(one, count=one.count + fault.count, size=max(one.size, fault.size))
        merged[fault.kind, fault.detail] = one
    ordered = sorted(merged.values(), key=lambda fault: list(TOLD).index(fault.kind))
    return tuple(f"{fault.kind}: {TOLD[fault.kind].format(**asdict(fault))}" for fault in ordered)


def meet(peer: Peer, seat: Seat, *, seed: int, turn: int = 0) -> Found:
    """Run a peer on the images of a seat.

    The generators of torch, NumPy and Python are seeded for it and put back; the model draws from its own streams
    meanwhile, whatever the peer does to the global ones.

    Args:
        peer: the attack.
        seat: what it is given as the model.
        seed: of all it draws.
        turn: counts its restarts from 0.

    Raises:
        PeerError: when it fails, or returns no points of the images' shape, or points that are not finite.
    """
    x, y = seat.clean[seat.rows], seat.y[seat.rows]
    seed = seed % 2**32  # as much as NumPy takes
    with Chance(seed, x.device) as chance, _quiet():
        seat.chance = chance
        try:
            points = peer.search(seat, x.clone(), y.clone(), seed, turn)
        finally:
            seat.chance = None
            seat.hold()
    faults = [Fault(kind, 1) for kind in seat.noticed()]
    faults += [Fault("seed", 1)] if chance.seeded else []
    points, mended = _sound(points, seat, x)
    return Found(points, (*faults, *mended))


def _sound(points: Any, seat: Seat, x: Tensor) -> tuple[Tensor, list[Fault]]:
    """Bring what a peer returned into float32, the ball and the box, and put points in the place of clean images."""
    if not isinstance(points, Tensor) or points.shape != x.shape:
        came = f"a tensor of shape {tuple(points.shape)}" if isinstance(points, Tensor) else type(points).__name__
        raise PeerError(f"it returned {came} for images of shape {tuple(x.shape)}")
    faults = []
    points = points.detach()
    if points.dtype != x.dtype:
        faults.append(Fault("dtype", len(x), detail=str(points.dtype).removeprefix("torch.")))
        scale = 1 if points.dtype.is_floating_point else 255
        points = points.to(x) / scale
    points = points.to(x).clone()
    if not bool(torch.isfinite(points).all()):
        broken = int((~torch.isfinite(points).flatten(1).all(dim=1)).sum())
        raise PeerError(f"it returned {broken} points that are not finite")
    moved = (points != x).flatten(1).any(dim=1)
    if bool(moved.any()) and bool(_on_grid(points[moved])) and not bool(_on_grid(seat.last[seat.rows][moved])):
        faults.append(Fault("rounded", int(moved.sum())))
    excess = seat.ball.excess(points, x)
    outside = excess > 0
    if bool(outside.any()):
        faults.append(Fault("outside", int(outside.sum()), float(excess.max())))
        points = torch.where(_per_image(outside), seat.ball.project(points, x), points)
    best = seat.best[seat.rows]
    shown = (best != x).flatten(1).any(dim=1)
    still = {"clean": int((~moved & shown).sum()), "unmoved": int((~moved & ~shown).sum())}
    faults += [Fault(kind, count) for kind, count in still.items() if count]
    return torch.where(_per_image(moved), points, best), faults


def _on_grid(points: Tensor) -> Tensor:
    """Whether all values are whole grey levels of 255."""
    levels = points * 255
    return (levels - levels.round()).abs().amax() < 1e-3


def _per_image(mask: Tensor) -> Tensor:
    return mask.view(-1, 1, 1, 1)


class Chance:
    """The global generators of torch, NumPy and Python, seeded for a peer; ours go on where they were.

    Args:
        seed: for the peer.
        device: whose generator is meant beside the CPU's.

    Attributes:
        seeded: whether torch's was seeded anew meanwhile.
    """

    def __init__(self, seed: int, device: torch.device) -> None:
        self._seed, self._device = seed, device
        self.seeded = False

    def __enter__(self) -> Chance:
        self._ours = self._states()
        torch.default_generator.manual_seed(self._seed)
        if self._device.type == "cuda":
            torch.cuda.manual_seed(self._seed)
        np.random.seed(self._seed)
        random.seed(self._seed)
        return self

    def __exit__(self, *_: object) -> None:
        self.seeded = self.seeded or torch.initial_seed() != self._seed
        self._set(self._ours)

    @contextmanager
    def ours(self) -> Iterator[None]:
        """Our own streams, for as long as the model answers."""
        self.seeded = self.seeded or torch.initial_seed() != self._seed
        theirs = self._states()
        self._set(self._ours)
        try:
            yield
        finally:
            self._ours = self._states()
            self._set(theirs)

    def _states(self) -> tuple[Any, ...]:
        cuda = torch.cuda.get_rng_state(self._device) if self._device.type == "cuda" else None
        return torch.get_rng_state(), cuda, np.random.get_state(), random.getstate()

    def _set(self, states: tuple[Any, ...]) -> None:
        cpu, cuda, numpy, python = states
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda, self._device)
        np.random.set_state(numpy)
        random.setstate(python)


@contextmanager
def _quiet() -> Iterator[None]:
    """Warnings and prints of others are not for a user of this package."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
