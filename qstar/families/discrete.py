"""Families whose outcomes are counted: integers, and labels."""

import math
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
from numpy import ndarray
from numpy.random import Generator
from numpy.typing import ArrayLike
from scipy.special import betaln, expit, gammaln, logit, xlog1py, xlogy

from ..result import HashedByValue
from ._special import LARGE, log_poisson, log_ratio, log_ratio_of_complements
from .base import (
    INTEGERS,
    LABELS,
    Count,
    Distribution,
    Positive,
    Probability,
    ProbabilityAboveZero,
    Special,
    set_fields,
    vector,
)


@dataclass(frozen=True, slots=True)
class Binomial(Distribution):
    """Successes in `trials` (1 or more) independent attempts, each of `probability` in [0, 1]."""

    trials: Count
    probability: Probability
    outcomes = INTEGERS
    varies = ("probability",)

    @property
    def support(self) -> tuple[float, float]:
        low, high = self.probability == 1, self.probability > 0
        return float(low * self.trials), float(high * self.trials)

    @property
    def landmarks(self) -> tuple[tuple[float, float], ...]:
        n, p = self.trials, self.probability
        return ((n * p, math.sqrt(n * p * (1 - p)) + 1),)

    def _log_density(self, x: ndarray, from_centre: ndarray, to_high: ndarray) -> ndarray:
        n, p = self.trials, self.probability
        if n > LARGE and 0 < p < 1:
            log_power = log_poisson(x, n * p, -from_centre)
            log_power += log_poisson(n - x, n - n * p, from_centre)
            return log_power - log_poisson(n, n, 0.0)
        choose = -betaln(n - x + 1, x + 1) - math.log(n + 1)
        return choose + xlogy(x, p) + xlog1py(n - x, -p)

    def sample(self, count: int, *, generator: Generator) -> ndarray:
        return generator.binomial(self.trials, self.probability, count).astype(float)

    def _variance(self, teacher: Self, a: ndarray, b: ndarray) -> ndarray:
        p, r = self.probability, teacher.probability
        natural = a * logit(p) + b * logit(r)
        gap = log_ratio(p, r) - log_ratio_of_complements(p, r)
        return self.trials * (gap**2 * expit(natural) * expit(-natural))

    def _between(self, teacher: Self, a: float, b: float) -> Self:
        mean = expit(a * logit(self.probability) + b * logit(teacher.probability))
        return replace(self, probability=float(mean))


@dataclass(frozen=True, slots=True)
class Bernoulli(Special):
    """One attempt: 1 with `probability`, in [0, 1], otherwise 0."""

    probability: Probability
    outcomes = INTEGERS
    varies = ("probability",)

    def _general(self) -> Binomial:
        return Binomial(1, self.probability)


@dataclass(frozen=True, slots=True, eq=False, init=False)
class Categorical(HashedByValue, Distribution):
    """One of a list of labels, 0 to len - 1; probabilities may be zero.

    Attributes:
        probabilities: One a label, summing to 1 (to 1e-6; then normalised). Shape (vocab,).
    """

    probabilities: ndarray
    outcomes = LABELS

    def __init__(self, probabilities: ArrayLike) -> None:
        values = vector(probabilities, "probabilities")
        if (values < 0).any() or abs(values.sum() - 1) > 1e-6:
            raise ValueError(
                f"probabilities must be at least zero and sum to 1: got a smallest of "
                f"{values.min():.6g} and a sum of {values.sum():.6g}. Divide weights by their sum; "
                f"for log-probabilities use qstar.solve_kl_symmetry."
            )
        set_fields(self, probabilities=values / values.sum())

    @property
    def log_probabilities(self) -> ndarray:
        """The row that `qstar.solve_kl_symmetry` takes."""
        with np.errstate(divide="ignore"):
            return np.log(self.probabilities)

    @property
    def support(self) -> tuple[float, float]:
        possible = np.flatnonzero(self.probabilities)
        return float(possible[0]), float(possible[-1])

    def log_density(self, x: ArrayLike) -> ndarray:
        k = np.asarray(x, dtype=float)
        inside = (k >= 0) & (k < len(self.probabilities)) & (k == np.floor(k))
        return np.where(inside, self.log_probabilities[np.where(inside, k, 0).astype(int)], -np.inf)

    def sample(self, count: int, *, generator: Generator) -> ndarray:
        return generator.choice(len(self.probabilities), count, p=self.probabilities).astype(float)


@dataclass(frozen=True, slots=True)
class Poisson(Distribution):
    """Counts of independent events, with mean `rate`, positive.

    Two of them meet at the logarithmic mean of their rates, whatever else: alpha* is
    log(mean / teacher rate) / log(policy rate / teacher rate).
    """

    rate: Positive
    ends = (0.0, math.inf)
    outcomes = INTEGERS
    varies = ("rate",)

    @property
    def landmarks(self) -> tuple[tuple[float, float], ...]:
        return ((self.rate, math.sqrt(self.rate) + 1),)

    def _log_density(self, x: ndarray, from_centre: ndarray, to_high: ndarray) -> ndarray:
        if self.rate > LARGE:
            return log_poisson(x, self.rate, -from_centre)
        return xlogy(x, self.rate) - self.rate - gammaln(x + 1)

    def sample(self, count: int, *, generator: Generator) -> ndarray:
        return generator.poisson(self.rate, count).astype(float)

    def _variance(self, teacher: Self, a: ndarray, b: ndarray) -> ndarray:
        rate = np.exp(a * math.log(self.rate) + b * math.log(teacher.rate))
        return log_ratio(self.rate, teacher.rate) ** 2 * rate

    def _between(self, teacher: Self, a: float, b: float) -> Self:
        gap = log_ratio(self.rate, teacher.rate)  # from the nearer of the two
        rate = teacher.rate * math.exp(a * gap) if a < b else self.rate * math.exp(-b * gap)
        return replace(self, rate=rate)


@dataclass(frozen=True, slots=True)
class NegativeBinomial(Distribution):
    """Failures before success number `successes` (any positive number), each attempt succeeding
    with `probability`, in (0, 1]."""

    successes: Positive
    probability: ProbabilityAboveZero
    outcomes = INTEGERS
    varies = ("probability",)

    @property
    def support(self) -> tuple[float, float]:
        return 0.0, math.inf if self.probability < 1 else 0.0

    @property
    def landmarks(self) -> tuple[tuple[float, float], ...]:
        r, p = self.successes, self.probability
        return ((r * (1 - p) / p, math.sqrt(r * (1 - p)) / p + 1),)

    def _log_density(self, x: ndarray, from_centre: ndarray, to_high: ndarray) -> ndarray:
        r, p = self.successes, self.probability
        if r > LARGE and p < 1:
            gap = p * x - (1 - p) * r  # of the mean number of successes in r + x attempts to r
            n = r + x
            log_power = log_poisson(r, p * n, gap) + log_poisson(x, (1 - p) * n, -gap)
            return log_power - log_poisson(n, n, 0.0) - np.log1p(x / r)
        some = np.maximum(x, 1)
        choose = np.where(x > 0, -betaln(r, some) - np.log(some), 0.0)
        return choose + xlogy(r, p) + xlog1py(x, -p)

    def sample(self, count: int, *, generator: Generator) -> ndarray:
        return generator.negative_binomial(self.successes, self.probability, count).astype(float)

    def _variance(self, teacher: Self, a: ndarray, b: ndarray) -> ndarray:
        p, r = self.probability, teacher.probability
        natural = a * math.log1p(-p) + b * math.log1p(-r)
        return self.successes * (0.5 * log_ratio_of_complements(p, r) / np.sinh(natural / 2)) ** 2

    def _between(self, teacher: Self, a: float, b: float) -> Self:
        failure = a * math.log1p(-self.probability) + b * math.log1p(-teacher.probability)
        return replace(self, probability=-math.expm1(failure))


@dataclass(frozen=True, slots=True)
class Geometric(Special):
    """Failures before the first success, of `probability` in (0, 1] at each attempt.

    SciPy's `geom` counts the success too and starts at 1; alpha* and divergences are the same.
    """

    probability: ProbabilityAboveZero
    outcomes = INTEGERS
    varies = ("probability",)

    def _general(self) -> NegativeBinomial:
        return NegativeBinomial(1.0, self.probability)

    def sample(self, count: int, *, generator: Generator) -> ndarray:
        return generator.geometric(self.probability, count) - 1.0
