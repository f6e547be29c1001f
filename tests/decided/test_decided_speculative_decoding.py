"""Speculative decoding: each verdict, had counts, times or distributions come out otherwise."""

import dataclasses

import pytest
from counterfactuals import Case, Changed, decide, lacking

NOTEBOOK, FEWER = "speculative_decoding", {"tiny_runs": 2}


def turns(*medians):
    """The recorded ratios to plain decoding, with these wherever we draft, cell by cell.

    The cells are those at temperature one; no verdict rests on the last one. The fine-tunes have
    the first one's.
    """

    def change(ratios):
        return ratios | {
            name: {
                way: found
                if way.startswith(("plain", "transformers"))
                else (median, median - 0.02, median + 0.02, median)
                for way, found in ways.items()
            }
            for (name, ways), median in zip(list(ratios.items())[:-1], medians, strict=True)
        }

    return {"ratios": Changed(change), "tuned": medians[:1] * 3}


def forwards(**by_way):
    """The recorded counts, with so many forwards a token."""

    def change(counted):
        return counted | {
            (name := way.replace("_", " ")): dataclasses.replace(
                counted[name], forwards=round(a_token * counted[name].tokens)
            )
            for way, a_token in by_way.items()
        }

    return {"counted": Changed(change)}


def live(name, a_token):
    """The counts on tiny pairs, with so many forwards a token."""
    return {"live": Changed(lambda found: found | {name: (found[name][0], a_token)})}


def with_law_off_by(gap):
    """Output distributions so far from the target's, in the smallest case of each kind."""
    gaps = {("draft model 1", alpha): gap for alpha in (None, 0.3)}
    return {"law_gap": gaps, "worst_law": gap, "controls": {"parents exchanged": 0.1}}


EXACT, INEXACT = with_law_off_by(1e-15), with_law_off_by(0.01)
ALL_FASTER = turns(1.9, 1.5, 1.5, 1.5)
NONE_FASTER = turns(0.9, 0.9, 0.9, 0.9)
SOME_FASTER = turns(1.2, 0.8, 1.7, 1.1)
IN_RANGE = turns(1.5, 1.45, 1.55, 1.6)
BEYOND = turns(2.0, 1.8, 1.7, 1.3)
BOTH = "one-sided 2", "one-sided 2, unlike"

OTHERWISE = (
    Case("faster-with-guarantees", "confirmed", ALL_FASTER, "every cell faster"),
    Case("faster-with-guarantees", "refuted", NONE_FASTER, "no cell faster"),
    Case("faster-with-guarantees", "refuted", INEXACT | ALL_FASTER, "another distribution"),
    Case("faster-with-guarantees", "qualified", SOME_FASTER, "other cells faster"),
    Case("policy-drafts-q-verifies", "confirmed", live(BOTH[1], 1.8), "gains on unlike pairs"),
    Case("policy-drafts-q-verifies", "refuted", live(BOTH[0], 2.1), "no gains on alike pairs"),
    Case("policy-drafts-q-verifies", "refuted", INEXACT, "another distribution"),
    Case("policy-drafts-q-verifies", "qualified", live(BOTH[0], 1.9), "smaller gains"),
    Case("expected-speedup", "confirmed", IN_RANGE, "ratios in the range"),
    Case("expected-speedup", "refuted", BEYOND, "ratios beyond it"),
    Case("expected-speedup", "qualified", turns(1.5, 1.0, 1.0, 1.0), "one ratio in the range"),
    Case("conclusion-speedup", "confirmed", IN_RANGE, "ratios in the range"),
    Case("conclusion-speedup", "refuted", INEXACT | IN_RANGE, "another distribution"),
    Case("conclusion-speedup", "refuted", BEYOND, "ratios beyond the range"),
    Case("conclusion-speedup", "qualified", turns(1.5, 1.0, 1.0, 1.0), "one ratio in the range"),
    Case("implementable", "confirmed", ALL_FASTER, "every cell faster than one call, too"),
    Case("implementable", "refuted", INEXACT, "another distribution"),
    Case(
        "implementable",
        "refuted",
        NONE_FASTER | forwards(alternating_1=2.2),
        "more forwards, and no cell faster",
    ),
    Case("implementable", "qualified", NONE_FASTER, "fewer forwards, and no cell faster"),
    Case("scenario-speed", "confirmed", ALL_FASTER, "every cell faster than one call, too"),
    Case("scenario-speed", "refuted", NONE_FASTER, "no cell faster"),
    Case("scenario-speed", "qualified", turns(1.9, 0.9, 0.9, 0.9), "the real pair alone faster"),
    Case("kv-cache-reuse", "confirmed", {"columns_read": 120}, "more positions read"),
    Case("kv-cache-reuse", "qualified", {"columns_read": 600}, "whole texts read again"),
    Case("kv-cache-reuse", "refuted", {"cache_gap": 1e-3}, "a cache that changes distributions"),
    Case("batched-candidates", "confirmed", forwards(plain=1.5), "savings at one position"),
    Case("batched-candidates", "refuted", forwards(alternating_1=2.1), "no savings by blocks"),
    Case("batched-candidates", "qualified", forwards(alternating_1=1.6), "smaller savings"),
)
CASES = [
    case if case.claim == "kv-cache-reuse" else dataclasses.replace(case, data=EXACT | case.data)
    for case in OTHERWISE
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_verdict_follows_the_data(case):
    assert decide(NOTEBOOK, case, CASES, FEWER) == case.verdict, case.why


def test_every_verdict_of_the_chapter_could_have_come_out_otherwise():
    assert lacking(NOTEBOOK, CASES) == []
