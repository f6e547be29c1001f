"""One seed, one pair and one call are one draw, whatever the clock and the neighbours say."""

import inspect

import numpy as np
import pytest
import tiny
import torch
from sampling import FALSE_ALARM, p_value

from qstar.adapters import transformers
from qstar.decoding import latency, planner
from qstar.decoding.costs import Costs
from qstar.decoding.generate import generate
from qstar.sampling.chance import NO_TOKEN, Coins, RowCoins
from qstar.sampling.picks import draw_candidates
from qstar.sampling.rules import draw, verify

PROMPT, OTHER, THIRD = torch.tensor([1, 4, 0]), torch.tensor([5, 3, 3, 6, 2]), torch.tensor([2])
CLOCKS = (
    Costs({1: 1.0, 9: 1.0}, {1: 1.0, 9: 1.0}),
    Costs({1: 1.0, 2: 3.0, 9: 17.0}, {1: 1.0, 2: 3.0, 9: 17.0}),
    Costs({1: 0.01}, {1: 1.0}),
)


def pair():
    return tiny.llama(1, sharpness=0.5), tiny.gpt2(4, sharpness=0.5)


def followed(result):
    return {(r.scheme, r.gamma) for r in result.trace.rounds}


# The default.


def test_the_default_does_not_hang_on_the_clock(monkeypatch):
    """Three machines: what was measured on each is never asked for. "auto", the control, asks."""
    asked = []
    learned = latency.learned
    monkeypatch.setattr(latency, "learned", lambda *of: asked.append(of) or learned(*of))
    options = {"max_new_tokens": 12, "generator": 0, "eos_token_id": None}
    result = generate(*pair(), PROMPT, **options)
    assert followed(result) == {("alternating", 1)}
    assert result.trace.costs is None
    assert not asked
    assert generate(*pair(), PROMPT, scheme="auto", **options).trace.costs is not None
    assert len(asked) == 1


@pytest.mark.parametrize("rows", [1, 3])
def test_costs_do_not_move_the_default_between_schemes(rows):
    options = {"max_new_tokens": 12, "generator": 0, "eos_token_id": None}
    for costs in CLOCKS[:2]:
        result = generate(*pair(), PROMPT.expand(rows, -1), costs=costs, **options)
        assert followed(result) == {("alternating", 1)}
        assert result.trace.costs == costs


DEFAULTS = [
    ({}, ("alternating", 1)),
    ({"gamma": 3}, ("alternating", 3)),
    ({"has_draft": True}, ("draft-model", 4)),
    ({"has_draft": True, "gamma": 2}, ("draft-model", 2)),
    ({"in_one_call": True}, ("plain", None)),
    ({"in_one_call": True, "gamma": 2}, ("alternating", 2)),
    ({"in_one_call": True, "has_draft": True}, ("draft-model", 4)),
    ({"plain_only": True}, ("plain", None)),
    ({"plain_only": True, "has_draft": True}, ("plain", None)),
    ({"plain_only": True, "gamma": 2}, ("alternating", 2)),  # which is then refused
    ({"scheme": "auto"}, ("auto", None)),
    ({"scheme": "auto", "plain_only": True}, ("plain", None)),
    ({"scheme": "lookup", "plain_only": True}, ("lookup", None)),  # refused too
    ({"scheme": "one-sided", "in_one_call": True}, ("one-sided", None)),
]


@pytest.mark.parametrize(("wishes", "expected"), DEFAULTS)
def test_the_default_is_fixed_by_the_arguments(wishes, expected):
    wishes = {"scheme": None, "gamma": None} | wishes
    free = {"in_one_call": False, "has_draft": False, "plain_only": False}
    assert planner.asked_for(**free | wishes) == expected


def test_one_model_under_two_prompts_is_read_in_one_call_by_default():
    model = pair()[0]
    options = {"max_new_tokens": 4, "generator": 0, "eos_token_id": None}
    result = generate(model, model, PROMPT, OTHER, **options)
    assert {f.model for r in result.trace.rounds for f in r.forwards} == {"both"}
    turns = generate(model, model, PROMPT, OTHER, one_call=False, **options)
    assert followed(turns) == {("alternating", 1)}
    with pytest.raises(ValueError, match="one_call needs one model"):
        generate(model, model, PROMPT, OTHER, one_call=True, gamma=2, **options)


def test_the_hook_has_the_defaults_of_the_decoder():
    here, there = (
        inspect.signature(function).parameters for function in (generate, transformers.q_star)
    )
    both = ("scheme", "gamma", "alpha", "filtered", "drafter", "draft_model", "disjoint", "vocab")
    for name in (*both, "block_verification", "one_call", "costs", "generator"):
        assert here[name].default == there[name].default, name


@pytest.mark.parametrize("scheme", ["plain", "one-sided", "alternating", "lookup"])
def test_a_named_scheme_invents_no_costs(scheme):
    options = {"max_new_tokens": 3, "generator": 0, "scheme": scheme}
    assert generate(*pair(), PROMPT, **options).trace.costs is None


# Rows.


SAME = {
    "plain": {"scheme": "plain"},
    "one-sided": {"scheme": "one-sided", "gamma": 3, "drafter": "policy"},
    "lookup": {"scheme": "lookup", "gamma": 3},
    "draft-model": {"scheme": "draft-model", "gamma": 3},
    "block": {
        "scheme": "one-sided",
        "gamma": 3,
        "drafter": "teacher",
        "block_verification": True,
    },
}


def options_of(name):
    third = {"draft_model": tiny.llama(9)} if name == "draft-model" else {}
    return SAME[name] | third | {"max_new_tokens": 14}


@pytest.mark.parametrize("name", SAME)
def test_a_row_s_tokens_do_not_hang_on_its_neighbours(name):
    models, options = pair(), options_of(name)
    for seed in range(4):
        alone = generate(*models, PROMPT, generator=seed, eos_token_id=6, **options)
        few = generate(*models, [PROMPT, OTHER], generator=seed, eos_token_id=6, **options)
        prompts = [PROMPT, OTHER, THIRD, PROMPT]
        many = generate(*models, prompts, generator=seed, eos_token_id=6, **options)
        assert few.tokens[0].tolist() == many.tokens[0].tolist() == alone.tokens.tolist()
        assert few.tokens[1].tolist() == many.tokens[1].tolist()
        assert many.tokens[0].tolist() != many.tokens[3].tolist(), "each has its own stream"


def test_rows_that_share_a_generator_would_hang_on_their_neighbours():
    """The control: what a `Coins` is given, all rows draw from."""
    models, options = pair(), options_of("plain") | {"eos_token_id": None}
    differ = []
    for seed in range(4):
        coins = [Coins(torch.Generator().manual_seed(seed)) for _ in range(2)]
        alone = generate(*models, PROMPT, generator=coins[0], **options)
        two = generate(*models, [PROMPT, OTHER], generator=coins[1], **options)
        differ.append(alone.tokens.tolist() != two.tokens[0].tolist())
    assert all(differ)


@pytest.mark.parametrize("scheme", ["plain", "alternating", "lookup"])
def test_one_row_draws_from_the_generator_itself(scheme):
    """As it always did: by `Coins` of the same generator, which ends up in the same state."""
    ours, theirs = (torch.Generator().manual_seed(3) for _ in range(2))
    options = {"max_new_tokens": 12, "scheme": scheme, "eos_token_id": None}
    first = generate(*pair(), PROMPT, generator=ours, **options)
    second = generate(*pair(), PROMPT, generator=Coins(theirs), **options)
    assert first.tokens.tolist() == second.tokens.tolist()
    assert torch.equal(ours.get_state(), theirs.get_state())


def test_a_generator_that_is_used_again_gives_every_row_other_tokens():
    generator = torch.Generator().manual_seed(0)
    options = {"max_new_tokens": 14, "scheme": "plain", "eos_token_id": None}
    prompts = PROMPT.expand(3, -1)
    calls = [generate(*pair(), prompts, generator=generator, **options).tokens for _ in range(2)]
    assert (calls[0] != calls[1]).any(-1).all()


def test_streams_of_rows_are_uniform_and_independent():
    """Of 100 000 rows: every first token, and every pair of first tokens of neighbours."""
    chance = RowCoins.of(torch.Generator().manual_seed(1), 100_000)
    distribution = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    tokens = chance.draw(distribution.log().expand(100_000, -1))
    assert p_value(tokens, distribution.numpy()) > FALSE_ALARM
    pairs = tokens[0::2] * 4 + tokens[1::2]
    assert p_value(pairs, np.outer(distribution, distribution).ravel()) > FALSE_ALARM
    shared = tokens[0::2] * 5  # the control: neighbours that draw one number
    assert p_value(shared, np.outer(distribution, distribution).ravel()) < FALSE_ALARM


def test_numbers_that_a_row_has_no_use_for_are_not_drawn():
    full = RowCoins.of(torch.Generator().manual_seed(0), 3)
    some = RowCoins.of(torch.Generator().manual_seed(0), 3).only([2, 0], coins=[1, 2])
    sure = torch.full((2, 2), -0.7, dtype=torch.float64)
    some.keep(sure)
    row = torch.full((3, 5), np.log(0.2), dtype=torch.float64)
    next_of = some.only([0, 1]).draw(row[:2]).tolist()
    full.only([2]).keep(sure[:1, :1])
    full.only([0]).keep(sure[:1])
    assert full.only([2, 0]).draw(row[:2]).tolist() == next_of


# A token of no mass.


@pytest.mark.parametrize("empty", [-torch.inf, torch.nan])
@pytest.mark.parametrize("rows", [False, True])
def test_an_empty_row_gives_no_token(empty, rows):
    distribution = torch.full((2, 4), empty)
    distribution[0] = torch.tensor([0.25] * 4).log()
    generator = torch.Generator().manual_seed(0)
    chance = RowCoins.of(generator, 2) if rows else generator
    for _ in range(20):
        assert draw(distribution, generator=chance)[1] == NO_TOKEN
        for replacement in (False, True):
            drawn = draw_candidates(distribution, 3, replacement=replacement, generator=chance)
            assert (drawn[1] == NO_TOKEN).all() if not torch.tensor(empty).isnan() else True
    drafted = torch.zeros(2, 0, dtype=torch.long)
    ended = verify(
        drafted, distribution[:, None][:, :0], distribution[:, None], generator=chance, check=False
    )
    assert ended.next_token[1] == NO_TOKEN


# Integers of every type.


@pytest.mark.parametrize("two", [np.int64(2), np.int8(2), torch.tensor(2)])
def test_counts_may_be_of_any_integer_type(two):
    options = {"eos_token_id": None, "generator": two}
    expected = generate(
        *pair(), PROMPT, gamma=2, max_new_tokens=2, top_k=2, vocab=7, eos_token_id=None, generator=2
    )
    found = generate(
        *pair(), PROMPT, gamma=two, max_new_tokens=two, top_k=two, vocab=two + 5, **options
    )
    assert found.tokens.tolist() == expected.tokens.tolist()
    assert found.trace.rounds[0].gamma == 2
    assert type(found.trace.rounds[0].gamma) is int
    ends = np.array([2, 9]), torch.tensor([2, 9]), [two, np.int64(9)], two
    for given in ends:
        assert generate(*pair(), PROMPT, max_new_tokens=3, eos_token_id=given, generator=0)


@pytest.mark.parametrize("wrong", [2.0, 1.5, True, "2", None, 0])
@pytest.mark.parametrize("name", ["max_new_tokens", "gamma", "top_k", "vocab"])
def test_what_is_no_count_is_refused(name, wrong):
    if wrong is None and name != "max_new_tokens":
        return
    with pytest.raises(ValueError, match=f"{name} must be a whole number|vocab is how many"):
        generate(*pair(), PROMPT, **{"max_new_tokens": 3} | {name: wrong})


@pytest.mark.parametrize("wrong", [1.5, "seed", 2**64])
def test_what_is_no_seed_is_refused(wrong):
    with pytest.raises(ValueError, match="generator must be a seed"):
        generate(*pair(), PROMPT, max_new_tokens=3, generator=wrong)


@pytest.mark.parametrize("wrong", [[1.5], 2.5, ["</s>"]])
def test_what_is_no_end_is_refused(wrong):
    with pytest.raises(ValueError, match="eos_token_id must be ids"):
        generate(*pair(), PROMPT, max_new_tokens=3, eos_token_id=wrong)
