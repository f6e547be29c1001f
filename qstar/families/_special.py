"""Formulas behind the families, each without the difference that would lose its digits."""

import math

import numpy as np
from numpy import ndarray
from numpy.polynomial.polynomial import polyval
from numpy.typing import ArrayLike
from scipy.special import betaln, gammaln, i0e, i1e, xlogy, zeta

LARGE = 100.0
"""Parameters above this take their log-density from deviances: differences of terms of their own
size would leave little of it."""
_STIRLING = np.array([1 / 12, -1 / 360, 1 / 1260, -1 / 1680, 1 / 1188, -691 / 360360, 1 / 156])
"""log k! - (k log k - k + log(2 pi k) / 2) = sum of these over k^(2 n + 1), n from 0."""
_TRIGAMMA = np.array([1 / 6, -1 / 30, 1 / 42, -1 / 30, 5 / 66, -691 / 2730, 7 / 6, -3617 / 510])
"""Bernoulli numbers B_2, B_4, ...: trigamma(x) = 1/x + 1/(2 x^2) + sum B_2k / x^(2k + 1)."""


def log_poisson(count: ArrayLike, rate: ArrayLike, excess: ArrayLike) -> ndarray:
    """count log(rate) - rate - log(count!), where excess = rate - count: no difference of large
    terms is taken. `count` is any number from zero up.

    Source: Loader (2000), "Fast and accurate computation of binomial probabilities".
    """
    k, mean, gap = (np.asarray(values, dtype=float) for values in (count, rate, excess))
    far, near = np.maximum(k, 15.0), np.minimum(k, 15.0)
    with np.errstate(all="ignore"):
        t = gap / far
        small = np.abs(t) < 0.5
        r = np.where(small, t, 0.0) / (2 + np.where(small, t, 0.0))
        odd = polyval(r**2, 1 / np.arange(3.0, 37.0, 2.0))
        # log(1 + t) - t: by the series of 2 artanh(t / (2 + t)) where the two nearly cancel.
        deviance = far * np.where(small, r * (2 * r**2 * odd - t), np.log(mean / far) - t)
        log_far = deviance - polyval(far**-2, _STIRLING) / far - 0.5 * np.log(2 * np.pi * far)
        return np.where(k > 15, log_far, xlogy(near, mean) - mean - gammaln(near + 1))


def log_beta(a: float, b: float) -> float:
    """log of the beta function, exact also where one of the two is large."""
    if max(a, b) <= LARGE:
        return float(betaln(a, b))
    total = a + b
    peak = log_poisson(a, a, 0.0) + log_poisson(b, b, 0.0) - log_poisson(total, total, 0.0)
    return -float(peak + math.log(a) + math.log(b / total)) - (
        a * math.log1p(b / a) + b * math.log1p(a / b)
    )


def log_ratio(x: float, y: float) -> float:
    """log(x / y) of positive numbers, exact also where they are close or their ratio overflows."""
    if abs(x - y) < 0.5 * y:
        return math.log1p((x - y) / y)
    return math.log(x) - math.log(y)


def log_ratio_of_complements(p: float, r: float) -> float:
    """log((1 - p) / (1 - r)), exact also where p and r are close or tiny."""
    if abs(p - r) < 0.5 * (1 - r):
        return math.log1p((r - p) / (1 - r))
    return math.log1p(-p) - math.log1p(-r)


def relative_gap(log_ratio: float, a: ndarray, b: ndarray) -> ndarray:
    """(x - y) / (a x + b y) where log_ratio = log(x / y)."""
    if log_ratio > 0:
        return -math.expm1(-log_ratio) / (a + b * math.exp(-log_ratio))
    return math.expm1(log_ratio) / (a * math.exp(log_ratio) + b)


def log1p_square(x: ndarray) -> ndarray:
    """log(1 + x^2) without overflow, with all digits for small x."""
    size = np.abs(x)
    return np.where(size > 1e8, 2 * np.log(size), np.log1p(np.minimum(size, 1e8) ** 2))


def dirichlet_variance(ours: ndarray, theirs: ndarray, a: ndarray, b: ndarray) -> ndarray:
    """Variance of the log-ratio of two Dirichlet distributions along their path."""
    # sum gap^2 trigamma(c) - total_gap^2 trigamma(total): the leading 1/c parts of trigamma are
    # written as squares, so that what large concentrations leave of the difference is kept.
    gap = ours - theirs
    c = a[..., None] * ours + b[..., None] * theirs
    total, total_gap = c.sum(axis=-1), gap.sum()
    leading = (c * (gap / c - (total_gap / total)[..., None]) ** 2).sum(axis=-1)
    excess = (gap**2 * trigamma_excess(c)).sum(axis=-1)
    return np.maximum(leading + excess - total_gap**2 * trigamma_excess(total), 0.0)


def trigamma_excess(x: ndarray) -> ndarray:
    """trigamma(x) - 1/x, positive; about 1 / (2 x^2) for large x."""
    far, near = np.maximum(x, 12.0), np.minimum(x, 12.0)
    series = polyval(far**-2, _TRIGAMMA) / far**3 + 0.5 / far**2
    return np.where(x > 12, series, zeta(2, near) - 1 / near)


def circle_variances(concentration: ndarray) -> tuple[ndarray, ndarray]:
    """Second derivative of log I_0 along the concentration, and its first over concentration.

    With r = I_1 / I_0 these are 1 - r / k - r^2 and r / k; the former cancels for large k, where
    the solution of r' = 1 - r / k - r^2 in powers of 1 / k takes over.
    """
    k = np.asarray(concentration, dtype=float)
    small, far = np.where((k < 20) & (k > 0), k, 1.0), np.maximum(k, 20.0)
    r = i1e(small) / i0e(small)
    slope = -polyval(1 / far, np.arange(len(_MEAN_RESULTANT)) * _MEAN_RESULTANT)
    radial = np.where(k >= 20, slope / far, 1 - r / small - r**2)
    tangential = np.where(k >= 20, polyval(1 / far, _MEAN_RESULTANT) / far, r / small)
    return np.where(k > 0, radial, 0.5), np.where(k > 0, tangential, 0.5)


def _mean_resultant_series(terms: int) -> ndarray:
    coefficients = [1.0, -0.5]
    for k in range(2, terms):
        inner = sum(coefficients[i] * coefficients[k - i] for i in range(1, k))
        coefficients.append(0.5 * ((k - 2) * coefficients[k - 1] - inner))
    return np.array(coefficients)


_MEAN_RESULTANT = _mean_resultant_series(28)
