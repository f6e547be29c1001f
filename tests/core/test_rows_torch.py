"""alpha* in torch: against the NumPy reference, at the edges, on a fake accelerator."""

import itertools
import math

import numpy as np
import pytest
import torch
from reference import CASES, cases, exact_balance, log_rows, number
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import qstar
from qstar import STATUSES, rows_torch, solve_torch, solve_torch_row
from qstar import rows as geometric

PRECISIONS = {  # dtype -> allowed error of (alpha, q* in TV, C) on rows that are not adversarial
    torch.float64: (1e-9, 1e-11, 1e-12),
    torch.float32: (1e-4, 2e-6, 2e-6),
    torch.bfloat16: (1e-2, 2e-4, 2e-5),
    torch.float16: (1e-2, 2e-4, 2e-5),
}
EVERY_DTYPE = pytest.mark.parametrize("dtype", PRECISIONS, ids=str)


@pytest.fixture(params=["block", "row", "long row"])
def vocab(request, monkeypatch):
    """The size of a vocabulary whose rows are solved together, or one by one."""
    if request.param == "block":
        monkeypatch.setattr(solve_torch_row, "ROWS", 0)
    return 2 * solve_torch_row.ROW_VOCAB if request.param == "long row" else 50


def softmaxed(logits, dtype=torch.float64):
    return torch.as_tensor(logits, dtype=torch.float64).log_softmax(-1).to(dtype)


def random_pairs(kind, *, rows=12, vocab=50, seed=0):
    """Two batches of rows in float64; a kind is a way in which parents may differ."""
    rng = np.random.default_rng(seed)
    first, second, common = rng.normal(size=(3, rows, vocab))
    zipf = -1.3 * np.log(np.arange(1, vocab + 1))
    outside = rng.random((2, rows, vocab)) < 0.4
    outside[..., 0] = False
    one_hot = np.where(np.arange(vocab) == 0, 0.0, -np.inf) + np.zeros((rows, 1))
    logits = {
        "flat": (first, second),
        "sharp": (12 * first, 12 * second),
        "sharp policy": (8 * first, second),
        "language-model-like": (zipf + 2 * common + 0.4 * first, zipf + 2 * common + 0.4 * second),
        "equal": (3 * common, 3 * common),
        "near-equal": (3 * common + 0.1 * first, 3 * common + 0.1 * second),
        "nearer": (3 * common + 1e-3 * first, 3 * common + 1e-3 * second),
        "nested": (np.where(outside[0], -np.inf, 2 * first), 2 * second),
        "partly shared": tuple(
            np.where(off, -np.inf, 2 * x) for off, x in zip(outside, (first, second), strict=True)
        ),
        "same part of the vocabulary": tuple(
            np.where(outside[0], -np.inf, 2 * x) for x in (first, second)
        ),
        "one-hot teacher": (first, one_hot),
        "the same one-hot": (one_hot, one_hot),
        "disjoint": (one_hot, np.where(np.arange(vocab) == 0, -np.inf, first)),
    }
    return tuple(softmaxed(side) for side in logits[kind])


KINDS = [
    "flat",
    "sharp",
    "sharp policy",
    "language-model-like",
    "equal",
    "near-equal",
    "nearer",
    "nested",
    "partly shared",
    "same part of the vocabulary",
    "one-hot teacher",
    "the same one-hot",
    "disjoint",
]


def in_float64(rows):
    """What the solver is given, as the reference may be given it: wider, and normalised again."""
    return rows.double().log_softmax(-1).numpy()


def names(balance):
    return np.array(STATUSES)[balance.status.numpy()]


def tv_between(log_policy, log_teacher, alpha, other):
    """TV of the two points of the path, in float64; 0 where there is no path."""
    first, second = (
        np.exp(qstar.log_geometric_mean(log_policy, log_teacher, a)) for a in (alpha, other)
    )
    return np.nan_to_num(0.5 * np.abs(first - second).sum(-1))


def assert_agrees(balance, log_policy, log_teacher, precision):
    expected = qstar.solve_kl_symmetry(log_policy, log_teacher)
    of_alpha, of_q, of_chernoff = precision
    np.testing.assert_array_equal(names(balance), expected.status)
    np.testing.assert_array_equal(balance.converged.numpy(), expected.converged)
    alpha = balance.alpha.double().numpy()
    np.testing.assert_array_equal(np.isnan(alpha), np.isnan(expected.alpha))
    determined = expected.curvature > 1e-3
    np.testing.assert_allclose(alpha[determined], expected.alpha[determined], rtol=0, atol=of_alpha)
    assert tv_between(log_policy, log_teacher, alpha, expected.alpha).max() <= of_q
    for name in ("chernoff", "kl_to_policy", "kl_to_teacher"):
        values = getattr(balance, name).double().numpy()
        at_stop = of_q * (1 + 2 * np.sqrt(np.nan_to_num(expected.curvature)))  # a KL, not C
        atol = of_chernoff if name == "chernoff" else at_stop.max()
        np.testing.assert_allclose(values, getattr(expected, name), rtol=of_chernoff, atol=atol)


@EVERY_DTYPE
@pytest.mark.parametrize("kind", KINDS)
def test_agrees_with_the_reference(kind, vocab, dtype):
    pair = [rows.to(dtype) for rows in random_pairs(kind, vocab=vocab)]
    balance = rows_torch.solve_kl_symmetry(*pair)
    assert balance.alpha.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_agrees(balance, *(in_float64(rows) for rows in pair), PRECISIONS[dtype])


@pytest.mark.parametrize("kind", KINDS)
def test_fixed_passes_give_the_same_answer(kind):
    """The road of an accelerator, taken on the CPU."""
    pair = random_pairs(kind, vocab=40)
    plan = accelerator_plan(torch.float64)
    fields = solve_torch.solve_block(*pair, plan)
    balance = qstar.Balance(*fields)
    assert_agrees(balance, *(rows.numpy() for rows in pair), PRECISIONS[torch.float64])
    early = solve_torch.solve_block(*pair, plan._replace(early_exit=True))
    np.testing.assert_array_equal(fields.alpha, early.alpha)
    np.testing.assert_array_equal(fields.passes, early.passes)


def staircases(seed, *, vocab, rows=2000):
    """Rows whose log-odds bend: log-ratios and masses of many orders of magnitude."""
    rng = np.random.default_rng(seed)
    ratio = rng.choice([-1, 1], size=(rows, vocab)) * 10 ** rng.uniform(-2, 2.7, (rows, vocab))
    somewhere = -(10 ** rng.uniform(-1, 2.5, (rows, vocab)))
    teacher = somewhere - rng.uniform(size=(rows, 1)) * ratio
    return softmaxed(np.stack([teacher + ratio, teacher]))


@pytest.mark.parametrize("vocab", [4, 12, 30])
def test_the_bracket_holds_the_root_and_its_middle_halves_it(vocab, monkeypatch):
    seen, step = [], solve_torch._Search.step

    def watched(search, path, *rest, halve):
        after = step(search, path, *rest, halve=halve)
        seen.append((after, halve))
        return after

    monkeypatch.setattr(solve_torch._Search, "step", watched)
    pair = staircases(0, vocab=vocab)
    fields = solve_torch.solve_block(*pair, accelerator_plan(torch.float64, max_passes=40))
    inside, halved = fields.status == STATUSES.index("interior"), 0
    for (before, halve), (after, _) in itertools.pairwise(seen):
        live = inside & ~after.done
        width, was = (after.high - after.low)[live], (before.high - before.low)[live]
        assert (width <= was).all()
        slack, root = 1e-9 * width + 1e-15, fields.alpha[live]
        assert (after.low[live] - slack <= root).all()
        assert (root <= after.high[live] + slack).all()
        middle = before.alpha[live] == ((before.low + before.high) / 2)[live]
        assert (width[middle] <= 0.5 * was[middle] * (1 + 1e-12)).all()
        halved += int(middle.sum()) if halve else 0
    assert halved > 5


def test_every_third_pass_does_not_trust_log_odds_that_fell_too_little():
    """That is what the halving rests on: random rows hardly ever need it."""
    path = solve_torch._path(*random_pairs("flat", vocab=40))
    alpha = torch.full_like(path.unshared, 0.3)
    odds, _ = path.log_odds(alpha)
    at, low, high = path.moments(alpha), torch.zeros_like(alpha), torch.ones_like(alpha)
    tangent = at.tangent(alpha)
    for factor, trusted in ((1.9, False), (-1.9, False), (2.1, True), (-2.1, True)):
        search = solve_torch._Search(
            alpha, low, high, tangent, tangent, odds * factor, alpha.int(), alpha > 1
        )
        after = search.step(path, at, search.passes, search.done, halve=True)
        middle = (after.low + after.high) / 2
        moved = path.log_odds(alpha)
        newton = alpha - moved[0] / moved[1]
        inside = (after.low < newton) & (newton < after.high)
        assert inside.sum() > 10
        torch.testing.assert_close(after.alpha[inside], (newton if trusted else middle)[inside])


def accelerator_plan(dtype, max_passes=rows_torch.FIXED_PASSES):
    return solve_torch.Plan(
        rows_torch.TOLERANCE[dtype],
        (dtype, dtype),
        torch.float64 if dtype == torch.float64 else torch.float32,
        max_passes,
        2**20,
        early_exit=False,
        validate=False,
    )


@pytest.mark.parametrize("name", cases("categorical", "categorical_edge", "categorical_logits"))
def test_reference_case_is_reproduced(name):
    case, pair = CASES[name], [torch.tensor(rows) for rows in log_rows(name)]
    balance = rows_torch.solve_kl_symmetry(*pair)
    assert STATUSES[balance.status] == case.get("status", "interior")
    alpha = number(case["alpha_star"])
    if alpha is None:
        assert balance.alpha.isnan()
        assert balance.chernoff == balance.kl_to_policy == balance.kl_to_teacher == torch.inf
        return
    chernoff = number(case["chernoff_information"])
    assert abs(balance.chernoff.item() - chernoff) <= 1e-13 * (1 + chernoff)
    assert not balance.curvature > 1e-3 or abs(balance.alpha.item() - alpha) <= 1e-9
    if case.get("q_star") is not None:
        q = rows_torch.log_geometric_mean(*pair, balance.alpha).exp()
        np.testing.assert_allclose(q, [number(x) for x in case["q_star"]], rtol=0, atol=1e-10)


def adversarial_pairs(scale, missing, *, vocab, rows=400, seed=5):
    rng = np.random.default_rng(seed)
    logits = scale * rng.normal(size=(2, rows, vocab))
    off = rng.random(logits.shape) < missing
    off[..., 0] = False
    return softmaxed(np.where(off, -np.inf, logits))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0, 1e2, 1e3, 1e4])
@pytest.mark.parametrize("missing", [0.0, 0.3], ids=["equal supports", "partial supports"])
def test_adversarial_rows_stay_finite_and_near_the_reference(scale, missing, dtype):
    """Error of q* in TV: the tolerance, or what the dtype leaves of logits of that size."""
    for vocab in (2, 3, 8):
        pair = adversarial_pairs(scale, missing, vocab=vocab).to(dtype)
        balance = rows_torch.solve_kl_symmetry(*pair)
        assert balance.converged.all()
        fields = (balance.alpha, balance.chernoff, balance.kl_to_policy, balance.kl_to_teacher)
        assert all(field.isfinite().all() for field in (*fields, balance.slope, balance.curvature))
        assert ((balance.alpha >= 0) & (balance.alpha <= 1)).all()
        log_policy, log_teacher = (in_float64(rows) for rows in pair)
        expected = qstar.solve_kl_symmetry(log_policy, log_teacher)
        tv = tv_between(log_policy, log_teacher, balance.alpha.double().numpy(), expected.alpha)
        # 20 eps scale: 2e-2 in float32 at logits of size 1e4, 5e-11 in float64
        assert tv.max() <= 2 * rows_torch.TOLERANCE[dtype] + 20 * torch.finfo(dtype).eps * scale
        np.testing.assert_allclose(
            balance.chernoff, expected.chernoff, rtol=3e-6, atol=5 * torch.finfo(dtype).eps
        )


def test_few_adversarial_rows_are_left_after_the_fixed_passes():
    left = total = 0
    for scale in (1.0, 1e2, 1e4):
        for vocab in (2, 8):
            pair = adversarial_pairs(scale, 0.2, vocab=vocab).to(torch.float32)
            fields = solve_torch.solve_block(*pair, accelerator_plan(torch.float32))
            assert (~fields.converged).sum() <= 4
            left, total = left + int((~fields.converged).sum()), total + len(pair[0])
    assert left <= total / 500


def test_the_search_does_not_creep_along_one_side_of_a_corner():
    """One of a million adversarial rows: Newton's steps were refused until they had halved the
    log-odds of the *other* side, and 18 evaluations were needed."""
    policy = torch.tensor([[-1.9416, -1.9668, -1.9438, -1.95, -1.9359, -1.947, -1.9367]]).double()
    teacher = torch.tensor([[-21714.0, -21497, -3.5459, -41322, -39251, -39812, 0]]).double()
    pair = policy.log_softmax(-1), teacher.log_softmax(-1)
    balance = rows_torch.solve_kl_symmetry(*pair)
    assert balance.converged.all()
    assert balance.passes.item() <= 2 + 12
    assert rows_torch.solve_as_on_an_accelerator(*pair).converged.all()


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e2, 1e4])
def test_agrees_with_sixty_digits(scale):
    pair = adversarial_pairs(scale, 0.0, vocab=5, rows=3)
    balance = rows_torch.solve_kl_symmetry(*pair)
    q = rows_torch.log_geometric_mean(*pair, balance.alpha).exp()
    for row in range(3):
        exact = exact_balance(*(rows[row].tolist() for rows in pair))[2]
        assert 0.5 * np.abs(q[row].numpy() - exact).sum() <= 2e-12 + 1e-15 * scale


@EVERY_DTYPE
def test_language_model_like_rows_take_at_most_four_passes_in_the_median(dtype):
    pair = random_pairs("language-model-like", rows=20, vocab=20_000)
    balance = rows_torch.solve_kl_symmetry(*(rows.to(dtype) for rows in pair))
    assert balance.passes.median() <= 4


def test_both_roads_agree_on_plain_rows():
    pair = random_pairs("language-model-like", vocab=solve_torch_row.ROW_VOCAB)
    plan = accelerator_plan(torch.float64)._replace(early_exit=True)
    work = solve_torch_row._workspace(solve_torch_row.ROW_VOCAB, torch.float64)
    alone = [solve_torch_row._solve_row(*rows, work, plan) for rows in zip(*pair, strict=True)]
    assert None not in alone, "a plain row must not need the general road"
    rows, block = (
        solve_torch_row._from_rows(alone, [12], plan),
        solve_torch.solve_block(*pair, plan),
    )
    for name in ("alpha", "chernoff", "kl_to_policy", "kl_to_teacher", "slope", "curvature"):
        torch.testing.assert_close(getattr(rows, name), getattr(block, name), rtol=0, atol=1e-11)


def test_a_step_that_misses_is_replaced_by_the_middle_of_the_bracket():
    """Distant parents with long tails: Halley's step from 1/2 may leave [0, 1], or not help."""
    generator, alone, expected = torch.Generator().manual_seed(1), [], []
    work = solve_torch_row._workspace(solve_torch_row.ROW_VOCAB, torch.float64)
    plan = accelerator_plan(torch.float64)._replace(early_exit=True)
    for _ in range(60):
        pair = 8 * torch.randn(
            2, solve_torch_row.ROW_VOCAB, generator=generator, dtype=torch.float64
        )
        rows = pair.log_softmax(-1)
        alone.append(solve_torch_row._solve_row(*rows, work, plan))
        expected.append(qstar.solve_kl_symmetry(*rows.numpy()).alpha)
    assert None not in alone, "a plain row must not need the complete algorithm"
    np.testing.assert_allclose([row.values[0] for row in alone], expected, rtol=0, atol=1e-11)
    assert max(row.passes for row in alone) <= 8


def test_excluded_outcomes_are_condensed_without_changing_the_answer():
    """Top-k rows of a large vocabulary: only the shared outcomes and two sums are solved."""
    for kind in ("nested", "partly shared", "same part of the vocabulary"):
        pair = random_pairs(kind, rows=5, vocab=2 * solve_torch_row.ROW_VOCAB)
        for log_policy, log_teacher in zip(*pair, strict=True):
            small = solve_torch_row._condense(log_policy, log_teacher)
            shared = (log_policy.isfinite() & log_teacher.isfinite()).sum()
            assert len(small[0]) <= shared + 2
            expected = qstar.solve_kl_symmetry(log_policy.numpy(), log_teacher.numpy())
            actual = qstar.solve_kl_symmetry(*(rows.numpy() for rows in small))
            assert actual.status == expected.status
            np.testing.assert_allclose(actual.alpha, expected.alpha, rtol=0, atol=1e-12)
            np.testing.assert_allclose(actual.chernoff, expected.chernoff, rtol=0, atol=1e-12)


def test_a_huge_finite_logit_is_as_good_as_an_excluded_outcome(vocab):
    """Masks of torch.finfo.min in place of -inf overflow squares, not the answer."""
    log_policy, log_teacher = (
        rows.float() for rows in random_pairs("same part of the vocabulary", vocab=vocab)
    )
    balance = rows_torch.solve_kl_symmetry(log_policy, log_teacher)
    lowest = torch.finfo(torch.float32).min
    for pair in (
        (log_policy.clamp(min=lowest), log_teacher.clamp(min=lowest)),
        (log_policy.clamp(min=lowest), log_teacher),
    ):
        masked = rows_torch.solve_kl_symmetry(*pair)
        torch.testing.assert_close(masked.alpha, balance.alpha, rtol=0, atol=1e-5)
        torch.testing.assert_close(masked.chernoff, balance.chernoff, rtol=0, atol=1e-5)


def test_logits_far_apart_are_not_called_disjoint(vocab):
    """In probabilities (0, -1e4) against (-1e4, 0) underflows; in logs it is an answer."""
    logits = torch.full((2, vocab), -1e5)
    logits[:, :2] = torch.tensor([[0.0, -1e4], [-1e4, 0.0]])
    balance = rows_torch.solve_kl_symmetry(*logits.log_softmax(-1))
    assert STATUSES[balance.status] == "interior"
    np.testing.assert_allclose(balance.alpha, 0.5, atol=1e-6)
    np.testing.assert_allclose(balance.chernoff, 5000 - np.log(2), rtol=1e-6)


def test_swapping_the_parents_mirrors_alpha(vocab):
    pair = random_pairs("sharp policy", vocab=vocab)
    there, back = rows_torch.solve_kl_symmetry(*pair), rows_torch.solve_kl_symmetry(*reversed(pair))
    torch.testing.assert_close(
        there.alpha + back.alpha, torch.ones(12).double(), rtol=0, atol=1e-11
    )


def test_any_batch_shape_and_chunk_goes_in_and_out(vocab):
    pair = random_pairs("partly shared", rows=6, vocab=vocab)
    flat = rows_torch.solve_kl_symmetry(*pair)
    shaped = rows_torch.solve_kl_symmetry(
        *(rows.reshape(2, 3, vocab) for rows in pair), chunk_rows=4
    )
    for name in flat.__slots__:
        torch.testing.assert_close(
            getattr(shaped, name), getattr(flat, name).reshape(2, 3), rtol=0, atol=1e-12
        )
    single = rows_torch.solve_kl_symmetry(*(rows[3] for rows in pair))
    assert single.alpha.shape == single.status.shape == single.passes.shape == ()
    torch.testing.assert_close(single.alpha, flat.alpha[3], rtol=0, atol=1e-12)
    empty = rows_torch.solve_kl_symmetry(*(rows[:0] for rows in pair))
    assert all(getattr(empty, name).shape == (0,) for name in empty.__slots__)
    apart = [rows.mT.contiguous().mT for rows in pair]  # not contiguous along the vocabulary
    torch.testing.assert_close(
        rows_torch.solve_kl_symmetry(*apart).alpha, flat.alpha, rtol=0, atol=1e-12
    )


def test_the_kept_workspace_ties_no_call_to_another():
    pair = random_pairs("flat", vocab=solve_torch_row.ROW_VOCAB + 7)
    solve_torch_row._LOCAL.__dict__.clear()
    with torch.inference_mode():
        first = rows_torch.solve_kl_symmetry(*pair)
    with FakeTensorMode(), pytest.raises(DataDependentOutputException):
        rows_torch.solve_kl_symmetry(*(torch.empty(9_000) for _ in range(2)))
    second = rows_torch.solve_kl_symmetry(*pair)  # another vocabulary, and another dtype, between
    rows_torch.solve_kl_symmetry(*(rows.float()[:, 7:].log_softmax(-1) for rows in pair))
    with torch.no_grad():
        third = rows_torch.solve_kl_symmetry(*(rows.clone().requires_grad_() for rows in pair))
    for other in (second, third):
        torch.testing.assert_close(other.alpha, first.alpha.clone(), rtol=0, atol=0)


def test_result_dtypes_are_as_documented():
    balance = rows_torch.solve_kl_symmetry(*random_pairs("flat"))
    assert (balance.status.dtype, balance.passes.dtype) == (torch.int8, torch.int32)
    assert balance.converged.dtype == torch.bool


def test_one_statement_says_how_well_rows_must_be_normalised():
    ours = {str(dtype)[6:]: value for dtype, value in rows_torch.NORMALISATION_TOLERANCE.items()}
    assert ours == geometric.NORMALISATION_TOLERANCE


LOG_HALVES = np.log([[0.5, 0.5], [0.5, 0.5]])
BAD = {  # name -> the pair, each refused in the same words by both solvers
    "logits": (np.zeros((2, 3)), np.zeros((2, 3))),
    "huge logits": (np.full((2, 3), 1e3), np.zeros((2, 3))),
    "a row of probabilities": (LOG_HALVES, np.array([LOG_HALVES[0], [0.5, 0.5]])),
    "nan": (LOG_HALVES, np.array([LOG_HALVES[0], [np.nan, 0.0]])),
    "nan in every place": (np.full((2, 2), np.nan), LOG_HALVES),
    "+inf": (np.array([LOG_HALVES[0], [np.inf, -np.inf]]), LOG_HALVES),
    "a row of -inf": (np.full((2, 2), -np.inf), LOG_HALVES),
    "a batch of batches": (np.zeros((2, 2, 1)) - [[0], [1]], np.zeros((2, 2, 1))),
    "another vocabulary": (LOG_HALVES, np.log(np.full((2, 3), 1 / 3))),
    "another batch": (LOG_HALVES, LOG_HALVES[:1]),
    "an empty vocabulary": (np.zeros((2, 0)), np.zeros((2, 0))),
    "no axis": (np.array(0.0), np.array(0.0)),
}


@pytest.mark.parametrize("pair", BAD.values(), ids=BAD)
def test_bad_input_is_refused_in_the_words_of_the_reference(pair):
    with pytest.raises(ValueError, match=r"\S") as expected:
        qstar.solve_kl_symmetry(*pair)
    with pytest.raises(ValueError, match=r"\S") as actual:
        rows_torch.solve_kl_symmetry(*(torch.tensor(rows) for rows in pair))
    assert str(actual.value) == str(expected.value)


def test_integers_are_refused():
    with pytest.raises(ValueError, match=r"floating-point log-probabilities: got dtype torch\.int"):
        rows_torch.solve_kl_symmetry(torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, 1))


@pytest.mark.parametrize(
    ("dtype", "good", "bad"),
    [
        (torch.float64, 5e-5, 2e-4),
        (torch.float32, 5e-5, 2e-4),
        (torch.bfloat16, 1e-2, 4e-2),
        (torch.float16, 1e-2, 4e-2),
    ],
    ids=str,
)
def test_rows_may_be_off_by_their_dtype(dtype, good, bad, vocab):
    off = torch.full((1, vocab), -torch.inf, dtype=torch.float64)
    off[0, :2] = np.log(0.5)
    rows_torch.solve_kl_symmetry((off + good).to(dtype), off.to(dtype))
    with pytest.raises(ValueError, match=r"row 0 sums to 1[.\d]*, not 1 within .* log_softmax"):
        rows_torch.solve_kl_symmetry((off + bad).to(dtype), off.to(dtype))


def test_without_validation_a_bad_row_is_flagged_and_harms_no_other(vocab):
    log_policy, log_teacher = random_pairs("flat", rows=5, vocab=vocab)
    expected = rows_torch.solve_kl_symmetry(log_policy, log_teacher)
    log_policy[0, 1] = torch.nan
    log_policy[1] += 1
    log_teacher[2, 0] = torch.inf
    log_teacher[3] = -torch.inf
    balance = rows_torch.solve_kl_symmetry(log_policy, log_teacher, validate=False)
    assert names(balance).tolist() == ["invalid"] * 4 + ["interior"]
    assert balance.converged.tolist() == [False] * 4 + [True]
    for name in ("alpha", "chernoff", "kl_to_policy", "kl_to_teacher", "slope", "curvature"):
        values = getattr(balance, name)
        assert values[:4].isnan().all(), name
        torch.testing.assert_close(values[4], getattr(expected, name)[4], rtol=0, atol=1e-12)


def test_a_row_that_runs_out_of_passes_is_flagged():
    pair = random_pairs("sharp")
    balance = rows_torch.solve_kl_symmetry(*pair, max_passes=1)
    assert names(balance).tolist() == ["interior"] * 12
    assert not balance.converged.any()
    assert balance.slope.abs().min() > 1e-6  # what is left, and not hidden
    assert rows_torch.solve_kl_symmetry(*pair, max_passes=20).converged.all()


def test_more_tolerance_takes_fewer_passes_and_keeps_its_word():
    pair = random_pairs("sharp", rows=200)
    exact = rows_torch.solve_kl_symmetry(*pair)
    rough = rows_torch.solve_kl_symmetry(*pair, tolerance=1e-3)
    assert rough.passes.sum() < exact.passes.sum()
    tv = tv_between(*(rows.numpy() for rows in pair), rough.alpha.numpy(), exact.alpha.numpy())
    assert 1e-6 < tv.max() < 2e-3


def awkward_pairs(rows=20, vocab=solve_torch_row.ROW_VOCAB, seed=0):
    """Large vocabularies that tempt the row road to stop too early: outliers, heavy tails."""
    rng = np.random.default_rng(seed)
    first, second, common = rng.normal(size=(3, rows, vocab))
    scale = 10 ** rng.uniform(-1.5, 1.6, size=(rows, 1))
    heavy = rng.standard_t(2, size=(2, rows, vocab))
    spikes = 3 * common + 0.1 * np.stack([first, second])
    for side, row in np.ndindex(2, rows):
        spikes[side, row, rng.integers(vocab, size=3)] += rng.uniform(-40, 40, size=3)
    for pair in (
        (scale * first, scale * second),
        (3 * common + scale * first, 3 * common + scale * second),
        (scale * common, scale * common / rng.uniform(1, 3, size=(rows, 1))),
        3 * common + scale * heavy,
        spikes,
    ):
        yield tuple(softmaxed(side) for side in pair)


@pytest.mark.parametrize("tolerance", [1e-12, 1e-6])
def test_a_row_never_stops_short_of_its_tolerance(tolerance):
    worst, one_pass = 0.0, 0
    for pair in awkward_pairs():
        exact = qstar.solve_kl_symmetry(*(rows.numpy() for rows in pair))
        balance = rows_torch.solve_kl_symmetry(*pair, tolerance=tolerance)
        tv = tv_between(*(rows.numpy() for rows in pair), balance.alpha.numpy(), exact.alpha)
        worst, one_pass = max(worst, tv.max()), one_pass + int((balance.passes == 1).sum())
        atol = 5 * tolerance + 1e-13
        np.testing.assert_allclose(balance.chernoff, exact.chernoff, rtol=1e-4, atol=atol)
    assert worst <= 2 * tolerance + 1e-13
    assert one_pass > 5  # else nothing was tempted


# --- the device: nothing may be read back -------------------------------------------------------


def fake_pair(shape, dtype, **options):
    return [torch.empty(shape, dtype=dtype, device="cuda", **options) for _ in range(2)]


@EVERY_DTYPE
@pytest.mark.parametrize("shape", [(50,), (3, 50), (2, 3, 9_000)], ids=str)
def test_an_accelerator_is_never_waited_for(shape, dtype):
    """Fake tensors hold no values: reading one, or mixing devices, raises."""
    with FakeTensorMode():
        balance = rows_torch.solve_kl_symmetry(*fake_pair(shape, dtype), chunk_rows=2)
        for name in balance.__slots__:
            field = getattr(balance, name)
            assert field.device.type == "cuda"
            assert field.shape == shape[:-1]


def test_an_accelerator_is_waited_for_when_validation_is_asked_for():
    """The control: the test above would see a host read."""
    with FakeTensorMode(), pytest.raises(DataDependentOutputException):
        rows_torch.solve_kl_symmetry(*fake_pair((3, 50), torch.float32), validate=True)


def test_gradients_do_not_wait_for_an_accelerator():
    """The formula alone: the autograd engine itself refuses devices that do not exist."""
    with FakeTensorMode():
        pair = fake_pair((3, 50), torch.float32)
        fields = rows_torch._solve(*pair, accelerator_plan(torch.float32))
        gradients = rows_torch._chain(
            *(*pair, fields.alpha, fields.status, fields.slope, fields.curvature),
            *fields[:4],
            dtype=torch.float32,
        )
        assert all(gradient.shape == (3, 50) for gradient in gradients)


def test_the_decoders_functions_do_not_wait_for_an_accelerator():
    with FakeTensorMode():
        pair = fake_pair((3, 50), torch.bfloat16)
        alpha = torch.empty(3, device="cuda")
        for function in (rows_torch.log_partition, rows_torch.log_geometric_mean):
            assert function(*pair, alpha).device.type == "cuda"
        for function in (
            rows_torch.kl,
            rows_torch.total_variation,
            rows_torch.acceptance_probability,
        ):
            assert function(*pair).device.type == "cuda"


def test_parents_on_two_devices_are_refused():
    with FakeTensorMode(), pytest.raises(ValueError, match="must be on one device: got cuda"):
        rows_torch.solve_kl_symmetry(torch.empty(3, device="cuda"), torch.empty(3))


# --- gradients ----------------------------------------------------------------------------------

DIFFERENTIABLE = ("alpha", "chernoff", "kl_to_policy", "kl_to_teacher")


@pytest.mark.parametrize("kind", ["flat", "sharp policy", "partly shared", "nested"])
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradients_are_those_of_finite_differences(kind, name):
    log_policy, log_teacher = random_pairs(kind, rows=4, vocab=6, seed=3)
    on = [rows.isfinite() for rows in (log_policy, log_teacher)]

    def solved(policy, teacher):
        rows = [
            torch.full_like(log_policy, -torch.inf).masked_scatter(where, values).log_softmax(-1)
            for where, values in zip(on, (policy, teacher), strict=True)
        ]
        return getattr(rows_torch.solve_kl_symmetry(*rows, tolerance=1e-15), name)

    leaves = [
        rows[where].clone().requires_grad_()
        for rows, where in zip((log_policy, log_teacher), on, strict=True)
    ]
    torch.autograd.gradcheck(solved, leaves, atol=1e-6, rtol=1e-5)


def test_partial_supports_above_reach_every_status():
    """Else the gradients at a boundary would go unchecked."""
    seen = {
        name
        for kind in ("partly shared", "nested")
        for name in names(
            rows_torch.solve_kl_symmetry(*random_pairs(kind, rows=4, vocab=6, seed=3))
        ).tolist()
    }
    assert {"interior", "boundary_0"} <= seen


def test_gradients_go_through_the_renormalisation_of_the_rows(vocab):
    """Shifting a whole row changes nothing; neither road nor chunk does."""
    pair = [rows.requires_grad_() for rows in random_pairs("flat", rows=5, vocab=vocab)]
    balance = rows_torch.solve_kl_symmetry(*pair, chunk_rows=2)
    gradients = torch.autograd.grad((balance.alpha + balance.kl_to_policy).sum(), pair)
    for gradient in gradients:
        torch.testing.assert_close(gradient.sum(-1), torch.zeros(5).double(), rtol=0, atol=1e-13)
        assert (gradient.abs().sum(-1) > 1e-3).all()


def test_gradients_are_zero_where_alpha_stays_put_and_never_nan():
    one_hot = torch.tensor([0.0, -torch.inf, -torch.inf])
    log_policy = torch.stack([one_hot, torch.full((3,), 1 / 3).log(), torch.full((3,), 9.0)])
    log_teacher = torch.stack([one_hot.flip(0), log_policy[1], log_policy[1]])
    pair = [rows.requires_grad_() for rows in (log_policy, log_teacher)]
    balance = rows_torch.solve_kl_symmetry(*pair, validate=False)
    assert names(balance).tolist() == ["disjoint", "degenerate_all", "invalid"]
    for gradient in torch.autograd.grad(balance.alpha.sum(), pair):
        assert (gradient == 0).all()


def test_what_has_no_gradient_says_so():
    pair = [rows.requires_grad_() for rows in random_pairs("flat")]
    balance = rows_torch.solve_kl_symmetry(*pair)
    for name in ("slope", "curvature"):
        assert not getattr(balance, name).requires_grad
    weight = torch.ones(12, dtype=torch.float64, requires_grad=True)
    first = torch.autograd.grad(balance.alpha, pair[0], weight, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.square().sum().backward()
    with torch.no_grad():
        assert not rows_torch.solve_kl_symmetry(*pair).alpha.requires_grad


# --- the functions beside the solver ------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_functions_agree_with_their_namesakes(kind):
    pair = random_pairs(kind)
    arrays = [rows.numpy() for rows in pair]
    alpha = torch.linspace(0, 1, 12, dtype=torch.float64)
    for name in ("log_partition", "log_geometric_mean"):
        actual = getattr(rows_torch, name)(*pair, alpha)
        expected = getattr(qstar, name)(*arrays, alpha.numpy())
        np.testing.assert_allclose(actual, expected, rtol=1e-12, atol=1e-13)
    for name in ("kl", "total_variation", "acceptance_probability"):
        actual = getattr(rows_torch, name)(*pair)
        expected = getattr(qstar, name)(*arrays)
        np.testing.assert_allclose(actual, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("kind", KINDS)
def test_functions_agree_with_their_namesakes_beyond_the_ends(kind):
    """The rows without a q_alpha among them: log Z is inf, and all of log q nan."""
    pair = random_pairs(kind)
    arrays = [rows.numpy() for rows in pair]
    alpha = torch.tensor([-0.5, 1.5, 3.0, -4.0] * 3, dtype=torch.float64)
    for name in ("log_partition", "log_geometric_mean"):
        actual = getattr(rows_torch, name)(*pair, alpha)
        expected = getattr(qstar, name)(*arrays, alpha.numpy())
        np.testing.assert_allclose(actual, expected, rtol=1e-12, atol=1e-12)


def test_to_be_told_that_exponents_lie_inside_changes_nothing_there():
    for kind in ("partly shared", "disjoint"):
        pair = random_pairs(kind)
        alpha = torch.linspace(0, 1, 12, dtype=torch.float64)
        for function in (rows_torch.log_partition, rows_torch.log_geometric_mean):
            told, untold = function(*pair, alpha, inside=True), function(*pair, alpha)
            assert torch.equal(told.nan_to_num(7.0), untold.nan_to_num(7.0))


def test_functions_widen_half_types_and_normalise_them():
    pair = [rows.bfloat16() for rows in random_pairs("flat")]
    q = rows_torch.log_geometric_mean(*pair, torch.full((12,), 0.3))
    assert q.dtype == torch.float32
    expected = qstar.log_geometric_mean(*(in_float64(rows) for rows in pair), 0.3)
    np.testing.assert_allclose(q, expected, rtol=0, atol=1e-5)
    np.testing.assert_allclose(
        rows_torch.total_variation(*pair) + rows_torch.acceptance_probability(*pair), 1.0, atol=1e-6
    )


def test_the_path_is_differentiable_in_alpha_on_partial_supports():
    pair = random_pairs("partly shared", rows=4)
    alpha = torch.full((4,), 0.3, dtype=torch.float64, requires_grad=True)
    rows_torch.log_partition(*pair, alpha).sum().backward()
    expected = qstar.kl_gap(*(rows.numpy() for rows in pair), 0.3)
    np.testing.assert_allclose(alpha.grad, expected, rtol=0, atol=1e-12)


def test_the_path_is_differentiable_beyond_the_ends():
    with np.errstate(divide="ignore"):
        narrow, wide = torch.tensor(np.log([[0.6, 0.4, 0.0], [0.2, 0.3, 0.5]]))
    narrow.requires_grad_()
    alpha = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    rows_torch.log_partition(narrow, wide, alpha).backward()
    assert alpha.grad.item() == pytest.approx(qstar.kl_gap(narrow.detach(), wide, 1.5), abs=1e-12)
    log_q = rows_torch.log_geometric_mean(narrow, wide, alpha).detach()
    torch.testing.assert_close(narrow.grad, 1.5 * log_q.exp())


def test_no_divergence_is_minus_zero():
    """Equal parents are 0 nats apart, and a printed "-0." makes a reader doubt it."""
    log_p = torch.tensor([0.2, 0.3, 0.5]).log()
    for vocab_row in (log_p, torch.full((5_000,), -math.log(5_000))):
        balance = rows_torch.solve_kl_symmetry(vocab_row, vocab_row)
        for field in (balance.chernoff, balance.kl_to_policy, balance.kl_to_teacher):
            assert float(field) == 0
            assert not torch.signbit(field)
