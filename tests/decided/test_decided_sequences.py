"""Sequences: had the data come out otherwise, the verdicts would be other ones."""

from dataclasses import replace

import numpy as np
import pytest
from counterfactuals import Case, Changed, decide, lacking
from scipy.special import log_softmax

from qstar.theory.sequences import SequenceDistribution

NOTEBOOK, FEWER = "sequences", {"trials": 3}

EVEN = np.log([0.5, 0.5])


def as_whole(garden):
    """As if the two means were one: the sequence-level law is the token-level one."""
    return {
        s: (token, replace(whole, distribution=token.distribution))
        for s, (token, whole) in garden.items()
    }


def as_drawn(garden):
    """As if a decoder drew from the sequence-level law."""
    return {
        s: (replace(token, distribution=whole.distribution), whole)
        for s, (token, whole) in garden.items()
    }


def moved(law, alpha):
    """By how much the policy's and the teacher's law, and alpha*, move with each earlier token."""
    return {
        "replaced": np.full(8, True),
        "moved_law": [np.full(8, law), np.full(8, law)],
        "moved_alpha": np.full(8, alpha),
    }


OTHER = SequenceDistribution((EVEN, np.stack([log_softmax([3.0, -3.0]), EVEN])))

CASES = (
    Case("every-token-depends-on-all-before", "confirmed", moved(0.01, 0.001), "smaller moves"),
    Case("every-token-depends-on-all-before", "qualified", moved(0.01, 0.0), "the same alpha*"),
    Case("every-token-depends-on-all-before", "refuted", moved(0.0, 0.0), "a law that stays"),
    Case("sequence-formula", "qualified", {"garden": Changed(dict)}, "the same once more"),
    Case("sequence-formula", "confirmed", {"garden": Changed(as_whole)}, "two means that are one"),
    Case("sequence-formula", "refuted", {"garden": Changed(as_drawn)}, "another next-token law"),
    Case("token-level", "qualified", {"garden": Changed(dict)}, "the same once more"),
    Case("token-level", "confirmed", {"garden": Changed(as_whole)}, "two means that are one"),
    Case("token-level", "refuted", {"drawn_law": OTHER}, "a rule that draws something else"),
)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_verdict_follows_the_data(case):
    assert decide(NOTEBOOK, case, CASES, FEWER) == case.verdict, case.why


def test_every_verdict_of_the_chapter_could_have_come_out_otherwise():
    assert lacking(NOTEBOOK, CASES) == []
