"""The KL-symmetry condition: had the data come out otherwise, the verdicts would be other ones."""

from dataclasses import replace

import numpy as np
import pytest
from counterfactuals import Case, Changed, decide, lacking

NOTEBOOK, FEWER = "kl_symmetry", {"trials": 40}

WHOLE = np.log([0.5, 0.3, 0.2]), np.log([0.2, 0.2, 0.6])
LOG_HALF = np.log(0.5)
HALVES = np.array([LOG_HALF, LOG_HALF, -np.inf]), np.array([LOG_HALF, -np.inf, LOG_HALF])
BENT = Changed(lambda row: row + np.array([0.0, 0.1, -0.1]))
POLICY = Changed(lambda balance: replace(balance, alpha=np.array(1.0)))

CASES = (
    Case("product-of-densities", "confirmed", {"policy": [0.5, 0.3, 0.2]}, "another policy"),
    Case(
        "product-of-densities",
        "refuted",
        {"log_q_star": BENT},
        "a q* that is no product",
    ),
    Case("q-star-without-normaliser", "corrected", {"policy": [0.5, 0.3, 0.2]}, "another policy"),
    Case(
        "q-star-without-normaliser",
        "confirmed",
        {"balance": POLICY, "log_q_star": np.log([0.7, 0.2, 0.1])},
        "a product that has mass one",
    ),
    Case(
        "q-star-without-normaliser",
        "refuted",
        {"log_q_star": BENT},
        "a q* that is no product",
    ),
    Case("loop-step-alpha", "qualified", {"smallest_gap": 0.3}, "another gap that never closes"),
    Case("loop-step-alpha", "confirmed", {"smallest_gap": -0.3}, "a gap that changes its sign"),
    Case(
        "loop-step-alpha",
        "refuted",
        {"unique": False},
        "random pairs that balance twice, or nowhere",
    ),
    *(
        case
        for claim in ("alpha-1-is-the-policy", "alpha-0-is-the-teacher")
        for case in (
            Case(claim, "qualified", {"cut_pair": HALVES}, "another pair of partial supports"),
            Case(claim, "confirmed", {"cut_pair": WHOLE}, "supports that agree"),
            Case(
                claim,
                "refuted",
                {"log_policy": HALVES[0], "log_teacher": HALVES[1]},
                "parents that share one outcome",
            ),
        )
    ),
)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_verdict_follows_the_data(case):
    assert decide(NOTEBOOK, case, CASES, FEWER) == case.verdict, case.why


def test_every_verdict_of_the_chapter_could_have_come_out_otherwise():
    assert lacking(NOTEBOOK, CASES) == []
