"""How often the FC head is the more sensitive one when features point anywhere (Eqs. 11 and 29, Figure 2).

References:
    Sensitivity as a Double-Edged Sword (Wang, 2026), arXiv:2606.01746, sections 3.4 and 7.1.
    Distributions of Angles in Random Packing on Spheres (Cai, Fan & Jiang, 2013), arXiv:1306.0256.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy.special import betainc

from msa_eval.sensitivity.quadrature import graded

Array = npt.NDArray[np.float64]


def isotropic_cdf(x: npt.ArrayLike, d: int) -> Array:
    """CDF of 𝒳 = |cos θ_c| / |sin θ_d|, both angles those of isotropic features in d dimensions.

    cos²θ is Beta(1/2, (d-1)/2), so the inner integral of Eq. 29 is an incomplete beta function I, and

        F(x) = 2C ∫₀^{π/2} cos^{d-2}u · I_{min(1, x² cos² u)}(1/2, (d-1)/2) du,   u = π/2 - θ_d.

    The constant 2C = 2Γ(d/2) / (√π Γ((d-1)/2)) is one over the same integral without I and is computed as such, because
    the difference of two log-gammas loses digits as d grows. Up to d = 10⁴ absolute errors are below 1e-13.

    The paper's Eq. 29 names its argument z outside and γ inside; read as z = |cos γ|. At d = 2 and 3 and x <= 1 there
    are closed forms, 4/π² χ₂(x) with Legendre's χ₂, and πx/4.

    Args:
        x: at least 0, of any shape; NaN stays NaN.
        d: dimensions of the features, at least 2.

    Returns:
        values in [0, 1], of the shape of ``x``.

    Raises:
        ValueError: when d is no whole number of at least 2, or an ``x`` is negative.

    >>> round(float(isotropic_cdf(1.0, 3)), 10)  # π/4
    0.7853981634
    >>> isotropic_cdf([0.0, 0.02, 0.1], 2048).round(3)
    array([0.   , 0.634, 1.   ])
    """
    if isinstance(d, bool) or not float(d).is_integer() or d < 2:
        raise ValueError(f"expected a whole number of dimensions, at least 2, but got {d}")
    at = np.asarray(x, dtype=np.float64)
    if bool((at < 0).any()):
        raise ValueError(f"expected ratios of at least 0, but the lowest is {np.nanmin(at):g}")
    # cos^{d-2} falls below 1e-18 at the end; where x cos u reaches 1, the integrand has a corner.
    end = np.full_like(at, min(np.pi / 2, 9.2 / np.sqrt(max(d - 2, 1))))
    corner = np.minimum(np.arccos(1 / np.maximum(at, 1.0)), end)
    total, whole = np.zeros_like(at), np.zeros_like(at)
    for low, high in ((np.zeros_like(at), corner), (corner, end)):
        u, weight = graded(low, high)
        weight = weight * np.cos(u) ** (d - 2)
        total += (weight * betainc(0.5, (d - 1) / 2, np.minimum(1.0, (at * np.cos(u)) ** 2))).sum(axis=0)
        whole += weight.sum(axis=0)
    return np.clip(total / whole, 0.0, 1.0)


def isotropic_probability(gamma: npt.ArrayLike, d: int) -> Array:
    """P(|cos θ_c|/|sin θ_d| <= |cos γ|): how often the sufficient condition Eq. 8 holds (Eq. 29).

    Args:
        gamma: angle between the features' change and the FC class vector, in radians, of any shape.
        d: dimensions of the features, at least 2.

    >>> float(isotropic_probability(np.pi / 2, 2048)) < 1e-12
    True
    """
    return isotropic_cdf(np.abs(np.cos(np.asarray(gamma, dtype=np.float64))), d)
