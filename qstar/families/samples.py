"""Draws from a mixture of two parents, and what Monte Carlo needs of them along the path."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy import ndarray
from numpy.random import Generator


class Parent(Protocol):
    """What can be evaluated and drawn from: every distribution of `qstar.families`, every
    `qstar.gaussian.Gaussian`, and what `Sampled` makes of two functions."""

    def log_density(self, x: ndarray) -> ndarray:
        """The log of the normalised density at each draw, in nats; -inf off the support."""
        ...

    def sample(self, count: int, *, generator: Generator) -> ndarray:
        """Independent draws, one an entry of the first axis."""
        ...


@dataclass(frozen=True, slots=True)
class Sampled:
    """A parent given by two functions.

    Attributes:
        function: Draws to normalised log-densities, in nats.
        sampler: (count, generator) to draws.
    """

    function: Callable[[ndarray], ndarray]
    sampler: Callable[[int, Generator], ndarray]

    def log_density(self, x: ndarray) -> ndarray:
        return self.function(x)

    def sample(self, count: int, *, generator: Generator) -> ndarray:
        return self.sampler(count, generator)


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """Draws from a mixture of two parents, and all that the path needs to know of them.

    Attributes:
        log_policy: The policy's log-density at each draw; the first `num_policy` draws are its.
            Shape (draws,).
        log_teacher: The teacher's. Shape (draws,).
        num_policy: How many draws came from the policy.
        control: How much of the control variate is used, from 0 (far parents) to 1 (close ones).
    """

    log_policy: ndarray
    log_teacher: ndarray
    num_policy: int
    control: float

    @property
    def weight(self) -> float:
        """The share of the policy in the proposal."""
        return self.num_policy / len(self.log_policy)

    @property
    def shared(self) -> ndarray:
        """Which draws are possible to both parents."""
        return np.isfinite(self.log_policy) & np.isfinite(self.log_teacher)

    @property
    def log_ratio(self) -> ndarray:
        """log policy - log teacher, 0 where it is not finite (where weights are zero)."""
        with np.errstate(invalid="ignore"):
            return np.where(self.shared, self.log_policy - self.log_teacher, 0.0)

    @property
    def control_variate(self) -> ndarray:
        """(policy - teacher) / mixture at each draw, whose mean is zero."""
        log_m = self.log_mixture(self.weight)
        return np.exp(self.log_policy - log_m) - np.exp(self.log_teacher - log_m)

    def log_mixture(self, weight: float) -> ndarray:
        """log(weight policy + (1 - weight) teacher) at each draw."""
        with np.errstate(divide="ignore"):
            ours, theirs = np.log(weight), np.log1p(-weight)
        return np.logaddexp(ours + self.log_policy, theirs + self.log_teacher)

    def log_weights(self, alpha: float, weight: float | None = None) -> ndarray:
        """log w at each draw, for a proposal of this `weight` (that of the sample by default)."""
        with np.errstate(invalid="ignore"):  # 0 * -inf at the ends: off the support
            path = alpha * self.log_policy + (1 - alpha) * self.log_teacher
        path = np.where(self.shared, path, -np.inf)
        return path - self.log_mixture(self.weight if weight is None else weight)

    def standard_error(self, terms: ndarray) -> float:
        """Of the mean of terms over this stratified sample."""
        parts = terms[: self.num_policy], terms[self.num_policy :]
        variance = sum(len(part) * part.var(ddof=1) for part in parts)
        return float(np.sqrt(variance)) / len(terms)


def log_density_of(parent: Parent, x: ndarray, name: str) -> ndarray:
    """The log-density of the parent called `name` at each draw, checked.

    Raises:
        ValueError: It is nan, or of another shape.
        ArithmeticError: It is inf, or at a draw that was rounded to inf or nan.
    """
    values = np.asarray(parent.log_density(x), dtype=float)
    if values.shape != (len(x),):
        raise ValueError(
            f"the log-density of the {name} must be one number a draw: expected shape "
            f"{(len(x),)}, got {values.shape}. Draws are entries of the first axis."
        )
    broken = np.isnan(values) | np.isposinf(values)
    if np.isposinf(values[broken]).any() or not np.isfinite(x[broken]).all():
        raise ArithmeticError(ROUNDED.format(name=name, x=x[broken][0]))
    if broken.any():
        raise ValueError(
            f"the log-density of the {name} must be finite or -inf: it is nan at "
            f"{x[broken][0]!r}. Mend the function."
        )
    return values


ROUNDED = (
    "a draw came out as {x}, at which the density of the {name} is no finite number: that parent "
    "has mass which float64 cannot tell from there, or its log-density is wrong. On the line use "
    "qstar.families.solve_kl_symmetry; elsewhere change x in both parents to the logarithm of its "
    "distance from there."
)
