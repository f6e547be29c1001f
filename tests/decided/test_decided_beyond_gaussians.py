"""Beyond Gaussians: had the data come out otherwise, the verdicts would be other ones."""

import numpy as np
import pytest
from counterfactuals import Case, Changed, decide, lacking

NOTEBOOK, FEWER = "beyond_gaussians", {"trials": 40}

SEEN = {  # as in the book, whose random pairs are more than the forty here
    "tally": np.array([18, 10]),
    "by_parents": {(2, 2): {1, 2, 3}, (1, 1): {1}},
    "opposed": -1.0,
    "most_modes": 1,
}
LAWFUL = {
    "turned": True,
    "tail_broken": 0,
    "cauchy_gap": 0.0,
    "law_gap": 0.0,
    "broken": 0,
    "coin_broken": 0,
}
UNDECIDED, DECIDED = np.array([True, False]), np.array([True, True])


CASES = (
    *(
        Case("direction-non-gaussian", verdict, LAWFUL | data, why)
        for verdict, data, why in (
            ("qualified", {"covered": UNDECIDED}, "a pair that no law decides"),
            ("confirmed", {"covered": DECIDED}, "a law for every pair"),
            ("not measured", {"tail_broken": 1}, "a pair against the tails"),
            ("not measured", {"broken": 1}, "a pair against the mirrored variance"),
            ("not measured", {"coin_broken": 1}, "a pair of coins against the entropy"),
            ("not measured", {"law_gap": 1e-3}, "a family off the curve"),
            ("not measured", {"turned": False}, "another turning point"),
            ("not measured", {"cauchy_gap": 0.01}, "a pair of Cauchys off one half"),
        )
    ),
    *(
        Case("direction-multimodal", verdict, SEEN | data, why)
        for verdict, data, why in (
            ("qualified", {"by_parents": {(2, 2): {2, 3}}}, "other numbers of modes"),
            ("confirmed", {"by_parents": {(2, 2): {3}, (1, 1): {1}}}, "numbers that follow"),
            ("not measured", {"tally": np.array([0, 10])}, "no mode gained at random"),
            ("not measured", {"tally": np.array([18, 0])}, "no mode lost at random"),
            ("not measured", {"opposed": 1.0}, "a mode where both parents rise"),
            ("not measured", {"most_modes": 2}, "two modes of log-concave parents"),
            (
                "not measured",
                {"counts": Changed(lambda counts: counts | {"created": (1, 1, 1)})},
                "a construction that creates none",
            ),
        )
    ),
)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_verdict_follows_the_data(case):
    assert decide(NOTEBOOK, case, CASES, FEWER) == case.verdict, case.why


def test_every_verdict_of_the_chapter_could_have_come_out_otherwise():
    assert lacking(NOTEBOOK, CASES) == []
