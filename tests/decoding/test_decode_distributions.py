"""Decoded tokens follow q* exactly: every choice enumerated, then sampled, with controls that fail.

Three kinds of test. `decoder_distributions.enumerated_distribution` runs the decoder on a batch
with one row per sequence of choices, rows of three prompts among them, and what it draws must be
the token-level distribution to 1e-12: no odds, and every rejection in one row is ragged against
another. `every_outcome` does the same with a single row, where an adaptive choice of schemes rests
on that row's own text.
Then seeds: chi-squared on the joint outcomes of three tokens. The chance that a correct decoder
fails any of these is below 1e-9; what they catch is asserted in
`test_the_sampling_tests_see_a_total_variation_of_16_percent`; smaller errors are for the exact
ones. About a minute.
"""

import itertools
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial

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
    penalise,
    ways_to_decode,
)
from sampling import smallest_detectable_tv
from schemes import (
    COSTS,
    LONGER,
    OF_THREE,
    PROMPTS,
    SHORT,
    VOCAB,
    asked,
    without_garbage_collection,
)
from scipy.stats import chisquare
from transformers import TopKLogitsWarper

from qstar.decoding import kv_cache, planner
from qstar.decoding.costs import PARENTS, Costs
from qstar.decoding.filters import filters_for
from qstar.decoding.generate import generate
from qstar.decoding.judging import Rule
from qstar.sampling import chance, enumeration, rules

EXACT = 1e-12
PAIRS = {
    "Llama and GPT-2": lambda vocab=VOCAB: [
        tiny.llama(1, vocab=vocab, sharpness=2.0),
        tiny.gpt2(2, vocab=vocab, sharpness=0.5),
    ],
    "two GPT-2s": lambda vocab=VOCAB: [
        tiny.gpt2(3, vocab=vocab, sharpness=0.3),
        tiny.gpt2(4, vocab=vocab, sharpness=1.0),
    ],
}

quiet_memory = pytest.fixture(autouse=True, scope="module")(without_garbage_collection)


def distribution_error(
    models, length, scheme, *, alpha=None, prompts=PROMPTS, rule=None, **filters
):
    """The largest error in the probability of any outcome, of any of the prompts."""
    expected = [
        expected_distribution(models, pair, length, vocab=VOCAB, alpha=alpha, **filters)
        for pair in prompts
    ]
    wanted = asked(scheme) | options_of(**filters) | {"rule": rule}
    actual, _ = enumerated_distribution(models, prompts, length, vocab=VOCAB, alpha=alpha, **wanted)
    return np.abs(actual - expected).max()


# Every choice, enumerated.


@pytest.mark.parametrize("alpha", [None, 0.3], ids=["solved", "alpha=.3"])
@pytest.mark.parametrize("scheme", SHORT)
@pytest.mark.parametrize("pair", PAIRS)
def test_every_scheme_has_the_token_level_distribution(pair, scheme, alpha):
    assert distribution_error(PAIRS[pair](), 2, SHORT[scheme], alpha=alpha) < EXACT


@pytest.mark.parametrize("block_verification", [False, True])
@pytest.mark.parametrize("alpha", [None, 0.3], ids=["solved", "alpha=.3"])
@pytest.mark.parametrize("scheme", LONGER)
def test_longer_drafts_have_the_token_level_distribution(scheme, alpha, block_verification):
    options = LONGER[scheme] | {"block_verification": block_verification}
    error = distribution_error(PAIRS["Llama and GPT-2"](), 2, options, alpha=alpha)
    assert error < EXACT


@pytest.mark.parametrize("block_verification", [False, True])
@pytest.mark.parametrize("alpha", [None, 0.3], ids=["solved", "alpha=.3"])
@pytest.mark.parametrize("scheme", OF_THREE)
def test_drafts_of_a_third_have_the_token_level_distribution(scheme, alpha, block_verification):
    options = OF_THREE[scheme] | {"block_verification": block_verification}
    error = distribution_error(
        PAIRS["Llama and GPT-2"](), 3, options, alpha=alpha, prompts=PROMPTS[2:]
    )
    assert error < EXACT


FILTERS = {
    "warm and cut": {"temperature": 0.7, "top_p": 0.8},
    "two tokens": {"top_k": 2},
    "no repetition": {"penalty": 1.5},
    "all": {"penalty": 0.8, "temperature": 1.3, "top_k": 2, "top_p": 0.9},
}


@pytest.mark.parametrize(
    ("name", "where", "scheme"), all_pairs(FILTERS, ["target", "parents"], SHORT)
)
def test_filters_shape_the_target_and_what_is_drafted_alike(name, where, scheme):
    options = SHORT[scheme] | {"disjoint": "mixture"}
    models = PAIRS["Llama and GPT-2"]()
    error = distribution_error(
        models, 2, options, prompts=PROMPTS[1:], where=where, **FILTERS[name]
    )
    assert error < EXACT


@pytest.mark.parametrize("scheme", [*LONGER, "lookup of two"])
@pytest.mark.parametrize("where", ["target", "parents"])
def test_filters_read_the_text_at_every_draft(where, scheme):
    options = (LONGER | OF_THREE)[scheme] | {"disjoint": "mixture"}
    length = 3 if scheme in OF_THREE else 2
    models = PAIRS["two GPT-2s"]()
    filters = {"penalty": 0.8, "temperature": 1.3}
    error = distribution_error(models, length, options, prompts=PROMPTS[2:], where=where, **filters)
    assert error < EXACT


def test_filters_apply_in_their_order_though_only_some_read_the_text():
    """The others are applied to all positions at once; in another order the target is another."""
    steps = [TopKLogitsWarper(4), partial(penalise, 1.5), TopKLogitsWarper(2)]
    log_distribution = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(0)).log_softmax(
        -1
    )
    texts, drafts = [torch.tensor([0, 1]), torch.tensor([4])], torch.tensor([[2, 3], [0, -1]])

    def one_by_one(steps):
        distributions = log_distribution.clone()
        for row, position in itertools.product(range(2), range(3)):
            ids = torch.cat([texts[row], drafts[row, :position].clamp(min=0)])[None]
            for step in steps:
                distributions[row, position] = step(ids, distributions[row, position][None])[0]
        return distributions.log_softmax(-1)

    actual = filters_for(logits_processor=steps)(log_distribution, texts, drafts)
    torch.testing.assert_close(actual, one_by_one(steps), rtol=0, atol=1e-6)
    assert not torch.allclose(actual, one_by_one(steps[::-1]), atol=1e-3)


@pytest.mark.parametrize("scheme", LONGER | OF_THREE)
def test_a_row_that_ends_inside_a_block_keeps_its_distribution(scheme):
    """Token 1 ends a row: accepted drafts behind it are dropped, and other rows go on."""
    options, length = (LONGER | OF_THREE)[scheme], 3 if scheme in OF_THREE else 2
    models = PAIRS["two GPT-2s"]()
    actual, result = enumerated_distribution(
        models, PROMPTS[1:], length, vocab=VOCAB, eos_token_id=1, **asked(options)
    )
    for row, pair in zip(actual, PROMPTS[1:], strict=True):
        free = expected_distribution(models, pair, length, vocab=VOCAB)
        assert np.abs(row - ended_distribution(free, length, VOCAB, 1)).max() < EXACT
    assert result.lengths.min() == 1


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("scheme", ["plain", "lookup of two", "a third model drafts"])
def test_one_model_under_two_prompts_has_the_token_level_distribution(scheme, together):
    """Whether the two texts are read by two calls or as rows of one."""
    model = PAIRS["two GPT-2s"]()[1]
    options = (SHORT | OF_THREE)[scheme] | {"one_call": together}
    length = 3 if scheme in OF_THREE else 2
    assert distribution_error([model, model], length, options, alpha=0.3) < EXACT
    _, result = enumerated_distribution([model] * 2, PROMPTS, length, vocab=VOCAB, **asked(options))
    called = {call.model for round_ in result.trace.rounds for call in round_.forwards}
    assert ("both" in called) == together


@pytest.mark.parametrize("scheme", SHORT)
def test_padded_output_layers_leave_the_distribution_over_the_shared_part(scheme):
    models = [tiny.llama(1, vocab=5, sharpness=2.0), tiny.gpt2(2, vocab=4, sharpness=0.5)]
    error = distribution_error(models, 2, SHORT[scheme], prompts=PROMPTS[1:])
    assert error < EXACT


def test_the_enumeration_saw_ragged_acceptance_and_both_outcomes():
    _, result = enumerated_distribution(
        PAIRS["Llama and GPT-2"](), PROMPTS, 2, vocab=VOCAB, **SHORT["alternating"]
    )
    first = result.trace.rounds[0]
    assert 0 < first.accepted < first.tested == len(result.tokens)


def one_row_distribution(models, prompts, length, vocab, **options):
    """The distribution of a single row by `every_outcome`, and the schemes that were followed."""
    distribution, followed = np.zeros(vocab**length), set()
    place = vocab ** np.arange(length - 1, -1, -1)

    run = ways_to_decode(*models, *prompts, max_new_tokens=length, **options)
    for result, weight in enumeration.every_outcome(run, (1,)):
        distribution[result.tokens.numpy() @ place] += float(weight)
        followed.add(tuple(r.scheme for r in result.trace.rounds))
    return distribution, followed


@pytest.mark.parametrize("scheme", [name for name in SHORT if name != "coin"])  # see test_coin.py
def test_a_single_row_has_the_token_level_distribution(scheme):
    models, prompts = PAIRS["two GPT-2s"](), PROMPTS[2]
    distribution, _ = one_row_distribution(models, prompts, 2, VOCAB, **asked(SHORT[scheme]))
    expected = expected_distribution(models, prompts, 2, vocab=VOCAB)
    assert np.abs(distribution - expected).max() < EXACT


def test_a_choice_of_scheme_that_rests_on_the_text_leaves_the_distribution_alone(monkeypatch):
    """Plans are switched by what was observed, with proposals outstanding."""
    priors = {"policy": 0.6, "teacher": 0.6, "draft": 0.9}
    monkeypatch.setattr("qstar.decoding.planner.PRIOR", priors)
    monkeypatch.setitem(planner.GUESSES, 1, 0.5)
    monkeypatch.setattr("qstar.decoding.planner.STAY", 0.0)
    without_coins = tuple(name for name in planner.SCHEMES if name != "coin")  # too many branches
    monkeypatch.setattr("qstar.decoding.planner.SCHEMES", without_coins)
    costs = Costs(policy={1: 1.0, 2: 1.35, 3: 1.7}, teacher={1: 1.0, 2: 1.35, 3: 1.7})
    models, prompts = PAIRS["two GPT-2s"](2), tuple(p.clamp(max=1) for p in PROMPTS[1])
    distribution, followed = one_row_distribution(models, prompts, 4, 2, scheme="auto", costs=costs)
    expected = expected_distribution(models, prompts, 4, vocab=2)
    assert np.abs(distribution - expected).max() < EXACT
    assert len(followed) > 3
    assert any(len(set(schemes)) > 1 for schemes in followed)


def test_giving_up_guesses_that_were_wrong_leaves_the_distribution_alone(monkeypatch):
    """Whether anything is looked up rests on which emitted tokens would have been guessed."""
    asked = set()

    class Lookup(planner.Lookup):
        def propose(self, gamma):
            found = super().propose(gamma)
            asked.add((self._find() is not None, bool(found)))
            return found

    monkeypatch.setattr("qstar.decoding.observations.Lookup", Lookup)
    models, prompts = PAIRS["two GPT-2s"](2), tuple(p.clamp(max=1) for p in PROMPTS[1])
    distribution, _ = one_row_distribution(models, prompts, 5, 2, scheme="lookup", gamma=2)
    expected = expected_distribution(models, prompts, 5, vocab=2)
    assert np.abs(distribution - expected).max() < EXACT
    assert {(True, True), (True, False)} <= asked


# Negative controls: one change in the decoder for each mistake seen in public code. The real code
# passes the very same test with an error below 1e-12. A mistake is a wrong rule in place of the
# decoder's own, or a function that puts one into the sampling or the cache.


class WeightsSwapWithTheRoles(Rule):
    def judge(self, state, proposal, log_policy, log_teacher, *beyond):
        if proposal.by == "teacher":
            log_policy, log_teacher = log_teacher, log_policy
        return super().judge(state, proposal, log_policy, log_teacher, *beyond)


class OneRowForAllPositions(Rule):
    def judge(self, state, proposal, *rest):
        first = [known[:, :1].expand_as(known) for known in (proposal.log_draft, *rest[:2])]
        which = PARENTS.index(proposal.by)
        log_p = [first[1 + n] if n == which else rest[n] for n in range(2)]
        return super().judge(state, replace(proposal, log_draft=first[0]), *log_p, *rest[2:])


class CombinedRowAsTheDraftDistribution(Rule):
    def judge(self, state, proposal, log_policy, log_teacher, *beyond):
        log_q, _ = self.mix(log_policy, log_teacher)
        proposal = replace(proposal, log_draft=log_q)
        return super().judge(state, proposal, log_policy, log_teacher, *beyond)


def row_of_the_round_before():
    """After a rollback the drafter's distribution is still that of the draft that was rejected."""

    class RowOfTheRoundBefore(Rule):
        stale = None

        def judge(self, state, proposal, *rest):
            current, size = proposal.log_draft, len(proposal.tokens)
            before, type(self).stale = type(self).stale, current
            if before is not None and len(before) >= size and before.shape[1] == current.shape[1]:
                proposal = replace(proposal, log_draft=before[:size])
            return super().judge(state, proposal, *rest)

    return RowOfTheRoundBefore


class BonusFromTheVerifier(Rule):
    def mix(self, log_policy, log_teacher):
        log_q, known = super().mix(log_policy, log_teacher)
        return torch.cat([log_q[:, :-1], log_teacher[:, -1:]], 1), known


class UnfilteredDraftDistribution(Rule):
    def draw(self, *given):
        token, _, log_parent = super().draw(*given)
        return token, log_parent, log_parent


class BFloat16DraftLaw(Rule):
    def draw(self, *given):
        token, log_draft, log_parent = super().draw(*given)
        return token, log_draft.bfloat16().to(log_draft.dtype), log_parent


def redraw_from_the_target(monkeypatch):
    monkeypatch.setattr(rules, "_log_excess", lambda log_draft, log_target: log_target)


def epsilon_in_the_ratio(monkeypatch):
    def log_acceptance(log_draft, log_target):
        return (log_target - (log_draft.exp() + 1e-6).log()).clamp(max=0)

    monkeypatch.setattr(rules, "log_acceptance", log_acceptance)


def token_zero_is_nothing(monkeypatch):
    real = rules.verify

    def verify(tokens, log_draft, log_target, *, drafted, **options):
        leading = (tokens != 0).long().cumprod(-1).sum(-1)
        drafted = torch.minimum(drafted, leading)
        return real(tokens, log_draft, log_target, drafted=drafted, **options)

    monkeypatch.setattr(rules, "verify", verify)


def one_rejection_crops_every_row(monkeypatch):
    real = kv_cache.KVCache.truncate

    def truncate(self, lengths):
        cut = max(max(0, a - b) for a, b in zip(self.lengths, lengths, strict=True))
        believed = [min(pair) for pair in zip(self.lengths, lengths, strict=True)]
        real(self, [max(1, have - cut) for have in self.lengths])
        self.lengths = believed

    monkeypatch.setattr(kv_cache.KVCache, "truncate", truncate)


def positions_are_slots(monkeypatch):
    """Positions are counted in columns of the cache, as if no row were padded or had holes."""
    real = kv_cache.KVCache._forward

    def forward(self, unread, drafts, counts, width, positions):
        lengths, self.lengths = self.lengths, [self._slots.shape[-1]] * len(unread)
        padded = [[0] * (width - len(tokens)) + list(tokens) for tokens in unread]
        known = [len(tokens) for tokens in unread]
        fresh = self._slots
        distributions = real(self, padded, drafts, counts, width, positions)
        columns = torch.arange(width) >= width - torch.tensor(known)[:, None]
        self._slots[:, fresh.shape[-1] : fresh.shape[-1] + width] &= columns
        self.lengths = [a + b + c for a, b, c in zip(lengths, known, counts, strict=True)]
        return distributions

    monkeypatch.setattr(kv_cache.KVCache, "_forward", forward)


@contextmanager
def everything_visible(models):
    """Every slot of the cache is attended to, whatever the mask says."""

    def show(module, args, kwargs):
        if kwargs.get("attention_mask") is not None:
            kwargs["attention_mask"] = torch.ones_like(kwargs["attention_mask"])
        return args, kwargs

    hooks = [model.register_forward_pre_hook(show, with_kwargs=True) for model in models]
    yield
    for hook in hooks:
        hook.remove()


def zero_rejected_slots(monkeypatch):
    """Keys and values of what is taken back are zeroed; used with `everything_visible`."""
    real = kv_cache.KVCache.truncate

    def truncate(self, lengths):
        before = self._slots
        real(self, lengths)
        gone = (before[:, : self._slots.shape[-1]] & ~self._slots)[:, None, :, None]
        for layer in self._cache.layers if gone.any() else []:
            layer.keys = layer.keys.masked_fill(gone, 0)
            layer.values = layer.values.masked_fill(gone, 0)

    monkeypatch.setattr(kv_cache.KVCache, "truncate", truncate)


TEACHER_DRAFTS = SHORT["the teacher drafts"]
CONTROLS = {  # name -> (the mistake, where it shows, alpha, filters, the least error it makes)
    "1 weights swap": (WeightsSwapWithTheRoles, TEACHER_DRAFTS, 0.3, {}, 1e-2),
    "1 weights swap by turns": (WeightsSwapWithTheRoles, SHORT["alternating"], 0.3, {}, 1e-3),
    "2 one row": (OneRowForAllPositions, LONGER["the policy drafts two"], None, {}, 1e-3),
    "2 combined": (CombinedRowAsTheDraftDistribution, SHORT["alternating"], None, {}, 1e-3),
    "2 stale": (row_of_the_round_before(), TEACHER_DRAFTS, None, {}, 1e-3),
    "3 verifier's bonus": (
        BonusFromTheVerifier,
        OF_THREE["lookup of two"],
        None,
        {},
        1e-3,
    ),
    "4 redraw": (redraw_from_the_target, TEACHER_DRAFTS, None, {}, 1e-3),
    "5 epsilon": (epsilon_in_the_ratio, TEACHER_DRAFTS, None, {}, 1e-9),
    "5 token 0": (token_zero_is_nothing, TEACHER_DRAFTS, None, {}, 1e-3),
    "6 filters": (UnfilteredDraftDistribution, TEACHER_DRAFTS, None, {"temperature": 0.6}, 1e-3),
    "6 top-k": (UnfilteredDraftDistribution, SHORT["alternating"], None, {"top_k": 2}, 1e-3),
    "6 bfloat16": (BFloat16DraftLaw, TEACHER_DRAFTS, None, {}, 1e-5),
    "7 crop": (one_rejection_crops_every_row, OF_THREE["lookup of two"], None, {}, 1e-4),
    "7 positions": (positions_are_slots, SHORT["plain"], None, {}, 1e-3),
}


@pytest.mark.parametrize("name", CONTROLS)
def test_a_known_mistake_changes_the_distribution(name, monkeypatch):
    mistake, scheme, alpha, filters, least = CONTROLS[name]
    models = PAIRS["two GPT-2s"]()
    length = 3 if scheme in OF_THREE.values() else 2
    measured = partial(distribution_error, models, length, scheme, alpha=alpha, **filters)
    assert measured() < EXACT
    if isinstance(mistake, type):
        assert measured(rule=mistake) > least
    else:
        mistake(monkeypatch)
        assert measured() > least


def test_swapped_weights_are_invisible_at_one_half():
    """Why the tests above use alpha = .3 and alpha*, and not only the middle."""
    measured = partial(distribution_error, PAIRS["two GPT-2s"](), 2, TEACHER_DRAFTS, alpha=0.5)
    assert measured(rule=WeightsSwapWithTheRoles) < EXACT


def test_zeroed_slots_are_still_attended_to(monkeypatch):
    """Mistake 9, on prompts of one length, where only rejected drafts are masked."""
    models, prompts = PAIRS["two GPT-2s"](), PROMPTS[2:]
    measured = partial(distribution_error, models, 2, LONGER["alternating twos"], prompts=prompts)
    assert measured() < EXACT
    zero_rejected_slots(monkeypatch)
    assert measured() < EXACT  # masked, it does not matter what they hold
    with everything_visible(models):
        assert measured() > 1e-4


# Sampled.

DRAWS = 2_000
LENGTH = 3
SAMPLED_VOCAB = 4
SAMPLED_PROMPTS = PROMPTS[:2]
SAMPLED = {
    "plain": {"scheme": "plain"},
    **{
        f"the {drafter} drafts {gamma}": {
            "scheme": "one-sided",
            "gamma": gamma,
            "drafter": drafter,
        }
        for drafter, gamma in itertools.product(("policy", "teacher"), (1, 2, 4))
    },
    **{
        f"{scheme} {gamma}": {"scheme": scheme, "gamma": gamma}
        for scheme, gamma in itertools.product(("alternating", "lookup", "draft-model"), (1, 2, 4))
    },
    "auto": {"scheme": "auto", "costs": COSTS},
}
FILTERED = [name for name in SAMPLED if name[-1] not in "14"]
SAMPLED_FILTERS = {"temperature": 0.8, "top_p": 0.9}
UNFILTERED = [  # the tests of longer drafts and of a third's have drafts of two exactly
    *[(name, alpha) for name in SAMPLED if name[-1] not in "12" for alpha in (None, 0.3)],
    *[(name, None) for name in SAMPLED if name[-1] == "1"],
]
NUM_TESTS = len(SAMPLED_PROMPTS) * (len(UNFILTERED) + len(FILTERED)) + 1
FALSE_ALARM = 1e-9 / NUM_TESTS


def pooled_p_value(outcomes, distribution):
    """Of Pearson's chi-squared; outcomes with fewer than 5 expected are one. 0 if impossible."""
    counts = np.bincount(outcomes, minlength=len(distribution))
    expected = len(outcomes) * distribution
    if counts[distribution == 0].any():
        return 0.0
    rare = expected < 5
    pooled = [np.append(values[~rare], values[rare].sum()) for values in (counts, expected)]
    return chisquare(*[values[pooled[1] > 0] for values in pooled]).pvalue


def sampled_p_values(models, scheme, *, seed=0, alpha=None, mistaken=None, draws=DRAWS, **filters):
    """Of the joint outcomes of three tokens, for each prompt; their rows share one ragged batch."""
    ids = [[pair[side] for pair in SAMPLED_PROMPTS for _ in range(draws)] for side in range(2)]
    tokens = generate(
        *models,
        *ids,
        max_new_tokens=LENGTH,
        generator=seed,
        eos_token_id=None,
        alpha=alpha if mistaken is None else mistaken,
        **asked(scheme, SAMPLED_VOCAB),
        **filters,
    ).tokens
    place = SAMPLED_VOCAB ** torch.arange(LENGTH - 1, -1, -1)
    outcomes = (tokens * place).sum(-1).reshape(len(SAMPLED_PROMPTS), draws).numpy()
    wanted = wanted_distributions(alpha, tuple(filters.items()))
    return [pooled_p_value(*pair) for pair in zip(outcomes, wanted, strict=True)]


def sampled_models():
    """Far enough from alpha* = 1/2 that half in its place is caught: 723 of noncentrality."""
    return [
        tiny.llama(3, vocab=SAMPLED_VOCAB, sharpness=1.5),
        tiny.gpt2(2, vocab=SAMPLED_VOCAB, sharpness=0.4),
    ]


@cache
def wanted_distributions(alpha, filters):
    """Of the sampled pair, by the reference: no change in the decoder reaches them."""
    models = sampled_models()
    return [
        expected_distribution(
            models, pair, LENGTH, vocab=SAMPLED_VOCAB, alpha=alpha, **dict(filters)
        )
        for pair in SAMPLED_PROMPTS
    ]


@pytest.fixture(scope="module")
def sampled_pair():
    return sampled_models()


def test_the_sampling_tests_see_a_total_variation_of_16_percent():
    """Of the pooled outcomes, with probability .999, at a family-wise false-alarm rate of 1e-9."""
    assert pytest.approx(1e-9) == FALSE_ALARM * NUM_TESTS
    cells = SAMPLED_VOCAB**LENGTH
    seen = smallest_detectable_tv(DRAWS, cells, false_alarm=FALSE_ALARM, power=0.999)
    assert 0.10 < seen < 0.16


@pytest.mark.parametrize(("scheme", "alpha"), UNFILTERED)
def test_three_sampled_tokens_follow_the_token_level_distribution(sampled_pair, scheme, alpha):
    assert min(sampled_p_values(sampled_pair, SAMPLED[scheme], alpha=alpha)) > FALSE_ALARM


@pytest.mark.parametrize("scheme", FILTERED)
def test_three_filtered_tokens_follow_the_token_level_distribution(sampled_pair, scheme):
    p_values = sampled_p_values(sampled_pair, SAMPLED[scheme], **SAMPLED_FILTERS)
    assert min(p_values) > FALSE_ALARM


def test_a_generator_reseeded_while_drafts_are_judged_is_caught(sampled_pair, monkeypatch):
    """Mistake 5, which no enumeration of choices can see."""

    def reseeded(self, log_probability):
        return chance.Coins(torch.Generator().manual_seed(0)).keep(log_probability)

    monkeypatch.setattr(chance.RowCoins, "keep", reseeded)
    assert min(sampled_p_values(sampled_pair, SAMPLED["the teacher drafts 1"])) < FALSE_ALARM


@pytest.mark.parametrize("mistake", [redraw_from_the_target, token_zero_is_nothing])
def test_sampling_catches_what_enumeration_does(sampled_pair, mistake, monkeypatch):
    mistake(monkeypatch)
    assert min(sampled_p_values(sampled_pair, SAMPLED["the teacher drafts 1"])) < FALSE_ALARM


def test_half_in_place_of_alpha_star_is_caught(sampled_pair):
    draws = 2 * DRAWS
    p_values = sampled_p_values(sampled_pair, SAMPLED["plain"], draws=draws, mistaken=0.5)
    assert min(p_values) < FALSE_ALARM


def test_many_seeds_of_a_single_row_follow_the_token_level_distribution():
    models, prompts = PAIRS["two GPT-2s"](), PROMPTS[0]
    generator = torch.Generator().manual_seed(1)
    run = ways_to_decode(
        *models, *prompts, max_new_tokens=2, alpha=0.3, **LONGER["alternating twos"]
    )
    outcomes = []
    for _ in range(300):
        tokens = run(chance.RowCoins.of(generator, 1)).tokens
        outcomes.append(int(tokens[0]) * VOCAB + int(tokens[1]))
    distribution = expected_distribution(models, prompts, 2, vocab=VOCAB, alpha=0.3)
    assert pooled_p_value(np.array(outcomes), distribution) > FALSE_ALARM
