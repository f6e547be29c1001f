"""The record of first calls, long prompts and batches: how it is made, and the published one."""

import json
from types import SimpleNamespace

import pytest
import torch

from qstar.decoding import latency
from qstar.decoding.enumeration import tiny_model
from qstar_book.__main__ import main
from qstar_book.records import decoding, lengths
from qstar_book.records.corpus import data_file

PROMPTS = [(torch.tensor([0, 1, 2]), torch.tensor([0, 1, 2])), (torch.tensor([1]),) * 2]


@pytest.fixture
def models(monkeypatch):
    """Two tiny models, of which few short texts are wanted."""
    monkeypatch.setattr(lengths, "LENGTHS", {3: 2, 5: 2})
    monkeypatch.setattr(lengths, "CONTEXTS", (4, 11))
    monkeypatch.setattr(lengths, "BATCHES", (1, 3))
    monkeypatch.setattr(lengths, "TOKENS", 4)
    monkeypatch.setattr(decoding, "questions_of", lambda pair, tokenizer: PROMPTS)
    pair = tuple(tiny_model(seed, vocab=6) for seed in (1, 2))
    for model in pair:
        model.generation_config.eos_token_id = None
    return pair


def tokenize(text, **options):
    return SimpleNamespace(input_ids=torch.arange(7)[None] % 6)


def test_each_first_call_knows_nothing_of_the_pair(models, monkeypatch):
    forgotten = []
    forget = latency.forget
    monkeypatch.setattr(latency, "forget", lambda model: forgotten.append(model) or forget(model))
    cells = lengths.first_calls("noised copy", "packed", models, tokenize)
    assert [cell["new_tokens"] for cell in cells] == [3, 5]
    for cell in cells:
        assert [run["way"] for run in cell["runs"]] == ["plain", "auto", "auto", "plain"]
        assert {run["tokens"] for run in cell["runs"]} == {cell["new_tokens"]}
        for run in cell["runs"]:
            assert next(iter(run["schemes"])) == "plain"
            assert run["wall_s"] > 0 < run["cpu_s"]
    assert forgotten == [models[0]] * 8


def test_prompts_have_the_length_they_are_said_to_have(models, monkeypatch):
    asked = []
    generate = lengths.decode.generate
    monkeypatch.setattr(
        lengths.decode,
        "generate",
        lambda *given, **named: asked.append(given[2:]) or generate(*given, **named),
    )
    cells = lengths.contexts(models, tokenize)
    assert [cell["context"] for cell in cells] == [4, 11]
    assert {len(ids) for prompts in asked for ids in prompts} == {4, 11}
    assert asked[-1][0].tolist() == [*range(6), *range(1), *range(4)]


def test_a_streamed_run_knows_when_each_of_its_tokens_came(models, monkeypatch):
    monkeypatch.setattr(lengths, "ANSWER", 6)
    monkeypatch.setattr(lengths, "ANSWERS", 2)
    (cell,) = lengths.streamed("two prompts", "packed", models, tokenize)
    assert {run["way"] for run in cell["runs"]} == {*lengths.STREAMED["two prompts", "packed"]}
    for run in cell["runs"]:
        seconds, tokens = zip(*run["arrivals"], strict=True)
        assert sum(tokens) == run["tokens"] == cell["new_tokens"] == 6
        assert seconds[0] > 0
        assert [*seconds] == sorted(seconds)
        assert seconds[-1] <= run["wall_s"] + 1e-3
        if run["way"] == "plain":
            assert {*tokens} == {1}
        assert run["prompts_s"] + run["model_s"] <= run["wall_s"]


def test_what_people_see_is_said_of_each_run():
    arrivals = [[0.5, 1], [0.75, 3], [1.75, 1]]
    run = {"way": "coin", "arrivals": arrivals, "prompts_s": 0.5, "model_s": 0.9, "wall_s": 1.7}
    (seen,) = lengths.as_seen({"runs": [run]})["runs"]
    assert (seen["first_s"], seen["answer_s"], seen["pauses_s"]) == (0.5, 1.75, [0.25, 1.0])
    assert seen["outside"] == pytest.approx(0.25)
    assert seen.items() > run.items()


def test_an_unknown_part_is_refused_and_a_named_one_leaves_the_others(
    tmp_path, monkeypatch, capsys
):
    out = tmp_path / "record.json"
    given = ["record", "lengths", "--out", str(out)]
    assert main([*given, "--parts", "widths"]) == 2
    assert "no part widths; the parts are first_calls, streamed" in capsys.readouterr().err
    asked_for = []

    def measure(function, asked, **environment):
        asked_for.append(asked)
        cell = {"pair": asked["pair"], "layers": asked["layers"], "made": len(asked_for)}
        return {part: [cell] for part in asked["parts"]}

    monkeypatch.setattr(lengths, "in_own_process", measure)
    assert main(given) == 0
    before, every = json.loads(out.read_text()), len(asked_for)
    assert main([*given, "--parts", "streamed"]) == 0
    again = asked_for[every:]
    assert [(asked["pair"], asked["layers"]) for asked in again] == [*lengths.STREAMED]
    assert {tuple(asked["parts"]) for asked in again} == {("streamed",)}
    after = json.loads(out.read_text())
    assert [cell["made"] for cell in after["streamed"]] == [every + 1, every + 2]
    assert {part for part in lengths.PARTS if after[part] != before[part]} == {"streamed"}


def test_an_unknown_pair_is_refused_and_a_named_one_replaces_its_cells(
    tmp_path, monkeypatch, capsys
):
    out = tmp_path / "record.json"
    given = ["record", "lengths", "--out", str(out), "--pairs"]
    assert main([*given, "no such pair"]) == 2
    assert "no pair no such pair; the pairs are two prompts" in capsys.readouterr().err
    measured = []

    def measure(function, asked, **environment):
        measured.append((asked["pair"], asked["layers"]))
        cell = {"pair": asked["pair"], "layers": asked["layers"], "made": len(measured)}
        return {part: [cell] for part in ("first_calls", "contexts", "batches")}

    monkeypatch.setattr(lengths, "in_own_process", measure)
    assert main(given[:-1]) == 0
    every = list(lengths.FIRST)
    assert measured == every
    assert main([*given, "noised copy"]) == 0
    again = measured[len(every) :]
    assert again == [pair for pair in every if pair[0] == "noised copy"]
    cells = json.loads(out.read_text())["contexts"]
    assert [(cell["pair"], cell["layers"]) for cell in cells] == every
    assert [cell["made"] > len(every) for cell in cells] == [pair in again for pair in every]


def test_tokens_of_a_batch_are_those_of_all_rows(models):
    cells = lengths.batches(models, tokenize)
    assert [cell["rows"] for cell in cells] == [1, 3]
    for cell in cells:
        assert {run["tokens"] for run in cell["runs"]} == {4 * cell["rows"]}
        assert {run["way"] for run in cell["runs"]} == {"plain", "alternating 1", "auto"}


@pytest.fixture(scope="module")
def record():
    return json.loads(data_file("results/lengths_cpu.json").read_text(encoding="utf8"))


def test_the_published_record_says_how_it_was_made(record):
    assert record["command"].startswith("qstar-book record lengths")
    assert record["machine"]["threads"] == 2
    pairs = {(cell["pair"], cell["layers"]) for cell in record["first_calls"]}
    assert pairs == set(lengths.FIRST)
    assert len(record["first_calls"]) == len(pairs) * len(lengths.LENGTHS)
    assert [cell["context"] for cell in record["contexts"]] == [*lengths.CONTEXTS]
    assert [cell["rows"] for cell in record["batches"]] == [*lengths.BATCHES]


def test_recorded_first_calls_begin_plainly_and_are_never_much_slower(record):
    for cell in record["first_calls"]:
        one_model = cell["pair"] == "two prompts"  # which begins by comparing one call with two
        for run in decoding.runs_of(cell, "auto"):
            if not (one_model and cell["new_tokens"] >= latency.COMPARED_FROM):
                assert next(iter(run["schemes"])) == "plain"
        assert decoding.speed_ratio(cell, "auto").median > 0.9
