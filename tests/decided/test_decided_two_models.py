"""Two language models: each verdict, had counts and exponents come out otherwise.

It reads the shipped model, as the chapter does.
"""

from collections import Counter

import pytest
from counterfactuals import Case, Changed, decide, lacking

NOTEBOOK, FEWER = "two_models", {"max_new_tokens": 2}
KINDS = (
    "two system prompts", "two questions", "temperatures 1 and 0.6", "temperatures 1 and 0.3",
)  # fmt: skip


def inside(*shares):
    return {"inside": dict(zip(KINDS, shares, strict=True))}


def more_rows(by):
    """The count of forward passes, with so many more of them for each of the eight tokens."""
    return Changed(lambda passes: Counter(rows=passes["rows"] + 8 * by))


CASES = (
    Case("two-forwards", "confirmed", {"moved": {"policy": 0.02, "teacher": 0.3}}, "other changes"),
    Case("two-forwards", "corrected", {"passes": more_rows(1)}, "three passes a token"),
    Case("two-forwards", "corrected", {"passes": more_rows(-1)}, "one pass a token"),
    Case(
        "two-forwards",
        "refuted",
        {"moved": {"policy": 0.0, "teacher": 0.3}},
        "a q* that does not change with the policy",
    ),
    Case("typical-alpha", "confirmed", inside(1.0, 1.0, 1.0, 1.0), "all positions inside"),
    Case("typical-alpha", "qualified", inside(0.95, 0.9, 0.8, 0.1), "few outside for prompts"),
    Case("typical-alpha", "refuted", inside(0.6, 0.9, 0.8, 0.1), "many outside for prompts"),
)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_verdict_follows_the_data(case):
    assert decide(NOTEBOOK, case, CASES, FEWER) == case.verdict, case.why


def test_every_verdict_of_the_chapter_could_have_come_out_otherwise():
    assert lacking(NOTEBOOK, CASES) == []
