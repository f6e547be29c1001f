"""Decoded tokens follow q* exactly: against enumeration, with controls that must fail."""

import itertools

import numpy as np
import pytest
import tiny
import torch
from scipy.stats import chi2, chisquare, ncx2
from torch._subclasses.fake_tensor import FakeTensorMode

import qstar
from qstar import models
from qstar.comparison import measure
from qstar.decode import generate
from qstar.result import STATUSES

VOCAB = 7
LENGTH = 3
DRAWS = 30_000
FALSE_ALARM = 1e-9  # one seed in a billion would fail a correct sampler

POLICY_PROMPT = torch.tensor([1, 4, 0])
TEACHER_PROMPT = torch.tensor([5, 3, 3, 6, 2])

PAIRS = {
    "two Llamas": (lambda: tiny.llama(1, sharpness=2.0), lambda: tiny.llama(2, sharpness=0.5)),
    "two GPT-2s": (lambda: tiny.gpt2(3, sharpness=0.3), lambda: tiny.gpt2(4, sharpness=1.0)),
    "Llama and GPT-2": (lambda: tiny.llama(5, sharpness=2.0), lambda: tiny.gpt2(6, sharpness=0.3)),
}


@pytest.fixture(params=PAIRS)
def pair(request):
    return [make() for make in PAIRS[request.param]]


@pytest.fixture
def llamas():
    return [make() for make in PAIRS["two Llamas"]]


def log_law(model, prompt, prefix):
    """log p(. | prompt, prefix) by one forward without any cache, as float64 NumPy."""
    text = torch.cat([prompt, torch.tensor(prefix, dtype=torch.long)])
    with torch.no_grad():
        logits = model(text[None], use_cache=False).logits[0, -1]
    return torch.log_softmax(logits.double(), dim=-1).numpy()


def enumerated_law(policy, teacher, *, alpha=None):
    """The exact probability of every outcome of LENGTH tokens, by the NumPy reference."""
    law = np.ones((VOCAB,) * LENGTH)
    for depth in range(LENGTH):
        for prefix in itertools.product(range(VOCAB), repeat=depth):
            rows = log_law(policy, POLICY_PROMPT, prefix), log_law(teacher, TEACHER_PROMPT, prefix)
            at = qstar.solve_kl_symmetry(*rows).alpha if alpha is None else alpha
            shape = (VOCAB,) + (1,) * (LENGTH - depth - 1)
            law[prefix] *= np.exp(qstar.log_geometric_mean(*rows, at)).reshape(shape)
    np.testing.assert_allclose(law.sum(), 1.0, atol=1e-12)
    return law.ravel()


def drawn_counts(policy, teacher, prompts=(POLICY_PROMPT, TEACHER_PROMPT), **options):
    ids = [prompt.expand(DRAWS, -1) for prompt in prompts]
    tokens = generate(
        policy, teacher, *ids, max_new_tokens=LENGTH, generator=0, eos_token_id=None, **options
    ).tokens
    place = torch.tensor([VOCAB**2, VOCAB, 1])
    return torch.bincount((tokens * place).sum(-1), minlength=VOCAB**LENGTH).numpy()


def p_value(counts, law):
    """Of a chi-squared test on the joint outcomes; rare ones (fewer than 5 expected) are pooled."""
    expected = DRAWS * law
    rare = expected < 5
    pooled = [np.append(values[~rare], values[rare].sum()) for values in (counts, expected)]
    return chisquare(*[values[pooled[1] > 0] for values in pooled]).pvalue


def test_the_law_test_sees_a_total_variation_of_6_percent():
    """Its power, from the noncentral chi-squared law: N sum d^2/p is at least N (2 TV)^2."""
    cells = VOCAB**LENGTH - 1
    threshold = chi2.isf(FALSE_ALARM, cells)
    assert ncx2.sf(threshold, cells, DRAWS * (2 * 0.06) ** 2) > 0.999


@pytest.mark.parametrize("alpha", [None, 0.3], ids=["solved", "alpha=.3"])
def test_three_tokens_follow_the_enumerated_law(pair, alpha):
    law = enumerated_law(*pair, alpha=alpha)
    assert p_value(drawn_counts(*pair, alpha=alpha), law) > FALSE_ALARM


def test_swapped_roles_are_caught(pair):
    """Negative control: invisible at alpha = 1/2, caught at .3."""
    law = enumerated_law(*pair, alpha=0.3)
    swapped = drawn_counts(*pair[::-1], (TEACHER_PROMPT, POLICY_PROMPT), alpha=0.3)
    assert p_value(swapped, law) < FALSE_ALARM


def test_half_in_place_of_alpha_star_is_caught(pair):
    """Negative control: a sampler that does not solve."""
    law = enumerated_law(*pair)
    assert p_value(drawn_counts(*pair, alpha=0.5), law) < FALSE_ALARM


def test_exchanged_prompts_are_caught(llamas):
    """Negative control: each parent must read its own prompt."""
    law = enumerated_law(*llamas)
    exchanged = drawn_counts(*llamas, (TEACHER_PROMPT, POLICY_PROMPT))
    assert p_value(exchanged, law) < FALSE_ALARM


def test_the_trace_is_what_a_full_recomputation_finds(pair):
    result = generate(
        *pair, POLICY_PROMPT, TEACHER_PROMPT, max_new_tokens=12, generator=1, eos_token_id=None
    )
    trace, balance = result.trace, result.trace.balance
    for position in range(12):
        prefix = result.tokens[:position].tolist()
        policy, teacher = (
            log_law(model, prompt, prefix)
            for model, prompt in zip(pair, (POLICY_PROMPT, TEACHER_PROMPT), strict=True)
        )
        expected = qstar.solve_kl_symmetry(policy, teacher)
        log_q = qstar.log_geometric_mean(policy, teacher, expected.alpha)
        pairs = [
            (balance.alpha, expected.alpha),
            (balance.chernoff, expected.chernoff),
            (balance.kl_to_policy, qstar.kl(log_q, policy)),
            (balance.kl_to_teacher, qstar.kl(log_q, teacher)),
            (balance.curvature, expected.curvature),
            (trace.alpha, expected.alpha),
            (trace.minus_log_partition, expected.chernoff),
            (trace.minus_log_partition_half, -qstar.log_partition(policy, teacher, 0.5)),
            (trace.policy_to_teacher, qstar.kl(policy, teacher)),
            (trace.teacher_to_policy, qstar.kl(teacher, policy)),
            (trace.accept_policy, qstar.acceptance_probability(policy, log_q)),
            (trace.accept_teacher, qstar.acceptance_probability(teacher, log_q)),
            (trace.log_ratio_range, np.ptp(policy - teacher)),
        ]
        for actual, wanted in pairs:
            np.testing.assert_allclose(actual[position].numpy(), wanted, atol=1e-9)
        assert STATUSES[balance.status[position]] == expected.status


def test_what_solving_buys_is_a_difference_of_log_partitions(llamas):
    trace = generate(*llamas, POLICY_PROMPT, max_new_tokens=1, generator=0).trace
    rows = [log_law(model, POLICY_PROMPT, []) for model in llamas]
    log_star, log_half = (
        qstar.log_geometric_mean(*rows, at) for at in (float(trace.balance.alpha[0]), 0.5)
    )
    gained = trace.balance.chernoff - trace.minus_log_partition_half
    np.testing.assert_allclose(gained[0].numpy(), qstar.kl(log_star, log_half), atol=1e-12)


def test_greedy_takes_the_most_probable_token_of_q_star(pair):
    tokens = generate(
        *pair, POLICY_PROMPT, TEACHER_PROMPT, max_new_tokens=8, greedy=True, eos_token_id=None
    ).tokens.tolist()
    for position, token in enumerate(tokens):
        policy = log_law(pair[0], POLICY_PROMPT, tokens[:position])
        teacher = log_law(pair[1], TEACHER_PROMPT, tokens[:position])
        alpha = qstar.solve_kl_symmetry(policy, teacher).alpha
        assert token == qstar.log_geometric_mean(policy, teacher, alpha).argmax()


@pytest.mark.parametrize(("alpha", "followed"), [(1.0, 0), (0.0, 1)])
def test_an_end_of_the_path_follows_one_parent(llamas, alpha, followed):
    prompts = POLICY_PROMPT, TEACHER_PROMPT
    options = {"max_new_tokens": 20, "generator": 3, "eos_token_id": None}
    mixed = generate(*llamas, *prompts, alpha=alpha, **options)
    alone = generate(*[llamas[followed]] * 2, *[prompts[followed]] * 2, **options)
    assert mixed.tokens.tolist() == alone.tokens.tolist()
    accept = (mixed.trace.accept_policy, mixed.trace.accept_teacher)[followed]
    torch.testing.assert_close(accept, torch.ones_like(accept), rtol=0, atol=1e-12)
    none = torch.zeros_like(accept)
    torch.testing.assert_close(mixed.trace.minus_log_partition, none, rtol=0, atol=1e-12)
    assert (mixed.trace.balance.alpha != alpha).all()  # alpha* is reported all the same


def test_one_sequence_is_a_batch_of_one(llamas):
    single = generate(*llamas, POLICY_PROMPT, TEACHER_PROMPT, max_new_tokens=5, generator=7)
    batch = generate(
        *llamas, POLICY_PROMPT[None], TEACHER_PROMPT[None], max_new_tokens=5, generator=7
    )
    assert single.tokens.shape == (5,)
    assert single.lengths.shape == ()
    assert single.trace.alpha.shape == single.trace.balance.status.shape == (5,)
    assert batch.tokens.shape == batch.trace.alpha.shape == (1, 5)
    assert batch.lengths.shape == (1,)
    assert single.tokens.tolist() == batch.tokens[0].tolist()


def test_a_row_that_ends_is_filled_up_and_costs_the_others_nothing(llamas):
    ids = POLICY_PROMPT.expand(40, -1)
    free = generate(*llamas, ids, max_new_tokens=9, generator=5, eos_token_id=None)
    ended = generate(*llamas, ids, max_new_tokens=9, generator=5, eos_token_id=[2, 6])
    assert (free.lengths == 9).all()
    assert len(set(ended.lengths.tolist())) > 3  # ragged
    for row, length in enumerate(ended.lengths.tolist()):
        drawn = ended.tokens[row, :length]
        assert drawn.tolist() == free.tokens[row, :length].tolist()
        assert not torch.isin(drawn[:-1], torch.tensor([2, 6])).any()
        assert length == 9 or drawn[-1] in (2, 6)
        assert (ended.tokens[row, length:] == drawn[-1]).all()
        assert torch.isfinite(ended.trace.alpha[row, :length]).all()
        assert torch.isnan(ended.trace.alpha[row, length:]).all()
        assert torch.isnan(ended.trace.balance.chernoff[row, length:]).all()
        assert (ended.trace.balance.status[row, length:] == -1).all()


def test_generation_stops_when_every_row_has_ended(llamas):
    seen = []
    result = generate(
        *llamas,
        POLICY_PROMPT,
        max_new_tokens=60,
        generator=0,
        eos_token_id=list(range(VOCAB)),
        on_tokens=seen.append,
    )
    assert result.lengths == 1
    assert [block.shape for block in seen] == [(1, 1)]
    assert (result.tokens == result.tokens[0]).all()


@pytest.mark.parametrize(
    ("config", "argument", "ends"),
    [
        (3, "policy", [3]),
        ([3, 5], "policy", [3, 5]),
        (50256, "policy", []),  # GPT-2's default, outside a small vocabulary
        (None, "policy", []),
        (3, None, []),
        (3, 4, [4]),
        (3, (4, 99, -1), [4]),
    ],
)
def test_what_ends_a_row(config, argument, ends):
    model = tiny.llama(1, eos=config)
    result = generate(
        model,
        model,
        POLICY_PROMPT.expand(30, -1),
        max_new_tokens=10,
        generator=0,
        eos_token_id=argument,
    )
    last = result.tokens.gather(1, result.lengths[:, None] - 1)[:, 0]
    early = result.lengths < 10
    assert set(last[early].tolist()) == set(ends)
    assert not torch.isin(result.tokens[~early, :-1], torch.tensor(ends)).any()


def test_a_seed_is_a_generator_and_leaves_the_global_one_alone(llamas):
    before = torch.random.get_rng_state()
    by_seed = generate(*llamas, POLICY_PROMPT, max_new_tokens=10, generator=11)
    generator = torch.Generator().manual_seed(11)
    by_generator = generate(*llamas, POLICY_PROMPT, max_new_tokens=10, generator=generator)
    again = generate(*llamas, POLICY_PROMPT, max_new_tokens=10, generator=generator)
    assert by_seed.tokens.tolist() == by_generator.tokens.tolist() != again.tokens.tolist()
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize("fails", [False, True])
def test_models_work_in_eval_mode_and_are_given_back_as_they_were(fails):
    policy, teacher = tiny.gpt2(1, dropout=0.5), tiny.gpt2(2, dropout=0.5)
    expected = generate(policy, teacher, POLICY_PROMPT, max_new_tokens=8, generator=0).tokens
    policy.train()
    policy.transformer.h[0].eval()  # as somebody who froze a layer left it
    modes = [module.training for module in policy.modules()]

    def interrupt(tokens):
        if fails:
            raise KeyboardInterrupt

    try:
        actual = generate(
            policy, teacher, POLICY_PROMPT, max_new_tokens=8, generator=0, on_tokens=interrupt
        ).tokens
        assert actual.tolist() == expected.tolist()
    except KeyboardInterrupt:
        assert fails
    assert [module.training for module in policy.modules()] == modes
    assert not teacher.training


def test_new_tokens_can_be_trained_on(llamas):
    tokens = generate(*llamas, POLICY_PROMPT, max_new_tokens=4, generator=0).tokens
    llamas[0](tokens[None], labels=tokens[None]).loss.backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_weights_give_a_law_in_float64(dtype):
    model, other = tiny.llama(1, dtype=dtype), tiny.llama(2, dtype=dtype)
    trace = generate(model, other, POLICY_PROMPT, max_new_tokens=6, generator=0).trace
    assert trace.alpha.dtype == torch.float64
    assert trace.balance.converged.all()
    gap = trace.balance.kl_to_policy - trace.balance.kl_to_teacher
    assert gap.abs().max() < 1e-9


def test_measure_is_the_trace_of_known_laws(llamas):
    result = generate(
        *llamas, POLICY_PROMPT, TEACHER_PROMPT, max_new_tokens=40, generator=0, eos_token_id=None
    )
    rows = [
        models.log_laws(model, prompt, result.tokens)
        for model, prompt in zip(llamas, (POLICY_PROMPT, TEACHER_PROMPT), strict=True)
    ]
    trace = measure(*rows)
    for name in ("alpha", "minus_log_partition", "policy_to_teacher", "accept_teacher"):
        torch.testing.assert_close(
            getattr(trace, name), getattr(result.trace, name), rtol=0, atol=1e-9
        )
    fixed = measure(*[row.reshape(4, 10, VOCAB) for row in rows], alpha=0.3)
    assert fixed.alpha.shape == (4, 10)
    assert (fixed.alpha == 0.3).all()


def masked(model, outcomes, *, value=-torch.inf, from_call=0):
    """The model with some logits overwritten, from its n-th forward on."""
    calls = itertools.count()

    def overwrite(module, arguments, output):
        if next(calls) >= from_call:
            output.logits[..., outcomes] = value
        return output

    model.register_forward_hook(overwrite)
    return model


def test_tokens_outside_one_support_are_never_drawn(llamas):
    policy, teacher = masked(llamas[0], [0, 1]), masked(llamas[1], [6])
    result = generate(
        policy, teacher, POLICY_PROMPT.expand(2000, -1), max_new_tokens=2, generator=0
    )
    assert set(result.tokens.unique().tolist()) == {2, 3, 4, 5}
    assert torch.isfinite(result.trace.accept_policy).all()
    assert torch.isinf(result.trace.policy_to_teacher).all()


def test_disjoint_supports_raise_where_they_occur(llamas):
    policy = masked(llamas[0], [0, 1, 2], from_call=2)
    teacher = masked(llamas[1], [3, 4, 5, 6], from_call=2)
    with pytest.raises(ValueError, match="share no token at new token 2, row 0"):
        generate(policy, teacher, POLICY_PROMPT, max_new_tokens=5, eos_token_id=None)


def test_nan_in_the_middle_is_reported_with_its_place(llamas):
    teacher = masked(llamas[1], [4], value=torch.nan, from_call=3)
    with pytest.raises(ValueError, match="the teacher answers nan at new token 3, row 0"):
        generate(llamas[0], teacher, POLICY_PROMPT, max_new_tokens=5, eos_token_id=None)


def test_other_vocabularies_are_refused(llamas):
    with pytest.raises(ValueError, match="7 tokens, the teacher to 8"):
        generate(llamas[0], tiny.llama(1, vocab=8), POLICY_PROMPT, max_new_tokens=2)


def test_a_text_that_will_not_fit_is_refused_before_it_is_begun():
    model = tiny.llama(1, window=8)
    fits = generate(model, model, POLICY_PROMPT, max_new_tokens=6, generator=0, eos_token_id=None)
    assert fits.lengths == 6  # the last token is drawn, not read
    with pytest.raises(ValueError, match="window holds 8 tokens, and this text would have 9"):
        generate(model, model, POLICY_PROMPT, max_new_tokens=7)
    with pytest.raises(ValueError, match="window holds 8 tokens, and this text would have 9"):
        generate(model, model, POLICY_PROMPT, TEACHER_PROMPT, max_new_tokens=5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1: got 0"),
        ({"max_new_tokens": -3}, "max_new_tokens must be at least 1: got -3"),
        ({"policy_ids": torch.empty(0, dtype=torch.long)}, "at least one token"),
        ({"policy_ids": torch.ones(1, 1, 2, dtype=torch.long)}, r"got shape \(1, 1, 2\)"),
        ({"policy_ids": torch.ones(3)}, "token ids .* got torch.float32"),
        ({"policy_ids": [1, 2]}, "token ids .* got list"),
        ({"policy_ids": torch.tensor([1, 7])}, r"in 0\.\.6, the policy's vocabulary: got 1\.\.7"),
        ({"teacher_ids": torch.tensor([-1, 2])}, r"the teacher's vocabulary: got -1\.\.2"),
        ({"teacher_ids": torch.ones(2, 3, dtype=torch.long)}, "two prompts must come in one batch"),
        ({"alpha": 1.5}, r"lie in \[0, 1\]: got 1.5"),
        ({"alpha": float("nan")}, r"lie in \[0, 1\]: got nan"),
        ({"eos_token_id": "</s>"}, "got '</s>'"),
    ],
)
def test_bad_arguments_say_what_was_expected(llamas, arguments, message):
    call = {"policy_ids": POLICY_PROMPT, "max_new_tokens": 2} | arguments
    with pytest.raises(ValueError, match=message):
        generate(*llamas, **call)


def test_measure_refuses_laws_of_different_shapes():
    with pytest.raises(ValueError, match=r"\(2, 3\) and \(2, 4\)"):
        measure(torch.zeros(2, 3), torch.zeros(2, 4))


def test_a_position_costs_no_mixed_devices():
    """Without a GPU: the tensor parts of a position, run on tensors that claim to be on one."""
    with FakeTensorMode():
        rows = [torch.randn(2, VOCAB, device="cuda").log_softmax(dim=-1) for _ in range(2)]
        trace = measure(*rows)
        drawn = _inverse_cdf(rows[0].double(), torch.rand(2, dtype=torch.float64))
    assert trace.alpha.device.type == trace.accept_policy.device.type == drawn.device.type == "cuda"
    assert (trace.alpha.shape, drawn.shape) == ((2,), (2,))
