"""Reading frozen SciPy distributions as the distributions that they are."""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy import ndarray

from ..gaussian import Gaussian
from .base import INTEGERS, LINE, SPACE, Distribution
from .bounded import Beta, Dirichlet, Uniform, VonMises
from .compounds import Affine, Density, GaussianMixture
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
from .discrete import Bernoulli, Binomial, Geometric, NegativeBinomial, Poisson


def as_distribution(parent: Any) -> Distribution | Gaussian:
    """Read a parent: distributions as they are, SciPy's frozen ones as the one that they are.

    Known names become the classes of `qstar.families` (`scipy.stats.gamma(2, scale=3)` becomes
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
        if kind.__name__ in _MULTIVARIATE:
            return _MULTIVARIATE[kind.__name__](parent)
        if hasattr(parent, "dist") and hasattr(parent, "kwds"):
            return _from_frozen(parent)
        if hasattr(parent, "icdf"):
            return _from_new(parent)
        if hasattr(parent, "_parse_args") and not getattr(parent, "shapes", "unknown"):
            return _from_frozen(parent())
    raise ValueError(
        f"a parent must be a distribution of qstar.families, a Gaussian or a frozen SciPy one: got "
        f"{parent!r}. Freeze a SciPy distribution with its parameters, as in "
        f"scipy.stats.poisson(3.0); wrap a function as qstar.families.Density."
    )


def _from_frozen(frozen: Any) -> Distribution | Gaussian:
    """From a frozen univariate distribution."""
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
    if frozen.dist.name not in _UNIVARIATE:
        log_density = frozen.logpmf if discrete else frozen.logpdf
        return _from_functions(log_density, frozen.ppf, frozen.support(), discrete)
    numbers = {name: float(value) for name, value in given.items()}
    return _UNIVARIATE[frozen.dist.name](numbers.pop("loc"), numbers.pop("scale"), **numbers)


def _from_new(variable: Any) -> Distribution | Gaussian:
    """From a random variable of SciPy's new infrastructure."""
    if np.ndim(variable.median()):
        raise ValueError(f"a SciPy parent must be one distribution: got the array {variable!r}.")
    if type(variable).__name__ == "Normal":
        return Gaussian(float(variable.mean()), float(variable.standard_deviation()) ** 2)
    discrete = any(base.__name__ == "DiscreteDistribution" for base in type(variable).__mro__)
    log_density = variable.logpmf if discrete else variable.logpdf
    return _from_functions(log_density, variable.icdf, variable.support(), discrete)


def _from_functions(
    function: Callable[[ndarray], ndarray],
    quantile: Callable[[ndarray], ndarray],
    support: tuple[float, float],
    discrete: bool,
) -> Density:
    """A Density that looks at the quantiles, each as closely as its neighbour is near."""
    low, high = (float(end) for end in support)
    with np.errstate(all="ignore"):
        at = quantile(np.array([1e-3, 0.02, 0.1, 0.25, 0.5, 0.75, 0.9, 0.98, 0.999]))
    at = np.asarray(at)[np.abs(at) < 1e200]  # beyond, a tail is followed in logarithms
    if not len(at):  # nothing is known of where it lies
        at = np.array([min(max(low, 0.0), high)])
    gaps = np.diff(at) if len(at) > 1 else np.zeros(1)
    spread = np.abs(at).max() + 1 if not (gaps > 0).any() else gaps[gaps > 0].min()
    scales = np.maximum(np.minimum(np.append(gaps, gaps[-1]), np.append(gaps[0], gaps)), spread)
    scales = np.maximum(scales, 1.0) if discrete else scales
    places = list(zip(at.tolist(), scales.tolist(), strict=True))
    return Density(function, places, low, high, INTEGERS if discrete else LINE)


def _moved(distribution: Distribution, location: float, scale: float = 1.0) -> Distribution:
    unmoved = (location, scale) == (0.0, 1.0)
    return distribution if unmoved else Affine(distribution, location, scale)


def _circle(location: float, scale: float, kappa: float) -> VonMises:
    if scale != 1:
        raise ValueError(f"scipy.stats.vonmises must have scale 1, to be a circle: got {scale}.")
    return VonMises(kappa, location)


_UNIVARIATE: dict[str, Callable[..., Distribution | Gaussian]] = {
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
    "laplace": Laplace,
    "cauchy": Cauchy,
    "t": lambda loc, scale, df: StudentT(df, loc, scale),
    "logistic": Logistic,
    "uniform": lambda loc, scale: Uniform(loc, loc + scale),
    "vonmises": _circle,
    "bernoulli": lambda loc, scale, p: _moved(Bernoulli(p), loc),
    "binom": lambda loc, scale, n, p: _moved(Binomial(int(n), p), loc),
    "poisson": lambda loc, scale, mu: _moved(Poisson(mu), loc),
    "geom": lambda loc, scale, p: _moved(Geometric(p), loc + 1),
    "nbinom": lambda loc, scale, n, p: _moved(NegativeBinomial(n, p), loc),
}


def _from_multivariate_t(frozen: Any) -> Density:
    if len(frozen.loc) != 2:
        raise ValueError(
            f"multivariate_t is integrated in the plane only: got {len(frozen.loc)} dimensions. "
            f"Use qstar.families.montecarlo with its logpdf and rvs."
        )
    place = (frozen.loc, np.sqrt(np.diag(frozen.shape)))
    return Density(frozen.logpdf, [place], outcomes=SPACE)


_MULTIVARIATE: dict[str, Callable[[Any], Distribution | Gaussian]] = {
    "multivariate_normal_frozen": lambda frozen: Gaussian(frozen.mean, frozen.cov),
    "dirichlet_frozen": lambda frozen: Dirichlet(frozen.alpha),
    "gaussian_kde": lambda kde: GaussianMixture(
        kde.weights, [Gaussian(x, kde.covariance) for x in kde.dataset.T]
    ),
    "multivariate_t_frozen": _from_multivariate_t,
}
