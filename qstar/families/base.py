"""What every distribution of `qstar.families` has, and how parameters are checked.

A family says its fields (annotated with what they must be), its formula, and what it is made of as
an exponential family: which fields two members may differ in (`varies`), the variance of their
log-ratio along the path, and the member between them. All else is here. The formulas are our own
and not those of `scipy.stats`, which lose the digits of large parameters (`scipy.stats.gamma(1e9)`
keeps 7) and know of no point by its distance from another one, as quadrature at a singular end and
at a narrow far peak needs.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Annotated, Any, ClassVar, Self

import numpy as np
from numpy import ndarray
from numpy.random import Generator
from numpy.typing import ArrayLike

from ..gaussian import _real

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


@dataclass(frozen=True, slots=True, eq=False)
class Distribution:
    """What `qstar.families` needs of a parent; its subclasses say which one it is.

    Raises:
        ValueError: A parameter is not what its family takes.
    """

    outcomes = LINE
    ends: ClassVar[tuple[float, float]] = (-math.inf, math.inf)
    """The support of every member, where they share it."""
    varies: ClassVar[tuple[str, ...]] = ()
    """The fields in which two members of one exponential family may differ."""

    def __post_init__(self) -> None:
        for field in fields(self):
            for check in getattr(field.type, "__metadata__", ()):
                set_fields(self, **{field.name: check(getattr(self, field.name), field.name)})

    @property
    def support(self) -> tuple[float, float]:
        """The smallest interval that holds every outcome."""
        return self.ends

    @property
    def landmarks(self) -> tuple[tuple[Any, Any], ...]:
        """(place, scale) pairs: where the density is worth looking at, and how closely."""
        raise NotImplementedError

    @property
    def gaps(self) -> tuple[float, ...]:
        """Places inside the support where the density may jump."""
        return ()

    def log_density(self, x: ArrayLike) -> ndarray:
        """The log of the density (of the probability, where outcomes are counted), in nats; -inf
        off the support."""
        return self.log_density_at(0.0, np.asarray(x, dtype=float))

    def pdf(self, x: ArrayLike) -> ndarray:
        """The density, or the probability where outcomes are counted: exp of `log_density`."""
        return np.exp(self.log_density(x))

    def sample(self, count: int, *, generator: Generator) -> ndarray:
        """Independent draws."""
        raise NotImplementedError

    def log_density_at(self, anchor: ArrayLike, offset: ndarray) -> ndarray:
        """log_density(anchor + offset), the offset keeping its own precision where it matters: at
        a singular end that is not zero, and for a narrow density far from zero.

        An end of the support comes as the anchor of what lies next to it.
        """
        anchor = np.asarray(anchor, dtype=float)
        x, (low, high) = anchor + offset, self.support
        with np.errstate(all="ignore"):
            to_high = (high - anchor) - offset
            outside = ((anchor - low) + offset < 0) | (to_high < 0)
            values = self._log_density(x, (anchor - self.landmarks[0][0]) + offset, to_high)
        if self.outcomes == INTEGERS:
            outside |= x != np.floor(x)
        return np.where(outside, -np.inf, values)

    def _log_density(self, x: ndarray, from_centre: ndarray, to_high: ndarray) -> ndarray:
        """The formula inside the support; `from_centre` is x less the place of the first landmark,
        `to_high` the upper end less x."""
        raise NotImplementedError

    def log_density_beyond(self, anchor: ndarray, side: ndarray, log_distance: ndarray) -> ndarray:
        """log(density times distance) at anchor + side exp(log_distance), where float64 cannot
        hold that distance: |log_distance| > `REACH`. It is the log-density of the log-distance.

        By the family's own formula, far out and next to a support's end at zero. Otherwise a
        density that has become a power of the distance within float64's reach stays that power,
        one that has vanished stays zero; nan where it is neither.
        """
        shares = np.array([0.7, 0.8, 0.9, 1.0])
        within = np.sign(log_distance)[..., None] * REACH * shares
        offsets = np.asarray(side)[..., None] * np.exp(within)
        with np.errstate(all="ignore"):
            # Far out it is the distance from zero that counts.
            start = np.where(log_distance > 0, 0.0, anchor)[..., None]
            seen = self.log_density_at(start, offsets) + within
            bend = np.abs(np.diff(seen, n=2, axis=-1)).max(axis=-1)
            straight = bend <= 1e-12 * (1 + np.abs(seen).max(axis=-1))
            slope = (seen[..., 3] - seen[..., 0]) / (within[..., 3] - within[..., 0])
            further = seen[..., 3] + slope * (log_distance - within[..., 3])
            known = self._log_density_of_log(log_distance)
        low = self.support[0]
        further = np.where(seen[..., 3] < -1e20, -np.inf, np.where(straight, further, np.nan))
        known = np.where((np.asarray(side) > 0) | (low < 0), known, -np.inf)
        ours = (log_distance > 0) | ((np.asarray(anchor) == 0) & (low == 0))
        return np.where(ours & ~np.isnan(known), known, further)

    def _log_density_of_log(self, log_distance: ndarray) -> ndarray:
        """log(density times distance) at that distance from zero; nan if there is no formula."""
        return np.full(np.shape(log_distance), np.nan)

    def _kin(self) -> tuple[object, ...] | None:
        """What makes two members one exponential family; None: there is none."""
        if not self.varies or self.support[0] == self.support[1]:
            return None
        shared = (getattr(self, f.name) for f in fields(self) if f.name not in self.varies)
        return type(self), *shared

    def _variance(self, teacher: Self, a: ndarray, b: ndarray) -> ndarray:
        """Variance of log(self / teacher) under self^a teacher^b, for a + b = 1, each exact."""
        raise NotImplementedError

    def _between(self, teacher: Self, a: float, b: float) -> Self:
        """The member self^a teacher^b / Z. Here: what varies is linear in natural parameters."""
        pairs = {name: (getattr(self, name), getattr(teacher, name)) for name in self.varies}
        return replace(self, **{name: a * x + b * y for name, (x, y) in pairs.items()})

    def _general(self) -> "Distribution":
        """The same distribution as a member of the larger family that holds this one."""
        return self


@dataclass(frozen=True, slots=True, eq=False)
class Special(Distribution):
    """A family with a name of its own inside a larger one, which does the work."""

    @property
    def support(self) -> tuple[float, float]:
        return self._general().support

    @property
    def landmarks(self) -> tuple[tuple[float, float], ...]:
        return self._general().landmarks

    def log_density_at(self, anchor: ArrayLike, offset: ndarray) -> ndarray:
        return self._general().log_density_at(anchor, offset)

    def log_density_beyond(self, anchor: ndarray, side: ndarray, log_distance: ndarray) -> ndarray:
        return self._general().log_density_beyond(anchor, side, log_distance)

    def sample(self, count: int, *, generator: Generator) -> ndarray:
        return self._general().sample(count, generator=generator)

    def _variance(self, teacher: Self, a: ndarray, b: ndarray) -> ndarray:
        return self._general()._variance(teacher._general(), a, b)

    def _between(self, teacher: Self, a: float, b: float) -> Self:
        member = self._general()._between(teacher._general(), a, b)
        return replace(self, **{name: getattr(member, name) for name in self.varies})


# ---- Parameters ----------------------------------------------------------------------------------


def set_fields(instance: object, **values: object) -> None:
    """Set fields of a frozen dataclass while it is made; arrays become read-only."""
    for name, value in values.items():
        if isinstance(value, ndarray):
            value.flags.writeable = False
        object.__setattr__(instance, name, value)


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


def _not_negative(value: float, name: str) -> float:
    return 0.0 if _finite(value, name) == 0 else _positive(value, name)


def _within(inside: Callable[[float], bool], interval: str) -> Callable[[float, str], float]:
    def check(value: float, name: str) -> float:
        number = _finite(value, name)
        if not inside(number):
            raise ValueError(
                f"{name} must lie in {interval}: got {number:.6g}. Pass a probability, not a "
                f"percentage, a logit or a logarithm."
            )
        return number

    return check


def _count(value: int, name: str) -> int:
    number = _finite(value, name)
    if number < 1 or number != round(number):
        raise ValueError(f"{name} must be a whole number, at least 1: got {value!r}.")
    return int(number)


Finite = Annotated[float, _finite]
Positive = Annotated[float, _positive]
NotNegative = Annotated[float, _not_negative]
Probability = Annotated[float, _within(lambda p: 0 <= p <= 1, "[0, 1]")]
ProbabilityAboveZero = Annotated[float, _within(lambda p: 0 < p <= 1, "(0, 1]")]
Count = Annotated[int, _count]


def vector(values: ArrayLike, name: str) -> ndarray:
    """A list of finite numbers as an array.

    Raises:
        ValueError: It is not one.
    """
    array = np.asarray(values)
    if array.ndim != 1 or array.size == 0:
        raise ValueError(
            f"{name} must be a list of real numbers: got shape {array.shape}. Make one "
            f"distribution for each row of a batch."
        )
    return _real(array, name)
