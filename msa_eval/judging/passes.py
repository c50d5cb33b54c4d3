"""The passes of a run on a batch, counted: features of the rows that move, and the surrogate's logits."""

from __future__ import annotations

import torch
from torch import Tensor

from msa_eval.attacks.batch import AdversarialBatch, Batch, PartialBatch
from msa_eval.defense.contract import decide
from msa_eval.defense.precision import SearchPrecision
from msa_eval.errors import AttackError
from msa_eval.judging.break_record import BreakRecord
from msa_eval.judging.search_state import SearchState
from msa_eval.surrogates.ensemble import Ensemble
from msa_eval.surrogates.registry import Surrogate


class Passes:
    """Passes through the target's trunk and through surrogates.

    Args:
        surrogate: what a gradient attack attacks; ``None`` for an attack on the target itself.
        batch: the clean batch.
        state: where the search stands.
        record: watches out for logits that are not finite.
        search: how the search passes its points.

    Attributes:
        forwards: images passed through the trunk so far.
        backwards: images passed back through it.
    """

    def __init__(
        self,
        surrogate: Surrogate | Ensemble | None,
        batch: Batch,
        state: SearchState,
        record: BreakRecord,
        search: SearchPrecision,
    ) -> None:
        self._surrogate, self._batch, self._state, self._record, self._search = surrogate, batch, state, record, search
        self.forwards = self.backwards = 0

    def features(self, x: Tensor) -> Tensor:
        """Features of points ``(n, C, H, W)`` as the target makes them."""
        self.forwards += len(x)
        return self._state.target.features(x)

    def exact(self, point: AdversarialBatch | PartialBatch, *, copied: bool = False) -> AdversarialBatch:
        """The same points with the target's own features.

        Args:
            point: a batch of points.
            copied: whether its images are written over later, so that a copy is to be kept.
        """
        x = point.x.clone() if copied else point.x
        with torch.no_grad():
            return AdversarialBatch(x, self.features(x))

    def final_features(self, x: Tensor, *, whole: bool) -> Tensor:
        """Features of the final points; what stopped early, in a batch decided row by row, was passed already.

        Args:
            x: the batch.
            whole: pass all of it in any case.
        """
        state = self._state
        if whole or not state.stops_early or not state.apart:
            return self.features(x)
        z, moved = state.start.z, (x != state.start.x).flatten(1).any(dim=1)
        if state.start.rounded is not None:
            moved = moved | state.start.rounded
        return z.index_put((moved.nonzero().flatten(),), self.features(x[moved])) if bool(moved.any()) else z

    def of_batch(self, x: Tensor, moved: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Features of a batch of points and the surrogate's logits; rows that stay at the start cost no pass.

        Args:
            x: the batch.
            moved: its rows that don't stay, if the caller has them.
        """
        rows = self._state.moving
        if rows is None:
            z = self.trunk(x)
            return z, self.surrogate_logits(x, z)
        moved = x[rows] if moved is None else moved
        part = self.trunk(moved)
        z = self._state.start.z.index_put((rows,), part)
        if self._state.mixes_rows:
            return z, self.surrogate_logits(x, z)
        logits = self.surrogate_logits(moved, part)
        shape = (*logits.shape[:-2], len(x), logits.shape[-1])
        return z, logits.new_zeros(shape).index_copy(-2, rows, logits)

    def trunk(self, x: Tensor) -> Tensor:
        """Features with a gradient, unless no surrogate has a use for it."""
        if self._surrogate is not None and self._surrogate.on_images:
            with torch.no_grad():
                return self.features(x)
        self.forwards += len(x)
        state = self._state
        if not state.rough:
            return self._watched(state.target.features(x))
        return self._watched(self._search.features(state.target, x).to(self._batch.z.dtype))

    def rounded(self) -> Tensor | None:
        """The rows of the batch just passed that have rounded features ``(B,)``."""
        state = self._state
        if not state.rough:
            return None
        if state.moving is None:
            return torch.ones_like(state.passed)
        return state.passed if state.start.rounded is None else state.passed | state.start.rounded

    def surrogate_logits(self, x: Tensor, z: Tensor) -> Tensor:
        """The surrogate's logits ``(B, k)``, those of an ensemble ``(S, B, k)``; without one, the hard target's."""
        if self._surrogate is None:
            return decide(self._state.target, z)
        if isinstance(self._surrogate, Ensemble):
            logits = torch.stack([self._member_logits(member, x, z) for member in self._surrogate.members])
            return logits / self._surrogate.scales
        return self._member_logits(self._surrogate, x, z)

    def _watched(self, values: Tensor) -> Tensor:
        """Count the images that a gradient passes back through."""
        if values.requires_grad:
            values = values.view_as(values)  # a node of our own, also where these are the images themselves
            values.register_hook(self._count_backward)
        return values

    def _count_backward(self, gradient: Tensor) -> None:
        self.backwards += len(gradient)

    def _member_logits(self, surrogate: Surrogate, x: Tensor, z: Tensor) -> Tensor:
        if surrogate.on_images:
            self.forwards += len(x) * surrogate.passes
            logits = self._watched(surrogate.logits(self._state.attacked, x))
        else:
            logits = surrogate.logits(self._state.attacked, z)
        if logits.shape != (len(x), self._batch.logits.shape[1]):
            raise AttackError(
                f"surrogate {surrogate.name!r} returned logits of shape {tuple(logits.shape)} "
                f"where the target returns {(len(x), self._batch.logits.shape[1])}"
            )
        self._record.watch(logits.detach())
        return logits
