"""Drafters and quality: each verdict, had tests, scores and costs come out otherwise."""

import pytest
from counterfactuals import Case, Changed, decide, lacking

NOTEBOOK = "drafters_quality"


def told(*, gap=-0.2, found=True, out=()):
    """The loop's answers right so much more often, whether it was found out, and who else was."""
    return {
        "loop": {"right_difference": [gap, gap - 0.02, gap + 0.02], "p": 0.001},
        "loop_found": found,
        "found_out": list(out),
    }


def teachers(*verdicts):
    return {"teacher_better": dict(enumerate(verdicts))}


def trained(gain, even):
    """What KL gains, on every seed, and the highest cost at which its draft model pays."""
    return {
        "gains": Changed(lambda found: found | {"kl": (gain, gain - 0.01, gain + 0.01, [gain])}),
        "break_even": even,
        "ratio": 0.3,
    }


def adapting(*outcomes):
    """At each cost of a draft, whether some rule is cheaper or every rule dearer than fixed."""
    return {
        "adapting_wins": {i: outcome == "cheaper" for i, outcome in enumerate(outcomes)},
        "adapting_loses": {i: outcome == "dearer" for i, outcome in enumerate(outcomes)},
    }


CASES = (
    Case("direction-quality", "qualified", told(gap=-0.1), "a loop that is less often right"),
    Case("direction-quality", "qualified", told(gap=0.1), "a loop that is more often right"),
    Case("direction-quality", "confirmed", told(gap=0.0), "another law, as often right"),
    Case("direction-quality", "not measured", told(found=False), "a test without power"),
    Case("direction-quality", "refuted", told(out=["coin"]), "a scheme that is found out"),
    Case("teacher-likes-quality-words", "confirmed", teachers("better", "better"), "good ones"),
    Case("teacher-likes-quality-words", "qualified", teachers("better", "worse"), "some"),
    Case("teacher-likes-quality-words", "refuted", teachers("worse", "within noise"), "none"),
    Case("direction-draft-model", "confirmed", trained(0.05, 0.5), "more accepted, and paying"),
    Case("direction-draft-model", "qualified", trained(0.05, 0.1), "more accepted, too dear"),
    Case("direction-draft-model", "qualified", trained(0.0, 0.5), "no more accepted, and paying"),
    Case("direction-draft-model", "refuted", trained(-0.05, 0.1), "neither"),
    Case(
        "direction-adaptive-strategy",
        "confirmed",
        adapting("cheaper", "cheaper"),
        "cheaper at every cost",
    ),
    Case(
        "direction-adaptive-strategy", "qualified", adapting("cheaper", "alike"), "cheaper at some"
    ),
    Case("direction-adaptive-strategy", "refuted", adapting("dearer", "dearer"), "dearer at all"),
)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_verdict_follows_the_data(case):
    assert decide(NOTEBOOK, case, CASES) == case.verdict, case.why


def test_every_verdict_of_the_chapter_could_have_come_out_otherwise():
    assert lacking(NOTEBOOK, CASES) == []
