"""An independent public implementation of alpha* agrees: pyBregMan 0.1.1.

It bisects the difference of two Bregman divergences, from generators that autograd differentiates.
`pip install --no-deps pyBregMan autograd` makes these tests run. Its own `dissimilarity()` is not
the Chernoff information (it divides by alpha (1 - alpha)), so only the point is compared.
"""

import numpy as np
import pytest
from reference import CASES
from reference_distributions import NAMES, pair

from qstar.families import solve_kl_symmetry

pytest.importorskip(
    "bregman",
    reason="pyBregMan is not installed: pip install --no-deps pyBregMan autograd",
    exc_type=ImportError,
)

import autograd.numpy as anp
from autograd.scipy.special import gammaln
from bregman.application.distribution.exponential_family.gaussian import (
    GaussianManifold,
)
from bregman.application.distribution.exponential_family.multinomial import (
    MultinomialManifold,
)
from bregman.base import LAMBDA_COORDS, THETA_COORDS, Point
from bregman.dissimilarity.bregman import ChernoffInformation
from bregman.manifold.generator import AutoDiffGenerator
from bregman.manifold.manifold import BregmanManifold

# Its divergences are differences of numbers of order one: where they are tiny it sees noise.
TOO_CLOSE = {"g1_near_identical", "g1_near_identical_1e-8"}
TOLERANCE = 1e-10


class Generator(AutoDiffGenerator):
    """A log-normaliser that autograd can differentiate."""

    def __init__(self, dimension, function):
        super().__init__(dimension)
        self.function = function

    def _F(self, x):  # noqa: N802
        return self.function(x)


def log_beta(c):
    return anp.sum(gammaln(c)) - gammaln(anp.sum(c))


GENERATORS = {  # family -> (natural parameters, log-normaliser)
    "poisson": (lambda distribution: [np.log(distribution.rate)], lambda e: anp.sum(anp.exp(e))),
    "geometric": (
        lambda distribution: [np.log1p(-distribution.probability)],
        lambda e: -anp.sum(anp.log(1 - anp.exp(e))),
    ),
    "gamma": (
        lambda distribution: [distribution.shape, distribution.rate],
        lambda e: gammaln(e[0]) - e[0] * anp.log(e[1]),
    ),
    "beta": (lambda distribution: [distribution.a, distribution.b], log_beta),
    "dirichlet": (lambda distribution: distribution.concentration, log_beta),
    "rayleigh": (lambda distribution: [distribution.scale**-2], lambda e: -anp.sum(anp.log(e))),
    "pareto": (lambda distribution: [distribution.shape], lambda e: -anp.sum(anp.log(e))),
}
GENERATORS["exponential"] = GENERATORS["gamma"]


def chernoff_point(manifold, coordinates, points):
    ours, theirs = (Point(coordinates, np.asarray(point, dtype=float)) for point in points)
    return ChernoffInformation(manifold).chernoff_point(ours, theirs, eps=1e-13)


def names_of(*families):
    return [name for name in NAMES if CASES[name]["family"] in families and name not in TOO_CLOSE]


@pytest.mark.parametrize("name", names_of(*GENERATORS))
def test_bregman_bisection_finds_the_same_alpha(name):
    natural, log_normaliser = GENERATORS[CASES[name]["family"]]
    distributions = pair(name)
    points = [np.array(natural(distribution), dtype=float) for distribution in distributions]
    manifold = BregmanManifold(Generator(len(points[0]), log_normaliser), None, len(points[0]))
    theirs = chernoff_point(manifold, THETA_COORDS, points)
    assert solve_kl_symmetry(*distributions).alpha == pytest.approx(theirs, abs=TOLERANCE)


@pytest.mark.parametrize("name", names_of("gaussian_1d", "gaussian_2d", "gaussian_nd"))
def test_gaussian_manifold_finds_the_same_alpha(name):
    distributions = pair(name)
    points = [
        np.concatenate([distribution.mean, distribution.covariance.ravel()])
        for distribution in distributions
    ]
    theirs = chernoff_point(GaussianManifold(distributions[0].dimension), LAMBDA_COORDS, points)
    assert solve_kl_symmetry(*distributions).alpha == pytest.approx(theirs, abs=TOLERANCE)


@pytest.mark.parametrize("name", names_of("bernoulli", "binomial"))
def test_multinomial_manifold_finds_the_same_alpha(name):
    distributions = pair(name)
    points = [
        (distribution.probability, 1 - distribution.probability) for distribution in distributions
    ]
    manifold = MultinomialManifold(k=2, n=getattr(distributions[0], "trials", 1))
    theirs = chernoff_point(manifold, LAMBDA_COORDS, points)
    assert solve_kl_symmetry(*distributions).alpha == pytest.approx(theirs, abs=TOLERANCE)
