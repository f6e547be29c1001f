"""q* beyond rows of probabilities: one interface over every pair of parents the book speaks of.

`solve_kl_symmetry(policy, teacher)` takes two laws and returns the same `qstar.Balance`, in plain
Python values and with the same statuses, whatever they are:

- members of one exponential family (`Bernoulli`, `Binomial`, `Poisson`, `Geometric`,
  `NegativeBinomial`, `Exponential`, `Gamma`, `Beta`, `Dirichlet`, `VonMises`, `Laplace` of one
  location, `Weibull` of one shape, `Rayleigh`, `Pareto` of one minimum), through one root of one
  equation (`qstar.families.exponential`), exact to a few units in the last place;
- two `qstar.gaussian.Gaussian` of any dimension, through `qstar.gaussian`;
- two `Categorical`, through `qstar.solve_kl_symmetry`;
- any two laws on the line, or on the integers, or in the plane (`Cauchy`, `StudentT`, `Logistic`,
  `Uniform`, `Mixture`, `GaussianMixture`, `Affine`, `Density`, members of different families, or
  of one family that is not exponential in what differs), through quadrature or summation
  (`qstar.families.quadrature`), to about 1e-12 or with `converged` False;
- SciPy's frozen distributions wherever one of these can be read from them.

Beyond two dimensions without a closed form use `qstar.families.montecarlo`, for more than two
parents `qstar.families.experts`. Policy first, teacher second, alpha last; everything in nats.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy import ndarray
from numpy.typing import ArrayLike

from .. import gaussian, rows
from ..arguments import check_alphas
from ..gaussian import Gaussian
from ..result import Balance
from ..solve import solve_kl_symmetry as solve_rows
from . import exponential, quadrature
from .base import INTEGERS, SPACE, Distribution
from .compounds import Affine, Density, GaussianMixture, GeometricMean, Mixture, as_line
from .continuous import (
    Beta,
    Cauchy,
    Dirichlet,
    Exponential,
    Gamma,
    Laplace,
    Logistic,
    Pareto,
    Rayleigh,
    StudentT,
    Uniform,
    VonMises,
    Weibull,
)
from .discrete import Bernoulli, Binomial, Categorical, Geometric, NegativeBinomial, Poisson

__all__ = [
    "Affine",
    "Bernoulli",
    "Beta",
    "Binomial",
    "Categorical",
    "Cauchy",
    "Density",
    "Dirichlet",
    "Distribution",
    "Exponential",
    "Gamma",
    "Gaussian",
    "GaussianMixture",
    "Geometric",
    "GeometricMean",
    "Laplace",
    "Logistic",
    "Mixture",
    "NegativeBinomial",
    "Pareto",
    "Poisson",
    "Rayleigh",
    "StudentT",
    "Uniform",
    "VonMises",
    "Weibull",
    "as_law",
    "geometric_mean",
    "kl",
    "kl_gap",
    "kl_to_parents",
    "log_partition",
    "solve_kl_symmetry",
]

Law = Distribution | Gaussian
Parent = Any
"""A `Law`, or a frozen SciPy distribution that `as_law` can read."""


def solve_kl_symmetry(policy: Parent, teacher: Parent) -> Balance[float, str, bool]:
    """Find alpha*, at which KL(q* || policy) = KL(q* || teacher).

    Args:
        policy: The parent with exponent alpha: a law of this module or of `qstar.gaussian`, or a
            frozen SciPy distribution.
        teacher: The parent with exponent 1 - alpha, over the same kind of outcome.

    Returns:
        A `Balance` of plain Python values. Its statuses are those of `qstar.solve_kl_symmetry`:
        `interior` wherever the supports agree and the parents differ, a boundary or
        `degenerate_all` where they overlap in part, `disjoint` (which raises nothing: alpha is
        nan, divergences are inf) where they do not meet. `converged` is False where a quadrature
        did not resolve the pair, or a root was not found.

    Raises:
        ValueError: The parents live on different kinds of outcome or in different dimensions, one
            of them cannot be read, or a density that the caller made did not come out with mass
            1: either it is not normalised, or quadrature did not resolve it.
        ArithmeticError: A divergence between members of one exponential family overflows, or a
            distribution that has mass 1 by construction could not be resolved.

    Source: Chernoff (1952); Nielsen (2013), doi:10.1109/LSP.2013.2243726.
    """
    pair = _Pair.of(policy, teacher)
    if pair.kind == "gaussian":
        return gaussian.solve_kl_symmetry(pair.policy, pair.teacher)
    if pair.kind == "exponential":
        return exponential.solve_kl_symmetry(pair.policy, pair.teacher)
    if pair.kind == "density":
        return quadrature.solve_kl_symmetry(pair.policy, pair.teacher)
    found = solve_rows(pair.policy.log_probabilities, pair.teacher.log_probabilities)
    return Balance(
        alpha=float(found.alpha),
        chernoff=float(found.chernoff),
        kl_to_policy=float(found.kl_to_policy),
        kl_to_teacher=float(found.kl_to_teacher),
        status=str(found.status),
        converged=bool(found.converged),
        slope=float(found.slope),
        curvature=float(found.curvature),
        passes=int(found.passes),
    )


def log_partition(policy: Parent, teacher: Parent, alpha: ArrayLike) -> ndarray:
    """log Z(alpha), the log of the sum or integral of policy^alpha teacher^(1 - alpha), in nats.

    Convex in alpha and never positive; at alpha 0 and 1 the limit, which is the log of the mass
    that a parent has on the shared support. -inf for disjoint parents.

    Args:
        policy: See `solve_kl_symmetry`.
        teacher: See `solve_kl_symmetry`.
        alpha: The exponent on the policy, in [0, 1], of any shape. Shape (*alphas).

    Raises:
        ValueError: alpha leaves [0, 1] or is nan; otherwise as `solve_kl_symmetry`.
        ArithmeticError: A quadrature did not converge, or a divergence overflows.
    """
    pair, at = _Pair.of(policy, teacher), check_alphas(alpha, allow_nan=False)
    if pair.kind == "gaussian":
        return gaussian.log_partition(pair.policy, pair.teacher, at)
    if pair.kind == "rows":
        return rows.log_partition(pair.policy.log_probabilities, pair.teacher.log_probabilities, at)
    if pair.kind == "density":
        return quadrature.log_partition(pair.policy, pair.teacher, at)
    to_policy, to_teacher = pair.areas(at)
    return -(at * to_policy + (1 - at) * to_teacher) + 0.0


def kl_to_parents(policy: Parent, teacher: Parent, alpha: ArrayLike) -> tuple[ndarray, ndarray]:
    """KL(q_alpha || policy) and KL(q_alpha || teacher) along the path, in nats.

    At alpha 0 and 1 one of them is the divergence between the parents (of a parent given the
    shared support, where supports differ), which may be infinite.

    Args:
        policy: See `solve_kl_symmetry`.
        teacher: See `solve_kl_symmetry`.
        alpha: The exponent on the policy, in [0, 1], of any shape. Shape (*alphas).

    Raises:
        ValueError: As `log_partition`; or the parents are disjoint, so that there is no q_alpha.
        ArithmeticError: As `log_partition`.
    """
    pair, at = _Pair.of(policy, teacher), check_alphas(alpha, allow_nan=False)
    if pair.kind == "gaussian":
        return gaussian.kl_to_parents(pair.policy, pair.teacher, at)
    if pair.kind == "exponential":
        return pair.areas(at)
    if pair.kind == "rows":
        row = pair.policy.log_probabilities, pair.teacher.log_probabilities
        log_z, slope = rows.log_partition(*row, at), rows.kl_gap(*row, at)
    else:
        log_z, slope = quadrature.log_partition_and_slope(pair.policy, pair.teacher, at)
    if np.isneginf(log_z).any():
        raise ValueError(_DISJOINT.format(policy=policy, teacher=teacher))
    with np.errstate(invalid="ignore"):  # 0 * inf, at the end that needs no slope
        from_policy = np.where(at == 1, 0.0, (1 - at) * slope)
        from_teacher = np.where(at == 0, 0.0, at * slope)
    zero = np.zeros_like(log_z)
    return np.maximum(-log_z - from_policy, zero), np.maximum(-log_z + from_teacher, zero)


def kl_gap(policy: Parent, teacher: Parent, alpha: ArrayLike) -> ndarray:
    """KL(q_alpha || teacher) - KL(q_alpha || policy): the slope of log Z, in nats.

    Args:
        policy: See `solve_kl_symmetry`.
        teacher: See `solve_kl_symmetry`.
        alpha: The exponent on the policy, in [0, 1], of any shape. Shape (*alphas).

    Raises:
        ValueError: As `kl_to_parents`.
        ArithmeticError: As `log_partition`.
    """
    pair, at = _Pair.of(policy, teacher), check_alphas(alpha, allow_nan=False)
    if pair.kind == "gaussian":
        return gaussian.kl_gap(pair.policy, pair.teacher, at)
    to_policy, to_teacher = kl_to_parents(policy, teacher, at)
    return to_teacher - to_policy


def kl(p: Parent, q: Parent) -> float:
    """KL(p || q) in nats: inf where p has mass that q lacks, or where the integral diverges.

    Raises:
        ValueError: As `solve_kl_symmetry`.
        ArithmeticError: The integral did not converge, nor did it clearly diverge.
    """
    pair = _Pair.of(p, q)
    if pair.kind == "gaussian":
        return gaussian.kl(pair.policy, pair.teacher)
    if pair.kind == "exponential":
        return exponential.kl_to_parents(pair.policy, pair.teacher, 1.0)[1]
    if pair.kind == "rows":
        row = rows.kl(pair.policy.log_probabilities, pair.teacher.log_probabilities)
        return float(row)
    return quadrature.kl(pair.policy, pair.teacher)


def geometric_mean(policy: Parent, teacher: Parent, alpha: float) -> Law:
    """q_alpha, proportional to policy^alpha teacher^(1 - alpha), as a law.

    A member of the family where the parents share one (with the parameters that the path gives
    it), otherwise a `GeometricMean`: a law by its `log_density`, `pdf` and `support`, that can be
    a parent again.

    Args:
        policy: What alpha = 1 gives (given the shared support).
        teacher: What alpha = 0 gives (given the shared support).
        alpha: The exponent on the policy, in [0, 1]; at `Balance.alpha` the law is q*.

    Raises:
        ValueError: alpha is not one number in [0, 1], or the parents are disjoint; otherwise as
            `solve_kl_symmetry`.
        ArithmeticError: A quadrature did not converge.
    """
    pair, at = _Pair.of(policy, teacher), check_alphas(alpha, allow_nan=False)
    if at.ndim:
        raise ValueError(f"alpha must be one number in [0, 1]: got shape {at.shape}.")
    weight = float(at)
    if pair.kind == "gaussian":
        return gaussian.geometric_mean(pair.policy, pair.teacher, weight)
    if pair.kind == "exponential":
        if weight in (0.0, 1.0):
            return pair.moved(pair.policy if weight else pair.teacher)
        return pair.moved(pair.policy._between(pair.teacher, weight, 1 - weight))
    if pair.kind == "rows":
        row = rows.log_geometric_mean(
            pair.policy.log_probabilities, pair.teacher.log_probabilities, at
        )
        if np.isnan(row).any():
            raise ValueError(_DISJOINT.format(policy=policy, teacher=teacher))
        return Categorical(np.exp(row))
    log_z = float(quadrature.log_partition(pair.policy, pair.teacher, at))
    if log_z == -math.inf:
        raise ValueError(_DISJOINT.format(policy=policy, teacher=teacher))
    return pair.moved(GeometricMean(pair.policy, pair.teacher, weight, log_z))


_DISJOINT = (
    "policy and teacher must share an outcome to have a geometric mean: the supports of {policy!r} "
    "and {teacher!r} do not meet. Mix a little of each into the other first, if that is meant."
)


class _Pair:
    """Two parents, read, brought to the same form, and the way to solve them."""

    def __init__(
        self, kind: str, policy: Any, teacher: Any, motion: tuple[float, float] | None = None
    ) -> None:
        self.kind, self.policy, self.teacher, self.motion = kind, policy, teacher, motion

    @classmethod
    def of(cls, policy: Parent, teacher: Parent) -> "_Pair":
        ours, theirs = as_law(policy), as_law(teacher)
        motion = None
        if isinstance(ours, Affine) and isinstance(theirs, Affine):
            moves = [(law.location, law.scale) for law in (ours, theirs)]
            if moves[0] == moves[1]:
                motion, ours, theirs = moves[0], ours.base, theirs.base
        if isinstance(ours, Gaussian) and isinstance(theirs, Gaussian):
            return cls("gaussian", ours, theirs)
        ours, theirs = _as_density(ours), _as_density(theirs)
        if isinstance(ours, Categorical) and isinstance(theirs, Categorical):
            return cls("rows", ours, theirs)
        for one in (ours, ours._general()):
            for other in (theirs, theirs._general()):
                if exponential.same_family(one, other):
                    return cls("exponential", one, other, motion)
        quadrature.check_comparable(ours, theirs)
        return cls("density", ours, theirs, motion)

    def areas(self, alpha: ndarray) -> tuple[ndarray, ndarray]:
        """The two divergences of an exponential pair, elementwise."""
        found = [
            exponential.kl_to_parents(self.policy, self.teacher, float(at)) for at in alpha.flat
        ]
        to_policy, to_teacher = np.array(found).reshape(-1, 2).T
        return to_policy.reshape(alpha.shape), to_teacher.reshape(alpha.shape)

    def moved(self, law: Distribution) -> Distribution:
        """Undo the common motion that `of` took off."""
        return law if self.motion is None else Affine(law, *self.motion)


def _as_density(law: Law) -> Distribution:
    """A Gaussian, or a mixture of them, as a law of numbers or of points in the plane."""
    if isinstance(law, Gaussian):
        return GaussianMixture([1.0], [law]) if law.dimension > 1 else as_line(law)
    if isinstance(law, GaussianMixture) and law.dimension == 1:
        return Mixture(law.weights, law.components)
    return law


# ---- SciPy ---------------------------------------------------------------------------------------


def as_law(parent: Parent) -> Law:
    """Read a parent: laws as they are, frozen SciPy distributions as the law that they are.

    Known names become the classes of this module (`scipy.stats.gamma(2, scale=3)` becomes
    `Gamma(2, 1/3)`, a `loc` becomes `Affine`); so do `multivariate_normal`, `dirichlet` and
    `gaussian_kde`. Any other univariate distribution becomes a `Density` through its logpdf or
    logpmf, its support and its quantiles; `multivariate_t` of the plane too. The random variables
    of SciPy's new infrastructure (`scipy.stats.Normal` and the like) are read the same way.

    Raises:
        ValueError: It is none of these, is not frozen, or holds an array of distributions.
    """
    if isinstance(parent, (Distribution, Gaussian)):
        return parent
    kind = type(parent)
    if kind.__module__.startswith("scipy.stats"):
        reader = _SCIPY_MULTIVARIATE.get(kind.__name__)
        if reader is not None:
            return reader(parent)
        if hasattr(parent, "dist") and hasattr(parent, "kwds"):
            return _from_frozen(parent)
        if hasattr(parent, "icdf"):
            return _from_new(parent)
        if hasattr(parent, "_parse_args") and not getattr(parent, "shapes", "unknown"):
            return _from_frozen(parent())
    raise ValueError(
        f"a parent must be a law of qstar.families, a Gaussian or a frozen SciPy distribution: got "
        f"{parent!r}. Freeze a SciPy distribution with its parameters, as in "
        f"scipy.stats.poisson(3.0); wrap a function as qstar.families.Density."
    )


def _from_frozen(frozen: Any) -> Law:
    """A law from a frozen univariate SciPy distribution."""
    names = [name.strip() for name in (frozen.dist.shapes or "").split(",") if name.strip()]
    discrete = not hasattr(frozen.dist, "pdf")
    names += ["loc"] if discrete else ["loc", "scale"]
    given = {"loc": 0.0, "scale": 1.0}
    given |= dict(zip(names, frozen.args, strict=False)) | dict(frozen.kwds)
    for name, value in given.items():
        if np.ndim(value) or not np.isreal(value):
            raise ValueError(
                f"a SciPy parent must be one distribution: {name} of {frozen.dist.name} is "
                f"{value!r}. Make one for each entry."
            )
    numbers = {name: float(value) for name, value in given.items()}
    reader = _SCIPY.get(frozen.dist.name)
    if reader is None:
        low, high = (float(end) for end in frozen.support())
        return _from_functions(
            frozen.logpmf if discrete else frozen.logpdf, frozen.ppf, low, high, discrete
        )
    location, scale = numbers.pop("loc"), numbers.pop("scale")
    return reader(location, scale, **numbers)


def _from_new(variable: Any) -> Law:
    """A law from a random variable of SciPy's new infrastructure."""
    if np.ndim(variable.median()):
        raise ValueError(f"a SciPy parent must be one distribution: got the array {variable!r}.")
    low, high = (float(end) for end in variable.support())
    discrete = any(base.__name__ == "DiscreteDistribution" for base in type(variable).__mro__)
    if type(variable).__name__ == "Normal":
        return Gaussian(float(variable.mean()), float(variable.standard_deviation()) ** 2)
    function = variable.logpmf if discrete else variable.logpdf
    return _from_functions(function, variable.icdf, low, high, discrete)


def _from_functions(
    function: Callable[[ndarray], ndarray],
    quantile: Callable[[ndarray], ndarray],
    low: float,
    high: float,
    discrete: bool,
) -> Density:
    """A Density that looks at the quantiles, each as closely as its neighbour is near."""
    with np.errstate(all="ignore"):
        at = quantile(np.array([1e-3, 0.02, 0.1, 0.25, 0.5, 0.75, 0.9, 0.98, 0.999]))
    at = np.asarray(at)[np.abs(at) < 1e200]  # beyond, a tail is followed in logarithms
    if not len(at):  # nothing is known of where it lies
        at = np.array([min(max(low, 0.0), high)])
    gaps = np.diff(at) if len(at) > 1 else np.zeros(1)
    spread = np.abs(at).max() + 1 if not (gaps > 0).any() else gaps[gaps > 0].min()
    scales = np.maximum(np.minimum(np.append(gaps, gaps[-1]), np.append(gaps[0], gaps)), spread)
    if discrete:
        scales = np.maximum(scales, 1.0)
    places = [(float(place), float(scale)) for place, scale in zip(at, scales, strict=True)]
    kind = {"outcomes": INTEGERS} if discrete else {}
    return Density(function, places, low, high, **kind)  # type: ignore[arg-type]


def _moved(law: Distribution, location: float, scale: float = 1.0) -> Distribution:
    return law if (location, scale) == (0.0, 1.0) else Affine(law, location, scale)


def _circle(location: float, scale: float, kappa: float) -> VonMises:
    if scale != 1:
        raise ValueError(
            f"scipy.stats.vonmises must have scale 1 to be a law on the circle: got {scale}."
        )
    return VonMises(kappa, location)


_SCIPY: dict[str, Callable[..., Law]] = {
    "norm": lambda loc, scale: Gaussian(loc, scale**2),
    "expon": lambda loc, scale: _moved(Exponential(1 / scale), loc),
    "gamma": lambda loc, scale, a: _moved(Gamma(a, 1 / scale), loc),
    "erlang": lambda loc, scale, a: _moved(Gamma(a, 1 / scale), loc),
    "chi2": lambda loc, scale, df: _moved(Gamma(df / 2, 0.5 / scale), loc),
    "beta": lambda loc, scale, a, b: _moved(Beta(a, b), loc, scale),
    "arcsine": lambda loc, scale: _moved(Beta(0.5, 0.5), loc, scale),
    "weibull_min": lambda loc, scale, c: _moved(Weibull(c, scale), loc),
    "rayleigh": lambda loc, scale: _moved(Rayleigh(scale), loc),
    "pareto": lambda loc, scale, b: _moved(Pareto(b, scale), loc),
    "laplace": lambda loc, scale: Laplace(loc, scale),
    "cauchy": lambda loc, scale: Cauchy(loc, scale),
    "t": lambda loc, scale, df: StudentT(df, loc, scale),
    "logistic": lambda loc, scale: Logistic(loc, scale),
    "uniform": lambda loc, scale: Uniform(loc, loc + scale),
    "vonmises": _circle,
    "bernoulli": lambda loc, scale, p: _moved(Bernoulli(p), loc),
    "binom": lambda loc, scale, n, p: _moved(Binomial(int(n), p), loc),
    "poisson": lambda loc, scale, mu: _moved(Poisson(mu), loc),
    "geom": lambda loc, scale, p: _moved(Geometric(p), loc + 1),
    "nbinom": lambda loc, scale, n, p: _moved(NegativeBinomial(n, p), loc),
}


def _from_kde(kde: Any) -> GaussianMixture:
    components = [Gaussian(point, kde.covariance) for point in kde.dataset.T]
    return GaussianMixture(kde.weights, components)


def _from_multivariate_t(frozen: Any) -> Density:
    if len(frozen.loc) != 2:
        raise ValueError(
            f"multivariate_t is integrated in the plane only: got {len(frozen.loc)} dimensions. "
            f"Use qstar.families.montecarlo with its logpdf and rvs."
        )
    place = (frozen.loc, np.sqrt(np.diag(frozen.shape)))
    return Density(frozen.logpdf, [place], outcomes=SPACE)


_SCIPY_MULTIVARIATE: dict[str, Callable[[Any], Law]] = {
    "multivariate_normal_frozen": lambda frozen: Gaussian(frozen.mean, frozen.cov),
    "dirichlet_frozen": lambda frozen: Dirichlet(frozen.alpha),
    "gaussian_kde": _from_kde,
    "multivariate_t_frozen": _from_multivariate_t,
}
