"""The mechanism that asks deciding cells what other data would decide."""

import json
from pathlib import Path

import pytest
from counterfactuals import CLAIMS, Changed, decide_in, names_of, read_chapter

HERE = Path(__file__).parent
CELLS = {
    "parameters": "seed = 0\nlimit = 0.5",
    "unused": "raise RuntimeError('no deciding cell needs this one')",
    "data": "for one in range(3):\n    pass\nmeasured = [0.2 + seed]\nruns.append('data')",
    "numbers": "gap = max(measured)\nruns.append('numbers')",
    "other": "for one in [1]:\n    other = one\nruns.append('other')",
    "honest": 'decide("a", "refuted" if gap < limit * other else "confirmed")',
    "typed": 'seen = gap\ndecide("b", "refuted")',
    "printed": 'print(gap)\npublish({"ch1-gap": gap})\ndecide("c", "refuted")',
    "code": "import math\nroot = math.sqrt",
    "coded": 'decide("d", "refuted" if root(4) < math.e else "confirmed")',
}
RUNS = []
"""The cells that were run, in turn."""


def chapter(tmp_path, *asked):
    """A notebook with a cell that computes its verdict, and others that pretend."""
    RUNS.clear()
    cells = [
        {
            "cell_type": "code",
            "id": name,
            "source": f"from test_counterfactuals import RUNS as runs\n{text}",
            "metadata": {"tags": ["parameters"] if name == "parameters" else []},
        }
        for name, text in CELLS.items()
    ]
    file = tmp_path / "01_typed.ipynb"
    file.write_text(json.dumps({"cells": cells}), encoding="utf8")
    return read_chapter(file, asked, {"seed": 0.1})


SEEN, MEASURED = {"measured": Changed(lambda x: [*x, 0.4])}, {"measured": [0.7]}


def test_other_data_flow_through_the_cells_between(tmp_path):
    asked = chapter(tmp_path, ("honest", {}), ("honest", MEASURED), ("honest", SEEN))
    assert decide_in(asked, "a", "honest", {}) == "refuted"
    assert decide_in(asked, "a", "honest", SEEN) == "refuted"
    assert decide_in(asked, "a", "honest", MEASURED) == "confirmed"


def test_a_verdict_that_was_typed_stays_whatever_the_data(tmp_path):
    asked = chapter(tmp_path, ("typed", MEASURED))
    assert decide_in(asked, "b", "typed", MEASURED) == "refuted"
    with pytest.raises(AssertionError, match="printed reads nothing that depends on measured"):
        decide_in(asked, "c", "printed", MEASURED)


@pytest.mark.parametrize("name", ["root", "math"])
def test_code_is_no_data(tmp_path, name):
    asked = {name: Changed(lambda x: x)}
    with pytest.raises(AssertionError, match=f"{name} is code, not data"):
        decide_in(chapter(tmp_path, ("coded", asked)), "d", "coded", asked)
    asked = {name: json if name == "math" else max}
    with pytest.raises(AssertionError, match=f"{name} is code, not data"):
        decide_in(chapter(tmp_path, ("coded", asked)), "d", "coded", asked)


def test_only_what_depends_on_the_data_runs_again(tmp_path):
    """And what no case needs does not run: `data`, where its measurement is replaced."""
    asked = chapter(tmp_path, ("honest", MEASURED))
    assert RUNS == ["other"]
    decide_in(asked, "a", "honest", MEASURED)
    assert RUNS == ["other", "numbers"]
    asked = chapter(tmp_path, ("honest", SEEN))
    decide_in(asked, "a", "honest", SEEN)
    assert RUNS == ["data", "other", "numbers"]


@pytest.mark.parametrize(
    ("source", "loads", "stores", "anew"),
    [
        ("x = y", "y", "x", "x"),
        ("x = 1\nz = x", "", "x z", "x z"),
        ("x += y", "x y", "x", "x"),
        ("x[i] = y", "x i y", "x", ""),
        ("x[i] += y", "x i y", "x", ""),
        ("x.append(y)", "x y", "x", ""),
        ("x = {}\nx[0] = y", "y", "x", "x"),
        ("x.y = z", "x z", "x", ""),
        ("figures.draw(x)", "figures x", "", ""),
        ("for x in y:\n    z = x, w", "y w", "x z", ""),
        ("for x in y:\n    z = z + x", "y z", "x z", ""),
        ("if y:\n    x = 1\nelse:\n    x, z = 2, w", "y w", "x z", "x"),
        ("while x:\n    x = y\nz = x", "x y", "x z", "z"),
        ("try:\n    x = y\nexcept E:\n    pass\nz = x", "y E x", "x z", "z"),
        ("with x as y:\n    z = y", "x", "y z", "y z"),
        ("x = [y * z for y in w if y]", "z w", "x", "x"),
        ("x = [y for y in [y]]", "y", "x", "x"),
        ("x = {y: z for y, z in w}", "w", "x", "x"),
        ("x = lambda y, z=w: y + z + v", "w v", "x", "x"),
        ("import a.b, c as d\nfrom e import f", "", "a d f", "a d f"),
        ("def x(y):\n    return z", "z", "x", "x"),
        ("if (x := y):\n    z = x", "y", "x z", "x"),
        ("x = y and (z := 1)\nw = z", "y z", "x z w", "x w"),
        ("x = (z := 1) if y else z\nw = z", "y z", "x z w", "x w"),
    ],
)
def test_the_names_of_a_cell_are_those_it_reads_from_others_and_those_it_binds(
    source, loads, stores, anew
):
    names = names_of(source)
    assert names.loads == set(loads.split())
    assert names.stores == set(stores.split())
    assert names.anew == set(anew.split())


def test_every_chapter_with_claims_has_its_cases():
    cases = {file.stem.removeprefix("test_decided_") for file in HERE.glob("test_decided_*.py")}
    assert cases == {claim.notebook for claim in CLAIMS}


def test_every_kind_of_verdict_is_asked_about():
    assert {claim.verdict for claim in CLAIMS} == {
        "confirmed", "corrected", "refuted", "qualified", "not measured",
    }  # fmt: skip
