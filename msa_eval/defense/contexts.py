"""Contexts: what the attacker controls, as a view of the target.

In ``joint`` every image of the batch is the attacker's, and the target is what it is. In ``solo`` only image i is, and
its companions stay clean; in ``alone`` image i is a batch of one; in ``composed`` image i is the attacker's, and so is
the choice of the clean images beside it. For these the target is seen *one at a time*: a batch of points becomes as
many batches as it has rows, each with one adversarial row. Attacks, verdicts and surrogates are the same in all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from msa_eval.defense.contract import Defense, decide
from msa_eval.defense.vectorized import decide_many, has_room, vectorizes

NEAR_TIE = 1e-4
"""Where two logits are closer than this share of their size, neither a closed form nor a pass of many batches at once
is asked for the verdict."""


@dataclass(frozen=True)
class Companions:
    """Images chosen to sit beside each of some rows.

    Attributes:
        pool: features of the images to choose from ``(P, ...)``.
        index: places in the pool ``(n, B - 1)``: each row's companions, in the order of the batch without the row.
        seats: each row's own position in its batch ``(n,)``.
    """

    pool: Tensor
    index: Tensor
    seats: Tensor

    def with_companions(self, index: Tensor) -> Companions:
        """The same rows among others of the pool."""
        return Companions(self.pool, index, self.seats)


def own_companions(size: int) -> Tensor:
    """The other places of a batch, for each of its places ``(B, B - 1)``.

    >>> own_companions(3).tolist()
    [[1, 2], [0, 2], [0, 1]]
    """
    return torch.arange(size).expand(size, -1)[~torch.eye(size, dtype=torch.bool)].view(size, -1)


class OneAtATime:
    """A target whose row i is decided in a batch of its own.

    A defence with a closed form has ``logits_one_at_a_time(z, companions, **settings)``; any other is asked about as
    many batches as there are rows. A verdict so close that rounding could turn it is asked of the defence about that
    batch alone. All else is the defence's own.

    Args:
        defense: the target.
        companions: features ``(B, ...)`` of a batch in which row i gives way, or each row's companions; ``None`` for
            batches of one.
    """

    def __init__(self, defense: Defense, companions: Tensor | Companions | None) -> None:
        self._defense = defense
        self._companions = companions

    def __getattr__(self, name: str) -> Any:
        return getattr(self._defense, name)

    def companion_index(self) -> Tensor | None:
        """Who was chosen to sit beside each row ``(B, B - 1)``, where that is a choice."""
        return self._companions.index if isinstance(self._companions, Companions) else None

    def beside(self, companions: Tensor | Companions) -> OneAtATime:
        """The same target among other companions."""
        return OneAtATime(self._defense, companions)

    def features(self, x: Tensor) -> Tensor:
        """The defence's features."""
        return self._defense.features(x)

    def logits(self, z: Tensor, **settings: Any) -> Tensor:
        """Logits ``(B, k)`` of features ``(B, ...)``, each row decided in a batch of its own."""
        return decide_each(self._defense, z, self._companions, **settings)

    def draws(self, z: Tensor, count: int) -> Tensor:
        """So many answers ``(r, B, k)`` of a target that answers at random."""
        return _draw_each(self._defense, z, self._companions, count)


class AmongOthers:
    """A target whose rows stay as they are while their companions move: the view of a companions attack.

    Args:
        defense: the target.
        own: features ``(B, ...)`` of the rows that stay.
    """

    def __init__(self, defense: Defense, own: Tensor) -> None:
        self._defense = defense
        self._own = own

    def __getattr__(self, name: str) -> Any:
        return getattr(self._defense, name)

    def beside(self, own: Tensor) -> AmongOthers:
        """The same target with other features of the rows that stay."""
        return AmongOthers(self._defense, own)

    def features(self, x: Tensor) -> Tensor:
        """The defence's features."""
        return self._defense.features(x)

    def fc_logits(self, z: Tensor) -> Tensor:
        """FC logits of the rows that stay: no companion changes them, so ``fc-oracle`` is no use here."""
        del z
        out: Tensor = self._defense.fc_logits(self._own)  # type: ignore[attr-defined]
        return out

    def logits(self, z: Tensor, **settings: Any) -> Tensor:
        """Logits ``(B, k)`` of the rows that stay, row i among the other rows of ``z`` ``(B, ...)``."""
        return decide_each(self._defense, self._own, z, **settings)

    def draws(self, z: Tensor, count: int) -> Tensor:
        """So many answers ``(r, B, k)`` of a target that answers at random."""
        return _draw_each(self._defense, self._own, z, count)


def decide_each(
    defense: Defense, z: Tensor, companions: Tensor | Companions | None, **settings: Any
) -> Tensor:  # fmt: skip
    """Decide each row of ``z`` in a batch of its own.

    Args:
        defense: the target.
        z: features ``(B, ...)``.
        companions: who sits beside each row, as in `OneAtATime`.
        settings: passed on to the decision.

    Returns:
        logits ``(B, k)``.
    """
    logits, exact = _answers(defense, z, companions, settings)
    if not exact and not torch.is_grad_enabled():
        top = logits.topk(2, dim=1).values
        for i in (top[:, 0] - top[:, 1] <= NEAR_TIE * logits.abs().amax(dim=1)).nonzero().flatten().tolist():
            logits[i] = _decide_row(defense, z, companions, i, settings)
    return logits


def _answers(
    defense: Defense, z: Tensor, companions: Tensor | Companions | None, settings: dict[str, Any]
) -> tuple[Tensor, bool]:
    """Logits ``(B, k)``, and whether the defence was asked about each row's batch by itself."""
    closed_form = getattr(defense, "logits_one_at_a_time", None)
    if closed_form is not None:
        known = companions.pool[companions.index] if isinstance(companions, Companions) else companions
        return closed_form(z, known, **settings), False
    if not has_room(_batch_of(z, companions, 0)[0]):
        return torch.stack([_decide_row(defense, z, companions, i, settings) for i in range(len(z))]), True
    batches, places = _batches_of(z, companions)
    logits = decide_many(defense, batches, **settings)[range(len(z)), places]
    return logits, not vectorizes(defense, batches, settings)


def decide_offers(defense: Defense, z: Tensor, companions: Companions, offers: Tensor, *, place: int | None) -> Tensor:
    """Decide each row in as many batches as there are offers for one place of its batch.

    A defence with a closed form has ``logits_with(z, staying, offered)``; any other is asked once a batch.

    Args:
        defense: the target.
        z: features of the rows ``(n, ...)``.
        companions: who sits beside each.
        offers: places in the pool ``(n, w)``.
        place: which place of the companions they are for; ``None`` for the row's own.

    Returns:
        logits ``(n, w, k)``, without a gradient.
    """
    pool, index, n, width = companions.pool, companions.index, *offers.shape
    closed_form = getattr(defense, "logits_with", None)
    with torch.no_grad():
        if closed_form is None:
            index, seats = index.repeat_interleave(width, dim=0), companions.seats.repeat_interleave(width)
            if place is None:
                rows = pool[offers.flatten()]
            else:
                rows = z.repeat_interleave(width, dim=0)
                index[:, place] = offers.flatten()
            return decide_each(defense, rows, Companions(pool, index, seats)).view(n, width, -1)
        logits: Tensor
        if place is None:
            offered = pool[offers]
            logits = closed_form(offered, pool[index], offered)
        else:
            staying = torch.cat([z.unsqueeze(1), pool[index[:, :place]], pool[index[:, place + 1 :]]], dim=1)
            logits = closed_form(z.unsqueeze(1), staying, pool[offers])
        return logits


def decide_draws(defense: Defense, z: Tensor, count: int) -> Tensor:
    """So many answers of a target that answers at random, each drawn anew ``(r, B, k)``, in float32.

    Args:
        defense: the target, or a view of it.
        z: features ``(B, ...)``.
        count: r.

    Raises:
        ValueError: when the target returns something else than logits.
    """
    first = decide(defense, z).unsqueeze(0)
    if count == 1:
        return first
    with torch.no_grad():
        if isinstance(defense, OneAtATime | AmongOthers):
            return torch.cat([first, defense.draws(z.float(), count - 1).float()])
        return torch.cat([first, decide_many(defense, z.float().expand(count - 1, *z.shape)).float()])


def _draw_each(defense: Defense, z: Tensor, companions: Tensor | Companions | None, count: int) -> Tensor:
    """So many answers to each row of ``z`` in a batch of its own ``(r, B, k)``."""
    if not hasattr(defense, "logits_one_at_a_time") and has_room(_batch_of(z, companions, 0)[0]):
        batches, places = _batches_of(z, companions)
        answers = decide_many(defense, batches.repeat(count, *[1] * (batches.ndim - 1)))
        picked: Tensor = answers.unflatten(0, (count, len(z)))[:, range(len(z)), places]
        return picked
    return torch.stack([decide_each(defense, z, companions) for _ in range(count)])


def _batches_of(z: Tensor, companions: Tensor | Companions | None) -> tuple[Tensor, list[int]]:
    """Every row's batch ``(B, b, ...)``, and the row's place there."""
    batches, places = zip(*(_batch_of(z, companions, i) for i in range(len(z))), strict=True)
    return torch.stack(batches), list(places)


def _decide_row(
    defense: Defense, z: Tensor, companions: Tensor | Companions | None, i: int, settings: dict[str, Any]
) -> Tensor:
    batch, place = _batch_of(z, companions, i)
    return defense.logits(batch, **settings)[place]


def _batch_of(z: Tensor, companions: Tensor | Companions | None, i: int) -> tuple[Tensor, int]:
    """The batch in which a row is decided ``(b, ...)``, and the row's place there."""
    if companions is None:
        return z[i : i + 1], 0
    if isinstance(companions, Companions):
        beside, seat = companions.pool[companions.index[i]], int(companions.seats[i])
    else:
        beside, seat = torch.cat([companions[:i], companions[i + 1 :]]), i
    return torch.cat([beside[:seat], z[i : i + 1], beside[seat:]]), seat


@dataclass(frozen=True)
class Context:
    """What the attacker controls; whoever must know it asks for what follows, and not for the name.

    Attributes:
        name: in protocols and tables.
        attacker_controls: what, in words.
        broken_when: when a sample is broken, in words.
        one_batch_per_sample: whether each sample has adversarial batches of its own, in which no other image is moved.
        has_companions: whether other images sit beside it.
        chooses_companions: whether the attacker chooses these.
        includes: the contexts whose attacker can do nothing that this one can't: what is broken there is broken here.
    """

    name: str
    attacker_controls: str
    broken_when: str
    one_batch_per_sample: bool = True
    has_companions: bool = True
    chooses_companions: bool = False
    includes: tuple[str, ...] = ()

    @property
    def proof_kinds(self) -> tuple[str, ...]:
        """The kinds of `msa_eval.evidence.proof.Proof` that move no more than the attacker controls."""
        return ("rows",) if self.one_batch_per_sample else ("batch", "rows", "victims")

    @property
    def in_clean_batch(self) -> bool:
        """Whether images that nobody moved are decided in the clean batch, so that its verdicts are theirs."""
        return self.has_companions and type(self).decided_in is Context.decided_in

    def decided_in(self, clean: Tensor, row: Tensor, at: int) -> tuple[Tensor, int]:
        """The real batch in which one image is decided, by which proofs are replayed: `view` must decide the same.

        Args:
            clean: features of the clean batch ``(B, ...)``.
            row: those of the image.
            at: its place in the clean batch.

        Returns:
            features of the batch, and the image's place in it.
        """
        if not self.has_companions:
            return row.unsqueeze(0), 0
        z = clean.clone()
        z[at] = row
        return z, at

    def view(self, defense: Defense, z: Tensor, companions: Companions | None = None) -> Defense:
        """A batch-dependent target as the attacker meets it; to any other target all contexts are one.

        Args:
            defense: the target.
            z: its features of the clean batch ``(B, ...)``.
            companions: who sits beside each row, where that is chosen; the clean batch itself by default.
        """
        if not self.one_batch_per_sample:
            return defense
        if not self.has_companions:
            return OneAtATime(defense, None)
        return OneAtATime(defense, z if companions is None else companions)


JOINT = Context(
    "joint", "every image of the batch", "some adversarial batch makes the target wrong on it",
    one_batch_per_sample=False, includes=("solo",),
)  # fmt: skip


SOLO = Context("solo", "the one image, among clean companions", "replacing it alone makes the target wrong on it")


ALONE = Context("alone", "the one image, in a batch of one", "the target is wrong on it", has_companions=False)


COMPOSED = Context(
    "composed", "the one image, and which clean images of a pool sit beside it", "some such batch makes it wrong",
    chooses_companions=True, includes=("solo",),
)  # fmt: skip


CONTEXTS = {context.name: context for context in (JOINT, SOLO, ALONE, COMPOSED)}
"""By name."""
