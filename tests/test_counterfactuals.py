"""The mechanism that asks deciding cells what other data would decide."""

import json
from pathlib import Path

import pytest
from counterfactuals import CLAIMS, Changed, decide_in, read_chapter

HERE = Path(__file__).parent
CELLS = {
    "parameters": "seed = 0\nlimit = 0.5",
    "unused": "raise RuntimeError('no deciding cell needs this one')",
    "data": "measured = [0.2 + seed]",
    "numbers": "gap = max(measured)",
    "honest": 'glue("claim-a", "refuted" if gap < limit else "confirmed", display=False)',
    "typed": 'print(gap)\nglue("claim-b", "refuted", display=False)',
    "deaf": 'glue("claim-c", "refuted", display=False)',
    "code": "import math\nroot = math.sqrt",
    "coded": 'glue("claim-d", "refuted" if root(4) > 1 else "confirmed", display=False)',
}


@pytest.fixture
def chapter(tmp_path):
    """A notebook with a cell that computes its verdict, and others that pretend."""
    cells = [
        {
            "cell_type": "code",
            "id": name,
            "source": text,
            "metadata": {"tags": ["parameters"] if name == "parameters" else []},
        }
        for name, text in CELLS.items()
    ]
    file = tmp_path / "01_typed.ipynb"
    file.write_text(json.dumps({"cells": cells}), encoding="utf8")
    return read_chapter(file, {"honest", "typed", "deaf", "coded"}, {"seed": 0.1})


def test_other_data_flow_through_the_cells_between(chapter):
    assert chapter.verdicts["a"] == "refuted"
    assert decide_in(chapter, "a", "honest", {"measured": [0.7]}) == "confirmed"
    assert (
        decide_in(chapter, "a", "honest", {"measured": Changed(lambda x: [*x, 0.4])}) == "refuted"
    )


def test_a_verdict_that_was_typed_stays_whatever_the_data(chapter):
    assert decide_in(chapter, "b", "typed", {"measured": [0.7]}) == "refuted"
    with pytest.raises(AssertionError, match="deaf reads nothing that depends on measured"):
        decide_in(chapter, "c", "deaf", {"measured": [0.7]})


def test_code_is_no_data(chapter):
    with pytest.raises(AssertionError, match="root is code, not data"):
        decide_in(chapter, "d", "coded", {"root": lambda x: 0})


def test_every_chapter_with_claims_has_its_cases():
    chapters = {claim.notebook[:2] for claim in CLAIMS}
    assert {f.stem[-2:] for f in HERE.glob("test_counterfactuals_*.py")} == chapters


def test_every_kind_of_verdict_is_asked_about():
    assert {claim.verdict for claim in CLAIMS} == {
        "confirmed", "corrected", "refuted", "qualified", "not measured",
    }  # fmt: skip
