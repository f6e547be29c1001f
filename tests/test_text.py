"""Text in and out: chats with a system prompt for each parent, stop strings, streams."""

import re
import threading
from pathlib import Path

import pytest
import tiny
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from qstar import decode
from qstar.models import chat_ids
from qstar.text import OptimalSpeculativeDecoder

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
CHAT = [{"role": "user", "content": "why"}]


def bytes_tokenizer(*, template=TEMPLATE, swapped=False):
    """A token for each byte, so that a character may take several, and most texts are broken."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if swapped:
        alphabet[:2] = alphabet[1::-1]
    backend = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, chat_template=template, clean_up_tokenization_spaces=False
    )


TOKENIZER = bytes_tokenizer()


def pair(*, teacher_vocab=256):
    policy = tiny.llama(1, vocab=256, sharpness=2.0, window=128)
    return policy, tiny.gpt2(4, vocab=teacher_vocab, sharpness=0.7, window=128)


def decoder(**options):
    defaults = {"tokenizer": TOKENIZER, "max_new_tokens": 40, "eos_token_id": None, "generator": 0}
    return OptimalSpeculativeDecoder(*pair(), **defaults | {"scheme": "alternating"} | options)


def test_it_is_generate_with_the_ids_of_each_parents_text():
    whole = decoder().complete(CHAT, system="a poet", teacher_system="a judge")
    ids = [chat_ids(TOKENIZER, CHAT, system=system) for system in ("a poet", "a judge")]
    assert [TOKENIZER.decode(row) for row in ids] == [
        "<system>a poet<user>why<assistant>",
        "<system>a judge<user>why<assistant>",
    ]
    own = decode.generate(*pair(), *ids, **decoder().options)
    assert whole.generation.tokens.tolist() == own.tokens.tolist()
    assert whole.text == TOKENIZER.decode(own.tokens)
    assert decoder()(*ids).tokens.tolist() == own.tokens.tolist()


@pytest.mark.parametrize("options", [{}, {"teacher_system": ""}, {"teacher_prompt": "otherwise"}])
def test_the_teacher_reads_what_the_policy_reads_unless_told(options):
    expected = {
        (): chat_ids(TOKENIZER, CHAT, system="a poet"),
        ("teacher_system",): chat_ids(TOKENIZER, CHAT),
        ("teacher_prompt",): torch.tensor(TOKENIZER("otherwise").input_ids),
    }[tuple(options)]
    if "teacher_prompt" in options:
        options = options | {"teacher_system": ""}
    out = decoder().complete(CHAT, system="a poet", **options).generation
    ids = chat_ids(TOKENIZER, CHAT, system="a poet"), expected
    assert out.tokens.tolist() == decoder().generate(*ids).tokens.tolist()


def test_a_text_is_continued_as_it_stands():
    out = decoder().complete("once", max_new_tokens=5)
    ids = torch.tensor(TOKENIZER("once").input_ids)
    assert out.generation.tokens.tolist() == decoder()(ids, max_new_tokens=5).tokens.tolist()


def test_pieces_make_the_whole_text_whatever_bytes_come():
    for seed in range(5):
        whole = decoder(generator=seed).complete("é中").text
        pieces = list(decoder(generator=seed).stream("é中"))
        assert "".join(pieces) == whole
        assert len(pieces) > 3


def test_a_character_is_held_back_until_it_is_whole():
    """A policy that spells one text byte by byte, whatever it reads."""
    text = "né中!"
    codes = TOKENIZER(text).input_ids
    assert len(codes) > len(text)

    def spell(ids, scores):
        at = ids.shape[-1] - 1
        return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([codes[at]]), 0.0)

    options = {"logits_processor": [spell], "max_new_tokens": len(codes), "scheme": "plain"}
    assert list(decoder(**options).stream("x")) == list(text)


@pytest.mark.parametrize("scheme", [{"scheme": "plain"}, {"scheme": "one-sided", "gamma": 8}])
def test_a_stop_string_ends_the_text(scheme):
    scheme = scheme | {"greedy": True}
    freely = decoder(**scheme).complete("x").text
    string = next(
        freely[i : i + 2]
        for i in range(4, 30)
        if freely[i : i + 2].isascii() and freely[i : i + 2].isprintable()
    )
    out = decoder(**scheme).complete("x", stop=[string])
    assert out.text == freely[: freely.index(string) + 2]
    assert "".join(decoder(**scheme).stream("x", stop=[string])) == out.text
    with pytest.raises(ValueError, match="stop holds strings, in a list"):
        decoder().complete("x", stop=string)


def test_a_stream_that_is_left_ends_its_thread():
    reached = []
    stream = decoder(scheme="plain", on_tokens=reached.append).stream("x", max_new_tokens=120)
    next(stream)
    stream.close()
    assert "qstar-stream" not in {thread.name for thread in threading.enumerate()}
    assert 1 <= len(reached) < 120


def test_what_fails_in_the_thread_is_raised_where_the_text_is_read():
    policy, teacher = pair()
    policy.get_output_embeddings().weight.data[3] = torch.nan
    broken = OptimalSpeculativeDecoder(policy, teacher, tokenizer=TOKENIZER, max_new_tokens=4)
    with pytest.raises(ValueError, match="the policy answers nan at new token 0"):
        list(broken.stream("x"))


def test_the_padding_of_output_layers_is_left_out():
    """The teacher has 8 ids more than the tokenizer knows."""
    models_ = pair(teacher_vocab=264)
    padded = OptimalSpeculativeDecoder(*models_, tokenizer=TOKENIZER, max_new_tokens=5)
    assert padded.options["vocab"] == 256
    assert padded.complete("x").generation.lengths == 5
    with pytest.raises(ValueError, match="pass vocab=len"):
        OptimalSpeculativeDecoder(*models_, max_new_tokens=5)(torch.tensor([1]))


def test_what_makes_no_sense_is_refused():
    policy, teacher = pair()
    with pytest.raises(ValueError, match="their vocabularies differ"):
        OptimalSpeculativeDecoder(
            policy,
            teacher,
            tokenizer=TOKENIZER,
            teacher_tokenizer=bytes_tokenizer(swapped=True),
        )
    with pytest.raises(TypeError, match=r"no option gama; it has .*gamma"):
        decoder(gama=3)
    for call in (decoder().complete, decoder().stream):
        with pytest.raises(TypeError, match="no option gama"):
            call("x", gama=3)
        with pytest.raises(ValueError, match="a system prompt goes before messages"):
            call("x", system="a poet")
    with pytest.raises(ValueError, match="text needs a tokenizer"):
        decoder(tokenizer=None).complete("x")
    with pytest.raises(ValueError, match="no chat template"):
        decoder(tokenizer=bytes_tokenizer(template=None)).complete(CHAT)


def test_the_readmes_snippet_runs_as_it_stands(capsys):
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf8")
    snippet = re.findall(r"```python\n(.*?)```", readme, re.S)[1]
    policy, teacher = pair()
    ids = torch.tensor([65, 66, 67])
    given = {"policy": policy, "teacher": teacher, "tokenizer": TOKENIZER, "messages": CHAT}
    given |= {"policy_ids": ids, "teacher_ids": ids[1:], "inputs": {"input_ids": ids[None]}}
    exec(snippet, given)
    assert given["result"].tokens.shape == (40,)
    assert capsys.readouterr().out
