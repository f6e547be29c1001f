"""High dimension: had the data come out otherwise, the verdicts would be other ones."""

from dataclasses import replace

import numpy as np
import pytest
from counterfactuals import Case, Changed, decide, lacking

NOTEBOOK, FEWER = "high_dimension", {"trials": 40}

HIGH = {"overlap": np.full(100, -1.0), "policy": np.zeros(100), "teacher": np.zeros(100)}
"""Acceptances that do not fall."""


def nearer(curves):
    return curves | {"q*": curves["q*"] * 30}


CASES = (
    Case(
        "high-dimension-same-behaviour",
        "qualified",
        {"log_beta": Changed(lambda rows: {name: 2 * row for name, row in rows.items()})},
        "acceptances that fall faster",
    ),
    Case("high-dimension-same-behaviour", "confirmed", {"log_beta": HIGH}, "lasting acceptances"),
    Case("high-dimension-same-behaviour", "refuted", {"alpha_spread": 0.01}, "a moving exponent"),
    Case("high-dimension-same-behaviour", "refuted", {"growth_gap": 0.01}, "a C not in proportion"),
    Case("high-dimension-overlap", "qualified", {"mass": [-30.0]}, "another vanishing overlap"),
    Case("high-dimension-overlap", "confirmed", {"mass": [-1.0]}, "an overlap that stays"),
    Case("high-dimension-overlap", "refuted", {"curves": Changed(nearer)}, "an overlap elsewhere"),
    Case("small-variance-directions", "qualified", {"slimmer": [0.5, 0.4, 0.3]}, "other exponents"),
    Case(
        "small-variance-directions", "confirmed", {"slimmer": [0.5, 0.55, 0.6]}, "rising exponents"
    ),
    Case(
        "small-variance-directions",
        "refuted",
        {"shares": Changed(lambda shares: 1 - shares)},
        "shares that go to the wider parent",
    ),
    Case(
        "generalises-from-two-dimensions",
        "qualified",
        {"sign_broken": {2: 0, 3: 0, 10: 1}},
        "a sign rule that fails in ten dimensions only",
    ),
    Case(
        "generalises-from-two-dimensions",
        "confirmed",
        {
            "sign_broken": {2: 0, 3: 0, 10: 0},
            "example": Changed(lambda balance: replace(balance, alpha=0.4)),
            "log_beta": HIGH,
        },
        "a sign rule that never fails, and an overlap that stays",
    ),
    Case(
        "generalises-from-two-dimensions",
        "refuted",
        {"margins": Changed(lambda margins: [*margins, -0.1])},
        "a rival that beats q*",
    ),
    Case("generalises-from-two-dimensions", "refuted", {"centre_gap": 0.1}, "other precisions"),
    Case(
        "simplex-dimension", "corrected", {"sizes": (4, 9), "ranks": [3, 8]}, "other vocabularies"
    ),
    Case("simplex-dimension", "confirmed", {"ranks": [2, 3, 50, 400]}, "one dimension more"),
    Case("simplex-dimension", "refuted", {"ranks": [1, 1, 49, 399]}, "one that lacks two"),
)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_verdict_follows_the_data(case):
    assert decide(NOTEBOOK, case, CASES, FEWER) == case.verdict, case.why


def test_every_verdict_of_the_chapter_could_have_come_out_otherwise():
    assert lacking(NOTEBOOK, CASES) == []
