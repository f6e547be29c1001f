"""Quadrature and summation: partial supports, heavy tails, the plane, and how they fail."""

import itertools
import math

import numpy as np
import pytest
from scipy.integrate import cubature
from scipy.stats import gaussian_kde, multivariate_t, rv_histogram, zipf

import qstar
from qstar import gaussian
from qstar.families import (
    Affine,
    Bernoulli,
    Beta,
    Binomial,
    Cauchy,
    Density,
    Exponential,
    Gamma,
    Gaussian,
    GaussianMixture,
    Geometric,
    Laplace,
    Mixture,
    Pareto,
    Poisson,
    StudentT,
    Uniform,
    Weibull,
    geometric_mean,
    kl,
    kl_to_parents,
    log_partition,
    quadrature,
    solve_kl_symmetry,
)
from qstar.families.continuous import GaussianLine

LOG2 = math.log(2)
PARTIAL = {  # policy, teacher -> status, alpha, C, KL(q*||policy), KL(q*||teacher)
    "nested": (Uniform(0, 1), Uniform(0, 2), "boundary_0", 0.0, LOG2, 0.0, LOG2),
    "nested, swapped": (Uniform(0, 2), Uniform(0, 1), "boundary_1", 1.0, LOG2, LOG2, 0.0),
    "half": (Uniform(0, 2), Uniform(1, 3), "degenerate_all", 0.5, LOG2, LOG2, LOG2),
    "unequal halves": (
        *(Uniform(0, 2), Uniform(1, 5), "boundary_0", 0.0),
        *(2 * LOG2, LOG2, 2 * LOG2),
    ),
    "touching": (Uniform(0, 1), Uniform(1, 2), "disjoint", math.nan, *[math.inf] * 3),
    "apart": (Uniform(0, 1), Uniform(3, 4), "disjoint", math.nan, *[math.inf] * 3),
    "the same": (Uniform(0, 3), Uniform(0, 3), "degenerate_all", 0.5, 0.0, 0.0, 0.0),
    "the same, unnamed": (Cauchy(1, 2), Cauchy(1, 2), "degenerate_all", 0.5, 0.0, 0.0, 0.0),
    "late exponential": (
        *(Exponential(1.0), Affine(Exponential(1.0), 1.0), "boundary_1", 1.0),
        *(1.0, 1.0, 0.0),
    ),
    "pareto from 2": (
        *(Pareto(1.0, 1.0), Pareto(1.0, 2.0), "boundary_1", 1.0),
        *(LOG2, LOG2, 0.0),
    ),
    "halfnormal": (
        *(Gaussian(0.0, 1.0), Density(lambda x: LOG2 + normal(x), [(0.0, 1.0)], low=0.0)),
        *("boundary_1", 1.0, LOG2, LOG2, 0.0),
    ),
    "sure failure": (
        *(Bernoulli(0.0), Bernoulli(0.25), "boundary_0", 0.0),
        *(math.log(4 / 3), 0.0, math.log(4 / 3)),
    ),
    "sure and sure": (Bernoulli(0.0), Bernoulli(1.0), "disjoint", math.nan, *[math.inf] * 3),
    "sure twice": (Binomial(3, 1.0), Binomial(3, 1.0), "degenerate_all", 0.5, 0.0, 0.0, 0.0),
}


def normal(x):
    return -0.5 * x**2 - 0.5 * math.log(2 * math.pi)


@pytest.mark.parametrize("case", PARTIAL.values(), ids=PARTIAL)
def test_partly_shared_supports_have_the_statuses_of_the_core(case):
    policy, teacher, status, alpha, *divergences = case
    balance = solve_kl_symmetry(policy, teacher)
    assert (balance.status, balance.converged) == (status, status != "disjoint")
    assert balance.alpha == pytest.approx(alpha, abs=1e-12, nan_ok=True)
    found = balance.chernoff, balance.kl_to_policy, balance.kl_to_teacher
    assert found == pytest.approx(divergences, abs=1e-14)


def test_a_cut_normal_against_a_uniform_is_interior_or_not_as_the_slopes_say():
    """Uniform(-h, h) against a standard normal: the teacher's conditional is nearer for small h."""
    for half in (0.5, 4.0):
        balance = solve_kl_symmetry(Uniform(-half, half), Gaussian(0.0, 1.0))
        mass = math.erf(half / math.sqrt(2))
        x = np.linspace(-half, half, 200_001)
        conditional = np.exp(normal(x)) / mass
        to_uniform = np.trapezoid(conditional * np.log(conditional * 2 * half), x)
        expected = "boundary_0" if -math.log(mass) >= to_uniform else "interior"
        assert balance.status == expected
    assert balance.status == "interior"
    assert balance.kl_to_policy == pytest.approx(balance.kl_to_teacher, rel=1e-12)


def test_binomials_of_different_counts_are_rows_of_their_probabilities():
    policy, teacher = Binomial(10, 0.3), Binomial(14, 0.5)
    rows = [distribution.log_density(np.arange(15)) for distribution in (policy, teacher)]
    expected, found = qstar.solve_kl_symmetry(*rows), solve_kl_symmetry(policy, teacher)
    assert found.alpha == pytest.approx(float(expected.alpha), abs=1e-14)
    assert found.chernoff == pytest.approx(float(expected.chernoff), rel=1e-14)


def test_infinite_supports_are_summed_to_the_end():
    """A geometric with mean 1000 against a Poisson: a thousand times further than its mode."""
    policy, teacher = Geometric(1e-3), Poisson(900.0)
    count = np.arange(60_000)
    rows = [distribution.log_density(count) for distribution in (policy, teacher)]
    expected, found = qstar.solve_kl_symmetry(*rows), solve_kl_symmetry(policy, teacher)
    assert found.converged
    assert found.chernoff == pytest.approx(float(expected.chernoff), rel=1e-12)


@pytest.mark.parametrize("gap", [40.0, 1e3, 1e5])
def test_far_parents_keep_their_relative_precision(gap):
    """q* sits where neither parent has mass: exp(-gap^2 / 8), far beyond underflow."""
    ours, theirs = GaussianLine(0.0, 1.0), GaussianLine(gap, 1.0)
    balance = quadrature.solve_kl_symmetry(ours, theirs)
    assert balance.alpha == pytest.approx(0.5, abs=1e-12)
    assert balance.chernoff == pytest.approx(gap**2 / 8, rel=1e-13)


@pytest.mark.parametrize("past", [1e-5, 1e-4, 1e-3])
@pytest.mark.parametrize("alpha", [0.3, 0.77])
def test_a_far_peak_just_past_a_cut_is_found(alpha, past):
    """Cells are cut at 4^6 / 2. The peak lies in a cell whose nodes are farther from it than those
    of the cell before, which is refined towards the cut and must not be taken for the peak."""
    gap = 2**11 * (1 + past) / (1 - alpha)
    found = log_partition(GaussianLine(0.0, 1.0), GaussianLine(gap, 1.0), alpha)
    assert found == pytest.approx(-alpha * (1 - alpha) * gap**2 / 2, rel=1e-13)


def test_scales_a_million_apart_are_both_resolved():
    ours, theirs = GaussianLine(3.0, 1e-3), GaussianLine(-50.0, 1e3)
    expected = gaussian.solve_kl_symmetry(Gaussian(3.0, 1e-6), Gaussian(-50.0, 1e6))
    found = quadrature.solve_kl_symmetry(ours, theirs)
    assert found.converged
    assert found.alpha == pytest.approx(expected.alpha, abs=1e-12)
    assert found.chernoff == pytest.approx(expected.chernoff, rel=1e-12)


@pytest.mark.parametrize("freedom", [0.1, 0.3, 1.0, 3.0])
def test_power_law_tails_are_integrated_to_their_end(freedom):
    """Moved, scaled and swapped copies agree: no cut of the tail is visible."""
    one = solve_kl_symmetry(StudentT(freedom, 0.0, 1.0), StudentT(freedom, 1.0, 10.0))
    other = solve_kl_symmetry(StudentT(freedom, 300.0, 1e4), StudentT(freedom, -700.0, 1e3))
    assert one.converged
    assert other.converged
    assert one.alpha + other.alpha == pytest.approx(1, abs=1e-11)
    assert one.chernoff == pytest.approx(other.chernoff, rel=1e-11)


def test_singular_ends_are_integrated_from_the_end():
    """Densities x^(-0.95) and (1 - x)^(-0.95): half of the mass is within 1e-6 of an end."""
    policy, teacher = Beta(0.05, 0.05), Beta(0.5, 0.1)
    expected = solve_kl_symmetry(policy, teacher)
    found = quadrature.solve_kl_symmetry(policy, teacher)
    assert found.converged
    assert found.chernoff == pytest.approx(expected.chernoff, rel=1e-11)
    moved = quadrature.solve_kl_symmetry(Affine(policy, 5.0, 2.0), Affine(teacher, 5.0, 2.0))
    assert moved.chernoff == pytest.approx(expected.chernoff, rel=1e-11)


INFINITE = [
    (Cauchy(0.0, 1.0), Gaussian(0.0, 1.0)),
    (Cauchy(0.0, 1.0), Laplace(0.0, 1.0)),
    (StudentT(2.0, 0.0, 1.0), Gaussian(0.0, 1.0)),
    (Pareto(1.0, 1.0), Weibull(1.0, 1.0)),
    (Uniform(0.0, 2.0), Uniform(0.0, 1.0)),
    (Poisson(1.0), Binomial(50, 0.1)),
]
FINITE = [
    (StudentT(3.0, 0.0, 1.0), Gaussian(0.0, 1.0)),
    (StudentT(1.5, 0.0, 1.0), Laplace(0.0, 1.0)),
    (Pareto(1.5, 1.0), Gamma(1.0, 1.0)),
    (Uniform(0.0, 1.0), Uniform(0.0, 2.0)),
]


@pytest.mark.parametrize(("p", "q"), INFINITE)
def test_divergences_that_are_infinite_are_called_so(p, q):
    assert kl(p, q) == math.inf


@pytest.mark.parametrize(("p", "q"), FINITE)
def test_divergences_with_a_heavy_tail_that_are_finite_are_found(p, q):
    """And the value does not change when both are moved, the quadrature's cuts with them."""
    value = kl(p, q)
    assert 0 < value < math.inf
    moved = quadrature.kl(Affine(p, 1.0, 3.0), Affine(q, 1.0, 3.0))
    assert moved == pytest.approx(value, rel=1e-9)


def test_student_against_normal_has_the_known_divergence():
    """E x^2 = nu / (nu - 2), and the entropy of Student's t in digamma and beta functions."""
    from scipy.special import betaln, digamma

    nu = 5.0
    entropy = (nu + 1) / 2 * (digamma((nu + 1) / 2) - digamma(nu / 2))
    entropy += 0.5 * math.log(nu) + betaln(nu / 2, 0.5)
    expected = 0.5 * math.log(2 * math.pi) + 0.5 * nu / (nu - 2) - entropy
    assert kl(StudentT(nu, 0.0, 1.0), Gaussian(0.0, 1.0)) == pytest.approx(expected, rel=1e-12)


def test_a_tail_between_finite_and_infinite_is_refused():
    with pytest.raises(ArithmeticError, match="beyond the reach of float64"):
        kl(StudentT(2.01, 0.0, 1.0), Gaussian(0.0, 1.0))


def test_an_infinite_divergence_leaves_an_interior_balance():
    """KL(teacher || policy) is infinite; alpha* is in (0, 1) all the same."""
    policy, teacher = Gaussian(0.0, 1.0), Cauchy(0.0, 1.0)
    to_policy, to_teacher = kl_to_parents(policy, teacher, [0.0, 0.5, 1.0])
    assert to_policy[0] == math.inf
    assert to_teacher[0] == 0
    assert to_policy[2] == 0
    assert to_teacher[2] == pytest.approx(kl(policy, teacher), rel=1e-12)


def test_a_jump_inside_a_mixture_is_found():
    policy = Mixture([0.5, 0.5], [Uniform(0.0, 1.0), Uniform(2.0, 3.0)])
    teacher = Uniform(0.5, 2.5)
    balance = solve_kl_symmetry(policy, teacher)
    assert balance.status == "degenerate_all"
    assert balance.chernoff == pytest.approx(LOG2, rel=1e-13)


def test_an_unnamed_kink_is_found_by_halving():
    def wedge(x):
        return np.log(np.maximum(1 - np.abs(x - 0.1234), 1e-300))

    tent = Density(wedge, [(0.0, 1.0)], low=-0.8766, high=1.1234)
    named = Density(wedge, [(0.1234, 1.0)], low=-0.8766, high=1.1234)
    one, other = (
        solve_kl_symmetry(distribution, Gaussian(0.0, 1.0)) for distribution in (tent, named)
    )
    assert one.converged
    assert one.chernoff == pytest.approx(other.chernoff, rel=1e-10)


def test_named_jumps_are_exact_and_unnamed_ones_are_resolved_or_flagged():
    """A histogram of 20 bins: its edges named, it is a mixture of uniforms, exactly."""
    counts, edges = np.histogram(np.random.default_rng(0).normal(size=500), bins=20)
    frozen = rv_histogram((counts, edges))
    bins = [Uniform(low, high) for low, high in itertools.pairwise(edges)]
    keep = [i for i, count in enumerate(counts) if count]
    mixture = Mixture(counts[keep] / counts.sum(), [bins[i] for i in keep])
    places = [(edge, edges[1] - edges[0]) for edge in edges]
    named = Density(frozen.logpdf, places, edges[0], edges[-1])
    expected, found = (
        solve_kl_symmetry(distribution, Gaussian(0.0, 1.0)) for distribution in (mixture, named)
    )
    assert expected.converged
    assert found.converged
    assert found.chernoff == pytest.approx(expected.chernoff, rel=1e-11)
    unnamed = solve_kl_symmetry(frozen, Gaussian(0.0, 1.0))
    assert not unnamed.converged or unnamed.chernoff == pytest.approx(expected.chernoff, rel=1e-9)


def test_a_kernel_estimate_of_many_points_is_integrated():
    points = np.random.default_rng(0).normal(size=200)
    assert solve_kl_symmetry(gaussian_kde(points), Gaussian(0.0, 1.0)).converged


# ---- The plane ---------------------------------------------------------------------------------

ROUND = np.eye(2)
BANANA = GaussianMixture(
    [0.5, 0.5],
    [Gaussian([-3.0, 0.0], ROUND), Gaussian([3.0, 0.0], [[1.0, 0.5], [0.5, 2.0]])],
)
CROSS = GaussianMixture(
    [0.3, 0.7],
    [Gaussian([0.0, 2.0], ROUND), Gaussian([0.0, -3.0], [[0.3, 0.1], [0.1, 0.2]])],
)


def test_two_gaussians_of_the_plane_come_out_as_in_closed_form():
    ours = Gaussian([0.0, 0.0], [[0.5, 0.3], [0.3, 0.2]])
    theirs = Gaussian([1.0, 2.0], [[2.0, -0.6], [-0.6, 1.0]])
    expected = gaussian.solve_kl_symmetry(ours, theirs)
    found = quadrature.solve_kl_symmetry(
        GaussianMixture([1.0], [ours]), GaussianMixture([1.0], [theirs])
    )
    assert found.converged
    assert found.alpha == pytest.approx(expected.alpha, abs=1e-11)
    assert found.chernoff == pytest.approx(expected.chernoff, rel=1e-11)


def test_mixtures_of_the_plane_agree_with_an_independent_cubature():
    balance = solve_kl_symmetry(BANANA, CROSS)
    assert balance.converged

    def integrand(x):
        path = balance.alpha * BANANA.log_density(x) + (1 - balance.alpha) * CROSS.log_density(x)
        ratio = BANANA.log_density(x) - CROSS.log_density(x)
        return np.exp(path)[:, None] * np.stack([np.ones(len(x)), ratio], axis=-1)

    found = cubature(integrand, [-14, -14], [14, 14], rule="gk21", rtol=1e-9, atol=1e-10)
    assert -np.log(found.estimate[0]) == pytest.approx(balance.chernoff, abs=1e-8)
    assert found.estimate[1] == pytest.approx(0, abs=1e-8)


def test_the_plane_keeps_the_theory():
    there, back = solve_kl_symmetry(BANANA, CROSS), solve_kl_symmetry(CROSS, BANANA)
    assert there.alpha + back.alpha == pytest.approx(1, abs=1e-10)
    forward, backward = kl(BANANA, CROSS), kl(CROSS, BANANA)
    assert there.chernoff / backward <= there.alpha <= 1 - there.chernoff / forward
    log_z = log_partition(BANANA, CROSS, np.linspace(0, 1, 6))
    assert (np.diff(log_z, 2) > 0).all()
    assert log_z[[0, -1]] == pytest.approx([0, 0], abs=1e-12)
    q = geometric_mean(BANANA, CROSS, there.alpha)
    draws = q.sample(2_000, generator=np.random.default_rng(0))
    ratio = BANANA.log_density(draws) - CROSS.log_density(draws)  # mean zero under q*
    assert abs(ratio.mean()) < 6.1 * ratio.std() / math.sqrt(len(ratio))  # false alarm 1e-9


def test_heavy_tails_of_the_plane_are_integrated():
    light = Gaussian([1.0, 0.0], ROUND)
    balance = solve_kl_symmetry(multivariate_t([0, 0], df=3), light)
    assert (balance.status, balance.converged) == ("interior", True)
    assert kl(multivariate_t([0, 0], df=2), light) == math.inf


# ---- Knowing when it fails -----------------------------------------------------------------------


def test_a_peak_that_no_landmark_names_is_noticed_by_its_missing_mass():
    def two_peaks(x):
        narrow = -0.5 * ((x - 0.3) / 1e-7) ** 2 - math.log(1e-7)
        return np.logaddexp(normal(x), narrow - 0.5 * math.log(2 * math.pi)) - LOG2

    blind = Density(two_peaks, [(-2.0, 1.0)])
    with pytest.raises(ValueError, match=r"its mass came out as 0\.5.*name its peaks"):
        solve_kl_symmetry(blind, Gaussian(0.0, 1.0))
    seeing = Density(two_peaks, [(-2.0, 1.0), (0.3, 1e-7)])
    assert solve_kl_symmetry(seeing, Gaussian(0.0, 1.0)).converged


def test_a_noisy_density_is_flagged():
    """No refinement resolves noise: the balance says so, log Z and KL raise."""

    def noisy(x):
        return normal(x) + 1e-7 * np.sin(1e9 * x)

    distribution = Density(noisy, [(0.0, 1.0)])
    balance = solve_kl_symmetry(distribution, Gaussian(1.0, 1.0))
    assert not balance.converged
    assert balance.chernoff == pytest.approx(1 / 8, abs=1e-6)
    with pytest.raises(ArithmeticError, match="did not converge"):
        log_partition(distribution, Gaussian(1.0, 1.0), 0.5)


def test_a_sum_that_leaves_its_tail_is_flagged_or_refused():
    with pytest.raises(ValueError, match=r"its mass came out as 0\.999"):
        solve_kl_symmetry(zipf(1.5), zipf(4))


def test_a_density_that_is_nan_is_refused():
    broken = Density(lambda x: np.where(x > 0.5, np.nan, normal(x)), [(0.0, 1.0)])
    with pytest.raises(ValueError, match="must be finite or -inf"):
        solve_kl_symmetry(broken, Gaussian(0.0, 1.0))
