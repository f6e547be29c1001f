"""Solving for alpha*: had the recorded times been others, the verdict would be another one."""

import copy

import pytest
from counterfactuals import Case, Changed, decide, lacking

NOTEBOOK, FEWER = "solving_alpha", {"rows": 40}


def with_seconds(**seconds):
    def changed(cells):
        cells = copy.deepcopy(cells)
        for cell in cells:
            cell["seconds"].update(seconds)
        return cells

    return Changed(changed)


CASES = (
    Case(
        "solve-2-3-ms",
        "qualified",
        {"cells": with_seconds(user_brentq=0.0024)},
        "a plain root finder that takes 2.4 ms everywhere",
    ),
    Case(
        "solve-2-3-ms",
        "confirmed",
        {"cells": with_seconds(torch_float32=0.0025)},
        "the fast solver taking 2.5 ms everywhere",
    ),
    Case(
        "solve-2-3-ms",
        "corrected",
        {"cells": with_seconds(torch_float32=0.0001, user_brentq=0.02)},
        "no solver that takes 2 to 3 ms",
    ),
)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_verdict_follows_the_data(case):
    assert decide(NOTEBOOK, case, CASES, FEWER) == case.verdict, case.why


def test_every_verdict_of_the_chapter_could_have_come_out_otherwise():
    assert lacking(NOTEBOOK, CASES) == []
