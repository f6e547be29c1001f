"""Text in and out: chats with a system prompt for each parent, stop strings, streams."""

import itertools
import random
import re
import threading
import warnings
from pathlib import Path

import pytest
import tiny
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers_of_all_kinds import KINDS, llama_like
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from qstar.adapters import checkpoints
from qstar.adapters.chat import (
    OptimalSpeculativeDecoder,
    _StopInText,
)
from qstar.adapters.checkpoints import chat_ids
from qstar.adapters.pieces import LOOSE, Pieces, PieceStreamer, new_text
from qstar.decoding import generate as decode

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
    own = decode.generate(*pair(), *ids, sampling=decoder().sampling, generator=0)
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


# Text from tokens, with tokenizers of every kind.


@pytest.fixture(params=KINDS)
def tokenizer(request):
    return KINDS[request.param]()


def chopped(tokens, chance):
    """The same in chunks, as rounds bring them."""
    while tokens:
        size = chance.choice([1, 1, 2, 5])
        yield tokens[:size]
        tokens = tokens[size:]


def piecewise(tokenizer, context, tokens, chance, **options):
    pieces = Pieces(tokenizer, context, **options)
    return [*(pieces.put(chunk) for chunk in chopped(tokens, chance)), pieces.rest()]


def random_texts(tokenizer, chance, trials):
    """Few tokens often, so that bytes make characters and marks meet spaces."""
    for _ in range(trials):
        pool = chance.sample(range(len(tokenizer)), chance.choice([3, 6, 20]))
        pool.append(tokenizer.eos_token_id)
        context = chance.choices(pool, k=chance.choice([0, 1, 5, 100]))
        yield context, chance.choices(pool, k=chance.choice([5, 30, 150]))


@pytest.mark.parametrize("skip", [True, False])
def test_pieces_join_to_the_text_decoded_whole(tokenizer, skip):
    chance = random.Random(0)
    for context, tokens in random_texts(tokenizer, chance, 30):
        pieces = piecewise(tokenizer, context, tokens, chance, skip_special_tokens=skip)
        whole = tokenizer.decode(context + tokens, skip_special_tokens=skip)
        before = tokenizer.decode(context, skip_special_tokens=skip)
        joined = "".join(pieces)
        assert joined == new_text(tokenizer, context, tokens, skip_special_tokens=skip)
        if whole.startswith(before):
            assert before + joined == whole


def test_pieces_without_what_stands_before_are_another_text(tokenizer):
    """A control: what decoding the new tokens alone would do to a sentence."""
    context, tokens = tokenizer("the cat").input_ids, tokenizer(" sat on it").input_ids
    if tokenizer.decode(tokens).startswith(" "):
        return  # byte-level: a token has its space in it
    text = new_text(tokenizer, context, tokens, skip_special_tokens=True)
    assert text == " " + tokenizer.decode(tokens)


@pytest.mark.parametrize("context", [[], "the cat sat " * 200])
def test_a_piece_costs_the_same_however_long_the_text_is(tokenizer, context):
    context = tokenizer(context).input_ids if context else []
    tokens = tokenizer("the cat sat on it . " * 100).input_ids
    pieces = Pieces(tokenizer, context)
    widths = []
    for token in tokens:
        pieces.put([token])
        widths.append(len(pieces._window))
    assert max(widths) < 150 < len(tokens)


def test_a_run_of_byte_tokens_is_given_once_it_has_ended():
    """One bad byte spoils the characters before it, as this kind of tokenizer decodes."""
    tokenizer = llama_like()
    run = [tokenizer.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in "é中".encode()]
    the = tokenizer.convert_tokens_to_ids("▁the")
    for tokens, said in [
        (run, ["é中"]),
        (run[:-1], ["\N{REPLACEMENT CHARACTER}" * 4]),
        ([the, *run, the], ["the", "é中 the"]),
    ]:
        pieces = Pieces(tokenizer)
        given = [*(pieces.put([token]) for token in tokens), pieces.rest()]
        assert [piece for piece in given if piece] == said


def test_what_a_tokenizer_may_clean_up_later_is_held_back():
    """Every text of five of these characters, and every way to break it in two."""
    clean = lambda text: PreTrainedTokenizerBase.clean_up_tokenization(None, text)  # noqa: E731
    for characters in itertools.product(" n'tv.", repeat=5):
        text = "".join(characters)
        for end in range(1, 5):
            assert clean(text).startswith(clean(LOOSE.sub("", text[:end])))
    assert not clean("do n't").startswith(clean("do n")), "the control does nothing"


def spelling(tokens, read):
    """A processor by which a model writes these tokens, whatever it thinks."""

    def spell(ids, scores):
        only = torch.tensor([tokens[ids.shape[-1] - read]])
        return torch.full_like(scores, -torch.inf).index_fill(1, only, 0.0)

    return spell


def told(tokenizer, prompt, tokens, **options):
    """(text, pieces) where two models write these tokens after the prompt."""
    sizes = {"vocab": len(tokenizer), "window": 512}
    pair_ = tiny.llama(1, **sizes), tiny.gpt2(4, **sizes)
    two = OptimalSpeculativeDecoder(*pair_, tokenizer=tokenizer, eos_token_id=None)
    read = prompt if isinstance(prompt, str) else TEMPLATE_TEXT
    read = len(tokenizer(read).input_ids)
    options |= {"max_new_tokens": len(tokens), "scheme": "one-sided", "gamma": 3}
    options["logits_processor"] = [spelling(tokens, read)]
    done = two.complete(prompt, **options)
    return done, list(two.stream(prompt, **options))


TEMPLATE_TEXT = "the cat"


@pytest.mark.parametrize("skip", [True, False])
def test_a_continuation_is_written_behind_the_prompt_as_it_is(tokenizer, skip):
    tokens = tokenizer("the cat sat on it . we don't do it !").input_ids[2:]
    tokens.insert(3, tokenizer.eos_token_id)
    prompt = tokenizer("the cat").input_ids
    done, pieces = told(tokenizer, "the cat", tokens, skip_special_tokens=skip)
    whole = tokenizer.decode(prompt + tokens, skip_special_tokens=skip)
    assert tokenizer.decode(prompt) + done.text == whole
    assert "".join(pieces) == done.text
    assert len(pieces) > 3
    assert skip == ("<end>" not in done.text)


def test_the_answer_in_a_chat_is_a_text_of_its_own(tokenizer):
    """Without the space before its first word: it may be put into a message."""
    tokenizer.chat_template = "{{ messages[0].content }}"
    tokens = tokenizer("we sat on it").input_ids
    done, pieces = told(tokenizer, [{"role": "user", "content": TEMPLATE_TEXT}], tokens)
    assert done.text == tokenizer.decode(tokens) == "".join(pieces)
    assert not done.text.startswith(" ")


@pytest.mark.parametrize("stop", [["on"], ["zz", "at on", "n"], [" sat"]])
def test_a_text_ends_right_behind_its_first_stop_string(tokenizer, stop):
    """Wherever its last token ends, and though the prompt holds the string too."""
    tokens = tokenizer("the cat sat on it .").input_ids[2:]
    freely = told(tokenizer, "the cat", tokens)[0].text
    end = min(freely.index(s) + len(s) for s in stop if s in freely)
    done, pieces = told(tokenizer, "the cat", tokens, stop=stop)
    assert done.text == freely[:end] == "".join(pieces)
    assert int(done.generation.lengths) < len(tokens) or end == len(freely)


def test_a_stop_string_may_come_in_parts_and_far_behind(tokenizer):
    """Past the tokens that are decoded again, and across them."""
    text = "the cat sat on it . " * 40 + "x we"
    tokens = tokenizer(text).input_ids
    whole = tokenizer.decode(tokens)
    criterion = _StopInText(["x we"], Pieces(tokenizer), 0)
    asked = (criterion(torch.tensor([tokens[:n]]), None) for n in range(1, len(tokens) + 1))
    stopped = next(n for n, found in enumerate(asked, 1) if found)
    assert "x we" in tokenizer.decode(tokens[:stopped])
    assert "x we" not in tokenizer.decode(tokens[: stopped - 1])
    assert "x we" in whole


@pytest.mark.parametrize("continues", [True, False])
def test_a_streamer_of_transformers_own_generate_gives_the_same_text(tokenizer, continues):
    model = tiny.llama(1, vocab=len(tokenizer), window=128)
    ids = torch.tensor([tokenizer("the cat").input_ids])
    streamer = PieceStreamer(tokenizer, continues=continues, timeout=60)
    torch.manual_seed(0)
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        streamer=streamer,
        do_sample=True,
        max_new_tokens=20,
    )[0].tolist()
    whole = tokenizer.decode(out, skip_special_tokens=True)
    alone = tokenizer.decode(out[ids.shape[1] :], skip_special_tokens=True)
    before = tokenizer.decode(ids[0])
    assert "".join(streamer) == (whole[len(before) :] if continues else alone)


# Where a text ends, and its thread.


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


@pytest.mark.parametrize("error", [SystemExit("enough"), KeyboardInterrupt(), StopAsyncIteration()])
def test_whatever_ends_the_thread_is_raised_where_the_text_is_read(error):
    def leave(tokens):
        raise error

    with pytest.raises(type(error)):
        list(decoder(on_tokens=leave).stream("x"))
    assert "qstar-stream" not in {thread.name for thread in threading.enumerate()}


def test_two_streams_at_once_give_what_each_gives_alone():
    two = decoder(scheme="one-sided", gamma=2)
    alone = [two.complete("x", generator=seed).text for seed in (1, 2)]
    streams = [two.stream("x", generator=seed) for seed in (1, 2)]
    given = ["", ""]
    for pieces in itertools.zip_longest(*streams, fillvalue=""):
        given = [text + piece for text, piece in zip(given, pieces, strict=True)]
    assert given == alone
    assert alone[0] != alone[1]


def test_a_stream_computes_in_the_precision_of_its_caller():
    """autocast is a matter of the thread."""
    two = decoder(greedy=True, scheme="plain", max_new_tokens=12)
    for model in (two.policy, two.teacher):
        model.float()
    freely = two.complete("x").generation
    with torch.autocast("cpu", dtype=torch.bfloat16):
        whole = two.complete("x")
        assert "".join(two.stream("x")) == whole.text
    coarse = whole.generation.trace.balance.alpha
    assert not torch.equal(coarse, freely.trace.balance.alpha), "autocast does nothing"


def test_a_stream_that_nobody_reads_starts_no_thread():
    before = threading.active_count()
    stream = decoder().stream("x")
    assert threading.active_count() == before
    stream.close()


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
    assert padded.sampling.vocab == 256
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
    with pytest.raises(TypeError, match=r"no option 'gama'\. Did you mean 'gamma'"):
        decoder(gama=3)
    for call in (decoder().complete, decoder().stream):
        with pytest.raises(TypeError, match=r"no option 'gama'\. Did you mean 'gamma'"):
            call("x", gama=3)
        with pytest.raises(ValueError, match="a system prompt goes before messages"):
            call("x", system="a poet")
    for wrong in ([""], [3], ["x", ""]):
        with pytest.raises(ValueError, match=r"of at least one character: got (''|3)\."):
            decoder().stream("x", stop=wrong)
    with pytest.raises(ValueError, match="text needs a tokenizer"):
        decoder(tokenizer=None).complete("x")
    with pytest.raises(ValueError, match="no chat template"):
        decoder(tokenizer=bytes_tokenizer(template=None)).complete(CHAT)


# What each parent reads.

DROPS = (
    "{% for m in messages %}{% if m.role != 'system' %}{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}:{% endif %}"
)


@pytest.mark.filterwarnings("ignore:the chat template drops the system turn")
def test_parents_that_are_to_read_different_texts_and_do_not_are_named():
    two = decoder(tokenizer=bytes_tokenizer(template=DROPS), max_new_tokens=2)
    for call in (two.complete, two.stream):
        with pytest.warns(UserWarning, match="policy and teacher read the same text, though"):
            call(CHAT, system="a poet", teacher_system="a judge")
        with pytest.warns(UserWarning, match="policy and teacher read the same text, though"):
            call(CHAT, teacher_prompt=[{"role": "assistant", "content": "why"}])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        two.complete(CHAT)
        two.complete(CHAT, teacher_prompt=[{"role": "user", "content": "what"}])
        two.complete("x", teacher_prompt="x", teacher_system="")


def test_the_readmes_snippets_run_as_they_stand(capsys, monkeypatch):
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf8")
    text, tokens = re.findall(r"```python\n(.*?)```", readme, re.S)[1:]
    assert len([line for line in text.splitlines() if line]) <= 10
    policy, teacher = pair()
    loaded = iter([(policy, TOKENIZER), (teacher, bytes_tokenizer())])
    monkeypatch.setattr(checkpoints, "load", lambda name: next(loaded))
    given: dict = {}
    exec(text, given)
    assert capsys.readouterr().out
    exec(tokens, given)
    assert given["result"].tokens.shape == (40,)
