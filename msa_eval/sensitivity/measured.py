"""Relative sensitivities of an FC head and an ℓ2 head on features (Eqs. 3 to 8).

References:
    Sensitivity as a Double-Edged Sword (Wang, 2026), arXiv:2606.01746, section 3.3.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sensitivity:
    """What one change of the features does to the score of each class, relative to that score.

    Everything is of shape ``(N, k)``, a feature and a class, and in float64. An angle with a zero vector is NaN, and so
    is all that rests on it.

    Attributes:
        theta_c: angle between features and FC class vectors, in radians.
        theta_d: angle between features and prototypes, in radians.
        cos_gamma: |cos γ|, γ being the angle between the change and the FC class vector.
        s_c: S_c of Eq. 3; infinite where features and class vector are orthogonal.
        s_d: sup S_d of Eq. 5, over all directions of the change; infinite where features meet their prototype.
        ratio: |cos θ_c| / |sin θ_d|, the random variable 𝒳.
    """

    theta_c: Tensor
    theta_d: Tensor
    cos_gamma: Tensor
    s_c: Tensor
    s_d: Tensor
    ratio: Tensor

    @property
    def known(self) -> Tensor:
        """Which pairs are free of zero vectors, and of an ε of length 0."""
        return ~(self.s_c.isnan() | self.s_d.isnan() | self.ratio.isnan())

    @property
    def condition(self) -> Tensor:
        """Which pairs fulfil the sufficient condition |cos θ_c|/|sin θ_d| <= |cos γ| (Eq. 8)."""
        return self.known & (self.ratio <= self.cos_gamma)

    @property
    def more_sensitive(self) -> Tensor:
        """Which pairs have S_c >= sup S_d (Eq. 6): whatever the ℓ2 head's change, the FC head's is no smaller."""
        return self.known & (self.s_c >= self.s_d)


def sensitivity(
    z: Tensor,
    fc_vectors: Tensor,
    prototypes: Tensor,
    *,
    gamma: float = 0.0,
    step: float = 1.0,
    change: Tensor | None = None,
) -> Sensitivity:
    """Relative sensitivities S_c (Eq. 3) and sup S_d (Eq. 5) of every feature to every class.

    The paper's FC head has no bias here (Eq. 1): S_c is of the inner product, not of the logit. Both heads see the same
    change ε of the same features, as the paper assumes.

    Args:
        z: features ``(N, d)``.
        fc_vectors: the FC head's class vectors ``(k, d)``: the rows of a linear layer's weight.
        prototypes: of the ℓ2 head ``(k, d)``, or of each feature ``(N, k, d)`` where they depend on the batch.
        gamma: angle between the change and the FC class vector, in radians. 0 is the change that moves the FC head
            most, towards which an attack turns (Figure 2).
        step: ‖ε‖, in units of the features. Both sensitivities are proportional to it.
        change: measured changes ε ``(N, d)`` of the features, in place of ``gamma`` and ``step``.

    Raises:
        ValueError: when shapes don't fit, a value is not finite, or ``step`` is not positive.

    >>> found = sensitivity(torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0, 0.0]]), torch.tensor([[3.0, 0.0]]))
    >>> found.s_c.item(), found.s_d.item()  # 1/3 and 1/4
    (0.3333333333333333, 0.25)
    """
    z, w, c = (tensor.detach().double() for tensor in (z, fc_vectors, prototypes))
    _check(z, w, c, step)
    z_norm, w_norm = z.norm(dim=1, keepdim=True), w.norm(dim=1)
    theta_c, theta_d = _angles(z, w), _angles(z, c)
    if change is None:
        length = torch.full_like(z_norm, step)
        cos_gamma = torch.full_like(theta_c, abs(math.cos(gamma)))
    else:
        moved = change.detach().double()
        if moved.shape != z.shape or not bool(torch.isfinite(moved).all()):
            raise ValueError(f"expected finite changes of shape {tuple(z.shape)}, but got {tuple(moved.shape)}")
        length = moved.norm(dim=1, keepdim=True)
        cos_gamma = (moved @ w.T).abs() / (length * w_norm)
    score = (z @ w.T).abs() / w_norm
    distance = _distances(z, c)
    undefined = theta_c.isnan() | theta_d.isnan() | (length == 0)
    s_c = (length * cos_gamma / score).masked_fill(undefined, torch.nan)
    s_d = (length / distance).masked_fill(undefined, torch.nan)
    ratio = theta_c.cos().abs() / theta_d.sin().abs()
    return Sensitivity(theta_c, theta_d, cos_gamma, s_c, s_d, ratio)


def _distances(z: Tensor, vectors: Tensor) -> Tensor:
    """Distances ``(N, k)`` between features ``(N, d)`` and vectors ``(k, d)`` or ``(N, k, d)``."""
    exact = "donot_use_mm_for_euclid_dist"
    if vectors.ndim == 2:
        return torch.cdist(z, vectors, compute_mode=exact)
    return torch.cdist(z.unsqueeze(1), vectors, compute_mode=exact).squeeze(1)


def _angles(z: Tensor, vectors: Tensor) -> Tensor:
    """Angles in [0, π]; NaN with a zero vector. Kahan's form keeps the digits near 0 and π that an arc cosine loses."""
    z, vectors = (v / v.norm(dim=-1, keepdim=True) for v in (z, vectors))
    return 2 * torch.atan2(_distances(z, vectors), _distances(z, -vectors))


def _check(z: Tensor, w: Tensor, c: Tensor, step: float) -> None:
    if z.ndim != 2 or w.ndim != 2 or z.shape[1] != w.shape[1] or c.shape not in (w.shape, (len(z), *w.shape)):
        raise ValueError(
            f"expected features (N, d), FC class vectors (k, d) and prototypes (k, d) or (N, k, d), but got "
            f"{tuple(z.shape)}, {tuple(w.shape)} and {tuple(c.shape)}"
        )
    for name, tensor in (("features", z), ("FC class vectors", w), ("prototypes", c)):
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"the {name} hold NaN or infinite values")
    if not 0 < step < float("inf"):
        raise ValueError(f"expected a positive length of the change, but got {step}")
