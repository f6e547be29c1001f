"""The cost model: closed forms, the numbers published for them, and simulations of the schemes."""

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
ROUNDS = 40_000
ODDS = 1e-9
"""A correct formula fails one simulation by chance with less than this probability."""
ERRORS = 6.2  # standard errors: beyond them lies less than ODDS of a normal law


# --- Simulations: the schemes as they run, on coins ----------------------------------------------


def kept(rng, acceptance, gamma):
    """How many leading drafts of gamma survive."""
    for count in range(gamma):
        if rng.random() >= acceptance:
            return count
    return gamma


def simulate_one_sided(rng, cost, drafter, gamma, acceptance, *, bonus=False):
    verifier = "teacher" if drafter == "policy" else "policy"
    while True:
        seconds = sum(cost.of(drafter, 1) for _ in range(gamma)) + cost.of(verifier, gamma)
        accepted = kept(rng, acceptance, gamma)
        yield seconds + cost.overhead, accepted + (1 if bonus else accepted < gamma)


def simulate_third(rng, cost, gamma, acceptance, draft_forwards):
    while True:
        seconds = sum(cost.of("draft", 1) for _ in range(draft_forwards))
        seconds += cost.of("policy", gamma + 1) + cost.of("teacher", gamma + 1)
        yield seconds + cost.overhead, kept(rng, acceptance, gamma) + 1


def simulate_alternating(rng, cost, gamma, accepts, redrafter):
    """Turn by turn, with caches' lengths: who has read what decides the widths."""
    parents = ("policy", "teacher")
    read = dict.fromkeys(parents, 0)  # tokens of the text, proposals included, that each has read
    emitted = 1  # the prompt's last token is unread by both
    turn, outstanding, fresh = 1, 0, 0
    while True:
        me, other = parents[turn], parents[1 - turn]
        seconds = 0.0
        if outstanding:
            seconds += cost.of(me, emitted + outstanding - read[me]) + cost.overhead
            read[me] = emitted + outstanding
            accepted = kept(rng, accepts[1 - turn], outstanding)
            new = accepted + (accepted < outstanding)
            emitted += new
            if accepted == outstanding:
                proposed = 1  # my own law after the last proposal is at hand
            else:
                read[me] = emitted - 1  # the residual token has been read by nobody
                read[other] = min(read[other], emitted - 1)
                proposed = 0
                fresh = (1 - turn) if redrafter is None else redrafter
        else:
            new, proposed = 0, 0
        if outstanding and proposed == 0 and fresh != turn:
            outstanding, turn = 0, 1 - turn
            yield seconds, new
            continue
        while proposed < gamma:
            seconds += cost.of(me, emitted + proposed - read[me])
            read[me] = emitted + proposed
            proposed += 1
        outstanding, turn = gamma, 1 - turn
        yield seconds, new


def close(steps, expected, *, rounds=ROUNDS, batches=100):
    """Whether simulated seconds per token are within `ERRORS` standard errors of the formula."""
    ratios = []
    for _ in range(batches):
        pairs = [next(steps) for _ in range(rounds // batches)]
        ratios.append((sum(s for s, _ in pairs), sum(t for _, t in pairs)))
    seconds, tokens = (sum(column) for column in zip(*ratios, strict=True))
    mean = seconds / tokens
    spread = sum((s - mean * t) ** 2 for s, t in ratios)
    error = math.sqrt(spread * batches / (batches - 1)) / tokens
    assert error < 0.01 * expected, "the simulation is too short to tell"
    ends = 10 / tokens * expected  # the first round drafts only, the last drafts go unverified
    return abs(mean - expected) <= ERRORS * error + ends


@pytest.mark.parametrize("gamma", [1, 2, 4])
@pytest.mark.parametrize("accepts", ACCEPTANCES)
@pytest.mark.parametrize("cost", [UNIT, UNEVEN], ids=["unit", "uneven"])
@pytest.mark.parametrize("best", [True, False], ids=["best", "strict"])
def test_alternating_costs_what_a_simulation_of_it_takes(gamma, accepts, cost, best):
    expected = costs.alternating(cost, gamma, *accepts, best_proposes=best)
    redrafter = None
    if best:
        redrafter = costs.PARENTS.index(costs.best_proposer(cost, gamma, *accepts))
    steps = simulate_alternating(random.Random(0), cost, gamma, accepts, redrafter)
    assert close(steps, expected)


@pytest.mark.parametrize("gamma", [1, 2, 4])
@pytest.mark.parametrize("acceptance", [0.0, 0.6, 0.95])
@pytest.mark.parametrize("drafter", costs.PARENTS)
def test_one_sided_costs_what_a_simulation_of_it_takes(gamma, acceptance, drafter):
    expected = costs.one_sided(UNEVEN, drafter, gamma, acceptance)
    steps = simulate_one_sided(random.Random(0), UNEVEN, drafter, gamma, acceptance)
    assert close(steps, expected)


@pytest.mark.parametrize("gamma", [1, 2, 4])
@pytest.mark.parametrize("acceptance", [0.0, 0.6, 0.95])
@pytest.mark.parametrize("model", [True, False], ids=["draft-model", "lookup"])
def test_third_drafts_cost_what_a_simulation_of_them_takes(gamma, acceptance, model):
    forwards = gamma if model else 0
    expected = costs.third(UNEVEN, gamma, acceptance, draft_forwards=forwards)
    assert close(simulate_third(random.Random(0), UNEVEN, gamma, acceptance, forwards), expected)


def test_a_simulation_with_another_scheme_is_told_apart():
    """The negative controls: without them the comparisons above might accept anything."""
    bonus = simulate_one_sided(random.Random(0), UNEVEN, "policy", 2, 0.6, bonus=True)
    assert not close(bonus, costs.one_sided(UNEVEN, "policy", 2, 0.6))
    swapped = simulate_one_sided(random.Random(0), UNEVEN, "teacher", 2, 0.6)
    assert not close(swapped, costs.one_sided(UNEVEN, "policy", 2, 0.6))
    strict = simulate_alternating(random.Random(0), UNIT, 1, (0.9, 0.5), None)
    assert not close(strict, costs.alternating(UNIT, 1, 0.9, 0.5))
    wrong_parent = simulate_alternating(random.Random(0), UNEVEN, 1, (0.5, 0.9), None)
    assert not close(wrong_parent, costs.alternating(UNEVEN, 1, 0.9, 0.5, best_proposes=False))


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
        (lambda: costs.third(UNIT, -1, 0.5, draft_forwards=0), "0 or more: got -1"),
        (lambda: costs.third(UNIT, 1, 0.5, draft_forwards=1), "no draft model was measured"),
        (lambda: costs.third(UNIT, 1, 0.5, draft_forwards=-1), "0 or more: got -1"),
        (lambda: costs.forwards_per_token("block"), "plain, one-sided, .*: got 'block'"),
        (lambda: costs.forwards_per_token("lookup", 1, (0.5, 0.5)), "has one drafter"),
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
