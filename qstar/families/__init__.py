"""q* beyond rows of probabilities: one interface over every pair of parents the book speaks of.

`solve_kl_symmetry(policy, teacher)` takes two distributions and returns the same `qstar.Balance`,
in plain Python values and with the same statuses, whatever they are:

- members of one exponential family (`Bernoulli`, `Binomial`, `Poisson`, `Geometric`,
  `NegativeBinomial`, `Exponential`, `Gamma`, `Beta`, `Dirichlet`, `VonMises`, `Laplace` of one
  location, `Weibull` of one shape, `Rayleigh`, `Pareto` of one minimum), through one root of one
  equation (`qstar.families.exponential`), exact to a few units in the last place;
- two `qstar.gaussian.Gaussian` of any dimension, through `qstar.gaussian`;
- two `Categorical`, through `qstar.solve_kl_symmetry`;
- any two distributions on the line, or on the integers, or in the plane (`Cauchy`, `StudentT`,
  `Logistic`, `Uniform`, `Mixture`, `GaussianMixture`, `Affine`, `Density`, members of different
  families, or of one family that is not exponential in what differs), through quadrature or
  summation (`qstar.families.quadrature`), to about 1e-12 or with `converged` False;
- SciPy's frozen distributions wherever one of these can be read from them.

Beyond two dimensions without a closed form use `qstar.families.montecarlo`, for more than two
parents `qstar.families.experts`. Policy first, teacher second, alpha last; everything in nats.
"""

from types import ModuleType
from typing import Any

from numpy import ndarray
from numpy.typing import ArrayLike

from .. import gaussian
from ..arguments import check_alphas
from ..gaussian import Gaussian
from ..result import Balance
from . import exponential, quadrature
from ._scipy import as_distribution
from .base import Distribution
from .bounded import Beta, Dirichlet, Uniform, VonMises
from .compounds import Affine, Density, GaussianMixture, GeometricMean, Mixture, as_line
from .continuous import (
    Cauchy,
    Exponential,
    Gamma,
    Laplace,
    Logistic,
    Pareto,
    Rayleigh,
    StudentT,
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
    "as_distribution",
    "geometric_mean",
    "kl",
    "kl_gap",
    "kl_to_parents",
    "log_partition",
    "solve_kl_symmetry",
]

Parent = Any
"""A `Distribution`, a `Gaussian`, or a frozen SciPy distribution that `as_distribution` reads."""


def solve_kl_symmetry(policy: Parent, teacher: Parent) -> Balance[float, str, bool]:
    """Find alpha*, at which KL(q* || policy) = KL(q* || teacher).

    Returns:
        A `Balance` of plain Python values, with the statuses of `qstar.solve_kl_symmetry`.
        `converged` is False where a quadrature did not resolve the pair, or a root was not found.

    Raises:
        ValueError: The parents live on different kinds of outcome or in different dimensions, one
            of them cannot be read, or a density that the caller made did not come out with mass
            1: either it is not normalised, or quadrature did not resolve it.
        ArithmeticError: A divergence between members of one exponential family overflows, or a
            distribution that has mass 1 by construction could not be resolved.

    Source: Chernoff (1952); Nielsen (2013), doi:10.1109/LSP.2013.2243726.
    """
    home, ours, theirs, _ = _read(policy, teacher)
    return home.solve_kl_symmetry(ours, theirs)


def log_partition(policy: Parent, teacher: Parent, alpha: ArrayLike) -> ndarray:
    """log Z(alpha), the log of the sum or integral of policy^alpha teacher^(1 - alpha), in nats.

    Convex in alpha and never positive; at alpha 0 and 1 the limit, which is the log of the mass
    that a parent has on the shared support. -inf for disjoint parents.

    Raises:
        ValueError: alpha, of any shape, leaves [0, 1] or is nan; otherwise as `solve_kl_symmetry`.
        ArithmeticError: A quadrature did not converge, or a divergence overflows.
    """
    home, ours, theirs, _ = _read(policy, teacher)
    return home.log_partition(ours, theirs, check_alphas(alpha, allow_nan=False))


def kl_to_parents(policy: Parent, teacher: Parent, alpha: ArrayLike) -> tuple[ndarray, ndarray]:
    """KL(q_alpha || policy) and KL(q_alpha || teacher) along the path, in nats.

    At alpha 0 and 1 one of them is the divergence between the parents (of a parent given the
    shared support, where supports differ), which may be infinite. Arguments and errors are those
    of `log_partition`.

    Raises:
        ValueError: The parents are disjoint, so that there is no q_alpha.
    """
    home, ours, theirs, _ = _read(policy, teacher)
    return home.kl_to_parents(ours, theirs, check_alphas(alpha, allow_nan=False))


def kl_gap(policy: Parent, teacher: Parent, alpha: ArrayLike) -> ndarray:
    """KL(q_alpha || teacher) - KL(q_alpha || policy): the slope of log Z, in nats.

    Arguments and errors are those of `kl_to_parents`.
    """
    home, ours, theirs, _ = _read(policy, teacher)
    at = check_alphas(alpha, allow_nan=False)
    if home is gaussian:
        return gaussian.kl_gap(ours, theirs, at)
    to_policy, to_teacher = home.kl_to_parents(ours, theirs, at)
    return to_teacher - to_policy


def kl(p: Parent, q: Parent) -> float:
    """KL(p || q) in nats: inf where p has mass that q lacks, or where the integral diverges.

    Raises:
        ValueError: As `solve_kl_symmetry`.
        ArithmeticError: The integral did not converge, nor did it clearly diverge.
    """
    home, ours, theirs, _ = _read(p, q)
    return home.kl(ours, theirs)


def geometric_mean(policy: Parent, teacher: Parent, alpha: float) -> Distribution | Gaussian:
    """q_alpha, proportional to policy^alpha teacher^(1 - alpha), as a distribution.

    A member of the family where the parents share one (with the parameters that the path gives
    it), otherwise a `GeometricMean`: a distribution by its `log_density`, `pdf` and `support`, that
    can be a parent again.

    Raises:
        ValueError: alpha is not one number in [0, 1], or the parents are disjoint; otherwise as
            `solve_kl_symmetry`.
        ArithmeticError: A quadrature did not converge.
    """
    home, ours, theirs, motion = _read(policy, teacher)
    at = check_alphas(alpha, allow_nan=False)
    if at.ndim:
        raise ValueError(f"alpha must be one number in [0, 1]: got shape {at.shape}.")
    mean = home.geometric_mean(ours, theirs, float(at))
    return Affine(mean, *motion) if motion else mean


def _read(policy: Parent, teacher: Parent) -> tuple[ModuleType, Any, Any, tuple[float, ...]]:
    """The module that solves the pair, the parents as it takes them, and the (location, scale) of
    a motion that both had and that was taken off."""
    ours, theirs = as_distribution(policy), as_distribution(teacher)
    motion: tuple[float, ...] = ()
    if (
        isinstance(ours, Affine)
        and isinstance(theirs, Affine)
        and (ours.location, ours.scale) == (theirs.location, theirs.scale)
    ):
        motion, ours, theirs = (ours.location, ours.scale), ours.base, theirs.base
    if isinstance(ours, Gaussian) and isinstance(theirs, Gaussian):
        return gaussian, ours, theirs, motion
    ours, theirs = _as_density(ours), _as_density(theirs)
    for one in (ours, ours._general()):
        for other in (theirs, theirs._general()):
            if exponential.same_family(one, other):
                return exponential, one, other, motion
    return quadrature, ours, theirs, motion


def _as_density(parent: Distribution | Gaussian) -> Distribution:
    """A Gaussian, or a mixture of them, as a distribution of numbers or of points in the plane."""
    if isinstance(parent, Gaussian):
        return GaussianMixture([1.0], [parent]) if parent.dimension > 1 else as_line(parent)
    if isinstance(parent, GaussianMixture) and parent.dimension == 1:
        return Mixture(parent.weights, parent.components)
    return parent
