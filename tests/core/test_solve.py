"""alpha*, the NumPy reference: against 30-digit values, against mpmath, against theory."""

import numpy as np
import pytest
from reference import CASES, cases, exact_balance, log_rows, number
from scipy.special import log_softmax

from qstar import (
    STATUSES,
    Balance,
    kl,
    log_geometric_mean,
    log_partition,
    solve_kl_symmetry,
)
from qstar import (
    rows as geometric,
)
from qstar.solve import FEW

try:
    from qstar_book.records.stress import FAMILIES
except ModuleNotFoundError:  # no torch: `make newest` runs this file without it
    FAMILIES = {}

CATEGORICAL = cases("categorical", "categorical_edge", "categorical_logits")
SCALES = {  # name -> (scale of the policy's logits, of the teacher's)
    "alike": (1.0, 1.0),
    "sharp policy": (8.0, 1.0),
    "sharp teacher": (1.0, 8.0),
    "both sharp": (12.0, 12.0),
}


def random_pair(scales, *, rows=64, vocab=50, seed=0):
    rng = np.random.default_rng(seed)
    return [log_softmax(s * rng.normal(size=(rows, vocab)), axis=-1) for s in scales]


def log_of(*rows):
    with np.errstate(divide="ignore"):  # log 0 is -inf, and meant
        return [np.log(np.array(row, dtype=float)) for row in rows]


@pytest.mark.parametrize("name", CATEGORICAL)
def test_reference_case_is_reproduced(name):
    case = CASES[name]
    log_policy, log_teacher = log_rows(name)
    balance = solve_kl_symmetry(log_policy, log_teacher)
    assert balance.status == case.get("status", "interior")
    assert balance.converged == (balance.status != "disjoint")
    alpha = number(case["alpha_star"])
    if alpha is None:
        assert np.isnan(balance.alpha)
        assert (balance.chernoff, balance.kl_to_policy, balance.kl_to_teacher) == (np.inf,) * 3
        return
    np.testing.assert_allclose(balance.alpha, alpha, rtol=0, atol=1e-13)
    np.testing.assert_allclose(
        balance.chernoff, number(case["chernoff_information"]), rtol=1e-14, atol=1e-15
    )
    expected_to_policy = number(case.get("kl_q_theta", case["chernoff_information"]))
    expected_to_teacher = number(case.get("kl_q_t", case["chernoff_information"]))
    np.testing.assert_allclose(balance.kl_to_policy, expected_to_policy, rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(balance.kl_to_teacher, expected_to_teacher, rtol=1e-12, atol=1e-15)
    if case.get("q_star") is not None:
        q = np.exp(log_geometric_mean(log_policy, log_teacher, balance.alpha))
        np.testing.assert_allclose(q, [number(x) for x in case["q_star"]], rtol=0, atol=1e-13)
    for field, log_p, log_q in [
        ("kl_theta_t", log_policy, log_teacher),
        ("kl_t_theta", log_teacher, log_policy),
    ]:
        np.testing.assert_allclose(kl(log_p, log_q), number(case[field]), rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("distance", [1e-9, 1e-6, 1e-3, 1.0, 30.0, 1000.0])
def test_agrees_with_sixty_digits_from_near_equal_to_far_parents(distance):
    rng = np.random.default_rng(7)
    for _ in range(5):
        base = log_softmax(2 * rng.normal(size=6))
        log_policy, log_teacher = (
            np.log(np.maximum(np.exp(log_softmax(base + distance * rng.normal(size=6))), 1e-300))
            for _ in range(2)
        )
        alpha, chernoff, q = exact_balance(log_policy, log_teacher)
        balance = solve_kl_symmetry(log_policy, log_teacher)
        # The log-ratio carries rounding of relative size eps * |log p| / distance, and no answer
        # can be better than its input.
        conditioning = 1 + 1 / distance
        np.testing.assert_allclose(balance.chernoff, chernoff, rtol=1e-14 * conditioning)
        np.testing.assert_allclose(balance.alpha, alpha, rtol=0, atol=1e-14 * conditioning)
        at_alpha_star = np.exp(log_geometric_mean(log_policy, log_teacher, balance.alpha))
        np.testing.assert_allclose(at_alpha_star, q, rtol=0, atol=1e-11)


@pytest.mark.parametrize("scales", SCALES.values(), ids=SCALES)
def test_both_parents_are_equally_far_at_alpha_star(scales):
    log_policy, log_teacher = random_pair(scales)
    balance = solve_kl_symmetry(log_policy, log_teacher)
    log_q = log_geometric_mean(log_policy, log_teacher, balance.alpha)
    assert (balance.status == "interior").all()
    assert balance.converged.all()
    np.testing.assert_allclose(kl(log_q, log_policy), kl(log_q, log_teacher), atol=1e-12)
    np.testing.assert_allclose(kl(log_q, log_policy), balance.chernoff, atol=1e-12)


def test_swapping_the_parents_mirrors_alpha():
    log_policy, log_teacher = random_pair((2.0, 5.0))
    there = solve_kl_symmetry(log_policy, log_teacher)
    back = solve_kl_symmetry(log_teacher, log_policy)
    np.testing.assert_allclose(there.alpha + back.alpha, 1.0, atol=1e-13)
    np.testing.assert_allclose(there.chernoff, back.chernoff, rtol=1e-13)


def test_no_distribution_is_nearer_to_its_farther_parent_than_q_star():
    """The minimax property, with its gap: max KL >= C + KL(q || q*), for any q at all."""
    log_policy, log_teacher = random_pair((2.0, 3.0), rows=1, vocab=8)
    balance = solve_kl_symmetry(log_policy, log_teacher)
    log_q_star = log_geometric_mean(log_policy, log_teacher, balance.alpha)
    for log_q in random_pair((4.0,), rows=2_000, vocab=8, seed=3)[0]:
        worse = max(kl(log_q[None], log_policy)[0], kl(log_q[None], log_teacher)[0])
        assert worse >= balance.chernoff[0] + kl(log_q[None], log_q_star)[0] - 1e-12


def partial_pairs(*, trials=300, seed=11):
    """Pairs whose supports overlap partly: each outcome is missing from a parent now and then."""
    rng = np.random.default_rng(seed)
    while trials:
        p, r = rng.dirichlet(np.full(4, 0.7), size=2) * (rng.random((2, 4)) < 0.7)
        if (p * r).any():
            trials -= 1
            yield log_of(p / p.sum(), r / r.sum())


def test_on_partial_supports_the_status_matches_the_minimax_problem():
    seen = set()
    grid = np.linspace(0, 1, 2_001)
    for log_policy, log_teacher in partial_pairs():
        balance = solve_kl_symmetry(log_policy, log_teacher)
        best = -log_partition(log_policy, log_teacher, grid).min()
        np.testing.assert_allclose(balance.chernoff, best, rtol=0, atol=2e-6)
        assert balance.chernoff >= best - 1e-12  # a grid cannot beat the minimum
        larger = np.maximum(balance.kl_to_policy, balance.kl_to_teacher)
        np.testing.assert_allclose(larger, balance.chernoff, rtol=1e-12, atol=1e-14)
        log_q = log_geometric_mean(log_policy, log_teacher, balance.alpha)
        np.testing.assert_allclose(kl(log_q, log_policy), balance.kl_to_policy, atol=1e-12)
        np.testing.assert_allclose(kl(log_q, log_teacher), balance.kl_to_teacher, atol=1e-12)
        seen.add(str(balance.status))
    assert seen == {"interior", "boundary_0", "boundary_1"}


EDGES = {  # name -> (policy, teacher, status, alpha, kl_to_policy, kl_to_teacher)
    "teacher truncated and renormalised": (
        (0.625, 0.375, 0.0),
        (0.5, 0.3, 0.2),
        ("boundary_0", 0.0, 0.0, -np.log(0.8)),
    ),
    "policy truncated and renormalised": (
        (0.5, 0.3, 0.2),
        (0.625, 0.375, 0.0),
        ("boundary_1", 1.0, -np.log(0.8), 0.0),
    ),
    "one shared outcome of equal mass": (
        (0.5, 0.5, 0.0),
        (0.5, 0.0, 0.5),
        ("degenerate_all", 0.5, np.log(2), np.log(2)),
    ),
    "one shared outcome, the teacher has less": (
        (0.5, 0.5, 0.0),
        (0.25, 0.0, 0.75),
        ("boundary_0", 0.0, np.log(2), np.log(4)),
    ),
    "a single outcome": ((1.0,), (1.0,), ("degenerate_all", 0.5, 0.0, 0.0)),
}


@pytest.mark.parametrize(("policy", "teacher", "expected"), EDGES.values(), ids=EDGES)
def test_edge_of_the_supports(policy, teacher, expected):
    balance = solve_kl_symmetry(*log_of(policy, teacher))
    status, alpha, to_policy, to_teacher = expected
    assert (str(balance.status), float(balance.alpha)) == (status, alpha)
    np.testing.assert_allclose(
        [balance.kl_to_policy, balance.kl_to_teacher], [to_policy, to_teacher], atol=1e-15
    )
    assert balance.converged


def test_slope_that_is_exactly_zero_at_the_end_is_a_boundary():
    # -log teacher(S) = KL(teacher_S || policy): the minimum sits exactly at alpha = 0.
    # With teacher_S = (1/2, 1/2) and policy (a, 1 - a): 4 a (1 - a) = teacher(S)^2.
    for mass in (0.5, 0.8):
        a = (1 + np.sqrt(1 - mass**2)) / 2
        balance = solve_kl_symmetry(*log_of((a, 1 - a, 0), (mass / 2, mass / 2, 1 - mass)))
        assert (str(balance.status), float(balance.alpha)) == ("boundary_0", 0.0)
        np.testing.assert_allclose(balance.kl_to_policy, balance.kl_to_teacher, atol=1e-14)


def test_equal_parents_balance_at_one_half():
    log_p, _ = random_pair((5.0, 1.0))
    balance = solve_kl_symmetry(log_p, log_p)
    assert (balance.status == "degenerate_all").all()
    np.testing.assert_array_equal(balance.alpha, 0.5)
    np.testing.assert_array_equal(balance.chernoff, 0.0)


@pytest.mark.parametrize("scale", [0.1, 10.0, 1e3, 1e4])
@pytest.mark.parametrize("missing", [0.0, 0.3])
def test_adversarial_rows_stay_finite_and_balanced(scale, missing):
    rng = np.random.default_rng(5)
    for vocab in (2, 3, 8):
        logits = scale * rng.normal(size=(2, 400, vocab))
        off = rng.random(logits.shape) < missing
        off[..., 0] = False
        log_policy, log_teacher = log_softmax(np.where(off, -np.inf, logits), axis=-1)
        balance = solve_kl_symmetry(log_policy, log_teacher)
        assert balance.converged.all()
        assert np.isfinite([balance.alpha, balance.chernoff, balance.slope]).all()
        assert ((balance.alpha >= 0) & (balance.alpha <= 1)).all()
        interior = balance.status == "interior"
        # Two neighbouring doubles around alpha* differ by eps * curvature in the slope.
        resolution = 1e-15 * (1 + balance.curvature + np.abs(balance.chernoff))
        assert (np.abs(balance.slope) <= 20 * resolution)[interior].all()


def test_any_batch_shape_goes_in_and_out():
    log_policy, log_teacher = random_pair((2.0, 5.0), rows=6)
    flat = solve_kl_symmetry(log_policy, log_teacher)
    shaped = solve_kl_symmetry(log_policy.reshape(2, 3, -1), log_teacher.reshape(2, 3, -1))
    assert shaped.alpha.shape == shaped.status.shape == shaped.converged.shape == (2, 3)
    np.testing.assert_array_equal(shaped.alpha.ravel(), flat.alpha)
    single = solve_kl_symmetry(log_policy[0], log_teacher[0])
    assert single.alpha.shape == np.shape(single.status) == ()
    assert single.alpha == flat.alpha[0]
    empty = solve_kl_symmetry(log_policy[:0], log_teacher[:0])
    assert empty.alpha.shape == (0,)


def test_rows_do_not_influence_each_other():
    batch = [log_of((0.7, 0.2, 0.1), (0.2, 0.3, 0.5)), log_of((1, 0, 0), (0, 1, 0))]
    balance = solve_kl_symmetry(*(np.stack(side) for side in zip(*batch, strict=True)))
    assert balance.status.tolist() == ["interior", "disjoint"]
    assert balance.alpha[0] == solve_kl_symmetry(*batch[0]).alpha
    assert set(balance.status) <= set(STATUSES)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("vocab", [2, 3, 7, FEW, FEW + 1])
def test_a_row_alone_is_solved_as_in_its_batch(family, vocab):
    """In plain floats up to `FEW` outcomes: the same statuses and q*, to rounding."""
    pair = [
        log_softmax(side, axis=-1)
        for side in FAMILIES[family](np.random.default_rng(vocab), (12, vocab))
    ]
    batch = solve_kl_symmetry(*pair)
    alone = [solve_kl_symmetry(*rows) for rows in zip(*pair, strict=True)]
    column = {name: np.array([getattr(b, name) for b in alone]) for name in Balance.__slots__}
    np.testing.assert_array_equal(column["status"], batch.status)
    np.testing.assert_array_equal(column["converged"], batch.converged)
    np.testing.assert_array_equal(np.isnan(column["alpha"]), np.isnan(batch.alpha))
    with np.errstate(invalid="ignore"):
        q = [np.exp(log_geometric_mean(*pair, a)) for a in (column["alpha"], batch.alpha)]
    assert (0.5 * np.abs(np.nan_to_num(q[0] - q[1])).sum(axis=-1) <= 1e-11).all()
    for name in ("chernoff", "kl_to_policy", "kl_to_teacher", "curvature"):
        np.testing.assert_allclose(column[name], getattr(batch, name), rtol=1e-12, atol=1e-12)
    for name, values in column.items():
        kinds = values.dtype.kind, getattr(batch, name).dtype.kind
        assert kinds[0] == kinds[1], name
        assert np.shape(getattr(alone[0], name)) == ()


def test_one_row_of_a_batch_keeps_its_batch_shape():
    pair = log_of((0.7, 0.2, 0.1), (0.2, 0.3, 0.5))
    for shape in ((), (1,), (1, 1)):
        balance = solve_kl_symmetry(*(row.reshape(*shape, 3) for row in pair))
        assert balance.alpha.shape == np.shape(balance.status) == shape


def counted(monkeypatch, owner, name):
    """The calls of `owner.name` from now on."""
    calls, original = [], getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *args: calls.append(args) or original(*args))
    return calls


@pytest.mark.parametrize(
    "rows",
    [
        ((0.7, 0.2, 0.1), (0.2, 0.3, 0.5)),
        ((0.98, 0.01, 0.01), (0.01, 0.0, 0.99)),
        ((0.9, 0.1, 0.0), (0.3, 0.2, 0.5)),
        ((0.9, 0.1, 0.0), (0.2, 0.4, 0.4)),
        ((1.0, 0.0, 0.0), (0.0, 0.5, 0.5)),
        ((0.5, 0.5, 0.0), (0.5, 0.5, 0.0)),
    ],
)
def test_a_short_row_is_checked_once_and_then_left_to_plain_floats(rows, monkeypatch):
    checks = counted(monkeypatch, geometric, "_check_rows")
    sums = counted(monkeypatch, geometric, "_logsumexp")
    pairs = counted(monkeypatch, geometric.Pair, "__init__")
    paths = counted(monkeypatch, geometric.Pair, "log_path")
    solve_kl_symmetry(*log_of(*rows))
    assert (len(checks), len(sums), len(pairs), len(paths)) == (2, 2, 1, 0)
    with np.errstate(divide="ignore"):
        long = np.log(np.full((2, FEW + 1), 1 / (FEW + 1)))
    solve_kl_symmetry(*long)
    assert len(paths) > 0, "else the counts count nothing"


def test_a_short_row_is_the_batchs_where_its_status_hangs_on_rounding(monkeypatch):
    paths = counted(monkeypatch, geometric.Pair, "log_path")
    pytest.importorskip("torch")
    rows = FAMILIES["flat end"](np.random.default_rng(0), (1, 3))
    solve_kl_symmetry(*(side[0] for side in rows))
    assert len(paths) > 0


def test_float32_rows_are_computed_in_float64():
    log_policy, log_teacher = random_pair((2.0, 5.0))
    single = solve_kl_symmetry(log_policy.astype(np.float32), log_teacher.astype(np.float32))
    assert single.alpha.dtype == np.float64
    np.testing.assert_allclose(
        single.alpha, solve_kl_symmetry(log_policy, log_teacher).alpha, atol=1e-6
    )
