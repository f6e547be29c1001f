"""Gaussians: alpha* and KL against 30-digit values, quadrature, the discrete solver and theory."""

import json
from pathlib import Path

import mpmath
import numpy as np
import pytest
from scipy.integrate import quad

import qstar
from qstar.gaussian import (
    Gaussian,
    alpha_same_mean_isotropic,
    geometric_mean,
    kl,
    kl_gap,
    kl_to_parents,
    log_partition,
    solve_kl_symmetry,
)
from qstar.gaussian_axes import ATANH, FEW, Axes, axis_slope, polynomial
from qstar.result import Status

DATA = json.loads((Path(__file__).parents[2] / "data" / "reference_cases.json").read_text())
FAMILIES = {"gaussian_1d", "gaussian_2d", "gaussian_nd"}
CASES = {case["id"]: case for case in DATA["cases"] if case["family"] in FAMILIES}


def floats(strings):
    return np.array(strings, dtype=float)


def reference_pair(case):
    given = case["parameters"]
    return (
        Gaussian(floats(given["mu_theta"]), floats(given["cov_theta"])),
        Gaussian(floats(given["mu_t"]), floats(given["cov_t"])),
    )


def random_gaussian(rng, dimension, *, spread=1.0):
    """Mean of size `spread`; standard deviations between 1/3 and 3 along random axes."""
    rotation, _ = np.linalg.qr(rng.normal(size=(dimension, dimension)))
    root = rotation * np.exp(rng.uniform(-1.1, 1.1, dimension))
    return Gaussian(spread * rng.normal(size=dimension), root @ root.T)


def random_pairs(seed, *, count=40):
    rng = np.random.default_rng(seed)
    for index in range(count):
        dimension = (1, 2, 3, 7)[index % 4]
        yield random_gaussian(rng, dimension), random_gaussian(rng, dimension)


PAIRS = list(random_pairs(seed=0))


def test_the_reference_file_holds_gaussians_of_every_kind():
    assert {case["family"] for case in CASES.values()} == FAMILIES
    assert len(CASES) >= 18


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_balance_has_the_reference_digits(case):
    policy, teacher = reference_pair(case)
    balance = solve_kl_symmetry(policy, teacher)
    assert (balance.status, balance.converged) == ("interior", True)
    assert balance.alpha == pytest.approx(float(case["alpha_star"]), abs=1e-14)
    for value in (balance.chernoff, balance.kl_to_policy, balance.kl_to_teacher):
        assert value == pytest.approx(float(case["chernoff_information"]), rel=1e-14, abs=0)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_kl_between_the_parents_has_the_reference_digits(case):
    policy, teacher = reference_pair(case)
    assert kl(policy, teacher) == pytest.approx(float(case["kl_theta_t"]), rel=1e-14, abs=0)
    assert kl(teacher, policy) == pytest.approx(float(case["kl_t_theta"]), rel=1e-14, abs=0)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_q_star_has_the_reference_moments(case):
    policy, teacher = reference_pair(case)
    q = geometric_mean(policy, teacher, solve_kl_symmetry(policy, teacher).alpha)
    np.testing.assert_allclose(q.mean, floats(case["mu_q"]), rtol=0, atol=1e-14)
    covariance = floats(case["cov_q"]).reshape(q.covariance.shape)
    np.testing.assert_allclose(q.covariance, covariance, rtol=1e-14, atol=1e-15)


def test_log_partition_at_a_fixed_alpha_has_the_reference_digits():
    (check,) = DATA["meta"]["fixed_alpha_checks"]
    policy, teacher = reference_pair(check)
    value = log_partition(policy, teacher, check["alpha"])
    assert float(value) == pytest.approx(-float(check["minus_log_Z"]), rel=1e-15)


@pytest.mark.parametrize("alpha", [0.02, 0.5, 0.9])
def test_log_partition_and_the_divergences_are_the_integrals_they_stand_for(alpha):
    policy, teacher = Gaussian(-0.7, 0.6), Gaussian(1.1, 2.5)

    def log_p(x, distribution):
        return distribution.log_density(np.array([x]))

    def log_path(x):
        return alpha * log_p(x, policy) + (1 - alpha) * log_p(x, teacher)

    z, _ = quad(lambda x: np.exp(log_path(x)), -15, 15, epsabs=1e-13, epsrel=1e-13)
    assert float(log_partition(policy, teacher, alpha)) == pytest.approx(np.log(z), abs=1e-12)
    for parent, value in zip((policy, teacher), kl_to_parents(policy, teacher, alpha), strict=True):
        expected, _ = quad(
            lambda x, parent=parent: (
                np.exp(log_path(x)) / z * (log_path(x) - np.log(z) - log_p(x, parent))
            ),
            -15,
            15,
            epsabs=1e-13,
            epsrel=1e-13,
        )
        assert float(value) == pytest.approx(expected, abs=1e-12)


def test_the_discrete_solver_on_a_fine_grid_finds_the_same_balance():
    """A grid of step h has Gaussian sums exact to exp(-2 (pi sd / h)^2): far below 1e-12."""
    policy, teacher = Gaussian(-1.5, 0.5), Gaussian(1.5, 2.0)
    grid = np.linspace(-20, 20, 2001)[:, None]
    rows = [distribution.log_density(grid) + np.log(0.02) for distribution in (policy, teacher)]
    discrete, exact = qstar.solve_kl_symmetry(*rows), solve_kl_symmetry(policy, teacher)
    assert float(discrete.alpha) == pytest.approx(exact.alpha, abs=1e-12)
    assert float(discrete.chernoff) == pytest.approx(exact.chernoff, abs=1e-12)
    log_q = qstar.log_geometric_mean(*rows, discrete.alpha)
    q = geometric_mean(policy, teacher, exact.alpha)
    np.testing.assert_allclose(np.exp(log_q), np.exp(q.log_density(grid)) * 0.02, atol=1e-12)


def test_both_parents_are_equally_far_at_alpha_star():
    for policy, teacher in PAIRS:
        balance = solve_kl_symmetry(policy, teacher)
        q = geometric_mean(policy, teacher, balance.alpha)
        assert kl(q, policy) == pytest.approx(balance.chernoff, rel=1e-11)
        assert kl(q, teacher) == pytest.approx(balance.chernoff, rel=1e-11)
        assert balance.kl_to_policy == pytest.approx(balance.kl_to_teacher, rel=1e-12)
        assert abs(balance.slope) < 1e-12


def test_q_star_is_the_centre_of_the_smallest_reverse_kl_ball():
    """max(KL(q||policy), KL(q||teacher)) >= C + KL(q||q*) for every q; equality at q* alone."""
    rng = np.random.default_rng(5)
    for policy, teacher in PAIRS:
        balance = solve_kl_symmetry(policy, teacher)
        q_star = geometric_mean(policy, teacher, balance.alpha)
        q = random_gaussian(rng, policy.dimension)
        assert max(kl(q, policy), kl(q, teacher)) >= balance.chernoff + kl(q, q_star) - 1e-11


def test_a_wrong_alpha_costs_the_rise_of_log_z():
    for policy, teacher in PAIRS:
        balance = solve_kl_symmetry(policy, teacher)
        q_star = geometric_mean(policy, teacher, balance.alpha)
        for alpha in (0.1, 0.5, 0.8):
            rise = float(log_partition(policy, teacher, alpha)) + balance.chernoff
            loss = kl(q_star, geometric_mean(policy, teacher, alpha))
            assert loss == pytest.approx(rise, abs=1e-11)


def test_swapping_the_parents_mirrors_the_path():
    for policy, teacher in PAIRS:
        there, back = solve_kl_symmetry(policy, teacher), solve_kl_symmetry(teacher, policy)
        assert there.alpha + back.alpha == pytest.approx(1, abs=1e-12)
        assert there.chernoff == pytest.approx(back.chernoff, rel=1e-12)
        forth, mirrored = geometric_mean(policy, teacher, 0.3), geometric_mean(teacher, policy, 0.7)
        np.testing.assert_allclose(forth.mean, mirrored.mean, atol=1e-12)
        np.testing.assert_allclose(forth.covariance, mirrored.covariance, atol=1e-12)


def test_an_affine_map_moves_q_star_and_nothing_else():
    rng = np.random.default_rng(2)
    for policy, teacher in PAIRS:
        shift = rng.normal(size=policy.dimension)
        matrix = rng.normal(size=(policy.dimension,) * 2) + 2 * np.eye(policy.dimension)

        def moved(distribution, matrix=matrix, shift=shift):
            return Gaussian(
                matrix @ distribution.mean + shift, matrix @ distribution.covariance @ matrix.T
            )

        here = solve_kl_symmetry(policy, teacher)
        there = solve_kl_symmetry(moved(policy), moved(teacher))
        assert there.alpha == pytest.approx(here.alpha, abs=1e-9)
        assert there.chernoff == pytest.approx(here.chernoff, rel=1e-9)
        q = moved(geometric_mean(policy, teacher, 0.4))
        image = geometric_mean(moved(policy), moved(teacher), 0.4)
        scale = np.abs(q.covariance).max()
        np.testing.assert_allclose(image.mean, q.mean, atol=1e-9 * np.sqrt(scale))
        np.testing.assert_allclose(image.covariance, q.covariance, atol=1e-9 * scale)


def test_precisions_and_precision_weighted_means_are_averaged():
    for policy, teacher in PAIRS:
        q = geometric_mean(policy, teacher, 0.35)
        precisions = [
            np.linalg.inv(distribution.covariance) for distribution in (policy, teacher, q)
        ]
        average = 0.35 * precisions[0] + 0.65 * precisions[1]
        np.testing.assert_allclose(precisions[2], average, rtol=0, atol=1e-11)
        weighted = 0.35 * precisions[0] @ policy.mean + 0.65 * precisions[1] @ teacher.mean
        np.testing.assert_allclose(precisions[2] @ q.mean, weighted, rtol=0, atol=1e-11)


def test_the_ends_of_the_path_are_the_parents_themselves():
    policy, teacher = PAIRS[1]
    assert geometric_mean(policy, teacher, 0.0) == teacher
    assert geometric_mean(policy, teacher, 1.0) == policy
    np.testing.assert_array_equal(log_partition(policy, teacher, [0.0, 1.0]), 0.0)
    to_policy, to_teacher = kl_to_parents(policy, teacher, [0.0, 1.0])
    np.testing.assert_allclose(to_policy, [kl(teacher, policy), 0], atol=1e-14)
    np.testing.assert_allclose(to_teacher, [0, kl(policy, teacher)], atol=1e-14)


def test_slope_and_divergences_are_derivatives_of_log_z():
    alpha, step = np.linspace(0.1, 0.9, 9), 1e-5
    for policy, teacher in PAIRS:
        log_z = log_partition(policy, teacher, alpha)
        slope = kl_gap(policy, teacher, alpha)
        rise = log_partition(policy, teacher, alpha + step)
        rise = rise - log_partition(policy, teacher, alpha - step)
        np.testing.assert_allclose(slope, rise / (2 * step), rtol=1e-7, atol=1e-6)
        to_policy, to_teacher = kl_to_parents(policy, teacher, alpha)
        np.testing.assert_allclose(to_policy, -(1 - alpha) * slope - log_z, atol=1e-11)
        np.testing.assert_allclose(to_teacher, alpha * slope - log_z, atol=1e-11)


def test_curvature_is_the_derivative_of_the_slope():
    step = 1e-5
    for policy, teacher in PAIRS:
        balance = solve_kl_symmetry(policy, teacher)
        ends = kl_gap(policy, teacher, [balance.alpha - step, balance.alpha + step])
        assert balance.curvature == pytest.approx((ends[1] - ends[0]) / (2 * step), rel=1e-6)


@pytest.mark.parametrize("size", [1e-3, 1e-6, 1e-9])
def test_close_pairs_keep_their_relative_precision(size):
    """To leading order C is an eighth of the Jeffreys divergence, which is exact here."""
    teacher = Gaussian([0.3, -2.0], [[2.0, 0.5], [0.5, 1.0]])
    policy = Gaussian(teacher.mean + np.array([size, 0.0]), teacher.covariance * (1 + size))
    balance = solve_kl_symmetry(policy, teacher)
    jeffreys = kl(policy, teacher) + kl(teacher, policy)
    assert jeffreys > 0
    assert 8 * balance.chernoff / jeffreys == pytest.approx(1, abs=5 * size)
    assert balance.alpha == pytest.approx(0.5, abs=size)


def test_far_pairs_stay_finite():
    for policy, teacher in [
        (Gaussian(0.0, 1e-140), Gaussian(0.0, 1e140)),
        (Gaussian(1e6, 1e-8), Gaussian(0.0, 1.0)),
        (Gaussian([0, 40], np.diag([1e-8, 1])), Gaussian([40, 0], np.diag([1, 1e-8]))),
    ]:
        balance = solve_kl_symmetry(policy, teacher)
        assert balance.converged
        assert 0 < balance.alpha < 1
        assert balance.kl_to_policy == pytest.approx(balance.chernoff, rel=1e-9)
        assert balance.kl_to_teacher == pytest.approx(balance.chernoff, rel=1e-9)


def test_small_variances_survive_beside_large_ones():
    """Per axis the pair is exact; one 2-D pair must give the sum of its two axes."""
    policy = Gaussian([0.0, 0.0], np.diag([1e-9, 1e9]))
    teacher = Gaussian([0.0, 0.0], np.eye(2))
    alone = [kl(Gaussian(0.0, v), Gaussian(0.0, 1.0)) for v in (1e-9, 1e9)]
    assert kl(policy, teacher) == pytest.approx(sum(alone), rel=1e-15)
    back = [kl(Gaussian(0.0, 1.0), Gaussian(0.0, v)) for v in (1e-9, 1e9)]
    assert kl(teacher, policy) == pytest.approx(sum(back), rel=1e-14)


def test_equal_parents_balance_everywhere():
    distribution = Gaussian([1.0, 2.0], [[2.0, 0.3], [0.3, 1.0]])
    balance = solve_kl_symmetry(distribution, Gaussian(distribution.mean, distribution.covariance))
    assert (balance.status, balance.alpha, balance.chernoff) == ("degenerate_all", 0.5, 0.0)
    assert (balance.kl_to_policy, balance.kl_to_teacher, balance.converged) == (0.0, 0.0, True)


def test_equal_covariances_balance_at_one_half():
    for policy, teacher in PAIRS:
        balance = solve_kl_symmetry(policy, Gaussian(teacher.mean, policy.covariance))
        gap = policy.mean - teacher.mean
        mahalanobis = gap @ np.linalg.solve(policy.covariance, gap)
        assert balance.alpha == pytest.approx(0.5, abs=1e-15)
        assert balance.chernoff == pytest.approx(mahalanobis / 8, rel=1e-11)


@pytest.mark.parametrize("ratio", [1 + 1e-12, 1.001, 1.5, 4.0, 15.0, 1e8, 1e30])
@pytest.mark.parametrize("dimension", [1, 5])
def test_the_scale_law_gives_alpha_of_concentric_isotropic_pairs(ratio, dimension):
    mean = np.full(dimension, 0.7)
    policy, teacher = (Gaussian(mean, v * np.eye(dimension)) for v in (2.0, 2.0 * ratio))
    expected = float(alpha_same_mean_isotropic(2.0, 2.0 * ratio))
    assert solve_kl_symmetry(policy, teacher).alpha == pytest.approx(expected, abs=2e-15)
    assert solve_kl_symmetry(teacher, policy).alpha == pytest.approx(1 - expected, abs=2e-15)


def test_the_scale_law_is_smooth_through_equal_variances():
    """Against the same formula in 40 digits, where 1/log rho - 1/(rho - 1) loses nothing."""
    mpmath = pytest.importorskip("mpmath")
    ratios = np.concatenate([1 + np.logspace(-14, 1, 61), 1 - np.logspace(-14, -0.05, 60)])
    with mpmath.workdps(60):
        exact = [1 / mpmath.log(rho) - 1 / (mpmath.mpf(rho) - 1) for rho in ratios.tolist()]
    values = alpha_same_mean_isotropic(np.ones_like(ratios), ratios)
    np.testing.assert_allclose(values, np.array(exact, dtype=float), rtol=0, atol=3e-16)
    assert float(alpha_same_mean_isotropic(3.0, 3.0)) == 0.5


def test_the_narrower_of_two_ordered_gaussians_gets_the_smaller_alpha():
    """If teacher covariance - policy covariance is positive, alpha* < 1/2; any means.

    The control: unordered pairs fall on both sides, so the assertion can fail.
    """
    rng = np.random.default_rng(3)
    sides = set()
    for policy, other in random_pairs(seed=4, count=200):
        extra = rng.normal(size=(policy.dimension, policy.dimension + 1))
        wider = Gaussian(other.mean, policy.covariance + extra @ extra.T)
        assert solve_kl_symmetry(policy, wider).alpha < 0.5
        assert kl(policy, wider) < kl(wider, policy)
        sides.add(solve_kl_symmetry(policy, other).alpha < 0.5)
    assert sides == {True, False}


def test_the_covariance_formula_of_the_analysis_misses_by_twice_the_chernoff_information():
    """For equal means log(|policy|^alpha |teacher|^(1-alpha) / |q*|) = 2C at alpha*."""
    for policy, other in PAIRS:
        teacher = Gaussian(policy.mean, other.covariance)
        balance = solve_kl_symmetry(policy, teacher)
        q = geometric_mean(policy, teacher, balance.alpha)
        log_det = [
            np.linalg.slogdet(distribution.covariance)[1] for distribution in (policy, teacher, q)
        ]
        excess = balance.alpha * log_det[0] + (1 - balance.alpha) * log_det[1] - log_det[2]
        assert excess == pytest.approx(2 * balance.chernoff, rel=1e-10)


def test_log_density_integrates_to_one_and_has_its_moments():
    distribution = Gaussian(0.4, 2.3)
    x = np.linspace(-15, 15, 3001)
    mass = np.exp(distribution.log_density(x[:, None])) * 0.01
    moments = [mass.sum(), (mass * x).sum(), (mass * (x - 0.4) ** 2).sum()]
    np.testing.assert_allclose(moments, [1, 0.4, 2.3], atol=1e-12)


def test_log_density_keeps_the_shape_of_the_batch():
    distribution = random_gaussian(np.random.default_rng(1), 2)
    x = np.random.default_rng(2).normal(size=(4, 3, 2))
    inverse, log_det = (
        np.linalg.inv(distribution.covariance),
        np.linalg.slogdet(distribution.covariance)[1],
    )
    step = x - distribution.mean
    expected = -0.5 * np.einsum("...i,ij,...j", step, inverse, step) - 0.5 * log_det
    np.testing.assert_allclose(
        distribution.log_density(x), expected - np.log(2 * np.pi), atol=1e-12
    )


def test_samples_have_the_mean_and_covariance():
    """Standardised by Cholesky, 2 x 10^5 draws: 6.5 standard errors, false alarm 1e-9 in all."""
    distribution = random_gaussian(np.random.default_rng(1), 3)
    draws = distribution.sample(200_000, generator=np.random.default_rng(0))
    standard = np.linalg.solve(
        np.linalg.cholesky(distribution.covariance), (draws - distribution.mean).T
    )
    error = 6.5 / np.sqrt(200_000)
    assert np.abs(standard.mean(axis=1)).max() < error
    assert np.abs(np.cov(standard) - np.eye(3)).max() < np.sqrt(2) * error
    wrong = np.linalg.solve(
        np.linalg.cholesky(distribution.covariance * 1.05), (draws - distribution.mean).T
    )
    assert np.abs(np.cov(wrong) - np.eye(3)).max() > np.sqrt(2) * error  # the control


def test_a_gaussian_is_a_value():
    mean, covariance = np.array([1.0, 2.0]), np.array([[2, 0], [0, 1]])
    distribution = Gaussian(mean, covariance)
    mean[0] = 9.0
    assert distribution == Gaussian([1, 2], np.diag([2.0, 1.0]))
    assert hash(distribution) == hash(Gaussian([1, 2], np.diag([2.0, 1.0])))
    assert hash(Gaussian(0.0, 1.0)) == hash(Gaussian(-0.0, 1.0))
    assert distribution != Gaussian([1, 2], np.eye(2))
    assert distribution != "a Gaussian"
    assert distribution.mean.dtype == distribution.covariance.dtype == np.float64
    with pytest.raises(ValueError, match="read-only"):
        distribution.mean[0] = 3.0
    assert Gaussian(0, 4) == Gaussian([0.0], [[4.0]]) == Gaussian([0.0], [4.0])


def test_the_result_is_made_of_plain_python_values():
    balance = solve_kl_symmetry(Gaussian(0.0, 1.0), Gaussian(1.0, 2.0))
    assert {type(getattr(balance, name)) for name in ("alpha", "chernoff", "slope")} == {float}
    kinds = (type(balance.status), type(balance.converged), type(balance.passes))
    assert kinds == (Status, bool, int)
    assert type(kl(Gaussian(0.0, 1.0), Gaussian(1.0, 2.0))) is float


BAD_GAUSSIANS = {
    "mean matrix": ([[0.0]], 1.0, r"mean must be a number or a vector.*got shape \(1, 1\)"),
    "empty mean": ([], np.zeros((0, 0)), r"at least one entry: got shape \(0,\)"),
    "scalar covariance": ([0, 0], 1.0, r"shape \(2, 2\).*got shape \(\).*variance \* np.eye\(2\)"),
    "vector covariance": ([0, 0], [1, 1], r"got shape \(2,\).*np.diag\(variances\)"),
    "wrong size": ([0, 0], np.eye(3), r"shape \(2, 2\) to go with a mean of 2 entries"),
    "nan": ([0, np.nan], np.eye(2), r"mean must be finite: entry \[1\] is nan"),
    "inf": (
        [0, 0],
        [[1, np.inf], [np.inf, 1]],
        r"must be finite: entry \[0, 1\] is inf",
    ),
    "complex": ([0, 1j], np.eye(2), r"mean must hold real numbers: got dtype complex128"),
    "text": ("zero", 1.0, r"mean must hold real numbers: got dtype <U4"),
    "flag": (True, 1.0, r"mean must hold real numbers: got dtype bool"),
    "not symmetric": ([0, 0], [[2, 1], [0.5, 2]], r"symmetric: entries \[0, 1\] and \[1, 0\]"),
    "zero variance": (0.0, 0.0, r"positive definite: the variance of coordinate 0 is 0"),
    "negative variance": ([0, 0], np.diag([1, -2.0]), r"variance of coordinate 1 is -2"),
    "indefinite": (
        [0, 0],
        [[1, 2], [2, 1]],
        r"the smallest eigenvalue .* is -1",
    ),
    "singular": ([0, 0], [[1, 1], [1, 1]], r"positive definite: the smallest eigenvalue"),
}


@pytest.mark.parametrize(
    ("mean", "covariance", "message"), BAD_GAUSSIANS.values(), ids=BAD_GAUSSIANS
)
def test_what_is_no_gaussian_is_refused_with_the_reason(mean, covariance, message):
    with pytest.raises(ValueError, match=message):
        Gaussian(mean, covariance)


def test_rounding_asymmetry_is_forgiven():
    distribution = Gaussian([0, 0], [[1, 0.3], [0.3 + 1e-12, 1]])
    np.testing.assert_array_equal(distribution.covariance, distribution.covariance.T)


@pytest.mark.parametrize(
    "function",
    [
        kl,
        solve_kl_symmetry,
        lambda a, b: geometric_mean(a, b, 0.5),
        lambda a, b: log_partition(a, b, 0.5),
        lambda a, b: kl_gap(a, b, 0.5),
        lambda a, b: kl_to_parents(a, b, 0.5),
    ],
)
def test_different_dimensions_are_refused(function):
    with pytest.raises(ValueError, match=r"must live in one space: got dimensions 1 and 2"):
        function(Gaussian(0.0, 1.0), Gaussian([0, 0], np.eye(2)))


@pytest.mark.parametrize("function", [geometric_mean, log_partition, kl_gap, kl_to_parents])
@pytest.mark.parametrize("alpha", [-0.1, 1.5])
def test_alpha_outside_the_unit_interval_is_refused(function, alpha):
    with pytest.raises(ValueError, match=rf"must lie in \[0, 1\]: got {alpha}"):
        function(Gaussian(0.0, 1.0), Gaussian(1.0, 1.0), alpha)


@pytest.mark.parametrize("alpha", [np.nan, [0.5, 0.6]])
def test_a_geometric_mean_needs_one_alpha(alpha):
    with pytest.raises(ValueError, match="must be one number"):
        geometric_mean(Gaussian(0.0, 1.0), Gaussian(1.0, 1.0), alpha)


def test_points_of_the_wrong_dimension_are_refused():
    with pytest.raises(ValueError, match=r"the 1 coordinates .* got shape \(5,\)"):
        Gaussian(0.0, 1.0).log_density(np.zeros(5))


def test_parents_beyond_the_range_of_float64_are_refused():
    with pytest.raises(ValueError, match=r"within a factor of 1e150 .* from 1e-200 to 1e-200"):
        solve_kl_symmetry(Gaussian(0.0, 1e-200), Gaussian(0.0, 1e200))
    with pytest.raises(ValueError, match=r"within a factor of 1e150 .* from 1e\+200 to 1e\+200"):
        solve_kl_symmetry(Gaussian(0.0, 1e200), Gaussian(0.0, 1e-200))
    wide, narrow = (Gaussian([0.0, 0.0], np.diag([v, 1.0])) for v in (1e200, 1e-200))
    with pytest.raises(ValueError, match=r"within a factor of 1e150 .* from 1 to 1e\+200"):
        solve_kl_symmetry(wide, narrow)


def counted(patch, owner, name):
    """The calls of `owner.name` from now on."""
    calls, original = [], getattr(owner, name)
    patch.setattr(owner, name, lambda *args: calls.append(args) or original(*args))
    return calls


@pytest.mark.parametrize("dimension", [1, 5, FEW, FEW + 1])
def test_the_root_finder_sees_the_slope_itself_in_few_calls(dimension, monkeypatch):
    """Plain floats up to `FEW` axes, arrays beyond: one slope, near parents and far ones."""
    rng = np.random.default_rng(dimension)
    for scale in (1e-6, 0.3, 30.0):
        spread = np.diag(np.exp(scale * rng.normal(size=dimension)))
        pair = (
            Gaussian(scale * rng.normal(size=dimension), spread),
            Gaussian(np.zeros(dimension), np.eye(dimension)),
        )
        axes = qstar.gaussian._axes(*pair)
        for alpha in (0.0, 0.3, 1.0):
            size = np.abs(axis_slope(alpha, *axes.slope_terms)).sum()
            assert abs(axes.slope_at(alpha) - axes.slope(np.asarray(alpha))) <= 1e-14 * size
        with monkeypatch.context() as patch:
            calls = counted(patch, Axes, "slope")
            found = solve_kl_symmetry(*pair)
        assert len(calls) == (1 if dimension <= FEW else found.passes + 1)


def test_horners_rule_is_numpys():
    x = np.linspace(0, 1 / 9, 2 * FEW)
    whole = polynomial(x, ATANH)
    assert (whole[:FEW] == polynomial(x[:FEW], ATANH)).all()


def test_the_scale_law_refuses_variances_that_are_none():
    with pytest.raises(ValueError, match="variance_teacher must be positive: got 0"):
        alpha_same_mean_isotropic(1.0, [2.0, 0.0])


@pytest.mark.parametrize(("slack", "resolved"), [(1e-9, True), (1e-11, True), (4e-14, False)])
def test_a_covariance_that_leaves_no_digits_has_not_converged(slack, resolved):
    """Against 80 digits: what says `converged` has three digits at least."""
    narrow = np.array([[1.0, 1.0 - slack], [1.0 - slack, 1.0]])
    wide = np.array([[2.0, -0.5], [-0.5, 1.0]])
    found = solve_kl_symmetry(Gaussian([0.0, 0.0], narrow), Gaussian([0.3, 0.1], wide))
    assert found.converged is resolved
    with mpmath.workdps(80):
        precision_1, precision_2 = (mpmath.matrix(c.tolist()) ** -1 for c in (narrow, wide))
        gap = mpmath.matrix([mpmath.mpf(0.3), mpmath.mpf(0.1)])

        def log_z(alpha):
            mixed = alpha * precision_1 + (1 - alpha) * precision_2
            between = (alpha * (1 - alpha)) * precision_1 * mixed**-1 * precision_2
            spread = (
                alpha * mpmath.log(mpmath.det(precision_1))
                + (1 - alpha) * mpmath.log(mpmath.det(precision_2))
                - mpmath.log(mpmath.det(mixed))
            )
            return (spread - (gap.T * between * gap)[0]) / 2

        alpha = mpmath.findroot(lambda at: mpmath.diff(log_z, at), found.alpha)
        error = abs(found.chernoff / float(-log_z(alpha)) - 1)
    assert not found.converged or error < 1e-3
