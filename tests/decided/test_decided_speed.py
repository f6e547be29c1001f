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


BOTH = ("1B", "7B")
CASES = (
    Case("direction-speed-by-size", "qualified", pairs(synthetic=True, sizes=BOTH), "invented"),
    Case("direction-speed-by-size", "confirmed", pairs(synthetic=False, sizes=BOTH), "real ones"),
    Case("direction-speed-by-size", "not measured", pairs(synthetic=False, sizes=BOTH[1:]), "one"),
)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_verdict_follows_the_data(case):
    assert decide(NOTEBOOK, case, CASES) == case.verdict, case.why


def test_every_verdict_of_the_chapter_could_have_come_out_otherwise():
    assert lacking(NOTEBOOK, CASES) == []
