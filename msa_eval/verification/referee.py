"""What the real targets answer to stored batches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from msa_eval.attacks.grid import off_grid
from msa_eval.attacks.losses import margin_loss
from msa_eval.defense.contexts import CONTEXTS
from msa_eval.evidence.proof import Proof
from msa_eval.judging.replay import Replay
from msa_eval.protocols.schema import Protocol

NEAR_TIE = 1e-5
"""Where two logits are closer than this share of their size, another machine may round to the other verdict."""


NEAR = "near tie, not reproduced on this machine"


Claim = tuple[str, str, int]
"""Target, context and index of a sample that the results call broken."""


@dataclass
class Referee:
    """What the real targets answer to stored batches.

    Attributes:
        replays: the targets by name.
        protocol: whose ball and contexts count.
        proven: the samples that a batch was seen to break.
        held: for the others, why a batch that was meant to break them did not.
    """

    replays: Mapping[str, Replay]
    protocol: Protocol
    proven: set[Claim] = field(default_factory=set)
    held: dict[Claim, str] = field(default_factory=dict)

    def images(self, number: int) -> Tensor:
        """The clean batch of a number."""
        return next(iter(self.replays.values())).images(number)

    def judge(self, proof: Proof) -> Iterator[str]:
        """Decide a stored proof and enter what it breaks; a sentence for each fault of its points."""
        where = f"{proof.target}, {proof.context}, batch {proof.batch}"
        replay = self.replays.get(proof.target)
        if replay is None or proof.context not in self.protocol.contexts:
            yield f"{where}: neither such a target nor such a context was evaluated"
            return
        if proof.kind not in CONTEXTS[proof.context].proof_kinds and replay.batch_dependent:
            yield f"{where}: more than one image of a batch was moved, which the context does not allow"
            return
        if (misplaced := self.misplaced(proof, replay)) is not None:
            yield f"{where}: {misplaced}"
            return
        try:
            logits = replay.logits(proof)
        except ValueError as error:
            yield f"{where}: {error}"
            return
        self._enter(proof, replay, logits)

    def reason(self, target: str, context: str, index: int) -> str:
        """Why a sample that is called broken counts as unproven."""
        return self.held.get((target, context, index), "no valid stored batch is about it")

    def misplaced(self, proof: Proof, replay: Replay) -> str | None:
        """Whether a point lies where the protocol lets none lie: how far, in words."""
        outside = self._outside(proof, replay)
        if outside > 0:
            return f"a point lies {outside:.3g} outside the ball or the [0, 1] box"
        if self.protocol.ball.levels is not None and (off := _off_grid(proof, self.protocol.ball.levels)) > 0:
            return f"a point lies {off:.3g} off the grid of {self.protocol.ball.levels} levels"
        return None

    def _outside(self, proof: Proof, replay: Replay) -> float:
        clean = replay.images(proof.batch).cpu()
        own = clean[proof.positions]
        excess = [self.protocol.ball.excess(proof.x, own if proof.kind == "rows" else clean)]
        if proof.own is not None:
            excess.append(self.protocol.ball.excess(proof.own, own))
        return float(torch.cat(excess).max())

    def _enter(self, proof: Proof, replay: Replay, logits: Tensor) -> None:
        """Note what was broken; a target that ignores companions is broken in every context at once."""
        y = replay.labels(proof)
        wrong = (logits.argmax(dim=1) != y) & torch.isfinite(logits).all(dim=1)
        close = _near_tie(logits, y)
        contexts = (proof.context,) if replay.batch_dependent else self.protocol.contexts
        samples = replay.batches[proof.batch][proof.positions].tolist()
        for index, broken, tie in zip(samples, wrong.tolist(), close.tolist(), strict=True):
            for context in contexts:
                if broken:
                    self.proven.add((proof.target, context, index))
                else:
                    self.held[proof.target, context, index] = NEAR if tie else "its stored batch does not break it"


def _off_grid(proof: Proof, levels: int) -> float:
    """How far a point of a proof lies from the grid of so many levels."""
    return max(off_grid(part, levels) for part in (proof.x, proof.own) if part is not None)


def _near_tie(logits: Tensor, y: Tensor) -> Tensor:
    """Whether the verdict on each row ``(B, k)`` hangs on rounding ``(B,)``."""
    return margin_loss(logits, y).abs() < NEAR_TIE * logits.abs().amax(dim=1)
