"""Eq. 29 against closed forms, a hypergeometric series at 30 digits, random vectors and limits."""

from __future__ import annotations

import mpmath
import numpy as np
import pytest
from scipy.special import erf, gammaln

from msa_eval.sensitivity import isotropic_cdf, isotropic_probability


def _series(z: float, d: int) -> float:
    """Eq. 29 integrated term by term: 2C² B(d/2, 1/2) z ₃F₂((3-d)/2, d/2, 1/2; (d+1)/2, 3/2; z²)."""
    with mpmath.workdps(30):
        z, h, half = mpmath.mpf(z), mpmath.mpf(d) / 2, mpmath.mpf(1) / 2
        c = mpmath.gamma(h) / (mpmath.gamma(h - half) * mpmath.sqrt(mpmath.pi))
        return float(2 * c**2 * mpmath.beta(h, half) * z * mpmath.hyp3f2(1.5 - h, h, half, h + half, 1.5, z * z))


@pytest.mark.parametrize(
    ("d", "z"),
    [(d, z) for d in (2, 3, 4, 5, 17, 64, 101) for z in (1e-6, 0.01, 0.37, 0.9, 0.99)]
    + [(2048, 0.004), (2048, 0.03), (10_000, 0.002), (10_000, 0.01)],
)
def test_it_is_the_series_at_30_digits(d: int, z: float) -> None:
    assert float(isotropic_cdf(z, d)) == pytest.approx(_series(z, d), abs=1e-13)


def test_closed_forms_in_two_and_three_dimensions() -> None:
    """Legendre's χ₂ and πz/4; beyond 1, the ellipse h²/x² + g² <= 1 in the square at d = 3."""
    z = np.array([0.1, 0.5, 0.9])
    n = np.arange(400)
    chi = (z[:, None] ** (2 * n + 1) / (2 * n + 1) ** 2).sum(axis=1)
    np.testing.assert_allclose(isotropic_cdf(z, 2), 4 / np.pi**2 * chi, atol=1e-14)
    np.testing.assert_allclose(isotropic_cdf(z, 3), np.pi * z / 4, atol=1e-14)
    assert float(isotropic_cdf(1.0, 2)) == pytest.approx(0.5, abs=1e-14)
    x = np.array([1.0001, 1.5, 7.0, 1e4])
    np.testing.assert_allclose(isotropic_cdf(x, 3), (np.sqrt(1 - x**-2) + x * np.arcsin(1 / x)) / 2, atol=1e-13)


def test_beyond_one_in_two_dimensions_by_a_one_dimensional_rule() -> None:
    """(2/π)² ∫ arcsin(min(1, x sin t)) dt by the midpoint rule on either side of the corner."""
    for x in (1.2, 4.0):
        corner = np.arcsin(1 / x)
        t = (np.arange(200_000) + 0.5) / 200_000 * corner
        exact = 4 / np.pi**2 * (np.arcsin(x * np.sin(t)).mean() * corner + np.pi / 2 * (np.pi / 2 - corner))
        assert float(isotropic_cdf(x, 2)) == pytest.approx(exact, abs=1e-8)


@pytest.mark.parametrize(("d", "x"), [(2, 0.7), (2, 1.6), (5, 0.45), (40, 0.2), (300, 0.05)])
def test_random_gaussian_vectors(d: int, x: float) -> None:
    """Two independent directions' angles to a fixed vector, 40,000 times; within 4.5 standard errors."""
    generator = np.random.default_rng(d)
    n = 40_000
    cos = [(v := generator.standard_normal((n, d)))[:, 0] / np.linalg.norm(v, axis=1) for _ in range(2)]
    share = (np.abs(cos[0]) <= x * np.sqrt(1 - cos[1] ** 2)).mean()
    p = float(isotropic_cdf(x, d))
    assert abs(share - p) < 4.5 * np.sqrt(p * (1 - p) / n)


def test_limits_monotony_and_high_dimensions() -> None:
    for d in (2, 3, 50, 2048, 100_000):
        p = isotropic_probability(np.linspace(0, np.pi / 2, 300), d)
        assert (np.diff(p) <= 0).all()
        assert p[-1] == pytest.approx(0, abs=1e-12)
        assert isotropic_cdf([0.0, np.inf], d).tolist() == [0.0, 1.0]
    by_dimension = [float(isotropic_cdf(0.3, d)) for d in (2, 3, 4, 8, 16, 64, 512, 2048)]
    assert by_dimension == sorted(by_dimension)
    # Far up, √d cos θ is a standard Gaussian and sin θ is 1, up to an error of the order of 1/d.
    z = np.linspace(0, 4, 30) / np.sqrt(100_000)
    np.testing.assert_allclose(isotropic_cdf(z, 100_000), erf(z * np.sqrt(50_000)), atol=2e-5)


def test_the_symmetry_of_gamma_and_the_density_at_zero() -> None:
    gamma = np.array([0.2, 1.1])
    np.testing.assert_allclose(isotropic_probability(np.pi - gamma, 7), isotropic_probability(gamma, 7), atol=1e-15)
    # F'(0) = 4C² B(d/2, 1/2)/2 with the constant in log-gamma.
    d = 2048
    log_c = gammaln(d / 2) - gammaln((d - 1) / 2) - 0.5 * np.log(np.pi)
    slope = 2 * np.exp(2 * log_c + gammaln(d / 2) + gammaln(0.5) - gammaln((d + 1) / 2))
    assert float(isotropic_cdf(1e-6, d)) / 1e-6 == pytest.approx(slope, rel=1e-8)


def test_shapes_and_refusals() -> None:
    assert isotropic_cdf(0.5, 4).shape == ()
    assert isotropic_cdf(np.full((2, 3), 0.5), 4).shape == (2, 3)
    assert np.isnan(isotropic_cdf([np.nan, 0.5], 4)).tolist() == [True, False]
    for d in (1, 0, 2.5, True, np.nan, np.inf):
        with pytest.raises(ValueError, match="at least 2, but got"):
            isotropic_cdf(0.5, d)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"at least 0, but the lowest is -0\.1"):
        isotropic_cdf([0.1, -0.1], 4)
