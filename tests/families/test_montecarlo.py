"""Monte Carlo: coverage of the error bars, the effective-sample guarantee, exact rejection."""

import math

import numpy as np
import pytest
from scipy.stats import binom, kstest

from qstar import gaussian
from qstar.families import Affine, Cauchy, Exponential, GaussianMixture, Uniform
from qstar.families import solve_kl_symmetry as solve_exactly
from qstar.families.montecarlo import (
    ENOUGH,
    Sampled,
    draw_sample,
    effective_samples,
    log_partition,
    sample_geometric_mean,
    solve_kl_symmetry,
    solve_sample,
)
from qstar.gaussian import Gaussian

FALSE_ALARM = 1e-9


def gaussians(dimension, gap=0.5, stretch=1.5):
    origin, unit = np.zeros(dimension), np.eye(dimension)
    return Gaussian(origin, unit), Gaussian(origin + gap, stretch * unit)


COVERED = {  # name -> a pair whose answer is known
    "10 dimensions": gaussians(10),
    "40 dimensions": gaussians(40, gap=0.3, stretch=1.2),
    "one, skew": gaussians(1, gap=0.0, stretch=15.0),
}


@pytest.mark.parametrize("pair", COVERED.values(), ids=COVERED)
def test_two_standard_errors_cover_as_often_as_they_say(pair):
    """300 replications of 2,000 draws: how many of the intervals estimate +- 1.96 errors hold the
    truth is Binomial(300, 0.95), if errors are right; outside its central 1 - 1e-9 we fail.

    The control: intervals of half and of twice the width are found out.
    """
    exact = gaussian.solve_kl_symmetry(*pair)
    generator = np.random.default_rng(1)
    found = [solve_kl_symmetry(*pair, num_samples=2_000, generator=generator) for _ in range(300)]
    assert all(balance.converged and balance.status == "interior" for balance in found)
    low, high = binom.interval(1 - FALSE_ALARM, len(found), 0.95)
    for field in ("alpha", "chernoff"):
        error = np.array([getattr(balance, field) for balance in found]) - getattr(exact, field)
        scores = np.abs(error / [getattr(balance, f"{field}_error") for balance in found])
        assert low <= (scores < 1.96).sum() <= high
        assert not low <= (scores < 1.96 / 2).sum() <= high
        assert (scores < 1.96 * 2).mean() > 0.99


def test_close_parents_have_errors_in_proportion_to_their_divergence():
    pair = gaussians(10, gap=1e-3, stretch=1.002)
    exact = gaussian.solve_kl_symmetry(*pair)
    balance = solve_kl_symmetry(*pair, num_samples=4_000, generator=np.random.default_rng(0))
    assert exact.chernoff < 1e-5
    assert balance.chernoff_error < 0.1 * exact.chernoff
    assert abs(balance.chernoff - exact.chernoff) < 6.2 * balance.chernoff_error


def test_one_sample_serves_every_alpha():
    """Convex in alpha, zero at both ends within errors, and the truth within 6.2 errors."""
    pair = gaussians(10)
    sample = draw_sample(*pair, 5_000, generator=np.random.default_rng(2))
    alphas = np.linspace(0, 1, 21)
    estimate = log_partition(sample, alphas)
    assert (np.diff(np.exp(estimate.value), 2) > 0).all()
    truth = gaussian.log_partition(*pair, alphas)
    assert (np.abs(estimate.value - truth) <= 6.2 * estimate.error + 1e-12).all()
    lowest = solve_sample(sample)
    assert -lowest.chernoff <= estimate.value.min()


def test_the_estimate_agrees_with_quadrature_of_mixtures():
    policy = GaussianMixture([0.5, 0.5], [Gaussian(-2.0, 0.5), Gaussian(2.0, 0.5)])
    teacher = GaussianMixture([0.3, 0.7], [Gaussian(-1.0, 1.0), Gaussian(3.0, 0.8)])
    exact = solve_exactly(policy, teacher)
    found = solve_kl_symmetry(
        policy, teacher, num_samples=20_000, generator=np.random.default_rng(3)
    )
    assert abs(found.alpha - exact.alpha) < 6.2 * found.alpha_error
    assert abs(found.chernoff - exact.chernoff) < 6.2 * found.chernoff_error
    assert found.kl_to_policy == found.kl_to_teacher == found.chernoff


@pytest.mark.parametrize("dimension", [1, 5, 20, 80])
def test_the_effective_share_is_at_least_exp_minus_c(dimension):
    """E w^2 <= E w for the mixture at alpha, in every dimension. On the sample itself w <= 1 makes
    Kish's number at least the sum of the weights, always."""
    pair = gaussians(dimension, gap=1.5 / math.sqrt(dimension), stretch=1 + 1 / dimension)
    exact = gaussian.solve_kl_symmetry(*pair)
    sample = draw_sample(
        *pair, 20_000, weight=exact.alpha, generator=np.random.default_rng(dimension)
    )
    at = sample.weight
    mixture = np.logaddexp(math.log(at) + sample.log_policy, math.log1p(-at) + sample.log_teacher)
    w = np.exp(at * sample.log_policy + (1 - at) * sample.log_teacher - mixture)
    assert w.max() <= 1 + 1e-12
    assert effective_samples(sample, at) >= w.sum() * (1 - 1e-12)
    balance = solve_sample(sample)
    assert balance.effective_samples >= balance.effective_floor
    assert balance.effective_floor == pytest.approx(20_000 * math.exp(-exact.chernoff), rel=0.05)


def test_too_few_effective_draws_are_not_called_converged():
    pair = gaussians(50, gap=4.0, stretch=1.2)
    balance = solve_kl_symmetry(*pair, num_samples=3_000, generator=np.random.default_rng(0))
    assert balance.effective_floor < ENOUGH
    assert not balance.converged


PARTIAL = {
    "nested": (Uniform(0, 1), Uniform(0, 2)),
    "half": (Uniform(0, 2), Uniform(1, 3)),
    "apart": (Uniform(0, 1), Uniform(3, 4)),
    "late exponential": (Exponential(1.0), Affine(Exponential(3.0), 1.0)),
}


@pytest.mark.parametrize("pair", PARTIAL.values(), ids=PARTIAL)
def test_partly_shared_supports_have_the_statuses_of_the_core(pair):
    exact = solve_exactly(*pair)
    found = solve_kl_symmetry(*pair, num_samples=10_000, generator=np.random.default_rng(4))
    assert found.status == exact.status
    assert found.alpha == pytest.approx(exact.alpha, nan_ok=True)
    for field in ("chernoff", "kl_to_policy", "kl_to_teacher"):
        value, error = getattr(found, field), getattr(found, f"{field}_error")
        if math.isfinite(getattr(exact, field)):
            assert abs(value - getattr(exact, field)) <= 6.2 * error + 1e-12
        else:
            assert value == math.inf


def test_rejection_draws_exactly_from_the_geometric_mean():
    """Every coordinate and a mixed direction by Kolmogorov-Smirnov; the share kept is Z."""
    policy, teacher = gaussians(3)
    alpha = 0.3
    draws = sample_geometric_mean(
        policy, teacher, alpha, 20_000, generator=np.random.default_rng(5)
    )
    distribution = gaussian.geometric_mean(policy, teacher, alpha)
    assert draws.points.shape == (20_000, 3)
    root = np.linalg.cholesky(distribution.covariance)
    standard = np.linalg.solve(root, (draws.points - distribution.mean).T)
    for values in (*standard, standard.sum(axis=0) / math.sqrt(3)):
        assert kstest(values, "norm").pvalue > FALSE_ALARM / 4
    share = draws.partition
    z = math.exp(gaussian.log_partition(policy, teacher, alpha))
    assert abs(share.value - z) < 6.2 * share.error
    # The control: parents taken for the mean are found out.
    other = np.linalg.solve(root, (policy.sample(20_000, generator=np.random.default_rng(0))).T)
    assert (
        kstest(other[0] - np.linalg.solve(root, distribution.mean)[0], "norm").pvalue < FALSE_ALARM
    )


def test_rejection_serves_heavy_tails_and_partial_supports():
    draws = sample_geometric_mean(
        Uniform(0.0, 1.0), Uniform(0.5, 2.5), 0.5, 5_000, generator=np.random.default_rng(6)
    )
    assert kstest(draws.points, "uniform", args=(0.5, 0.5)).pvalue > FALSE_ALARM
    heavy = sample_geometric_mean(
        Cauchy(0.0, 1.0), Cauchy(0.0, 1.0), 0.5, 5_000, generator=np.random.default_rng(7)
    )
    assert heavy.num_accepted == heavy.num_proposals  # equal parents: everything is kept
    assert kstest(heavy.points, "cauchy").pvalue > FALSE_ALARM


def test_rejection_gives_up_with_its_count():
    policy, teacher = gaussians(50, gap=4.0)
    with pytest.raises(ArithmeticError, match=r"10000 proposals gave 0 of 10 draws"):
        sample_geometric_mean(
            policy, teacher, 0.5, 10, generator=np.random.default_rng(0), max_proposals=10_000
        )


def test_the_same_seed_gives_the_same_estimate():
    pair = gaussians(4)
    one, other = (
        solve_kl_symmetry(*pair, num_samples=500, generator=np.random.default_rng(9))
        for _ in range(2)
    )
    assert one == other


def test_two_functions_make_a_parent():
    policy, teacher = gaussians(2)
    wrapped = Sampled(
        policy.log_density, lambda count, generator: policy.sample(count, generator=generator)
    )
    one, other = (
        solve_kl_symmetry(
            distribution, teacher, num_samples=500, generator=np.random.default_rng(9)
        )
        for distribution in (policy, wrapped)
    )
    assert one == other


def broken(function):
    distribution = Gaussian(0.0, 1.0)
    return Sampled(
        function, lambda count, generator: distribution.sample(count, generator=generator)
    )


REFUSED = [
    (broken(lambda x: x), "must be one number a draw"),
    (broken(lambda x: np.full(len(x), np.nan)), "must be finite or -inf"),
    (broken(lambda x: np.full(len(x), -np.inf)), "of different distributions"),
]


@pytest.mark.parametrize(("policy", "message"), REFUSED)
def test_what_is_refused_says_why(policy, message):
    with pytest.raises(ValueError, match=message):
        solve_kl_symmetry(
            policy, Gaussian(0.0, 1.0), num_samples=100, generator=np.random.default_rng(0)
        )


def test_arguments_out_of_range_are_refused():
    pair, generator = gaussians(1), np.random.default_rng(0)
    with pytest.raises(ValueError, match="at least 10 draws"):
        draw_sample(*pair, 3, generator=generator)
    with pytest.raises(ValueError, match="must lie in"):
        log_partition(draw_sample(*pair, 30, generator=generator), 1.5)
    with pytest.raises(ValueError, match="must lie in"):
        sample_geometric_mean(*pair, -0.1, 5, generator=generator)
