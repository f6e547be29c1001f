"""The path, log Z and the divergences: identities first, then what bad input is told."""

import mpmath
import numpy as np
import pytest
from scipy.special import log_softmax, logsumexp
from scipy.stats import entropy

from qstar import (
    acceptance_probability,
    cumulants,
    kl,
    kl_gap,
    log_geometric_mean,
    log_partition,
    solve_kl_symmetry,
    total_variation,
)


def random_rows(*shape, scale=3.0, seed=0):
    return log_softmax(scale * np.random.default_rng(seed).normal(size=shape), axis=-1)


@pytest.fixture
def pair():
    return random_rows(20, 30, seed=1), random_rows(20, 30, seed=2)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_log_partition_is_the_log_of_the_sum(pair, alpha):
    log_policy, log_teacher = pair
    direct = logsumexp(alpha * log_policy + (1 - alpha) * log_teacher, axis=-1)
    np.testing.assert_allclose(log_partition(*pair, alpha), direct, rtol=0, atol=1e-14)


def test_the_ends_of_the_path_are_the_parents(pair):
    for alpha, parent in [(1.0, pair[0]), (0.0, pair[1])]:
        np.testing.assert_allclose(log_geometric_mean(*pair, alpha), parent, atol=1e-13)


def test_on_partial_supports_the_ends_are_the_parents_conditioned_on_what_is_shared():
    with np.errstate(divide="ignore"):
        log_policy, log_teacher = np.log([0.5, 0.4, 0.1, 0]), np.log([0.3, 0, 0.1, 0.6])
    q_1 = np.exp(log_geometric_mean(log_policy, log_teacher, 1.0))
    q_0 = np.exp(log_geometric_mean(log_policy, log_teacher, 0.0))
    np.testing.assert_allclose(q_1, [5 / 6, 0, 1 / 6, 0], atol=1e-15)
    np.testing.assert_allclose(q_0, [3 / 4, 0, 1 / 4, 0], atol=1e-15)
    np.testing.assert_allclose(log_partition(log_policy, log_teacher, 0.0), np.log(0.4))


@pytest.mark.parametrize("alpha", [0.1, 0.5, 0.8])
def test_master_identity_holds_for_every_distribution(pair, alpha):
    """alpha KL(q||policy) + (1-alpha) KL(q||teacher) = KL(q||q_alpha) - log Z(alpha)."""
    log_q = random_rows(20, 30, scale=5.0, seed=3)
    left = alpha * kl(log_q, pair[0]) + (1 - alpha) * kl(log_q, pair[1])
    right = kl(log_q, log_geometric_mean(*pair, alpha)) - log_partition(*pair, alpha)
    np.testing.assert_allclose(left, right, atol=1e-12)


def test_kl_gap_is_the_difference_of_the_divergences_and_the_slope(pair):
    for alpha in (0.2, 0.7):
        log_q = log_geometric_mean(*pair, alpha)
        gap = kl_gap(*pair, alpha)
        np.testing.assert_allclose(gap, kl(log_q, pair[1]) - kl(log_q, pair[0]), atol=1e-12)
        step = 1e-5
        slope = (log_partition(*pair, alpha + step) - log_partition(*pair, alpha - step)) / 2e-5
        np.testing.assert_allclose(gap, slope, atol=1e-8)


def test_cumulants_are_the_derivatives_of_log_partition(pair):
    mean, variance, third = cumulants(*pair, 0.3)
    step = 1e-3
    stencil = log_partition(*pair, 0.3 + step * np.arange(-2, 3)[:, None])
    np.testing.assert_allclose(mean, kl_gap(*pair, 0.3), atol=1e-13)
    np.testing.assert_allclose(
        variance, (stencil[3] - 2 * stencil[2] + stencil[1]) / step**2, rtol=1e-4
    )
    np.testing.assert_allclose(
        third,
        (stencil[4] - 2 * stencil[3] + 2 * stencil[1] - stencil[0]) / (2 * step**3),
        rtol=1e-3,
        atol=1e-2,
    )


def test_log_partition_keeps_its_digits_when_the_parents_almost_agree():
    """log Z = -C is about -distance^2 / 8: a plain logsumexp would return rounding noise."""
    for distance in (1e-4, 1e-7, 1e-10):
        log_policy = np.log([0.5 + distance, 0.5 - distance])
        log_teacher = np.log([0.5 - distance, 0.5 + distance])
        # Z(1/2) = 2 sqrt((1/2 + d)(1/2 - d)) = sqrt(1 - 4 d^2)
        exact = 0.5 * np.log1p(-4 * distance**2)
        actual = log_partition(log_policy, log_teacher, 0.5)
        np.testing.assert_allclose(actual, exact, rtol=1e-15 / distance + 1e-14)


def test_kl_agrees_with_scipy_and_knows_missing_mass(pair):
    np.testing.assert_allclose(
        kl(*pair), entropy(np.exp(pair[0]), np.exp(pair[1]), axis=-1), atol=1e-13
    )
    with np.errstate(divide="ignore"):
        wide, narrow = np.log([0.5, 0.5]), np.log([1.0, 0.0])
    assert kl(wide, narrow) == np.inf
    np.testing.assert_allclose(kl(narrow, wide), np.log(2))


def test_acceptance_is_one_minus_total_variation(pair):
    np.testing.assert_allclose(acceptance_probability(*pair), 1 - total_variation(*pair))
    np.testing.assert_allclose(
        total_variation(np.log([0.7, 0.2, 0.1]), np.log([0.2, 0.3, 0.5])), 0.5
    )


def test_alpha_broadcasts_against_the_batch(pair):
    alphas = np.linspace(0, 1, 5)
    assert log_partition(pair[0][0], pair[1][0], alphas).shape == (5,)
    assert log_geometric_mean(pair[0][0], pair[1][0], alphas).shape == (5, 30)
    assert log_partition(*pair, alphas[:, None]).shape == (5, 20)
    np.testing.assert_allclose(
        log_partition(*pair, alphas[:, None])[2], log_partition(*pair, alphas[2])
    )


def test_disjoint_parents_have_no_path():
    with np.errstate(divide="ignore"):
        pair = np.log([1.0, 0.0]), np.log([0.0, 1.0])
    assert log_partition(*pair, 0.5) == -np.inf
    assert np.isnan(log_geometric_mean(*pair, 0.5)).all()
    assert np.isnan(kl_gap(*pair, 0.5))


GOOD = np.log([[0.5, 0.5], [0.25, 0.75]])
BAD = {
    "logits": (np.zeros((2, 3)), r"log_policy must be .* row 0 sums to 3.* through log_softmax"),
    "unnormalised second row": (np.log([[0.5, 0.5], [0.5, 0.6]]), r"row 1 sums to 1\.1"),
    "probabilities": (np.array([[0.5, 0.5], [0.2, 0.8]]), r"row 0 sums to"),
    "huge logits": (np.array([[1e4, 1e4], [0, 0]]), r"row 0 sums to inf"),
    "nan": (np.array([[np.log(0.5)] * 2, [np.nan, 0.0]]), r"row 1 holds nan at outcome 0"),
    "+inf": (np.array([[np.log(0.5)] * 2, [0.0, np.inf]]), r"row 1 holds \+inf at outcome 1"),
    "all -inf": (np.full((2, 2), -np.inf), r"row 0 sums to 0"),
    "integers": (np.array([[0, -1], [0, -1]]), r"dtype int64"),
    "empty vocabulary": (np.zeros((2, 0)), r"at least one outcome .* shape \(2, 0\)"),
    "a scalar": (np.float64(0.0), r"at least one outcome .* shape \(\)"),
}


@pytest.mark.parametrize(("bad", "message"), BAD.values(), ids=BAD)
def test_bad_rows_are_refused_with_the_row_and_the_remedy(bad, message):
    with pytest.raises(ValueError, match=message):
        solve_kl_symmetry(bad, GOOD)
    with pytest.raises(ValueError, match=message.replace("policy", "teacher")):
        solve_kl_symmetry(GOOD, bad)


def test_mismatched_vocabularies_are_refused():
    with pytest.raises(ValueError, match=r"got \(2, 2\) and \(2, 3\)"):
        solve_kl_symmetry(GOOD, np.log(np.full((2, 3), 1 / 3)))


@pytest.mark.parametrize("alpha", [-np.inf, np.inf])
def test_an_infinite_exponent_is_refused(alpha):
    with pytest.raises(ValueError, match=f"must be finite: got {alpha}"):
        log_partition(GOOD, GOOD, alpha)


# --- Beyond the ends: guidance


OUTSIDE = [-20.0, -0.5, -1e-6, 1 + 1e-6, 1.5, 3.0, 20.0]


@pytest.mark.parametrize("alpha", OUTSIDE)
def test_beyond_the_ends_one_parent_is_tilted_away_from_the_other(pair, alpha):
    """The formula of classifier-free guidance, and the Renyi divergence that it leaves over."""
    policy, teacher = (rows - logsumexp(rows, axis=-1, keepdims=True) for rows in pair)
    guided = teacher + alpha * (policy - teacher)
    log_z = logsumexp(guided, axis=-1)
    np.testing.assert_allclose(log_partition(*pair, alpha), log_z, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(
        log_geometric_mean(*pair, alpha), guided - log_z[:, None], rtol=0, atol=1e-10
    )
    assert (log_partition(*pair, alpha) > 0).all()
    np.testing.assert_allclose(log_partition(*pair, alpha), log_partition(*pair[::-1], 1 - alpha))
    slope, up, down = (
        f(*pair, at)
        for f, at in [(kl_gap, alpha)] + [(log_partition, alpha + e) for e in (1e-5, -1e-5)]
    )
    np.testing.assert_allclose(slope, (up - down) / 2e-5, rtol=1e-5, atol=1e-8)
    assert (cumulants(*pair, alpha)[1] > 0).all()


def test_close_parents_have_a_log_partition_to_the_last_digits_beyond_the_ends():
    rng = np.random.default_rng(0)
    log_teacher = np.log(rng.dirichlet(np.ones(8)))
    log_policy = log_teacher + 1e-7 * rng.standard_normal(8)
    log_policy -= logsumexp(log_policy)
    with mpmath.workdps(60):
        rows = [[mpmath.mpf(x) for x in row] for row in (log_policy, log_teacher)]
        policy, teacher = ([x - mpmath.log(sum(map(mpmath.exp, r))) for x in r] for r in rows)
        for alpha in (-0.5, 1.5, 3.0):
            path = [alpha * p + (1 - alpha) * t for p, t in zip(policy, teacher, strict=True)]
            exact = float(mpmath.log(sum(map(mpmath.exp, path))))
            assert 0 < exact < 1e-12
            # Of a log-ratio of 1e-7, whose rows have sixteen digits, some eight are left.
            assert log_partition(log_policy, log_teacher, alpha) == pytest.approx(exact, rel=1e-7)


def test_what_the_guided_parent_excludes_has_no_mass_and_the_other_must_not_exclude_more():
    with np.errstate(divide="ignore"):
        wide, narrow, both = np.log([[0.2, 0.3, 0.5, 0], [0.6, 0.4, 0, 0], [0, 0.5, 0.5, 0]])
    for pair, alpha in (((narrow, wide), 1.5), ((wide, narrow), -0.5)):
        log_q = log_geometric_mean(*pair, alpha)
        assert np.exp(log_q).sum() == pytest.approx(1)
        assert np.isneginf(log_q).tolist() == [False, False, True, True]
        distribution = np.array([0.6, 0.4]) ** 1.5 / np.array([0.2, 0.3]) ** 0.5
        np.testing.assert_allclose(np.exp(log_q[:2]), distribution / distribution.sum(), rtol=1e-14)
        assert log_partition(*pair, alpha) == pytest.approx(np.log(distribution.sum()), rel=1e-12)
        assert np.isfinite(kl_gap(*pair, alpha))
    for pair in ((wide, narrow), (both, narrow)):
        for given, alpha in ((pair, 1.5), (pair[::-1], -0.5)):
            assert log_partition(*given, alpha) == np.inf
            assert np.isnan(log_geometric_mean(*given, alpha)).all()
            assert np.isnan(kl_gap(*given, alpha))
            assert np.isnan(cumulants(*given, alpha)).all()
    batch = log_geometric_mean(np.stack([narrow, wide]), np.stack([wide, narrow]), 1.5)
    assert np.isnan(batch).any(-1).tolist() == [False, True], "one row harms no other"


def test_row_of_a_deeper_batch_is_named_in_full():
    rows = np.zeros((2, 3, 4)) - np.log(4)
    bad = rows.copy()
    bad[1, 2] = 0
    with pytest.raises(ValueError, match=r"row \(1, 2\) sums to 4"):
        kl(bad, rows)


@pytest.mark.parametrize(
    ("dtype", "within", "beyond"),
    [(np.float64, 5e-5, 3e-4), (np.float32, 5e-5, 3e-4), (np.float16, 1e-2, 4e-2)],
)
def test_normalisation_tolerance_depends_on_the_dtype(dtype, within, beyond):
    solve_kl_symmetry(np.log(np.array([0.5, 0.5 + within])).astype(dtype), GOOD[0])
    with pytest.raises(ValueError, match="not 1 within"):
        solve_kl_symmetry(np.log(np.array([0.5, 0.5 + beyond])).astype(dtype), GOOD[0])
