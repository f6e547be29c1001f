"""Many experts: the certificate, agreement with two parents, the enclosing ball, and the edges."""

import math

import numpy as np
import pytest
from reference import CASES, cases, number
from scipy.optimize import minimize
from scipy.special import log_softmax

import qstar
from qstar import gaussian
from qstar.families.experts import (
    STATUSES,
    geometric_mean,
    log_geometric_mean,
    log_partition,
    solve_minimax,
)
from qstar.gaussian import Gaussian


def log_of(rows):
    with np.errstate(divide="ignore"):  # log 0 is -inf, and meant
        return np.log(np.array(rows, dtype=float))


def random_rows(seed, *, count=None, scale=None):
    rng = np.random.default_rng(seed)
    experts = count or int(rng.integers(2, 9))
    size = 10 ** rng.uniform(-4, 1.3) if scale is None else scale
    return log_softmax(size * rng.normal(size=(experts, int(rng.integers(2, 12)))), axis=-1)


def random_gaussians(seed, *, count=None):
    rng = np.random.default_rng(seed)
    dimension, size = int(rng.integers(1, 5)), 10 ** rng.uniform(-4, 1)

    def one():
        root = np.eye(dimension) + 0.3 * min(size, 1) * rng.normal(size=(dimension, dimension))
        return Gaussian(size * rng.normal(size=dimension), root @ root.T + 1e-3 * np.eye(dimension))

    return [one() for _ in range(count or int(rng.integers(2, 8)))]


def assert_certified(centre):
    """The Karush-Kuhn-Tucker conditions, and what the fields promise."""
    noise = 1e-11 * centre.chernoff + 1e-15
    assert centre.converged
    assert centre.status in STATUSES
    assert 0 <= centre.gap <= noise
    assert (centre.weights >= 0).all()
    assert centre.weights.sum() == pytest.approx(1, abs=1e-14)
    assert centre.kl_to_experts.max() == pytest.approx(centre.chernoff + centre.gap, abs=noise)
    active = centre.weights > 1e-9
    np.testing.assert_allclose(centre.kl_to_experts[active], centre.chernoff, rtol=1e-8, atol=1e-15)


@pytest.mark.parametrize("name", cases("k_experts_categorical"))
def test_rows_have_the_reference_digits(name):
    case = CASES[name]
    rows = log_of(case["parameters"]["experts"])
    centre = solve_minimax(rows)
    assert_certified(centre)
    assert centre.chernoff == pytest.approx(number(case["chernoff_information"]), rel=1e-13)
    weights = np.array(case["weights_star"], dtype=float)
    np.testing.assert_allclose(centre.weights, weights, atol=1e-12)
    np.testing.assert_array_equal(centre.weights == 0, weights == 0)
    distances = np.array(case["kl_q_experts"], dtype=float)
    np.testing.assert_allclose(centre.kl_to_experts, distances, atol=1e-13)
    q_star = np.array(case["q_star"], dtype=float)
    np.testing.assert_allclose(np.exp(log_geometric_mean(rows, centre.weights)), q_star, atol=1e-12)


@pytest.mark.parametrize("name", cases("k_experts_gaussian_unit_cov"))
def test_gaussians_of_unit_covariance_have_the_reference_ball(name):
    case = CASES[name]
    experts = [Gaussian(mean, np.eye(len(mean))) for mean in case["parameters"]["means"]]
    centre = solve_minimax(experts)
    assert_certified(centre)
    assert centre.chernoff == pytest.approx(number(case["chernoff_information"]), rel=1e-13)
    np.testing.assert_allclose(
        centre.weights, np.array(case["weights_star"], dtype=float), atol=1e-12
    )
    q_star = geometric_mean(experts, centre.weights)
    np.testing.assert_allclose(q_star.mean, np.array(case["q_mean"], dtype=float), atol=1e-12)


@pytest.mark.parametrize(("random_experts", "count"), [(random_rows, 120), (random_gaussians, 60)])
def test_random_experts_are_certified(random_experts, count):
    for seed in range(count):
        assert_certified(solve_minimax(random_experts(seed)))


def assert_as_a_pair(seed):
    rows = random_rows(seed, count=2)
    centre, balance = solve_minimax(rows), qstar.solve_kl_symmetry(*rows)
    assert centre.chernoff == pytest.approx(float(balance.chernoff), rel=1e-12)
    spread = math.sqrt(float(balance.curvature))
    assert abs(centre.weights[0] - balance.alpha) * spread < 1e-8
    experts = random_gaussians(seed, count=2)
    pair = gaussian.solve_kl_symmetry(*experts)
    assert solve_minimax(experts).chernoff == pytest.approx(pair.chernoff, rel=1e-11)


def test_two_experts_are_a_policy_and_a_teacher():
    for seed in range(30):
        assert_as_a_pair(seed)


@pytest.mark.parametrize("seed", range(5))
def test_no_other_distribution_is_nearer_to_the_farthest_expert(seed):
    """max_i KL(q || p_i) >= C + KL(q || q*), for 2,000 random q and some beside q*."""
    rows = random_rows(seed, scale=2.0)
    centre = solve_minimax(rows)
    log_q_star = log_geometric_mean(rows, centre.weights)
    rng = np.random.default_rng(seed)
    others = [log_softmax(3 * rng.normal(size=(1_000, rows.shape[1])), axis=-1)]
    others.append(log_softmax(log_q_star + 1e-3 * rng.normal(size=(1_000, rows.shape[1])), axis=-1))
    q = np.concatenate(others)
    radius = np.max([qstar.kl(q, np.broadcast_to(row, q.shape)) for row in rows], axis=0)
    extra = qstar.kl(q, np.broadcast_to(log_q_star, q.shape))
    assert (radius >= centre.chernoff + extra - 1e-12).all()
    # The control: claimed of a distribution that is not the centre, the same inequality fails.
    wrong = log_geometric_mean(rows, np.eye(len(rows))[0])
    assert (radius < centre.chernoff + qstar.kl(q, np.broadcast_to(wrong, q.shape)) - 1e-12).any()


@pytest.mark.parametrize("seed", range(6))
def test_a_general_purpose_optimiser_finds_no_higher_lower_bound(seed):
    rows = random_rows(seed, scale=1.5)
    count = len(rows)
    found = minimize(
        lambda w: log_partition(rows, np.maximum(w, 0) / np.maximum(w, 0).sum()),
        np.full(count, 1 / count),
        method="SLSQP",
        bounds=[(0, 1)] * count,
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1},
        options={"ftol": 1e-14, "maxiter": 500},
    )
    centre = solve_minimax(rows)
    assert -found.fun <= centre.chernoff + 1e-13
    assert -found.fun == pytest.approx(centre.chernoff, abs=1e-7)


@pytest.mark.parametrize("seed", range(10))
def test_unit_covariances_make_it_the_smallest_enclosing_ball(seed):
    """Against every ball through two or three of the points, in the plane."""
    points = np.random.default_rng(seed).normal(size=(7, 2)) * 3
    centre = solve_minimax([Gaussian(point, np.eye(2)) for point in points])
    candidates = [(a + b) / 2 for i, a in enumerate(points) for b in points[:i]]
    for i, a in enumerate(points):
        for j, b in enumerate(points[:i]):
            for c in points[:j]:
                sides = 2 * np.array([b - a, c - a])
                squares = [(b - a) @ (b - a), (c - a) @ (c - a)]
                candidates.append(a + np.linalg.solve(sides, squares))
    radii = [np.linalg.norm(points - at, axis=1).max() for at in candidates]
    assert centre.chernoff == pytest.approx(min(radii) ** 2 / 2, rel=1e-12)
    q_star = geometric_mean([Gaussian(point, np.eye(2)) for point in points], centre.weights)
    np.testing.assert_allclose(q_star.mean, candidates[int(np.argmin(radii))], atol=1e-7)


def test_log_partition_is_minus_the_weighted_divergence_and_convex():
    rows, rng = random_rows(3, count=4, scale=1.0), np.random.default_rng(0)
    for _ in range(20):
        one, other = rng.dirichlet(np.ones(4), size=2)
        path = np.exp(one @ rows)
        assert log_partition(rows, one) == pytest.approx(np.log(path.sum()), abs=1e-14)
        middle = log_partition(rows, (one + other) / 2)
        assert middle <= (log_partition(rows, one) + log_partition(rows, other)) / 2 + 1e-15


EDGES = {  # experts -> status, weights (None: not unique), C
    "no common outcome": (
        [[0.5, 0.5, 0], [0, 0.5, 0.5], [0.5, 0, 0.5]],
        "disjoint",
        None,
        math.inf,
    ),
    "one common outcome": (
        *([[0.5, 0.5, 0], [0, 0.5, 0.5], [0.3, 0.3, 0.4]], "boundary"),
        *([0, 0, 1], -math.log(0.3)),
    ),
    "identical": ([[0.2, 0.8]] * 3, "degenerate_all", [1 / 3] * 3, 0.0),
    "agree where they meet": (
        *([[0.5, 0.5, 0], [0.5, 0, 0.5]], "degenerate_all", [0.5, 0.5], math.log(2)),
    ),
    "truncated teacher": (
        *([[0.5, 0.4, 0.1, 0], [0.3, 0.25, 0.05, 0.4]], "boundary"),
        *([0, 1], -math.log(0.6)),
    ),
    "one vocabulary entry": ([[1.0], [1.0]], "degenerate_all", [0.5, 0.5], 0.0),
}


@pytest.mark.parametrize("case", EDGES.values(), ids=EDGES)
def test_edges_have_their_status(case):
    experts, status, weights, chernoff = case
    centre = solve_minimax(log_of(experts))
    assert (centre.status, centre.converged) == (status, status != "disjoint")
    assert centre.chernoff == pytest.approx(chernoff, abs=1e-14)
    if weights is not None:
        np.testing.assert_allclose(centre.weights, weights, atol=1e-12)


def test_repeated_experts_share_their_weight():
    one, other = Gaussian(0.0, 1.0), Gaussian(1.0, 1.0)
    centre = solve_minimax([one, one, other])
    assert centre.weights[:2].sum() == pytest.approx(0.5, abs=1e-12)
    assert centre.chernoff == pytest.approx(1 / 8, rel=1e-13)
    assert solve_minimax([one] * 3).status == "degenerate_all"


def test_an_expert_inside_the_ball_changes_nothing():
    far = [Gaussian([0.0, 0.0], np.eye(2)), Gaussian([6.0, 0.0], np.eye(2))]
    alone, joined = solve_minimax(far), solve_minimax([*far, Gaussian([3.0, 1.0], np.eye(2))])
    assert joined.status == "boundary"
    assert joined.weights[2] == 0
    assert joined.chernoff == pytest.approx(alone.chernoff, rel=1e-14)


REFUSED = [
    (lambda: solve_minimax(log_of([[0.5, 0.5]])), "at least two rows"),
    (lambda: solve_minimax(np.zeros((2, 3))), "row 0 sums to 3"),
    (lambda: solve_minimax([Gaussian(0.0, 1.0)]), "at least two Gaussians"),
    (lambda: solve_minimax([Gaussian(0.0, 1.0), Gaussian([0.0, 0.0], np.eye(2))]), "dimensions"),
    (lambda: solve_minimax([Gaussian(0.0, 1.0), [0.5, 0.5]]), "got both kinds"),
    (lambda: log_partition(log_of([[0.5, 0.5]] * 2), [0.5, 0.6]), "with sum 1"),
    (lambda: log_geometric_mean(log_of([[1.0, 0], [0, 1.0]]), [0.5, 0.5]), "share an outcome"),
]


@pytest.mark.parametrize(("call", "message"), REFUSED)
def test_what_is_refused_says_why(call, message):
    with pytest.raises(ValueError, match=message):
        call()
