"""Families with a density on the line or the half line."""

import math
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
from numpy import ndarray
from numpy.random import Generator
from scipy.special import gammaln, log_expit, xlogy

from ._special import (
    LARGE,
    log1p_square,
    log_beta,
    log_poisson,
    log_ratio,
    relative_gap,
    trigamma_excess,
)
from .base import Distribution, Finite, Positive, Special


@dataclass(frozen=True, slots=True)
class Gamma(Distribution):
    """Waiting times: density x^(shape - 1) exp(-rate x) on the positive numbers.

    Both are positive; 1 / rate is the scale.
    """

    shape: Positive
    rate: Positive
    ends = (0.0, math.inf)
    varies = ("shape", "rate")

    @property
    def landmarks(self) -> tuple[tuple[float, float], ...]:
        return ((self.shape / self.rate, math.sqrt(self.shape) / self.rate),)

    def _log_density(self, x: ndarray, from_centre: ndarray, to_high: ndarray) -> ndarray:
        if self.shape > LARGE:
            log_power = log_poisson(self.shape, self.rate * x, self.rate * from_centre)
            return np.where(x > 0, log_power + math.log(self.shape) - np.log(x), -np.inf)
        log_power = xlogy(self.shape - 1, self.rate * x) - self.rate * x
        return log_power - gammaln(self.shape) + math.log(self.rate)

    def _log_density_of_log(self, log_distance: ndarray) -> ndarray:
        log_scaled = math.log(self.rate) + log_distance
        return self.shape * log_scaled - np.exp(log_scaled) - gammaln(self.shape)

    def sample(self, count: int, *, generator: Generator) -> ndarray:
        return generator.gamma(self.shape, 1 / self.rate, count)

    def _variance(self, teacher: Self, a: ndarray, b: ndarray) -> ndarray:
        # trigamma(shape) = 1/shape + the excess: squares only, nothing is subtracted.
        shape = a * self.shape + b * teacher.shape
        shape_gap = self.shape - teacher.shape
        rate_gap = relative_gap(log_ratio(self.rate, teacher.rate), a, b)
        return shape * (rate_gap - shape_gap / shape) ** 2 + shape_gap**2 * trigamma_excess(shape)


@dataclass(frozen=True, slots=True)
class Exponential(Special):
    """Waiting time at a constant `rate`, positive; 1 / rate is the mean."""

    rate: Positive
    varies = ("rate",)

    def _general(self) -> Gamma:
        return Gamma(1.0, self.rate)


class _Stretched(Distribution):
    """A family in which some power or logarithm of the outcome is exponential, with a rate that is
    a power of the one field that varies.

    alpha* depends on the ratio rho of the two exponential rates alone, policy over teacher:
    1 / log(rho) - 1 / (rho - 1). See `qstar.gaussian.alpha_same_mean_isotropic`.
    """

    __slots__ = ()

    def _power(self) -> float:
        raise NotImplementedError

    def _variance(self, teacher: Self, a: ndarray, b: ndarray) -> ndarray:
        (name,) = self.varies
        log_rates = self._power() * log_ratio(getattr(self, name), getattr(teacher, name))
        return relative_gap(log_rates, a, b) ** 2

    def _between(self, teacher: Self, a: float, b: float) -> Self:
        (name,) = self.varies
        x, y, power = getattr(self, name), getattr(teacher, name), self._power()
        if (x > y) == (power > 0):  # from the larger rate, so that nothing overflows
            x, y, a, b = y, x, b, a
        return replace(self, **{name: y * (b + a * (x / y) ** power) ** (1 / power)})


@dataclass(frozen=True, slots=True)
class Weibull(_Stretched):
    """Lifetimes: (X / scale)^shape is exponential; both are positive.

    Two of them are one exponential family where they share the shape; elsewhere
    `qstar.families` integrates.
    """

    shape: Positive
    scale: Positive
    ends = (0.0, math.inf)
    varies = ("scale",)

    @property
    def landmarks(self) -> tuple[tuple[float, float], ...]:
        return ((self.scale, self.scale / max(self.shape, 1.0)),)

    def _log_density(self, x: ndarray, from_centre: ndarray, to_high: ndarray) -> ndarray:
        log_power = xlogy(self.shape - 1, x / self.scale) - (x / self.scale) ** self.shape
        return log_power + math.log(self.shape / self.scale)

    def _log_density_of_log(self, log_distance: ndarray) -> ndarray:
        log_power = self.shape * (log_distance - math.log(self.scale))
        return math.log(self.shape) + log_power - np.exp(log_power)

    def sample(self, count: int, *, generator: Generator) -> ndarray:
        return self.scale * generator.weibull(self.shape, count)

    def _power(self) -> float:
        return -self.shape


@dataclass(frozen=True, slots=True)
class Rayleigh(_Stretched, Special):
    """The length of a Gaussian vector in the plane; `scale`, positive, is the deviation of each
    axis."""

    scale: Positive
    varies = ("scale",)

    def _general(self) -> Weibull:
        return Weibull(2.0, self.scale * math.sqrt(2))

    def _power(self) -> float:
        return -2.0


@dataclass(frozen=True, slots=True)
class Pareto(_Stretched):
    """A power law from `minimum` up: log(X / minimum) is exponential with rate `shape`.

    Both are positive; `shape` is the tail index.
    Two of them are one exponential family where they share the minimum; elsewhere their supports
    are nested and `qstar.families` integrates.
    """

    shape: Positive
    minimum: Positive
    varies = ("shape",)

    @property
    def support(self) -> tuple[float, float]:
        return self.minimum, math.inf

    @property
    def landmarks(self) -> tuple[tuple[float, float], ...]:
        return ((self.minimum, self.minimum / self.shape),)

    def _log_density(self, x: ndarray, from_centre: ndarray, to_high: ndarray) -> ndarray:
        log_power = -(self.shape + 1) * (np.log(x) - math.log(self.minimum))
        return log_power + math.log(self.shape / self.minimum)

    def _log_density_of_log(self, log_distance: ndarray) -> ndarray:
        return math.log(self.shape) - self.shape * (log_distance - math.log(self.minimum))

    def sample(self, count: int, *, generator: Generator) -> ndarray:
        with np.errstate(over="ignore"):
            return self.minimum * np.exp(generator.exponential(1 / self.shape, count))

    def _power(self) -> float:
        return 1.0


class _Located(Distribution):
    """A density of the distance from a location, which is the median, in units of a scale."""

    __slots__ = ()
    location: float
    scale: float

    @property
    def landmarks(self) -> tuple[tuple[float, float], ...]:
        return ((self.location, self.scale),)


@dataclass(frozen=True, slots=True)
class Laplace(_Located, _Stretched):
    """Two exponentials back to back: density exp(-|x - location| / scale) / (2 scale).

    `location` is the median, `scale`, positive, the mean distance from it.
    Two of them are one exponential family where they share the location; elsewhere
    `qstar.families` integrates.
    """

    location: Finite
    scale: Positive
    varies = ("scale",)

    def _log_density(self, x: ndarray, from_centre: ndarray, to_high: ndarray) -> ndarray:
        return -np.abs(from_centre) / self.scale - math.log(2 * self.scale)

    def sample(self, count: int, *, generator: Generator) -> ndarray:
        return generator.laplace(self.location, self.scale, count)

    def _power(self) -> float:
        return -1.0


@dataclass(frozen=True, slots=True)
class Cauchy(_Located):
    """The heavy tail without a mean. Two of them balance at alpha = 1/2, always.

    `location` is the median, `scale`, positive, half the distance between the quartiles.
    """

    location: Finite
    scale: Positive

    def _log_density(self, x: ndarray, from_centre: ndarray, to_high: ndarray) -> ndarray:
        return -log1p_square(from_centre / self.scale) - math.log(math.pi * self.scale)

    def sample(self, count: int, *, generator: Generator) -> ndarray:
        return self.location + self.scale * generator.standard_cauchy(count)


@dataclass(frozen=True, slots=True)
class StudentT(_Located):
    """Student's t of `freedom` degrees of freedom, moved and stretched; 1 is the Cauchy
    distribution. `scale` is not the standard deviation; it and `freedom` are positive."""

    freedom: Positive
    location: Finite
    scale: Positive

    def _log_density(self, x: ndarray, from_centre: ndarray, to_high: ndarray) -> ndarray:
        unit = from_centre / self.scale / math.sqrt(self.freedom)
        return -0.5 * (self.freedom + 1) * log1p_square(unit) - self._log_constant()

    def _log_density_of_log(self, log_distance: ndarray) -> ndarray:
        log_unit = log_distance - math.log(self.scale) - 0.5 * math.log(self.freedom)
        log_power = 0.5 * (self.freedom + 1) * np.logaddexp(0.0, 2 * log_unit)
        return log_distance - log_power - self._log_constant()

    def _log_constant(self) -> float:
        log_root = 0.5 * math.log(self.freedom)
        return log_beta(self.freedom / 2, 0.5) + log_root + math.log(self.scale)

    def sample(self, count: int, *, generator: Generator) -> ndarray:
        return self.location + self.scale * generator.standard_t(self.freedom, count)


@dataclass(frozen=True, slots=True)
class Logistic(_Located):
    """The distribution whose cumulative probability is the logistic curve; `scale` is positive."""

    location: Finite
    scale: Positive

    def _log_density(self, x: ndarray, from_centre: ndarray, to_high: ndarray) -> ndarray:
        unit = from_centre / self.scale
        return log_expit(unit) + log_expit(-unit) - math.log(self.scale)

    def sample(self, count: int, *, generator: Generator) -> ndarray:
        return generator.logistic(self.location, self.scale, count)


@dataclass(frozen=True, slots=True)
class GaussianLine(_Located):
    """A one-dimensional `qstar.gaussian.Gaussian` whose points are plain numbers; `scale` is the
    standard deviation."""

    location: Finite
    scale: Positive

    def _log_density(self, x: ndarray, from_centre: ndarray, to_high: ndarray) -> ndarray:
        unit = from_centre / self.scale
        return -0.5 * unit**2 - math.log(self.scale) - 0.5 * math.log(2 * math.pi)

    def sample(self, count: int, *, generator: Generator) -> ndarray:
        return generator.normal(self.location, self.scale, count)
