"""Gaussians: KL, the geometric mean, log Z and alpha*, in closed form up to one scalar root.

Everything about a pair is said in the teacher's units. With teacher covariance M M^T, policy
covariance M diag(v) M^T and means apart by M d, the pair is a product of axes: on each the policy
has variance v = 1 + e and sits d standard deviations from the teacher, and with
u = alpha + (1 - alpha) v

    log Z(alpha) = 1/2 sum [(1 - alpha) log v - log u - alpha (1 - alpha) d^2 / u].

One decomposition finds the axes; afterwards every alpha costs O(dimension). Close pairs keep their
relative precision because e is computed from the difference of the covariances, never as v - 1.
NumPy float64; divergences are in nats; parents come first and alpha last.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy import ndarray
from numpy.typing import ArrayLike
from scipy.linalg import eigh, lapack, solve_triangular
from scipy.optimize import brentq

from .arguments import check_alphas
from .result import Balance

EPS = np.finfo(np.float64).eps
LOST = 1e-3
"""Relative rounding of a covariance's smallest direction beyond which nothing has converged."""
FEW = 16
"""Numbers up to which a loop in plain floats costs less than calls into NumPy."""
SYMMETRY_TOLERANCE = 1e-8
"""How far cov[i, j] and cov[j, i] may differ, in units of the two standard deviations."""


@dataclass(frozen=True, slots=True, eq=False, init=False)
class Gaussian:
    """A normal distribution of any dimension, with a full covariance.

    Numbers are accepted for dimension 1: `Gaussian(0.0, 4.0)` has standard deviation 2. The arrays
    are float64 copies and cannot be written to.

    Attributes:
        mean: The mean. Shape (dimension,).
        covariance: The covariance matrix: variances, not standard deviations, on its diagonal.
            Shape (dimension, dimension).

    Raises:
        ValueError: Shapes disagree, a value is not finite, or the covariance is not symmetric (to
            `SYMMETRY_TOLERANCE`) or not positive definite in float64.
    """

    mean: ndarray
    covariance: ndarray

    def __init__(self, mean: ArrayLike, covariance: ArrayLike) -> None:
        mean = _real(mean, "mean")
        covariance = _real(covariance, "covariance")
        if mean.ndim == 0:
            mean = mean.reshape(1)
        if mean.ndim != 1 or mean.size == 0:
            raise ValueError(
                f"mean must be a number or a vector with at least one entry: got shape "
                f"{mean.shape}. Flatten it, or make one Gaussian for each row."
            )
        if mean.size == 1 and covariance.size == 1:
            covariance = covariance.reshape(1, 1)
        if covariance.shape != (mean.size, mean.size):
            raise ValueError(
                f"covariance must have shape {(mean.size, mean.size)} to go with a mean of "
                f"{mean.size} entries: got shape {covariance.shape}. Write variances on the axes "
                f"as np.diag(variances), a common one as variance * np.eye({mean.size})."
            )
        covariance = _symmetric_positive_definite(covariance)
        mean.flags.writeable = False
        covariance.flags.writeable = False
        object.__setattr__(self, "mean", mean)
        object.__setattr__(self, "covariance", covariance)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Gaussian):
            return NotImplemented
        return np.array_equal(self.mean, other.mean) and np.array_equal(
            self.covariance, other.covariance
        )

    def __hash__(self) -> int:
        return hash((self.mean.tobytes(), self.covariance.tobytes()))

    @property
    def dimension(self) -> int:
        """How many coordinates an outcome has."""
        return self.mean.size

    def log_density(self, x: ArrayLike) -> ndarray:
        """The log of the density at each point, in nats.

        Raises:
            ValueError: The last axis of `x` is not the dimension.
        """
        points = np.asarray(x, dtype=np.float64)
        if points.ndim == 0 or points.shape[-1] != self.dimension:
            raise ValueError(
                f"x must have the {self.dimension} coordinates of a point on its last axis: got "
                f"shape {points.shape}. In one dimension pass x[..., None]."
            )
        root = _cholesky(self.covariance)
        flat = (points - self.mean).reshape(-1, self.dimension)
        standard = solve_triangular(root, flat.T, lower=True)
        log_volume = np.log(np.diag(root)).sum() + 0.5 * self.dimension * np.log(2 * np.pi)
        return -0.5 * (standard**2).sum(axis=0).reshape(points.shape[:-1]) - log_volume

    def sample(self, count: int, *, generator: np.random.Generator) -> ndarray:
        """Independent draws, one a row."""
        standard = generator.standard_normal((count, self.dimension))
        return self.mean + standard @ _cholesky(self.covariance).T


def kl(a: Gaussian, b: Gaussian) -> float:
    """KL(a || b) in nats, exact to the relative precision of the inputs also where it is tiny.

    Raises:
        ValueError: The dimensions differ.
    """
    return float(_Axes.of(a, b, names=("a", "b")).kl_policy_teacher())


def log_partition(policy: Gaussian, teacher: Gaussian, alpha: ArrayLike) -> ndarray:
    """log Z(alpha) = log of the integral of policy^alpha teacher^(1 - alpha), in nats.

    Convex in alpha, zero at both ends, never positive; exact to relative precision near zero.

    Args:
        policy: The parent with exponent alpha.
        teacher: The parent with exponent 1 - alpha.
        alpha: The exponent on the policy, in [0, 1], of any shape; nan gives nan. Shape (*alphas).

    Raises:
        ValueError: The dimensions differ, or alpha leaves [0, 1].
    """
    return _Axes.of(policy, teacher).log_partition(check_alphas(alpha))


def kl_gap(policy: Gaussian, teacher: Gaussian, alpha: ArrayLike) -> ndarray:
    """KL(q_alpha || teacher) - KL(q_alpha || policy), the slope of log Z, in nats.

    Arguments and errors are those of `log_partition`.
    """
    return _Axes.of(policy, teacher).slope(check_alphas(alpha))


def kl_to_parents(policy: Gaussian, teacher: Gaussian, alpha: ArrayLike) -> tuple[ndarray, ndarray]:
    """KL(q_alpha || policy) and KL(q_alpha || teacher) along the path, in nats.

    The same as `kl` against each `geometric_mean`, from one decomposition.

    Arguments and errors are those of `log_partition`.
    """
    axes = _Axes.of(policy, teacher)
    alphas = check_alphas(alpha)
    return axes.kl_to_policy(alphas), axes.kl_to_teacher(alphas)


def geometric_mean(policy: Gaussian, teacher: Gaussian, alpha: float) -> Gaussian:
    """q_alpha, proportional to policy^alpha teacher^(1 - alpha): again a Gaussian, exactly.

    Precisions are averaged, alpha policy^-1 + (1 - alpha) teacher^-1, and so are the
    precision-weighted means; the covariance is therefore the weighted harmonic mean of the
    parents' covariances, and the mean need not lie between their means.

    Raises:
        ValueError: The dimensions differ, or alpha is not a number in [0, 1].
    """
    weight = check_alphas(alpha)
    if weight.ndim or np.isnan(weight):
        raise ValueError(
            f"alpha is the exponent on the policy and must be one number in [0, 1]: got {alpha!r}."
        )
    axes = _Axes.of(policy, teacher)
    if weight in (0.0, 1.0):
        return policy if weight else teacher
    u = axes.u(weight)
    # Step from the nearer parent, so that close to it nothing is lost to a far one.
    if weight > 0.5:
        mean = policy.mean - axes.basis @ ((1 - weight) * axes.variance * axes.gap / u)
    else:
        mean = teacher.mean + axes.basis @ (weight * axes.gap / u)
    root = axes.basis * np.sqrt(axes.variance / u)
    return Gaussian(mean, root @ root.T)


def solve_kl_symmetry(policy: Gaussian, teacher: Gaussian) -> Balance[float, str, bool]:
    """Find alpha*, at which KL(q* || policy) = KL(q* || teacher).

    Two different Gaussians have the same support, so exactly one alpha in (0, 1) does it: the root
    of the slope of log Z, which rises from -KL(teacher || policy) to KL(policy || teacher).

    Returns:
        A `Balance` of plain Python values; status `interior`, or `degenerate_all` with alpha = 1/2
        where the parents are equal (or so close that KL underflows). `converged` is False where a
        covariance leaves fewer than three digits: where the condition number of its correlation
        matrix, times float64's rounding, exceeds `LOST`.

    Raises:
        ValueError: The dimensions differ.

    Source: the analysis, problem 2; Chernoff (1952); Nielsen (2013),
        doi:10.1109/LSP.2013.2243726.
    """
    axes = _Axes.of(policy, teacher)
    at_0, at_1 = -axes.kl_teacher_policy(), axes.kl_policy_teacher()
    if at_0 == 0 or at_1 == 0:
        alpha, passes, converged, status = 0.5, 2, True, "degenerate_all"
    else:
        alpha, root = brentq(
            axes.slope_at,
            0.0,
            1.0,
            xtol=1e-300,
            rtol=4 * EPS,
            maxiter=2000,
            full_output=True,
            disp=False,
        )
        passes, converged, status = root.function_calls, root.converged, "interior"
    if max(_condition(parent) for parent in (policy, teacher)) * EPS > LOST:
        converged = False
    at = np.asarray(alpha)
    return Balance(
        alpha=float(alpha),
        chernoff=float(-axes.log_partition(at)) + 0.0,  # and no -0.0
        kl_to_policy=float(axes.kl_to_policy(at)),
        kl_to_teacher=float(axes.kl_to_teacher(at)),
        status=status,
        converged=bool(converged),
        slope=float(axes.slope(at)),
        curvature=float(axes.curvature(at)),
        passes=int(passes),
    )


@dataclass(frozen=True, slots=True)
class SolvedPair:
    """A named pair of Gaussians with its solution: what a table row or a figure panel shows.

    Attributes:
        name: What the reader calls it.
        policy: One parent.
        teacher: The other.
        balance: alpha*, the Chernoff information and the divergences from q*, in nats.
        q_star: The geometric mean at alpha*.
        kl_policy_teacher: KL(policy || teacher), in nats.
        kl_teacher_policy: KL(teacher || policy), in nats.
    """

    name: str
    policy: Gaussian
    teacher: Gaussian
    balance: Balance[float, str, bool]
    q_star: Gaussian
    kl_policy_teacher: float
    kl_teacher_policy: float


def solve_pair(name: str, policy: Gaussian, teacher: Gaussian) -> SolvedPair:
    """Solve a pair and keep everything that the book says about one."""
    balance = solve_kl_symmetry(policy, teacher)
    return SolvedPair(
        name=name,
        policy=policy,
        teacher=teacher,
        balance=balance,
        q_star=geometric_mean(policy, teacher, balance.alpha),
        kl_policy_teacher=kl(policy, teacher),
        kl_teacher_policy=kl(teacher, policy),
    )


def alpha_same_mean_isotropic(variance_policy: ArrayLike, variance_teacher: ArrayLike) -> ndarray:
    """alpha* of two isotropic Gaussians with one mean, in any dimension: the scale law.

    With rho = variance_teacher / variance_policy it is 1 / log(rho) - 1 / (rho - 1), below 1/2
    exactly where the policy is the narrower one.

    Raises:
        ValueError: A variance is not positive and finite.

    Source: set the slope of log Z = d/2 [alpha log rho - log(alpha rho + 1 - alpha)] to zero.
    """
    narrow = _real(variance_policy, "variance_policy")
    wide = _real(variance_teacher, "variance_teacher")
    for name, values in (("variance_policy", narrow), ("variance_teacher", wide)):
        if (values <= 0).any():
            raise ValueError(f"{name} must be positive: got {values[values <= 0].flat[0]}.")
    close = np.abs(wide - narrow) <= 0.5 * narrow
    excess = np.where(close, (wide - narrow) / narrow, 0.0)
    log_ratio = np.where(close, np.log1p(excess), np.log(wide) - np.log(narrow))
    # 1/x - 1/expm1(x) = 1/2 - x/12 + x^3/720 - ...: Bernoulli numbers, radius 2 pi.
    series = 0.5 - log_ratio * np.polynomial.polynomial.polyval(log_ratio**2, _LANGEVIN)
    away = np.abs(log_ratio) > 1
    x = np.where(away, log_ratio, 1.0)
    with np.errstate(over="ignore"):  # rho beyond float64: 1 / inf is the answer
        direct = 1 / x - 1 / np.expm1(x)
    return np.where(away, direct, series)


_LANGEVIN = np.array(
    [
        1 / 12,
        -1 / 720,
        1 / 30240,
        -1 / 1209600,
        1 / 47900160,
        -691 / 1307674368000,
        1 / 74724249600,
        -3617 / 10670622842880000,
        43867 / 5109094217170944000,
        -174611 / 802857662698291200000,
    ]
)
"""B_2k / (2k)! for k = 1, 2, ...: the odd part of x / expm1(x), over x^(2k-1)."""


@dataclass(frozen=True, eq=False)
class _Axes:
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

    @classmethod
    def of(
        cls, policy: Gaussian, teacher: Gaussian, names: tuple[str, str] = ("policy", "teacher")
    ) -> "_Axes":
        if policy.dimension != teacher.dimension:
            raise ValueError(
                f"{names[0]} and {names[1]} must live in one space: got dimensions "
                f"{policy.dimension} and {teacher.dimension}. Marginalise or extend one of them."
            )
        root = _cholesky(teacher.covariance)
        half = _solve(root, policy.covariance - teacher.covariance)
        difference = _solve(root, half.T)
        excess, rotation = np.full(1, np.inf), root
        if np.isfinite(difference).all():  # else they are far apart, perhaps too far
            excess, rotation = eigh((difference + difference.T) / 2, check_finite=False)
        if np.abs(excess).max() < 0.5:
            variance = 1 + excess
        else:
            # Without products of matrices the small variances of a far pair survive beside large
            # ones: one-sided Jacobi on the quotient of the Cholesky factors.
            quotient = _solve(root, _cholesky(policy.covariance))
            scale, rotation = _singular(quotient)
            variance = scale**2
            excess = (scale - 1) * (scale + 1)
        apart = _solve(root, policy.mean - teacher.mean)
        return cls(root @ rotation, excess, variance, rotation.T @ apart)

    @cached_property
    def log_variance(self) -> ndarray:
        return _log(self.excess, self.variance)

    @cached_property
    def log_less_excess(self) -> ndarray:
        return _log_less_linear(self.excess, self.variance)

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
        """What `_axis_slope` asks of the axes: two ways to say the spread, near and far."""
        near = np.abs(self.excess) < 0.5
        square = np.where(near, self.excess, 0.0) ** 2
        far = np.where(near, 0.0, self.excess)
        constant = np.where(near, self.log_less_excess, self.log_variance)
        return self.variance, square, far, constant, self.gap**2

    @cached_property
    def slope_rows(self) -> list[list[float]]:
        """The same as plain floats, axis by axis."""
        return np.stack(self.slope_terms, axis=1).tolist()

    def slope(self, alpha: ndarray) -> ndarray:
        """The derivative of log Z: KL(q || teacher) - KL(q || policy)."""
        return 0.5 * _axis_slope(alpha[..., None], *self.slope_terms).sum(axis=-1)

    def slope_at(self, alpha: float) -> float:
        """`slope` at one alpha: a root finder asks for no more."""
        if len(self.variance) > FEW:
            return float(self.slope(np.asarray(alpha)))
        return 0.5 * math.fsum([_axis_slope(alpha, *row) for row in self.slope_rows])

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

    def kl_policy_teacher(self) -> ndarray:
        return self.kl_to_teacher(np.asarray(1.0))

    def kl_teacher_policy(self) -> ndarray:
        return self.kl_to_policy(np.asarray(0.0))


def _axis_slope(a: Any, variance: Any, square: Any, far: Any, constant: Any, gap: Any) -> Any:
    """Twice what one axis adds to the slope of log Z; arrays or plain floats alike.

    The spread is -b e^2 / u - (log(1 + e) - e) near e = 0, else e / u - log(1 + e), where b is
    1 - a: `square` is e^2 or 0, `far` 0 or e.
    """
    b = 1 - a
    u = a + b * variance
    location = gap * ((a / u) * (a / u) - (b / u) * (b * variance / u))
    return (far - b * square) / u - constant + location


def _log(x: ndarray, one_plus_x: ndarray) -> ndarray:
    """log(1 + x) from whichever of the two carries the precision."""
    near = np.abs(x) < 0.5
    return np.where(near, np.log1p(np.where(near, x, 0.0)), np.log(one_plus_x))


def _log_less_linear(x: ndarray, one_plus_x: ndarray) -> ndarray:
    """log(1 + x) - x, never positive, to relative precision also where it is about -x^2 / 2."""
    near = np.abs(x) < 0.5
    small = np.where(near, x, 0.0)
    ratio = small / (2 + small)  # log1p(x) = 2 atanh(x / (2 + x))
    tail = _polynomial(ratio**2, _ATANH)
    return np.where(near, 2 * ratio**3 * tail - small * ratio, np.log(one_plus_x) - x)


def _polynomial(x: ndarray, coefficients: ndarray) -> ndarray:
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


_ATANH = 1 / np.arange(3, 41, 2)
"""1/3, 1/5, ...: the series of (atanh(r) - r) / r^3 in r^2, enough for r = 1/3."""


def _singular(matrix: ndarray) -> tuple[ndarray, ndarray]:
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


def _condition(parent: Gaussian) -> float:
    """Of the correlation matrix: scales and units do not count."""
    if parent.dimension == 1:
        return 1.0
    deviation = np.sqrt(np.diag(parent.covariance))
    values = eigh(parent.covariance / deviation[:, None] / deviation, eigvals_only=True)
    return float(values[-1] / max(values[0], EPS * EPS))


def _solve(root: ndarray, right: ndarray) -> ndarray:
    """root^-1 right, for a lower triangle; a Gaussian was checked when it was made."""
    return solve_triangular(root, right, lower=True, check_finite=False)


def _cholesky(covariance: ndarray) -> ndarray:
    return np.linalg.cholesky(covariance)


def _real(values: ArrayLike, name: str) -> ndarray:
    """A float64 copy of real, finite numbers; ValueError if they are not."""
    array = np.asarray(values)
    if array.dtype.kind not in "fiu":
        raise ValueError(f"{name} must hold real numbers: got dtype {array.dtype}.")
    array = array.astype(np.float64)
    if not np.isfinite(array).all():
        where = tuple(int(i) for i in np.argwhere(~np.isfinite(array))[0])
        raise ValueError(
            f"{name} must be finite: entry {list(where)} is {array[where]}. Mend what produced it."
        )
    return array


def _symmetric_positive_definite(covariance: ndarray) -> ndarray:
    """The covariance made exactly symmetric; ValueError if it is none."""
    variances = np.diag(covariance)
    if (variances <= 0).any():
        i = int(np.argmax(variances <= 0))
        raise ValueError(
            f"covariance must be positive definite: the variance of coordinate {i} is "
            f"{variances[i]:.6g}. Pass variances, and drop a coordinate that does not vary."
        )
    deviation = np.sqrt(variances)
    correlation = covariance / deviation[:, None] / deviation
    skew = np.abs(correlation - correlation.T)
    if skew.max() > SYMMETRY_TOLERANCE:
        i, j = (int(k) for k in np.unravel_index(skew.argmax(), skew.shape))
        raise ValueError(
            f"covariance must be symmetric: entries [{i}, {j}] and [{j}, {i}] are "
            f"{covariance[i, j]:.6g} and {covariance[j, i]:.6g}. If rounding made them differ, "
            f"pass (covariance + covariance.T) / 2."
        )
    smallest = float(eigh((correlation + correlation.T) / 2, eigvals_only=True)[0])
    if smallest <= len(variances) * EPS:
        raise ValueError(
            f"covariance must be positive definite: the smallest eigenvalue of its correlation "
            f"matrix is {smallest:.3g}. Drop the coordinates that the others determine, or add "
            f"variance to the diagonal."
        )
    return covariance / 2 + covariance.T / 2
