"""The planner picks what the cost formulas say; the lookup finds what a slow search finds."""

import numpy as np
import pytest
import tiny
import torch

from qstar.decoding import costs as cost
from qstar.decoding import planner as schemes
from qstar.decoding.costs import Costs
from qstar.decoding.generate import generate
from qstar.decoding.planner import (
    COIN_GAMMA,
    GAMMAS,
    GUESSES,
    PRIOR,
    Evidence,
    Lookup,
    Plan,
    Planner,
    observe,
)

FLAT = {1: 1.0, 9: 1.0}  # a forward takes the same at every width
STEEP = {1: 1.0, 2: 3.0, 9: 17.0}


def evidence(*, remaining=100, lookups=(), outstanding=False, **accept):
    """Evidence of a long text: acceptance probabilities by drafter, the rest as if unobserved."""
    observed = {name: (1e6 * value, 1e6) for name, value in accept.items()}
    return Evidence(observed, remaining, lookups, outstanding)


def planned(costs, seen, **wishes):
    return Planner(**{"scheme": "auto", "costs": costs} | wishes).plan(seen)


# Which scheme.


def test_plain_is_chosen_where_wide_forwards_are_dear():
    seen = evidence(policy=0.95, teacher=0.95, lookups=[0.9])
    assert planned(Costs(STEEP, STEEP), seen).scheme == "plain"


def test_the_coin_is_chosen_where_wide_forwards_are_cheap_and_the_mixture_is_kept():
    plan = planned(Costs(FLAT, FLAT), evidence(policy=0.8, teacher=0.8, coin=0.92))
    assert (plan.scheme, plan.gamma, plan.stay) == ("coin", COIN_GAMMA, (0.5, 0.5))
    plan = planned(Costs(FLAT, FLAT), evidence(policy=0.8, teacher=0.8, coin=0.85))
    assert (plan.scheme, plan.gamma, plan.stay) == ("alternating", 1, None)
    seen = evidence(policy=0.8, teacher=0.8, coin=0.92)
    assert planned(Costs(FLAT, FLAT), seen, blocks=True).scheme == "alternating"


def test_the_cheaper_parent_proposes_more_often():
    cheap, seen = {1: 0.4, 9: 0.4}, evidence(policy=0.8, teacher=0.8, coin=0.92)
    wish = {"scheme": "coin"}
    assert planned(Costs(cheap, FLAT), seen, **wish).stay == (0.75, 0.25)
    assert planned(Costs(FLAT, cheap), seen, **wish).stay == (0.25, 0.75)
    assert planned(Costs(FLAT, FLAT), seen, stay=0.3, **wish).stay == (0.3, 0.3)


def test_a_cheap_parent_drafts_for_a_dear_one():
    cheap = {1: 0.05, 9: 0.05}
    plan = planned(Costs(cheap, FLAT), evidence(policy=0.9, teacher=0.9))
    assert (plan.scheme, plan.drafter) == ("one-sided", "policy")
    assert plan.gamma > 3
    plan = planned(Costs(FLAT, cheap), evidence(policy=0.9, teacher=0.9))
    assert (plan.scheme, plan.drafter) == ("one-sided", "teacher")


def test_lookup_is_chosen_where_its_matches_are_right():
    seen = evidence(policy=0.8, teacher=0.8, lookups=[0.9])
    plan = planned(Costs(FLAT, FLAT), seen)
    assert (plan.scheme, plan.gamma) == ("lookup", max(GAMMAS))
    without = evidence(policy=0.8, teacher=0.8, lookups=[0.0])
    assert planned(Costs(FLAT, FLAT), without).scheme == "coin"
    wrong = evidence(policy=0.8, teacher=0.8, lookups=[0.1])
    assert planned(Costs(FLAT, FLAT), wrong).scheme == "coin"


def test_a_draft_model_is_chosen_where_it_is_good_and_cheap():
    costs = Costs(FLAT, FLAT, draft={1: 0.05})
    good = evidence(policy=0.8, teacher=0.8, draft=0.9)
    assert planned(costs, good, has_draft=True).scheme == "draft-model"
    assert planned(costs, good).scheme != "draft-model"
    bad = evidence(policy=0.8, teacher=0.8, draft=0.2)
    assert planned(costs, bad, has_draft=True).scheme != "draft-model"
    dear = Costs(FLAT, FLAT, draft={1: 1.0})
    assert planned(dear, good, has_draft=True).scheme != "draft-model"


def formulas(costs, seen, *, has_draft, batch):
    """Seconds per token of every plan that is open, straight from `qstar.decoding.costs`."""
    accept = {name: seen.acceptance(name) for name in PRIOR}
    found = {("plain", 0): cost.plain(costs)}
    for gamma in GAMMAS:
        used = max(1, min(gamma, seen.remaining))
        third = max(1, min(gamma, seen.remaining - 1))
        for drafter in cost.PARENTS:
            key = "one-sided", used, drafter
            found[key] = cost.one_sided(costs, drafter, used, accept[drafter])
        pair = accept["policy"], accept["teacher"]
        found["alternating", used] = cost.alternating(costs, used, *pair, best_proposes=batch == 1)
        if batch == 1:
            triple = *pair, accept["coin"]
            found["coin", COIN_GAMMA] = min(
                cost.coin(costs, COIN_GAMMA, stay, *triple) for stay in schemes.STAYS
            )
        if any(seen.lookups):
            rates = [1 / cost.third(costs, third, a, draft_forwards=0) for a in seen.lookups]
            found["lookup", third] = 1 / np.mean(rates)
        if has_draft:
            found["draft-model", third] = cost.third(
                costs, third, accept["draft"], draft_forwards=third
            )
    return found


def assert_is_the_cheapest(seed):
    rng = np.random.default_rng(seed)

    def times(scale):
        grown = np.cumprod([1.0, *rng.uniform(1.0, 1.8, size=3)])
        return dict(zip((1, 2, 4, 9), scale * grown, strict=True))

    costs = Costs(times(1.0), times(rng.uniform(0.1, 2)), draft=times(rng.uniform(0.02, 0.5)))
    seen = evidence(
        remaining=int(rng.integers(1, 12)),
        lookups=(rng.uniform(size=3) * rng.integers(0, 2, size=3)).tolist()[: rng.integers(4)],
        **{name: rng.uniform() for name in PRIOR if rng.uniform() < 0.8},
    )
    has_draft, batch = bool(rng.integers(2)), int(rng.integers(1, 3))
    planner = Planner(scheme="auto", costs=costs, has_draft=has_draft, batch=batch)
    plan = planner.plan(seen)
    open_plans = formulas(costs, seen, has_draft=has_draft, batch=batch)
    best = min(open_plans.values())
    assert planner.predict(plan, seen) == pytest.approx(best, rel=1e-12)
    key = (plan.scheme, plan.gamma)
    chosen = open_plans[(*key, plan.drafter) if plan.scheme == "one-sided" else key]
    assert chosen == pytest.approx(best, rel=1e-12)
    assert best <= open_plans["plain", 0]


def test_the_plan_is_the_cheapest_of_all_that_are_open():
    for seed in range(200):
        assert_is_the_cheapest(seed)


# What is left open.


def test_a_wish_is_followed_whatever_it_costs():
    costs = Costs(STEEP, STEEP, draft={1: 1.0})
    seen = evidence(policy=0.1, teacher=0.2, draft=0.1, lookups=[0.1])
    for scheme in ("alternating", "lookup"):
        plan = planned(costs, seen, scheme=scheme, gamma=4)
        assert (plan.scheme, plan.gamma) == (scheme, 4)
    plan = planned(costs, seen, scheme="draft-model", gamma=4, has_draft=True)
    assert (plan.scheme, plan.gamma) == ("draft-model", 4)
    plan = planned(costs, seen, scheme="one-sided", gamma=4, drafter="policy")
    assert plan == Plan("one-sided", 4, "policy")
    assert planned(costs, seen, scheme="one-sided", gamma=4).drafter == "teacher"
    assert planned(costs, seen, scheme="plain") == Plan("plain", 0, "policy")


def test_a_free_draft_length_grows_with_acceptance():
    costs = Costs({1: 0.2, 9: 0.3}, {1: 1.0, 9: 1.3})
    gammas = [
        planned(costs, evidence(policy=a), scheme="one-sided", drafter="policy").gamma
        for a in (0.1, 0.5, 0.8, 0.95)
    ]
    assert gammas == sorted(gammas)
    assert gammas[0] == 1
    assert gammas[-1] > 4


@pytest.mark.parametrize("remaining", [1, 2, 3, 5])
def test_no_more_is_drafted_than_can_be_used(remaining):
    costs = Costs({1: 0.01, 9: 0.01}, FLAT, draft={1: 0.001})
    seen = evidence(remaining=remaining, policy=1.0, teacher=1.0, draft=1.0)
    wishes = {"scheme": "one-sided", "gamma": 8}
    assert planned(costs, seen, **wishes).gamma == remaining
    wishes = {"scheme": "draft-model", "gamma": 8, "has_draft": True}
    assert planned(costs, seen, **wishes).gamma == max(1, remaining - 1)


def test_the_better_parent_proposes_after_a_rejection():
    for accepts, better in (((0.9, 0.5), "policy"), ((0.5, 0.9), "teacher")):
        seen = evidence(policy=accepts[0], teacher=accepts[1])
        plan = planned(Costs(FLAT, FLAT), seen, scheme="alternating", gamma=1)
        assert plan.drafter == better


# Proposals that wait.


def test_outstanding_proposals_are_given_up_for_a_gain_above_a_threshold():
    planner = Planner(scheme="auto", costs=Costs(FLAT, FLAT))

    def at(accept):
        seen = {"policy": 0.8, "teacher": 0.8, "coin": 0.85}  # no use for a coin
        return [evidence(**seen, lookups=[accept], outstanding=w) for w in (False, True)]

    turns = planner.predict(Plan("alternating", 1, "policy"), at(0.5)[0])
    for accept in np.linspace(0.3, 0.9, 121):
        free, bound = at(accept)
        gain = turns / min(planner.predict(Plan("lookup", g, "policy"), free) for g in GAMMAS) - 1
        if abs(gain) > 1e-9:
            assert (planner.plan(free).scheme == "lookup") == (gain > 0)
        if abs(gain - schemes.STAY) > 1e-9:
            assert (planner.plan(bound).scheme == "lookup") == (gain > schemes.STAY)


# What is observed.


def test_acceptance_starts_at_the_prior_and_goes_to_what_is_seen():
    observed = {}
    assert Evidence(observed, 1, (), False).acceptance("policy") == PRIOR["policy"]
    for _ in range(400):
        observe(observed, "policy", 0.3, 1)
    assert Evidence(observed, 1, (), False).acceptance("policy") == pytest.approx(0.3, abs=0.03)
    assert Evidence(observed, 1, (), False).acceptance("teacher") == PRIOR["teacher"]


def test_old_observations_fade():
    observed = {}
    observe(observed, "policy", 200.0, 200)
    for _ in range(200):
        observe(observed, "policy", 0.0, 1)
    assert Evidence(observed, 1, (), False).acceptance("policy") < 0.1
    assert observed["policy"][1] < 1 / (1 - schemes.MEMORY) + 1e-9 + 200 * schemes.MEMORY**200


def test_nothing_observed_changes_nothing():
    observed = {"lookup": (3.0, 5.0)}
    observe(observed, "lookup", 0, 0)
    assert observed == {"lookup": (3.0, 5.0)}


# The decoder follows.


@pytest.mark.parametrize(
    ("costs", "allowed"),
    [(Costs(STEEP, STEEP), {"plain"}), (Costs(FLAT, FLAT), {"coin", "alternating", "lookup"})],
)
def test_auto_decodes_by_what_it_was_told(costs, allowed):
    pair = tiny.llama(1, sharpness=0.3, vocab=40), tiny.llama(2, sharpness=0.3, vocab=40)
    trace = generate(
        *pair,
        torch.tensor([1, 4, 0]),
        max_new_tokens=30,
        scheme="auto",
        costs=costs,
        generator=0,
    ).trace
    assert {round_.scheme for round_ in trace.rounds} <= allowed
    assert trace.costs == costs


def test_auto_goes_over_to_lookups_once_the_text_repeats_itself():
    """A model of very sharp distributions under greedy decoding falls into a loop."""
    pair = tiny.llama(1, sharpness=3.0), tiny.llama(2, sharpness=3.0)
    trace = generate(
        *pair,
        torch.tensor([1, 4, 0]),
        max_new_tokens=50,
        scheme="auto",
        costs=Costs(FLAT, FLAT),
        greedy=True,
    ).trace
    followed = [round_.scheme for round_ in trace.rounds]
    assert followed[0] != "lookup"
    assert followed[-1] == "lookup"
    assert max(round_.emitted for round_ in trace.rounds if round_.scheme == "lookup") > 2


# The lookup.


def slow_search(text, sizes=GUESSES):
    """(size, place) of the last three tokens where they last stood, else of two, else of one."""
    for size in sizes:
        for start in range(len(text) - size - 1, -1, -1):
            if text[start : start + size] == text[-size:]:
                return size, start + size
    return None, None


def assert_finds_what_a_slow_search_finds(seed):
    rng = np.random.default_rng(seed)
    letters = int(rng.integers(1, 6))
    text = rng.integers(0, letters, size=int(rng.integers(0, 9))).tolist()
    lookup = Lookup(text)
    assert lookup.observed == {}
    guessed = {size: [] for size in GUESSES}
    for _ in range(15):
        gamma = int(rng.integers(1, 9))
        size, place = slow_search(text)
        expected = 0.0
        if place is not None:
            weights = schemes.MEMORY ** np.arange(len(guessed[size]))[::-1]
            expected = (weights @ guessed[size] + 2 * GUESSES[size]) / (weights.sum() + 2)
        proposed = []
        if expected >= schemes.WORTH_A_LOOKUP:
            grown = list(text)
            for i in range(place, place + gamma):
                grown.append(grown[i])
            proposed = grown[len(text) :]
        assert lookup.propose(gamma) == proposed
        assert lookup.expected() == pytest.approx(expected if proposed else 0.0, rel=1e-12)
        for token in rng.integers(0, letters, size=int(rng.integers(0, 4))).tolist():
            size, place = slow_search(text)
            if place is not None:
                guessed[size].append(text[place] == token)
            text.append(token)
            lookup.append([token])
    assert lookup.text == text
    return not proposed and place is not None


def test_a_lookup_finds_what_a_slow_search_finds():
    refused = [assert_finds_what_a_slow_search_finds(seed) for seed in range(60)]
    assert 0 < sum(refused) < 60


def test_a_kind_of_guess_that_is_never_right_is_given_up_and_taken_up_again():
    lookup = Lookup([5])
    for k in range(10, 50):  # after 5 always something new
        lookup.append([k, 5])
    assert lookup.propose(4) == []
    assert lookup.expected() == 0
    for _ in range(20):
        lookup.append([7, 8, 5, 7, 9, 5])  # after 5 nearly always 7
    assert Lookup([5, 7, 5]).expected() == GUESSES[1]
    assert lookup.expected() > 0.5
    assert lookup.propose(1) == [7]
    assert len(Lookup([1, 2, 1], {2: 0.5}).propose(1)) == 0


def test_a_repetition_is_taken_to_go_on():
    assert Lookup([1, 2, 1, 2]).propose(5) == [1, 2, 1, 2, 1]
    assert Lookup([7, 7, 7]).propose(4) == [7, 7, 7, 7]
    assert Lookup([1, 2, 3]).propose(4) == []
