"""The cost model: closed forms, their published numbers, and each scheme, followed exactly."""

import math
import random

import numpy as np
import pytest

from qstar.decoding import costs
from qstar.decoding.costs import Costs

UNIT = Costs(policy={1: 1.0}, teacher={1: 1.0})
UNEVEN = Costs(
    policy={1: 1.0, 2: 1.3, 5: 1.5}, teacher={1: 2.0, 2: 2.5, 4: 2.6}, draft={1: 0.2}, overhead=0.1
)
ACCEPTANCES = [(0.9, 0.5), (0.3, 0.8), (0.7, 0.7), (1.0, 0.4), (0.0, 0.6)]


# --- The schemes as they run, followed through every choice of their coins ------------------------
#
# A scheme is a function of a state: (probability, seconds, tokens, next state) of what may happen
# in its next round or turn.


def kept(acceptance, gamma):
    """How many leading drafts of gamma survive, with its probability."""
    chances = [acceptance**count * (1 - acceptance) for count in range(gamma)]
    return enumerate([*chances, acceptance**gamma])


def one_sided(cost, drafter, gamma, acceptance, *, bonus=False):
    verifier = "teacher" if drafter == "policy" else "policy"
    seconds = gamma * cost.of(drafter, 1) + cost.of(verifier, gamma) + cost.overhead

    def step(state):
        for accepted, chance in kept(acceptance, gamma):
            yield chance, seconds, accepted + (1 if bonus else accepted < gamma), state

    return step


def third(cost, gamma, acceptance, draft_forwards):
    verified = cost.of("policy", gamma + 1) + cost.of("teacher", gamma + 1)
    seconds = draft_forwards * cost.of("draft", 1) + verified + cost.overhead

    def step(state):
        for accepted, chance in kept(acceptance, gamma):
            yield chance, seconds, accepted + 1, state

    return step


def alternating(cost, gamma, accepts, redrafter):
    """Turn by turn, with caches' lengths: who has read what decides the widths.

    A state is whose turn it is, the drafts outstanding, and how many tokens of the text each parent
    has not read; fewer than none where it has read drafts, too.
    """
    parents = ("policy", "teacher")

    def propose(turn, unread, seconds, proposed):
        """Draft up to gamma, of which `proposed` are at hand: the seconds, and the next state."""
        unread = list(unread)
        while proposed < gamma:
            seconds += cost.of(parents[turn], unread[turn] + proposed)
            unread[turn] = -proposed
            proposed += 1
        return seconds, (1 - turn, gamma, tuple(unread))

    def step(state):
        turn, outstanding, unread = state
        if not outstanding:
            seconds, after = propose(turn, unread, 0.0, 0)
            yield 1.0, seconds, 0, after
            return
        judged = cost.of(parents[turn], unread[turn] + outstanding) + cost.overhead
        for accepted, chance in kept(accepts[1 - turn], outstanding):
            new = accepted + (accepted < outstanding)
            left = [rows + new for rows in unread]
            if accepted == outstanding:
                left[turn] = 0  # my own distribution after the last proposal is at hand
                seconds, after = propose(turn, left, judged, 1)
                yield chance, seconds, new, after
                continue
            left[turn] = 1  # the residual token has been read by nobody
            left[1 - turn] = max(left[1 - turn], 1)
            fresh = (1 - turn) if redrafter is None else redrafter
            if fresh == turn:
                seconds, after = propose(turn, left, judged, 0)
                yield chance, seconds, new, after
            else:
                yield chance, judged, new, (1 - turn, 0, tuple(left))

    return step


START = 1, 0, (1, 1)
"""The teacher's turn, and the prompt's last token unread by both."""


def seconds_per_token(step, state=START):
    """In the long run, exactly: under the stationary distribution of the states."""
    number, found, waiting = {state: 0}, [], [state]
    while waiting:
        here = waiting.pop()
        for chance, seconds, tokens, after in step(here):
            if chance > 0:
                if after not in number:
                    number[after] = len(number)
                    waiting.append(after)
                found.append((number[here], number[after], chance, seconds, tokens))
    moves = np.zeros((len(number), len(number)))
    spent, emitted = np.zeros(len(number)), np.zeros(len(number))
    for here, after, chance, seconds, tokens in found:
        moves[here, after] += chance
        spent[here] += chance * seconds
        emitted[here] += chance * tokens
    assert np.abs(moves.sum(1) - 1).max() < 1e-12
    balance = np.vstack([moves.T - np.eye(len(number)), np.ones(len(number))])
    often, _, rank, _ = np.linalg.lstsq(balance, np.eye(len(number) + 1)[-1])
    assert rank == len(number), "it ends in one set of states, whatever its coins"
    return often @ spent / (often @ emitted)


EXACTLY = {"rel": 1e-9, "abs": 0}


@pytest.mark.parametrize("gamma", [1, 2, 4])
@pytest.mark.parametrize("accepts", ACCEPTANCES)
@pytest.mark.parametrize("cost", [UNIT, UNEVEN], ids=["unit", "uneven"])
@pytest.mark.parametrize("best", [True, False], ids=["best", "strict"])
def test_alternating_costs_what_its_turns_take(gamma, accepts, cost, best):
    expected = costs.alternating(cost, gamma, *accepts, best_proposes=best)
    redrafter = None
    if best:
        redrafter = costs.PARENTS.index(costs.best_proposer(cost, gamma, *accepts))
    found = seconds_per_token(alternating(cost, gamma, accepts, redrafter))
    assert found == pytest.approx(expected, **EXACTLY)


@pytest.mark.parametrize("gamma", [1, 2, 4])
@pytest.mark.parametrize("acceptance", [0.0, 0.6, 0.95])
@pytest.mark.parametrize("drafter", costs.PARENTS)
def test_one_sided_costs_what_its_rounds_take(gamma, acceptance, drafter):
    expected = costs.one_sided(UNEVEN, drafter, gamma, acceptance)
    found = seconds_per_token(one_sided(UNEVEN, drafter, gamma, acceptance))
    assert found == pytest.approx(expected, **EXACTLY)


@pytest.mark.parametrize("gamma", [1, 2, 4])
@pytest.mark.parametrize("acceptance", [0.0, 0.6, 0.95])
@pytest.mark.parametrize("model", [True, False], ids=["draft-model", "lookup"])
def test_third_drafts_cost_what_their_rounds_take(gamma, acceptance, model):
    forwards = gamma if model else 0
    expected = costs.third(UNEVEN, gamma, acceptance, draft_forwards=forwards)
    found = seconds_per_token(third(UNEVEN, gamma, acceptance, forwards))
    assert found == pytest.approx(expected, **EXACTLY)


def test_another_scheme_is_told_apart():
    """The negative controls: without them the comparisons above might accept anything."""
    honest = costs.one_sided(UNEVEN, "policy", 2, 0.6)
    bonus = seconds_per_token(one_sided(UNEVEN, "policy", 2, 0.6, bonus=True))
    swapped = seconds_per_token(one_sided(UNEVEN, "teacher", 2, 0.6))
    strict = seconds_per_token(alternating(UNIT, 1, (0.9, 0.5), None))
    wrong_parent = seconds_per_token(alternating(UNEVEN, 1, (0.5, 0.9), None))
    for found, expected in (
        (bonus, honest),
        (swapped, honest),
        (strict, costs.alternating(UNIT, 1, 0.9, 0.5)),
        (wrong_parent, costs.alternating(UNEVEN, 1, 0.9, 0.5, best_proposes=False)),
    ):
        assert abs(found - expected) > 0.01 * expected


# --- Closed forms and published numbers ----------------------------------------------------------


@pytest.mark.parametrize("accept", [0.0, 0.3, 0.5, 0.9, 1.0])
def test_alternating_one_by_one_takes_two_minus_a_forwards(accept):
    for best in (True, False):
        taken = costs.forwards_per_token("alternating", 1, accept, best_proposes=best)
        assert taken == pytest.approx(2 - accept, abs=1e-12)


def test_alternating_speeds_up_by_the_published_ratios():
    ratios = [2 / costs.forwards_per_token("alternating", 1, a) for a in (0.5, 0.6, 0.7, 0.8, 0.9)]
    assert ratios == pytest.approx([1.33, 1.43, 1.54, 1.67, 1.82], abs=0.005)


@pytest.mark.parametrize("gamma", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("a", [0.1, 0.6, 0.95])
def test_symmetric_alternating_has_its_closed_form(gamma, a):
    expected = (1 - a) * (gamma + 1 - a**gamma) / (1 - a**gamma)
    assert costs.forwards_per_token("alternating", gamma, a) == pytest.approx(expected, abs=1e-12)


def test_longer_proposals_can_cost_more_than_plain_decoding():
    taken = [costs.forwards_per_token("alternating", gamma, 0.6) for gamma in (1, 2, 4)]
    assert taken == pytest.approx([1.40, 1.65, 2.24], abs=0.005)
    assert taken[2] > costs.forwards_per_token("plain") == 2


@pytest.mark.parametrize("accepts", [(0.9, 0.5), (0.2, 0.8), (0.6, 0.6)])
def test_strict_alternation_averages_acceptances_harmonically(accepts):
    harmonic = 2 / sum(1 / a for a in accepts)
    taken = costs.forwards_per_token("alternating", 1, accepts, best_proposes=False)
    assert taken == pytest.approx(2 - harmonic, abs=1e-12)


def test_unequal_acceptances_cost_the_published_forwards():
    strict = costs.forwards_per_token("alternating", 1, (0.9, 0.5), best_proposes=False)
    best = costs.forwards_per_token("alternating", 1, (0.9, 0.5))
    assert strict == pytest.approx(1.357, abs=0.0005)
    assert best == pytest.approx(1.289, abs=0.0005)
    assert costs.best_proposer(UNIT, 1, 0.9, 0.5) == "policy"
    assert costs.best_proposer(UNIT, 1, 0.5, 0.9) == "teacher"


def test_the_best_proposer_is_never_worse_than_strict_alternation():
    rng = random.Random(0)
    for _ in range(2_000):
        gamma, accepts = rng.randint(1, 8), (rng.random(), rng.random())
        c, t, v = rng.random(), rng.random(), 1 + rng.random()
        cost = Costs({1: c, 9: c * v}, {1: t, 9: t * v}, overhead=rng.random())
        strict = costs.alternating(cost, gamma, *accepts, best_proposes=False)
        assert costs.alternating(cost, gamma, *accepts) <= strict * (1 + 1e-12)


def test_alternating_one_by_one_never_takes_more_forwards_than_plain():
    grid = [i / 20 for i in range(21)]
    taken = [costs.forwards_per_token("alternating", 1, (p, t)) for p in grid for t in grid]
    assert max(taken) <= 2 + 1e-12
    assert min(taken) == 1


def test_width_costs_enter_alternating_as_v2_plus_the_rejections():
    cost = Costs({1: 64.6, 2: 73.3}, {1: 64.6, 2: 73.3})  # milliseconds, measured on a CPU
    ratio = costs.plain(cost) / costs.alternating(cost, 1, 0.89, 0.89)
    assert ratio == pytest.approx(2 / (73.3 / 64.6 + 1 - 0.89), abs=1e-12)
    assert ratio == pytest.approx(1.61, abs=0.005)


@pytest.mark.parametrize("gamma", [1, 2, 4, 7])
def test_one_sided_has_its_closed_form(gamma):
    a, c = 0.7, 0.3
    cost = Costs({1: c}, {1: 1.0})
    ratio = costs.plain(cost) / costs.one_sided(cost, "policy", gamma, a)
    assert ratio == pytest.approx((1 - a**gamma) * (1 + c) / ((1 - a) * (1 + c * gamma)), abs=1e-12)


@pytest.mark.parametrize(("speed_up", "needed"), [(1.4, 0.57), (1.6, 0.75)])
def test_the_source_speed_ups_need_these_acceptances(speed_up, needed):
    assert 2 / costs.forwards_per_token("alternating", 1, needed) == pytest.approx(
        speed_up, abs=0.002
    )


@pytest.mark.parametrize(("speed_up", "needed"), [(1.4, 0.91), (1.6, 0.97)])
def test_one_sided_needs_far_higher_acceptances(speed_up, needed):
    def best(acceptance):
        return max(2 / costs.forwards_per_token("one-sided", g, acceptance) for g in range(1, 60))

    assert best(needed + 0.005) > speed_up > best(needed - 0.01)


@pytest.mark.parametrize("gamma", [1, 4])
def test_third_drafts_have_their_closed_form(gamma):
    a, c_p, c_t, c_d, v = 0.7, 1.0, 0.8, 0.1, 1.3
    cost = Costs({1: c_p, gamma + 1: c_p * v}, {1: c_t, gamma + 1: c_t * v}, draft={1: c_d})
    ratio = costs.plain(cost) / costs.third(cost, gamma, a, draft_forwards=gamma)
    round_s = gamma * c_d + v * (c_p + c_t)
    expected = (c_p + c_t) * (1 - a ** (gamma + 1)) / ((1 - a) * round_s)
    assert ratio == pytest.approx(expected, abs=1e-12)


def test_no_draft_is_plain_decoding():
    assert costs.third(UNEVEN, 0, 0.5, draft_forwards=0) == costs.plain(UNEVEN)


def test_two_is_the_ceiling_of_the_parents_and_not_of_third_drafts():
    for scheme in ("one-sided", "alternating"):
        assert costs.forwards_per_token("plain") / costs.forwards_per_token(scheme, 1, 1.0) <= 2
    assert costs.forwards_per_token("one-sided", 4, 1.0) == pytest.approx(5 / 4)
    assert costs.forwards_per_token("lookup", 4, 1.0) == pytest.approx(2 / 5)
    assert costs.forwards_per_token("draft-model", 4, 1.0) == pytest.approx(2 / 5)


@pytest.mark.parametrize("num_tokens", [1, 2, 7, 50])
def test_alternating_forwards_are_counted_exactly_for_finite_texts(num_tokens):
    rng = random.Random(num_tokens)
    for _ in range(50):
        outcomes = [rng.random() < 0.6 for _ in range(num_tokens)]
        forwards = 1  # somebody proposes the first token
        for place, accepted in enumerate(outcomes):
            forwards += 1  # the other verifies
            last = place == num_tokens - 1
            forwards += 0 if accepted or last else 1  # somebody proposes afresh
        rejections = outcomes[:-1].count(False)
        assert costs.expected_forwards_alternating(num_tokens, rejections) == forwards


# --- Costs ---------------------------------------------------------------------------------------


def test_costs_run_straight_between_measured_widths_and_beyond():
    cost = Costs(policy={5: 3.0, 1: 1.0, 3: 2.5}, teacher={1: 7.0}, draft={1: 2.0, 4: 1.0})
    assert [cost.of("policy", w) for w in (1, 2, 3, 4, 5, 7)] == [1.0, 1.75, 2.5, 2.75, 3.0, 3.5]
    assert cost.of("teacher", 9) == 7.0
    assert cost.of("draft", 2) == pytest.approx(5 / 3)
    assert cost.of("draft", 9) == 1.0  # falling at the end: never below the last


def test_costs_do_not_change_with_the_mapping_that_made_them():
    seconds = {1: 1.0}
    cost = Costs(policy=seconds, teacher=seconds)
    seconds[1] = 9.0
    assert cost.of("policy", 1) == 1.0


def test_overhead_is_paid_once_a_round():
    cost = Costs(policy={1: 1.0}, teacher={1: 1.0}, overhead=0.5)
    assert costs.plain(cost) == 2.5
    assert costs.one_sided(cost, "teacher", 3, 1.0) == pytest.approx((3 + 1 + 0.5) / 3)
    assert costs.alternating(cost, 1, 1.0, 1.0) == pytest.approx(1.5)
    assert costs.third(cost, 3, 1.0, draft_forwards=0) == pytest.approx((2 + 0.5) / 4)


@pytest.mark.parametrize(
    ("scheme", "gamma"), [("one-sided", 3), ("alternating", 1), ("alternating", 3)]
)
def test_a_speed_up_is_that_of_the_counted_forwards(scheme, gamma):
    """The recursion over tokens that are left knows no stationary state."""
    counted = [costs.expected_forwards(scheme, n, gamma, 0.8) for n in (600, 1200)]
    found = costs.expected_speedup(0.8, UNIT, scheme, gamma=gamma)
    assert found == pytest.approx(2 * 600 / (counted[1] - counted[0]), abs=1e-9)


def test_a_speed_up_is_what_the_round_promises_by_hand():
    cost = Costs({1: 1.0, 2: 1.25}, {1: 1.0, 2: 1.25}, draft={1: 0.1})
    found = {name: costs.expected_speedup(0.9, cost, name, gamma=1) for name in costs.SCHEMES}
    assert found["plain"] == 1
    assert found["alternating"] == pytest.approx(2 / (1.25 + 0.1))
    assert found["one-sided"] == pytest.approx(2 / 2)  # one draft, judged by itself
    assert found["lookup"] == pytest.approx(2 * 1.9 / 2.5)
    assert found["draft-model"] == pytest.approx(2 * 1.9 / 2.6)
    patient = costs.expected_speedup(0.9, UNIT, "coin", gamma=60, stay=(0.5, 0.5))
    assert patient == pytest.approx(2 / 1.2)  # `coin`'s limit: 1 + (1 - a) / (1 - s) forwards


def test_a_speed_up_without_a_draft_length_is_that_of_the_best():
    accept = {"policy": 0.9, "teacher": 0.5, "coin": 0.95, "draft": 0.7, "lookup": 0.2}
    for name in costs.SCHEMES[1:]:
        by_length = [
            costs.expected_speedup(accept, UNEVEN, name, gamma=length)
            for length in range(1, costs.LONGEST + 1)
        ]
        assert costs.expected_speedup(accept, UNEVEN, name) == max(by_length)
    turns = costs.plain(UNEVEN) / costs.alternating(UNEVEN, 1, 0.9, 0.5)
    assert costs.expected_speedup(accept, UNEVEN, "alternating", gamma=1) == turns
    tossed = costs.plain(UNEVEN) / costs.coin(UNEVEN, 4, (0.3, 0.6), 0.9, 0.5, 0.95)
    found = costs.expected_speedup(accept, UNEVEN, "coin", gamma=4, stay=(0.3, 0.6))
    assert found == tossed


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Costs({2: 1.0}, {1: 1.0}), r"policy must give .* width 1 at least: got .*\[2\]"),
        (lambda: Costs({1: 1.0}, {1: 1.0, 0: 1.0}), "teacher: a width must be a whole number"),
        (lambda: Costs({1: math.nan}, {1: 1.0}), "policy: width 1 must take seconds.* got nan"),
        (lambda: Costs({1: 1.0}, {1: 1.0}, overhead=-1.0), "overhead must be seconds.* got -1.0"),
        (lambda: UNIT.of("draft", 1), "no draft model was measured"),
        (lambda: UNIT.of("student", 1), "policy, teacher or draft: got 'student'"),
        (lambda: UNIT.of("policy", 0), "width must be a whole number, 1 or more: got 0"),
        (lambda: costs.one_sided(UNIT, "draft", 1, 0.5), "policy or teacher: got 'draft'"),
        (lambda: costs.one_sided(UNIT, "policy", 0, 0.5), "gamma must be .* 1 or more: got 0"),
        (lambda: costs.one_sided(UNIT, "policy", 1, 1.1), r"in \[0, 1\]: got 1.1"),
        (lambda: costs.alternating(UNIT, 0, 0.5, 0.5), "gamma must be .* 1 or more: got 0"),
        (lambda: costs.alternating(UNIT, 1, math.nan, 0.5), r"in \[0, 1\]: got nan"),
        (lambda: costs.coin(UNIT, 2, (0.5, 0.5), 0.5, 0.5, math.nan), r"in \[0, 1\]: got nan"),
        (lambda: costs.coin(UNIT, 2, (0.5, 0.5), 1.2, 0.5, 0.5), r"in \[0, 1\]: got 1.2"),
        (lambda: costs.coin(UNIT, 2, (0.5, 1.0), 0.5, 0.5, 0.5), r"in \[0, 1\): got 1.0"),
        (lambda: costs.third(UNIT, -1, 0.5, draft_forwards=0), "0 or more: got -1"),
        (lambda: costs.third(UNIT, 1, 0.5, draft_forwards=1), "no draft model was measured"),
        (lambda: costs.third(UNIT, 1, 0.5, draft_forwards=-1), "0 or more: got -1"),
        (lambda: costs.forwards_per_token("block"), "plain, one-sided, .*: got 'block'"),
        (lambda: costs.forwards_per_token("lookup", 1, (0.5, 0.5)), "has one drafter"),
        (lambda: costs.expected_speedup(0.9, UNIT, "block"), "plain, one-sided, .*: got 'block'"),
        (lambda: costs.expected_forwards_alternating(3, 3), "got 3 tokens and 3 rejections"),
    ],
)
def test_what_makes_no_sense_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("two", [np.int64(2), np.uint8(2)])
def test_counts_may_be_of_any_integer_type(two):
    cost = Costs({1: 1.0, two: 2.0}, {np.int64(1): 1.0})
    assert cost == Costs({1: 1.0, 2: 2.0}, {1: 1.0})
    assert cost.of("policy", two) == 2.0
    assert costs.one_sided(cost, "policy", two, 0.5) == costs.one_sided(cost, "policy", 2, 0.5)
    assert costs.alternating(cost, two, 0.5, 0.5) == costs.alternating(cost, 2, 0.5, 0.5)
    drafts = (costs.third(cost, n, 0.5, draft_forwards=n - n) for n in (two, 2))
    assert next(drafts) == next(drafts)
    for scheme in ("one-sided", "alternating"):
        found = costs.expected_forwards(scheme, two + two, two, 0.5)
        assert found == costs.expected_forwards(scheme, 4, 2, 0.5)


@pytest.mark.parametrize("wrong", [2.0, 1.5, True, "2", None])
def test_what_is_no_count_is_refused(wrong):
    for call in (
        lambda: costs.one_sided(UNIT, "policy", wrong, 0.5),
        lambda: costs.alternating(UNIT, wrong, 0.5, 0.5),
        lambda: costs.third(UNIT, wrong, 0.5, draft_forwards=0),
        lambda: costs.expected_forwards("plain", wrong),
        lambda: UNIT.of("policy", wrong),
    ):
        with pytest.raises(ValueError, match="must be a whole number"):
            call()
