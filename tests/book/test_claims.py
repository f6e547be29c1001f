"""The claims register: valid, complete, and saying what the cells of the book say."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import yaml
from test_notebooks import typed_numbers

from qstar_book import claims as registry
from qstar_book.__main__ import main
from qstar_book.claims import (
    PREFIX,
    VERDICTS,
    Decision,
    disagreements,
    misquotations,
    read_claims,
    read_decisions,
    read_held_decisions,
)

ROOT = Path(__file__).resolve().parents[2]
REGISTER = ROOT / "data" / "claims.yaml"
SOURCE, CLAIMS = read_claims(REGISTER)
HELD = read_held_decisions(ROOT / "notebooks", ROOT / "data" / "expected")


# --- The register ------------------------------------------------------------------------------


def test_the_register_says_what_the_cells_of_the_book_say():
    """Every claim has a cell that decides it so, and no cell decides a claim that is not there."""
    assert disagreements(CLAIMS, HELD) == []


def test_the_executed_chapters_say_what_the_register_says(chapters):
    assert disagreements(CLAIMS, read_decisions(chapters)) == []


def test_what_is_not_measured_says_what_would_measure_it():
    unmeasured = [claim for claim in CLAIMS if claim.verdict == "not measured"]
    assert unmeasured
    for claim in unmeasured:
        would = "would" in claim.statement or "`" in claim.statement  # what it takes, or a command
        assert would, f"{claim.id}: {claim.statement}"


def test_an_original_is_in_the_words_of_the_source():
    """Chinese, a formula or a printed number; and no two claims quote the same words of a line."""
    for claim in CLAIMS:
        chinese = any("\u4e00" <= letter <= "\u9fff" for letter in claim.original)
        assert chinese or any(sign in claim.original for sign in "\\0123456789"), claim.id
    words = [(claim.original, claim.english) for claim in CLAIMS]
    assert len(set(words)) == len(words)


def test_each_printed_number_of_the_tables_has_its_own_entry():
    ids = {claim.id for claim in CLAIMS}
    quantities = ("alpha", "kl-policy-teacher", "kl-teacher-policy")
    assert {f"row{row}-{name}" for row in range(1, 6) for name in quantities} <= ids
    columns = ("alpha", "acceptance", "speedup")
    assert {f"speedup-row{row}-{name}" for row in (1, 2, 3) for name in columns} <= ids


def test_no_number_in_a_statement_is_typed():
    for claim in CLAIMS:
        assert typed_numbers(claim.statement) == [], f"{claim.id}: glue it"
        assert typed_numbers(claim.english) == [], f"{claim.id}: that is not a printed number"


# --- What breaks it is named -------------------------------------------------------------------

GOOD = {
    "source": {"title": "a text", "sha256": "0" * 64, "lines": 3, "without_claims": "1"},
    "claims": [
        {
            "id": name,
            "lines": line,
            "original": f"原文 {name}",
            "english": "It is so.",
            "kind": "statement",
            "verdict": "refuted",
            "statement": "It is not so.",
            "cell": f"first#{name}-verdict",
        }
        for name, line in (("one", "2"), ("two", "3"))
    ],
}


def broken(entry=0, /, **changes):
    """A copy of the good register with one entry changed; a key set to None is left out."""
    register = json.loads(json.dumps(GOOD))
    changed = {**register["claims"][entry], **changes}
    register["claims"][entry] = {key: x for key, x in changed.items() if x is not None}
    return register


@pytest.fixture
def written(tmp_path):
    """Write a register beside the schema, and give its path."""
    shutil.copy(REGISTER.with_name("claims.schema.json"), tmp_path)

    def write(register):
        file = tmp_path / "claims.yaml"
        text = register if isinstance(register, str) else yaml.safe_dump(register)
        file.write_text(text, encoding="utf8")
        return file

    return write


def test_a_good_register_is_read(written):
    source, (one, two) = read_claims(written(GOOD))
    assert (source.num_lines, source.without_claims) == (3, {1})
    assert (one.key, one.lines, one.notebook, one.cell) == (
        "claim-one", (2,), "first", "one-verdict",
    )  # fmt: skip
    assert two.also == ()


@pytest.mark.parametrize(
    ("register", "message"),
    [
        (
            broken(verdict="true"),
            r"entry 1 \(one\), key verdict: 'true' is not one of \['confirmed', 'corrected'",
        ),
        (broken(verdict=None), r"entry 1 \(one\): 'verdict' is a required property"),
        (
            broken(1, kind="opinion"),
            r"entry 2 \(two\), key kind: 'opinion' is not one of \['statement'",
        ),
        (broken(colour="red"), r"entry 1 \(one\): Additional .* \('colour' was unexpected\)"),
        (broken(lines=2), r"entry 1 \(one\), key lines: 2 is not of type 'string'"),
        (
            broken(lines="two"),
            r"entry 1 \(one\), key lines: 'two' does not .* Where the source says",
        ),
        (
            broken(cell="first"),
            r"entry 1 \(one\), key cell: 'first' does not .* The deciding cell",
        ),
        (broken(id="No Id"), r"entry 1 \(No Id\), key id: 'No Id' does not match"),
        (broken(1, id="one"), r"entry 2 \(one\), key id: entry 1 has it already"),
        (broken(also=[]), r"entry 1 \(one\), key also: \[\] should be non-empty"),
        (broken(statement="No."), r"entry 1 \(one\), key statement: 'No.' is too short"),
        (broken(lines="1"), r"entry 1 \(one\), key lines: expected lines from 1 to 3"),
        (broken(1, lines="2"), r"source: no entry covers line 3: add the claim"),
        ({**GOOD, "claims": []}, r"the register, key claims: \[\] should be non-empty|claims"),
        ({"claims": GOOD["claims"]}, r"the register: 'source' is a required property"),
        ("claims: [", r"claims.yaml is not YAML"),
    ],
)
def test_a_broken_register_says_entry_key_and_what_was_expected(written, register, message):
    with pytest.raises(ValueError, match=message):
        read_claims(written(register))


def test_every_problem_is_listed_and_not_only_the_first(written):
    register = broken(verdict="true", kind="opinion")
    with pytest.raises(ValueError, match="verdict") as caught:
        read_claims(written(register))
    assert "key kind" in str(caught.value)


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.id)
def test_another_verdict_of_the_deciding_cell_is_reported(claim):
    for verdict in set(VERDICTS) - {claim.verdict}:
        drifted = {**HELD, claim.id: dataclasses.replace(HELD[claim.id], verdict=verdict)}
        (problem,) = disagreements(CLAIMS, drifted)
        assert problem.startswith(f"{claim.id}, key verdict: the register says {claim.verdict}, ")
        assert problem.endswith(f"says {verdict}")


def test_a_claim_without_a_cell_and_a_cell_without_a_claim_are_reported():
    first, *others = CLAIMS
    (lost,) = disagreements(CLAIMS, {c.id: HELD[c.id] for c in others})
    assert f"no cell glues {first.key}" in lost
    (unknown,) = disagreements(others, HELD)
    assert f"{first.id}: {first.notebook}#{first.cell} decides it" in unknown
    moved = dataclasses.replace(HELD[first.id], cell="elsewhere")
    (problem,) = disagreements(CLAIMS, {**HELD, first.id: moved})
    assert problem.startswith(f"{first.id}, key cell: ")


def notebook(*cells):
    """A notebook of code cells (id, source) that were not executed."""
    code = [{"cell_type": "code", "id": name, "source": text} for name, text in cells]
    return json.dumps({"cells": code})


def test_verdicts_are_found_in_the_cells_that_glue_them(tmp_path):
    one = ("one-verdict", 'for i in (1, 2):\n    decide(f"row{i}-alpha", "refuted")')
    two = ("two-verdict", 'decide("two", verdict)\npublish({name: 1})')
    (tmp_path / "first.ipynb").write_text(notebook(one, two), encoding="utf8")
    held = {"claim-row1-alpha": "refuted", "claim-two": "confirmed", "ch1-x": 0.5}
    entries = {
        name: {"value": value, "tolerance": 0, "origin": "made up"} for name, value in held.items()
    }
    (tmp_path / "first.json").write_text(json.dumps(entries), encoding="utf8")
    assert read_held_decisions(tmp_path, tmp_path) == {
        "row1-alpha": Decision("first", "one-verdict", "refuted"),
        "two": Decision("first", "two-verdict", "confirmed"),
    }
    (tmp_path / "first.ipynb").write_text(notebook(one), encoding="utf8")
    with pytest.raises(ValueError, match=r"expected one cell that glues claim-two, got no cell"):
        read_held_decisions(tmp_path, tmp_path)
    (tmp_path / "first.ipynb").write_text(
        notebook(one, two, ("three", 'decide("two", "refuted")')), encoding="utf8"
    )
    with pytest.raises(ValueError, match=r"claim-two, got two-verdict and three"):
        read_held_decisions(tmp_path, tmp_path)


def test_a_quotation_that_the_source_does_not_have_is_reported(written, tmp_path):
    text = tmp_path / "source.md"
    text.write_text("标题\n原文 one 是\n原文 two 是\n", encoding="utf8")
    source, entries = read_claims(written(GOOD))
    source = dataclasses.replace(
        source, sha256=registry.hashlib.sha256(text.read_bytes()).hexdigest()
    )
    assert misquotations(source, entries, text) == []
    altered = [dataclasses.replace(entries[0], original="原文 one 不"), entries[1]]
    assert misquotations(source, altered, text) == [
        "one, key original: '原文 one 不' is not in its lines"
    ]
    text.write_text("标题\n原文 one 是\n原文 two 否\n", encoding="utf8")
    assert misquotations(source, entries, text) == ["source, key sha256: source.md is another text"]


def test_the_command_tells_agreement_from_drift(written, tmp_path, capsys):
    where = ["--notebooks", str(ROOT / "notebooks"), "--expected", str(ROOT / "data" / "expected")]
    assert main(["claims", "--register", str(REGISTER), *where]) == 0
    assert f"{len(CLAIMS)} claims agree with the book" in capsys.readouterr().out
    assert main(["claims", "--register", str(written(GOOD)), *where]) == 1
    assert f"no cell glues {PREFIX}one; first#one-verdict should" in capsys.readouterr().out
    assert main(["claims", "--register", str(written(broken(verdict="x"))), *where]) == 2
    assert "is not one of ['confirmed'" in capsys.readouterr().err
