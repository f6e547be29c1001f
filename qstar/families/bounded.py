"""Families with a density on an interval, on the circle and on the simplex."""

import math
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
from numpy import ndarray
from numpy.random import Generator
from numpy.typing import ArrayLike
from scipy.special import betaln, gammaln, i0e, xlogy

from ..result import HashedByValue
from ._special import LARGE, circle_variances, dirichlet_variance, log_poisson
from .base import (
    CIRCLE,
    SIMPLEX,
    Distribution,
    Finite,
    NotNegative,
    Positive,
    set_fields,
    vector,
)


@dataclass(frozen=True, slots=True)
class Uniform(Distribution):
    """A flat density from `low` to `high`, both finite."""

    low: Finite
    high: Finite

    def __post_init__(self) -> None:
        Distribution.__post_init__(self)
        if not self.low < self.high:
            raise ValueError(
                f"low must lie below high: got {self.low} and {self.high}. Swap them, if they "
                f"came in the wrong order; a single point has no density."
            )

    @property
    def support(self) -> tuple[float, float]:
        return self.low, self.high

    @property
    def landmarks(self) -> tuple[tuple[float, float], ...]:
        return ((self.low / 2 + self.high / 2, self.high / 2 - self.low / 2),)

    def _log_density(self, x: ndarray, from_centre: ndarray, to_high: ndarray) -> ndarray:
        return 0 * x - math.log(self.high - self.low)

    def sample(self, count: int, *, generator: Generator) -> ndarray:
        return generator.uniform(self.low, self.high, count)

    def _general(self) -> Distribution:
        return Beta(1.0, 1.0) if (self.low, self.high) == (0.0, 1.0) else self


@dataclass(frozen=True, slots=True)
class Beta(Distribution):
    """A probability: density x^(a - 1) (1 - x)^(b - 1) on (0, 1); a and b are positive."""

    a: Positive
    b: Positive
    ends = (0.0, 1.0)
    varies = ("a", "b")

    @property
    def landmarks(self) -> tuple[tuple[float, float], ...]:
        total = self.a + self.b
        mean = self.a / total
        return ((mean, math.sqrt(mean * (self.b / total) / (total + 1))),)

    def _log_density(self, x: ndarray, from_centre: ndarray, to_high: ndarray) -> ndarray:
        a, b, total = self.a, self.b, self.a + self.b
        if min(a, b) > LARGE:
            gap = total * from_centre
            log_odds = log_poisson(a, total * x, gap) + log_poisson(b, total * to_high, -gap)
            log_odds += math.log(a) + math.log(b / total) - log_poisson(total, total, 0.0)
            return np.where(x * to_high > 0, log_odds - np.log(x) - np.log(to_high), -np.inf)
        return xlogy(a - 1, x) + xlogy(b - 1, to_high) - betaln(a, b)

    def log_density_beyond(self, anchor: ndarray, side: ndarray, log_distance: ndarray) -> ndarray:
        power = np.where(anchor == 0, self.a, self.b)
        at_end = ((anchor == 0) & (side > 0)) | ((anchor == 1) & (side < 0))
        known = power * log_distance - betaln(self.a, self.b)
        # No zero-argument super() in a dataclass with slots.
        other = Distribution.log_density_beyond(self, anchor, side, log_distance)
        return np.where(at_end & (log_distance < 0), known, other)

    def sample(self, count: int, *, generator: Generator) -> ndarray:
        return generator.beta(self.a, self.b, count)

    def _variance(self, teacher: Self, a: ndarray, b: ndarray) -> ndarray:
        ours, theirs = np.array([self.a, self.b]), np.array([teacher.a, teacher.b])
        return dirichlet_variance(ours, theirs, a, b)


@dataclass(frozen=True, slots=True, eq=False, init=False)
class Dirichlet(HashedByValue, Distribution):
    """A probability vector: density prod x_i^(concentration_i - 1) on the simplex.

    Attributes:
        concentration: At least two numbers, each positive. Shape (outcomes,).
    """

    concentration: ndarray
    outcomes = SIMPLEX
    varies = ("concentration",)

    def __init__(self, concentration: ArrayLike) -> None:
        values = vector(concentration, "concentration")
        if len(values) < 2 or (values <= 0).any():
            raise ValueError(
                f"concentration must hold at least two positive numbers: got {values}. Drop the "
                f"outcomes that cannot happen."
            )
        set_fields(self, concentration=values)

    def log_density(self, x: ArrayLike) -> ndarray:
        """The log-density of the first coordinates, the last being 1 minus their sum; -inf where a
        point is no probability vector (to 1e-9)."""
        points = np.asarray(x, dtype=float)
        if points.ndim == 0 or points.shape[-1] != len(self.concentration):
            raise ValueError(
                f"x must have the {len(self.concentration)} entries of a probability vector on its "
                f"last axis: got shape {points.shape}."
            )
        inside = (points >= 0).all(axis=-1) & (np.abs(points.sum(axis=-1) - 1) <= 1e-9)
        log_beta = gammaln(self.concentration).sum() - gammaln(self.concentration.sum())
        powers = xlogy(self.concentration - 1, np.where(points >= 0, points, 0.5)).sum(axis=-1)
        return np.where(inside, powers - log_beta, -np.inf)

    def sample(self, count: int, *, generator: Generator) -> ndarray:
        return generator.dirichlet(self.concentration, count)

    def _kin(self) -> tuple[object, ...]:
        return Dirichlet, len(self.concentration)

    def _variance(self, teacher: Self, a: ndarray, b: ndarray) -> ndarray:
        return dirichlet_variance(self.concentration, teacher.concentration, a, b)


@dataclass(frozen=True, slots=True)
class VonMises(Distribution):
    """An angle, in radians: density exp(concentration cos(x - location)) on the circle.

    A concentration of zero is the uniform circle; `location` is the mean direction.
    """

    concentration: NotNegative
    location: Finite
    ends = (-math.pi, math.pi)
    outcomes = CIRCLE
    varies = ("concentration", "location")

    def log_density(self, x: ArrayLike) -> ndarray:
        """The log-density per radian; an angle may be given modulo 2 pi."""
        half = np.sin((np.asarray(x, dtype=float) - self.location) / 2)
        return -2 * self.concentration * half**2 - np.log(2 * np.pi * i0e(self.concentration))

    def sample(self, count: int, *, generator: Generator) -> ndarray:
        return generator.vonmises(self.location, self.concentration, count)

    def _natural(self) -> ndarray:
        return self.concentration * np.array([math.cos(self.location), math.sin(self.location)])

    def _variance(self, teacher: Self, a: ndarray, b: ndarray) -> ndarray:
        middle = self.location / 2 + teacher.location / 2
        chord = 2 * math.sin((self.location - teacher.location) / 2)
        turn = chord * np.array([-math.sin(middle), math.cos(middle)])
        ours = np.array([math.cos(self.location), math.sin(self.location)])
        gap = (self.concentration - teacher.concentration) * ours + teacher.concentration * turn
        natural = a[..., None] * self._natural() + b[..., None] * teacher._natural()
        size = np.hypot(natural[..., 0], natural[..., 1])
        axis = natural / np.where(size > 0, size, 1.0)[..., None]
        along = axis @ gap
        across = axis[..., 0] * gap[1] - axis[..., 1] * gap[0]
        radial, tangential = circle_variances(size)
        return np.where(size > 0, radial * along**2 + tangential * across**2, 0.5 * (gap**2).sum())

    def _between(self, teacher: Self, a: float, b: float) -> Self:
        x, y = a * self._natural() + b * teacher._natural()
        return replace(self, concentration=math.hypot(x, y), location=math.atan2(y, x))
