"""What is known of alpha* without solving for it: no pair breaks it, and some attain it."""

import mpmath
import numpy as np
import pytest
from scipy.optimize import brentq
from scipy.special import log_softmax

from qstar import families, kl, log_geometric_mean, log_partition, solve_kl_symmetry
from qstar.gaussian import Gaussian
from qstar.theory.bounds import (
    contamination_limit,
    derivative_bounds,
    fixed_exponent_bound,
    largest_chernoff,
    local_law,
    range_bound,
    range_extremal_pair,
    widest_range,
)


def random_pairs(*, rows=3000, vocab=6, seed=0):
    """Rows from almost equal to almost disjoint."""
    rng = np.random.default_rng(seed)
    scales = 10 ** rng.uniform(-2, 1.3, size=(rows, 1))
    return [log_softmax(scales * rng.standard_t(3, size=(rows, vocab)), axis=-1) for _ in "pr"]


@pytest.mark.parametrize("seed", range(3))
def test_no_pair_breaks_the_derivative_bounds(seed):
    log_p, log_r = random_pairs(seed=seed)
    found, there, back = solve_kl_symmetry(log_p, log_r), kl(log_p, log_r), kl(log_r, log_p)
    low, high = derivative_bounds(found.chernoff, there, back)
    assert (low <= found.alpha + 1e-9).all()
    assert (found.alpha <= high + 1e-9).all()
    assert (found.chernoff <= largest_chernoff(there, back) * (1 + 1e-9)).all()
    assert low.max() > 0.4  # the bounds say something
    assert high.min() < 0.6


def test_derivative_bounds_at_the_edge():
    np.testing.assert_array_equal(derivative_bounds(1.0, np.inf, np.inf), (0, 1))
    np.testing.assert_array_equal(largest_chernoff([np.inf, 0.0, 2.0], [3.0, 1.0, 2.0]), [3, 0, 1])
    assert np.isnan(derivative_bounds(0.0, 0.0, 0.0)).all()
    with pytest.raises(ValueError, match=r"at most 1 nats: got 1\.5"):
        derivative_bounds(1.5, 2.0, 2.0)
    with pytest.raises(ValueError, match="policy_to_teacher is never negative: got -1"):
        largest_chernoff(-1.0, 2.0)


@pytest.mark.parametrize("seed", range(3))
def test_no_pair_breaks_the_range_bound(seed):
    log_p, log_r = random_pairs(seed=seed)
    reach = range_bound(np.ptp(log_p - log_r, axis=-1)) - 0.5
    used = np.abs(solve_kl_symmetry(log_p, log_r).alpha - 0.5) / reach
    assert used.max() < 1 + 1e-9
    assert used.max() > 0.5


@pytest.mark.parametrize("log_ratio_range", [0.5, 3, 10, 20])
def test_rare_coins_attain_the_range_bound(log_ratio_range):
    bound = float(range_bound(log_ratio_range))
    alphas = [
        float(solve_kl_symmetry(*range_extremal_pair(log_ratio_range, rarity)).alpha)
        for rarity in np.exp(-log_ratio_range) * np.array([1e-1, 1e-3, 1e-6])
    ]
    assert alphas == sorted(alphas)
    assert alphas[-1] <= bound + 1e-9
    assert bound - alphas[-1] < 1e-5
    log_p, log_r = range_extremal_pair(log_ratio_range, 1e-3)
    np.testing.assert_allclose(np.ptp(log_p - log_r), log_ratio_range, rtol=0, atol=1e-12)
    mirrored = solve_kl_symmetry(log_r, log_p).alpha
    assert 1 - mirrored <= bound + 1e-9


@pytest.mark.parametrize("r", ["1e-8", "0.099", "0.101", "1", "30", "700", "1e5"])
def test_range_bound_against_forty_digits(r):
    with mpmath.workdps(40):
        x = mpmath.mpf(r)
        exact = float(mpmath.log(mpmath.expm1(x) / x) / x)
    assert abs(range_bound(float(r)) - exact) < 1e-14


def test_range_bound_at_the_ends_and_its_inverse():
    np.testing.assert_array_equal(range_bound([0.0, np.inf]), [0.5, 1.0])
    assert np.isnan(range_bound(np.nan))
    ends = np.array([0.5, 0.5001, 0.7, 0.9, 0.999])
    np.testing.assert_allclose(range_bound(widest_range(ends)), ends, rtol=0, atol=1e-12)
    assert widest_range(0.5) == 0
    with pytest.raises(ValueError, match=r"must lie in \[0.5, 0.999\]: got 0.3"):
        widest_range(0.3)
    with pytest.raises(ValueError, match="log_ratio_range is never negative"):
        range_bound(-1.0)
    with pytest.raises(ValueError, match="rarity must be positive and finite: got 0"):
        range_extremal_pair(1.0, 0)


def test_the_local_law_errs_at_third_order():
    rng = np.random.default_rng(1)
    middle, direction = rng.normal(size=7), rng.normal(size=7) ** 3
    errors = []
    for scale in (0.4, 0.2, 0.1):
        pair = [log_softmax(middle + s * scale * direction, axis=-1) for s in (0.5, -0.5)]
        errors.append(abs(float(local_law(*pair) - solve_kl_symmetry(*pair).alpha)))
    orders = np.log2(np.divide(errors[:-1], errors[1:]))
    np.testing.assert_allclose(orders, 3, atol=0.1)
    assert local_law(middle - np.log(np.exp(middle).sum()), log_softmax(middle)) == 0.5


@pytest.mark.parametrize("alpha", [0.2, 0.5, 0.7])
def test_a_fixed_exponent_costs_at_most_its_bound(alpha):
    log_p, log_r = random_pairs()
    log_q = log_geometric_mean(log_p, log_r, np.full(len(log_p), alpha))
    worse = np.maximum(kl(log_q, log_p), kl(log_q, log_r))
    chernoff = solve_kl_symmetry(log_p, log_r).chernoff
    assert (worse <= fixed_exponent_bound(chernoff, alpha) * (1 + 1e-9)).all()


def test_the_bound_on_one_half_is_sharp():
    """Two lines of log Z that cross just below 1/2: the exponent one half is the policy already."""
    steep = 800.0
    log_p = np.array([np.log1p(-np.exp(-1.05 * steep)), -1.05 * steep])
    log_r = np.array([-steep, np.log1p(-np.exp(-steep))])
    log_q = log_geometric_mean(log_p, log_r, 0.5)
    chernoff = float(solve_kl_symmetry(log_p, log_r).chernoff)
    worse = max(kl(log_q, log_p), kl(log_q, log_r))
    assert 1.9 < worse / chernoff < 2
    gain = log_partition(log_p, log_r, 0.5) + chernoff  # KL(q* || q_1/2)
    assert gain < chernoff / 2


def test_a_fixed_exponent_must_lie_inside():
    with pytest.raises(ValueError, match="strictly between 0 and 1: got 1"):
        fixed_exponent_bound(1.0, 1.0)


def contaminated(variance, epsilon):
    """alpha* of (1 - e) N(0, 1) + e N(0, variance) against N(0, 1), by a sum that keeps e^2."""
    x, step = np.linspace(-20, 20, 20_001, retstep=True)
    w = epsilon * (np.exp((1 - 1 / variance) / 2 * x**2) / np.sqrt(variance) - 1)
    log_w = np.log1p(w)
    tail = np.where(np.abs(w) < 1e-4, -(w**2) / 2 + w**3 / 3 - w**4 / 4, log_w - w)
    weight = step * np.exp(-(x**2) / 2) / np.sqrt(2 * np.pi)
    return brentq(lambda a: weight @ (np.expm1(a * log_w) * log_w + tail), 0.01, 0.99)


def test_a_contaminated_gaussian_nears_its_limit_and_not_one_half():
    """The slowly varying factor is a power of a logarithm: slow, but on its way."""
    limit = float(contamination_limit(4 / 3))
    ends = [contaminated(4, epsilon) for epsilon in (1e-2, 1e-8, 1e-40)]
    np.testing.assert_allclose(ends, [0.6149, 0.6229, 0.6285], rtol=0, atol=5e-5)
    assert ends == sorted(ends)
    assert ends[-1] < limit < 0.6304
    blend = families.Mixture([0.99, 0.01], [Gaussian(0.0, 1.0), Gaussian(0.0, 4.0)])
    by_solver = families.solve_kl_symmetry(blend, Gaussian(0.0, 1.0)).alpha
    assert by_solver == pytest.approx(ends[0], abs=1e-9)
    light = [abs(contaminated(1.5, epsilon) - 0.5) for epsilon in (1e-2, 1e-8)]
    assert light[1] < light[0] / 3  # a variance below 2: bulk outweighs tail, back to one half
    assert light[1] < 0.02


@pytest.mark.parametrize("index", [1.001, 1.2, 4 / 3, 1.7, 1.999])
def test_the_limit_of_a_contamination_is_the_least_of_its_gamma_ratio(index):
    with mpmath.workdps(30):

        def log_ratio(a):
            return mpmath.log(-mpmath.gamma(index - a) / mpmath.gamma(-a))

        at = mpmath.mpf(float(contamination_limit(index)))
        assert abs(mpmath.diff(log_ratio, at)) < 1e-9
    assert 0.5 < at < 1


def test_a_contamination_of_light_tails_ends_at_one_half():
    np.testing.assert_array_equal(contamination_limit([2.0, 3.0, np.inf]), 0.5)
    np.testing.assert_allclose(contamination_limit(1.999999), 0.5, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="must be above 1: got 1"):
        contamination_limit(1.0)
