"""Guidance: a fixed exponent outside [0, 1], by every scheme, against the formula itself.

The output distribution is enumerated as in `test_decode_distributions`; what it should be is
computed here from log teacher + alpha (log policy - log teacher), without the package's functions.
"""

import itertools
from dataclasses import fields
from functools import partial

import decoder_distributions
import numpy as np
import pytest
import tiny
import torch
from covering import all_pairs
from decoder_distributions import (
    ended_distribution,
    enumerated_distribution,
    expected_distribution,
    options_of,
)
from schemes import (
    LONGER,
    OF_THREE,
    PROMPTS,
    SHORT,
    VOCAB,
    asked,
    without_garbage_collection,
)
from scipy.special import log_softmax
from transformers import SuppressTokensLogitsProcessor

import qstar
from qstar.decoding import costs as cost
from qstar.decoding.costs import PARENTS, Costs
from qstar.decoding.enumeration import decoder_distribution, tiny_model, token_level_distribution
from qstar.decoding.generate import EqualParentsWarning, generate
from qstar.decoding.judging import Rule
from qstar.decoding.planner import HOPE, PRIOR, Evidence, beyond, together_is_faster

EXACT = 1e-12
ALPHAS = [-0.5, 1.5, 3.0]

BLOCKS = LONGER | OF_THREE


def models():
    """So flat that at alpha = 3 no outcome has more than .7."""
    return [tiny.llama(1, vocab=VOCAB, sharpness=0.3), tiny.gpt2(2, vocab=VOCAB, sharpness=0.2)]


def in_turn(schemes):
    """Each scheme with one of the exponents."""
    return list(zip(schemes, itertools.cycle(ALPHAS), strict=False))


def formula(policy, teacher, alpha):
    """The target, token by token: a token that the guided parent excludes has no mass."""
    guided, other = (policy, teacher) if alpha > 1 else (teacher, policy)
    strength = alpha if alpha > 1 else 1 - alpha
    assert strength > 1
    with np.errstate(invalid="ignore"):
        log_q = other + strength * (guided - other)
    return log_softmax(np.where(np.isneginf(guided), -np.inf, log_q), axis=-1)


quiet_memory = pytest.fixture(autouse=True, scope="module")(without_garbage_collection)


@pytest.fixture(autouse=True)
def by_the_formula(monkeypatch):
    monkeypatch.setattr(decoder_distributions, "target_distribution", formula)


def distribution_error(parents, length, scheme, *, alpha, prompts=PROMPTS, rule=None, **filters):
    """The largest error in the probability of any outcome, of any of the prompts."""
    expected = [
        expected_distribution(parents, pair, length, vocab=VOCAB, alpha=alpha, **filters)
        for pair in prompts
    ]
    options = asked(scheme) | options_of(**filters) | {"rule": rule}
    actual, _ = enumerated_distribution(
        parents, prompts, length, vocab=VOCAB, alpha=alpha, **options
    )
    return np.abs(actual - expected).max()


# --- The distribution, enumerated


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("scheme", SHORT)
def test_every_scheme_has_the_guided_distribution(scheme, alpha):
    assert distribution_error(models(), 2, SHORT[scheme], alpha=alpha, prompts=PROMPTS[1:]) < EXACT


@pytest.mark.parametrize(("scheme", "alpha", "blocks"), all_pairs(BLOCKS, ALPHAS, [False, True]))
def test_longer_drafts_have_the_guided_distribution(scheme, alpha, blocks):
    options = BLOCKS[scheme] | {"block_verification": blocks}
    length = 3 if scheme in OF_THREE else 2
    assert distribution_error(models(), length, options, alpha=alpha, prompts=PROMPTS[2:]) < EXACT


FILTERS = {
    "warm and cut": {"temperature": 0.7, "top_p": 0.8},
    "two tokens": {"top_k": 2},
    "all": {"penalty": 0.8, "temperature": 1.3, "top_k": 2, "top_p": 0.9},
    "of the parents": {"penalty": 0.8, "temperature": 0.8, "where": "parents"},
}


FILTERED = [  # of the coin, which makes many choices, one of either kind
    (name, scheme, alpha)
    for name, scheme, alpha in all_pairs(FILTERS, SHORT, ALPHAS)
    if scheme != "coin" or name in ("two tokens", "of the parents")
]


@pytest.mark.parametrize(("name", "scheme", "alpha"), FILTERED)
def test_filters_are_part_of_the_guided_distribution(name, scheme, alpha):
    options = {"prompts": PROMPTS[2:], "alpha": alpha} | FILTERS[name]
    assert distribution_error(models(), 2, SHORT[scheme], **options) < EXACT


@pytest.mark.parametrize(("scheme", "alpha"), in_turn(BLOCKS))
def test_a_row_that_ends_inside_a_block_keeps_its_guided_distribution(scheme, alpha):
    options, length = asked(BLOCKS[scheme]), 3 if scheme in OF_THREE else 2
    prompts = PROMPTS[2:]
    actual, _ = enumerated_distribution(
        models(), prompts, length, vocab=VOCAB, eos_token_id=1, alpha=alpha, **options
    )
    free = expected_distribution(models(), prompts[0], length, vocab=VOCAB, alpha=alpha)
    assert np.abs(actual[0] - ended_distribution(free, length, VOCAB, 1)).max() < EXACT


@pytest.mark.parametrize(
    ("scheme", "alpha", "together"),
    all_pairs(["plain", "lookup", "a third model drafts"], ALPHAS, [False, True]),
)
def test_classifier_free_guidance_of_one_model_has_its_distribution(scheme, alpha, together):
    model = models()[1]
    options = SHORT[scheme] | {"one_call": together}
    assert distribution_error([model, model], 2, options, alpha=alpha, prompts=PROMPTS[1:]) < EXACT


@pytest.mark.parametrize(("scheme", "alpha"), [("plain", -0.5), ("alternating", 1.5)])
def test_over_a_cache_of_fixed_size_the_guided_distribution_is_the_same(scheme, alpha):
    pair = [tiny.llama(seed, vocab=VOCAB, sharpness=0.3) for seed in (1, 3)]
    options = SHORT[scheme] | {"cache_implementation": "static"}
    assert distribution_error(pair, 2, options, alpha=alpha, prompts=PROMPTS[1:]) < EXACT


@pytest.mark.parametrize(
    ("scheme", "alpha"), [("plain", 3.0), ("alternating", -0.5), ("coin", 1.5)]
)
def test_the_packages_own_enumeration_agrees(scheme, alpha):
    pair = tiny_model(1), tiny_model(2)
    options = asked(SHORT[scheme]) | {"length": 2, "alpha": alpha}
    wanted = token_level_distribution(*pair, *PROMPTS[0], length=2, alpha=alpha)
    distribution, _ = decoder_distribution(*pair, *PROMPTS[0], **options)
    assert np.abs(distribution - wanted).max() < EXACT


@pytest.mark.parametrize(("scheme", "alpha"), in_turn(SHORT))
def test_greedy_takes_the_most_probable_guided_token(scheme, alpha):
    parents, prompts = models(), PROMPTS[0]
    out = generate(
        *parents,
        *prompts,
        max_new_tokens=12,
        greedy=True,
        alpha=alpha,
        eos_token_id=None,
        **asked(SHORT[scheme]),
    )
    texts = list(prompts)
    for token in out.tokens:
        rows = []
        for model, text in zip(parents, texts, strict=True):
            with torch.no_grad():
                logits = model(text[None], use_cache=False).logits[0, -1]
            rows.append(log_softmax(logits.numpy()))
        assert int(token) == formula(*rows, alpha).argmax()
        texts = [torch.cat([text, token[None]]) for text in texts]


# Negative controls.


class Clamped(Rule):
    def mix(self, log_policy, log_teacher):
        return Rule(alpha=min(1.0, max(0.0, self.alpha))).mix(log_policy, log_teacher)


class Exchanged(Rule):
    def mix(self, log_policy, log_teacher):
        return Rule(alpha=1 - self.alpha).mix(log_policy, log_teacher)


class StrengthBesideOne(Rule):
    """log policy + alpha (log policy - log teacher): another convention of the strength."""

    def mix(self, log_policy, log_teacher):
        away = 1 + self.alpha if self.alpha > 1 else self.alpha - 1
        return Rule(alpha=away).mix(log_policy, log_teacher)


class SwapsWithTheRoles(Rule):
    def judge(self, state, proposal, log_policy, log_teacher, *beyond):
        if proposal.by == "teacher":
            log_policy, log_teacher = log_teacher, log_policy
        return super().judge(state, proposal, log_policy, log_teacher, *beyond)


class DraftsAreAlreadyGuided(Rule):
    """What a draft was drawn from is taken to be the target: everything is kept."""

    def judge(self, state, proposal, log_policy, log_teacher, *beyond):
        given = {field.name: getattr(proposal, field.name) for field in fields(proposal)}
        log_q, _ = self.mix(log_policy, log_teacher)
        log_q = log_q[:, : proposal.width]
        return super().judge(
            state, type(proposal)(**given | {"log_draft": log_q}), log_policy, log_teacher, *beyond
        )


MISTAKES = [Clamped, Exchanged, StrengthBesideOne, SwapsWithTheRoles, DraftsAreAlreadyGuided]


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_changes_the_guided_distribution(mistake, alpha):
    scheme = SHORT["the teacher drafts"]
    measured = partial(distribution_error, models(), 2, scheme, alpha=alpha, prompts=PROMPTS[:1])
    assert measured() < EXACT
    assert measured(rule=mistake) > 1e-2


# --- Supports


def without(model, *tokens, from_call=0):
    """The same model, which excludes some tokens."""
    calls = itertools.count()

    def exclude(module, args, output):
        if next(calls) >= from_call:
            output.logits[..., list(tokens)] = -torch.inf
        return output

    model.register_forward_hook(exclude)
    return model


def guided_first(alpha, guided, divisor):
    """(policy, teacher) of which the first is guided."""
    return [guided, divisor] if alpha > 1 else [divisor, guided]


@pytest.mark.parametrize(("scheme", "alpha"), in_turn(SHORT))
def test_what_the_guided_parent_excludes_is_never_drawn(scheme, alpha):
    """Token 0 is excluded by the guided parent, token 3 by both."""
    vocab, prompts = 4, PROMPTS[:1]
    pair = guided_first(
        alpha,
        without(tiny.llama(1, vocab=vocab, sharpness=0.3), 0, 3),
        without(tiny.gpt2(2, vocab=vocab, sharpness=0.2), 3),
    )
    options = SHORT[scheme] | {"alpha": alpha}
    if options["scheme"] == "draft-model":
        options["draft_model"] = tiny.gpt2(7, vocab=vocab, sharpness=0.5)
    actual, result = enumerated_distribution(pair, prompts, 2, vocab=vocab, **options)
    wanted = expected_distribution(pair, prompts[0], 2, vocab=vocab, alpha=alpha)
    assert (wanted > 0).sum() == 4
    assert np.abs(actual[0] - wanted).max() < EXACT
    assert (actual[0][wanted == 0] == 0).all()
    assert torch.isfinite(result.trace.minus_log_partition).all()


@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize(("scheme", "alpha"), in_turn(SHORT))
def test_a_quotient_by_zero_is_refused_where_it_occurs(scheme, alpha, blocks):
    if blocks and SHORT[scheme]["scheme"] == "coin":
        return
    pair = guided_first(alpha, tiny.llama(1, vocab=VOCAB), without(tiny.llama(2, vocab=VOCAB), 1))
    divisor = PARENTS[alpha > 1]
    with pytest.raises(
        ValueError, match=f"the {divisor} excludes 1 of the tokens that the"
    ) as told:
        generate(
            *pair,
            PROMPTS[0][0],
            max_new_tokens=5,
            generator=0,
            alpha=alpha,
            block_verification=blocks,
            **asked(SHORT[scheme]),
        )
    assert "at new token 0, row 0 (the likeliest is token 1, of probability" in str(told.value)
    assert f"with alpha={alpha} the {divisor} is divided by" in str(told.value)


def test_it_is_refused_at_the_position_and_in_the_row_where_it_occurs():
    pair = tiny.llama(1, vocab=VOCAB), without(tiny.llama(2, vocab=VOCAB), 1, from_call=4)
    rows = [PROMPTS[0][0]] * 2
    with pytest.raises(ValueError, match=r"at new token \d, row 0"):
        generate(*pair, rows, max_new_tokens=9, generator=0, alpha=1.5, scheme="plain")


@pytest.mark.parametrize("filtered", ["parents", "target"])
def test_what_both_parents_are_told_to_exclude_may_be_divided_by(filtered):
    """The advice that comes with the refusal, and why it says where the filter goes."""
    pair = tiny.llama(1, vocab=VOCAB), without(tiny.llama(2, vocab=VOCAB), 1)
    ban = [SuppressTokensLogitsProcessor([1])]
    call = partial(
        generate,
        *pair,
        PROMPTS[0][0],
        max_new_tokens=30,
        generator=0,
        alpha=1.5,
        logits_processor=ban,
        filtered=filtered,
        eos_token_id=None,
    )
    if filtered == "target":
        with pytest.raises(
            ValueError, match=r"a logits processor that bans them, filtered='parents"
        ):
            call()
    else:
        assert set(call().tokens.tolist()) == {0, 2}


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("cut", [{"top_k": 1}, {"top_p": 0.5}])
def test_filters_that_may_cut_a_divisor_ask_what_is_to_be_done(cut, alpha):
    pair = tiny.llama(1, vocab=VOCAB, sharpness=2.0), tiny.llama(3, vocab=VOCAB, sharpness=2.0)
    call = partial(
        generate, *pair, PROMPTS[2][0], max_new_tokens=9, generator=0, alpha=alpha, **cut
    )
    divisor = PARENTS[alpha > 1]
    with pytest.raises(ValueError, match=f"can take a token from the {divisor} that"):
        call(filtered="parents", on_tokens=lambda tokens: pytest.fail("too late"))
    with pytest.raises(ValueError, match=r"Apply the filters to what is drawn from \(filtered='t"):
        call(filtered="parents", disjoint="raise")
    assert call(filtered="target").lengths == 9
    with pytest.raises(ValueError, match="is what smoothing gives for an alpha in"):
        call(disjoint="mixture")


class Scripted:
    """A `Chance` that keeps nothing and draws what it was told."""

    def __init__(self, *tokens):
        self.tokens = iter(tokens)

    def keep(self, log_probability):
        return torch.zeros_like(log_probability, dtype=torch.bool)

    def draw(self, log_distribution):
        return torch.full(log_distribution.shape[:-1], next(self.tokens))


@pytest.mark.parametrize("blocks", [False, True])
def test_a_block_is_refused_if_a_draft_of_it_leads_to_a_quotient_by_zero(blocks):
    """Else it would keep too few of the drafts that lead there, without a word."""

    def exclude(module, args, output):
        after_0 = args[0][:, -output.logits.shape[1] :] == 0
        output.logits[..., 1] = output.logits[..., 1].masked_fill(after_0, -torch.inf)
        return output

    teacher = tiny.llama(2, vocab=VOCAB)
    teacher.register_forward_hook(exclude)
    call = partial(
        generate,
        tiny.llama(1, vocab=VOCAB),
        teacher,
        torch.tensor([1, 2]),
        max_new_tokens=2,
        alpha=1.5,
        block_verification=blocks,
        **BLOCKS["the policy drafts two"],
    )
    if blocks:
        with pytest.raises(ValueError, match="at new token 1, row 0"):
            call(generator=Scripted(0, 0, 2))
    else:  # the first draft is rejected, and nothing was to follow it
        assert call(generator=Scripted(0, 0, 2, 0, 2)).tokens.tolist() == [2, 2]


def test_an_exponent_too_large_for_the_numbers_is_said_to_be():
    pair = [tiny.llama(seed, vocab=VOCAB, dtype=torch.float32, sharpness=50.0) for seed in (1, 2)]
    call = partial(generate, *pair, PROMPTS[0][0], max_new_tokens=2, generator=0)
    with pytest.raises(ValueError, match=r"alpha=3e\+38 overflows at new token 0, row 0"):
        call(alpha=3e38)
    with pytest.raises(ValueError, match=r"must be a finite number: got 1e\+39"):
        call(alpha=1e39)


# --- What is known and said of it


@pytest.mark.parametrize("alpha", ALPHAS)
def test_the_trace_holds_the_log_partition_and_what_each_parents_drafts_are_kept_with(alpha):
    pair = models()
    out = generate(*pair, *PROMPTS[0], max_new_tokens=1, generator=0, alpha=alpha)
    rows = [
        log_softmax(model(prompt[None]).logits[0, -1].detach().numpy())
        for model, prompt in zip(pair, PROMPTS[0], strict=True)
    ]
    log_q = formula(*rows, alpha)
    order = alpha if alpha > 1 else 1 - alpha
    first, second = rows if alpha > 1 else rows[::-1]
    renyi = np.log(np.exp(order * first + (1 - order) * second).sum()) / (order - 1)
    assert renyi > 0
    assert float(out.trace.alpha[0]) == alpha
    assert float(out.trace.minus_log_partition[0]) == pytest.approx(-(order - 1) * renyi, abs=1e-12)
    assert bool(out.trace.balance.chernoff.isnan().all())
    for name, distribution in zip(PARENTS, rows, strict=True):
        accept = np.minimum(np.exp(distribution), np.exp(log_q)).sum()
        assert float(getattr(out.trace, f"accept_{name}")[0]) == pytest.approx(accept, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("alpha", ALPHAS)
def test_equal_parents_are_told_and_others_are_not(alpha, dtype):
    model = tiny.llama(1, vocab=VOCAB, dtype=dtype)
    options = {"max_new_tokens": 6, "generator": 0, "alpha": alpha, "eos_token_id": None}
    with pytest.warns(EqualParentsWarning):
        generate(model, model, PROMPTS[1][0], **options)
    generate(model, model, *PROMPTS[1], **options)  # warnings are errors


def test_no_mixture_is_kept_more_often_than_the_nearer_parent():
    """Total variation grows along a row of increasing likelihood ratios; inside it does not."""
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(200):
        policy, teacher = rng.dirichlet(np.ones(5), 2)
        for alpha in (1.0, 1.1, 1.5, 3.0, 10.0):
            log_q = qstar.log_geometric_mean(np.log(policy), np.log(teacher), alpha)
            weights = np.linspace(0, 1, 9)[:, None]
            drafts = weights * policy + (1 - weights) * teacher
            kept = np.minimum(drafts, np.exp(log_q)).sum(-1)
            assert (np.diff(kept) > -1e-12).all()
        half = np.exp(qstar.log_geometric_mean(np.log(policy), np.log(teacher), 0.5))
        kept = [np.minimum(d, half).sum() for d in (policy, (policy + teacher) / 2, teacher)]
        inside += kept[1] > max(kept[0], kept[2])
    assert inside > 150


def test_what_is_hoped_of_a_drafter_follows_its_distance():
    seen = partial(Evidence, {}, 10, (), False)
    for name in (*PARENTS, "coin", "draft"):
        for alpha in (None, 0.0, 0.3, 1.0):
            assert seen(alpha=alpha).acceptance(name) == PRIOR[name]
    for alpha, policy, teacher in ((1.5, 0.8, 0.4), (-0.5, 0.4, 0.8), (3.0, 0.2, 0.0)):
        found = [seen(alpha=alpha).acceptance(name) for name in (*PARENTS, "coin")]
        assert found == pytest.approx([policy, teacher, (policy + teacher) / 2])
        assert seen(alpha=alpha).acceptance("draft") == PRIOR["draft"]
    told = Evidence({"coin": (1e6 * 0.7, 1e6)}, 10, (), False, 1.5)
    assert told.acceptance("coin") == pytest.approx(0.7, abs=1e-5)
    assert beyond(HOPE, "policy", 1.5) == pytest.approx(0.9)
    assert beyond(HOPE, "teacher", 1.5) == pytest.approx(0.7)


def test_one_call_for_both_parents_is_chosen_sooner_where_turns_are_kept_less():
    forward = {1: 1.0, 9: 1.2}
    turns = cost.alternating(Costs(forward, forward), 1, HOPE, HOPE)
    costs = Costs(forward, forward, both={1: turns * 1.02, 9: 3.0})
    assert not together_is_faster(costs)
    assert not together_is_faster(costs, 0.3)
    assert together_is_faster(costs, 3.0)
    assert together_is_faster(costs, -2.0)
