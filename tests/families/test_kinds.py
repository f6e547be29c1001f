"""Every kind of pair and every status, against densities and sums written out again in mpmath.

`data/reference_cases.json` holds a part of the kinds that the theory names. What follows holds the
others, and shares nothing with the package: each density is typed here once more, alpha* is the
root of an integral (or a sum) at 30 digits, and a status follows from the slopes at the two ends.
"""

import math
from functools import cache

import mpmath
import numpy as np
import pytest
import scipy.stats
from mpmath import mpf
from reference import CASES, number

from qstar.families import (
    Affine,
    Bernoulli,
    Beta,
    Binomial,
    Categorical,
    Cauchy,
    Dirichlet,
    Exponential,
    Gamma,
    Gaussian,
    GaussianMixture,
    Geometric,
    Laplace,
    Logistic,
    Mixture,
    NegativeBinomial,
    Pareto,
    Poisson,
    Rayleigh,
    StudentT,
    Uniform,
    VonMises,
    Weibull,
    experts,
    kl,
    solve_kl_symmetry,
)

stats, log, inf = scipy.stats, mpmath.log, mpmath.inf


# ---- Densities, once more --------------------------------------------------------------------


def gaussian(mean, variance):
    m, v = mpf(mean), mpf(variance)
    return lambda x: -((x - m) ** 2) / (2 * v) - log(2 * mpmath.pi * v) / 2


def cauchy(place, scale):
    return lambda x: -log(mpmath.pi * scale * (1 + ((x - place) / mpf(scale)) ** 2))


def student(nu, place, scale):
    nu, s = mpf(nu), mpf(scale)
    front = mpmath.loggamma((nu + 1) / 2) - mpmath.loggamma(nu / 2) - log(nu * mpmath.pi) / 2
    return lambda x: front - log(s) - (nu + 1) / 2 * log(1 + ((x - place) / s) ** 2 / nu)


def laplace(place, scale):
    return lambda x: -abs(x - mpf(place)) / mpf(scale) - log(2 * mpf(scale))


def logistic(place, scale):
    s = mpf(scale)
    return lambda x: -2 * log(2 * mpmath.cosh((x - mpf(place)) / (2 * s))) - log(s)


def gamma(shape, rate, start=0):
    a, b = mpf(shape), mpf(rate)
    return lambda x: a * log(b) - mpmath.loggamma(a) + (a - 1) * log(x - start) - b * (x - start)


def weibull(shape, scale):
    k, s = mpf(shape), mpf(scale)
    return lambda x: log(k / s) + (k - 1) * log(x / s) - (x / s) ** k


def pareto(shape, minimum):
    a, m = mpf(shape), mpf(minimum)
    return lambda x: log(a) + a * log(m) - (a + 1) * log(x)


def beta(a, b):
    front = log(mpmath.beta(a, b))
    return lambda x: (mpf(a) - 1) * log(x) + (mpf(b) - 1) * log(1 - x) - front


def mixture(weights, parts):
    return lambda x: log(sum(mpf(w) * mpmath.exp(part(x)) for w, part in zip(weights, parts)))  # noqa: B905


def poisson(rate):
    return lambda n: n * log(mpf(rate)) - mpf(rate) - mpmath.loggamma(n + 1)


def negative_binomial(r, p):
    r, p = mpf(r), mpf(p)
    return lambda n: (
        mpmath.loggamma(n + r) - mpmath.loggamma(r) - mpmath.loggamma(n + 1)
        + r * log(p) + n * log(1 - p)
    )  # fmt: skip


def binomial(count, p):
    p = mpf(p)
    return lambda n: log(mpmath.binomial(count, n)) + n * log(p) + (count - n) * log(1 - p)


def lognormal(sigma):
    g = gaussian(0, mpf(sigma) ** 2)
    return lambda x: g(log(x)) - log(x)


# ---- Solving, once more ----------------------------------------------------------------------

LINE = [-inf, -20, -8, -3, -1, 0, 1, 3, 8, 20, inf]
HALF = [0, 0.25, 1, 3, 8, 20, inf]


def integral(function, where):
    """Over the intervals between the points of a list, or over the integers of a range."""
    if isinstance(where, range):
        return mpmath.fsum(function(mpf(n)) for n in where)
    return mpmath.quad(function, where, maxdegree=5)


def solve_in_mpmath(log_p, log_r, where):
    """(alpha*, C), the former as the root of E[log p - log r] under p^alpha r^(1 - alpha)."""
    log_p, log_r = cache(log_p), cache(log_r)  # the places are the same for every alpha

    def path(alpha):
        return lambda x: mpmath.exp(alpha * log_p(x) + (1 - alpha) * log_r(x))

    def slope(alpha):
        q = path(alpha)
        return integral(lambda x: (log_p(x) - log_r(x)) * q(x), where)

    alpha = mpmath.findroot(slope, (mpf("0.35"), mpf("0.65")), solver="anderson", tol=1e-16)
    return alpha, -log(integral(path(alpha), where))


HELD_OUT = {  # policy, teacher, their log-densities, where to integrate or sum
    "cauchy, scales": (*(Cauchy(0.0, 1.0), Cauchy(0.5, 4.0), cauchy(0, 1), cauchy(0.5, 4), LINE),),
    "student, other centre": (
        *(StudentT(3.0, 0.0, 1.0), StudentT(3.0, 2.0, 2.0), student(3, 0, 1), student(3, 2, 2)),
        LINE,
    ),
    "student, two freedoms": (
        *(StudentT(2.5, 0.0, 1.0), StudentT(6.0, 1.0, 1.0), student(2.5, 0, 1), student(6, 1, 1)),
        LINE,
    ),
    "logistic, scales": (
        *(Logistic(0.0, 1.0), Logistic(1.0, 2.5), logistic(0, 1), logistic(1, 2.5), LINE),
    ),
    "laplace, places": (
        *(Laplace(0.0, 1.0), Laplace(3.0, 1.0), laplace(0, 1), laplace(3, 1), LINE),
    ),
    "gaussian, logistic": (
        *(Gaussian(0.5, 2.0), Logistic(0.0, 1.0), gaussian(0.5, 2), logistic(0, 1), LINE),
    ),
    "student, laplace": (
        *(StudentT(4.0, 0.0, 1.0), Laplace(1.0, 1.0), student(4, 0, 1), laplace(1, 1), LINE),
    ),
    "gamma, weibull": (
        *(Gamma(2.0, 1.5), Weibull(1.5, 2.0), gamma(2, 1.5), weibull(1.5, 2), HALF),
    ),
    "lognormal (SciPy), gamma": (
        *(stats.lognorm(0.75), Gamma(3.0, 2.0), lognormal(0.75), gamma(3, 2)),
        [0, 0.05, *HALF[1:]],
    ),
    "pareto (SciPy)": (
        *(stats.pareto(3, scale=2), stats.pareto(1.25, scale=2), pareto(3, 2), pareto(1.25, 2)),
        [2, 4, 16, 128, inf],
    ),
    "beta (SciPy), uniform": (
        *(stats.beta(2.5, 4), Uniform(0.0, 1.0), beta(2.5, 4), lambda x: mpf(0)),
        [0, 0.25, 0.5, 0.75, 1],
    ),
    "mixture, laplace": (
        Mixture([0.25, 0.75], [Gaussian(-3.0, 0.5), Gaussian(1.0, 2.0)]),
        Laplace(-1.0, 2.0),
        mixture([0.25, 0.75], [gaussian(-3, 0.5), gaussian(1, 2)]),
        *(laplace(-1, 2), LINE),
    ),
    "poisson, geometric": (
        *(Poisson(3.0), Geometric(0.25), poisson(3), negative_binomial(1, 0.25), range(160)),
    ),
    "negative binomials of two counts": (
        *(NegativeBinomial(2.5, 0.5), NegativeBinomial(6.0, 0.625)),
        *(negative_binomial(2.5, 0.5), negative_binomial(6, 0.625), range(220)),
    ),
    "binomial (SciPy)": (
        *(stats.binom(12, 0.25), stats.binom(12, 0.625), binomial(12, 0.25), binomial(12, 0.625)),
        range(13),
    ),
}


@pytest.mark.parametrize("case", HELD_OUT.values(), ids=HELD_OUT)
def test_kinds_outside_the_reference_file_have_the_digits_of_mpmath(case):
    policy, teacher, log_p, log_r, where = case
    with mpmath.workdps(18):
        mass = integral(lambda x: mpmath.exp(log_p(x)), where)
        assert abs(mass - 1) < 1e-12, "the density typed in this test is not normalised"
        alpha, chernoff = solve_in_mpmath(log_p, log_r, where)
    found = solve_kl_symmetry(policy, teacher)
    assert (found.status, found.converged) == ("interior", True)
    assert found.alpha == pytest.approx(float(alpha), abs=1e-10)
    assert found.chernoff == pytest.approx(float(chernoff), rel=1e-10)
    assert found.kl_to_policy == pytest.approx(float(chernoff), rel=1e-9)
    assert found.kl_to_teacher == pytest.approx(float(chernoff), rel=1e-9)


# ---- Statuses --------------------------------------------------------------------------------

EVERY_DISTRIBUTION = [
    *(Bernoulli(0.3), Binomial(9, 0.3), Poisson(2.5), Geometric(0.2), NegativeBinomial(2.5, 0.4)),
    *(Exponential(0.7), Gamma(2.5, 0.7), Beta(0.4, 3.0), Dirichlet([0.5, 2.0, 7.0])),
    *(VonMises(2.0, 1.0), Laplace(1.0, 2.0), Weibull(1.5, 2.0), Rayleigh(2.0), Pareto(1.5, 2.0)),
    *(Gaussian(1.0, 2.0), Gaussian([0.0, 1.0], np.eye(2)), Categorical([0.2, 0.3, 0.5])),
    *(Cauchy(1.0, 2.0), StudentT(0.7, 1.0, 2.0), Logistic(1.0, 2.0), Uniform(1.0, 2.0)),
    Mixture([0.5, 0.5], [Gaussian(0.0, 1.0), Cauchy(3.0, 0.5)]),
    GaussianMixture([0.4, 0.6], [Gaussian([0.0, 0.0], np.eye(2)), Gaussian([3.0, 0.0], np.eye(2))]),
    *(Affine(Gamma(2.0, 1.0), 1.0, 3.0), stats.pareto(2, scale=3), stats.gumbel_r(1, 2)),
]


@pytest.mark.parametrize(
    "distribution", EVERY_DISTRIBUTION, ids=lambda distribution: type(distribution).__name__
)
def test_a_distribution_against_itself_is_degenerate_in_every_family(distribution):
    found = solve_kl_symmetry(distribution, distribution)
    assert (found.status, found.converged, found.alpha) == ("degenerate_all", True, 0.5)
    assert (found.chernoff, found.kl_to_policy, found.kl_to_teacher) == (0.0, 0.0, 0.0)


MOVED = {  # policy, teacher, their log-densities, the shared support
    "gamma, moved a little": (
        *(Gamma(2.0, 1.0), Affine(Gamma(2.0, 1.0), 1.0), gamma(2, 1), gamma(2, 1, 1)),
        [1, 1.25, 2, 4, 9, 21, inf],
    ),
    "gamma, moved and sharper": (
        *(Gamma(2.0, 1.0), Affine(Gamma(3.0, 4.0), 0.25), gamma(2, 1), gamma(3, 4, 0.25)),
        [0.25, 0.5, 1, 2, 4, 9, 21, inf],
    ),
    "gamma, the teacher first": (
        *(Affine(Gamma(2.0, 1.0), 2.0), Gamma(2.0, 0.5), gamma(2, 1, 2), gamma(2, 0.5)),
        [2, 2.25, 3, 5, 9, 21, inf],
    ),
    "pareto from two minima": (
        *(Pareto(2.0, 1.0), Pareto(6.0, 1.5), pareto(2, 1), pareto(6, 1.5)),
        [1.5, 3, 12, 96, inf],
    ),
    "binomials of two counts": (
        *(Binomial(4, 0.5), Binomial(9, 0.625), binomial(4, 0.5), binomial(9, 0.625)),
        range(5),
    ),
    "binomials, the other way": (
        *(Binomial(9, 0.25), Binomial(4, 0.5), binomial(9, 0.25), binomial(4, 0.5)),
        range(5),
    ),
    "poisson against a count": (
        *(Poisson(1.5), Binomial(6, 0.25), poisson(1.5), binomial(6, 0.25), range(7)),
    ),
    "uniform within a gaussian": (
        *(Uniform(-0.5, 0.5), Gaussian(0.0, 1.0), lambda x: mpf(0), gaussian(0, 1), [-0.5, 0, 0.5]),
    ),
    "uniform around half a gaussian": (
        *(Uniform(-4.0, 4.0), Gaussian(0.0, 1.0), lambda x: -log(8), gaussian(0, 1)),
        [-4, -1, 0, 1, 4],
    ),
}


@pytest.mark.parametrize("case", MOVED.values(), ids=MOVED)
def test_statuses_on_partly_shared_supports_follow_from_the_slopes_at_the_ends(case):
    policy, teacher, log_p, log_r, where = case
    with mpmath.workdps(18):
        p, r = (integral(lambda x, f=f: mpmath.exp(f(x)), where) for f in (log_p, log_r))
        at_0, at_1 = (
            integral(lambda x, f=f: (log_p(x) - log_r(x)) * mpmath.exp(f(x)), where) / mass
            for f, mass in ((log_r, r), (log_p, p))
        )
        if at_0 >= 0:
            expected = "boundary_0", 0.0, float(-log(r))
        elif at_1 <= 0:
            expected = "boundary_1", 1.0, float(-log(p))
        else:
            expected = "interior", *map(float, solve_in_mpmath(log_p, log_r, where))
    found = solve_kl_symmetry(policy, teacher)
    status, alpha, chernoff = expected
    assert (found.status, found.converged) == (status, True)
    assert found.alpha == pytest.approx(alpha, abs=1e-9)
    assert found.chernoff == pytest.approx(chernoff, rel=1e-9)


def test_the_partly_shared_cases_meet_every_status_but_the_trivial_two():
    found = {solve_kl_symmetry(policy, teacher).status for policy, teacher, *_ in MOVED.values()}
    assert found == {"interior", "boundary_0", "boundary_1"}


EDGES = [name for name, case in CASES.items() if case["family"] == "categorical_edge"]


@pytest.mark.parametrize("name", EDGES)
def test_edges_of_rows_come_out_the_same_through_the_families(name):
    case = CASES[name]
    distributions = [
        Categorical([float(x) for x in case["parameters"][end]]) for end in ("p_theta", "p_t")
    ]
    found = solve_kl_symmetry(*distributions)
    assert found.status == case["status"]
    if found.status != "disjoint":
        assert found.chernoff == pytest.approx(number(case["chernoff_information"]), abs=1e-12)
        assert found.alpha == pytest.approx(number(case["alpha_star"]), abs=1e-11)
    for distributions_, key in ((distributions, "kl_theta_t"), (distributions[::-1], "kl_t_theta")):
        assert kl(*distributions_) == pytest.approx(number(case[key]), rel=1e-12, abs=1e-12)


def test_the_edges_have_every_status_that_rows_can_have():
    assert {CASES[name]["status"] for name in EDGES} >= {
        *("interior", "boundary_0", "degenerate_all", "disjoint"),
    }


def test_a_tiny_difference_keeps_its_chernoff_information():
    """The mean of q* of two Bernoullis has a closed form; the parents differ by 2^-24."""
    step = 2.0**-24
    policy, teacher = Bernoulli(0.5), Bernoulli(0.5 + step)
    with mpmath.workdps(40):
        p, r = mpf(1) / 2, mpf(1) / 2 + mpf(step)
        mean = log((1 - r) / (1 - p)) / log(p * (1 - r) / (r * (1 - p)))
        chernoff = mean * log(mean / p) + (1 - mean) * log((1 - mean) / (1 - p))
    assert solve_kl_symmetry(policy, teacher).chernoff == pytest.approx(float(chernoff), rel=1e-12)


def test_a_whole_vocabulary_is_balanced_to_the_last_digits():
    """50,257 outcomes; sums are rounded once, by math.fsum."""
    rng = np.random.default_rng(11)
    rank = np.arange(1, 50_258)
    p, r = rank**-1.1, rng.permutation(rank**-1.3)
    policy, teacher = (Categorical(row / math.fsum(row)) for row in (p, r))
    found = solve_kl_symmetry(policy, teacher)
    log_p, log_r = policy.log_probabilities, teacher.log_probabilities
    path = np.exp(found.alpha * log_p + (1 - found.alpha) * log_r)
    mass, slope = math.fsum(path), math.fsum(path * (log_p - log_r))
    assert found.status == "interior"
    assert found.chernoff == pytest.approx(-math.log(mass), rel=1e-13)
    assert abs(slope / mass) < 1e-12


# ---- Many experts ----------------------------------------------------------------------------


@pytest.mark.parametrize("dimension", [2, 3, 5])
def test_the_corners_of_a_regular_simplex_share_the_weight_equally(dimension):
    corners = np.eye(dimension + 1) - 1 / (dimension + 1)  # in a hyperplane of one dimension more
    centre = experts.solve_minimax([Gaussian(at, np.eye(dimension + 1)) for at in corners])
    np.testing.assert_allclose(centre.weights, 1 / (dimension + 1), atol=1e-9)
    assert centre.chernoff == pytest.approx((1 - 1 / (dimension + 1)) / 2, rel=1e-12)


@pytest.mark.parametrize("count", [3, 4, 7])
def test_experts_who_are_rotations_of_one_row_share_the_weight_equally(count):
    row = np.arange(1.0, count + 1) / (count * (count + 1) / 2)
    rows = np.log([np.roll(row, k) for k in range(count)])
    centre = experts.solve_minimax(rows)
    np.testing.assert_allclose(centre.weights, 1 / count, atol=1e-9)
    # q* is uniform: C is the divergence of the uniform distribution from the row.
    assert centre.chernoff == pytest.approx(-np.log(count) - np.log(row).mean(), rel=1e-12)


# ---- SciPy's ordinary distributions ----------------------------------------------------------


@pytest.mark.parametrize("rho", [0.2, 5.0])
@pytest.mark.parametrize(
    "pair",
    [
        lambda rho: (stats.pareto(rho), stats.pareto(1)),
        lambda rho: (stats.maxwell(), stats.maxwell(scale=math.sqrt(rho))),
        lambda rho: (stats.gumbel_l(), stats.gumbel_l(math.log(rho))),
        lambda rho: (stats.invgamma(2, scale=rho), stats.invgamma(2)),
        lambda rho: (stats.gennorm(4), stats.gennorm(4, scale=rho**0.25)),
        lambda rho: (stats.halfnorm(), stats.halfnorm(scale=math.sqrt(rho))),
        lambda rho: (stats.nakagami(1.5), stats.nakagami(1.5, scale=math.sqrt(rho))),
        lambda rho: (stats.powerlaw(rho), stats.powerlaw(1)),
    ],
)
def test_the_scale_law_holds_for_parents_from_scipy(pair, rho):
    found = solve_kl_symmetry(*pair(rho))
    assert found.converged
    assert found.alpha == pytest.approx(1 / math.log(rho) - 1 / (rho - 1), abs=1e-10)


@pytest.mark.parametrize(("a", "b"), [(0.5, 2.0), (2.0, 0.5), (1.3, 1.3), (3.0, 2.9)])
@pytest.mark.parametrize("ratio", [1.5, 40.0])
def test_the_heavier_side_of_the_logarithm_decides_between_scales(a, b, ratio):
    """Chapter 4: alpha* - 1/2 has the sign of a - b for scales of a beta prime."""
    found = solve_kl_symmetry(stats.betaprime(a, b), stats.betaprime(a, b, scale=ratio))
    assert found.converged
    assert np.sign(round(found.alpha - 0.5, 9)) == np.sign(a - b)


def test_a_law_of_the_plane_turns_around_at_two_degrees_of_freedom():
    narrow, wide = np.eye(2), 9 * np.eye(2)
    alphas = [
        solve_kl_symmetry(
            stats.multivariate_t([0, 0], narrow, df=nu), stats.multivariate_t([0, 0], wide, df=nu)
        ).alpha
        for nu in (1, 2, 4)
    ]
    assert alphas[1] == pytest.approx(0.5, abs=1e-9)
    assert alphas[0] > 0.51 > 0.49 > alphas[2]
