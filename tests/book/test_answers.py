"""Whole answers of a model: particles that are copied keep their own caches, and runs their law."""

import itertools
import json
import math

import numpy as np
import pytest
import tiny
import torch
from sampling import FALSE_ALARM, p_value
from scipy.special import log_softmax
from transformers import AutoConfig, AutoModelForCausalLM

from qstar.adapters.checkpoints import log_distributions
from qstar.decoding import cache_check
from qstar.families.montecarlo import solve_sample
from qstar.theory.particles import sample_token_level, smc
from qstar.theory.sequences import SequenceDistribution, sequence_level, token_level
from qstar_book.__main__ import main
from qstar_book.records import answers
from qstar_book.records.answers import ModelPair, parents_sample
from qstar_book.records.corpus import data_file

POLICY, TEACHER = torch.tensor([3, 1, 4]), torch.tensor([5, 2])
VOCAB = 7


@pytest.fixture(scope="module")
def model():
    return tiny.llama(4, vocab=VOCAB)


def enumerate_law(model, prompt, length):
    """The law of the model's next tokens as tables, by reading every text from its beginning."""
    tables = []
    for t in range(length):
        texts = itertools.product(range(VOCAB), repeat=t)
        rows = [
            log_distributions(model, torch.cat([prompt, torch.tensor(text).long()]), prompt[:1])
            for text in texts
        ]
        tables.append(torch.stack(rows).numpy().reshape((VOCAB,) * (t + 1)))
    return SequenceDistribution(tuple(log_softmax(table, axis=-1) for table in tables))


@pytest.fixture(scope="module")
def laws(model):
    return tuple(enumerate_law(model, prompt, 2) for prompt in (POLICY, TEACHER))


def test_copied_particles_go_on_with_the_caches_of_what_they_copied(model):
    generator = np.random.default_rng(0)
    drawn = smc(
        ModelPair(model, POLICY, TEACHER, 6),
        5,
        alpha=0.4,
        num_particles=6,
        generator=generator,
        resample_below=1.0,
    )
    assert sum(drawn.resampled) >= 3
    assert len(set(drawn.origin.tolist())) < 6
    for row, (ours, theirs) in zip(
        drawn.tokens, zip(drawn.log_policy, drawn.log_teacher, strict=True), strict=True
    ):
        tokens = torch.tensor(row)
        for prompt, found in ((POLICY, ours), (TEACHER, theirs)):
            laws = log_distributions(model, prompt, tokens)
            read = laws.gather(-1, tokens[:, None]).sum()
            assert found == pytest.approx(float(read), abs=1e-9)


def test_a_model_that_a_cache_would_mislead_is_read_anew():
    """RoBERTa's positions begin behind the padding's, and go wrong where a cache is padded."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "xlm-roberta",
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        initializer_range=0.5,
        is_decoder=True,
        pad_token_id=1,
        bos_token_id=None,
        eos_token_id=None,
    )
    roberta = AutoModelForCausalLM.from_config(config).double().eval()
    with pytest.warns(UserWarning, match="is read anew for every token"):
        pair = ModelPair(roberta, torch.tensor([3, 0, 4]), TEACHER, 2)
    pair.log_rows()
    pair.extend(np.array([6, 2]))
    ours, _ = pair.log_rows()
    for row, token in zip(ours, [6, 2], strict=True):
        with torch.no_grad():
            whole = roberta(torch.tensor([[3, 0, 4, token]]), use_cache=False).logits[0, -1]
        assert np.abs(row - whole.log_softmax(-1).numpy()).max() < 1e-5


def test_a_cache_that_is_not_copied_is_caught(model, monkeypatch):
    """The control: particles change places, their caches stay."""
    monkeypatch.setattr(cache_check, "_FOUND", {})  # what is found below is true only here
    monkeypatch.setattr(cache_check, "check", lambda cache, length, rows: None)
    monkeypatch.setattr(answers.KVCache, "select", lambda self, rows: None)
    drawn = smc(
        ModelPair(model, POLICY, TEACHER, 6),
        5,
        alpha=0.4,
        num_particles=6,
        generator=np.random.default_rng(0),
        resample_below=1.0,
    )
    read = []
    for row in drawn.tokens:
        tokens = torch.tensor(row)
        read.append(
            float(log_distributions(model, POLICY, tokens).gather(-1, tokens[:, None]).sum())
        )
    assert np.abs(np.array(read) - drawn.log_policy).max() > 1e-3


def test_answers_of_a_model_follow_the_enumerated_law(model, laws):
    token, sequence = token_level(*laws, 0.4), sequence_level(*laws, 0.4)
    drawn = sample_token_level(
        ModelPair(model, POLICY, TEACHER, 20_000),
        2,
        num_particles=20_000,
        alpha=0.4,
        generator=np.random.default_rng(1),
    )
    first = np.exp(token.distribution.log_next[0])
    assert p_value(drawn.tokens[:, 0], first) > FALSE_ALARM
    assert p_value(drawn.tokens[:, 0], np.exp(laws[0].log_next[0])) < FALSE_ALARM
    np.testing.assert_allclose(drawn.log_policy, laws[0].log_density(drawn.tokens), atol=1e-9)
    np.testing.assert_allclose(drawn.log_teacher, laws[1].log_density(drawn.tokens), atol=1e-9)
    estimate = float(np.exp(drawn.log_partitions.sum(axis=1)).mean())
    spread = float(np.exp(drawn.log_partitions.sum(axis=1)).std()) / math.sqrt(20_000)
    assert estimate == pytest.approx(math.exp(sequence.log_partition), abs=7 * spread)


def test_an_answer_that_has_ended_repeats_its_end_for_free(model):
    end = int(np.argmax(log_distributions(model, POLICY, POLICY[:1]).numpy()))
    drawn = sample_token_level(
        ModelPair(model, POLICY, TEACHER, 64, ends=[end]),
        6,
        num_particles=64,
        generator=np.random.default_rng(2),
    )
    ended = (drawn.tokens[:, :-1] == end).cumsum(axis=1) > 0
    assert ended.any()
    assert (drawn.tokens[:, 1:][ended] == end).all()
    assert (drawn.log_partitions[:, 1:][ended] == 0).all()


def test_recorded_draws_of_both_parents_give_the_balance_of_whole_answers(model, laws):
    exact = sequence_level(*laws).balance
    runs = []
    for alpha in (1.0, 0.0):
        drawn = sample_token_level(
            ModelPair(model, POLICY, TEACHER, 4_000),
            2,
            num_particles=4_000,
            alpha=alpha,
            generator=np.random.default_rng(int(alpha)),
        )
        fields = {"log_policy": drawn.log_policy, "log_teacher": drawn.log_teacher}
        runs.append([{name: values.tolist() for name, values in fields.items()}])
    solved = solve_sample(parents_sample(*runs))
    assert solved.alpha == pytest.approx(float(exact.alpha), abs=6.5 * solved.alpha_error)
    assert solved.chernoff == pytest.approx(float(exact.chernoff), abs=6.5 * solved.chernoff_error)
    lopsided = solve_sample(parents_sample(runs[0], runs[0]))  # the control: no teacher's draws
    assert abs(lopsided.chernoff - float(exact.chernoff)) > 6.5 * lopsided.chernoff_error


# --- The record ----------------------------------------------------------------------------------


class Letters:
    """A tokenizer of single letters, with what `record` asks of one."""

    def decode(self, row, skip_special_tokens=False):
        return "".join("abcdefg"[token] for token in row)


def test_a_record_holds_every_run_and_comes_out_the_same_twice(model, monkeypatch):
    prompts = {"policy": POLICY, "teacher": TEACHER}
    monkeypatch.setattr(
        answers.checkpoints, "chat_ids", lambda tokenizer, user, *, system: prompts[system]
    )
    options = {
        "length": 4,
        "num_particles": 8,
        "num_draws": 16,
        "num_runs": 2,
        "resample_below": 0.9,
        "seed": 5,
    }
    prompt = {"policy_system": "policy", "teacher_system": "teacher", "user": "?"}
    first, second = (answers.record("tiny", model, Letters(), prompt, **options) for _ in range(2))
    assert json.dumps(first) == json.dumps(second)
    assert {kind: len(runs) for kind, runs in first["samples"].items()} == {
        "policy": 2,
        "teacher": 2,
        "token_level": 2,
    }
    assert {kind: len(runs) for kind, runs in first["runs"].items()} == {"smc": 2, "importance": 2}
    for run in (r for kind in ("samples", "runs") for rs in first[kind].values() for r in rs):
        assert len(run["texts"]) == len(run["tokens"]) == len(run["log_weights"]) == 8
        assert np.exp(run["log_weights"]).sum() == pytest.approx(1, abs=1e-4)
    first_texts = [runs[0]["texts"] for runs in first["samples"].values()]
    assert len({json.dumps(texts) for texts in first_texts}) == 3


def test_the_published_record_is_of_the_published_model_and_adds_up():
    record = json.loads(data_file("results/answers_cpu.json").read_text(encoding="utf8"))
    assert record["command"].startswith("python -m qstar.answers --out data/results/")
    sample = parents_sample(record["samples"]["policy"], record["samples"]["teacher"])
    assert solve_sample(sample).alpha == pytest.approx(record["alpha"], abs=1e-4)
    for run in record["runs"]["importance"]:
        assert not any(run["resampled"])
        total = np.logaddexp.reduce(run["log_correction"]) - math.log(record["num_particles"])
        assert run["log_partition"] == pytest.approx(total, abs=1e-5)


def test_the_command_refuses_draws_that_do_not_fill_batches(capsys):
    draws = ["--draws", "10", "--particles", "16"]
    assert main(["record", "answers", "--out", "x.json", *draws]) == 2
    assert "--draws must be a positive multiple of --particles" in capsys.readouterr().err
