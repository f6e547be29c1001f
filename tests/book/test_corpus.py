"""A recorded text is what it says, and scoring it is what decoding it saw."""

import pytest
import tiny
import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from qstar.adapters import checkpoints
from qstar.decoding import generate as decode
from qstar_book import shipped_model
from qstar_book.records import corpus as experiments

WORDS = ["who", "what", "you", "are", "kind", "stern", ".", "say"]
PROMPTS = [
    experiments.Prompt("you are kind", "you are stern", "who"),
    experiments.Prompt("you are kind .", "you are stern .", "what"),
    experiments.Prompt("kind", "stern", "who"),
]


@pytest.fixture(scope="module")
def tokenizer():
    backend = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    template = "{% for m in messages %}{{ m['content'] }} . {% endfor %}say"
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template)


@pytest.fixture(scope="module")
def model():
    return tiny.llama(3, vocab=len(WORDS), eos=6)


@pytest.fixture(scope="module")
def corpus(model, tokenizer):
    return experiments.draw("tiny", model, tokenizer, PROMPTS, max_new_tokens=9, seed=4)


def test_an_answer_is_what_its_seed_draws(corpus, model, tokenizer):
    for i, answer in enumerate(corpus.continuations):
        prompt = answer.prompt
        assert prompt == PROMPTS[i]
        result = decode.generate(
            model,
            model,
            checkpoints.chat_ids(tokenizer, prompt.user, system=prompt.policy_system),
            checkpoints.chat_ids(tokenizer, prompt.user, system=prompt.teacher_system),
            max_new_tokens=9,
            scheme="plain",
            generator=4 + i,
        )
        assert list(answer.tokens) == result.tokens[: int(result.lengths)].tolist()
        assert answer.text == tokenizer.decode(answer.tokens)


def test_a_corpus_survives_its_file(corpus, tmp_path):
    experiments.write_corpus(corpus, tmp_path / "corpus.json")
    assert experiments.read_corpus(tmp_path / "corpus.json") == corpus
    assert [path.name for path in tmp_path.iterdir()] == ["corpus.json"]


def test_scoring_sees_what_decoding_saw(corpus, model, tokenizer):
    seen = []
    for i, prompt in enumerate(PROMPTS):
        result = decode.generate(
            model,
            model,
            checkpoints.chat_ids(tokenizer, prompt.user, system=prompt.policy_system),
            checkpoints.chat_ids(tokenizer, prompt.user, system=prompt.teacher_system),
            max_new_tokens=9,
            scheme="plain",
            generator=4 + i,
        )
        seen.append(result.trace.alpha[: int(result.lengths)])
    scored = experiments.score(model, tokenizer, corpus)
    pair = scored["two system prompts"]
    torch.testing.assert_close(pair.alpha, torch.cat(seen), rtol=0, atol=1e-9)
    # The parents' roles: a sharper teacher is nearer the mode, so the policy's exponent grows.
    assert all(len(trace.alpha) == len(pair.alpha) for trace in scored.values())
    assert not torch.allclose(scored["two questions"].alpha, pair.alpha)
    cold, colder = (scored[f"temperatures 1 and {t:g}"] for t in experiments.TEMPERATURES)
    assert (colder.balance.chernoff > cold.balance.chernoff).all()


def test_the_recorded_answers_are_of_the_shipped_model():
    """The file in data/: made by its command from the prompts beside it."""
    recorded = experiments.read_corpus(experiments.data_file("continuations.json"))
    assert recorded.model == shipped_model.DEFAULT
    prompts = experiments.read_prompts(experiments.data_file("prompts.json"))
    assert [answer.prompt for answer in recorded.continuations] == prompts
    assert all(0 < len(a.tokens) <= recorded.max_new_tokens for a in recorded.continuations)
    if not (shipped_model.cache_folder() / shipped_model.DEFAULT).is_dir():
        pytest.skip("the shipped model is not in the cache: `qstar-book fetch`")
    _, tokenizer = shipped_model.load(shipped_model.DEFAULT)
    for answer in recorded.continuations:
        assert tokenizer.decode(answer.tokens) == answer.text


def test_a_missing_record_says_where_it_was_sought(tmp_path, monkeypatch):
    """Also where a folder data/ of somebody else's lies where one works."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "nothing.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no record nothing\.json in .*data.*checkout"):
        experiments.data_file("nothing.json")
