"""Eqs. 12 and 13 against a quadrature at 18 digits, another of scipy's, random angles and limits."""

from __future__ import annotations

from collections.abc import Iterator

import mpmath
import numpy as np
import pytest
from scipy.integrate import quad
from scipy.stats import truncnorm

from msa_eval.sensitivity import (
    RESNET50_FC,
    RESNET50_L2,
    AngleModel,
    TruncatedGaussian,
    empirical_cdf,
    empirical_probability,
    fit_angles,
    fit_truncated,
)
from msa_eval.sensitivity.empirical import split_angles

PI = np.pi


def _model(own: tuple[float, float], other: tuple[float, float], k: int) -> AngleModel:
    return AngleModel(TruncatedGaussian(*own), TruncatedGaussian(*other), 1 / k)


def _cases() -> Iterator[tuple[AngleModel, AngleModel, float]]:
    yield RESNET50_FC, RESNET50_L2, 0.07
    yield _model((1.2, 0.3), (1.6, 0.02), 2), _model((0.4, 2.0), (2.9, 0.001), 7), 0.6
    yield _model((0.3, 0.01), (1.9, 5.0), 10), _model((1.3, 0.2), (1.7, 0.004), 1000), 0.96
    yield _model((1.0, 0.002), (2.0, 0.002), 3), _model((1.5, 0.4), (1.0, 30.0), 3), 0.5
    yield _model((1.4, 0.1), (1.6, 0.1), 5), _model((1.1, 0.3), (2.1, 0.2), 5), 1.4


def _exact(x: float, fc: AngleModel, l2: AngleModel) -> float:
    """Eq. 13 by mpmath from the paper's formulas as printed; only the panels know where the integrand is."""

    def phi(part: TruncatedGaussian, at: mpmath.mpf) -> mpmath.mpf:
        return mpmath.ncdf((at - part.mean) / mpmath.mpf(part.sd))

    def density(at: mpmath.mpf, model: AngleModel) -> mpmath.mpf:
        return sum(
            weight
            * mpmath.npdf((at - part.mean) / mpmath.mpf(part.sd))
            / part.sd
            / (phi(part, mpmath.pi) - phi(part, 0))
            for weight, part in model.parts
        )

    def inner(theta: mpmath.mpf) -> mpmath.mpf:
        high = mpmath.acos(-min(mpmath.mpf(1), x * mpmath.sin(theta)))
        return sum(
            weight * (phi(part, high) - phi(part, mpmath.pi - high)) / (phi(part, mpmath.pi) - phi(part, 0))
            for weight, part in fc.parts
        )

    places = {0.0, PI / 2, PI}
    steps = (-10, -5, -2, -1, 0, 1, 2, 5, 10)
    places |= {float(np.clip(part.mean + s * part.sd, 0, PI)) for _, part in l2.parts for s in steps}
    for angle in [PI / 2, *(abs(part.mean - PI / 2) + s * part.sd for _, part in fc.parts for s in steps)]:
        sine = np.sin(np.clip(angle, 0, PI / 2)) / x
        if sine < 1:
            places |= {float(np.arcsin(sine)), PI - float(np.arcsin(sine))}
    with mpmath.workdps(18):
        return float(mpmath.quad(lambda t: density(t, l2) * inner(t), sorted(places), maxdegree=4))


@pytest.mark.parametrize(("fc", "l2", "x"), list(_cases()))
def test_it_is_the_integral_at_18_digits(fc: AngleModel, l2: AngleModel, x: float) -> None:
    assert float(empirical_cdf(x, fc, l2)) == pytest.approx(_exact(x, fc, l2), abs=1e-11)


def test_both_integrals_of_eq_13_by_scipy() -> None:
    """The double integral as printed, over y = cos θ_c with the root in the denominator."""
    fc, l2, x = _model((1.3, 0.2), (1.6, 0.3), 4), _model((1.0, 0.3), (1.8, 0.25), 4), 0.55

    def inner(theta: float) -> float:
        end = np.sin(theta) * x
        return float(quad(lambda y: float(fc.density(np.arccos(y))) / np.sqrt(1 - y * y), -end, end, epsabs=1e-11)[0])

    def outer(theta: float) -> float:
        return float(l2.density(theta) + l2.density(PI - theta)) * inner(theta)

    assert float(empirical_cdf(x, fc, l2)) == pytest.approx(quad(outer, 0, PI / 2, epsabs=1e-9)[0], abs=1e-8)


def _draw(model: AngleModel, n: int, generator: np.random.Generator) -> np.ndarray:
    own = generator.random(n) < model.share
    angles = np.empty(n)
    assert model.other is not None
    for chosen, part in ((own, model.own), (~own, model.other)):
        ends = np.array([0, PI]) / part.sd - part.mean / part.sd
        angles[chosen] = truncnorm.rvs(*ends, part.mean, part.sd, size=int(chosen.sum()), random_state=generator)
    return angles


@pytest.mark.parametrize(("fc", "l2", "x"), list(_cases()))
def test_random_angles(fc: AngleModel, l2: AngleModel, x: float) -> None:
    """200,000 independent pairs of angles; within 4.5 standard errors."""
    generator, n = np.random.default_rng(1), 200_000
    share = (np.abs(np.cos(_draw(fc, n, generator))) <= x * np.sin(_draw(l2, n, generator))).mean()
    p = float(empirical_cdf(x, fc, l2))
    assert abs(share - p) < 4.5 * np.sqrt(p * (1 - p) / n)


def test_limits_monotony_and_extreme_deviations() -> None:
    for fc, l2, _ in _cases():
        p = empirical_probability(np.linspace(0, PI / 2, 60), fc, l2)
        assert (np.diff(p) <= 1e-13).all()
        assert p[-1] == pytest.approx(0, abs=1e-12)
        assert float(empirical_cdf(np.inf, fc, l2)) == pytest.approx(1, abs=1e-12)
    # Very narrow: a step where |cos μ_c| = x sin μ_d.
    narrow = AngleModel(TruncatedGaussian(1.2, 1e-9), None, 1.0), AngleModel(TruncatedGaussian(0.8, 1e-9), None, 1.0)
    step = np.cos(1.2) / np.sin(0.8)
    np.testing.assert_allclose(empirical_cdf([step - 1e-6, step, step + 1e-6], *narrow), [0, 0.5, 1], atol=1e-6)
    # Very wide: uniform angles, for which Eq. 13 is Eq. 29 at d = 2.
    wide = AngleModel(TruncatedGaussian(2.0, 1e6), None, 1.0)
    assert float(empirical_cdf(1.0, wide, wide)) == pytest.approx(0.5, abs=1e-11)


def test_isotropic_angles_as_a_check_of_both_models() -> None:
    """In high dimensions isotropic angles are nearly Gaussian around 90° with deviation 1/√d."""
    from msa_eval.sensitivity import isotropic_cdf

    d = 20_000
    model = AngleModel(TruncatedGaussian(PI / 2, d**-0.5), None, 1.0)
    x = np.linspace(0, 3, 7) * d**-0.5
    np.testing.assert_allclose(empirical_cdf(x, model, model), isotropic_cdf(x, d), atol=1e-4)


@pytest.mark.parametrize(
    ("mean", "sd"), [(1.2, 0.1), (0.1, 0.5), (3.3, 0.4), (-0.5, 0.4), (1.5, 1.0), (1.0, 40.0), (1.0, 1e-4)]
)
def test_the_truncated_gaussian_is_scipys(mean: float, sd: float) -> None:
    part, ends = TruncatedGaussian(mean, sd), ((0 - mean) / sd, (PI - mean) / sd)
    peer = truncnorm(*ends, loc=mean, scale=sd)
    at = np.linspace(0.01, 3.1, 23)
    np.testing.assert_allclose(part.density(at), peer.pdf(at), rtol=1e-9, atol=1e-200)
    np.testing.assert_allclose(part.mass(0.0, at), peer.cdf(at), atol=1e-12)
    np.testing.assert_allclose(part.moments(), (peer.mean(), peer.std()), rtol=1e-5)
    assert part.density([-0.01, PI + 0.01]).tolist() == [0, 0]
    assert float(part.mass(0, PI)) == pytest.approx(1, abs=1e-14)


@pytest.mark.parametrize(("mean", "sd"), [(1.2, 0.1), (0.1, 0.3), (-0.3, 0.5), (3.0, 0.5), (1.5, 0.9)])
def test_the_fit_finds_what_angles_were_drawn_from(mean: float, sd: float) -> None:
    angles = truncnorm.rvs(-mean / sd, (PI - mean) / sd, mean, sd, size=100_000, random_state=np.random.default_rng(0))
    fitted = fit_truncated(angles)
    assert fitted.mean == pytest.approx(mean, abs=0.02 * max(1, sd / 0.3))
    assert fitted.sd == pytest.approx(sd, rel=0.02)
    assert fitted.moments() == pytest.approx((angles.mean(), angles.std()), abs=1e-7)
    best = fitted.log_density(angles).sum()
    for dm, ds in ((0.01, 0), (-0.01, 0), (0, 0.01), (0, -0.01)):
        assert TruncatedGaussian(fitted.mean + dm * sd, fitted.sd * (1 + ds)).log_density(angles).sum() < best


@pytest.mark.parametrize(
    ("angles", "message"),
    [
        ([], "but got none"),
        ([1.0, np.nan], "some outside, or NaN"),
        ([1.0, 3.2], "some outside, or NaN"),
        ([1.0, 1.0], "angles are all 57.3°"),
        ([0.1, 3.1, 0.1, 3.1], "fit no Gaussian truncated"),
        ([0.0, 0.0, 0.0, 0.1], "fit no Gaussian truncated"),
    ],
)
def test_angles_that_have_no_fit(angles: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit_truncated(angles)


def test_angles_of_a_head_are_split_by_class() -> None:
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 3, 500)
    angles = np.where(labels[:, None] == np.arange(3), 1.1, 1.6) + 0.05 * generator.standard_normal((500, 3))
    angles[0, 2] = np.nan
    own, other = split_angles(angles, labels)
    assert len(own) + len(other) == 1499
    model = fit_angles(angles, labels)
    assert model.share == 1 / 3
    assert model.own.mean == pytest.approx(own.mean(), abs=1e-9)
    assert model.other is not None
    assert model.other.sd == pytest.approx(other.std(), abs=1e-9)
    one = fit_angles(angles[:, :1], np.zeros(500, dtype=int))
    assert (one.other, one.share) == (None, 1.0)
    for wrong in (labels + 1, labels[:3], labels - 1):
        with pytest.raises(ValueError, match="labels below k"):
            fit_angles(angles, wrong)


def test_the_papers_angles_are_read_as_positive_and_negative_pairs() -> None:
    assert RESNET50_FC.other is not None
    assert RESNET50_L2.other is not None
    means = [np.degrees(part.mean) for part in (RESNET50_FC.own, RESNET50_FC.other, RESNET50_L2.own, RESNET50_L2.other)]
    assert means == pytest.approx([66.81, 90.01, 74.3, 101.3])
    deviations = [
        np.degrees(part.sd) for part in (RESNET50_FC.own, RESNET50_FC.other, RESNET50_L2.own, RESNET50_L2.other)
    ]
    assert deviations == pytest.approx([5.56, 3.02, 7.9, 4.3])
    assert RESNET50_FC.share == RESNET50_L2.share == 0.001


def test_refusals() -> None:
    part = TruncatedGaussian(1.0, 0.1)
    for sd in (0.0, -1.0, np.nan, np.inf):
        with pytest.raises(ValueError, match="positive deviation"):
            TruncatedGaussian(1.0, sd)
    for share in (0.0, 1.5, np.nan):
        with pytest.raises(ValueError, match="share of own-class pairs"):
            AngleModel(part, part, share)
    with pytest.raises(ValueError, match=r"a share of 0.5 is of other classes"):
        AngleModel(part, None, 0.5)
    model = AngleModel(part, None, 1.0)
    assert np.isnan(empirical_cdf([np.nan, 0.5], model, model)).tolist() == [True, False]
    with pytest.raises(ValueError, match="at least 0"):
        empirical_cdf(-0.1, model, model)
