"""Every verdict follows from numbers: sabotage the computation, and the register disagrees.

About a minute, most of it running the chapters as far as their deciding cells need.
"""

import dataclasses
import json
from pathlib import Path

import pytest
from sabotage import moved_by, states

from qstar.claims import Decision, disagreements, read_claims

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = ROOT / "notebooks"
_, CLAIMS = read_claims(ROOT / "data" / "claims.yaml")
FEWER = {  # enough to reach the verdicts, and quick
    "01_kl_symmetry": {"trials": 200},
    "03_gaussians": {"trials": 100},
    "05_exact_sampling": {"trials": 200, "draws": 40_000},
    "07_speculative_decoding": {"tiny_runs": 4, "max_new_tokens": 4},
}


@pytest.mark.parametrize("notebook", sorted({claim.notebook for claim in CLAIMS}))
def test_a_sabotaged_computation_changes_the_verdict_and_the_check_fails(notebook):
    ours = {claim.key: claim for claim in CLAIMS if claim.notebook == notebook}
    cells = states(
        NOTEBOOKS / f"{notebook}.ipynb",
        {claim.cell for claim in ours.values()},
        FEWER.get(notebook, {}),
    )
    verdicts = {key: verdict for state in cells.values() for key, verdict in state.verdicts.items()}
    assert verdicts == {key: claim.verdict for key, claim in ours.items()}
    honest = {
        claim.id: Decision(notebook, claim.cell, verdicts[key]) for key, claim in ours.items()
    }
    assert disagreements(list(ours.values()), honest) == []
    moved = {
        key: how for state in cells.values() for key, how in moved_by(state, NOTEBOOKS).items()
    }
    for key, claim in ours.items():
        if claim.verdict == "not measured":
            assert key not in moved, "nothing decides it, so nothing can be sabotaged"
            continue
        assert key in moved, f"{claim.cell}: no sabotage of what it reads moves {key}"
        *_, verdict = moved[key].split(": ")
        sabotaged = {**honest, claim.id: dataclasses.replace(honest[claim.id], verdict=verdict)}
        (problem,) = disagreements(list(ours.values()), sabotaged)
        assert problem.startswith(f"{claim.id}, key verdict: the register says {claim.verdict}")


def test_every_kind_of_verdict_is_among_those_that_were_sabotaged():
    assert {claim.verdict for claim in CLAIMS} == {
        "confirmed", "corrected", "refuted", "qualified", "not measured",
    }  # fmt: skip


@pytest.fixture
def typed(tmp_path):
    """A notebook whose last two cells decide a claim each: one computes, the other pretends."""
    cells = {
        "parameters": "seed = 0\nlimit = 0.5",
        "unused": "raise RuntimeError('no deciding cell needs this one')",
        "numbers": "gap = 0.2 + seed",
        "honest": 'glue("claim-a", "refuted" if gap < limit else "confirmed", display=False)',
        "typed": 'print(gap)\nglue("claim-b", "refuted", display=False)',
    }
    file = tmp_path / "01_typed.ipynb"
    file.write_text(
        json.dumps(
            {
                "cells": [
                    {
                        "cell_type": "code",
                        "id": name,
                        "source": text,
                        "metadata": {"tags": ["parameters"] if name == "parameters" else []},
                    }
                    for name, text in cells.items()
                ]
            }
        ),
        encoding="utf8",
    )
    return file


def test_a_verdict_that_was_typed_is_told_from_one_that_was_computed(typed):
    found = states(typed, {"honest", "typed"}, {"seed": 0.1})
    assert found["honest"].verdicts == {"claim-a": "refuted"}
    assert found["honest"].names["gap"] == pytest.approx(0.3)
    assert set(moved_by(found["honest"], typed.parent)) == {"claim-a"}
    assert moved_by(found["typed"], typed.parent) == {}


def test_a_parameter_that_the_notebook_does_not_have_is_refused(typed):
    with pytest.raises(AssertionError, match="has no parameter"):
        states(typed, {"honest"}, {"sead": 1})
