"""Distributions made of others, or of a function: moved, mixed, geometric means, densities."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy import ndarray
from numpy.random import Generator
from numpy.typing import ArrayLike
from scipy.special import logsumexp

from ..gaussian import Gaussian
from ..result import HashedByValue
from . import montecarlo
from .base import (
    INTEGERS,
    LINE,
    SPACE,
    Distribution,
    Finite,
    Positive,
    set_fields,
    vector,
)
from .continuous import GaussianLine


@dataclass(frozen=True, slots=True, eq=False)
class Density(Distribution):
    """A distribution on the line, the integers or the plane by its function: for what has no class.

    Attributes:
        function: Points to normalised log-densities (log-probabilities on the integers), in nats,
            vectorised. In the plane the points have their two coordinates on the last axis.
        places: (place, scale) pairs that are worth looking at: modes, kinks, jumps. In the plane
            both are pairs.
        low: The lower end of the support; -inf if there is none.
        high: The upper end.
        outcomes: `real numbers`, `integers` or `vectors` (of the plane).
        sampler: (count, generator) to draws, for `sample`; optional.
    """

    function: Callable[[ndarray], ndarray]
    places: Sequence[tuple[Any, Any]]
    low: float = -math.inf
    high: float = math.inf
    outcomes: str = LINE  # type: ignore[misc]
    sampler: Callable[[int, Generator], ndarray] | None = None

    def __post_init__(self) -> None:
        if self.outcomes not in (LINE, INTEGERS, SPACE):
            raise ValueError(
                f"outcomes must be one of {(LINE, INTEGERS, SPACE)}: got {self.outcomes!r}."
            )
        if not self.low < self.high and (self.outcomes, self.low) != (INTEGERS, self.high):
            raise ValueError(f"low must lie below high: got {self.low} and {self.high}.")
        if not self.places or not all((np.asarray(scale) > 0).all() for _, scale in self.places):
            raise ValueError(
                "places must name at least one (place, scale) with a positive scale, where the "
                f"mass is: got {self.places!r}. Without it a narrow peak goes unseen."
            )

    @property
    def support(self) -> tuple[float, float]:
        return self.low, self.high

    @property
    def landmarks(self) -> tuple[tuple[Any, Any], ...]:
        return tuple(self.places)

    def log_density(self, x: ArrayLike) -> ndarray:
        points = np.asarray(x, dtype=float)
        with np.errstate(all="ignore"):
            values = np.asarray(self.function(points), dtype=float)
        if self.outcomes == SPACE:
            return values
        return np.where((points >= self.low) & (points <= self.high), values, -np.inf)

    def log_density_at(self, anchor: ArrayLike, offset: ndarray) -> ndarray:
        return self.log_density(np.asarray(anchor) + offset)

    def sample(self, count: int, *, generator: Generator) -> ndarray:
        if self.sampler is None:
            raise ValueError("this Density has no sampler: pass sampler=(count, generator) -> x.")
        return self.sampler(count, generator)


@dataclass(frozen=True, slots=True)
class Affine(Distribution):
    """The distribution of location + scale X, where X follows another one on the line or the
    integers. Integers can be moved by an integer, not stretched.

    `Affine(Exponential(1.0), location=2.0)` is an exponential that starts at 2.

    Attributes:
        base: The distribution of X; a one-dimensional `qstar.gaussian.Gaussian` too.
        location: What is added.
        scale: What X is multiplied by first, positive.
    """

    base: Distribution
    location: Finite
    scale: Positive = 1.0

    def __post_init__(self) -> None:
        Distribution.__post_init__(self)
        set_fields(self, base=as_line(self.base))
        if self.outcomes not in (LINE, INTEGERS):
            raise ValueError(
                f"base must be a distribution of numbers, to be moved along the line: got "
                f"{type(self.base).__name__}, whose outcomes are {self.outcomes}."
            )
        if self.outcomes == INTEGERS and (self.scale != 1 or self.location != round(self.location)):
            raise ValueError(
                f"a distribution of integers can be moved by an integer only: got location "
                f"{self.location} and scale {self.scale}. Rescale the outcomes of both parents "
                f"instead."
            )

    @property
    def outcomes(self) -> str:  # type: ignore[override]
        """What the outcomes are: those of the base."""
        return self.base.outcomes

    @property
    def support(self) -> tuple[float, float]:
        low, high = self.base.support
        return self._moved(low), self._moved(high)

    @property
    def landmarks(self) -> tuple[tuple[float, float], ...]:
        return tuple((self._moved(x), self.scale * scale) for x, scale in self.base.landmarks)

    @property
    def gaps(self) -> tuple[float, ...]:
        return tuple(self._moved(place) for place in self.base.gaps)

    def _moved(self, place: float) -> float:
        return self.location + self.scale * place

    def log_density(self, x: ArrayLike) -> ndarray:
        unit = (np.asarray(x, dtype=float) - self.location) / self.scale
        return self.base.log_density(unit) - math.log(self.scale)

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
        for place in (*self.base.gaps, *self.base.support):
            unit = np.where(at == self._moved(place), place, unit)
        return unit

    def sample(self, count: int, *, generator: Generator) -> ndarray:
        return self.location + self.scale * self.base.sample(count, generator=generator)


@dataclass(frozen=True, slots=True, eq=False, init=False)
class _Blend(HashedByValue, Distribution):
    """A weighted arithmetic mixture."""

    weights: ndarray
    components: tuple[Any, ...]

    def log_density(self, x: ArrayLike) -> ndarray:
        return self._mixed(part.log_density(x) for part in self.components)

    def _mixed(self, log_terms: Any) -> ndarray:
        with np.errstate(divide="ignore"):
            return np.asarray(logsumexp(np.stack(list(log_terms), -1), axis=-1, b=self.weights))

    def sample(self, count: int, *, generator: Generator) -> ndarray:
        counts = generator.multinomial(count, self.weights)
        pairs = zip(self.components, counts, strict=True)
        draws = [part.sample(int(n), generator=generator) for part, n in pairs]
        return generator.permutation(np.concatenate(draws))

    def _set(self, weights: ArrayLike, components: Sequence[Any]) -> None:
        values = vector(weights, "weights")
        count = len(components)
        if len(values) != count or (values <= 0).any() or abs(values.sum() - 1) > 1e-6:
            raise ValueError(
                f"weights must be {count} positive numbers with sum 1, one a component: got "
                f"{values} with sum {values.sum():.6g}. Drop components of weight zero, divide by "
                f"the sum."
            )
        set_fields(self, weights=values / values.sum(), components=tuple(components))


@dataclass(frozen=True, slots=True, eq=False, init=False)
class Mixture(_Blend):
    """A weighted arithmetic mixture of distributions on the line or the integers.

    Mixtures of Gaussians in the plane are `qstar.families.GaussianMixture`.

    Attributes:
        weights: Positive, summing to 1 (to 1e-6; then normalised). Shape (components,).
        components: As many distributions, all of them of the same kind of outcome;
            one-dimensional Gaussians too.
    """

    def __init__(self, weights: ArrayLike, components: Sequence[Distribution | Gaussian]) -> None:
        self._set(weights, [as_line(component) for component in components])
        kinds = {component.outcomes for component in self.components}
        if len(kinds) != 1 or not kinds <= {LINE, INTEGERS}:
            raise ValueError(
                f"components must all be distributions of real numbers or all of integers: got "
                f"outcomes that are {sorted(kinds)}."
            )

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
        return tuple(mark for part in self.components for mark in part.landmarks)

    @property
    def gaps(self) -> tuple[float, ...]:
        ends = {end for part in self.components for end in (*part.support, *part.gaps)}
        return tuple(sorted(end for end in ends if math.isfinite(end)))

    def log_density_at(self, anchor: ArrayLike, offset: ndarray) -> ndarray:
        return self._mixed(part.log_density_at(anchor, offset) for part in self.components)

    def log_density_beyond(self, anchor: ndarray, side: ndarray, log_distance: ndarray) -> ndarray:
        where = anchor, side, log_distance
        return self._mixed(part.log_density_beyond(*where) for part in self.components)


@dataclass(frozen=True, slots=True, eq=False, init=False)
class GaussianMixture(_Blend):
    """A weighted arithmetic mixture of Gaussians of any dimension.

    One and two dimensions are integrated; beyond, `qstar.families.montecarlo` takes it.

    Attributes:
        weights: Positive, summing to 1 (to 1e-6; then normalised). Shape (components,).
        components: As many Gaussians, all of one dimension.
    """

    outcomes = SPACE

    def __init__(self, weights: ArrayLike, components: Sequence[Gaussian]) -> None:
        self._set(weights, components)
        dimensions = sorted({component.dimension for component in components})
        if len(dimensions) != 1:
            raise ValueError(
                f"components must be Gaussians of one dimension: got dimensions {dimensions}."
            )

    @property
    def dimension(self) -> int:
        """How many coordinates an outcome has."""
        return self.components[0].dimension

    @property
    def landmarks(self) -> tuple[tuple[ndarray, ndarray], ...]:
        return tuple((c.mean, np.sqrt(np.diag(c.covariance))) for c in self.components)


@dataclass(frozen=True, slots=True, eq=False)
class GeometricMean(Distribution):
    """q_alpha of two parents that share no family: a distribution by its density.

    Attributes:
        policy: The parent with exponent alpha.
        teacher: The parent with exponent 1 - alpha.
        alpha: In [0, 1].
        log_partition: log Z(alpha), in nats.
    """

    policy: Distribution
    teacher: Distribution
    alpha: float
    log_partition: float

    @property
    def outcomes(self) -> str:  # type: ignore[override]
        """What the outcomes are: those of the parents."""
        return self.policy.outcomes

    @property
    def support(self) -> tuple[float, float]:
        """The shared support."""
        (low_1, high_1), (low_2, high_2) = self.policy.support, self.teacher.support
        return max(low_1, low_2), min(high_1, high_2)

    @property
    def landmarks(self) -> tuple[tuple[Any, Any], ...]:
        return (*self.policy.landmarks, *self.teacher.landmarks)

    @property
    def gaps(self) -> tuple[float, ...]:
        return (*self.policy.gaps, *self.teacher.gaps)

    def log_density(self, x: ArrayLike) -> ndarray:
        return self._path("log_density", x)

    def log_density_at(self, anchor: ArrayLike, offset: ndarray) -> ndarray:
        return self._path("log_density_at", anchor, offset)

    def log_density_beyond(self, anchor: ndarray, side: ndarray, log_distance: ndarray) -> ndarray:
        return self._path("log_density_beyond", anchor, side, log_distance)

    def _path(self, name: str, *where: Any) -> ndarray:
        ours, theirs = (getattr(parent, name)(*where) for parent in (self.policy, self.teacher))
        with np.errstate(invalid="ignore"):  # 0 * -inf at the ends: off the shared support
            path = self.alpha * ours + (1 - self.alpha) * theirs - self.log_partition
        return np.where(np.isneginf(ours) | np.isneginf(theirs), -np.inf, path)

    def sample(self, count: int, *, generator: Generator) -> ndarray:
        """Exact draws, about Z(alpha) of the proposals.

        Raises:
            ArithmeticError: See `qstar.families.montecarlo.sample_geometric_mean`.
        """
        return montecarlo.sample_geometric_mean(
            self.policy, self.teacher, self.alpha, count, generator=generator
        ).points


def as_line(distribution: Distribution | Gaussian) -> Distribution:
    """A distribution whose points are plain numbers, where a one-dimensional Gaussian came.

    Raises:
        ValueError: It is a Gaussian of more dimensions, or no distribution at all.
    """
    if isinstance(distribution, Gaussian) and distribution.dimension == 1:
        mean, variance = distribution.mean[0], distribution.covariance[0, 0]
        return GaussianLine(float(mean), math.sqrt(variance))
    if not isinstance(distribution, Distribution):
        raise ValueError(
            f"expected a distribution of numbers, one of qstar.families or a one-dimensional "
            f"Gaussian: got {distribution!r}. Read a SciPy distribution with "
            f"qstar.families.as_distribution first; mixtures of Gaussians of more dimensions are "
            f"qstar.families.GaussianMixture."
        )
    return distribution
