"""What "auto" learns of forward passes, and what its first call costs, on clocks that are made up.

A clock gives each forward pass its seconds by a table, so that what "auto" wins or loses is a sum
of numbers, the same on every machine.
"""

import gc

import numpy as np
import pytest
import tiny
import torch

from qstar.decoding import latency, planner, timing
from qstar.decoding.costs import PARENTS
from qstar.decoding.generate import generate
from qstar.decoding.latency import ASSUMED, RISE, SETTLED, Learned
from qstar.decoding.state import Forward

PROMPT, OTHER = torch.tensor([1, 4, 0]), torch.tensor([2, 2, 5, 1])
FLAT = {1: 1.0, 9: 1.1, 65: 2.0}
STEP = {1: 1.0, 2: 1.8, 3: 2.1, 4: 1.7, 9: 1.8, 65: 3.0}  # a CPU, layers as loaded
LINEAR = {1: 1.0, 2: 1.6, 65: 39.4}
TABLES = {"flat": FLAT, "step": STEP, "linear": LINEAR}
BOTH = 1.2
"""What one call for both parents takes, in calls for one."""


@pytest.fixture
def clock(monkeypatch):
    """Give forward passes the seconds of a table: set by a call, with the price of "both"."""
    told = {"table": FLAT, "both": BOTH}

    def forward(timer):
        table = told["table"]
        spent = float(np.interp(timer.width, list(table), list(table.values())))
        spent *= told["both"] if timer.model == "both" else 1.0
        return Forward(timer.model, timer.width, timer.rows, spent, timer.begins)

    monkeypatch.setattr(timing.Timer, "forward", forward)
    return told.update


def pair(sharpness=0.5):
    return [tiny.llama(seed, sharpness=sharpness, vocab=40) for seed in (1, 2)]


def decoded(models, *prompts, seed=0, **options):
    asked = {"max_new_tokens": 30, "eos_token_id": None, "scheme": "auto", "context_length": 400}
    return generate(*models, *(prompts or [PROMPT]), generator=seed, **asked | options)


def seconds(result):
    """What the forward passes took, those that read a prompt apart."""
    return sum(f.seconds for r in result.trace.rounds for f in r.forwards if not f.begins)


def schemes(result):
    return [r.scheme for r in result.trace.rounds]


def seen(*forwards, rows=1, static=False, alike=False):
    """What is learned from forward passes: (model, width, seconds) each."""
    caches = {name: Cache(static, 2 if alike else len(name)) for name in PARENTS}
    learned = Learned(caches, rows)
    learned.add(Forward(model, width, rows, spent) for model, width, spent in forwards)
    return learned


class Cache:
    def __init__(self, static, size):
        self.static = static
        self.model = torch.nn.Linear(size, size)
        self.model.device = torch.device("cpu")


# What is learned.


def test_nothing_is_known_before_both_parents_were_timed():
    assert seen().costs() is None
    assert seen(("policy", 1, 2.0)).costs() is None
    assert seen(("policy", 2, 2.0), ("teacher", 1, 3.0)).costs() is None
    costs = seen(("policy", 1, 2.0), ("teacher", 1, 3.0)).costs()
    assert (costs.of("policy", 1), costs.of("teacher", 1)) == (2.0, 3.0)
    assert costs.of("policy", 3) == pytest.approx(2.0 * (1 + 2 * RISE))


def test_what_is_seen_of_one_of_two_alike_is_known_of_both():
    """A time that was disturbed is corrected by the other parent's."""
    costs = seen(("policy", 1, 9.0), ("teacher", 1, 2.0), ("policy", 2, 2.4), alike=True).costs()
    assert costs.of("policy", 1) == costs.of("teacher", 1) == 2.0
    assert costs.policy == costs.teacher
    apart = seen(("policy", 1, 9.0), ("teacher", 1, 2.0)).costs()
    assert apart.of("policy", 1) == 9.0
    assert seen(("policy", 1, 5.0), ("teacher", 1, 5.0), alike=True, static=True).costs() is None


def test_a_width_that_was_seen_counts_more_than_what_is_assumed():
    narrow = [("policy", 1, 1.0), ("teacher", 1, 1.0)]
    once = seen(*narrow, ("policy", 2, 1.8)).costs()
    often = seen(*narrow, *[("policy", 2, 1.8)] * 20).costs()
    assumed = 1 + RISE
    assert once.of("policy", 2) == pytest.approx((ASSUMED * assumed + 1.8) / (ASSUMED + 1))
    assert assumed < once.of("policy", 2) < often.of("policy", 2) < 1.8
    assert once.of("teacher", 2) == pytest.approx(assumed)
    # Beyond one wide forward pass the next ones are taken to rise slowly: it told of all.
    assert often.of("policy", 4) - often.of("policy", 2) == pytest.approx(2 * RISE)


def test_a_disturbed_forward_pass_is_forgotten_or_limited():
    narrow = [("policy", 1, 9.0), ("policy", 1, 1.0), ("teacher", 1, 1.0)]
    costs = seen(*narrow, ("policy", 2, 50.0)).costs()
    assert costs.of("policy", 1) == 1.0
    assert costs.of("policy", 2) <= 2.0
    fast = seen(*narrow, ("policy", 2, 0.2)).costs()  # a clock that is no better than that
    assert fast.of("policy", 2) >= 1.0


def test_what_captures_a_width_is_not_its_time():
    """A static cache captures a width when it is first read; in the control that would count."""
    forwards = [(name, width, spent) for spent in (5.0, 1.0) for name in PARENTS for width in (1,)]
    assert seen(*forwards[:2], static=True).costs() is None
    assert seen(*forwards, static=True).costs().of("policy", 1) == 1.0
    assert seen(*forwards[:2]).costs().of("policy", 1) == 5.0


def test_forward_passes_of_fewer_rows_are_left_out():
    learned = seen(("policy", 1, 4.0), ("teacher", 1, 4.0), rows=4)
    learned.add([Forward("policy", 1, 2, 1.0), Forward("both", 1, 4, 1.0)])
    assert learned.costs().of("policy", 1) == 4.0
    assert learned.costs().both is None


def test_it_settles():
    learned = seen(*[(name, 1, 2.0) for name in PARENTS] * (SETTLED // 2 - 1))
    assert not learned.settled
    learned.add([Forward(name, 1, 1, 2.0) for name in PARENTS])
    assert learned.settled
    costs = learned.costs()
    learned.add([Forward("policy", 1, 1, 1.0)])
    assert learned.costs() is costs


# What a decode makes of it.


def test_a_seed_is_one_draw_of_auto_once_it_has_settled(clock):
    models = pair()
    decoded(models, max_new_tokens=SETTLED)
    first, again, other = (decoded(models, seed=seed) for seed in (5, 5, 6))
    assert first.trace.costs is again.trace.costs
    assert first.tokens.tolist() == again.tokens.tolist() != other.tokens.tolist()
    latency.forget(models[0])
    elsewhere = decoded(models, seed=5, costs=first.trace.costs)
    assert first.tokens.tolist() == elsewhere.tokens.tolist()


def test_a_call_for_two_tokens_settles_nothing(clock):
    models = pair()
    clock(table=STEP)
    assert decoded(models, max_new_tokens=1).trace.costs is None  # the prompts were read, no more
    short = decoded(models, max_new_tokens=2)
    assert set(schemes(short)) == {"plain"}
    assert short.trace.costs.of("policy", 2) == pytest.approx(1 + RISE)
    longer = decoded(models, max_new_tokens=100)
    assert longer.trace.costs.of("policy", 2) == pytest.approx(STEP[2], abs=0.1)


def test_the_first_call_begins_plainly_and_reads_no_prompt_twice(clock):
    models = pair()
    result = decoded(models)
    assert schemes(result)[:2] == ["plain"] * 2 != schemes(result)[-2:]
    begun = [f.model for r in result.trace.rounds for f in r.forwards if f.begins]
    assert (begun, result.trace.prefill) == (list(PARENTS), ())
    known = decoded(models)
    assert {f.model for r in known.trace.rounds for f in r.forwards} == set(PARENTS)


@pytest.mark.parametrize(("both", "expected"), [(1.2, {"both"}), (1.99, set(PARENTS))])
def test_one_model_compares_one_call_with_two_where_the_text_is_long_enough(clock, both, expected):
    model = pair()[0]
    clock(table=FLAT, both=both)
    readers = lambda result: {f.model for r in result.trace.rounds for f in r.forwards}  # noqa: E731
    short = decoded([model, model], PROMPT, OTHER, max_new_tokens=latency.COMPARED_FROM - 1)
    assert readers(short) == {"both"}
    longer = decoded([model, model], PROMPT, OTHER, max_new_tokens=latency.COMPARED_FROM)
    assert readers(longer) == expected
    assert longer.trace.costs.both[1] == pytest.approx(both)


def test_short_calls_do_not_settle_a_comparison_that_was_never_made(clock, monkeypatch):
    """It is made by the first long call, and by no other."""
    model = pair()[0]
    compared = []
    start = latency.Parents.start
    counted = lambda parents, state: compared.append(state) or start(parents, state)  # noqa: E731
    for _ in range(SETTLED // 4):
        decoded([model, model], PROMPT, OTHER, max_new_tokens=8)
    monkeypatch.setattr(latency.Parents, "start", counted)
    starts = []
    for _ in range(2):
        longer = decoded([model, model], PROMPT, OTHER, max_new_tokens=latency.COMPARED_FROM)
        starts.append(len(compared))
    assert longer.trace.costs.policy[1] == 1.0 != longer.trace.costs.both[1]
    assert starts == [3, 4]  # two readers that are compared, and the one that decodes


def test_a_comparison_leaves_the_caches_as_they_were(clock, monkeypatch):
    """What was read to compare is taken back: the trace is that of a run that compared nothing."""
    monkeypatch.setattr(planner, "CAUTION", 0.0)  # which a run that is told its costs has not
    monkeypatch.setattr(planner, "REPAID", 0.0)
    model = pair()[0]
    asked = {"max_new_tokens": 40, "seed": 5}
    for _ in range(2):  # until every width that it makes is known
        decoded([model, model], PROMPT, OTHER, **asked)
    compared = decoded([model, model], PROMPT, OTHER, **asked)
    told = decoded([model, model], PROMPT, OTHER, costs=compared.trace.costs, **asked)
    assert compared.tokens.tolist() == told.tokens.tolist()
    torch.testing.assert_close(compared.trace.alpha, told.trace.alpha, rtol=0, atol=1e-12)


def test_what_was_learned_of_a_model_that_is_gone_is_not_taken_for_another_s(clock, monkeypatch):
    """A model may get the address of one that was thrown away."""

    class Anywhere(int):
        """Every model at one address."""

    monkeypatch.setattr(latency, "id", lambda model: Anywhere(7), raising=False)
    policy = tiny.llama(1)
    options = {"max_new_tokens": 2, "scheme": "auto", "generator": 0}
    first = generate(policy, tiny.gpt2(4), PROMPT, **options).trace.costs
    gc.collect()
    clock(table={1: 7.0, 9: 8.0})
    second = generate(policy, tiny.gpt2(5), PROMPT, **options).trace.costs
    assert (first.teacher[1], second.teacher[1]) == (1.0, 7.0)


# What a first call gains and loses.


def gain(clock, sharpness, table, length):
    """How many times as fast as plain decoding first calls are: over seeds, prompts not counted."""
    models, spent = pair(sharpness), 0.0
    seeds = range(128 // length)
    clock(table=TABLES[table])
    for seed in seeds:
        latency.forget(models[0])
        spent += seconds(decoded(models, max_new_tokens=length, seed=seed))
    return 2 * TABLES[table][1] * (length - 1) * len(seeds) / spent


@pytest.mark.parametrize("length", [8, 64])
@pytest.mark.parametrize("table", ["step", "linear"])
@pytest.mark.parametrize("sharpness", [0.8, 1.2])
def test_a_first_call_of_auto_is_hardly_slower_than_plain_decoding(clock, sharpness, table, length):
    """Where drafts do not pay: acceptance .6 and .5, where several positions cost more."""
    assert gain(clock, sharpness, table, length) > 0.95


@pytest.mark.parametrize("length", [8, 32])
def test_where_drafts_pay_the_first_call_gains(clock, length):
    assert gain(clock, 0.25, "flat", length) > 1.4


def test_without_caution_short_first_calls_lose_more(clock, monkeypatch):
    monkeypatch.setattr(planner, "CAUTION", 0.0)
    monkeypatch.setattr(planner, "REPAID", 0.0)
    assert gain(clock, 1.2, "step", 8) < 0.94
