"""Acceptance follows the pair: bounds through C that are sharp, and none through alpha*."""

import numpy as np
import pytest
import torch
from scipy.optimize import linprog, minimize_scalar
from scipy.special import log_softmax, rel_entr
from scipy.stats import norm

from qstar import acceptance_probability, kl, log_geometric_mean, solve_kl_symmetry, total_variation
from qstar.sampling.enumeration import (
    mended_loop,
    patched_loop,
    pick_distribution,
    token_distribution,
)
from qstar.sampling.picks import accept_or_redraw, draw_candidates, source_loop
from qstar.theory.acceptance import (
    bretagnolle_huber_acceptance_bound,
    pair_at,
    pair_with,
    pinsker_acceptance_bound,
    sharpest_acceptance_bound,
    source_loop_distribution,
    teacher_for,
    tightest_pair,
    tokens_per_round,
)


def random_pairs(count=4000, seed=0):
    """Pairs from alike to far apart, in vocabularies of 2 to 8."""
    rng = np.random.default_rng(seed)
    for vocab in range(2, 9):
        scale = 10 ** rng.uniform(-2, 1.2, size=(count // 7, 1))
        yield [log_softmax(scale * rng.normal(size=(count // 7, vocab)), axis=-1) for _ in range(2)]


def solved(log_policy, log_teacher):
    balance = solve_kl_symmetry(log_policy, log_teacher)
    return balance, log_geometric_mean(log_policy, log_teacher, balance.alpha)


def test_no_pair_accepts_less_than_the_bounds_say():
    closest = np.inf
    for log_policy, log_teacher in random_pairs():
        balance, log_q = solved(log_policy, log_teacher)
        for log_draft in (log_policy, log_teacher):
            accepted = acceptance_probability(log_draft, log_q)
            sharp = sharpest_acceptance_bound(balance.chernoff)
            assert (accepted >= sharp - 1e-12).all()
            assert (sharp >= pinsker_acceptance_bound(balance.chernoff) - 1e-12).all()
            assert (sharp >= bretagnolle_huber_acceptance_bound(balance.chernoff) - 1e-12).all()
            closest = min(closest, (accepted - sharp)[balance.chernoff > 0.1].min())
    assert closest < 0.01, "random pairs come near the bound: a larger one would be caught"


@pytest.mark.parametrize("chernoff", [1e-9, 1e-4, 0.01, 0.1, 0.5, 1.0, 2.0, 3.0])
def test_the_sharp_bound_is_attained(chernoff):
    log_policy, log_teacher = tightest_pair(chernoff)
    balance, log_q = solved(log_policy, log_teacher)
    assert balance.status == "interior"
    assert abs(balance.chernoff - chernoff) < 1e-12
    accepted = acceptance_probability(log_policy, log_q)
    assert abs(accepted - sharpest_acceptance_bound(chernoff)) < 1e-11


@pytest.mark.parametrize("chernoff", [0.01, 0.1, 0.23407614906312558, 0.5, 1.0, 2.0, 3.0])
def test_the_sharp_bound_agrees_with_a_search_over_coins(chernoff):
    variation = 1 - float(sharpest_acceptance_bound(chernoff))
    least = minimize_scalar(
        lambda b: rel_entr(b + variation, b) + rel_entr(1 - b - variation, 1 - b),
        bounds=(1e-12, 1 - variation - 1e-12),
        method="bounded",
        options={"xatol": 1e-12},
    )
    assert abs(least.fun - chernoff) < 1e-7


def test_the_sharp_bound_has_its_limits_and_refuses_nonsense():
    bound = sharpest_acceptance_bound([0.0, 700.0, np.inf, np.nan])
    np.testing.assert_allclose(bound, [1.0, np.exp(-700.0), 0.0, np.nan], rtol=1e-12, atol=0)
    grid = np.geomspace(1e-13, 100, 2001)
    assert (np.diff(sharpest_acceptance_bound(grid)) < 0).all()
    with pytest.raises(ValueError, match=r"never negative: got -1\.0 nats"):
        sharpest_acceptance_bound([1.0, -1.0])
    with pytest.raises(ValueError, match=r"in \[1e-10, 3\] nats: got 4"):
        tightest_pair(4)


@pytest.mark.parametrize("chernoff", [0.01, 0.3, 2.0])
@pytest.mark.parametrize("share", [0.001, 0.3, 0.7, 0.95])
def test_every_acceptance_above_the_bound_occurs_at_a_given_chernoff_information(chernoff, share):
    bound = float(sharpest_acceptance_bound(chernoff))
    acceptance = bound + share * (1 - bound)
    log_policy, log_teacher = pair_at(chernoff, acceptance)
    balance, log_q = solved(log_policy, log_teacher)
    assert balance.status == "interior"
    assert abs(balance.chernoff - chernoff) < 1e-9
    assert abs(acceptance_probability(log_policy, log_q) - acceptance) < 1e-9
    with pytest.raises(ValueError, match="the acceptance must lie above"):
        pair_at(chernoff, bound - 1e-6)


def test_no_exact_rule_accepts_a_draft_more_often_than_one_minus_the_total_variation():
    """The best of all couplings of draft and output, by linear programming."""
    rng = np.random.default_rng(3)
    for _ in range(20):
        log_draft, log_target = log_softmax(2 * rng.normal(size=(2, 4)), axis=-1)
        rows = np.kron(np.eye(4), np.ones(4))  # what is drafted follows the draft
        columns = np.kron(np.ones(4), np.eye(4))  # what comes out follows the target
        best = linprog(
            -np.eye(4).ravel(),
            A_eq=np.vstack([rows, columns]),
            b_eq=np.exp(np.concatenate([log_draft, log_target])),
        )
        assert best.success
        accepted = float(acceptance_probability(log_draft, log_target))
        assert abs(-best.fun - accepted) < 1e-8
        assert np.exp(-(log_target - log_draft).max()) <= accepted + 1e-12  # von Neumann's 1/M


@pytest.mark.parametrize("alpha", [0.05, 0.2, 0.3, 0.5, 0.50002, 0.7, 0.95])
@pytest.mark.parametrize("acceptance", [0.01, 0.1, 0.5, 0.9, 0.99])
def test_every_alpha_goes_with_every_acceptance(alpha, acceptance):
    log_policy, log_teacher = pair_with(alpha, acceptance)
    balance, log_q = solved(log_policy, log_teacher)
    assert balance.status == "interior"
    assert abs(balance.alpha - alpha) < 1e-9
    assert abs(acceptance_probability(log_policy, log_q) - acceptance) < 1e-9


def test_pairs_outside_the_range_are_refused():
    with pytest.raises(ValueError, match=r"alpha must lie in \[0\.05, 0\.95\]: got 0\.99"):
        pair_with(0.99, 0.5)
    with pytest.raises(ValueError, match=r"acceptance must lie in \[0\.01, 0\.99\]: got 1"):
        pair_with(0.5, 1)


def test_any_distribution_is_the_q_star_of_any_draft_and_some_teacher():
    rng = np.random.default_rng(1)
    for _ in range(300):
        vocab = int(rng.integers(2, 9))
        log_policy, log_target = log_softmax(
            10 ** rng.uniform(-1, 0.7) * rng.normal(size=(2, vocab)), axis=-1
        )
        log_teacher, alpha = teacher_for(log_policy, log_target)
        balance, log_q = solved(log_policy, log_teacher)
        assert balance.status == "interior"
        assert total_variation(log_q, log_target) < 1e-9
        at_alpha = log_geometric_mean(log_policy, log_teacher, alpha)
        assert total_variation(at_alpha, log_target) < 1e-12
        assert abs(balance.chernoff - kl(log_target, log_policy)) < 1e-9


def test_a_target_without_a_teacher_of_its_own_is_refused():
    distribution = np.log([0.5, 0.3, 0.2])
    with pytest.raises(ValueError, match="must not be constant"):
        teacher_for(distribution, distribution)
    with np.errstate(divide="ignore"):
        smaller = np.log([0.5, 0.5, 0.0])
    with pytest.raises(ValueError, match="no mass where the policy has none"):
        teacher_for(smaller, distribution)
    log_teacher, _ = teacher_for(distribution, smaller)  # a smaller support is fine
    assert np.isneginf(log_teacher[2])


def test_drafting_for_q_star_is_never_worse_than_drafting_for_the_other_parent():
    least = np.inf
    for log_policy, log_teacher in random_pairs(seed=2):
        balance, log_q = solved(log_policy, log_teacher)
        between = 1 - total_variation(log_policy, log_teacher)
        for log_draft in (log_policy, log_teacher):
            gain = acceptance_probability(log_draft, log_q) - between
            assert (gain >= -1e-12).all()
            least = min(least, gain.min())
            for alpha in (0.1, 0.3, 0.9):  # a fixed exponent too
                log_fixed = log_geometric_mean(log_policy, log_teacher, alpha)
                gain = acceptance_probability(log_draft, log_fixed) - between
                assert (gain >= -1e-12).all()
        low = np.minimum(log_policy, log_teacher) + balance.chernoff[:, None]
        high = np.maximum(log_policy, log_teacher) + balance.chernoff[:, None]
        assert (low <= log_q + 1e-9).all()
        assert (log_q <= high + 1e-9).all()
    assert least < 1e-3, "the inequality is nearly tight: a stronger one would be caught"


def test_equal_covariance_gaussians_accept_by_their_distance_at_alpha_one_half():
    """alpha* = 1/2 for every distance, and acceptance 2 Phi(-sqrt(C/2)) takes every value."""
    x = np.linspace(-30, 30, 120_001)
    for distance in (0.5, 2.0, 4.0):
        log_policy, log_teacher = (
            log_softmax(-0.5 * (x - mean) ** 2) for mean in (-distance / 2, distance / 2)
        )
        balance, log_q = solved(log_policy, log_teacher)
        assert abs(balance.alpha - 0.5) < 1e-9
        assert abs(balance.chernoff - distance**2 / 8) < 1e-9
        expected = 2 * norm.cdf(-np.sqrt(balance.chernoff / 2))
        assert abs(acceptance_probability(log_policy, log_q) - expected) < 1e-6


def test_the_bias_of_the_source_loop_grows_with_the_candidates():
    log_policy, log_teacher = np.log([[0.7, 0.2, 0.1], [0.2, 0.3, 0.5]])
    _, log_q = solved(log_policy, log_teacher)
    q = np.exp(log_q)
    bias = [
        0.5 * np.abs(source_loop_distribution(log_policy, log_q, k) - q).sum()
        for k in (0, 1, 2, 3, 4, 99)
    ]
    expected = [0, 0.1145, 0.1443, 0.1520, 0.1540, 0.1548]  # theory, to four decimals
    np.testing.assert_allclose(bias, expected, rtol=0, atol=5.1e-5)
    shared = np.minimum(np.exp(log_policy), q)
    assert abs(bias[-1] - 0.5 * np.abs(shared / shared.sum() - q).sum()) < 1e-12
    with np.errstate(divide="ignore"), pytest.raises(ValueError, match="share no outcome"):
        source_loop_distribution(np.log([1.0, 0.0]), np.log([0.0, 1.0]), 2)


def mended_distribution(loop, log_draft, log_target, num_candidates):
    """The distribution of a mended loop, by following every branch of it."""
    draft, target = torch.tensor(np.exp([log_draft, log_target]))
    return token_distribution(
        lambda chance: loop(
            draw_candidates(draft.log(), num_candidates, replacement=True, generator=chance),
            draft,
            target,
            chance,
        ),
        len(log_draft),
    )


@pytest.fixture(params=[None, 0, 1, 2], ids=lambda seed: "the book's" if seed is None else seed)
def draft_and_target(request):
    """The book's pair, and pairs of random distributions (any two are a draft and its q*)."""
    rows = np.log([[0.7, 0.2, 0.1], [0.2, 0.3, 0.5]])
    if request.param is None:
        return rows[0], log_geometric_mean(*rows, solve_kl_symmetry(*rows).alpha)
    return log_softmax(np.random.default_rng(request.param).normal(size=(2, 3)) * 2, axis=-1)


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_one_residual_after_k_candidates_is_the_sources_loop_with_one_candidate_less(
    draft_and_target, k
):
    distribution = mended_distribution(patched_loop, *draft_and_target, k)
    np.testing.assert_allclose(
        distribution, source_loop_distribution(*draft_and_target, k - 1), atol=1e-14
    )
    exact = np.allclose(distribution, np.exp(draft_and_target[1]), atol=1e-3)
    assert exact == (k == 1), "it is a repair for one candidate, and for no more"


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_a_residual_after_every_rejection_makes_the_loop_exact(draft_and_target, k):
    distribution = mended_distribution(mended_loop, *draft_and_target, k)
    np.testing.assert_allclose(distribution, np.exp(draft_and_target[1]), atol=1e-14)
    rule, _ = pick_distribution(
        accept_or_redraw, draw_candidates, *draft_and_target, k, replacement=True
    )
    np.testing.assert_allclose(distribution, rule, atol=1e-14)


def test_no_last_line_repairs_two_tests_against_the_target(draft_and_target):
    draft, target = np.exp(draft_and_target)
    distribution, accepted = pick_distribution(
        source_loop, draw_candidates, *draft_and_target, 2, replacement=True
    )
    handed_out = distribution - (1 - accepted) * target  # before the last line is reached
    assert (handed_out > target + 1e-3).any()
    assert (handed_out > target)[target < draft].all()


def test_tokens_per_round_count_the_bonus():
    np.testing.assert_allclose(tokens_per_round([0.0, 0.5, 1.0], 3), [1, 1.875, 4])
    np.testing.assert_allclose(tokens_per_round(0.5, [0, 1, 2]), [1, 1.5, 1.75])
