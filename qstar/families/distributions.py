"""Named families of distributions, as parents of a geometric mean: frozen, checked, in nats.

Every class holds the parameters by which its family is known, has `log_density` (of outcomes in an
array), `pdf`, `support`, `sample`, and refuses parameters that are none. Two members of one
exponential family know two things more, from which `qstar.families.exponential` finds alpha*: the
variance of their log-ratio along the path, and the member that their geometric mean is.

A Gaussian is `qstar.gaussian.Gaussian`; `qstar.families` takes it, these and SciPy's frozen
distributions alike.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import ClassVar, Self

import numpy as np
from numpy import ndarray
from numpy.random import Generator
from numpy.typing import ArrayLike
from scipy.special import (
    betaln,
    expit,
    gammaln,
    i0e,
    i1e,
    log_expit,
    logit,
    logsumexp,
    xlog1py,
    xlogy,
    zeta,
)

from ..gaussian import Gaussian

LINE, INTEGERS, CIRCLE, SIMPLEX, LABELS, SPACE = (
    "real numbers",
    "integers",
    "angles",
    "probability vectors",
    "labels",
    "vectors",
)
"""What the outcomes of a distribution are: parents must agree on it."""
REACH = 690.0
"""Distances between exp(-REACH) and exp(REACH) are told apart from zero and infinity."""
LARGE = 100.0
"""Parameters above this take their log-density from deviances: differences of terms of their own
size would leave little of it."""


class Distribution:
    """What `qstar.families` needs of a parent; the classes below say which one it is."""

    __slots__ = ()
    outcomes: ClassVar[str] = LINE

    def log_density(self, x: ArrayLike) -> ndarray:
        """The log of the density (of the probability, where outcomes are counted), in nats; -inf
        off the support."""
        raise NotImplementedError

    def pdf(self, x: ArrayLike) -> ndarray:
        """The density, or the probability where outcomes are counted: exp of `log_density`."""
        return np.exp(self.log_density(x))

    @property
    def support(self) -> tuple[float, float]:
        """The smallest interval that holds every outcome."""
        return -math.inf, math.inf

    @property
    def landmarks(self) -> tuple[tuple[float, float], ...]:
        """(place, scale) pairs: where the density is worth looking at, and how closely."""
        raise NotImplementedError

    def sample(self, count: int, *, generator: Generator) -> ndarray:
        """Independent draws."""
        raise NotImplementedError

    def log_density_at(self, anchor: ArrayLike, offset: ndarray) -> ndarray:
        """log_density(anchor + offset), the offset keeping its own precision where it matters: at
        a singular end that is not zero, and for a narrow density far from zero.

        An end of the support comes as the anchor of what lies next to it.
        """
        return self.log_density(np.asarray(anchor) + offset)

    def log_density_beyond(self, anchor: ndarray, side: ndarray, log_distance: ndarray) -> ndarray:
        """log(density times distance) at anchor + side exp(log_distance), where float64 cannot
        hold that distance: |log_distance| > `REACH`. It is the log-density of the log-distance.

        Here: a density that has become a power of the distance within float64's reach stays that
        power, one that has vanished stays zero; nan where it is neither.
        """
        shares = np.array([0.7, 0.8, 0.9, 1.0])
        within = np.sign(log_distance)[..., None] * REACH * shares
        offsets = np.asarray(side)[..., None] * np.exp(within)
        with np.errstate(all="ignore"):
            # Far out it is the distance from zero that counts.
            start = np.where(log_distance > 0, 0.0, anchor)[..., None]
            seen = self.log_density_at(start, offsets) + within
            rise = np.diff(seen, axis=-1)
            bend = np.abs(np.diff(rise, axis=-1)).max(axis=-1)
            straight = bend <= 1e-12 * (1 + np.abs(seen).max(axis=-1))
            slope = (seen[..., 3] - seen[..., 0]) / (within[..., 3] - within[..., 0])
            further = seen[..., 3] + slope * (log_distance - within[..., 3])
        further = np.where(straight, further, np.nan)
        return np.where(seen[..., 3] < -1e20, -np.inf, further)

    # What makes two members one exponential family; None: there is none.
    def _kin(self) -> tuple[object, ...] | None:
        return None

    def _variance(self, teacher: Self, a: ndarray, b: ndarray) -> ndarray:
        """Variance of log(self / teacher) under self^a teacher^b, for a + b = 1, each exact."""
        raise NotImplementedError

    def _between(self, teacher: Self, a: float, b: float) -> "Distribution":
        """The member self^a teacher^b / Z."""
        raise NotImplementedError

    def _general(self) -> "Distribution":
        """The same law as a member of the larger family that holds this one."""
        return self


class _Located(Distribution):
    """A density of the distance from a location."""

    __slots__ = ()
    location: float
    scale: float

    @property
    def landmarks(self) -> tuple[tuple[float, float], ...]:
        return ((self.location, self.scale),)

    def log_density(self, x: ArrayLike) -> ndarray:
        return self._from_location(np.asarray(x, dtype=float) - self.location)

    def log_density_at(self, anchor: ArrayLike, offset: ndarray) -> ndarray:
        return self._from_location((np.asarray(anchor) - self.location) + offset)

    def _from_location(self, distance: ndarray) -> ndarray:
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class Binomial(Distribution):
    """Successes in `trials` independent attempts.

    Attributes:
        trials: How many attempts: an integer, at least 1.
        probability: Of success, in [0, 1].
    """

    trials: int
    probability: float
    outcomes: ClassVar[str] = INTEGERS

    def __post_init__(self) -> None:
        _set(self, trials=_count(self.trials, "trials"), probability=_unit(self.probability))

    @property
    def support(self) -> tuple[float, float]:
        return _binomial_support(self.trials, self.probability)

    @property
    def landmarks(self) -> tuple[tuple[float, float], ...]:
        n, p = self.trials, self.probability
        return ((n * p, math.sqrt(n * p * (1 - p)) + 1),)

    def log_density(self, x: ArrayLike) -> ndarray:
        k, inside = _integers(x, 0, self.trials)
        n, p = self.trials, self.probability
        if n > LARGE and 0 < p < 1:
            gap = n * p - k
            log_binomial = log_poisson(k, n * p, gap) + log_poisson(n - k, n - n * p, -gap)
            log_binomial -= log_poisson(n, n, 0.0)
            return np.where(inside, log_binomial, -np.inf)
        choose = -betaln(n - k + 1, k + 1) - math.log(n + 1)
        return np.where(inside, choose + xlogy(k, p) + xlog1py(n - k, -p), -np.inf)

    def sample(self, count: int, *, generator: Generator) -> ndarray:
        return generator.binomial(self.trials, self.probability, count).astype(float)

    def _kin(self) -> tuple[object, ...] | None:
        return ("binomial", self.trials) if 0 < self.probability < 1 else None

    def _variance(self, teacher: Self, a: ndarray, b: ndarray) -> ndarray:
        return self.trials * _bernoulli_variance(self.probability, teacher.probability, a, b)

    def _between(self, teacher: Self, a: float, b: float) -> "Binomial":
        mean = _bernoulli_mean(self.probability, teacher.probability, a, b)
        return Binomial(self.trials, mean)


@dataclass(frozen=True, slots=True)
class Bernoulli(Distribution):
    """One attempt: 1 with `probability`, otherwise 0.

    Attributes:
        probability: Of 1, in [0, 1].
    """

    probability: float
    outcomes: ClassVar[str] = INTEGERS

    def __post_init__(self) -> None:
        _set(self, probability=_unit(self.probability))

    @property
    def support(self) -> tuple[float, float]:
        return _binomial_support(1, self.probability)

    @property
    def landmarks(self) -> tuple[tuple[float, float], ...]:
        return ((self.probability, 1.0),)

    def log_density(self, x: ArrayLike) -> ndarray:
        return self._general().log_density(x)

    def sample(self, count: int, *, generator: Generator) -> ndarray:
        return generator.binomial(1, self.probability, count).astype(float)

    def _general(self) -> Binomial:
        return Binomial(1, self.probability)

    def _kin(self) -> tuple[object, ...] | None:
        return ("bernoulli",) if 0 < self.probability < 1 else None

    def _variance(self, teacher: Self, a: ndarray, b: ndarray) -> ndarray:
        return _bernoulli_variance(self.probability, teacher.probability, a, b)

    def _between(self, teacher: Self, a: float, b: float) -> "Bernoulli":
        return Bernoulli(_bernoulli_mean(self.probability, teacher.probability, a, b))


@dataclass(frozen=True, slots=True, eq=False, init=False)
class Categorical(Distribution):
    """One of a list of labels, 0 to len - 1; probabilities may be zero.

    Attributes:
        probabilities: One a label, summing to 1 (to 1e-6; then normalised). Shape (vocab,).
    """

    probabilities: ndarray
    outcomes: ClassVar[str] = LABELS

    def __init__(self, probabilities: ArrayLike) -> None:
        values = _vector(probabilities, "probabilities")
        if (values < 0).any() or abs(values.sum() - 1) > 1e-6:
            raise ValueError(
                f"probabilities must be at least zero and sum to 1: got a smallest of "
                f"{values.min():.6g} and a sum of {values.sum():.6g}. Divide weights by their sum; "
                f"for log-probabilities use qstar.solve_kl_symmetry."
            )
        _set(self, probabilities=_frozen(values / values.sum()))

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
        k, inside = _integers(x, 0, len(self.probabilities) - 1)
        return np.where(inside, self.log_probabilities[k.astype(int)], -np.inf)

    def sample(self, count: int, *, generator: Generator) -> ndarray:
        return generator.choice(len(self.probabilities), count, p=self.probabilities).astype(float)

    def __eq__(self, other: object) -> bool:
        return _same(self, other)

    def __hash__(self) -> int:
        return hash(self.probabilities.tobytes())


@dataclass(frozen=True, slots=True)
class Poisson(Distribution):
    """Counts of independent events.

    Two of them meet at the logarithmic mean of their rates, whatever else: alpha* is
    log(mean / teacher rate) / log(policy rate / teacher rate).

    Attributes:
        rate: The mean, positive.
    """

    rate: float
    outcomes: ClassVar[str] = INTEGERS

    def __post_init__(self) -> None:
        _set(self, rate=_positive(self.rate, "rate"))

    @property
    def support(self) -> tuple[float, float]:
        return 0.0, math.inf

    @property
    def landmarks(self) -> tuple[tuple[float, float], ...]:
        return ((self.rate, math.sqrt(self.rate) + 1),)

    def log_density(self, x: ArrayLike) -> ndarray:
        k, inside = _integers(x, 0, math.inf)
        if self.rate > LARGE:
            return np.where(inside, log_poisson(k, self.rate, self.rate - k), -np.inf)
        return np.where(inside, xlogy(k, self.rate) - self.rate - gammaln(k + 1), -np.inf)

    def sample(self, count: int, *, generator: Generator) -> ndarray:
        return generator.poisson(self.rate, count).astype(float)

    def _kin(self) -> tuple[object, ...] | None:
        return ("poisson",)

    def _variance(self, teacher: Self, a: ndarray, b: ndarray) -> ndarray:
        rate = np.exp(a * math.log(self.rate) + b * math.log(teacher.rate))
        return _log_ratio(self.rate, teacher.rate) ** 2 * rate

    def _between(self, teacher: Self, a: float, b: float) -> "Poisson":
        return Poisson(_power_mean(self.rate, teacher.rate, a, b))


@dataclass(frozen=True, slots=True)
class NegativeBinomial(Distribution):
    """Failures before the success number `successes`.

    Attributes:
        successes: How many end the series; any positive number.
        probability: Of success at each attempt, in (0, 1].
    """

    successes: float
    probability: float
    outcomes: ClassVar[str] = INTEGERS

    def __post_init__(self) -> None:
        _set(
            self,
            successes=_positive(self.successes, "successes"),
            probability=_unit(self.probability, zero=False),
        )

    @property
    def support(self) -> tuple[float, float]:
        return 0.0, math.inf if self.probability < 1 else 0.0

    @property
    def landmarks(self) -> tuple[tuple[float, float], ...]:
        r, p = self.successes, self.probability
        return ((r * (1 - p) / p, math.sqrt(r * (1 - p)) / p + 1),)

    def log_density(self, x: ArrayLike) -> ndarray:
        k, inside = _integers(x, 0, math.inf)
        r, p = self.successes, self.probability
        if r > LARGE and p < 1:
            gap = p * k - (1 - p) * r  # of the mean number of successes in r + k attempts to r
            n = r + k
            log_binomial = log_poisson(r, p * n, gap) + log_poisson(k, (1 - p) * n, -gap)
            log_binomial -= log_poisson(n, n, 0.0)
            return np.where(inside, log_binomial - np.log1p(k / r), -np.inf)
        with np.errstate(divide="ignore"):
            choose = np.where(k > 0, -betaln(r, np.maximum(k, 1)) - np.log(np.maximum(k, 1)), 0.0)
        return np.where(inside, choose + xlogy(r, p) + xlog1py(k, -p), -np.inf)

    def sample(self, count: int, *, generator: Generator) -> ndarray:
        return generator.negative_binomial(self.successes, self.probability, count).astype(float)

    def _kin(self) -> tuple[object, ...] | None:
        return ("negative binomial", self.successes) if self.probability < 1 else None

    def _variance(self, teacher: Self, a: ndarray, b: ndarray) -> ndarray:
        return self.successes * _geometric_variance(self.probability, teacher.probability, a, b)

    def _between(self, teacher: Self, a: float, b: float) -> "NegativeBinomial":
        failure = a * math.log1p(-self.probability) + b * math.log1p(-teacher.probability)
        return NegativeBinomial(self.successes, -math.expm1(failure))


@dataclass(frozen=True, slots=True)
class Geometric(Distribution):
    """Failures before the first success: 0, 1, 2, ...

    SciPy's `geom` counts the success too and starts at 1; alpha* and divergences are the same.

    Attributes:
        probability: Of success at each attempt, in (0, 1].
    """

    probability: float
    outcomes: ClassVar[str] = INTEGERS

    def __post_init__(self) -> None:
        _set(self, probability=_unit(self.probability, zero=False))

    @property
    def support(self) -> tuple[float, float]:
        return self._general().support

    @property
    def landmarks(self) -> tuple[tuple[float, float], ...]:
        return self._general().landmarks

    def log_density(self, x: ArrayLike) -> ndarray:
        return self._general().log_density(x)

    def sample(self, count: int, *, generator: Generator) -> ndarray:
        return generator.geometric(self.probability, count) - 1.0

    def _general(self) -> NegativeBinomial:
        return NegativeBinomial(1.0, self.probability)

    def _kin(self) -> tuple[object, ...] | None:
        return ("geometric",) if self.probability < 1 else None

    def _variance(self, teacher: Self, a: ndarray, b: ndarray) -> ndarray:
        return _geometric_variance(self.probability, teacher.probability, a, b)

    def _between(self, teacher: Self, a: float, b: float) -> "Geometric":
        return Geometric(self._general()._between(teacher._general(), a, b).probability)


@dataclass(frozen=True, slots=True)
class Gamma(Distribution):
    """Waiting times: density x^(shape - 1) exp(-rate x) on the positive numbers.

    Attributes:
        shape: Positive.
        rate: Positive; 1 / rate is the scale.
    """

    shape: float
    rate: float

    def __post_init__(self) -> None:
        _set(self, shape=_positive(self.shape, "shape"), rate=_positive(self.rate, "rate"))

    @property
    def support(self) -> tuple[float, float]:
        return 0.0, math.inf

    @property
    def landmarks(self) -> tuple[tuple[float, float], ...]:
        return ((self.shape / self.rate, math.sqrt(self.shape) / self.rate),)

    def log_density(self, x: ArrayLike) -> ndarray:
        y, inside = _between_reals(x, 0.0, math.inf)
        if self.shape > LARGE:
            return np.where(inside, self._from_mean(y, y - self.shape / self.rate), -np.inf)
        scaled = self.rate * y
        log_unit = xlogy(self.shape - 1, scaled) - scaled - gammaln(self.shape)
        return np.where(inside, log_unit + math.log(self.rate), -np.inf)

    def log_density_at(self, anchor: ArrayLike, offset: ndarray) -> ndarray:
        x = np.asarray(anchor) + offset
        if self.shape <= LARGE:
            return self.log_density(x)
        distance = (np.asarray(anchor) - self.shape / self.rate) + offset
        return np.where(x >= 0, self._from_mean(np.maximum(x, 0.0), distance), -np.inf)

    def _from_mean(self, x: ndarray, distance: ndarray) -> ndarray:
        """The log-density of a large shape at x = mean + distance."""
        log_unit = log_poisson(self.shape, self.rate * x, self.rate * distance)
        with np.errstate(divide="ignore", invalid="ignore"):
            values = log_unit + math.log(self.shape) - np.log(x)
        return np.where(x > 0, values, -np.inf)

    def log_density_beyond(self, anchor: ndarray, side: ndarray, log_distance: ndarray) -> ndarray:
        log_scaled = math.log(self.rate) + log_distance
        with np.errstate(over="ignore"):
            known = self.shape * log_scaled - np.exp(log_scaled) - gammaln(self.shape)
        return _at_zero_or_far(self, anchor, side, log_distance, known)

    def sample(self, count: int, *, generator: Generator) -> ndarray:
        return generator.gamma(self.shape, 1 / self.rate, count)

    def _kin(self) -> tuple[object, ...] | None:
        return ("gamma",)

    def _variance(self, teacher: Self, a: ndarray, b: ndarray) -> ndarray:
        # trigamma(shape) = 1/shape + the excess: squares only, nothing is subtracted.
        shape = a * self.shape + b * teacher.shape
        shape_gap = self.shape - teacher.shape
        rate_gap = _relative_gap(_log_ratio(self.rate, teacher.rate), a, b)
        return shape * (rate_gap - shape_gap / shape) ** 2 + shape_gap**2 * _trigamma_excess(shape)

    def _between(self, teacher: Self, a: float, b: float) -> "Gamma":
        return Gamma(a * self.shape + b * teacher.shape, a * self.rate + b * teacher.rate)


class _ScaleLaw(Distribution):
    """A family in which some power or logarithm of the outcome is exponential.

    alpha* depends on the ratio rho of the two exponential rates alone, policy over teacher:
    1 / log(rho) - 1 / (rho - 1). See `qstar.gaussian.alpha_same_mean_isotropic`.
    """

    __slots__ = ()

    def _log_rate_ratio(self, teacher: Self) -> float:
        raise NotImplementedError

    def _variance(self, teacher: Self, a: ndarray, b: ndarray) -> ndarray:
        return _relative_gap(self._log_rate_ratio(teacher), a, b) ** 2


@dataclass(frozen=True, slots=True)
class Exponential(_ScaleLaw):
    """Waiting time at a constant rate.

    Attributes:
        rate: Positive; 1 / rate is the mean.
    """

    rate: float

    def __post_init__(self) -> None:
        _set(self, rate=_positive(self.rate, "rate"))

    @property
    def support(self) -> tuple[float, float]:
        return 0.0, math.inf

    @property
    def landmarks(self) -> tuple[tuple[float, float], ...]:
        return ((0.0, 1 / self.rate),)

    def log_density(self, x: ArrayLike) -> ndarray:
        y, inside = _between_reals(x, 0.0, math.inf)
        return np.where(inside, math.log(self.rate) - self.rate * y, -np.inf)

    def sample(self, count: int, *, generator: Generator) -> ndarray:
        return generator.exponential(1 / self.rate, count)

    def _general(self) -> Gamma:
        return Gamma(1.0, self.rate)

    def _kin(self) -> tuple[object, ...] | None:
        return ("exponential",)

    def _log_rate_ratio(self, teacher: Self) -> float:
        return _log_ratio(self.rate, teacher.rate)

    def _between(self, teacher: Self, a: float, b: float) -> "Exponential":
        return Exponential(a * self.rate + b * teacher.rate)


@dataclass(frozen=True, slots=True)
class Laplace(_Located, _ScaleLaw):
    """Two exponentials back to back: density exp(-|x - location| / scale) / (2 scale).

    Two of them are one exponential family where they share the location; elsewhere
    `qstar.families` integrates.

    Attributes:
        location: The median.
        scale: The mean distance from it, positive.
    """

    location: float
    scale: float

    def __post_init__(self) -> None:
        _set_location_scale(self)

    def _from_location(self, distance: ndarray) -> ndarray:
        return -np.abs(distance) / self.scale - math.log(2 * self.scale)

    def sample(self, count: int, *, generator: Generator) -> ndarray:
        return generator.laplace(self.location, self.scale, count)

    def _kin(self) -> tuple[object, ...] | None:
        return "laplace", self.location

    def _log_rate_ratio(self, teacher: Self) -> float:
        return _log_ratio(teacher.scale, self.scale)

    def _between(self, teacher: Self, a: float, b: float) -> "Laplace":
        return Laplace(self.location, 1 / (a / self.scale + b / teacher.scale))


@dataclass(frozen=True, slots=True)
class Weibull(_ScaleLaw):
    """Lifetimes: (X / scale)^shape is exponential.

    Two of them are one exponential family where they share the shape; elsewhere
    `qstar.families` integrates.

    Attributes:
        shape: Positive.
        scale: Positive.
    """

    shape: float
    scale: float

    def __post_init__(self) -> None:
        _set(self, shape=_positive(self.shape, "shape"), scale=_positive(self.scale, "scale"))

    @property
    def support(self) -> tuple[float, float]:
        return 0.0, math.inf

    @property
    def landmarks(self) -> tuple[tuple[float, float], ...]:
        return ((self.scale, self.scale / max(self.shape, 1.0)),)

    def log_density(self, x: ArrayLike) -> ndarray:
        y, inside = _between_reals(x, 0.0, math.inf)
        unit = y / self.scale
        log_unit = xlogy(self.shape - 1, unit) - unit**self.shape
        return np.where(inside, log_unit + math.log(self.shape / self.scale), -np.inf)

    def log_density_beyond(self, anchor: ndarray, side: ndarray, log_distance: ndarray) -> ndarray:
        log_power = self.shape * (log_distance - math.log(self.scale))
        with np.errstate(over="ignore"):
            known = math.log(self.shape) + log_power - np.exp(log_power)
        return _at_zero_or_far(self, anchor, side, log_distance, known)

    def sample(self, count: int, *, generator: Generator) -> ndarray:
        return self.scale * generator.weibull(self.shape, count)

    def _kin(self) -> tuple[object, ...] | None:
        return "weibull", self.shape

    def _log_rate_ratio(self, teacher: Self) -> float:
        return self.shape * _log_ratio(teacher.scale, self.scale)

    def _between(self, teacher: Self, a: float, b: float) -> "Weibull":
        # From the nearer parent, so that close parents and large shapes keep their digits.
        excess = a * np.expm1(self._log_rate_ratio(teacher))
        if a <= 0.5 and math.isfinite(excess):
            return Weibull(self.shape, teacher.scale * math.exp(-math.log1p(excess) / self.shape))
        excess = b * math.expm1(-self._log_rate_ratio(teacher))
        return Weibull(self.shape, self.scale * math.exp(-math.log1p(excess) / self.shape))


@dataclass(frozen=True, slots=True)
class Rayleigh(_ScaleLaw):
    """The length of a Gaussian vector in the plane, `scale` being the deviation of each axis.

    Attributes:
        scale: Positive.
    """

    scale: float

    def __post_init__(self) -> None:
        _set(self, scale=_positive(self.scale, "scale"))

    @property
    def support(self) -> tuple[float, float]:
        return 0.0, math.inf

    @property
    def landmarks(self) -> tuple[tuple[float, float], ...]:
        return self._general().landmarks

    def log_density(self, x: ArrayLike) -> ndarray:
        return self._general().log_density(x)

    def sample(self, count: int, *, generator: Generator) -> ndarray:
        return generator.rayleigh(self.scale, count)

    def _general(self) -> Weibull:
        return Weibull(2.0, self.scale * math.sqrt(2))

    def _kin(self) -> tuple[object, ...] | None:
        return ("rayleigh",)

    def _log_rate_ratio(self, teacher: Self) -> float:
        return 2 * _log_ratio(teacher.scale, self.scale)

    def _between(self, teacher: Self, a: float, b: float) -> "Rayleigh":
        return Rayleigh(1 / math.hypot(math.sqrt(a) / self.scale, math.sqrt(b) / teacher.scale))


@dataclass(frozen=True, slots=True)
class Pareto(_ScaleLaw):
    """A power law from `minimum` up: log(X / minimum) is exponential with rate `shape`.

    Two of them are one exponential family where they share the minimum; elsewhere their supports
    are nested and `qstar.families` integrates.

    Attributes:
        shape: The tail index, positive.
        minimum: Positive.
    """

    shape: float
    minimum: float

    def __post_init__(self) -> None:
        _set(self, shape=_positive(self.shape, "shape"), minimum=_positive(self.minimum, "minimum"))

    @property
    def support(self) -> tuple[float, float]:
        return self.minimum, math.inf

    @property
    def landmarks(self) -> tuple[tuple[float, float], ...]:
        return ((self.minimum, self.minimum / self.shape),)

    def log_density(self, x: ArrayLike) -> ndarray:
        y, inside = _between_reals(x, self.minimum, math.inf)
        with np.errstate(divide="ignore", invalid="ignore"):
            log_unit = -(self.shape + 1) * (np.log(y) - math.log(self.minimum))
        return np.where(inside, log_unit + math.log(self.shape / self.minimum), -np.inf)

    def log_density_beyond(self, anchor: ndarray, side: ndarray, log_distance: ndarray) -> ndarray:
        known = math.log(self.shape) - self.shape * (log_distance - math.log(self.minimum))
        near = Distribution.log_density_beyond(self, anchor, side, log_distance)
        return np.where(log_distance > 0, known, near)

    def sample(self, count: int, *, generator: Generator) -> ndarray:
        with np.errstate(over="ignore"):
            return self.minimum * np.exp(generator.exponential(1 / self.shape, count))

    def _kin(self) -> tuple[object, ...] | None:
        return "pareto", self.minimum

    def _log_rate_ratio(self, teacher: Self) -> float:
        return _log_ratio(self.shape, teacher.shape)

    def _between(self, teacher: Self, a: float, b: float) -> "Pareto":
        return Pareto(a * self.shape + b * teacher.shape, self.minimum)


@dataclass(frozen=True, slots=True)
class Beta(Distribution):
    """A probability: density x^(a - 1) (1 - x)^(b - 1) on (0, 1).

    Attributes:
        a: Positive.
        b: Positive.
    """

    a: float
    b: float

    def __post_init__(self) -> None:
        _set(self, a=_positive(self.a, "a"), b=_positive(self.b, "b"))

    @property
    def support(self) -> tuple[float, float]:
        return 0.0, 1.0

    @property
    def landmarks(self) -> tuple[tuple[float, float], ...]:
        total = self.a + self.b
        mean = self.a / total
        return ((mean, math.sqrt(mean * (self.b / total) / (total + 1))),)

    def log_density(self, x: ArrayLike) -> ndarray:
        y, inside = _between_reals(x, 0.0, 1.0)
        mean = self.a / (self.a + self.b)
        return np.where(inside, self._log_density(y, 1 - y, y - mean), -np.inf)

    def log_density_at(self, anchor: ArrayLike, offset: ndarray) -> ndarray:
        to_one = np.asarray(anchor) - 1.0
        y, from_one = np.asarray(anchor) + offset, -(to_one + offset)
        inside = (y >= 0) & (from_one >= 0)
        safe = np.where(inside, y, 0.5), np.where(inside, from_one, 0.5)
        mean = self.a / (self.a + self.b)
        return np.where(
            inside, self._log_density(*safe, (np.asarray(anchor) - mean) + offset), -np.inf
        )

    def log_density_beyond(self, anchor: ndarray, side: ndarray, log_distance: ndarray) -> ndarray:
        power = np.where(anchor == 0, self.a, self.b)
        near = Distribution.log_density_beyond(self, anchor, side, log_distance)
        at_end = ((anchor == 0) & (side > 0)) | ((anchor == 1) & (side < 0))
        known = power * log_distance - betaln(self.a, self.b)
        return np.where(at_end & (log_distance < 0), known, near)

    def _log_density(self, y: ndarray, from_one: ndarray, from_mean: ndarray) -> ndarray:
        a, b, total = self.a, self.b, self.a + self.b
        if min(a, b) > LARGE:
            gap = total * from_mean
            log_odds = log_poisson(a, total * y, gap) + log_poisson(b, total * from_one, -gap)
            log_odds += math.log(a) + math.log(b / total) - log_poisson(total, total, 0.0)
            with np.errstate(divide="ignore", invalid="ignore"):
                values = log_odds - np.log(y) - np.log(from_one)
            return np.where((y > 0) & (from_one > 0), values, -np.inf)
        return xlogy(self.a - 1, y) + xlogy(self.b - 1, from_one) - betaln(self.a, self.b)

    def sample(self, count: int, *, generator: Generator) -> ndarray:
        return generator.beta(self.a, self.b, count)

    def _kin(self) -> tuple[object, ...] | None:
        return ("beta",)

    def _variance(self, teacher: Self, a: ndarray, b: ndarray) -> ndarray:
        ours, theirs = np.array([self.a, self.b]), np.array([teacher.a, teacher.b])
        return _dirichlet_variance(ours, theirs, a, b)

    def _between(self, teacher: Self, a: float, b: float) -> "Beta":
        return Beta(a * self.a + b * teacher.a, a * self.b + b * teacher.b)


@dataclass(frozen=True, slots=True, eq=False, init=False)
class Dirichlet(Distribution):
    """A probability vector: density prod x_i^(concentration_i - 1) on the simplex.

    Attributes:
        concentration: At least two numbers, each positive. Shape (outcomes,).
    """

    concentration: ndarray
    outcomes: ClassVar[str] = SIMPLEX

    def __init__(self, concentration: ArrayLike) -> None:
        values = _vector(concentration, "concentration")
        if len(values) < 2 or (values <= 0).any():
            raise ValueError(
                f"concentration must hold at least two positive numbers: got {values}. Drop the "
                f"outcomes that cannot happen."
            )
        _set(self, concentration=_frozen(values))

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

    def __eq__(self, other: object) -> bool:
        return _same(self, other)

    def __hash__(self) -> int:
        return hash(self.concentration.tobytes())

    def _kin(self) -> tuple[object, ...] | None:
        return "dirichlet", len(self.concentration)

    def _variance(self, teacher: Self, a: ndarray, b: ndarray) -> ndarray:
        return _dirichlet_variance(self.concentration, teacher.concentration, a, b)

    def _between(self, teacher: Self, a: float, b: float) -> "Dirichlet":
        return Dirichlet(a * self.concentration + b * teacher.concentration)


@dataclass(frozen=True, slots=True)
class VonMises(Distribution):
    """An angle: density exp(concentration cos(x - location)) on the circle.

    Attributes:
        concentration: At least zero; zero is the uniform circle.
        location: The mean direction, in radians.
    """

    concentration: float
    location: float
    outcomes: ClassVar[str] = CIRCLE

    def __post_init__(self) -> None:
        _set(self, location=_finite(self.location, "location"))
        if _finite(self.concentration, "concentration") != 0:
            _positive(self.concentration, "concentration")
        _set(self, concentration=float(self.concentration))

    @property
    def support(self) -> tuple[float, float]:
        return -math.pi, math.pi

    def log_density(self, x: ArrayLike) -> ndarray:
        """The log-density per radian; an angle may be given modulo 2 pi."""
        half = np.sin((np.asarray(x, dtype=float) - self.location) / 2)
        return -2 * self.concentration * half**2 - np.log(2 * np.pi * i0e(self.concentration))

    def sample(self, count: int, *, generator: Generator) -> ndarray:
        return generator.vonmises(self.location, self.concentration, count)

    def _kin(self) -> tuple[object, ...] | None:
        return ("von mises",)

    def _vector(self) -> ndarray:
        return self.concentration * np.array([math.cos(self.location), math.sin(self.location)])

    def _variance(self, teacher: Self, a: ndarray, b: ndarray) -> ndarray:
        middle = self.location / 2 + teacher.location / 2
        chord = 2 * math.sin((self.location - teacher.location) / 2)
        turn = chord * np.array([-math.sin(middle), math.cos(middle)])
        ours = np.array([math.cos(self.location), math.sin(self.location)])
        gap = (self.concentration - teacher.concentration) * ours + teacher.concentration * turn
        natural = a[..., None] * self._vector() + b[..., None] * teacher._vector()
        size = np.hypot(natural[..., 0], natural[..., 1])
        axis = natural / np.where(size > 0, size, 1.0)[..., None]
        along = axis @ gap
        across = axis[..., 0] * gap[1] - axis[..., 1] * gap[0]
        radial, tangential = _circle_variances(size)
        return np.where(size > 0, radial * along**2 + tangential * across**2, 0.5 * (gap**2).sum())

    def _between(self, teacher: Self, a: float, b: float) -> "VonMises":
        x, y = a * self._vector() + b * teacher._vector()
        return VonMises(math.hypot(x, y), math.atan2(y, x))


@dataclass(frozen=True, slots=True)
class Cauchy(_Located):
    """The heavy tail without a mean. Two of them balance at alpha = 1/2, always.

    Attributes:
        location: The median.
        scale: Half the distance between the quartiles, positive.
    """

    location: float
    scale: float

    def __post_init__(self) -> None:
        _set_location_scale(self)

    def _from_location(self, distance: ndarray) -> ndarray:
        unit = distance / self.scale
        return -_log1p_square(unit) - math.log(math.pi * self.scale)

    def sample(self, count: int, *, generator: Generator) -> ndarray:
        return self.location + self.scale * generator.standard_cauchy(count)


@dataclass(frozen=True, slots=True)
class StudentT(_Located):
    """Student's t, moved and stretched.

    Attributes:
        freedom: Degrees of freedom, positive; 1 is the Cauchy distribution.
        location: The median.
        scale: Positive; not the standard deviation.
    """

    freedom: float
    location: float
    scale: float

    def __post_init__(self) -> None:
        _set(self, freedom=_positive(self.freedom, "freedom"))
        _set_location_scale(self)

    def _from_location(self, distance: ndarray) -> ndarray:
        unit = distance / self.scale
        nu = self.freedom
        return -0.5 * (nu + 1) * _log1p_square(unit / math.sqrt(nu)) - self._log_constant()

    def log_density_beyond(self, anchor: ndarray, side: ndarray, log_distance: ndarray) -> ndarray:
        nu = self.freedom
        log_unit = log_distance - math.log(self.scale) - 0.5 * math.log(nu)
        # The distance times the density, and 1 + unit^2 = unit^2 (1 + 1 / unit^2).
        known = log_distance - 0.5 * (nu + 1) * (2 * log_unit + np.log1p(np.exp(-2 * log_unit)))
        near = Distribution.log_density_beyond(self, anchor, side, log_distance)
        return np.where(log_distance > 0, known - self._log_constant(), near)

    def _log_constant(self) -> float:
        nu = self.freedom
        return log_beta(nu / 2, 0.5) + 0.5 * math.log(nu) + math.log(self.scale)

    def sample(self, count: int, *, generator: Generator) -> ndarray:
        return self.location + self.scale * generator.standard_t(self.freedom, count)


@dataclass(frozen=True, slots=True)
class Logistic(_Located):
    """The distribution whose cumulative probability is the logistic curve.

    Attributes:
        location: The median.
        scale: Positive.
    """

    location: float
    scale: float

    def __post_init__(self) -> None:
        _set_location_scale(self)

    def _from_location(self, distance: ndarray) -> ndarray:
        unit = distance / self.scale
        return log_expit(unit) + log_expit(-unit) - math.log(self.scale)

    def sample(self, count: int, *, generator: Generator) -> ndarray:
        return generator.logistic(self.location, self.scale, count)


@dataclass(frozen=True, slots=True)
class GaussianLine(Distribution):
    """A one-dimensional `qstar.gaussian.Gaussian` whose points are plain numbers.

    Attributes:
        mean: In the units of x.
        deviation: The standard deviation.
    """

    mean: float
    deviation: float

    @property
    def landmarks(self) -> tuple[tuple[float, float], ...]:
        return ((self.mean, self.deviation),)

    def log_density(self, x: ArrayLike) -> ndarray:
        return self._from_mean(np.asarray(x, dtype=float) - self.mean)

    def log_density_at(self, anchor: ArrayLike, offset: ndarray) -> ndarray:
        return self._from_mean((np.asarray(anchor) - self.mean) + offset)

    def _from_mean(self, distance: ndarray) -> ndarray:
        unit = distance / self.deviation
        with np.errstate(over="ignore"):
            return -0.5 * unit**2 - math.log(self.deviation) - 0.5 * math.log(2 * math.pi)

    def sample(self, count: int, *, generator: Generator) -> ndarray:
        return generator.normal(self.mean, self.deviation, count)


@dataclass(frozen=True, slots=True)
class Uniform(Distribution):
    """A flat density from `low` to `high`.

    Attributes:
        low: Finite.
        high: Finite, above `low`.
    """

    low: float
    high: float

    def __post_init__(self) -> None:
        _set(self, low=_finite(self.low, "low"), high=_finite(self.high, "high"))
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

    def log_density(self, x: ArrayLike) -> ndarray:
        _, inside = _between_reals(x, self.low, self.high)
        return np.where(inside, -math.log(self.high - self.low), -np.inf)

    def log_density_at(self, anchor: ArrayLike, offset: ndarray) -> ndarray:
        from_low, from_high = (np.asarray(anchor) - end for end in (self.low, self.high))
        inside = (from_low + offset >= 0) & (from_high + offset <= 0)
        return np.where(inside, -math.log(self.high - self.low), -np.inf)

    def sample(self, count: int, *, generator: Generator) -> ndarray:
        return generator.uniform(self.low, self.high, count)

    def _general(self) -> Distribution:
        return Beta(1.0, 1.0) if (self.low, self.high) == (0.0, 1.0) else self


@dataclass(frozen=True, slots=True)
class Affine(Distribution):
    """The law of location + scale X, where X follows another one on the line or the integers.

    `Affine(Exponential(1.0), location=2.0)` is an exponential that starts at 2. Integers can be
    moved by an integer, not stretched.

    Attributes:
        base: The law of X; a one-dimensional `qstar.gaussian.Gaussian` too.
        location: What is added.
        scale: What X is multiplied by first, positive.
    """

    base: Distribution
    location: float
    scale: float = 1.0

    def __post_init__(self) -> None:
        _set_location_scale(self)
        _set(self, base=as_line(self.base))
        if self.base.outcomes not in (LINE, INTEGERS):
            raise ValueError(
                f"base must be a law of numbers, to be moved along the line: got "
                f"{type(self.base).__name__}, whose outcomes are {self.base.outcomes}."
            )
        if self.base.outcomes == INTEGERS and (
            self.scale != 1 or self.location != round(self.location)
        ):
            raise ValueError(
                f"a law of integers can be moved by an integer only: got location {self.location} "
                f"and scale {self.scale}. Rescale the outcomes of both parents instead."
            )

    @property
    def outcomes(self) -> str:  # type: ignore[override]
        """What the outcomes are: those of the base."""
        return self.base.outcomes

    @property
    def support(self) -> tuple[float, float]:
        low, high = self.base.support
        return self.location + self.scale * low, self.location + self.scale * high

    @property
    def landmarks(self) -> tuple[tuple[float, float], ...]:
        return tuple(
            (self.location + self.scale * place, self.scale * scale)
            for place, scale in self.base.landmarks
        )

    def log_density(self, x: ArrayLike) -> ndarray:
        unit = (np.asarray(x, dtype=float) - self.location) / self.scale
        return self.base.log_density(unit) - math.log(self.scale)

    @property
    def gaps(self) -> tuple[float, ...]:
        """Where the base may jump inside the support."""
        inner = getattr(self.base, "gaps", ())
        return tuple(self.location + self.scale * place for place in inner)

    def log_density_at(self, anchor: ArrayLike, offset: ndarray) -> ndarray:
        log_density = self.base.log_density_at(self._unit(anchor), offset / self.scale)
        return log_density - math.log(self.scale)

    def log_density_beyond(self, anchor: ndarray, side: ndarray, log_distance: ndarray) -> ndarray:
        unit = log_distance - math.log(self.scale)
        return self.base.log_density_beyond(self._unit(anchor), side, unit)

    def _unit(self, anchor: ArrayLike) -> ndarray:
        """The anchor as a point of the base, its ends and jumps exactly."""
        at = np.asarray(anchor, dtype=float)
        unit = (at - self.location) / self.scale
        for place in (*getattr(self.base, "gaps", ()), *self.base.support):
            unit = np.where(at == self.location + self.scale * place, place, unit)
        return unit

    def sample(self, count: int, *, generator: Generator) -> ndarray:
        return self.location + self.scale * self.base.sample(count, generator=generator)


@dataclass(frozen=True, slots=True, eq=False, init=False)
class Mixture(Distribution):
    """A weighted arithmetic mixture of laws on the line or the integers.

    Mixtures of Gaussians in the plane are `qstar.families.GaussianMixture`.

    Attributes:
        weights: Positive, summing to 1 (to 1e-6; then normalised). Shape (components,).
        components: As many laws, all of them of the same kind of outcome; one-dimensional
            Gaussians too.
    """

    weights: ndarray
    components: tuple[Distribution, ...]

    def __init__(
        self,
        weights: ArrayLike,
        components: Sequence[Distribution | Gaussian],
    ) -> None:
        values = mixture_weights(weights, len(components))
        laws = tuple(as_line(component) for component in components)
        kinds = {law.outcomes for law in laws}
        if len(kinds) != 1 or not kinds <= {LINE, INTEGERS}:
            raise ValueError(
                f"components must all be laws of real numbers or all of integers: got outcomes "
                f"that are {sorted(kinds)}."
            )
        _set(self, weights=_frozen(values), components=laws)

    @property
    def outcomes(self) -> str:  # type: ignore[override]
        """What the outcomes are: those of the components."""
        return self.components[0].outcomes

    @property
    def support(self) -> tuple[float, float]:
        lows, highs = zip(*(component.support for component in self.components), strict=True)
        return min(lows), max(highs)

    @property
    def landmarks(self) -> tuple[tuple[float, float], ...]:
        inner = (component.landmarks for component in self.components)
        return tuple(landmark for landmarks in inner for landmark in landmarks)

    @property
    def gaps(self) -> tuple[float, ...]:
        """Ends of components inside the support, where the density may jump."""
        parts = [(*part.support, *getattr(part, "gaps", ())) for part in self.components]
        ends = {end for part in parts for end in part}
        return tuple(sorted(end for end in ends if math.isfinite(end)))

    def log_density(self, x: ArrayLike) -> ndarray:
        points = np.asarray(x, dtype=float)
        terms = [component.log_density(points) for component in self.components]
        return mixture_log_density(self.weights, np.stack(terms, axis=-1))

    def log_density_at(self, anchor: ArrayLike, offset: ndarray) -> ndarray:
        terms = [component.log_density_at(anchor, offset) for component in self.components]
        return mixture_log_density(self.weights, np.stack(terms, axis=-1))

    def log_density_beyond(self, anchor: ndarray, side: ndarray, log_distance: ndarray) -> ndarray:
        terms = [
            component.log_density_beyond(anchor, side, log_distance)
            for component in self.components
        ]
        return mixture_log_density(self.weights, np.stack(terms, axis=-1))

    def sample(self, count: int, *, generator: Generator) -> ndarray:
        counts = generator.multinomial(count, self.weights)
        draws = [
            component.sample(int(n), generator=generator)
            for component, n in zip(self.components, counts, strict=True)
        ]
        return generator.permutation(np.concatenate(draws))

    def __eq__(self, other: object) -> bool:
        return _same(self, other)

    def __hash__(self) -> int:
        return hash((self.weights.tobytes(), self.components))


def as_line(law: Distribution | Gaussian) -> Distribution:
    """A law whose points are plain numbers, where a one-dimensional Gaussian came.

    Raises:
        ValueError: It is a Gaussian of more dimensions, or no law at all.
    """
    if isinstance(law, Gaussian) and law.dimension == 1:
        return GaussianLine(float(law.mean[0]), math.sqrt(law.covariance[0, 0]))
    if not isinstance(law, Distribution):
        raise ValueError(
            f"expected a law of numbers, one of qstar.families or a one-dimensional Gaussian: got "
            f"{law!r}. Read a SciPy distribution with qstar.families.as_law first; mixtures of "
            f"Gaussians of more dimensions are qstar.families.GaussianMixture."
        )
    return law


def mixture_weights(weights: ArrayLike, count: int) -> ndarray:
    """Checked, normalised weights of a mixture of `count` components.

    Raises:
        ValueError: There is not one for each, or they are not positive with sum 1.
    """
    values = _vector(weights, "weights")
    if len(values) != count or (values <= 0).any() or abs(values.sum() - 1) > 1e-6:
        raise ValueError(
            f"weights must be {count} positive numbers with sum 1, one a component: got {values} "
            f"with sum {values.sum():.6g}. Drop components of weight zero, divide by the sum."
        )
    return values / values.sum()


def mixture_log_density(weights: ndarray, log_terms: ndarray) -> ndarray:
    """log sum_k weights_k exp(log_terms_k)."""
    with np.errstate(divide="ignore"):
        return np.asarray(logsumexp(log_terms, axis=-1, b=weights))


# ---- What the families above share ------------------------------------------------------------


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
        odd = np.polynomial.polynomial.polyval(r**2, 1 / np.arange(3.0, 37.0, 2.0))
        # log(1 + t) - t: by the series of 2 artanh(t / (2 + t)) where the two nearly cancel.
        deviance = far * np.where(small, r * (2 * r**2 * odd - t), np.log(mean / far) - t)
        series = np.polynomial.polynomial.polyval(far**-2, _STIRLING) / far
        log_far = deviance - series - 0.5 * np.log(2 * np.pi * far)
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


_STIRLING = np.array([1 / 12, -1 / 360, 1 / 1260, -1 / 1680, 1 / 1188, -691 / 360360, 1 / 156])
"""log k! - (k log k - k + log(2 pi k) / 2) = sum of these over k^(2 n + 1), n from 0."""


def _at_zero_or_far(
    law: Distribution, anchor: ndarray, side: ndarray, log_distance: ndarray, known: ndarray
) -> ndarray:
    """`known`, of a law of positive numbers, unless an anchor that is not zero is near."""
    near = Distribution.log_density_beyond(law, anchor, side, log_distance)
    ours = (log_distance > 0) | (np.asarray(anchor) == 0)
    return np.where(ours, np.where(np.asarray(side) > 0, known, -np.inf), near)


def _bernoulli_variance(p: float, r: float, a: ndarray, b: ndarray) -> ndarray:
    natural = a * logit(p) + b * logit(r)
    return _logit_gap(p, r) ** 2 * expit(natural) * expit(-natural)


def _bernoulli_mean(p: float, r: float, a: float, b: float) -> float:
    return float(expit(a * logit(p) + b * logit(r)))


def _logit_gap(p: float, r: float) -> float:
    return _log_ratio(p, r) - _log_ratio_of_complements(p, r)


def _log_ratio_of_complements(p: float, r: float) -> float:
    """log((1 - p) / (1 - r)), exact also where p and r are close or tiny."""
    if abs(p - r) < 0.5 * (1 - r):
        return math.log1p((r - p) / (1 - r))
    return math.log1p(-p) - math.log1p(-r)


def _geometric_variance(p: float, r: float, a: ndarray, b: ndarray) -> ndarray:
    natural = a * math.log1p(-p) + b * math.log1p(-r)
    return (0.5 * _log_ratio_of_complements(p, r) / np.sinh(natural / 2)) ** 2


def _log_ratio(x: float, y: float) -> float:
    """log(x / y) of positive numbers, exact also where they are close or their ratio overflows."""
    if abs(x - y) < 0.5 * y:
        return math.log1p((x - y) / y)
    return math.log(x) - math.log(y)


def _power_mean(x: float, y: float, a: float, b: float) -> float:
    """x^a y^b, from the nearer of the two."""
    log_ratio = _log_ratio(x, y)
    return y * math.exp(a * log_ratio) if a < b else x * math.exp(-b * log_ratio)


def _relative_gap(log_ratio: float, a: ndarray, b: ndarray) -> ndarray:
    """(x - y) / (a x + b y) where log_ratio = log(x / y)."""
    if log_ratio > 0:
        return -math.expm1(-log_ratio) / (a + b * math.exp(-log_ratio))
    return math.expm1(log_ratio) / (a * math.exp(log_ratio) + b)


def _dirichlet_variance(ours: ndarray, theirs: ndarray, a: ndarray, b: ndarray) -> ndarray:
    # sum gap^2 trigamma(c) - total_gap^2 trigamma(total): the leading 1/c parts of trigamma are
    # written as squares, so that what large concentrations leave of the difference is kept.
    gap = ours - theirs
    c = a[..., None] * ours + b[..., None] * theirs
    total, total_gap = c.sum(axis=-1), gap.sum()
    leading = (c * (gap / c - (total_gap / total)[..., None]) ** 2).sum(axis=-1)
    excess = (gap**2 * _trigamma_excess(c)).sum(axis=-1)
    return np.maximum(leading + excess - total_gap**2 * _trigamma_excess(total), 0.0)


def _trigamma_excess(x: ndarray) -> ndarray:
    """trigamma(x) - 1/x, positive; about 1 / (2 x^2) for large x."""
    large = x > 12
    far = np.where(large, x, 12.0)
    series = np.polynomial.polynomial.polyval(far**-2, _TRIGAMMA) / far**3 + 0.5 / far**2
    near = np.where(large, 12.0, x)
    return np.where(large, series, zeta(2, near) - 1 / near)


_TRIGAMMA = np.array([1 / 6, -1 / 30, 1 / 42, -1 / 30, 5 / 66, -691 / 2730, 7 / 6, -3617 / 510])
"""Bernoulli numbers B_2, B_4, ...: trigamma(x) = 1/x + 1/(2 x^2) + sum B_2k / x^(2k + 1)."""


def _circle_variances(concentration: ndarray) -> tuple[ndarray, ndarray]:
    """Second derivative of log I_0 along the concentration, and its first over concentration.

    With r = I_1 / I_0 these are 1 - r / k - r^2 and r / k; the former cancels for large k, where
    the solution of r' = 1 - r / k - r^2 in powers of 1 / k takes over.
    """
    k = np.asarray(concentration, dtype=float)
    small = np.where((k < 20) & (k > 0), k, 1.0)
    r = i1e(small) / i0e(small)
    near = 1 - r / small - r**2
    far = np.where(k >= 20, k, 20.0)
    series = np.polynomial.polynomial.polyval(1 / far, _MEAN_RESULTANT)
    slope = -np.polynomial.polynomial.polyval(
        1 / far, np.arange(len(_MEAN_RESULTANT)) * _MEAN_RESULTANT
    )
    radial = np.where(k >= 20, slope / far, near)
    tangential = np.where(k >= 20, series / far, r / small)
    return np.where(k > 0, radial, 0.5), np.where(k > 0, tangential, 0.5)


def _mean_resultant_series(terms: int) -> ndarray:
    coefficients = [1.0, -0.5]
    for k in range(2, terms):
        inner = sum(coefficients[i] * coefficients[k - i] for i in range(1, k))
        coefficients.append(0.5 * ((k - 2) * coefficients[k - 1] - inner))
    return np.array(coefficients)


_MEAN_RESULTANT = _mean_resultant_series(28)


def _log1p_square(x: ndarray) -> ndarray:
    """log(1 + x^2) without overflow."""
    size = np.abs(x)
    large = size > 1e8
    return np.where(
        large, 2 * np.log(np.where(large, size, 1.0)), np.log1p(np.where(large, 0.0, size) ** 2)
    )


def _binomial_support(trials: int, probability: float) -> tuple[float, float]:
    if probability == 0:
        return 0.0, 0.0
    return (float(trials), float(trials)) if probability == 1 else (0.0, float(trials))


def _integers(x: ArrayLike, low: float, high: float) -> tuple[ndarray, ndarray]:
    """(outcomes as floats, a safe one where they are outside; which are inside)."""
    values = np.asarray(x, dtype=float)
    inside = (values >= low) & (values <= high) & (values == np.floor(values))
    return np.where(inside, values, low), inside


def _between_reals(x: ArrayLike, low: float, high: float) -> tuple[ndarray, ndarray]:
    values = np.asarray(x, dtype=float)
    inside = (values >= low) & (values <= high)
    safe = low + 1.0 if math.isinf(high) else low / 2 + high / 2
    return np.where(inside, values, safe), inside


def _set(instance: object, **values: object) -> None:
    for name, value in values.items():
        object.__setattr__(instance, name, value)


def _set_location_scale(instance: "Laplace | Cauchy | StudentT | Logistic | Affine") -> None:
    _set(
        instance,
        location=_finite(instance.location, "location"),
        scale=_positive(instance.scale, "scale"),
    )


def _same(one: object, other: object) -> bool:
    if type(one) is not type(other):
        return NotImplemented
    pairs = ((getattr(one, f.name), getattr(other, f.name)) for f in fields(one))  # type: ignore[arg-type]
    return all(np.array_equal(x, y) if isinstance(x, ndarray) else bool(x == y) for x, y in pairs)


def _finite(value: float, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise ValueError(
            f"{name} must be one real number: got {value!r}. For a batch, make one distribution "
            f"for each entry."
        )
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite: got {value}. Mend what produced it.")
    return float(value)


def _positive(value: float, name: str) -> float:
    number = _finite(value, name)
    if number <= 0:
        raise ValueError(
            f"{name} must be positive: got {number:.6g}. Check the order of the arguments and "
            f"whether a logarithm was passed."
        )
    return number


def _unit(value: float, *, zero: bool = True) -> float:
    number = _finite(value, "probability")
    if not (0 <= number <= 1) or (number == 0 and not zero):
        interval = "[0, 1]" if zero else "(0, 1]"
        raise ValueError(
            f"probability must lie in {interval}: got {number:.6g}. Pass a probability, not a "
            f"percentage, a logit or a logarithm."
        )
    return number


def _count(value: int, name: str) -> int:
    number = _finite(value, name)
    if number < 1 or number != round(number):
        raise ValueError(f"{name} must be a whole number, at least 1: got {value!r}.")
    return int(number)


def _vector(values: ArrayLike, name: str) -> ndarray:
    array = np.asarray(values)
    if array.dtype.kind not in "fiu" or array.ndim != 1 or array.size == 0:
        raise ValueError(
            f"{name} must be a list of real numbers: got dtype {array.dtype} and shape "
            f"{array.shape}. Make one distribution for each row of a batch."
        )
    array = array.astype(float)
    if not np.isfinite(array).all():
        raise ValueError(f"{name} must be finite: got {array}. Mend what produced it.")
    return array


def _frozen(array: ndarray) -> ndarray:
    array.flags.writeable = False
    return array
