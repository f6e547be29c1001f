"""A cache changes no distribution: against forwards over the whole text, after random scripts."""

import numpy as np
import pytest
import tiny
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from qstar.decoding import kv_cache
from qstar.decoding.generate import generate
from qstar.decoding.kv_cache import KVCache

VOCAB = 7
SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.5,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


def made(model_class, config, dtype=torch.float64):
    torch.manual_seed(0)
    return model_class(config).to(dtype).eval()


def opt():
    wanted = {key: SMALL[key] for key in ("vocab_size", "hidden_size", "num_hidden_layers")}
    config = OPTConfig(
        **wanted,
        num_attention_heads=4,
        ffn_dim=24,
        word_embed_proj_dim=16,
        max_position_embeddings=256,
        init_std=0.5,
        dropout=0.0,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
    )
    return made(OPTForCausalLM, config)


FAMILIES = {
    "Llama": lambda: tiny.llama(1, window=256),
    "GPT-2": lambda: tiny.gpt2(2, window=256, sharpness=0.3),
    "Qwen2": lambda: made(Qwen2ForCausalLM, Qwen2Config(**SMALL)),
    "OPT": opt,
}

SLIDING = {
    "Mistral": lambda: made(MistralForCausalLM, MistralConfig(**SMALL, sliding_window=6)),
    "Gemma 2": lambda: made(Gemma2ForCausalLM, Gemma2Config(**SMALL, head_dim=4, sliding_window=6)),
    "Gemma 3": lambda: made(
        Gemma3ForCausalLM,
        Gemma3TextConfig(
            **SMALL,
            head_dim=4,
            sliding_window=6,
            layer_types=["sliding_attention", "full_attention"],
        ),
    ),
}


EXACT = 1e-12
ROUNDED = 1e-4  # in float32

ATTENTION = {  # eager attention works in float32 inside, whatever the weights are
    "sdpa": (torch.float64, EXACT),
    "eager": (torch.float32, ROUNDED),
}


@pytest.fixture(params=ATTENTION)
def attention(request):
    return request.param


def attending(model, attention):
    """The model with this attention, and how exact it can be; skips what does not exist."""
    dtype, atol = ATTENTION[attention]
    if attention == "sdpa" and isinstance(model, Gemma2ForCausalLM):
        pytest.skip("Gemma 2 has eager attention only")
    model.set_attn_implementation(attention)
    return model.to(dtype), atol


def whole(model, text):
    """log p(. | the first 1, 2, ... tokens of a text), by one forward without a cache."""
    with torch.no_grad():
        logits = model(torch.tensor([text]), use_cache=False).logits[0]
    return torch.log_softmax(logits.double(), dim=-1)


class Script:
    """Feeds a reader at random, remembers what each row has read, and checks every distribution."""

    def __init__(self, model, prompts, seed, *, atol=EXACT, implementation="dynamic"):
        self.model, self.atol = model, atol
        self.rng = np.random.default_rng(seed)
        self.reader = KVCache(model, implementation=implementation)
        self.read = [list(prompt[:-1]) for prompt in prompts]
        self.unread = [[prompt[-1]] for prompt in prompts]
        self.reader.start(prompts)
        self.worst = 0.0

    def tokens(self, count):
        return self.rng.integers(0, VOCAB, size=count).tolist()

    def feed(self, counts):
        """Each row reads its unread tokens and as many drafts; all that it gives is checked."""
        rows, widest = len(self.read), max(counts)
        drafts = torch.tensor(self.tokens(rows * widest), dtype=torch.long).reshape(rows, widest)
        distributions = self.reader.feed(self.unread, drafts, counts, positions=widest + 1)
        assert torch.isfinite(distributions).all()  # where only padding is seen, too
        for row, count in enumerate(counts):
            self.read[row] += self.unread[row]
            here = len(self.read[row])
            self.read[row] += drafts[row, :count].tolist()
            if here:
                expected = whole(self.model, self.read[row])[here - 1 :]
                gap = (distributions[row, : count + 1].double() - expected).abs().max()
                self.worst = max(self.worst, float(gap))
        assert self.reader.lengths == [len(read) for read in self.read]
        self.unread = [self.tokens(self.rng.integers(1, 3)) for _ in range(rows)]
        assert self.worst < self.atol

    def take_back(self, cuts):
        """Rows forget their last tokens, though never all."""
        keep = [max(1, len(read) - cut) for read, cut in zip(self.read, cuts, strict=True)]
        self.read = [read[:length] for read, length in zip(self.read, keep, strict=True)]
        self.reader.truncate(keep)
        assert self.reader.lengths == keep

    def select(self, rows):
        self.reader.select(rows)
        self.read = [self.read[row] for row in rows]
        self.unread = [self.unread[row] for row in rows]


def play(script, rounds, *, most_drafts=4, select=True):
    for turn in range(rounds):
        rows = len(script.read)
        counts = script.rng.integers(0, most_drafts + 1, size=rows).tolist()
        script.feed(counts)
        script.take_back([script.rng.integers(0, count + 1) for count in counts])
        if select and rows > 2 and turn % 4 == 3:
            script.select(sorted(script.rng.permutation(rows)[:-1].tolist()))


def reject_all_but_one(script, rounds):
    for turn in range(rounds):
        script.feed([4, 4, 4])
        script.take_back([0 if row == turn % 3 else 6 for row in range(3)])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("implementation", ["dynamic", "static"])
def test_the_cache_changes_no_distribution(implementation, family, attention, seed):
    model, atol = attending(FAMILIES[family](), attention)
    prompts = [[3], [1, 4, 0, 2, 2], [5, 6], [0, 0, 1, 2, 3, 4, 5, 6]]
    play(Script(model, prompts, seed, atol=atol, implementation=implementation), 12)


@pytest.mark.parametrize("implementation", ["dynamic", "static"])
@pytest.mark.parametrize("family", ["Llama", "GPT-2"])
def test_holes_are_squeezed_out_and_ends_are_cut_off(family, implementation, monkeypatch):
    """One row rejects everything, another nothing: the worst that can happen to a cache."""
    reached = {"squeeze": 0}
    real = KVCache._squeeze

    def squeeze(self):
        reached["squeeze"] += 1
        real(self)

    monkeypatch.setattr(KVCache, "_squeeze", squeeze)
    monkeypatch.setattr(kv_cache, "SQUEEZE_FROM", 8)
    prompts = [[3], [1, 4, 0, 2, 2], [6, 6]]
    script = Script(FAMILIES[family](), prompts, 0, implementation=implementation)
    crops, widest = 0, 0
    for turn in range(25):
        winner = turn % 3
        script.feed([4, 4, 4])
        before = script.reader._slots.shape[-1]
        script.take_back([0 if row == winner else 6 for row in range(3)])
        if turn % 5 == 4:
            script.take_back([2, 2, 2])
        crops += script.reader._slots.shape[-1] < before
        widest = max(widest, script.reader._slots.shape[-1] / max(script.reader.lengths))
    assert reached["squeeze"] > 0
    assert crops > 0
    assert widest <= 2 + 6 / 8


def test_a_single_row_never_leaves_a_hole():
    script = Script(FAMILIES["Llama"](), [[1, 4, 0]], 1)
    for _ in range(20):
        count = int(script.rng.integers(0, 5))
        script.feed([count])
        script.take_back([int(script.rng.integers(0, count + 1))])
        assert script.reader._slots.all()
        assert script.reader._slots.shape[-1] == script.reader.lengths[0]


@pytest.mark.filterwarnings("ignore::qstar.decoding.generate.EqualParentsWarning")
def test_eager_attention_in_float64_answers_nan_for_padding_and_is_read_without():
    """transformers casts the mask's most negative float64 to float32: a row of padding is nan."""
    model = tiny.llama(1)
    model.set_attn_implementation("eager")
    prompts = [torch.tensor([3]), torch.tensor([1, 4, 0])]
    with pytest.warns(UserWarning, match="is read anew for every token"):
        out = generate(model, model, prompts, max_new_tokens=2, greedy=True, eos_token_id=None)
    for prompt, tokens in zip(prompts, out.tokens.tolist(), strict=True):
        assert tokens[0] == int(whole(model, prompt.tolist())[-1].argmax())
    generate(model, model, prompts[1], max_new_tokens=2, one_call=False)  # one row: no padding


@pytest.mark.parametrize("implementation", ["dynamic", "static"])
def test_everything_can_be_taken_back(implementation):
    model = FAMILIES["Llama"]()
    read = KVCache(model, implementation=implementation)
    read.start([[1, 2, 3], [4, 5]])
    read.truncate([0, 0])
    assert read.lengths == [0, 0]
    distributions = read.feed([[6, 5], [0]])
    for row, text in enumerate(([6, 5], [0])):
        torch.testing.assert_close(
            distributions[row, 0], whole(model, text)[-1], rtol=0, atol=EXACT
        )


@pytest.mark.parametrize("implementation", ["dynamic", "static"])
@pytest.mark.parametrize("width", [1, 2, 3, 7])
def test_a_long_prompt_is_read_in_pieces(width, implementation, monkeypatch):
    monkeypatch.setattr(kv_cache, "PREFILL_WIDTH", width)
    model = FAMILIES["Llama"]()
    prompts = [[3], [1, 4, 0, 2, 2, 6, 6, 1], [5, 6, 0]]
    read = KVCache(model, implementation=implementation)
    assert read.start(prompts) == -(-7 // width)
    distributions = read.feed([[prompt[-1]] for prompt in prompts])
    for row, prompt in enumerate(prompts):
        torch.testing.assert_close(
            distributions[row, 0], whole(model, prompt)[-1], rtol=0, atol=EXACT
        )


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, ROUNDED), (torch.bfloat16, 0.5)])
@pytest.mark.parametrize("family", ["Llama", "GPT-2"])
def test_narrow_weights_are_read_alike_up_to_rounding(family, dtype, atol, attention):
    model = attending(FAMILIES[family](), attention)[0].to(dtype)
    for implementation in ("static", "dynamic"):
        prompts = [[3], [1, 4, 0, 2, 2]]
        script = Script(model, prompts, 2, atol=atol, implementation=implementation)
        play(script, 8, select=False)
    distributions = script.reader.feed(script.unread)
    assert distributions.dtype == torch.float32


@pytest.mark.parametrize("family", SLIDING)
def test_a_sliding_window_is_read_past_its_end_by_a_single_row(family, attention):
    model, atol = attending(SLIDING[family](), attention)
    script = Script(model, [[1, 4, 0]], 3, atol=atol)
    play(script, 10, select=False)
    assert len(script.read[0]) > 12


@pytest.mark.parametrize("family", SLIDING)
def test_a_sliding_window_is_read_past_its_end_by_rows_of_prompts_of_any_length(family, attention):
    """Padding on the left is no hole: plain decoding of a ragged batch."""
    model, atol = attending(SLIDING[family](), attention)
    script = Script(model, [[1, 4, 0], [2], [6, 6, 5, 0, 1]], 3, atol=atol)
    for _ in range(12):
        script.unread = [tokens[:1] for tokens in script.unread]
        script.feed([0, 0, 0])


@pytest.mark.parametrize("family", SLIDING)
def test_holes_before_the_end_of_a_sliding_window_are_refused(family):
    model = SLIDING[family]()
    script = Script(model, [[1, 4, 0], [2, 2, 1]], 3)
    with pytest.raises(ValueError, match="sees only its last 6 tokens, counted in cache slots"):
        play(script, 10, select=False)


@pytest.mark.parametrize("family", SLIDING)
def test_every_scheme_decodes_one_row_past_a_sliding_window(family):
    model, other = SLIDING[family](), FAMILIES["Llama"]()
    prompt = torch.tensor([1, 4, 0])
    options = {"max_new_tokens": 20, "greedy": True, "eos_token_id": None}
    texts = [
        generate(model, other, prompt, scheme=scheme, **options).tokens.tolist()
        for scheme in ("plain", "one-sided", "alternating", "lookup")
    ]
    assert texts == texts[:1] * 4


@pytest.mark.parametrize("family", SLIDING)
def test_a_sliding_window_has_no_static_cache(family):
    model = SLIDING[family]()
    assert not KVCache(model).static
    with pytest.raises(ValueError, match="cannot be read from a static cache: not all its layers"):
        KVCache(model, implementation="static")


def test_a_recurrent_state_is_refused():
    config = MambaConfig(
        vocab_size=VOCAB, hidden_size=16, num_hidden_layers=1, state_size=4, expand=2
    )
    model = made(MambaForCausalLM, config)
    with pytest.raises(ValueError, match=r"the teacher \(MambaForCausalLM\) keeps"):
        KVCache(model, name="teacher")


def test_an_encoder_is_refused():
    config = T5Config(
        vocab_size=VOCAB, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2,
        decoder_start_token_id=0,
    )  # fmt: skip
    with pytest.raises(ValueError, match="must be a decoder-only language model"):
        KVCache(made(T5ForConditionalGeneration, config), name="policy")


def test_the_memory_is_what_the_formula_says():
    model = FAMILIES["Llama"]()
    read = KVCache(model)
    read.start([[1, 2, 3, 4], [5, 6, 0, 1]])
    read.feed([[1, 2], [3, 4]])
    heads, size, layers, length, rows = 2, 4, 2, 5, 2
    assert read.cache_bytes == 2 * layers * heads * size * 8 * length * rows


# What the tests above would catch.


def test_a_squeeze_that_mixes_rows_up_is_caught(monkeypatch):
    def squeeze(self):
        longest = max(self.lengths)
        order = self._slots.int().argsort(dim=-1, stable=True)[:1, -longest:]
        self._slots = self._slots.gather(-1, order.expand(len(self._slots), -1))
        for layer in self._cache.layers:
            for name in ("keys", "values"):
                tensor = getattr(layer, name)
                setattr(layer, name, tensor[:, :, order[0]])

    monkeypatch.setattr(KVCache, "_squeeze", squeeze)
    monkeypatch.setattr(kv_cache, "SQUEEZE_FROM", 8)
    script = Script(FAMILIES["Llama"](), [[3], [1, 4, 0, 2, 2], [6, 6]], 0)
    with pytest.raises(AssertionError):
        reject_all_but_one(script, 25)


def test_a_truncation_that_keeps_the_last_tokens_is_caught(monkeypatch):
    def truncate(self, lengths):
        self.lengths = [min(pair) for pair in zip(self.lengths, lengths, strict=True)]
        rank = self._slots.flip(-1).cumsum(-1).flip(-1)
        self._slots = self._slots & (rank <= torch.tensor(self.lengths).unsqueeze(-1))

    monkeypatch.setattr(KVCache, "truncate", truncate)
    with pytest.raises(AssertionError):
        play(Script(FAMILIES["Llama"](), [[3], [1, 4, 0, 2, 2]], 0), 8)


@pytest.mark.parametrize("family", SLIDING)
def test_auto_leaves_batches_that_outgrow_a_sliding_window_plain(family):
    model, other = SLIDING[family]().float(), FAMILIES["Llama"]().float()
    prompts = [torch.tensor([1, 4, 0]), torch.tensor([2])]
    made = generate(model, other, prompts, max_new_tokens=20, greedy=True, eos_token_id=None)
    assert {r.scheme for r in made.trace.rounds} == {"plain"}
    for prompt, tokens in zip(prompts, made.tokens, strict=True):
        alone = generate(
            model, other, prompt, max_new_tokens=20, scheme="plain", greedy=True, eos_token_id=None
        )
        assert alone.tokens.tolist() == tokens.tolist()


def test_two_readers_may_share_a_model():
    model = FAMILIES["Llama"]()
    first, second, alone = KVCache(model), KVCache(model), KVCache(model)
    first.start([[1, 2, 3]])
    second.start([[4, 0]])
    alone.start([[1, 2, 3]])
    assert torch.equal(first.feed([[3]]), alone.feed([[3]]))
    assert (first.lengths, second.lengths) == ([3], [1])
