"""Sequences: had the data come out otherwise, the verdicts would be other ones."""

from dataclasses import replace

import numpy as np
import pytest
from counterfactuals import Case, Changed, decide, lacking
from scipy.special import log_softmax

from qstar.theory.sequences import SequenceLaw

NOTEBOOK, FEWER = "10_sequences", {"trials": 3}

EVEN = np.log([0.5, 0.5])


def as_whole(garden):
    """As if the two means were one: the sequence-level law is the token-level one."""
    return {s: (token, replace(whole, law=token.law)) for s, (token, whole) in garden.items()}


def as_drawn(garden):
    """As if a decoder drew from the sequence-level law."""
    return {s: (replace(token, law=whole.law), whole) for s, (token, whole) in garden.items()}


OTHER = SequenceLaw((EVEN, np.stack([log_softmax([3.0, -3.0]), EVEN])))

CASES = (
    Case(
        "every-token-depends-on-all-before",
        "confirmed",
        {"moved_law": Changed(lambda rows: [0.5 * row for row in rows])},
        "smaller moves",
    ),
    Case(
        "every-token-depends-on-all-before",
        "qualified",
        {"moved_alpha": Changed(lambda row: 0 * row)},
        "laws that move at one alpha*",
    ),
    Case(
        "every-token-depends-on-all-before",
        "refuted",
        {
            "moved_law": Changed(lambda rows: [0 * row for row in rows]),
            "moved_alpha": Changed(lambda row: 0 * row),
        },
        "a law that never moves",
    ),
    Case("sequence-formula", "qualified", {"garden": Changed(dict)}, "the same once more"),
    Case("sequence-formula", "confirmed", {"garden": Changed(as_whole)}, "two means that are one"),
    Case("sequence-formula", "refuted", {"garden": Changed(as_drawn)}, "another next-token law"),
    Case("token-level", "qualified", {"garden": Changed(dict)}, "the same once more"),
    Case("token-level", "confirmed", {"garden": Changed(as_whole)}, "two means that are one"),
    Case("token-level", "refuted", {"drawn_law": OTHER}, "a rule that draws something else"),
)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_verdict_follows_the_data(case):
    assert decide(NOTEBOOK, case, FEWER) == case.verdict, case.why


def test_every_verdict_of_the_chapter_could_have_come_out_otherwise():
    assert lacking(NOTEBOOK, CASES) == []
