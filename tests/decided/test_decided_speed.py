"""Speed: the verdict on model sizes, had other pairs been recorded."""

import pytest
from counterfactuals import Case, Changed, decide, lacking

NOTEBOOK = "speed"


def pairs(*, synthetic, sizes):
    """The recorded shapes at one acceptance, of invented weights or not."""

    def recorded(shapes):
        kept = {key: cell for key, cell in shapes.items() if key[0] in sizes}
        return {key: {**cell, "synthetic": synthetic} for key, cell in kept.items()}

    return {"shapes": Changed(recorded)}


def streams(*, answer, first=0.0):
    """The streamed answers, as if drafts had taken so many times as long, and begun later."""

    def recorded(cells):
        return {
            name: {**cell, "runs": [drafted(run) for run in cell["runs"]]}
            for name, cell in cells.items()
        }

    def drafted(run):
        if run["way"].startswith("plain"):
            return run
        plain = {"first_s": run["first_s"] + first, "answer_s": run["answer_s"] * answer}
        return run | plain

    return {"seen_cells": Changed(recorded)}


BOTH = ("1B", "7B")
CASES = (
    Case("scenario-dialogue", "qualified", streams(answer=1.0), "as recorded"),
    Case("scenario-dialogue", "confirmed", streams(answer=0.5), "drafts twice as fast everywhere"),
    Case("scenario-dialogue", "refuted", streams(answer=2.0), "half as fast"),
    Case("scenario-dialogue", "refuted", streams(answer=0.5, first=0.5), "a late first token"),
    Case("direction-speed-by-size", "qualified", pairs(synthetic=True, sizes=BOTH), "invented"),
    Case("direction-speed-by-size", "confirmed", pairs(synthetic=False, sizes=BOTH), "real ones"),
    Case("direction-speed-by-size", "not measured", pairs(synthetic=False, sizes=BOTH[1:]), "one"),
)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_verdict_follows_the_data(case):
    assert decide(NOTEBOOK, case, CASES) == case.verdict, case.why


def test_every_verdict_of_the_chapter_could_have_come_out_otherwise():
    assert lacking(NOTEBOOK, CASES) == []
