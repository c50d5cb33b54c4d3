"""The Gaussian truncated to [0, π] (t of Eq. 12), and its fit by maximum likelihood."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize
from scipy.special import log_ndtr, ndtr

from msa_eval.sensitivity.quadrature import graded

Array = npt.NDArray[np.float64]

WIDE = 1.0
"""Above so many radians a mass is integrated: the difference of two values of Φ would lose its digits."""


@dataclass(frozen=True)
class TruncatedGaussian:
    """A Gaussian truncated to angles in [0, π].

    Attributes:
        mean: μ in radians, of the Gaussian before truncation; it may lie outside [0, π].
        sd: σ in radians, of the Gaussian before truncation.

    Raises:
        ValueError: when μ is not finite or σ not positive and finite.

    >>> float(TruncatedGaussian.of_degrees(90, 10).mass(np.pi / 2, np.pi).round(12))
    0.5
    """

    mean: float
    sd: float

    def __post_init__(self) -> None:
        if not (np.isfinite(self.mean) and np.isfinite(self.sd) and self.sd > 0):
            raise ValueError(f"expected a finite mean and a positive deviation, but got {self.mean} and {self.sd}")

    @classmethod
    def of_degrees(cls, mean: float, sd: float) -> TruncatedGaussian:
        """From μ and σ in degrees."""
        return cls(float(np.radians(mean)), float(np.radians(sd)))

    def log_density(self, angle: npt.ArrayLike) -> Array:
        """Log t(x, μ, σ) of Eq. 12 at angles in radians; -inf outside [0, π]."""
        at = np.asarray(angle, dtype=np.float64)
        inside = (at >= 0) & (at <= np.pi)
        value = -0.5 * ((at - self.mean) / self.sd) ** 2 - np.log(self.sd) - 0.5 * np.log(2 * np.pi)
        return np.where(inside, value - self._log_gaussian_mass(np.array(0.0), np.array(np.pi)), -np.inf)

    def density(self, angle: npt.ArrayLike) -> Array:
        """t(x, μ, σ) of Eq. 12 at angles in radians, a radian."""
        return np.exp(self.log_density(angle))

    def mass(self, low: npt.ArrayLike, high: npt.ArrayLike) -> Array:
        """Probability of angles between two bounds in radians, the lower one first."""
        low, high = (np.clip(np.asarray(v, dtype=np.float64), 0.0, np.pi) for v in (low, high))
        whole = self._log_gaussian_mass(np.array(0.0), np.array(np.pi))
        return np.minimum(np.exp(self._log_gaussian_mass(low, high) - whole), 1.0)

    def moments(self) -> tuple[float, float]:
        """Mean and standard deviation in radians after truncation."""
        first, second = self._score_moments()
        shift = self.sd * first
        return self.mean + shift, float(np.sqrt(max(self.sd**2 * second - shift**2, 0.0)))

    def _score_moments(self) -> tuple[float, float]:
        """E[u] and E[u²] of u = (θ - μ)/σ under the truncation."""
        ends = np.array([0.0, np.pi])
        u = (ends - self.mean) / self.sd
        slope = self.sd * self.density(ends)
        return float(slope[0] - slope[1]), float(1 + u[0] * slope[0] - u[1] * slope[1])

    def _log_gaussian_mass(self, low: Array, high: Array) -> Array:
        """Log of the untruncated Gaussian's mass between two bounds."""
        beyond = (self.mean - float(np.clip(self.mean, 0, np.pi))) / self.sd
        if self.sd > WIDE and abs(beyond) < 10:
            nodes, weights = graded(low, high, n=12, panels=3)
            shift = 0.5 * beyond**2
            kernel = np.exp(shift - 0.5 * ((nodes - self.mean) / self.sd) ** 2)
            with np.errstate(divide="ignore"):
                found: Array = np.log((weights * kernel).sum(axis=0)) - shift - np.log(self.sd * np.sqrt(2 * np.pi))
            return found
        a, b = (low - self.mean) / self.sd, (high - self.mean) / self.sd
        a, b = np.where(a > 0, -b, a), np.where(a > 0, -a, b)
        with np.errstate(divide="ignore", invalid="ignore"):
            tail = log_ndtr(b) + np.log1p(-np.exp(log_ndtr(a) - log_ndtr(b)))
            middle = np.log1p(-ndtr(a) - ndtr(-b))
        return np.where(b > a, np.where(b > 0, middle, tail), -np.inf)


def fit_truncated(angles: npt.ArrayLike) -> TruncatedGaussian:
    """Fit a Gaussian truncated to [0, π] by maximum likelihood.

    The family is exponential, so the likelihood has one maximum, where mean and deviation after truncation are the
    sample's. There is none where angles spread as much as uniform ones or gather at both ends.

    Args:
        angles: in radians, at least two different ones.

    Raises:
        ValueError: when there are too few angles, some are outside [0, π], or the likelihood has no maximum.

    >>> fit_truncated(np.radians([80.0, 90.0, 100.0])).mean.__round__(6)  # π/2
    1.570796
    """
    at = np.asarray(angles, dtype=np.float64).ravel()
    if not len(at) or not bool(((at >= 0) & (at <= np.pi)).all()):
        raise ValueError("expected angles in [0, π], but got " + ("none" if not len(at) else "some outside, or NaN"))
    mean, sd = float(at.mean()), float(at.std())
    if sd <= 1e-12:
        raise ValueError(f"the angles are all {np.degrees(mean):.4g}°; a Gaussian can't be fitted to one value")

    def model(p: Array) -> TruncatedGaussian:
        return TruncatedGaussian(mean + sd * float(p[0]), sd * float(np.exp(p[1])))

    def loss(p: Array) -> tuple[float, Array]:
        """Negative log-likelihood a sample and its slope; the sample counts by its mean and deviation alone."""
        fitted = model(p)
        first, second = fitted._score_moments()
        offset = (mean - fitted.mean) / fitted.sd
        square = (sd / fitted.sd) ** 2 + offset**2
        value = 0.5 * square + np.log(fitted.sd / sd)
        value += float(fitted._log_gaussian_mass(np.array(0.0), np.array(np.pi)))
        return value, np.array([sd / fitted.sd * (first - offset), second - square])

    found = minimize(loss, np.zeros(2), jac=True, method="BFGS", options={"gtol": 1e-10})
    fitted = model(found.x)
    off = max(abs(a - b) for a, b in zip(fitted.moments(), (mean, sd), strict=True))
    if not off <= 1e-6 * sd or fitted.sd > 100:
        raise ValueError(
            f"angles with mean {np.degrees(mean):.4g}° and deviation {np.degrees(sd):.4g}° fit no Gaussian truncated "
            f"to [0°, 180°]: they spread as uniform ones do, or gather at an end"
        )
    return fitted
