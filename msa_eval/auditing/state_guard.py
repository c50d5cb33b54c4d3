"""A guard over defences: whether an evaluation leaves them as they were."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType

import torch
from torch import Tensor, nn

from msa_eval.attacks.batch import Batch
from msa_eval.auditing.rules import SAME, state_guard
from msa_eval.auditing.sign import Sign, change
from msa_eval.defense.contract import Defense, decide, modules_of
from msa_eval.defense.micro_batches import unwrap
from msa_eval.hashing import tensor_hash
from msa_eval.randomness import seeded


class StateGuard:
    """Whether defences are afterwards as they were before.

    It compares SHA-256 hashes of every parameter and buffer and the mode of every module, taken when it is made, and
    the answers to a clean batch under one seed, which show what is kept in other attributes too. Hashes are taken after
    that batch was answered, each time: weights that a target adapts to a batch, and sets back before the next, are the
    same then.

    Args:
        defenses: the defences, on their device.
        batch: a clean batch to ask about; ``None`` to compare hashes alone.
        seed: of torch while it is answered.
    """

    def __init__(self, *defenses: Defense, batch: Batch | None = None, seed: int = 0) -> None:
        self._defenses, self._batch, self._seed = defenses, batch, seed
        self._answers = self._ask()
        self._before = self._state()
        self._changes: tuple[str, ...] | None = None
        self._remembered: tuple[str, ...] = ()

    def __enter__(self) -> StateGuard:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is None:
            self._changes = self.changes()

    def changes(self) -> tuple[str, ...]:
        """What has changed since the guard was made, such as ``buffer prototypes`` or ``training mode of trunk.3``."""
        answers, now = self._ask(), self._state()
        names = [name for name in {**self._before, **now} if self._before.get(name) != now.get(name)]
        for defense, before, after in zip(self._defenses, self._answers, answers, strict=True):
            if not change(before, after).drift <= SAME:
                names.append(f"the answer of {type(unwrap(defense)).__name__} to a clean batch")
        return tuple(names)

    def so_far(self) -> tuple[str, ...]:
        """What has changed, with what is remembered; nothing where the defence gives no answer: reported later."""
        try:
            return tuple(dict.fromkeys([*self._remembered, *self.changes()]))
        except Exception:
            return self._remembered

    def remember(self, changes: Sequence[str]) -> None:
        """Count what had changed in an earlier process, which this one goes on from."""
        self._remembered = tuple(dict.fromkeys([*self._remembered, *changes]))

    def sign(self) -> Sign:
        """The sign `state_guard`: of the guarded block, or of all since the guard was made."""
        found = self.changes() if self._changes is None else self._changes
        return state_guard(tuple(dict.fromkeys([*self._remembered, *found])))

    def _ask(self) -> list[Tensor]:
        batch = self._batch
        return [] if batch is None else [answer(defense, batch.x, self._seed) for defense in self._defenses]

    def _state(self) -> dict[str, str]:
        modules = [(defense, module) for defense in self._defenses for module in modules_of(defense)]
        state: dict[str, str] = {}
        for number, (defense, module) in enumerate(modules):
            prefix = f"{type(unwrap(defense)).__name__} {number}: " if len(modules) > 1 else ""
            state |= {prefix + name: value for name, value in _fingerprints(module).items()}
        return state


def _fingerprints(module: nn.Module) -> dict[str, str]:
    """A hash of each parameter and buffer, and the mode of each module, by what a user calls them."""
    kinds = (("parameter", module.named_parameters()), ("buffer", module.named_buffers()))
    found = {f"{kind} {name}": tensor_hash(tensor) for kind, named in kinds for name, tensor in named}
    modes = {
        f"training mode of {name or 'the model'}": str(getattr(part, "training", False))
        for name, part in module.named_modules()
    }
    return found | modes


def answer(defense: Defense, x: Tensor, seed: int) -> Tensor:
    """The target's logits ``(B, k)`` for a batch of images, its chance under a seed."""
    with seeded(seed), torch.no_grad():
        return decide(defense, defense.features(x))
