"""How often the FC head is the more sensitive one when angles are as measured (Eqs. 12 and 13, Figure 3).

References:
    Sensitivity as a Double-Edged Sword (Wang, 2026), arXiv:2606.01746, sections 3.4 and 7.2.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from msa_eval.sensitivity.quadrature import adaptive
from msa_eval.sensitivity.truncated import TruncatedGaussian, fit_truncated

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class AngleModel:
    """Angles between features and class vectors: own class and other classes, mixed by how many there are (Eq. 12).

    Attributes:
        own: angles to the vector of the feature's own class.
        other: angles to those of other classes; ``None`` where there is one class only.
        share: α in (0, 1], the share of own-class pairs: 1/k for k classes.

    Raises:
        ValueError: when the share is outside (0, 1], or there are other classes but no angles to them.
    """

    own: TruncatedGaussian
    other: TruncatedGaussian | None
    share: float

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"expected a share of own-class pairs in (0, 1], but got {self.share}")
        if self.share < 1 and self.other is None:
            raise ValueError(f"a share of {1 - self.share:g} is of other classes; give the model of their angles")

    @property
    def parts(self) -> list[tuple[float, TruncatedGaussian]]:
        """The parts of the mixture with their weights."""
        parts = [(self.share, self.own)]
        return parts if self.other is None or self.share == 1 else [*parts, (1 - self.share, self.other)]

    def density(self, angle: npt.ArrayLike) -> Array:
        """p_θ of Eq. 12 at angles in radians, a radian."""
        return np.sum([weight * part.density(angle) for weight, part in self.parts], axis=0)  # type: ignore[no-any-return]

    def mass(self, low: npt.ArrayLike, high: npt.ArrayLike) -> Array:
        """Probability of angles between two bounds in radians, the lower one first."""
        return np.sum([weight * part.mass(low, high) for weight, part in self.parts], axis=0)  # type: ignore[no-any-return]


RESNET50_FC = AngleModel(
    TruncatedGaussian.of_degrees(66.81, 5.56), TruncatedGaussian.of_degrees(90.01, 3.02), share=1 / 1000
)
"""θ_c of the paper's ResNet-50 on ImageNet. Plus and minus in the paper's +66.81 and -90.01 degrees stand for positive
and negative pairs (own class and others), not for the sign of an angle: angles lie in [0, π]."""

RESNET50_L2 = AngleModel(
    TruncatedGaussian.of_degrees(74.3, 7.9), TruncatedGaussian.of_degrees(101.3, 4.3), share=1 / 1000
)
"""θ_d of the paper's ResNet-50 that was trained with an ℓ2 head; see `RESNET50_FC`."""


def fit_angles(angles: npt.ArrayLike, labels: npt.ArrayLike) -> AngleModel:
    """Fit own-class and other-class angles by maximum likelihood.

    Args:
        angles: between features and class vectors, ``(N, k)`` in radians; pairs with NaN (of a zero vector) are left
            out.
        labels: ``(N,)``.

    Raises:
        ValueError: when labels don't fit, or either kind of angles fits no truncated Gaussian.
    """
    own, other = split_angles(angles, labels)
    k = np.asarray(angles).shape[1]
    return AngleModel(_fit(own, "own class"), _fit(other, "other classes") if k > 1 else None, 1 / k)


def split_angles(angles: npt.ArrayLike, labels: npt.ArrayLike) -> tuple[Array, Array]:
    """Angles to the own class and to the others, NaN left out.

    >>> own, other = split_angles([[0.1, 1.5], [1.6, 0.2]], [0, 1])
    >>> own, other
    (array([0.1, 0.2]), array([1.5, 1.6]))
    """
    at, y = np.asarray(angles, dtype=np.float64), np.asarray(labels)
    if at.ndim != 2 or y.shape != at.shape[:1] or not len(y) or y.min() < 0 or y.max() >= at.shape[1]:
        raise ValueError(
            f"expected angles (N, k) and N labels below k, but got shapes {at.shape} and {y.shape}"
            + (f", labels up to {y.max()}" if len(y) else "")
        )
    is_own = y[:, None] == np.arange(at.shape[1])
    known = ~np.isnan(at)
    return at[is_own & known], at[~is_own & known]


def _fit(angles: Array, which: str) -> TruncatedGaussian:
    try:
        return fit_truncated(angles)
    except ValueError as error:
        raise ValueError(f"{which}: {error}") from error


def empirical_cdf(x: npt.ArrayLike, fc: AngleModel, l2: AngleModel) -> Array:
    """CDF of 𝒳 = |cos θ_c| / |sin θ_d| for independent θ_c and θ_d (Eq. 13).

    The inner integral of Eq. 13 is the mass of θ_c in π/2 ± arcsin(x sin θ_d), in closed form by Φ; the outer one is
    made piecewise to an absolute error below 1e-10, however narrow or wide the Gaussians are.

    Independence is the paper's assumption. In truth both angles are of one feature and one class: they are own-class
    angles together, or other-class angles together. The CDF of measured ratios has no such assumption.

    Args:
        x: at least 0, of any shape; NaN stays NaN.
        fc: of the angles θ_c between features and FC class vectors.
        l2: of the angles θ_d between features and prototypes.

    Returns:
        values in [0, 1], of the shape of ``x``.

    Raises:
        ValueError: when an ``x`` is negative.

    >>> empirical_cdf([0.0, 0.05, 1.0], RESNET50_FC, RESNET50_L2).round(4)
    array([0.    , 0.6459, 1.    ])
    """
    at = np.asarray(x, dtype=np.float64)
    if bool((at < 0).any()):
        raise ValueError(f"expected ratios of at least 0, but the lowest is {np.nanmin(at):g}")
    flat = np.nan_to_num(at.ravel(), nan=0.0)

    def integrand(theta: Array, which: npt.NDArray[np.intp]) -> Array:
        reach = np.arcsin(np.minimum(1.0, flat[which] * np.sin(theta)))
        return l2.density(theta) * fc.mass(np.pi / 2 - reach, np.pi / 2 + reach)

    total = np.clip(adaptive(integrand, _edges(flat, fc, l2)), 0.0, 1.0)
    return np.where(np.isnan(at), np.nan, total.reshape(at.shape))


def empirical_probability(gamma: npt.ArrayLike, fc: AngleModel, l2: AngleModel) -> Array:
    """P(|cos θ_c|/|sin θ_d| <= |cos γ|): how often the sufficient condition Eq. 8 holds (Eq. 13).

    Args:
        gamma: angle between the features' change and the FC class vector, in radians, of any shape.
        fc: of the angles θ_c.
        l2: of the angles θ_d.
    """
    return empirical_cdf(np.abs(np.cos(np.asarray(gamma, dtype=np.float64))), fc, l2)


def _edges(x: Array, fc: AngleModel, l2: AngleModel) -> Array:
    """First panels ``(E, M)`` in θ_d: around the density's peaks, and where the mass of θ_c rises."""
    steps = np.array([-16.0, -8, -4, -2, -1, -0.5, 0, 0.5, 1, 2, 4, 8, 16])
    fixed = [0.0, np.pi / 2, np.pi]
    for _, part in l2.parts:
        peak, scale = _peak(part)
        fixed += list(peak + scale * steps)
    rises = [np.pi / 2]
    for _, part in fc.parts:
        peak, scale = _peak(part)
        rises += list(abs(peak - np.pi / 2) + scale * steps)
    sines = np.sin(np.clip(rises, 0, np.pi / 2))[:, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        at = np.arcsin(np.minimum(1.0, np.nan_to_num(sines / x, nan=1.0)))
    every = np.concatenate([np.broadcast_to(np.array(fixed)[:, None], (len(fixed), len(x))), at, np.pi - at])
    found: Array = np.sort(np.clip(every, 0, np.pi), axis=0)
    return found


def _peak(part: TruncatedGaussian) -> tuple[float, float]:
    """Where the truncated density is highest, and over which length it falls from there."""
    peak = float(np.clip(part.mean, 0, np.pi))
    beyond = abs(part.mean - peak)
    return peak, min(part.sd, part.sd**2 / beyond) if beyond else part.sd
