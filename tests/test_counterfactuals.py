"""Other data through the cells of a small notebook: verdicts follow, and what cannot is told."""

import dataclasses
import json

import pytest
from counterfactuals import CLAIMS, Case, Changed, decide_in, lacking_in, read_chapter

CELLS = {
    "parameters": "limit = 0.5\nsize = 3",
    "tools": "from math import fsum",
    "unused": "raise RuntimeError('no deciding cell needs this one')",
    "data": "measured = [0.1 * limit] * size",
    "numbers": "mean = fsum(measured) / len(measured)",
    "other": "untouched = size + 1",
    "honest": 'glue("claim-a", "refuted" if mean < limit else "confirmed", display=False)',
    "vacuous": (
        "settled = untouched > 0 and size < 4\n"
        'glue("claim-b", "refuted" if settled or mean == 9 else "qualified", display=False)'
    ),
}
(SAMPLE, *_) = CLAIMS


@pytest.fixture(scope="module")
def chapter(tmp_path_factory):
    file = tmp_path_factory.mktemp("book") / "01_small.ipynb"
    tags = {"parameters": ["parameters"]}
    cells = [
        {"cell_type": "code", "id": name, "source": text, "metadata": {"tags": tags.get(name, [])}}
        for name, text in CELLS.items()
    ]
    file.write_text(json.dumps({"cells": cells}), encoding="utf8")
    return read_chapter(file, {"honest", "vacuous"}, {"size": 2})


def claim(name, cell, verdict):
    return dataclasses.replace(SAMPLE, id=name, cell=cell, verdict=verdict)


def test_other_data_run_through_the_cells_between_them_and_the_verdict(chapter):
    assert chapter.verdicts == {"a": "refuted", "b": "refuted"}
    assert decide_in(chapter, "a", "honest", {}) == "refuted"
    assert decide_in(chapter, "a", "honest", {"measured": [0.4, 0.9]}) == "confirmed"
    assert decide_in(chapter, "a", "honest", {"measured": Changed(lambda x: x * 3)}) == "refuted"
    assert decide_in(chapter, "a", "honest", {"limit": 0.0}) == "confirmed", "0 is not below 0"
    assert decide_in(chapter, "a", "honest", {"mean": 0.7}) == "confirmed"
    assert decide_in(chapter, "a", "honest", {"measured": [0.4], "limit": 0.3}) == "confirmed"
    assert decide_in(chapter, "b", "vacuous", {"size": 4}) == "qualified"
    assert chapter.after["numbers"]["mean"] == pytest.approx(0.05), "the chapter stays as it was"


def test_code_and_what_the_verdict_does_not_read_are_no_counterfactual_data(chapter):
    with pytest.raises(AssertionError, match="fsum is code, not data"):
        decide_in(chapter, "a", "honest", {"fsum": sum})
    with pytest.raises(AssertionError, match="no cell before honest makes typo"):
        decide_in(chapter, "a", "honest", {"typo": 1})
    with pytest.raises(AssertionError, match="honest reads nothing that depends on untouched"):
        decide_in(chapter, "a", "honest", {"untouched": 7})


def test_a_claim_without_data_for_and_against_it_is_named():
    both = [claim("a", "honest", "refuted"), claim("b", "vacuous", "refuted")]
    asked = [Case("a", "refuted", {}, ""), Case("a", "confirmed", {}, "")]
    assert lacking_in(both[:1], CELLS, asked) == []
    assert lacking_in(both, CELLS, asked) == [
        "b: no other data that leave it refuted",
        "b: no data that would make it anything but refuted",
        "vacuous: no data make it say qualified",
    ]
    assert lacking_in(both[:1], CELLS, asked[:1]) == [
        "a: no data that would make it anything but refuted",
        "honest: no data make it say confirmed",
    ]
    unmeasured = claim("b", "other", "not measured")
    assert lacking_in([unmeasured], CELLS, asked[:1]) == ["a: not a claim of this chapter"]
