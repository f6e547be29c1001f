"""The rivals of q*: each is best at what it is for, and none beats q* at what q* is for."""

import numpy as np
import pytest
from scipy.special import log_softmax

from qstar import kl, log_geometric_mean, solve_kl_symmetry
from qstar.theory.mixtures import cost, forward_mixture, log_mixture, reverse_mixture

RNG = np.random.default_rng(0)
LOG_P, LOG_R = (log_softmax(3 * RNG.normal(size=(200, 5)), axis=-1) for _ in "pr")


def test_the_cost_of_a_distribution_is_its_four_divergences():
    found = cost(LOG_R, LOG_P, LOG_R)
    np.testing.assert_array_equal(found.to_teacher, 0)
    np.testing.assert_array_equal(found.from_teacher, 0)
    np.testing.assert_array_equal(found.to_policy, kl(LOG_R, LOG_P))
    np.testing.assert_array_equal(found.from_policy, kl(LOG_P, LOG_R))
    np.testing.assert_array_equal(found.worse, kl(LOG_R, LOG_P))


def test_the_balanced_mixtures_balance_what_they_are_for():
    _, log_m = reverse_mixture(LOG_P, LOG_R)
    found = cost(log_m, LOG_P, LOG_R)
    np.testing.assert_allclose(found.to_policy, found.to_teacher, rtol=0, atol=1e-9)
    _, log_m = forward_mixture(LOG_P, LOG_R)
    found = cost(log_m, LOG_P, LOG_R)
    np.testing.assert_allclose(found.from_policy, found.from_teacher, rtol=0, atol=1e-9)
    assert found.worse_forward.max() <= np.log(2)


def test_no_mixture_on_a_grid_is_better_than_the_balanced_ones():
    grid = [log_mixture(LOG_P, LOG_R, np.full(len(LOG_P), w)) for w in np.linspace(0, 1, 41)]
    costs = [cost(log_m, LOG_P, LOG_R) for log_m in grid]
    best = cost(reverse_mixture(LOG_P, LOG_R)[1], LOG_P, LOG_R).worse
    assert (best <= np.min([c.worse for c in costs], axis=0) + 1e-9).all()
    best = cost(forward_mixture(LOG_P, LOG_R)[1], LOG_P, LOG_R).worse_forward
    assert (best <= np.min([c.worse_forward for c in costs], axis=0) + 1e-9).all()


def test_the_forward_centre_obeys_its_own_minimax_bound():
    """max KL(parent || q) >= capacity + KL(centre || q), for any q; the mirror image of q*'s."""
    _, centre = forward_mixture(LOG_P, LOG_R)
    capacity = cost(centre, LOG_P, LOG_R).worse_forward
    challenger = log_softmax(centre + RNG.normal(size=centre.shape), axis=-1)
    worse = cost(challenger, LOG_P, LOG_R).worse_forward
    assert (worse >= capacity + kl(centre, challenger) - 1e-12).all()


def test_every_rival_pays_what_it_strays():
    balance = solve_kl_symmetry(LOG_P, LOG_R)
    log_q = log_geometric_mean(LOG_P, LOG_R, balance.alpha)
    for log_distribution in (
        log_mixture(LOG_P, LOG_R, balance.alpha),
        reverse_mixture(LOG_P, LOG_R)[1],
    ):
        excess = cost(log_distribution, LOG_P, LOG_R).worse - balance.chernoff
        assert (excess >= kl(log_distribution, log_q) - 1e-12).all()
        assert excess.max() > 0.1


def test_with_two_outcomes_the_best_mixture_is_q_star():
    log_p, log_r = LOG_P[:, :2], LOG_R[:, :2]
    log_p, log_r = log_softmax(log_p, axis=-1), log_softmax(log_r, axis=-1)
    log_q = log_geometric_mean(log_p, log_r, solve_kl_symmetry(log_p, log_r).alpha)
    np.testing.assert_allclose(reverse_mixture(log_p, log_r)[1], log_q, rtol=0, atol=1e-7)


def test_shapes_edges_and_refusals():
    row = LOG_P[0]
    weight, log_m = forward_mixture(row, row)
    assert weight.shape == ()
    assert weight == 0.5
    np.testing.assert_allclose(log_m, row, rtol=0, atol=1e-12)
    np.testing.assert_allclose(log_mixture(LOG_P, LOG_R, np.ones(200)), LOG_P, atol=1e-12)
    with pytest.raises(ValueError, match=r"weight on the policy must lie in \[0, 1\]"):
        log_mixture(row, row, 1.5)
    cut = np.array([0.0, -np.inf])
    with pytest.raises(ValueError, match="must have one support"):
        reverse_mixture(np.log([0.5, 0.5]), cut)
    weight, log_m = forward_mixture(np.array([-np.inf, 0.0]), cut)  # disjoint: one whole bit
    assert abs(weight - 0.5) < 1e-12
    np.testing.assert_allclose(np.exp(log_m), 0.5, atol=1e-12)
