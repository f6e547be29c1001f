"""A pair of Gaussians as a product of axes: what every formula of `qstar.gaussian` is made of.

Everything about a pair is said in the teacher's units. With teacher covariance M M^T, policy
covariance M diag(v) M^T and means apart by M d, the pair is a product of axes: on each the policy
has variance v = 1 + e and sits d standard deviations from the teacher, and with
u = alpha + (1 - alpha) v

    log Z(alpha) = 1/2 sum [(1 - alpha) log v - log u - alpha (1 - alpha) d^2 / u].

One decomposition finds the axes; afterwards every alpha costs O(dimension). Close pairs keep their
relative precision because e is computed from the difference of the covariances, never as v - 1.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy import ndarray
from scipy.linalg import lapack

FEW = 16
"""Numbers up to which a loop in plain floats costs less than calls into NumPy."""


@dataclass(frozen=True, eq=False)
class Axes:
    """A pair of Gaussians as a product of one-dimensional ones, in the teacher's units.

    Attributes:
        basis: M, with teacher covariance M M^T and policy covariance M diag(variance) M^T.
        excess: The policy's variance on each axis, minus 1 (exact also where it is tiny).
        variance: The policy's variance on each axis (exact also where it is tiny).
        gap: Policy mean minus teacher mean, in teacher standard deviations.
    """

    basis: ndarray
    excess: ndarray
    variance: ndarray
    gap: ndarray

    @cached_property
    def log_variance(self) -> ndarray:
        near = np.abs(self.excess) < 0.5  # from whichever of the two carries the precision
        return np.where(near, np.log1p(np.where(near, self.excess, 0.0)), np.log(self.variance))

    def u(self, alpha: ndarray) -> ndarray:
        """alpha + (1 - alpha) v: what q's precision is, over the policy's."""
        weight = alpha[..., None]
        return weight + (1 - weight) * self.variance

    def log_partition(self, alpha: ndarray) -> ndarray:
        a, b, u = alpha[..., None], 1 - alpha[..., None], self.u(alpha)
        # Seen from the parent with the larger exponent, of whose excess q keeps the smaller part:
        # b log(1 + e) - log(1 + b e), where first orders cancel and are left out.
        excess = np.where(a < b, -self.excess / self.variance, self.excess)
        other = np.where(a < b, 1 / self.variance, self.variance)
        part = np.minimum(a, b)
        mix = (1 - part) + part * other
        near = np.abs(excess) < 0.5
        second_order = part * _log_less_linear(excess, other) - _log_less_linear(part * excess, mix)
        log_other = np.where(a < b, -1.0, 1.0) * self.log_variance
        spread = np.where(near, second_order, part * log_other - np.log(mix))
        return np.minimum(0.5 * (spread - a * b * self.gap**2 / u).sum(axis=-1), 0.0)

    @cached_property
    def slope_terms(self) -> tuple[ndarray, ...]:
        """What `axis_slope` asks of the axes: two ways to say the spread, near and far."""
        near = np.abs(self.excess) < 0.5
        square = np.where(near, self.excess, 0.0) ** 2
        far = np.where(near, 0.0, self.excess)
        less_excess = _log_less_linear(self.excess, self.variance)
        constant = np.where(near, less_excess, self.log_variance)
        return self.variance, square, far, constant, self.gap**2

    @cached_property
    def slope_rows(self) -> list[list[float]]:
        """The same as plain floats, axis by axis."""
        return np.stack(self.slope_terms, axis=1).tolist()

    def slope(self, alpha: ndarray) -> ndarray:
        """The derivative of log Z: KL(q || teacher) - KL(q || policy)."""
        return 0.5 * axis_slope(alpha[..., None], *self.slope_terms).sum(axis=-1)

    def slope_at(self, alpha: float) -> float:
        """`slope` at one alpha: a root finder asks for no more."""
        if len(self.variance) > FEW:
            return float(self.slope(np.asarray(alpha)))
        return 0.5 * math.fsum([axis_slope(alpha, *row) for row in self.slope_rows])

    def curvature(self, alpha: ndarray) -> ndarray:
        """The second derivative of log Z: the variance of the log-ratio under q."""
        u = self.u(alpha)
        return (0.5 * (self.excess / u) ** 2 + self.gap**2 * self.variance / u**3).sum(axis=-1)

    def kl_to_policy(self, alpha: ndarray) -> ndarray:
        b, u = 1 - alpha[..., None], self.u(alpha)
        spread = -_log_less_linear(-b * self.excess / u, 1 / u)
        return 0.5 * (spread + self.gap**2 * (b / u) * (b * self.variance / u)).sum(axis=-1)

    def kl_to_teacher(self, alpha: ndarray) -> ndarray:
        a, u = alpha[..., None], self.u(alpha)
        spread = -_log_less_linear(a * self.excess / u, self.variance / u)
        return 0.5 * (spread + (a * self.gap / u) ** 2).sum(axis=-1)


def axis_slope(a: Any, variance: Any, square: Any, far: Any, constant: Any, gap: Any) -> Any:
    """Twice what one axis adds to the slope of log Z; arrays or plain floats alike.

    The spread is -b e^2 / u - (log(1 + e) - e) near e = 0, else e / u - log(1 + e), where b is
    1 - a: `square` is e^2 or 0, `far` 0 or e.
    """
    b = 1 - a
    u = a + b * variance
    location = gap * ((a / u) * (a / u) - (b / u) * (b * variance / u))
    return (far - b * square) / u - constant + location


def _log_less_linear(x: ndarray, one_plus_x: ndarray) -> ndarray:
    """log(1 + x) - x, never positive, to relative precision also where it is about -x^2 / 2."""
    near = np.abs(x) < 0.5
    small = np.where(near, x, 0.0)
    ratio = small / (2 + small)  # log1p(x) = 2 atanh(x / (2 + x))
    tail = polynomial(ratio**2, ATANH)
    return np.where(near, 2 * ratio**3 * tail - small * ratio, np.log(one_plus_x) - x)


def polynomial(x: ndarray, coefficients: ndarray) -> ndarray:
    """Horner's rule, lowest coefficient first, without many calls for few numbers."""
    if x.size > FEW:
        return np.polynomial.polynomial.polyval(x, coefficients)
    highest_first = coefficients.tolist()[::-1]
    values = []
    for at in x.ravel().tolist():
        value = 0.0
        for coefficient in highest_first:
            value = value * at + coefficient
        values.append(value)
    return np.array(values).reshape(x.shape)


ATANH = 1 / np.arange(3, 41, 2)
"""1/3, 1/5, ...: the series of (atanh(r) - r) / r^3 in r^2, enough for r = 1/3."""


def singular(matrix: ndarray) -> tuple[ndarray, ndarray]:
    """Singular values and left singular vectors, the small values to relative precision."""
    scale, left, _, work, _, info = lapack.dgejsv(matrix, joba=2, jobu=0, jobv=0, jobr=0)
    scale = scale * (work[0] / work[1])
    if info != 0 or not ((scale > 1e-150) & (scale < 1e150)).all():
        raise ValueError(
            f"policy and teacher must have standard deviations within a factor of 1e150 of each "
            f"other along every axis: got ratios from {scale.min():.3g} to {scale.max():.3g} "
            f"(LAPACK dgejsv: info {info}). Check the units of the two covariances."
        )
    return scale, left
