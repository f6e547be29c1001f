"""Every family: alpha* and C against 30-digit values, mpmath, quadrature and theory."""

import json
import math
from pathlib import Path

import mpmath
import numpy as np
import pytest
import scipy.stats
from reference import CASES, number
from reference_distributions import MAKERS, NAMES, pair
from scipy.stats import kstest

import qstar
from qstar import families
from qstar.families import (
    Affine,
    Bernoulli,
    Beta,
    Binomial,
    Categorical,
    Cauchy,
    Density,
    Dirichlet,
    Exponential,
    Gamma,
    Gaussian,
    GaussianMixture,
    Geometric,
    GeometricMean,
    Laplace,
    Logistic,
    Mixture,
    NegativeBinomial,
    Pareto,
    Poisson,
    Rayleigh,
    StudentT,
    Uniform,
    VonMises,
    Weibull,
    exponential,
    geometric_mean,
    kl,
    kl_gap,
    kl_to_parents,
    log_partition,
    quadrature,
    solve_kl_symmetry,
)

ILL_CONDITIONED = {"g1_near_identical_1e-8"}  # alpha; C and q* are fine
ON_THE_LINE = [  # close parents keep of a black-box log-ratio only what rounding leaves
    name
    for name in NAMES
    if CASES[name]["family"] not in ("gaussian_2d", "gaussian_nd", "dirichlet", "von_mises")
    and name not in ILL_CONDITIONED
]
EXTREME = {  # pairs of one exponential family, far apart or nearly equal
    "bernoulli, rare": (Bernoulli(1e-9), Bernoulli(0.5)),
    "bernoulli, 1e-300": (Bernoulli(1e-300), Bernoulli(0.9)),
    "bernoulli, close": (Bernoulli(0.3), Bernoulli(0.3 + 1e-9)),
    "binomial, large count": (Binomial(10**9, 0.3), Binomial(10**9, 0.300001)),
    "poisson, ratio 1e8": (Poisson(1e-4), Poisson(1e4)),
    "poisson, close": (Poisson(1e6), Poisson(1e6 + 1e-3)),
    "geometric, rare": (Geometric(1e-8), Geometric(0.5)),
    "negative binomial": (NegativeBinomial(1e5, 1e-3), NegativeBinomial(1e5, 0.9)),
    "gamma, rates 1e8": (Gamma(2.0, 1e8), Gamma(2.0, 1.0)),
    "gamma, shapes 1e6": (Gamma(1e6, 1e6), Gamma(2e6, 2e6)),
    "gamma, close": (Gamma(3.0, 2.0), Gamma(3.0 + 1e-8, 2.0)),
    "gamma, small shapes": (Gamma(1e-3, 1.0), Gamma(5.0, 1e-6)),
    "beta, sharp": (Beta(1e5, 1e5), Beta(1e5 + 300, 1e5)),
    "beta, opposite": (Beta(0.01, 40.0), Beta(40.0, 0.01)),
    "dirichlet": (Dirichlet([1e-2, 3.0, 1e3]), Dirichlet([5.0, 0.1, 1e2])),
    "dirichlet, parallel": (Dirichlet([1e6, 2e6, 3e6]), Dirichlet([2e6, 4e6, 6e6])),
    "von mises, sharp": (VonMises(1e5, 0.3), VonMises(1e5, 0.3001)),
    "von mises, opposite": (VonMises(20.0, 0.0), VonMises(0.5, 3.0)),
    "von mises, around 20": (VonMises(19.0, 0.0), VonMises(24.0, 0.5)),
    "laplace, scales 1e8": (Laplace(2.0, 1e-4), Laplace(2.0, 1e4)),
    "weibull": (Weibull(7.0, 1.0), Weibull(7.0, 1.3)),
    "rayleigh, close": (Rayleigh(1.0), Rayleigh(1.0 + 1e-10)),
    "pareto": (Pareto(0.2, 3.0), Pareto(20.0, 3.0)),
}


# ---- The reference file ------------------------------------------------------------------------


def test_the_reference_file_has_every_family():
    assert len(NAMES) >= 50
    assert {CASES[name]["family"] for name in NAMES} == set(MAKERS) - {"gaussian"}


@pytest.mark.parametrize("name", NAMES)
def test_balance_has_the_reference_digits(name):
    case = CASES[name]
    balance = solve_kl_symmetry(*pair(name))
    digits = 10.0 ** -min(13, case["digits"])
    assert (balance.status, balance.converged) == (case.get("status", "interior"), True)
    if name not in ILL_CONDITIONED:
        assert balance.alpha == pytest.approx(number(case["alpha_star"]), abs=digits)
    for value in (balance.chernoff, balance.kl_to_policy, balance.kl_to_teacher):
        assert value == pytest.approx(number(case["chernoff_information"]), rel=digits, abs=0)
    assert {type(value) for value in (balance.alpha, balance.chernoff, balance.slope)} == {float}


@pytest.mark.parametrize("name", NAMES)
def test_kl_between_the_parents_has_the_reference_digits(name):
    policy, teacher = pair(name)
    digits = 10.0 ** -min(13, CASES[name]["digits"])
    for value, key in ((kl(policy, teacher), "kl_theta_t"), (kl(teacher, policy), "kl_t_theta")):
        assert value == pytest.approx(number(CASES[name][key]), rel=digits, abs=0)


@pytest.mark.parametrize("name", ON_THE_LINE)
def test_quadrature_finds_the_reference_digits_of_closed_families_too(name):
    """The same densities, through the route that knows nothing of exponential families."""
    policy, teacher = (families._as_density(distribution) for distribution in pair(name))
    digits = 10.0 ** -min(12, CASES[name]["digits"])
    balance = quadrature.solve_kl_symmetry(policy, teacher)
    assert balance.converged
    assert balance.alpha == pytest.approx(number(CASES[name]["alpha_star"]), abs=digits)
    expected = number(CASES[name]["chernoff_information"])
    assert balance.chernoff == pytest.approx(expected, rel=digits, abs=0)


def test_bhattacharyya_at_a_fixed_alpha_has_the_reference_digits():
    path = Path(__file__).parents[2] / "data" / "reference_cases.json"
    checks = json.loads(path.read_text())["meta"]["fixed_alpha_checks"]
    assert checks
    for case in checks:
        given = case["parameters"]
        policy = Gaussian(given["mu_theta"], given["cov_theta"])
        teacher = Gaussian(given["mu_t"], given["cov_t"])
        value = -log_partition(policy, teacher, case["alpha"])
        assert value == pytest.approx(float(case["minus_log_Z"]), rel=1e-14)


def test_a_markov_chain_as_one_categorical_has_the_reference_digits():
    """All eight sequences of three tokens, as labels: the sequence-level geometric mean."""
    case = CASES["seq_markov_T3"]
    given = case["parameters"]

    def sequences(side):
        start = np.array(given[f"init_{side}"], dtype=float)
        step = np.array(given[f"trans_{side}"], dtype=float)
        return Categorical(np.einsum("i,ij,jk->ijk", start, step, step).ravel())

    balance = solve_kl_symmetry(sequences("theta"), sequences("t"))
    assert balance.alpha == pytest.approx(number(case["alpha_star"]), abs=1e-13)
    assert balance.chernoff == pytest.approx(number(case["chernoff_information"]), rel=1e-13)


# ---- Exponential families against mpmath -------------------------------------------------------


def natural(distribution):
    """(natural parameters, log-normaliser) of a distribution, in mpmath."""
    m = mpmath.mpf
    match distribution:
        case Bernoulli(p) | Binomial(_, p):
            count = getattr(distribution, "trials", 1)
            return [mpmath.log(m(p) / (1 - m(p)))], lambda e: count * mpmath.log1p(mpmath.exp(e[0]))
        case Poisson(rate):
            return [mpmath.log(m(rate))], lambda e: mpmath.exp(e[0])
        case Geometric(p) | NegativeBinomial(_, p):
            r = m(getattr(distribution, "successes", 1))
            return [mpmath.log(1 - m(p))], lambda e: -r * mpmath.log(1 - mpmath.exp(e[0]))
        case Gamma(shape, rate):
            return [m(shape), m(rate)], lambda e: mpmath.loggamma(e[0]) - e[0] * mpmath.log(e[1])
        case Beta(a, b):
            return [m(a), m(b)], log_beta
        case Dirichlet():
            return [m(float(c)) for c in distribution.concentration], log_beta
        case VonMises(kappa, mu):
            vector = [m(kappa) * mpmath.cos(m(mu)), m(kappa) * mpmath.sin(m(mu))]
            return vector, lambda e: mpmath.log(mpmath.besseli(0, mpmath.hypot(*e)))
        case Laplace(_, scale):
            return [1 / m(scale)], lambda e: -mpmath.log(e[0])
        case Weibull(shape, scale):
            return [m(scale) ** -m(shape)], lambda e: -mpmath.log(e[0])
        case Rayleigh(scale):
            return [m(scale) ** -2], lambda e: -mpmath.log(e[0])
        case Pareto(shape, _):
            return [m(shape)], lambda e: -mpmath.log(e[0])


def log_beta(concentration):
    return sum(map(mpmath.loggamma, concentration)) - mpmath.loggamma(sum(concentration))


def in_mpmath(policy, teacher):
    """(alpha*, C, KL(policy || teacher), KL(teacher || policy)) from A alone, at 60 digits."""
    with mpmath.workdps(60):
        (ours, log_normaliser), (theirs, _) = natural(policy), natural(teacher)

        def log_z(alpha):
            point = [alpha * x + (1 - alpha) * y for x, y in zip(ours, theirs, strict=True)]
            ends = alpha * log_normaliser(ours) + (1 - alpha) * log_normaliser(theirs)
            return log_normaliser(point) - ends

        def slope(alpha):
            return mpmath.diff(log_z, alpha, h=mpmath.mpf(10) ** -25)

        low, high = mpmath.mpf(10) ** -20, 1 - mpmath.mpf(10) ** -20
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (middle, high) if slope(middle) < 0 else (low, middle)
        alpha = mpmath.findroot(slope, (low, high), solver="illinois", tol=1e-50, verify=False)
        step = mpmath.mpf(10) ** -25
        ends = [(log_z(at + step) - log_z(at)) / step for at in (mpmath.mpf(0), 1 - step)]
        return float(alpha), float(-log_z(alpha)), float(ends[1]), float(-ends[0])


@pytest.mark.parametrize("pair_", EXTREME.values(), ids=EXTREME)
def test_close_and_far_parents_keep_their_digits(pair_):
    alpha, chernoff, forward, backward = in_mpmath(*pair_)
    balance = solve_kl_symmetry(*pair_)
    assert (balance.status, balance.converged) == ("interior", True)
    assert balance.alpha == pytest.approx(alpha, abs=2e-12)
    assert balance.chernoff == pytest.approx(chernoff, rel=1e-12, abs=0)
    assert kl(*pair_) == pytest.approx(forward, rel=1e-11, abs=0)
    assert kl(*pair_[::-1]) == pytest.approx(backward, rel=1e-11, abs=0)


def random_members(rng):
    """A pair of random members of every exponential family."""

    def positive(spread=1.5):
        return float(np.exp(rng.uniform(-spread, spread)))

    def unit():
        return float(rng.uniform(0.02, 0.98))

    count, r, shape, location, minimum = int(rng.integers(2, 40)), *(positive() for _ in range(4))
    makers = [
        lambda: Bernoulli(unit()),
        lambda: Binomial(count, unit()),
        lambda: Poisson(positive()),
        lambda: Geometric(unit()),
        lambda: NegativeBinomial(r, unit()),
        lambda: Exponential(positive()),
        lambda: Gamma(positive(), positive()),
        lambda: Beta(positive(), positive()),
        lambda: Laplace(location, positive()),
        lambda: Weibull(shape, positive()),
        lambda: Rayleigh(positive()),
        lambda: Pareto(positive(), minimum),
        lambda: VonMises(positive(3), float(rng.uniform(-4, 4))),
        lambda: Dirichlet([positive(), positive(), positive()]),
    ]
    return [(make(), make()) for make in makers]


@pytest.mark.parametrize("seed", range(6))
def test_the_root_agrees_with_quadrature_of_the_same_densities(seed):
    for policy, teacher in random_members(np.random.default_rng(seed)):
        if policy.outcomes not in ("integers", "real numbers"):
            continue
        one = exponential.solve_kl_symmetry(policy, teacher)
        other = quadrature.solve_kl_symmetry(policy, teacher)
        assert other.converged, (policy, teacher)
        assert one.chernoff == pytest.approx(other.chernoff, rel=1e-11, abs=1e-15)
        assert one.curvature == pytest.approx(other.curvature, rel=1e-9, abs=1e-15)
        # alpha in nats: what its error costs
        assert abs(one.alpha - other.alpha) * math.sqrt(one.curvature) < 1e-11


def test_von_mises_agrees_with_the_trapezoid_on_the_circle():
    policy, teacher = VonMises(2.0, 0.4), VonMises(7.0, 2.0)
    angles = np.linspace(0, 2 * np.pi, 400, endpoint=False)
    rows = [
        distribution.log_density(angles) + np.log(2 * np.pi / 400)
        for distribution in (policy, teacher)
    ]
    expected, found = qstar.solve_kl_symmetry(*rows), solve_kl_symmetry(policy, teacher)
    assert found.alpha == pytest.approx(float(expected.alpha), abs=1e-12)
    assert found.chernoff == pytest.approx(float(expected.chernoff), rel=1e-12)


# ---- Closed forms ------------------------------------------------------------------------------


@pytest.mark.parametrize(("ours", "theirs"), [(3.0, 5.0), (1e-4, 1e4), (0.2, 0.21)])
def test_poisson_parents_meet_at_the_logarithmic_mean_of_their_rates(ours, theirs):
    log_mean = (ours - theirs) / math.log(ours / theirs)
    balance = solve_kl_symmetry(Poisson(ours), Poisson(theirs))
    expected = math.log(log_mean / theirs) / math.log(ours / theirs)
    assert balance.alpha == pytest.approx(expected, abs=1e-13)
    q = geometric_mean(Poisson(ours), Poisson(theirs), balance.alpha)
    assert q.rate == pytest.approx(log_mean, rel=1e-14)


@pytest.mark.parametrize(("p", "r"), [(0.3, 0.8), (1e-9, 0.5), (0.9, 0.99)])
def test_bernoulli_parents_meet_where_the_log_odds_say(p, r):
    expected = math.log((1 - r) / (1 - p)) / math.log(p * (1 - r) / (r * (1 - p)))
    balance = solve_kl_symmetry(Bernoulli(p), Bernoulli(r))
    q = geometric_mean(Bernoulli(p), Bernoulli(r), balance.alpha)
    assert q.probability == pytest.approx(expected, rel=1e-13)


SCALE_LAWS = {  # rho -> a pair whose exponential rates have that ratio
    "exponential": lambda rho: (Exponential(rho), Exponential(1.0)),
    "gamma": lambda rho: (Gamma(3.0, rho), Gamma(3.0, 1.0)),
    "rayleigh": lambda rho: (Rayleigh(1.0), Rayleigh(math.sqrt(rho))),
    "weibull": lambda rho: (Weibull(1.5, 1.0), Weibull(1.5, rho ** (1 / 1.5))),
    "laplace": lambda rho: (Laplace(1.0, 1.0), Laplace(1.0, rho)),
    "pareto": lambda rho: (Pareto(rho, 2.0), Pareto(1.0, 2.0)),
    "gaussian": lambda rho: (Gaussian(0.0, 1.0), Gaussian(0.0, rho)),
}


@pytest.mark.parametrize("distribution", SCALE_LAWS)
@pytest.mark.parametrize("rho", [1e-8, 0.25, 0.5, 3.0, 15.0, 1e8])
def test_the_scale_law_holds_in_every_scale_family(distribution, rho):
    expected = 1 / math.log(rho) - 1 / (rho - 1)
    balance = solve_kl_symmetry(*SCALE_LAWS[distribution](rho))
    assert balance.alpha == pytest.approx(expected, abs=1e-14)


def test_two_cauchys_balance_at_one_half_always():
    rng = np.random.default_rng(3)
    for _ in range(10):
        distributions = [
            Cauchy(float(rng.normal()), float(np.exp(2 * rng.normal()))) for _ in range(2)
        ]
        assert solve_kl_symmetry(*distributions).alpha == pytest.approx(0.5, abs=1e-12)


def test_cauchy_scales_have_the_known_integral():
    ratio = 1 / 9
    z = 2 / math.pi * math.sqrt(ratio) * scipy.special.ellipk(1 - ratio**2)
    found = log_partition(Cauchy(0.0, 1.0), Cauchy(0.0, 9.0), 0.5)
    assert found == pytest.approx(math.log(z), rel=1e-13)
    assert kl(Cauchy(0.0, 1.0), Cauchy(0.0, 9.0)) == pytest.approx(math.log(100 / 36), rel=1e-13)


@pytest.mark.parametrize("gap", [0.1, 2.0, 30.0])
def test_laplace_locations_have_the_known_chernoff_information(gap):
    found = solve_kl_symmetry(Laplace(0.0, 1.0), Laplace(gap, 1.0))
    assert found.alpha == pytest.approx(0.5, abs=1e-12)
    assert found.chernoff == pytest.approx(gap / 2 - math.log1p(gap / 2), rel=1e-12)


def test_heavier_tails_than_cauchy_turn_the_scale_law_around():
    alphas = [
        solve_kl_symmetry(StudentT(nu, 0.0, 1.0), StudentT(nu, 0.0, 10.0)).alpha
        for nu in (0.3, 0.5, 1.0, 2.0, 5.0, 10.0)
    ]
    np.testing.assert_allclose(alphas, [0.547, 0.5325, 0.5, 0.451, 0.369, 0.311], atol=6e-4)


# ---- Theory, on random pairs of every kind ------------------------------------------------------


def random_distributions(rng):
    """Two random distributions on the line, of any two families."""

    def scale():
        return float(np.exp(rng.uniform(-1, 1)))

    makers = [
        lambda: Gaussian(float(rng.normal()), scale()),
        lambda: Cauchy(float(rng.normal()), scale()),
        lambda: StudentT(float(rng.choice([0.8, 1.5, 3.0, 9.0])), float(rng.normal()), scale()),
        lambda: Laplace(float(rng.normal()), scale()),
        lambda: Logistic(float(rng.normal()), scale()),
        lambda: GaussianMixture(
            [0.3, 0.7], [Gaussian(float(2 * rng.normal()), scale()) for _ in range(2)]
        ),
    ]
    return [makers[i]() for i in rng.integers(len(makers), size=3)]


def pairs_of_every_kind(seed):
    rng = np.random.default_rng(seed)
    mixed = [tuple(random_distributions(rng)[:2]) for _ in range(6)]
    return random_members(rng) + [
        distributions for distributions in mixed if distributions[0] != distributions[1]
    ]


@pytest.mark.parametrize("seed", range(3))
def test_swapping_the_parents_mirrors_the_balance(seed):
    for policy, teacher in pairs_of_every_kind(seed):
        there, back = solve_kl_symmetry(policy, teacher), solve_kl_symmetry(teacher, policy)
        assert there.alpha + back.alpha == pytest.approx(1, abs=1e-10), (policy, teacher)
        assert there.chernoff == pytest.approx(back.chernoff, rel=1e-11)


@pytest.mark.parametrize("seed", range(3))
def test_tangents_bound_alpha_and_chernoff(seed):
    """C / KL(t||p) <= alpha* <= 1 - C / KL(p||t), and C below the harmonic sum of the two."""
    for policy, teacher in pairs_of_every_kind(seed):
        balance = solve_kl_symmetry(policy, teacher)
        forward, backward = kl(policy, teacher), kl(teacher, policy)
        assert balance.chernoff / backward <= balance.alpha + 1e-12
        assert balance.alpha <= 1 - balance.chernoff / forward + 1e-12
        if math.isfinite(forward) and math.isfinite(backward):
            harmonic = forward * backward / (forward + backward)
            assert 0 < balance.chernoff <= harmonic * (1 + 1e-12)


def test_the_tangent_bounds_catch_the_wrong_parent():
    """The control: a solver that returns the teacher's exponent breaks them."""
    policy, teacher = Gaussian(0.0, 1.0), Gaussian(0.0, 1e6)
    wrong = 1 - solve_kl_symmetry(policy, teacher).alpha
    assert not wrong <= 1 - solve_kl_symmetry(policy, teacher).chernoff / kl(policy, teacher)


@pytest.mark.parametrize("seed", range(3))
def test_log_z_is_convex_and_its_slope_is_the_gap(seed):
    alphas = np.linspace(0.05, 0.95, 7)
    for policy, teacher in pairs_of_every_kind(seed)[::3]:
        log_z = log_partition(policy, teacher, alphas)
        assert (log_z <= 0).all()
        assert (np.diff(log_z, 2) >= -1e-14).all(), (policy, teacher)
        to_policy, to_teacher = kl_to_parents(policy, teacher, alphas)
        np.testing.assert_allclose(
            alphas * to_policy + (1 - alphas) * to_teacher, -log_z, rtol=1e-10, atol=1e-15
        )
        step = 1e-5
        ends = log_partition(policy, teacher, [0.4 - step, 0.4 + step])
        slope = float(kl_gap(policy, teacher, 0.4))
        assert slope == pytest.approx((ends[1] - ends[0]) / (2 * step), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("seed", range(4))
def test_the_master_identity_holds_for_any_third_distribution(seed):
    """alpha KL(q||policy) + (1 - alpha) KL(q||teacher) = KL(q||q_alpha) - log Z, by quadrature."""
    rng = np.random.default_rng(seed)
    policy, teacher, _ = random_distributions(rng)
    q = Gaussian(0.3, 0.5)  # light tails: both divergences are finite
    alpha = float(rng.uniform(0.1, 0.9))
    left = alpha * kl(q, policy) + (1 - alpha) * kl(q, teacher)
    mean = geometric_mean(policy, teacher, alpha)
    right = kl(q, mean) - float(log_partition(policy, teacher, alpha))
    assert left == pytest.approx(right, rel=1e-10)
    wrong = kl(q, mean) - float(log_partition(policy, teacher, alpha / 2))
    assert left != pytest.approx(wrong, rel=1e-6)


# ---- The geometric mean ------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(2))
def test_q_star_is_equally_far_from_both_parents(seed):
    for policy, teacher in pairs_of_every_kind(seed):
        balance = solve_kl_symmetry(policy, teacher)
        q = geometric_mean(policy, teacher, balance.alpha)
        assert kl(q, policy) == pytest.approx(balance.chernoff, rel=1e-9), (policy, teacher)
        assert kl(q, teacher) == pytest.approx(balance.chernoff, rel=1e-9)


def test_members_of_a_family_have_a_member_as_their_geometric_mean():
    for policy, teacher in random_members(np.random.default_rng(8)):
        q = geometric_mean(policy, teacher, 0.3)
        assert type(q) is type(policy)
        assert geometric_mean(policy, teacher, 1.0) == policy
        assert geometric_mean(policy, teacher, 0.0) == teacher
        x = policy.sample(5, generator=np.random.default_rng(0))
        log_q = 0.3 * policy.log_density(x) + 0.7 * teacher.log_density(x)
        log_q -= log_partition(policy, teacher, 0.3)
        np.testing.assert_allclose(q.log_density(x), log_q, atol=1e-12)


def test_parents_of_different_families_have_a_density_as_their_geometric_mean():
    q = geometric_mean(Gaussian(0.0, 1.0), Cauchy(0.0, 1.0), 0.25)
    assert isinstance(q, GeometricMean)
    assert q.support == (-math.inf, math.inf)
    total, _ = scipy.integrate.quad(q.pdf, -np.inf, np.inf, epsabs=1e-12)
    assert total == pytest.approx(1, abs=1e-10)
    draws = q.sample(20_000, generator=np.random.default_rng(2))
    edges = np.linspace(-30, 30, 4001)
    cumulative = np.cumsum(q.pdf(edges)) * (edges[1] - edges[0])
    assert kstest(draws, lambda x: np.interp(x, edges, cumulative)).pvalue > 1e-9
    assert kstest(draws + 0.1, lambda x: np.interp(x, edges, cumulative)).pvalue < 1e-9


def test_a_common_motion_changes_only_where_the_mean_lies():
    policy, teacher = Gamma(2.0, 1.0), Gamma(5.0, 2.0)
    moved = [Affine(distribution, 3.0, 2.0) for distribution in (policy, teacher)]
    assert solve_kl_symmetry(*moved) == solve_kl_symmetry(policy, teacher)
    q = geometric_mean(*moved, 0.5)
    assert q == Affine(geometric_mean(policy, teacher, 0.5), 3.0, 2.0)


# ---- SciPy -------------------------------------------------------------------------------------

stats = scipy.stats
FROM_SCIPY = {
    "norm": (stats.norm(1, 2), Gaussian(1.0, 4.0)),
    "norm, not frozen": (stats.norm, Gaussian(0.0, 1.0)),
    "Normal": (stats.Normal(mu=1.0, sigma=2.0), Gaussian(1.0, 4.0)),
    "expon": (stats.expon(scale=2), Exponential(0.5)),
    "expon, moved": (stats.expon(loc=1), Affine(Exponential(1.0), 1.0)),
    "gamma": (stats.gamma(2, scale=0.25), Gamma(2.0, 4.0)),
    "gamma, keywords": (stats.gamma(a=2, loc=1, scale=0.25), Affine(Gamma(2.0, 4.0), 1.0)),
    "chi2": (stats.chi2(3), Gamma(1.5, 0.5)),
    "beta": (stats.beta(2, 5), Beta(2.0, 5.0)),
    "beta, stretched": (stats.beta(2, 5, 1, 3), Affine(Beta(2.0, 5.0), 1.0, 3.0)),
    "arcsine": (stats.arcsine(), Beta(0.5, 0.5)),
    "weibull_min": (stats.weibull_min(1.5, scale=2), Weibull(1.5, 2.0)),
    "rayleigh": (stats.rayleigh(scale=3), Rayleigh(3.0)),
    "pareto": (stats.pareto(3, scale=2), Pareto(3.0, 2.0)),
    "laplace": (stats.laplace(1, 2), Laplace(1.0, 2.0)),
    "cauchy": (stats.cauchy(1, 2), Cauchy(1.0, 2.0)),
    "t": (stats.t(3, 1, 2), StudentT(3.0, 1.0, 2.0)),
    "logistic": (stats.logistic(1, 2), Logistic(1.0, 2.0)),
    "uniform": (stats.uniform(1, 2), Uniform(1.0, 3.0)),
    "vonmises": (stats.vonmises(2, loc=1), VonMises(2.0, 1.0)),
    "bernoulli": (stats.bernoulli(0.3), Bernoulli(0.3)),
    "binom": (stats.binom(10, 0.3), Binomial(10, 0.3)),
    "poisson": (stats.poisson(3), Poisson(3.0)),
    "geom": (stats.geom(0.3), Affine(Geometric(0.3), 1.0)),
    "nbinom": (stats.nbinom(2.5, 0.3), NegativeBinomial(2.5, 0.3)),
    "dirichlet": (stats.dirichlet([1, 2, 3]), Dirichlet([1.0, 2.0, 3.0])),
    "multivariate_normal": (
        stats.multivariate_normal([1, 0], [[2, 0.3], [0.3, 1]]),
        Gaussian([1.0, 0.0], [[2.0, 0.3], [0.3, 1.0]]),
    ),
}


@pytest.mark.parametrize(("frozen", "distribution"), FROM_SCIPY.values(), ids=FROM_SCIPY)
def test_scipy_distributions_are_read_as_the_distribution_that_they_are(frozen, distribution):
    read = families.as_distribution(frozen)
    assert type(read) is type(distribution)
    if isinstance(distribution, Gaussian):
        np.testing.assert_allclose(read.mean, distribution.mean)
        np.testing.assert_allclose(read.covariance, distribution.covariance)
    else:
        assert read == distribution


@pytest.mark.parametrize(
    ("frozen", "distribution"),
    [both for name, both in FROM_SCIPY.items() if "not frozen" not in name],
    ids=[name for name in FROM_SCIPY if "not frozen" not in name],
)
def test_log_density_and_samples_agree_with_scipy(frozen, distribution):
    """Densities to 1e-12; 4,000 draws by Kolmogorov-Smirnov, false alarm 1e-9."""
    draws = distribution.sample(4_000, generator=np.random.default_rng(5))
    log_function = getattr(frozen, "logpmf", None) or frozen.logpdf
    if isinstance(frozen, stats.Normal) or not hasattr(frozen, "pmf"):
        log_function = frozen.logpdf
    points = draws[:50]
    if isinstance(distribution, Gaussian) and distribution.dimension == 1:
        points = points[:, 0]
    expected = np.array([log_function(point) for point in points])
    np.testing.assert_allclose(
        distribution.log_density(draws[:50]), expected, rtol=1e-11, atol=1e-12
    )
    if draws.ndim > 1 and draws.shape[1] > 1:
        return
    draws = draws.ravel()
    if hasattr(frozen, "pmf") and not isinstance(frozen, stats.Normal):
        values, counts = np.unique(draws, return_counts=True)
        common = values[counts > 20]
        share = np.array([(draws == value).mean() for value in common])
        error = np.sqrt(frozen.pmf(common) / len(draws))
        assert (np.abs(share - frozen.pmf(common)) < 7 * error).all()
    elif not isinstance(distribution, VonMises):
        assert kstest(draws, frozen.cdf).pvalue > 1e-9
        assert kstest(draws, lambda x: np.asarray(frozen.cdf(x)) ** 1.3).pvalue < 1e-9


def test_scipy_parents_solve_like_ours():
    ours = solve_kl_symmetry(Gaussian(0.0, 1.0), Cauchy(0.0, 1.0))
    assert solve_kl_symmetry(stats.norm(), stats.cauchy()) == ours
    assert solve_kl_symmetry(stats.geom(0.9), stats.geom(0.3)) == solve_kl_symmetry(
        Geometric(0.9), Geometric(0.3)
    )


SAME_DISTRIBUTION = {  # a name that is known, one that is not, and another parent
    "gengamma": (stats.gamma(2.0), stats.gengamma(2.0, 1.0), stats.gamma(4.0)),
    "skewnorm": (stats.norm(), stats.skewnorm(0.0), stats.norm(1, 2)),
    "gennorm": (stats.norm(), stats.gennorm(2.0, scale=math.sqrt(2)), stats.norm(1, 2)),
    "genlogistic": (stats.logistic(), stats.genlogistic(1.0), stats.norm(1, 2)),
    "trapezoid": (stats.uniform(1, 1), stats.trapezoid(0, 1, loc=1), stats.beta(2, 3, loc=1)),
    "new Logistic": (stats.logistic(), stats.Logistic(), stats.norm(1, 2)),
    "new Binomial": (stats.binom(9, 0.3), stats.Binomial(n=9, p=0.3), stats.binom(9, 0.6)),
}


@pytest.mark.parametrize(
    ("known", "unknown", "other"), SAME_DISTRIBUTION.values(), ids=SAME_DISTRIBUTION
)
def test_an_unknown_name_goes_through_its_density(known, unknown, other):
    assert isinstance(families.as_distribution(unknown), Density)
    expected, found = solve_kl_symmetry(known, other), solve_kl_symmetry(unknown, other)
    assert found.converged
    assert found.chernoff == pytest.approx(expected.chernoff, rel=1e-10)


def test_two_frozen_names_of_no_family_balance():
    lognormal = solve_kl_symmetry(stats.lognorm(0.5), stats.lognorm(1.0))
    gaussian = solve_kl_symmetry(Gaussian(0.0, 0.25), Gaussian(0.0, 1.0))
    assert lognormal.converged
    assert lognormal.alpha == pytest.approx(gaussian.alpha, abs=1e-11)
    assert lognormal.chernoff == pytest.approx(gaussian.chernoff, rel=1e-11)


# ---- What is refused ---------------------------------------------------------------------------

REFUSED = [
    (lambda: Bernoulli(1.5), "probability must lie in"),
    (lambda: Bernoulli([0.1, 0.2]), "must be one real number"),
    (lambda: Poisson(0.0), "rate must be positive"),
    (lambda: Gamma(2.0, math.nan), "rate must be finite"),
    (lambda: Binomial(2.5, 0.3), "trials must be a whole number"),
    (lambda: Categorical([0.5, 0.6]), "sum of 1.1"),
    (lambda: Dirichlet([1.0]), "at least two positive numbers"),
    (lambda: Uniform(1.0, 1.0), "low must lie below high"),
    (lambda: Mixture([0.5, 0.6], [Cauchy(0.0, 1.0)] * 2), "weights must be 2 positive numbers"),
    (lambda: Mixture([0.5, 0.5], [Cauchy(0.0, 1.0), Poisson(1.0)]), "all be distributions of real"),
    (lambda: Affine(Poisson(1.0), 0.5), "moved by an integer only"),
    (lambda: Density(lambda x: -x, [], 0.0), "places must name at least one"),
    (lambda: VonMises(-1.0, 0.0), "concentration must be positive"),
    (lambda: kl(Gaussian(0.0, 1.0), Poisson(1.0)), "same kind of outcome"),
    (lambda: kl(stats.norm(), stats.poisson(3)), "same kind of outcome"),
    (lambda: kl(Gaussian([0.0, 0.0], np.eye(2)), Gaussian(0.0, 1.0)), "live in one space"),
    (
        lambda: kl(
            GaussianMixture([1.0], [Gaussian([0.0] * 3, np.eye(3))]), Gaussian([0.0] * 3, np.eye(3))
        ),
        "Use qstar.families.montecarlo",
    ),
    (lambda: kl(stats.poisson, stats.poisson(3)), "Freeze a SciPy distribution"),
    (lambda: kl(stats.norm([0, 1], 1), stats.norm()), "must be one distribution"),
    (lambda: kl(3.0, stats.norm()), "a parent must be a distribution"),
    (lambda: kl(Categorical([0.5, 0.5]), Categorical([0.3, 0.3, 0.4])), "one vocabulary"),
    (lambda: kl(Dirichlet([1.0, 2.0]), Dirichlet([1.0, 2.0, 3.0])), "members of one family"),
    (lambda: log_partition(Poisson(1.0), Poisson(2.0), 1.5), "must lie in"),
    (lambda: geometric_mean(Uniform(0.0, 1.0), Uniform(2.0, 3.0), 0.5), "share an outcome"),
    (lambda: geometric_mean(Poisson(1.0), Poisson(2.0), [0.5]), "alpha must be one number"),
]


@pytest.mark.parametrize(("call", "message"), REFUSED)
def test_what_is_refused_says_why(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_density_that_is_not_normalised_is_refused():
    twice = Density(lambda x: -0.5 * x**2, [(0.0, 1.0)])
    with pytest.raises(ValueError, match=r"its mass came out as 2\.5066"):
        solve_kl_symmetry(twice, Gaussian(0.0, 1.0))
