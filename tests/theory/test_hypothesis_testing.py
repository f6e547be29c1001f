"""The best judge's error: exact, simulated and tilted agree, and fall at the rate C."""

import itertools
import math

import numpy as np
import pytest

from qstar import log_geometric_mean, solve_kl_symmetry
from qstar.theory.hypothesis_testing import log_error, simulate, simulate_tilted

LOG_P, LOG_R = np.log([0.7, 0.2, 0.1]), np.log([0.2, 0.3, 0.5])
BALANCE = solve_kl_symmetry(LOG_P, LOG_R)
SIGMAS = 6.2  # one seed in a billion would fail a correct estimate


@pytest.mark.parametrize("prior", [0.5, 0.9])
@pytest.mark.parametrize("draws", [1, 2, 5])
def test_the_exact_error_sums_over_every_sequence(draws, prior):
    p, r = np.exp(LOG_P), np.exp(LOG_R)
    total = sum(
        min(prior * p[list(x)].prod(), (1 - prior) * r[list(x)].prod())
        for x in itertools.product(range(3), repeat=draws)
    )
    assert abs(log_error(LOG_P, LOG_R, draws, prior=prior) - math.log(total)) < 1e-12


@pytest.mark.parametrize("draws", [1, 7, 20])
def test_simulations_agree_with_the_exact_error(draws):
    exact = math.exp(log_error(LOG_P, LOG_R, draws))
    rng = np.random.default_rng(0)
    found = simulate(LOG_P, LOG_R, draws, 20_000, generator=rng)
    assert abs(found.error - exact) < SIGMAS * found.standard_error
    for alpha in (float(BALANCE.alpha), 0.3):
        tilted = simulate_tilted(LOG_P, LOG_R, alpha, draws, 20_000, generator=rng)
        assert abs(tilted.error - exact) < SIGMAS * tilted.standard_error
        assert tilted.standard_error < found.standard_error or draws == 1


def test_a_judge_who_knows_the_wrong_teacher_is_caught():
    """The negative control of the sampling test."""
    other = np.log([0.3, 0.3, 0.4])
    exact = math.exp(log_error(LOG_P, LOG_R, 7))
    found = simulate(LOG_P, other, 7, 20_000, generator=np.random.default_rng(0))
    assert abs(found.error - exact) > SIGMAS * found.standard_error


def test_the_error_falls_at_the_rate_c_for_every_prior():
    chernoff = float(BALANCE.chernoff)
    for prior in (0.5, 0.99):
        first, second = (log_error(LOG_P, LOG_R, n, prior=prior) for n in (400, 800))
        rate = (first - second) / 400 - math.log(2) / 800  # the factor 1/sqrt(n)
        assert abs(rate - chernoff) < 1e-3
    for n in (1, 10, 100):
        assert log_error(LOG_P, LOG_R, n) <= math.log(0.5) - n * chernoff


def test_what_misleads_the_judge_looks_like_q_star():
    q = np.exp(log_geometric_mean(LOG_P, LOG_R, BALANCE.alpha))
    alpha, rng = float(BALANCE.alpha), np.random.default_rng(1)
    found = simulate_tilted(LOG_P, LOG_R, alpha, 400, 20_000, generator=rng)
    np.testing.assert_allclose(found.misled, q, rtol=0, atol=2e-3)


def test_tokens_of_one_parent_alone_give_it_away():
    with np.errstate(divide="ignore"):
        log_p, log_r = np.log([0.5, 0.5, 0.0]), np.log([0.5, 0.0, 0.5])
    for n in (1, 3):  # the judge errs only if the shared token came every time
        assert abs(log_error(log_p, log_r, n) - math.log(0.5 ** (n + 1))) < 1e-12
    found = simulate(log_p, log_r, 3, 20_000, generator=np.random.default_rng(0))
    assert abs(found.error - 0.5**4) < SIGMAS * found.standard_error
    np.testing.assert_array_equal(found.misled, [1, 0, 0])
    apart = np.array([0.0, -np.inf]), np.array([-np.inf, 0.0])
    assert log_error(*apart, 4) == -math.inf
    none = simulate(*apart, 4, 10, generator=np.random.default_rng(0))
    assert none.error == 0
    assert np.isnan(none.misled).all()
    with pytest.raises(ValueError, match="share no token"):
        simulate_tilted(*apart, 0.5, 4, 10, generator=np.random.default_rng(0))


def test_refusals_say_what_came():
    with pytest.raises(ValueError, match=r"got shape \(2, 3\)"):
        log_error(np.stack([LOG_P, LOG_P]), np.stack([LOG_R, LOG_R]), 3)
    with pytest.raises(ValueError, match="draws must be a whole number, 1 or more: got 0"):
        log_error(LOG_P, LOG_R, 0)
    with pytest.raises(ValueError, match="strictly between 0 and 1: got 1"):
        log_error(LOG_P, LOG_R, 2, prior=1)
    flat = np.full(40, -np.log(40))
    with pytest.raises(ValueError, match="use simulate_tilted"):
        log_error(flat, flat, 50)


@pytest.mark.parametrize("alpha", [-1.0, -1e-9, 1.5, 3.0, math.nan, math.inf])
def test_an_exponent_outside_the_path_between_the_parents_is_refused(alpha):
    """Beyond it the estimate would be biased: Z is above 1 there."""
    with pytest.raises(ValueError, match=r"alpha is the exponent on the policy, in \[0, 1\]"):
        simulate_tilted(LOG_P, LOG_R, alpha, 3, 10, generator=np.random.default_rng(0))


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_the_ends_of_the_path_are_unbiased_too(alpha):
    exact = math.exp(log_error(LOG_P, LOG_R, 2))
    found = simulate_tilted(LOG_P, LOG_R, alpha, 2, 20_000, generator=np.random.default_rng(0))
    assert abs(found.error - exact) < SIGMAS * found.standard_error


@pytest.mark.parametrize("wrong", [0, -1, 1.5, True, None])
def test_what_is_no_count_is_refused(wrong):
    rng = np.random.default_rng(0)
    for draws, trials, name in ((wrong, 10, "draws"), (3, wrong, "trials")):
        with pytest.raises(ValueError, match=f"{name} must be a whole number, 1 or more"):
            simulate(LOG_P, LOG_R, draws, trials, generator=rng)
    two = np.int64(2)
    assert simulate(LOG_P, LOG_R, two, two, generator=rng).error <= 1
    assert log_error(LOG_P, LOG_R, two) == log_error(LOG_P, LOG_R, 2)
