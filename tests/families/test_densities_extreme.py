"""Correct distributions that are hard to integrate: the right value, or an error that is true."""

import math

import mpmath as mp
import numpy as np
import pytest
from scipy import stats

from qstar.families import (
    Affine,
    Beta,
    Binomial,
    Cauchy,
    Density,
    Exponential,
    Gamma,
    Gaussian,
    Geometric,
    Laplace,
    Mixture,
    NegativeBinomial,
    Pareto,
    Poisson,
    StudentT,
    Uniform,
    Weibull,
    geometric_mean,
    kl,
    montecarlo,
    quadrature,
    solve_kl_symmetry,
)
from qstar.families._special import log_beta
from qstar.families.continuous import GaussianLine


def agree(found, expected, *, rel=1e-11):
    assert found.converged
    assert found.status == expected.status
    assert found.alpha == pytest.approx(expected.alpha, abs=1e-11)
    assert found.chernoff == pytest.approx(expected.chernoff, rel=rel)


# ---- 30 digits ---------------------------------------------------------------------------------


def gamma_of_log(shape, rate):
    return lambda y: shape * (y + mp.log(rate)) - rate * mp.exp(y) - mp.loggamma(shape)


def weibull_of_log(shape, scale):
    return lambda y: mp.log(shape) + (p := shape * (y - mp.log(scale))) - mp.exp(p)


def half_student_of_log(freedom, scale):
    constant = mp.log(2) - mp.log(mp.beta(freedom / 2, 0.5)) - mp.log(freedom) / 2 - mp.log(scale)
    return lambda y: (
        constant + y - (freedom + 1) / 2 * mp.log1p(mp.exp(2 * (y - mp.log(scale))) / freedom)
    )


STEPS = [0, 1, 2, 3, 4, 6, 10, 20, 50, 100, 300, 1000, 3000, 12000]
BY_MPMATH = {  # the parents, and the log-densities of their log-distance from zero
    "Gamma, Weibull": (
        *(Gamma(0.01, 1.0), Weibull(0.5, 1.0)),
        *(gamma_of_log(mp.mpf(0.01), 1), weibull_of_log(mp.mpf(0.5), 1)),
        [-s for s in STEPS[:0:-1]] + STEPS[:6],
    ),
    "two Students": (
        *(StudentT(0.01, 0.0, 1.0), StudentT(0.02, 0.0, 3.0)),
        *(half_student_of_log(mp.mpf(0.01), 1), half_student_of_log(mp.mpf(0.02), 3)),
        [-s for s in STEPS[9:0:-1]] + STEPS,
    ),
}


@pytest.mark.parametrize("case", BY_MPMATH.values(), ids=BY_MPMATH)
def test_mass_beyond_the_reach_of_float64_is_integrated_to_30_digits_of_truth(case):
    """A part of either policy lies below 1e-300 or above 1e300."""
    policy, teacher, log_policy, log_teacher, cuts = case
    found = solve_kl_symmetry(policy, teacher)
    assert found.converged
    with mp.workdps(30):
        alpha = mp.mpf(found.alpha)

        def path(y):
            ours, theirs = log_policy(y), log_teacher(y)
            return mp.exp(alpha * ours + (1 - alpha) * theirs) * mp.mpc(1, ours - theirs)

        total = mp.quad(path, cuts)
        assert found.chernoff == pytest.approx(float(-mp.log(total.real)), rel=1e-13)
        assert float(total.imag / total.real / found.curvature) == pytest.approx(0, abs=1e-13)


def test_two_singular_ends_agree_with_the_beta_function_of_mpmath():
    found = solve_kl_symmetry(Beta(0.01, 0.01), Uniform(0.0, 1.0))
    with mp.workdps(40):
        shape = mp.mpf(0.01)

        def log_z(alpha):
            power = alpha * shape + 1 - alpha
            return mp.log(mp.beta(power, power)) - alpha * mp.log(mp.beta(shape, shape))

        def slope(alpha):
            power = alpha * shape + 1 - alpha
            mean = 2 * (mp.digamma(power) - mp.digamma(2 * power))  # of log(x (1 - x))
            return (shape - 1) * mean - mp.log(mp.beta(shape, shape))

        alpha = mp.findroot(slope, (0.7, 0.9), solver="anderson")
        assert found.alpha == pytest.approx(float(alpha), abs=1e-13)
        assert found.chernoff == pytest.approx(float(-log_z(alpha)), rel=1e-13)
    agree(solve_kl_symmetry(Affine(Beta(0.01, 0.01), 5.0, 2.0), Uniform(5.0, 7.0)), found)


LARGE = {  # log-densities where terms of the size of the parameters cancel
    "Gamma": (
        Gamma(1e9, 3.0),
        [1e9 / 3, 1e9 / 3 + 4e4, 1e8, 1e-20],
        lambda x: 1e9 * mp.log(3) + (mp.mpf(1e9) - 1) * mp.log(x) - 3 * x - mp.loggamma(1e9),
    ),
    "Poisson": (
        Poisson(1e9),
        [1e9, 1e9 + 1e5, 0.0, 3.0, 1e7],
        lambda k: k * mp.log(1e9) - 1e9 - mp.loggamma(k + 1),
    ),
    "Binomial": (
        Binomial(10**9, 0.25),
        [2.5e8, 2.5e8 + 3e4, 0.0, 1e9, 5.0],
        lambda k: mp.log(mp.binomial(10**9, k)) + k * mp.log(0.25) + (10**9 - k) * mp.log(0.75),
    ),
    "NegativeBinomial": (
        NegativeBinomial(1e8, 0.5),
        [1e8, 1e8 + 3e4, 0.0, 5.0],
        lambda k: (
            mp.loggamma(k + 1e8) - mp.loggamma(1e8) - mp.loggamma(k + 1) + (1e8 + k) * mp.log(0.5)
        ),
    ),
    "Beta": (
        Beta(1e8, 3e8),
        [0.25, 0.25001, 0.5, 1e-30],
        lambda x: (
            (mp.mpf(1e8) - 1) * mp.log(x)
            + (mp.mpf(3e8) - 1) * mp.log(1 - x)
            - (mp.loggamma(1e8) + mp.loggamma(3e8) - mp.loggamma(4e8))
        ),
    ),
    "StudentT": (
        StudentT(7e5, 0.0, 1.0),
        [0.0, 3.0, 1e4],
        lambda x: (
            mp.loggamma(350000.5)
            - mp.loggamma(350000)
            - mp.log(mp.pi * 700000) / 2
            - mp.mpf(350000.5) * mp.log(1 + x**2 / 700000)
        ),
    ),
}


@pytest.mark.parametrize(("distribution", "points", "reference"), LARGE.values(), ids=LARGE)
def test_large_parameters_leave_the_log_density_its_digits(distribution, points, reference):
    with mp.workdps(50):
        expected = [float(reference(mp.mpf(x))) for x in points]
    # The outcomes are floats: what half a unit of their last place moves is not held against it.
    np.testing.assert_allclose(
        distribution.log_density(np.array(points)), expected, rtol=1e-14, atol=2e-11
    )


@pytest.mark.parametrize(("a", "b"), [(1e9, 0.5), (0.01, 1e7), (3e5, 4e8), (101.0, 1e-6), (2, 3)])
def test_the_log_of_the_beta_function_keeps_its_digits(a, b):
    with mp.workdps(50):
        expected = mp.loggamma(a) + mp.loggamma(b) - mp.loggamma(mp.mpf(a) + mp.mpf(b))
    assert log_beta(a, b) == pytest.approx(float(expected), rel=4e-15)


# ---- Against closed forms ----------------------------------------------------------------------

ONE_FAMILY = {
    "shapes of 1e-4 and 1": (Gamma(1e-4, 1.0), Gamma(1.0, 2.0)),
    "shapes of 1e-12": (Gamma(1e-12, 1.0), Gamma(3e-12, 2.0)),
    "a large and a tiny end": (Beta(1e6, 0.01), Beta(1.0, 1.0)),
    "Weibull of shape 1e-3": (Weibull(1e-3, 1.0), Weibull(1e-3, 5.0)),
    "Pareto of shape 1e-3": (Pareto(1e-3, 2.0), Pareto(2e-3, 2.0)),
    "Gamma of shape 1e9": (Gamma(1e9, 2.0), Gamma(1.0001e9, 2.0)),
    "Beta of 1e7": (Beta(1e7, 1e6), Beta(1.001e7, 1e6)),
    "Poisson of 1e7": (Poisson(1e7), Poisson(1.001e7)),
    "Binomial of 1e6": (Binomial(10**6, 0.3), Binomial(10**6, 0.301)),
    "NegativeBinomial of 1e6": (NegativeBinomial(1e6, 0.3), NegativeBinomial(1e6, 0.301)),
}


@pytest.mark.parametrize("parents", ONE_FAMILY.values(), ids=ONE_FAMILY)
def test_quadrature_agrees_with_the_closed_form_at_the_extremes(parents):
    agree(quadrature.solve_kl_symmetry(*parents), solve_kl_symmetry(*parents))


def test_a_sharp_gamma_is_nearly_its_gaussian():
    """A skewness of 2 / sqrt(shape): C is its square over 48, to first order in 1 / shape."""
    for shape in (1e6, 1e9):
        found = solve_kl_symmetry(Gamma(shape, 1.0), Gaussian(shape, shape))
        assert (found.status, found.converged) == ("interior", True)
        assert found.chernoff == pytest.approx(4 / shape / 48, rel=3 / shape + 1e-8)


MIXED = [[0.5, 0.5], [Beta(0.01, 0.02), Beta(0.3, 0.05)]]
SAME = {  # two ways to say one pair
    "parts of a mixture": (
        (Mixture([0.5, 0.5], [Gamma(1e-5, 2.0)] * 2), Gamma(1e-3, 1.0)),
        (Gamma(1e-5, 2.0), Gamma(1e-3, 1.0)),
    ),
    "a mixture, moved": (
        (Affine(Mixture(*MIXED), 5.0, 2.0), Uniform(5.0, 7.0)),
        (Mixture(*MIXED), Uniform(0.0, 1.0)),
    ),
    "far and narrow": (
        (Gaussian(1e6, 2.0**-80), Laplace(1e6, 2.0**-40)),
        (Gaussian(0.0, 1.0), Laplace(0.0, 1.0)),
    ),
    "far and narrow, heavy tail": (
        (Gaussian(-1e9, 2.0**-60), StudentT(0.05, -1e9, 2.0**-30)),
        (Gaussian(0.0, 1.0), StudentT(0.05, 0.0, 1.0)),
    ),
    "far and narrow, two ends": (
        (Uniform(1e6, 1e6 + 2.0**-30), Affine(Beta(0.05, 0.5), 1e6, 2.0**-30)),
        (Uniform(0.0, 1.0), Beta(0.05, 0.5)),
    ),
    "SciPy's lomax": (
        (stats.lomax(0.01), stats.lomax(0.02)),
        (Pareto(0.01, 1.0), Pareto(0.02, 1.0)),
    ),
    "SciPy's invgamma": (
        (stats.invgamma(0.01), stats.invgamma(0.02)),
        (Gamma(0.01, 1.0), Gamma(0.02, 1.0)),
    ),
    "SciPy's betaprime": (
        (stats.betaprime(0.01, 0.01), stats.betaprime(0.02, 0.3)),
        (Beta(0.01, 0.01), Beta(0.02, 0.3)),
    ),
    "SciPy's genpareto": (
        (stats.genpareto(100.0, scale=100.0), stats.genpareto(50.0, scale=50.0)),
        (Pareto(0.01, 1.0), Pareto(0.02, 1.0)),
    ),
    "SciPy's gamma, moved": (
        (stats.gamma(0.01, loc=0.1, scale=0.3), stats.weibull_min(0.5, loc=0.1)),
        (Gamma(0.01, 1 / 0.3), Weibull(0.5, 1.0)),
    ),
}


@pytest.mark.parametrize(("found", "expected"), SAME.values(), ids=SAME)
def test_a_pair_said_in_another_way_has_the_same_balance(found, expected):
    agree(solve_kl_symmetry(*found), solve_kl_symmetry(*expected))


def test_a_geometric_mean_of_slow_tails_is_a_parent():
    policy, teacher = StudentT(0.01, 0.0, 1.0), StudentT(0.02, 1.0, 3.0)
    q = geometric_mean(policy, teacher, 0.25)
    quarter = quadrature.log_partition(policy, teacher, np.array([0.125, 0.25]))
    half_way = quadrature.log_partition(q, teacher, np.array([0.5]))[0]
    assert half_way == pytest.approx(quarter[0] - 0.5 * quarter[1], rel=1e-10)


def test_divergences_of_slow_tails_are_told_from_infinite_ones():
    assert quadrature.kl(Pareto(1e-3, 1.0), Pareto(2e-3, 1.0)) == pytest.approx(
        kl(Pareto(1e-3, 1.0), Pareto(2e-3, 1.0)), rel=1e-10
    )
    assert kl(StudentT(0.01, 0.0, 1.0), Gaussian(0.0, 1.0)) == math.inf


def test_supports_that_overlap_in_a_last_digit_are_not_disjoint():
    """2^-53 of one parent and of the other: a uniform density there, of both."""
    below = math.nextafter(1.0, 0.0)
    balance = solve_kl_symmetry(Uniform(0.0, 1.0), Uniform(below, 1.0 + below))
    assert (balance.status, balance.converged) == ("degenerate_all", True)
    assert balance.chernoff == pytest.approx(53 * math.log(2), rel=1e-14)
    above = math.nextafter(1.0, 2.0)
    assert solve_kl_symmetry(Uniform(0.0, 1.0), Uniform(above, 2.0)).status == "disjoint"
    one_step = solve_kl_symmetry(Uniform(1.0, above), Uniform(1.0, 2.0))
    assert (one_step.status, one_step.converged) == ("boundary_0", True)
    assert one_step.chernoff == pytest.approx(52 * math.log(2), rel=1e-14)


def test_a_singular_end_that_starts_a_little_later_costs_the_mass_before_it():
    policy = Gamma(0.01, 1.0)
    for start in (1e-20, 1e-200):
        balance = solve_kl_symmetry(policy, Affine(policy, start))
        assert (balance.status, balance.converged) == ("boundary_1", True)
        before = start**0.01 / math.gamma(1.01)  # to first order in the start
        assert balance.chernoff == pytest.approx(-math.log1p(-before), rel=1e-12)


# ---- What cannot be resolved ---------------------------------------------------------------------


def test_a_distribution_of_mass_one_is_not_blamed_for_what_summation_cannot_do():
    for distribution in (
        NegativeBinomial(1e-3, 1e-7),
        Poisson(1e13),
        Affine(Geometric(1e-12), 3.0),
    ):
        with pytest.raises(
            ArithmeticError, match=r"could not resolve.*mass.*not at fault"
        ) as error:
            solve_kl_symmetry(distribution, NegativeBinomial(2.5, 0.3))
        assert "normalise" not in str(error.value).lower()


def test_what_that_error_advises_serves():
    balance = montecarlo.solve_kl_symmetry(
        NegativeBinomial(1e-3, 1e-7),
        NegativeBinomial(2.5, 0.3),
        num_samples=2_000,
        generator=np.random.default_rng(0),
    )
    assert (balance.status, balance.converged) == ("interior", True)


@pytest.mark.parametrize(
    "parents",
    [
        (Gamma(1e-4, 1.0), Weibull(0.5, 1.0)),
        (Beta(0.01, 0.01), Uniform(0.0, 1.0)),
        (Pareto(1e-3, 1.0), Pareto(1e-3, 2.0)),
        (StudentT(1e-3, 0.0, 1.0), Cauchy(0.0, 1.0)),
    ],
)
def test_draws_that_float64_rounds_away_are_no_fault_of_the_distribution(parents):
    with pytest.raises(ArithmeticError, match=r"float64 cannot tell.*qstar\.families"):
        montecarlo.solve_kl_symmetry(
            *parents, num_samples=2_000, generator=np.random.default_rng(0)
        )
    assert solve_kl_symmetry(*parents).converged  # the advice, taken


@pytest.mark.parametrize("frozen", [stats.fisk(0.01), stats.lognorm(500.0)])
def test_a_density_of_the_callers_is_told_both_possibilities(frozen):
    message = "either the policy is not normalised or the quadrature did not resolve it: its mass"
    with pytest.raises(ValueError, match=message):
        solve_kl_symmetry(frozen, Exponential(1.0))
    half = Density(lambda x: -math.log(4) - np.abs(x), [(0.0, 1.0)])
    with pytest.raises(ValueError, match=message + r" came out as 0\.5"):
        solve_kl_symmetry(Mixture([0.5, 0.5], [half, half]), Cauchy(0.0, 1.0))


def test_a_tail_of_the_callers_that_bends_is_flagged_where_the_other_parent_is():
    """log-Cauchy-like: its own mass passes, but nothing is known of it beyond 1e300."""

    def lognormal(x):
        with np.errstate(divide="ignore"):
            log_x = np.log(x)
        return -0.5 * (log_x / 60) ** 2 - log_x - math.log(60) - 0.5 * math.log(2 * math.pi)

    distribution = Density(lognormal, [(1.0, 1.0)], low=0.0)
    assert solve_kl_symmetry(distribution, Exponential(1.0)).converged
    assert not solve_kl_symmetry(distribution, Pareto(1e-3, 1e-9)).converged


def test_points_next_to_a_far_peak_keep_their_distance_from_it():
    distribution = GaussianLine(1e6, 1e-12)
    offset = np.array([-1e-12, 0.0, 3e-12])
    expected = distribution.log_density(1e6) - 0.5 * (offset / 1e-12) ** 2
    np.testing.assert_allclose(distribution.log_density_at(1e6, offset), expected, rtol=1e-14)
