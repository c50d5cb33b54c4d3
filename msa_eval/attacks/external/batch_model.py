"""What an external attack is given as the model.

Peers leave out images that they have broken, show several points of one image at once, change modes, and write into
what they are given. A batch model has no weights and no parts, so there is nothing to change; each image is answered in
its place in the whole batch, beside the others where they were seen last; and what is handed out is a copy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from msa_eval.attacks.ball import Ball, per_image
from msa_eval.attacks.external.faults import ExternalAttackError
from msa_eval.attacks.losses import margin_loss
from msa_eval.randomness import Chance

Ask = Callable[[Tensor, Tensor], Tensor]
"""``(batch (B, C, H, W), rows (B,)) -> logits (B, k)``: the whole batch, of which these rows' answers are wanted."""


class BatchModel(nn.Module):
    """A model as seen from one batch.

    Args:
        ask: answers whole batches.
        x: the clean batch ``(B, C, H, W)``.
        y: its labels ``(B,)``.
        ball: the perturbation set.
        classes: k.
        rows: places of the images that the external attack is given ``(n,)``; all by default.
        parts: the model's own modules, whose modes are held as they are.

    Attributes:
        images: how many images it was shown.
        best: of each image, the point inside the ball that the model liked least ``(B, C, H, W)``.
        last: where each image was seen last ``(B, C, H, W)``.
    """

    def __init__(
        self, ask: Ask, x: Tensor, y: Tensor, ball: Ball, *, classes: int, rows: Tensor | None = None,
        parts: Sequence[nn.Module] = (),
    ) -> None:  # fmt: skip
        super().__init__()
        self.clean, self.y, self.ball, self.classes = x, y, ball, classes
        self.rows = torch.arange(len(x), device=x.device) if rows is None else rows
        self.images = 0
        self.best = self.last = x
        self._faults: set[str] = set()
        self.chance: Chance | None = None
        self._ask = ask
        self._margin = torch.full(y.shape, torch.inf, device=x.device)
        # In a tuple, or they would become parts of this module.
        modules = [part for one in parts for part in one.modules() if hasattr(part, "training")]
        self._modes = [(part, part.training) for part in modules]
        self._handed: Tensor | None = None
        self._version = 0
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(n, k)`` of images ``(n, C, H, W)``.

        Raises:
            ExternalAttackError: when they are not finite.
        """
        self.hold()
        if x.ndim != self.clean.ndim or x.shape[1:] != self.clean.shape[1:]:
            raise ExternalAttackError(
                f"it showed the model images of shape {tuple(x.shape)}, but the batch's are {tuple(self.clean.shape)}"
            )
        if not bool(torch.isfinite(x.detach()).all()):
            raise ExternalAttackError("it showed the model images that are not finite")
        with torch.inference_mode(False):
            x = (x.clone() if x.is_inference() else x).to(self.clean)
            if self.chance is None:
                return self._hand_out(self._answer(x))
            with self.chance.ours():
                return self._hand_out(self._answer(x))

    def hold(self) -> None:
        """Notice whether the external attack wrote into the logits or changed a mode, and put the modes back."""
        if self._handed is not None and self._handed._version != self._version:
            self._faults.add("logits")
        changed = [(part, mode) for part, mode in self._modes if part.training != mode]
        for part, mode in changed:
            part.training = mode
        if changed or self.training:
            self._faults.add("mode")
            self.training = False

    def noticed(self) -> list[str]:
        """The faults noticed since the last time this was asked."""
        faults, self._faults = sorted(self._faults), set()
        return faults

    def _hand_out(self, logits: Tensor) -> Tensor:
        self._handed = logits.detach()  # shares its version, not the graph behind it
        self._version = self._handed._version
        return logits

    def _answer(self, x: Tensor) -> Tensor:
        self.images += len(x)
        places = self._places(x.detach())
        order = list(_rounds(places))
        answers = []
        for group in order:
            rows = places[group]
            whole = self.last.index_copy(0, rows, x[group])
            self.last = whole.detach()
            asked = torch.zeros_like(self.y, dtype=torch.bool).index_fill(0, rows, True)
            logits = self._ask(whole, asked)
            self._prefer(logits.detach(), asked)
            answers.append(logits[rows])
        return torch.cat(answers)[torch.cat(order).argsort()]

    def _places(self, x: Tensor) -> Tensor:
        """Whose points these are ``(n,)``: all that the attack was given, or each the nearest clean image's."""
        if len(x) == len(self.rows):
            return self.rows
        near = torch.cdist(x.flatten(1), self.clean[self.rows].flatten(1), p=torch.inf)
        return self.rows[near.argmin(dim=1)]

    def _prefer(self, logits: Tensor, asked: Tensor) -> None:
        """Keep each image's point that the model likes least, of those inside the ball."""
        margin = -margin_loss(logits.float(), self.y)
        lower = asked & (margin < self._margin) & (self.ball.excess(self.last, self.clean) <= 0)
        self._margin = torch.where(lower, margin, self._margin)
        self.best = torch.where(per_image(lower, self.last), self.last, self.best)


def _rounds(places: Tensor) -> Iterator[Tensor]:
    """Split points into rounds, in each of which every image has one at most: the points' indices."""
    left = torch.arange(len(places), device=places.device)
    while len(left):
        taken: dict[int, int] = {}
        for at, place in zip(left.tolist(), places[left].tolist(), strict=True):
            taken.setdefault(place, at)
        group = torch.tensor(list(taken.values()), device=places.device)
        yield group
        left = left[~torch.isin(left, group)]
