"""What `generate` returns, refuses and leaves alone. What it draws: `test_decode_distributions`."""

import dataclasses
import itertools
from functools import cache, partial

import numpy as np
import pytest
import tiny
import torch
from covering import all_pairs

import qstar
from qstar import rows_torch
from qstar.adapters import checkpoints
from qstar.decoding import cache_check
from qstar.decoding import generate as decode
from qstar.decoding.costs import (
    Costs,
    expected_forwards,
    expected_forwards_alternating,
    forwards_per_token,
)
from qstar.decoding.diagnostics import measure
from qstar.decoding.generate import PARENTS, PROPOSERS, Trace, generate
from qstar.decoding.kv_cache import KVCache
from qstar.result import STATUSES

VOCAB = 7

POLICY_PROMPT = torch.tensor([1, 4, 0])
TEACHER_PROMPT = torch.tensor([5, 3, 3, 6, 2])

PAIRS = {  # each architecture in either role
    "GPT-2 and Llama": (lambda: tiny.gpt2(3, sharpness=0.3), lambda: tiny.llama(2, sharpness=0.5)),
    "Llama and GPT-2": (lambda: tiny.llama(5, sharpness=2.0), lambda: tiny.gpt2(6, sharpness=0.3)),
}

COSTS = Costs(policy={1: 1.0, 9: 1.4}, teacher={1: 1.0, 9: 1.4}, draft={1: 0.2})
"""What "auto" is told, so that nothing is measured and a seed means one draw."""

SCHEMES = {  # name -> what to ask for; the draft model is added by whoever has one
    "plain": {"scheme": "plain"},
    "the policy drafts": {"scheme": "one-sided", "gamma": 3, "drafter": "policy"},
    "the teacher drafts": {"scheme": "one-sided", "gamma": 2, "drafter": "teacher"},
    "alternating": {"scheme": "alternating", "gamma": 1},
    "alternating threes": {"scheme": "alternating", "gamma": 3},
    "lookup": {"scheme": "lookup", "gamma": 3},
    "a third model drafts": {"scheme": "draft-model", "gamma": 3},
    "auto": {"scheme": "auto", "costs": COSTS},
}

generate_plainly = partial(generate, scheme="plain")


def asked(name):
    """The options of a scheme, with a third model where it needs one."""
    third = {"draft_model": tiny.llama(9)} if name == "a third model drafts" else {}
    return SCHEMES[name] | third


@pytest.fixture(params=PAIRS)
def pair(request):
    return [make() for make in PAIRS[request.param]]


@pytest.fixture
def llamas():
    return [tiny.llama(1, sharpness=2.0), tiny.llama(2, sharpness=0.5)]


def log_distribution(model, prompt, prefix):
    """log p(. | prompt, prefix) by one forward without any cache, as float64 NumPy."""
    text = torch.cat([prompt, torch.tensor(prefix, dtype=torch.long)])
    with torch.no_grad():
        logits = model(text[None], use_cache=False).logits[0, -1]
    return torch.log_softmax(logits.double(), dim=-1).numpy()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_trace_is_what_a_full_recomputation_finds(pair, scheme):
    result = generate(
        *pair,
        POLICY_PROMPT,
        TEACHER_PROMPT,
        max_new_tokens=12,
        generator=1,
        eos_token_id=None,
        **asked(scheme),
    )
    trace, balance = result.trace, result.trace.balance
    for position in range(12):
        prefix = result.tokens[:position].tolist()
        policy, teacher = (
            log_distribution(model, prompt, prefix)
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
            (trace.accept_policy, qstar.acceptance_probability(policy, log_q)),
            (trace.accept_teacher, qstar.acceptance_probability(teacher, log_q)),
        ]
        for actual, wanted in pairs:
            np.testing.assert_allclose(actual[position].numpy(), wanted, atol=1e-9)
        assert STATUSES[balance.status[position]] == expected.status


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_long_ragged_batch_never_loses_its_texts(pair, scheme, monkeypatch):
    """Rows reject, end and leave, caches are cut and squeezed: each keeps its distribution."""
    monkeypatch.setattr("qstar.decoding.kv_cache.SQUEEZE_FROM", 8)
    prompts = [torch.tensor([3]), POLICY_PROMPT, TEACHER_PROMPT, torch.tensor([6, 6])]
    teachers = [TEACHER_PROMPT, torch.tensor([1, 1]), torch.tensor([0]), POLICY_PROMPT]
    result = generate(
        *pair,
        prompts,
        teachers,
        max_new_tokens=45,
        generator=1,
        eos_token_id=None,
        stopping_criteria=[lambda ids, _: ids.shape[-1] in (25, 40)],
        **asked(scheme),
    )
    assert result.lengths.tolist() == [24, 22, 20, 23]
    for row, length in enumerate(result.lengths.tolist()):
        text = result.tokens[row, :length]
        known = measure(
            *[
                checkpoints.log_distributions(model, ids[row], text)
                for model, ids in zip(pair, (prompts, teachers), strict=True)
            ]
        )
        for name in ("alpha", "minus_log_partition", "accept_policy", "accept_teacher"):
            actual = getattr(result.trace, name)[row, :length]
            torch.testing.assert_close(actual, getattr(known, name), rtol=0, atol=1e-9)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_rounds_and_positions_tell_one_story(llamas, scheme):
    ids = POLICY_PROMPT.expand(6, -1)
    result = generate(
        *llamas, ids, max_new_tokens=15, generator=2, eos_token_id=[6], **asked(scheme)
    )
    trace = result.trace
    there = torch.arange(15) < result.lengths[:, None]
    assert sum(r.emitted for r in trace.rounds) == result.lengths.sum() == there.sum()
    assert (trace.proposer[~there] == -1).all()
    assert (trace.proposer[there] >= 0).all()
    assert not trace.accepted[~there].any()
    assert not trace.accepted[trace.proposer <= 0].any()
    kept = sum(r.accepted for r in trace.rounds)
    tested = sum(r.tested for r in trace.rounds)
    # A row that ends inside an accepted block leaves accepted drafts behind.
    assert trace.accepted.sum() <= kept <= tested <= sum(r.drafted for r in trace.rounds)
    proposed = (trace.proposer > 0).sum()
    # Those that were rejected; some of them behind the token that ended their row.
    assert 0 <= proposed - trace.accepted.sum() <= tested - kept
    assert trace.acceptance_rate == pytest.approx(kept / tested if tested else np.nan, nan_ok=True)
    proposers = {PROPOSERS[index] for index in trace.proposer[there].tolist()}
    allowed = {
        "plain": {"none"},
        "the policy drafts": {"policy"},
        "the teacher drafts": {"teacher"},
        "alternating": {"policy", "teacher"},
        "alternating threes": {"policy", "teacher"},
        "lookup": {"none", "lookup"},
        "a third model drafts": {"none", "draft"},
        "auto": set(PROPOSERS),
    }
    assert proposers <= allowed[scheme]
    calls = [forward for r in trace.rounds for forward in r.forwards]
    assert trace.model_calls == len(calls)
    assert trace.forwards == sum(forward.model in ("policy", "teacher") for forward in calls)
    if scheme == "plain":
        assert trace.tokens_per_forward == 0.5


def test_greedy_takes_the_most_probable_token_of_q_star(pair):
    tokens = generate_plainly(
        *pair, POLICY_PROMPT, TEACHER_PROMPT, max_new_tokens=8, greedy=True, eos_token_id=None
    ).tokens.tolist()
    for position, token in enumerate(tokens):
        policy = log_distribution(pair[0], POLICY_PROMPT, tokens[:position])
        teacher = log_distribution(pair[1], TEACHER_PROMPT, tokens[:position])
        alpha = qstar.solve_kl_symmetry(policy, teacher).alpha
        assert token == qstar.log_geometric_mean(policy, teacher, alpha).argmax()


@pytest.mark.parametrize(("alpha", "followed"), [(1.0, 0), (0.0, 1)])
def test_an_end_of_the_path_follows_one_parent(llamas, alpha, followed):
    prompts = POLICY_PROMPT, TEACHER_PROMPT
    options = {"max_new_tokens": 20, "generator": 3, "eos_token_id": None}
    mixed = generate_plainly(*llamas, *prompts, alpha=alpha, **options)
    with pytest.warns(decode.EqualParentsWarning):
        alone = generate_plainly(*[llamas[followed]] * 2, *[prompts[followed]] * 2, **options)
    assert mixed.tokens.tolist() == alone.tokens.tolist()
    accept = (mixed.trace.accept_policy, mixed.trace.accept_teacher)[followed]
    torch.testing.assert_close(accept, torch.ones_like(accept), rtol=0, atol=1e-12)
    none = torch.zeros_like(accept)
    torch.testing.assert_close(mixed.trace.minus_log_partition, none, rtol=0, atol=1e-12)
    assert mixed.trace.balance.alpha.isnan().all()  # nothing was solved
    assert (mixed.trace.balance.status == -1).all()


def test_one_sequence_is_a_batch_of_one(llamas):
    single = generate_plainly(*llamas, POLICY_PROMPT, TEACHER_PROMPT, max_new_tokens=5, generator=7)
    batch = generate_plainly(
        *llamas, POLICY_PROMPT[None], TEACHER_PROMPT[None], max_new_tokens=5, generator=7
    )
    assert single.tokens.shape == (5,)
    assert single.lengths.shape == ()
    assert single.trace.alpha.shape == single.trace.balance.status.shape == (5,)
    assert batch.tokens.shape == batch.trace.alpha.shape == (1, 5)
    assert batch.lengths.shape == (1,)
    assert single.tokens.tolist() == batch.tokens[0].tolist()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_row_that_ends_is_filled_up(llamas, scheme):
    ids = POLICY_PROMPT.expand(40, -1)
    ended = generate(
        *llamas, ids, max_new_tokens=9, generator=5, eos_token_id=[2, 6], **asked(scheme)
    )
    assert len(set(ended.lengths.tolist())) > 3  # ragged
    for row, length in enumerate(ended.lengths.tolist()):
        drawn = ended.tokens[row, :length]
        assert not torch.isin(drawn[:-1], torch.tensor([2, 6])).any()
        assert length == 9 or drawn[-1] in (2, 6)
        assert (ended.tokens[row, length:] == drawn[-1]).all()
        assert torch.isfinite(ended.trace.alpha[row, :length]).all()
        assert torch.isnan(ended.trace.alpha[row, length:]).all()
        assert torch.isnan(ended.trace.balance.chernoff[row, length:]).all()
        assert (ended.trace.balance.status[row, length:] == -1).all()


def test_generation_stops_when_every_row_has_ended(llamas):
    seen = []
    result = generate_plainly(
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


@pytest.mark.filterwarnings("ignore::qstar.decoding.generate.EqualParentsWarning")
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
    result = generate_plainly(
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
    by_seed = generate_plainly(*llamas, POLICY_PROMPT, max_new_tokens=10, generator=11)
    generator = torch.Generator().manual_seed(11)
    by_generator = generate_plainly(*llamas, POLICY_PROMPT, max_new_tokens=10, generator=generator)
    again = generate_plainly(*llamas, POLICY_PROMPT, max_new_tokens=10, generator=generator)
    assert by_seed.tokens.tolist() == by_generator.tokens.tolist() != again.tokens.tolist()
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize("fails", [False, True])
def test_models_work_in_eval_mode_and_are_given_back_as_they_were(fails):
    policy, teacher = tiny.gpt2(1, dropout=0.5), tiny.gpt2(2, dropout=0.5)
    expected = generate_plainly(
        policy, teacher, POLICY_PROMPT, max_new_tokens=8, generator=0
    ).tokens
    policy.train()
    policy.transformer.h[0].eval()  # as somebody who froze a layer left it
    modes = [module.training for module in policy.modules()]

    def interrupt(tokens):
        if fails:
            raise KeyboardInterrupt

    try:
        actual = generate_plainly(
            policy, teacher, POLICY_PROMPT, max_new_tokens=8, generator=0, on_tokens=interrupt
        ).tokens
        assert actual.tolist() == expected.tolist()
    except KeyboardInterrupt:
        assert fails
    assert [module.training for module in policy.modules()] == modes
    assert not teacher.training


def test_new_tokens_can_be_trained_on(llamas):
    tokens = generate_plainly(*llamas, POLICY_PROMPT, max_new_tokens=4, generator=0).tokens
    llamas[0](tokens[None], labels=tokens[None]).loss.backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_narrow_weights_give_distributions_in_float32(dtype, scheme):
    model, other = tiny.llama(1, dtype=dtype), tiny.llama(2, dtype=dtype)
    trace = generate(
        model, other, POLICY_PROMPT, max_new_tokens=6, generator=0, **asked(scheme)
    ).trace
    assert trace.alpha.dtype == torch.float32
    assert trace.balance.converged.all()
    gap = trace.balance.kl_to_policy - trace.balance.kl_to_teacher
    assert gap.abs().max() < 1e-5


@pytest.mark.parametrize("scheme", SCHEMES)
def test_parents_of_different_widths_are_compared_in_the_wider_one(scheme):
    model, other = tiny.llama(1, dtype=torch.float32), tiny.gpt2(2, dtype=torch.float64)
    result = generate(model, other, POLICY_PROMPT, max_new_tokens=6, generator=0, **asked(scheme))
    assert result.trace.alpha.dtype == torch.float64


def test_two_ways_to_the_distributions_agree(llamas):
    """`measure` on known distributions, by forwards over whole texts, says what the trace says."""
    result = generate_plainly(
        *llamas, POLICY_PROMPT, TEACHER_PROMPT, max_new_tokens=40, generator=0, eos_token_id=None
    )
    rows = [
        checkpoints.log_distributions(model, prompt, result.tokens)
        for model, prompt in zip(llamas, (POLICY_PROMPT, TEACHER_PROMPT), strict=True)
    ]
    known = measure(*rows)
    for name in ("alpha", "minus_log_partition", "accept_policy", "accept_teacher"):
        torch.testing.assert_close(
            getattr(known, name), getattr(result.trace, name), rtol=0, atol=1e-9
        )


def masked(model, outcomes, *, value=-torch.inf, from_call=0):
    """The model with some logits overwritten, from its n-th forward on."""
    cache_check.check(KVCache(model), 64)  # whose forwards are not counted
    calls = itertools.count()

    def overwrite(module, arguments, output):
        if next(calls) >= from_call:
            output.logits[..., outcomes] = value
        return output

    model.register_forward_hook(overwrite)
    return model


def test_tokens_outside_one_support_are_never_drawn(llamas):
    policy, teacher = masked(llamas[0], [0, 1]), masked(llamas[1], [6])
    result = generate_plainly(
        policy, teacher, POLICY_PROMPT.expand(2000, -1), max_new_tokens=2, generator=0
    )
    assert set(result.tokens.unique().tolist()) == {2, 3, 4, 5}
    assert torch.isfinite(result.trace.accept_policy).all()


def test_disjoint_supports_raise_where_they_occur(llamas):
    policy = masked(llamas[0], [0, 1, 2], from_call=2)
    teacher = masked(llamas[1], [3, 4, 5, 6], from_call=2)
    with pytest.raises(ValueError, match="share no token at new token 2, row 0"):
        generate_plainly(policy, teacher, POLICY_PROMPT, max_new_tokens=5, eos_token_id=None)


def test_nan_in_the_middle_is_reported_with_its_place(llamas):
    teacher = masked(llamas[1], [4], value=torch.nan, from_call=3)
    with pytest.raises(ValueError, match="the teacher answers nan at new token 3, row 0"):
        generate_plainly(llamas[0], teacher, POLICY_PROMPT, max_new_tokens=5, eos_token_id=None)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("broken", [0, 1])
def test_no_scheme_emits_a_token_where_a_parent_answers_nan(llamas, broken, scheme):
    masked(llamas[broken], [4], value=torch.nan)
    name = ("policy", "teacher")[broken]
    with pytest.raises(ValueError, match=f"the {name} answers nan at new token 0, row 0"):
        generate(*llamas, POLICY_PROMPT, max_new_tokens=5, generator=0, **asked(scheme))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_no_scheme_emits_a_token_where_the_parents_share_none(llamas, scheme):
    policy, teacher = masked(llamas[0], [0, 1, 2]), masked(llamas[1], [3, 4, 5, 6])
    call = partial(generate, policy, teacher, POLICY_PROMPT, max_new_tokens=5, **asked(scheme))
    with pytest.raises(ValueError, match="share no token at new token 0, row 0"):
        call(generator=0)
    result = call(disjoint="mixture", generator=0)
    disjoint = STATUSES.index("disjoint")
    assert (result.trace.balance.status == disjoint).all()


@pytest.mark.parametrize("block_verification", [False, True])
def test_a_draft_model_that_answers_nan_is_reported(llamas, block_verification):
    third = masked(tiny.llama(9), [4], value=torch.nan, from_call=2)
    with pytest.raises(ValueError, match="the draft model answers nan"):
        generate(
            *llamas,
            POLICY_PROMPT,
            max_new_tokens=5,
            scheme="draft-model",
            draft_model=third,
            gamma=3,
            generator=0,
            block_verification=block_verification,
        )


def test_a_looked_up_token_beyond_the_shared_vocabulary_is_not_proposed():
    """Two output layers padded to different sizes; the prompt repeats an id of the padding."""
    policy, teacher = tiny.llama(1, vocab=9), tiny.llama(2, vocab=8)
    prompt = torch.tensor([1, 2, 7, 1, 2, 7, 1, 2])
    for seed in range(5):
        result = generate(
            policy,
            teacher,
            prompt,
            vocab=6,
            max_new_tokens=10,
            scheme="lookup",
            gamma=3,
            generator=seed,
        )
        assert (result.tokens < 6).all()


def test_other_vocabularies_are_refused(llamas):
    with pytest.raises(ValueError, match="7 tokens, the teacher to 8"):
        generate_plainly(llamas[0], tiny.llama(1, vocab=8), POLICY_PROMPT, max_new_tokens=2)


def test_a_text_that_will_not_fit_is_refused_before_it_is_begun():
    model = tiny.llama(1, window=8)
    fits = generate_plainly(
        model, model, POLICY_PROMPT, max_new_tokens=6, generator=0, eos_token_id=None, alpha=1
    )
    assert fits.lengths == 6  # the last token is drawn, not read
    with pytest.raises(ValueError, match="window holds 8 tokens, and this text would have 9"):
        generate_plainly(model, model, POLICY_PROMPT, max_new_tokens=7)
    with pytest.raises(ValueError, match="window holds 8 tokens, and this text would have 9"):
        generate_plainly(model, model, POLICY_PROMPT, TEACHER_PROMPT, max_new_tokens=5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be a whole number, 1 or more: got 0"),
        ({"max_new_tokens": -3}, "max_new_tokens must be a whole number, 1 or more: got -3"),
        ({"policy_ids": torch.empty(0, dtype=torch.long)}, "at least one token"),
        ({"policy_ids": torch.ones(1, 1, 2, dtype=torch.long)}, r"got shape \(1, 1, 2\)"),
        ({"policy_ids": torch.ones(3)}, "token ids .* got torch.float32"),
        ({"policy_ids": [1, 2]}, "token ids .* got list"),
        ({"policy_ids": torch.tensor([1, 7])}, r"in 0\.\.6, the policy's vocabulary: got 1\.\.7"),
        ({"teacher_ids": torch.tensor([-1, 2])}, r"the teacher's vocabulary: got -1\.\.2"),
        (
            {"teacher_ids": torch.ones(2, 3, dtype=torch.long)},
            "the prompts must come in one batch: got 1 rows",
        ),
        ({"alpha": float("-inf")}, "must be a finite number: got -inf"),
        ({"alpha": float("nan")}, "must be a finite number: got nan"),
        ({"eos_token_id": "</s>"}, "got '</s>'"),
    ],
)
def test_bad_arguments_say_what_was_expected(llamas, arguments, message):
    call = {"policy_ids": POLICY_PROMPT, "max_new_tokens": 2} | arguments
    with pytest.raises(ValueError, match=message):
        generate_plainly(*llamas, **call)


# --- What is counted


def constant(log_distribution, *, window=1024):
    """A model whose next distribution is the same after every text."""
    model = tiny.llama(0, vocab=len(log_distribution), window=window)
    with torch.no_grad():
        model.model.embed_tokens.weight.fill_(1.0)
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        rows = torch.tensor(log_distribution, dtype=torch.float64)[:, None]
        model.lm_head.weight.copy_(rows.expand(-1, 16) / 16)
    return model


DISTRIBUTIONS = np.log([[0.5, 0.3, 0.15, 0.05], [0.2, 0.1, 0.3, 0.4]])
THIRD = np.log([0.35, 0.25, 0.2, 0.2])
TOKENS = 200


@pytest.fixture(scope="module")
def constants():
    return [constant(distribution) for distribution in DISTRIBUTIONS]


def accepts(alpha=None):
    at = qstar.solve_kl_symmetry(*DISTRIBUTIONS).alpha if alpha is None else alpha
    log_q = qstar.log_geometric_mean(*DISTRIBUTIONS, at)
    return [
        float(qstar.acceptance_probability(distribution, log_q))
        for distribution in (*DISTRIBUTIONS, THIRD)
    ]


def gap_in_errors(trace, expected):
    """How many standard errors the forwards per token are off; rounds are (nearly) independent."""
    forwards = np.array(
        [sum(f.model != "draft" for f in round_.forwards) for round_ in trace.rounds]
    )
    emitted = np.array([round_.emitted for round_ in trace.rounds])
    rate = forwards.sum() / emitted.sum()
    error = np.sqrt(((forwards - rate * emitted) ** 2).sum()) / emitted.sum()
    return (rate - expected) / error


def test_a_constant_model_has_its_distribution_after_every_text(constants):
    for prefix in ([], [1, 2], [3, 3, 0, 1]):
        distribution = log_distribution(constants[0], torch.tensor([2]), prefix)
        np.testing.assert_allclose(distribution, DISTRIBUTIONS[0], atol=1e-6)


@pytest.mark.parametrize("seed", range(15))
def test_alternating_takes_one_forward_per_token_and_one_per_rejection(llamas, seed):
    """The exact finite-n count: not on average, but always."""
    for n in (1, 2, 25):
        result = generate(
            *llamas,
            POLICY_PROMPT,
            TEACHER_PROMPT,
            max_new_tokens=n,
            generator=seed,
            eos_token_id=None,
            scheme="alternating",
            gamma=1,
        )
        rejections = int((~result.trace.accepted[: n - 1]).sum())
        assert result.trace.forwards == expected_forwards_alternating(n, rejections)
        assert result.trace.forwards <= 2 * n


@pytest.mark.parametrize("seed", range(5))
def test_a_rejection_in_one_row_costs_the_others_nothing(llamas, seed):
    """A batch that alternates takes the forwards of its unluckiest row, not one more."""
    trace = generate(
        *llamas,
        [POLICY_PROMPT, TEACHER_PROMPT, torch.tensor([3])] * 4,
        max_new_tokens=20,
        generator=seed,
        eos_token_id=None,
        scheme="alternating",
        gamma=1,
    ).trace
    rejections = (~trace.accepted[:, :-1]).sum(-1).tolist()
    assert len(set(rejections)) > 2
    assert trace.forwards == max(expected_forwards_alternating(20, n) for n in rejections)


@pytest.mark.parametrize(
    ("scheme", "gamma", "drafter", "alpha"),  # alpha is in the acceptance alone, for any scheme
    [
        ("one-sided", 2, "policy", 0.3),
        ("one-sided", 3, "policy", None),
        ("one-sided", 3, "teacher", 0.3),
        ("alternating", 1, None, None),
        ("alternating", 2, None, 0.3),
        ("alternating", 4, None, None),
    ],
)
def test_parents_that_draft_take_the_forwards_of_the_formula(
    constants, scheme, gamma, drafter, alpha
):
    by_parent = accepts(alpha)
    pair = by_parent[0], by_parent[1]
    if drafter is not None:
        pair = (by_parent[PROPOSERS.index(drafter) - 1],) * 2
    trace = generate(
        *constants,
        torch.tensor([0]),
        max_new_tokens=TOKENS,
        generator=1,
        alpha=alpha,
        eos_token_id=None,
        scheme=scheme,
        gamma=gamma,
        drafter=drafter,
    ).trace
    expected = expected_forwards(scheme, TOKENS, gamma, pair) / TOKENS
    assert abs(gap_in_errors(trace, expected)) < 4.5
    assert trace.tokens_per_forward == pytest.approx(TOKENS / trace.forwards)
    # The check can tell: another acceptance, or another draft length, is far off.
    wrong = expected_forwards(scheme, TOKENS, gamma, tuple(0.6 * a for a in pair)) / TOKENS
    assert abs(gap_in_errors(trace, wrong)) > 4.5


@pytest.mark.filterwarnings("ignore::qstar.decoding.generate.EqualParentsWarning")
@pytest.mark.parametrize("gamma", [1, 2, 4])
def test_a_third_drafter_takes_the_forwards_of_the_formula(constants, gamma, monkeypatch):
    monkeypatch.setattr("qstar.decoding.planner.WORTH_A_LOOKUP", 0.0)
    options = {"max_new_tokens": TOKENS, "generator": 2, "eos_token_id": None, "gamma": gamma}
    trace = generate(
        *constants,
        torch.tensor([0]),
        scheme="draft-model",
        draft_model=constant(THIRD),
        **options,
    ).trace
    expected = forwards_per_token("draft-model", gamma, accepts()[2])
    assert abs(gap_in_errors(trace, expected)) < 4.5
    # Of a uniform target every looked-up token is accepted with the same probability.
    uniform = constant(np.log([0.25] * 4))
    prompt = torch.tensor(list(itertools.product(range(4), repeat=3))).flatten()
    trace = generate(uniform, uniform, prompt, scheme="lookup", **options).trace
    assert all(round_.drafted == gamma for round_ in trace.rounds[:-4])
    expected = forwards_per_token("lookup", gamma, 0.25)
    seen = dataclasses.replace(
        trace, rounds=tuple(both_forwards(round_) for round_ in trace.rounds)
    )
    assert abs(gap_in_errors(seen, expected)) < 4.5


def both_forwards(round_):
    """A call that served both parents is two forwards."""
    calls = [f for f in round_.forwards for _ in range(1 + (f.model == "both"))]
    return dataclasses.replace(round_, forwards=tuple(calls))


@pytest.mark.parametrize(
    ("scheme", "gamma"), [("one-sided", 4), ("alternating", 1), ("alternating", 4)]
)
def test_the_acceptance_rate_is_the_mean_acceptance_probability(llamas, scheme, gamma, monkeypatch):
    def errors_off():
        trace = generate(
            *llamas,
            POLICY_PROMPT.expand(100, -1),
            max_new_tokens=30,
            generator=3,
            eos_token_id=None,
            scheme=scheme,
            gamma=gamma,
        ).trace
        by_policy, by_teacher = (trace.proposer == PROPOSERS.index(p) for p in PARENTS)
        mean = (trace.accept_policy[by_policy].sum() + trace.accept_teacher[by_teacher].sum()) / (
            by_policy.sum() + by_teacher.sum()
        )
        tested = sum(round_.tested for round_ in trace.rounds)
        assert tested == by_policy.sum() + by_teacher.sum()
        return abs(trace.acceptance_rate - float(mean)) / (0.5 / tested**0.5)

    assert errors_off() < 4.5
    if gamma > 1:  # mistake 8: drafts that were never tested counted as rejected
        monkeypatch.setattr(
            Trace,
            "acceptance_rate",
            property(
                lambda self: (
                    sum(r.accepted for r in self.rounds) / sum(r.drafted for r in self.rounds)
                )
            ),
        )
        assert errors_off() > 10


@pytest.mark.parametrize("alpha", [None, 0.3])
def test_judging_blocks_accepts_at_least_as_many_on_average(constants, alpha):
    means, errors = [], []
    for block_verification in (False, True):
        trace = generate(
            *constants,
            torch.zeros(3000, 1, dtype=torch.long),
            max_new_tokens=4,
            generator=4,
            alpha=alpha,
            eos_token_id=None,
            scheme="one-sided",
            gamma=4,
            drafter="policy",
            block_verification=block_verification,
        ).trace
        first = trace.rounds[0]
        means.append(first.accepted / 3000)
        errors.append(2 / 3000**0.5)  # at most 4 accepted: a standard deviation of at most 2
    a = accepts(alpha)[0]
    assert abs(means[0] - sum(a**i for i in range(1, 5))) < 4.5 * errors[0]
    assert means[1] > means[0] + 0.05


RAGGED = [POLICY_PROMPT, TEACHER_PROMPT, torch.tensor([2])]


@cache
def greedy_texts(name):
    """Of a pair in PAIRS, by the scheme that drafts nothing."""
    options = {"max_new_tokens": 25, "greedy": True, "eos_token_id": None}
    made = generate_plainly(*[make() for make in PAIRS[name]], RAGGED, **options)
    return made.tokens.tolist()


@pytest.mark.parametrize(
    ("name", "scheme", "block_verification"), all_pairs(PAIRS, SCHEMES, [False, True])
)
def test_greedy_decoding_is_the_same_by_every_scheme(name, scheme, block_verification):
    """Token for token in float64, whatever is drafted; ragged prompts.

    The judge of a round does not know the models, so that every two options meet, not every three.
    """
    call = partial(generate, *[make() for make in PAIRS[name]], RAGGED, eos_token_id=None)
    extra = {"block_verification": block_verification} | asked(scheme)
    assert call(max_new_tokens=25, greedy=True, **extra).tokens.tolist() == greedy_texts(name)
    sampled = call(max_new_tokens=8, generator=0, **extra).tokens.tolist()  # the control
    assert sampled != [text[:8] for text in greedy_texts(name)]


@cache
def greedy_in_float32():
    """(the parents, their prompts, the texts of the scheme that drafts nothing)."""
    models = [tiny.llama(seed, vocab=200, sharpness=0.3, dtype=torch.float32) for seed in (1, 2)]
    prompts = torch.arange(60).reshape(20, 3)
    options = {"max_new_tokens": 40, "greedy": True, "eos_token_id": None}
    return models, prompts, generate_plainly(*models, prompts, **options).tokens


@pytest.mark.parametrize("scheme", SCHEMES)
def test_in_float32_greedy_schemes_part_at_ties_only(scheme):
    """Where two texts part, the two tokens' log-probabilities differ by less than 1e-4."""
    models, prompts, wanted = greedy_in_float32()
    third = {"draft_model": tiny.llama(9, vocab=200, dtype=torch.float32)}
    options = {"max_new_tokens": 40, "greedy": True, "eos_token_id": None}
    extra = SCHEMES[scheme] | (third if scheme == "a third model drafts" else {})
    actual = generate(*models, prompts, **options, **extra).tokens
    parted = [row for row in range(20) if not torch.equal(actual[row], wanted[row])]
    assert len(parted) < 5
    for row in parted:
        at = int((actual[row] != wanted[row]).nonzero()[0])
        rows = [
            log_distribution(model, prompts[row], wanted[row, :at].tolist()) for model in models
        ]
        log_q = qstar.log_geometric_mean(*rows, qstar.solve_kl_symmetry(*rows).alpha)
        gap = log_q[wanted[row, at]] - log_q[actual[row, at]]
        assert abs(gap) < 1e-4


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_seed_is_one_draw_of_every_scheme(scheme):
    pair = [make() for make in PAIRS["Llama and GPT-2"]]
    options = {"max_new_tokens": 20, "eos_token_id": None} | asked(scheme)
    first, again, other = (
        generate(*pair, POLICY_PROMPT, TEACHER_PROMPT, generator=seed, **options).tokens.tolist()
        for seed in (5, 5, 6)
    )
    assert first == again != other


@pytest.mark.parametrize("scheme", SCHEMES)
def test_never_more_tokens_than_asked_for(llamas, scheme):
    for n in (1, 2, 3):
        result = generate(
            *llamas,
            [POLICY_PROMPT, TEACHER_PROMPT],
            max_new_tokens=n,
            generator=0,
            eos_token_id=None,
            **asked(scheme),
        )
        assert result.tokens.shape == (2, n)
        assert (result.lengths == n).all()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_context_window_can_be_filled_to_the_brim(scheme):
    models = [tiny.llama(seed, window=16) for seed in (1, 2)]
    third = {"draft_model": tiny.llama(9, window=16)} if "third" in scheme else {}
    result = generate(
        *models,
        POLICY_PROMPT,
        TEACHER_PROMPT,
        max_new_tokens=12,
        generator=0,
        eos_token_id=None,
        **SCHEMES[scheme] | third,
    )
    assert result.lengths == 12


def test_a_fixed_exponent_is_not_solved_for(llamas, monkeypatch):
    calls = []
    solve = rows_torch.solve_kl_symmetry

    def counted(*rows, **options):
        calls.append(rows)
        return solve(*rows, **options)

    monkeypatch.setattr(rows_torch, "solve_kl_symmetry", counted)
    options = {"max_new_tokens": 4, "generator": 0, "eos_token_id": None}
    generate(*llamas, POLICY_PROMPT, alpha=0.3, **options)
    assert calls == []
    generate(*llamas, POLICY_PROMPT, **options)
    assert calls


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", [2, 4, 512])
def test_a_prompt_is_read_by_the_first_forward_but_for_what_is_too_long(
    llamas, scheme, width, monkeypatch
):
    """However a prompt is cut, a seed draws the same, and nothing of it is read twice."""
    prompts = [torch.tensor([1, 4, 0, 2, 5, 1, 3]), torch.tensor([2, 6, 1])]
    options = {"max_new_tokens": 6, "generator": 3, "eos_token_id": None, **asked(scheme)}
    whole = generate(*llamas, *prompts, **options)
    for module in ("kv_cache", "parents"):
        monkeypatch.setattr(f"qstar.decoding.{module}.PREFILL_WIDTH", width)
    found = generate(*llamas, *prompts, **options)
    assert found.tokens.tolist() == whole.tokens.tolist()
    torch.testing.assert_close(found.trace.alpha, whole.trace.alpha, rtol=0, atol=1e-9)
    for name, prompt in zip(PARENTS, prompts, strict=True):
        before = [f for f in found.trace.prefill if f.model == name]
        begun = [f for r in found.trace.rounds for f in r.forwards if f.begins and f.model == name]
        assert len(before) == (len(prompt) - 1) // width
        assert all(f.begins and f.width == width for f in before)
        rest = (len(prompt) - 1) % width + 1
        assert len(begun) == (rest > 1)
        assert all(rest <= f.width <= rest + 4 for f in begun)
