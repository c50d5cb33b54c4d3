"""Many batches in one call: the same answers as one by one, chance drawn anew, and every other code left as it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from msa_eval.defense.contexts import ALONE, COMPOSED, SOLO, Companions, decide_draws, own_companions
from msa_eval.defense.vectorized import ROOM, decide_many, vectorizes

ROWS, DIM = 6, 5


def _features(seed: int = 0) -> Tensor:
    return torch.randn(ROWS, DIM, generator=torch.Generator().manual_seed(seed))


class Coded:
    """A decision by a function, that counts how often it is called."""

    def __init__(self, decision: Callable[[Tensor], Tensor]) -> None:
        self._decision = decision
        self.calls = 0

    def features(self, x: Tensor) -> Tensor:
        return x

    def logits(self, z: Tensor, **settings: Any) -> Tensor:
        self.calls += 1
        return self._decision(z, **settings)


def centred(z: Tensor) -> Tensor:
    """Each row beside half the mean of its batch, with a hard count."""
    return (z - z.mean(dim=0) / 2).tanh() + (z > 0).float().mean(dim=0)


def in_place(z: Tensor) -> Tensor:
    votes = torch.zeros(len(z), DIM)
    votes += centred(z)
    return votes


def by_value(z: Tensor) -> Tensor:
    return centred(z) if float(z.mean()) > 0 else -centred(z)


def in_numpy(z: Tensor) -> Tensor:
    return torch.from_numpy(centred(z).detach().numpy())


def numpys_noise(z: Tensor) -> Tensor:
    return centred(z) + torch.from_numpy(np.random.randn(*z.shape)).float()


OWN = torch.Generator()


def own_noise(z: Tensor) -> Tensor:
    return centred(z) + torch.randn(z.shape, generator=OWN)


def noisy(z: Tensor) -> Tensor:
    return z + torch.randn_like(z)


def _one_by_one(decision: Callable[[Tensor], Tensor], batches: Tensor) -> Tensor:
    return torch.stack([decision(batch) for batch in batches])


@pytest.mark.parametrize("companions", ["alone", "solo", "composed"])
def test_rows_are_decided_at_once_as_they_are_one_by_one(companions: str) -> None:
    target, z, clean = Coded(centred), _features(), _features(1)
    if companions == "composed":
        index = own_companions(ROWS).flip(1)
        view: Any = COMPOSED.view(target, clean, Companions(clean, index, torch.arange(ROWS)))
        rows = [torch.cat([clean[index[i]][:i], z[i : i + 1], clean[index[i]][i:]]) for i in range(ROWS)]
    else:
        view = (ALONE if companions == "alone" else SOLO).view(target, clean)
        rows = [z[i : i + 1] if companions == "alone" else torch.cat([clean[:i], z[i : i + 1], clean[i + 1 :]])
                for i in range(ROWS)]  # fmt: skip
    due = torch.stack([centred(row)[0 if companions == "alone" else i] for i, row in enumerate(rows)])
    with torch.no_grad():
        torch.testing.assert_close(view.logits(z), due)
    before = target.calls
    with torch.no_grad():
        view.logits(z)
    assert target.calls == before + 1


def test_where_gradients_are_followed_every_batch_is_called_by_itself() -> None:
    target, z = Coded(centred), _features()
    ALONE.view(target, z).logits(z.clone().requires_grad_())  # type: ignore[arg-type]
    assert target.calls == ROWS


@pytest.mark.parametrize("decision", [in_place, by_value, in_numpy])
def test_code_that_cant_be_called_so_is_called_once_a_batch(decision: Callable[[Tensor], Tensor]) -> None:
    target, batches = Coded(decision), torch.stack([_features(seed) for seed in range(4)])
    with torch.no_grad():
        torch.testing.assert_close(decide_many(target, batches), _one_by_one(decision, batches))
        assert not vectorizes(target, batches, {})
    calls = target.calls
    with torch.no_grad():
        decide_many(target, batches)
    assert target.calls == calls + len(batches)  # and is not tried again


@pytest.mark.parametrize("decision", [numpys_noise, own_noise])
def test_chance_that_is_not_torchs_own_is_drawn_once_a_batch(decision: Callable[[Tensor], Tensor]) -> None:
    target = Coded(decision)
    with torch.no_grad():
        assert not vectorizes(target, _features().expand(4, ROWS, DIM), {})
        drawn = decide_many(target, _features().expand(4, ROWS, DIM))
    assert not torch.equal(drawn[0], drawn[1])


def test_chance_is_drawn_anew_for_each_row_and_each_answer() -> None:
    torch.manual_seed(0)
    target, z = Coded(noisy), _features()
    for view in (target, ALONE.view(target, z), SOLO.view(target, z)):  # type: ignore[arg-type]
        calls = target.calls
        noise = decide_draws(view, z, 801) - z  # type: ignore[arg-type]
        assert target.calls - calls <= 8
        assert noise.shape == (801, ROWS, DIM)
        columns = noise.flatten(1)
        # Under independence a correlation of 801 pairs has a standard error of 0.035; there are 435 of them.
        assert float((torch.corrcoef(columns.T) - torch.eye(ROWS * DIM)).abs().max()) < 0.17
        assert float(columns.mean(dim=0).abs().max()) < 0.17
        assert float((columns.std(dim=0) - 1).abs().max()) < 0.12
        successive = torch.corrcoef(torch.stack([columns[:-1].flatten(), columns[1:].flatten()]))[0, 1]
        assert abs(float(successive)) < 0.03


def test_a_near_tie_is_asked_of_the_defence_about_that_batch_alone() -> None:
    seen: list[tuple[int, ...]] = []

    def tied(z: Tensor) -> Tensor:
        seen.append(tuple(z.shape))
        return torch.stack([z[:, 0], z[:, 0] + 1e-6, -z[:, 0].abs()], dim=1)

    with torch.no_grad():
        found = ALONE.view(Coded(tied), _features()).logits(_features())  # type: ignore[arg-type]
    assert len(seen) >= 1 + ROWS
    torch.testing.assert_close(found, tied(_features()))


def test_settings_are_passed_on_and_tried_by_themselves() -> None:
    def scaled(z: Tensor, by: float = 1.0) -> Tensor:
        return in_place(z) if by == 2.0 else by * z

    target, batches = Coded(scaled), torch.stack([_features(seed) for seed in range(3)])
    with torch.no_grad():
        torch.testing.assert_close(decide_many(target, batches, by=3.0), 3 * batches)
        # What is tried with one value may fail with another: then it is called once a batch.
        torch.testing.assert_close(decide_many(target, batches, by=2.0), _one_by_one(in_place, batches))
        assert not vectorizes(target, batches, {"by": 3.0})
        assert vectorizes(target, batches, {})


def test_batches_too_large_for_two_are_decided_by_themselves() -> None:
    target = Coded(noisy)
    with torch.no_grad():
        assert not vectorizes(target, torch.zeros(2, 1, ROOM), {})
    assert target.calls == 0


def test_memory_that_runs_out_is_no_reason_to_give_up_for_good() -> None:
    def short(z: Tensor) -> Tensor:
        if torch._C._functorch.is_batchedtensor(z) and fails:
            raise torch.OutOfMemoryError("out of memory")
        return centred(z)

    fails: list[int] = []
    target, batches = Coded(short), torch.stack([_features(seed) for seed in range(3)])
    with torch.no_grad():
        decide_many(target, batches)
        fails.append(1)
        torch.testing.assert_close(decide_many(target, batches), _one_by_one(centred, batches))
        assert vectorizes(target, batches, {})


class Slotted:
    """An object to which no weak reference can be made."""

    __slots__ = ()

    def logits(self, z: Tensor) -> Tensor:
        return centred(z)


def test_an_object_that_cant_be_remembered_is_called_once_a_batch() -> None:
    batches = torch.stack([_features(seed) for seed in range(3)])
    target: Any = Slotted()
    with torch.no_grad():
        assert not vectorizes(target, batches, {})
    torch.testing.assert_close(decide_many(target, batches), _one_by_one(centred, batches))


class Keeping(torch.nn.Module):
    """A decision that keeps something of the batch before, in one of several places."""

    def __init__(self, place: str) -> None:
        super().__init__()
        self.place = place
        self.last: Any = torch.zeros(DIM)
        self.all: list[Tensor] = [torch.zeros(DIM)]
        self.register_buffer("mean", torch.zeros(DIM))

    def features(self, x: Tensor) -> Tensor:
        return x

    def logits(self, z: Tensor) -> Tensor:
        now = z.mean(dim=0)
        if self.place == "attribute":
            self.last = now
        elif self.place == "list":
            self.all = [*self.all, now][-3:]
        else:
            self.mean = now
        return z - 1e-9 * (self.last + self.all[-1] + self.mean)


@pytest.mark.parametrize("place", ["attribute", "list", "buffer"])
def test_what_a_target_keeps_of_a_call_is_never_of_vmap(place: str) -> None:
    target = Keeping(place)
    batches = torch.stack([_features(seed) for seed in range(3)])
    with torch.no_grad():
        assert not vectorizes(target, batches, {})
        assert torch.allclose(decide_many(target, batches), batches, atol=1e-6)
        assert float((target.last + target.all[-1] + target.mean).abs().sum()) > 0  # it can still be computed with
