"""S_c and sup S_d against the definitions, finite differences, autograd and hand-worked cases."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from msa_eval.sensitivity import sensitivity


def _features(n: int = 40, k: int = 5, d: int = 7, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    z, w, c = (torch.randn(count, d, generator=generator, dtype=torch.float64) for count in (n, k, k))
    return z, w, c


def test_a_case_worked_by_hand() -> None:
    """z = (3, 4), w = (2, 0), c = (3, 1): cos θ_c = 3/5, distance 3, ‖ε‖ = 1/2 at γ = 60°."""
    z, w, c = torch.tensor([[3.0, 4.0]]), torch.tensor([[2.0, 0.0]]), torch.tensor([[3.0, 1.0]])
    found = sensitivity(z, w, c, gamma=math.pi / 3, step=0.5)
    assert found.s_c.item() == pytest.approx(0.5 * 0.5 / (5 * 0.6))
    assert found.s_d.item() == pytest.approx(0.5 / 3)
    assert found.theta_c.item() == pytest.approx(math.acos(0.6))
    cos_d = (9 + 4) / (5 * math.sqrt(10))
    assert found.ratio.item() == pytest.approx(0.6 / math.sqrt(1 - cos_d**2))
    assert not found.condition.item()  # 0.6 / 0.57 > 0.5
    assert not found.more_sensitive.item()  # 0.083 < 0.167
    turned = sensitivity(z, w, c, gamma=math.pi / 2)
    assert turned.s_c.item() == pytest.approx(0, abs=1e-16)


def test_s_c_is_the_relative_change_of_the_inner_product() -> None:
    """Eq. 3 by its first form, for changes that were made."""
    z, w, c = _features()
    change = torch.randn(z.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = sensitivity(z, w, c, change=change)
    expected = (((z + change) @ w.T - z @ w.T) / (z @ w.T)).abs()
    torch.testing.assert_close(found.s_c, expected, rtol=1e-9, atol=1e-12)
    small = 1e-6 * change
    slope = torch.stack([torch.autograd.functional.jvp(lambda a: a @ w.T, row, move)[1]
                         for row, move in zip(z, small, strict=True)])  # fmt: skip
    torch.testing.assert_close(sensitivity(z, w, c, change=small).s_c, (slope / (z @ w.T)).abs(), rtol=1e-9, atol=1e-15)


def test_the_angle_gamma_is_that_of_the_change() -> None:
    """A change built at a given angle to a class vector gives what the angle alone gives."""
    z, w, c = _features(k=1)
    generator = torch.Generator().manual_seed(2)
    along = w[0] / w[0].norm()
    across = torch.randn(z.shape, generator=generator, dtype=torch.float64)
    across -= (across @ along).unsqueeze(1) * along
    across /= across.norm(dim=1, keepdim=True)
    for gamma in (0.0, 0.4, 2.5):
        change = 0.3 * (math.cos(gamma) * along + math.sin(gamma) * across)
        by_change, by_angle = sensitivity(z, w, c, change=change), sensitivity(z, w, c, gamma=gamma, step=0.3)
        torch.testing.assert_close(by_change.s_c, by_angle.s_c)
        torch.testing.assert_close(by_change.s_d, by_angle.s_d)


def test_s_d_is_a_supremum_that_one_direction_reaches() -> None:
    """Eq. 4 over random directions never exceeds Eq. 5; straight away from the prototype it meets it."""
    z, w, c = _features()
    found = sensitivity(z, w, c, step=0.2)

    def s_d(change: Tensor) -> Tensor:
        """Eq. 4 for changes ``(N, k, d)``."""
        near, moved = (z.unsqueeze(1) - c).norm(dim=2), (z.unsqueeze(1) + change - c).norm(dim=2)
        return ((moved - near) / near).abs()

    generator = torch.Generator().manual_seed(3)
    for _ in range(200):
        change = torch.randn(len(z), len(c), z.shape[1], generator=generator, dtype=torch.float64)
        change *= 0.2 / change.norm(dim=2, keepdim=True)
        assert bool((s_d(change) <= found.s_d + 1e-12).all())
    away = z.unsqueeze(1) - c
    torch.testing.assert_close(s_d(0.2 * away / away.norm(dim=2, keepdim=True)), found.s_d)


def test_s_d_is_the_slope_of_the_heads_distance() -> None:
    """The gradient of ‖z - c‖ has length 1, so the relative slope is 1 over the distance."""
    z, w, c = _features()
    z.requires_grad_()
    distance = (z - c[2]).norm(dim=1)
    (gradient,) = torch.autograd.grad(distance.sum(), z)
    expected = gradient.norm(dim=1) / distance
    torch.testing.assert_close(sensitivity(z, w, c, step=1.0).s_d[:, 2], expected.detach())


def test_the_condition_is_sufficient_and_eq_6_is_exact() -> None:
    """Eq. 8 implies S_c >= sup S_d, and Eq. 6's middle line is the comparison itself; both sides occur."""
    z, w, c = _features(n=400)
    for gamma in (0.0, 0.9, 1.4):
        found = sensitivity(z, w, c, gamma=gamma)
        assert bool((found.more_sensitive | ~found.condition).all())
        ratio = c.norm(dim=1) / z.norm(dim=1, keepdim=True)
        root = (ratio**2 - 2 * found.theta_d.cos() * ratio + 1).sqrt()
        assert torch.equal(found.more_sensitive, found.theta_c.cos().abs() <= abs(math.cos(gamma)) * root)
        for mask in (found.condition, found.more_sensitive):
            assert 0 < int(mask.sum()) < mask.numel()


def test_prototypes_of_each_row_and_permutations() -> None:
    z, w, c = _features()
    plain = sensitivity(z, w, c)
    own = sensitivity(z, w, c.expand(len(z), *c.shape))
    torch.testing.assert_close(own.s_d, plain.s_d)
    torch.testing.assert_close(own.theta_d, plain.theta_d)
    order = torch.randperm(len(z), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(sensitivity(z[order], w, c).s_c, plain.s_c[order])
    torch.testing.assert_close(sensitivity(3 * z, w, 3 * c, step=3.0).s_d, plain.s_d)


def test_zero_vectors_are_undefined_and_never_0() -> None:
    z = torch.tensor([[0.0, 0.0], [1.0, 1.0]])
    w, c = torch.tensor([[1.0, 0.0], [0.0, 0.0]]), torch.tensor([[0.0, 2.0], [0.0, 2.0]])
    found = sensitivity(z, w, c)
    assert found.known.tolist() == [[False, False], [True, False]]
    for value in (found.s_c, found.s_d):
        assert value.isnan().tolist() == [[True, True], [False, True]]
    assert not bool(found.condition[0].any())
    assert not bool(found.more_sensitive[:, 1].any())
    still = sensitivity(z[1:], w, c, change=torch.zeros(1, 2))
    assert still.s_c.isnan().all()
    assert still.s_d.isnan().all()
    assert not still.known.any()
    zero_prototype = sensitivity(z[1:], w[:1], torch.zeros(1, 2))
    assert zero_prototype.s_d.isnan().all()


def test_infinite_sensitivities() -> None:
    """Orthogonal features, and features on their prototype."""
    z = torch.tensor([[0.0, 1.0]])
    found = sensitivity(z, torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]))
    assert found.s_c.item() == math.inf
    assert found.s_d.item() == math.inf
    assert found.more_sensitive.item()


def test_nearly_parallel_vectors_keep_their_angle() -> None:
    tiny = 1e-9
    found = sensitivity(torch.tensor([[1.0, tiny]]).double(), torch.tensor([[1.0, 0.0]]), torch.tensor([[-1.0, 0.0]]))
    assert found.theta_c.item() == pytest.approx(tiny, rel=1e-6)
    assert math.pi - found.theta_d.item() == pytest.approx(tiny, rel=1e-6)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((4, 3), (2, 4), (2, 3)), r"expected features \(N, d\)"),
        (((4, 3), (2, 3), (3, 3)), r"expected features \(N, d\)"),
        (((4, 3), (2, 3), (5, 2, 3)), r"expected features \(N, d\)"),
        (((4,), (2, 3), (2, 3)), r"expected features \(N, d\)"),
    ],
)
def test_shapes_that_do_not_fit(shapes: tuple[tuple[int, ...], ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sensitivity(*(torch.ones(shape) for shape in shapes))


def test_values_that_do_not_fit() -> None:
    z, w, c = _features()
    bad = w.clone()
    bad[0, 0] = math.nan
    with pytest.raises(ValueError, match="FC class vectors hold NaN"):
        sensitivity(z, bad, c)
    for step in (0.0, -1.0, math.inf):
        with pytest.raises(ValueError, match="positive length"):
            sensitivity(z, w, c, step=step)
    with pytest.raises(ValueError, match="expected finite changes"):
        sensitivity(z, w, c, change=z[:3])
