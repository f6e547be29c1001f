"""Gaussians: KL, the geometric mean, log Z and alpha*, in closed form up to one scalar root.

A pair is a product of axes (`qstar.gaussian_axes`): one decomposition finds them, and afterwards
every alpha costs O(dimension). NumPy float64; divergences are in nats; parents come first and alpha
last.
"""

from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy import ndarray
from numpy.typing import ArrayLike
from scipy.linalg import eigh, solve_triangular
from scipy.optimize import brentq
from scipy.special import zeta

from .arguments import check_alphas
from .gaussian_axes import Axes, singular
from .result import Balance, HashedByValue

EPS = np.finfo(np.float64).eps
LOST = 1e-3
"""Relative rounding of a covariance's smallest direction beyond which nothing has converged."""
SYMMETRY_TOLERANCE = 1e-8
"""How far cov[i, j] and cov[j, i] may differ, in units of the two standard deviations."""


@dataclass(frozen=True, slots=True, eq=False, init=False)
class Gaussian(HashedByValue):
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
        root = np.linalg.cholesky(self.covariance)
        flat = (points - self.mean).reshape(-1, self.dimension)
        standard = solve_triangular(root, flat.T, lower=True)
        log_volume = np.log(np.diag(root)).sum() + 0.5 * self.dimension * np.log(2 * np.pi)
        return -0.5 * (standard**2).sum(axis=0).reshape(points.shape[:-1]) - log_volume

    def sample(self, count: int, *, generator: np.random.Generator) -> ndarray:
        """Independent draws, one a row."""
        standard = generator.standard_normal((count, self.dimension))
        return self.mean + standard @ np.linalg.cholesky(self.covariance).T


def kl(a: Gaussian, b: Gaussian) -> float:
    """KL(a || b) in nats, exact to the relative precision of the inputs also where it is tiny.

    Raises:
        ValueError: The dimensions differ.
    """
    return float(_axes(a, b, names=("a", "b")).kl_to_teacher(np.asarray(1.0)))


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
    return _axes(policy, teacher).log_partition(check_alphas(alpha))


def kl_gap(policy: Gaussian, teacher: Gaussian, alpha: ArrayLike) -> ndarray:
    """KL(q_alpha || teacher) - KL(q_alpha || policy), the slope of log Z, in nats.

    Arguments and errors are those of `log_partition`.
    """
    return _axes(policy, teacher).slope(check_alphas(alpha))


def kl_to_parents(policy: Gaussian, teacher: Gaussian, alpha: ArrayLike) -> tuple[ndarray, ndarray]:
    """KL(q_alpha || policy) and KL(q_alpha || teacher) along the path, in nats.

    The same as `kl` against each `geometric_mean`, from one decomposition.

    Arguments and errors are those of `log_partition`.
    """
    axes = _axes(policy, teacher)
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
    axes = _axes(policy, teacher)
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
    axes = _axes(policy, teacher)
    at_0, at_1 = axes.kl_to_policy(np.asarray(0.0)), axes.kl_to_teacher(np.asarray(1.0))
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


_EVEN = np.arange(2.0, 21.0, 2)
_LANGEVIN = 2 * zeta(_EVEN) / (2 * np.pi) ** _EVEN * (-1) ** (_EVEN / 2 + 1)
"""B_2k / (2k)! for k = 1, 2, ...: the odd part of x / expm1(x), over x^(2k-1)."""


def _axes(
    policy: Gaussian, teacher: Gaussian, names: tuple[str, str] = ("policy", "teacher")
) -> Axes:
    if policy.dimension != teacher.dimension:
        raise ValueError(
            f"{names[0]} and {names[1]} must live in one space: got dimensions "
            f"{policy.dimension} and {teacher.dimension}. Marginalise or extend one of them."
        )
    root = np.linalg.cholesky(teacher.covariance)
    # Not checked: a Gaussian was when it was made.
    unit = partial(solve_triangular, root, lower=True, check_finite=False)
    difference = unit(unit(policy.covariance - teacher.covariance).T)
    excess, rotation = np.full(1, np.inf), root
    if np.isfinite(difference).all():  # else they are far apart, perhaps too far
        excess, rotation = eigh((difference + difference.T) / 2, check_finite=False)
    if np.abs(excess).max() < 0.5:
        variance = 1 + excess
    else:
        # Without products of matrices the small variances of a far pair survive beside large
        # ones: one-sided Jacobi on the quotient of the Cholesky factors.
        scale, rotation = singular(unit(np.linalg.cholesky(policy.covariance)))
        variance = scale**2
        excess = (scale - 1) * (scale + 1)
    apart = unit(policy.mean - teacher.mean)
    return Axes(root @ rotation, excess, variance, rotation.T @ apart)


def _condition(parent: Gaussian) -> float:
    """Of the correlation matrix: scales and units do not count."""
    if parent.dimension == 1:
        return 1.0
    deviation = np.sqrt(np.diag(parent.covariance))
    values = eigh(parent.covariance / deviation[:, None] / deviation, eigvals_only=True)
    return float(values[-1] / max(values[0], EPS * EPS))


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
