"""Models that a cache, a position or a wrapper could lead astray: read exactly, or refused.

The reference is the model itself: each text alone, at once, without a cache, position ids left to
the model, for every token anew.
"""

import functools
import inspect
import warnings
from typing import ClassVar

import numpy as np
import pytest
import tiny
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM, XLNetLMHeadModel

import qstar
from qstar.decoding import cache_check, kv_cache
from qstar.decoding.generate import generate
from qstar.decoding.kv_cache import KVCache
from qstar.decoding.sampling_options import Sampling

VOCAB = 31
EXACT = 1e-9
ROUNDED = 1e-4  # in float32, which GPT-Neo's attention always is
SCHEMES = {
    "plain": {"scheme": "plain"},
    "one-sided": {"scheme": "one-sided", "gamma": 4},
    "alternating": {"scheme": "alternating", "gamma": 3},
    "lookup": {"scheme": "lookup", "gamma": 4},
}
ROPE = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.5,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
TABLE = {**ROPE, "is_decoder": True, "pad_token_id": 1, "type_vocab_size": 1}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0] * 4,
    "long_factor": [1.1, 2.0, 5.0, 12.0],
}
SWITCH = 12
KINDS = {
    "longrope": ("phi3", {**ROPE, "original_max_position_embeddings": SWITCH}),
    "gpt-neo": (
        "gpt_neo",
        {
            "vocab_size": VOCAB,
            "hidden_size": 16,
            "num_layers": 2,
            "num_heads": 2,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 6,
            "max_position_embeddings": 64,
            "initializer_range": 0.5,
            "bos_token_id": None,
            "eos_token_id": None,
        },
    ),
    "llama-4": (
        "llama4_text",
        {
            **ROPE,
            "head_dim": 8,
            "intermediate_size_mlp": 24,
            "interleave_moe_layer_step": 4,
            "attention_chunk_size": 8,
            "no_rope_layers": [1, 0],
        },
    ),
    "gpt-1": (
        "openai-gpt",
        {
            "vocab_size": VOCAB,
            "n_embd": 16,
            "n_layer": 1,
            "n_head": 2,
            "n_positions": 64,
            "initializer_range": 0.5,
        },
    ),
    "roberta": ("roberta", TABLE),
    "xlm-roberta": ("xlm-roberta", TABLE),
    "camembert": ("camembert", TABLE),
    "data2vec": ("data2vec-text", TABLE),
    "bidirectional bert": ("bert", {**TABLE, "is_decoder": False}),
    "bloom": (
        "bloom",
        {"vocab_size": VOCAB, "hidden_size": 16, "n_layer": 2, "n_head": 2, "eos_token_id": None},
    ),
}


def made(kind, seed=1, **changes):
    family, options = KINDS[kind]
    options = {**options, **changes}
    if kind == "longrope":
        options["rope_parameters"] = dict(LONGROPE)
    torch.manual_seed(seed)
    return finished(AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **options)))


def llama(seed=1, *, kind=LlamaForCausalLM, **changes):
    torch.manual_seed(seed)
    return finished(kind(AutoConfig.for_model("llama", **{**ROPE, **changes})))


def finished(model):
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.1 * torch.randn_like(parameter)
    return model.double().eval()


def distribution(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0, -1].double().log_softmax(-1).numpy()


def furthest(policy, teacher, prompts, *, count=9, own=None, **options):
    """The largest error of C, in nats, at all tokens; `own` are the models that are asked for it.

    The text is made first, so that nothing that decoding leaves behind can flatter the reference.
    """
    asked = {"max_new_tokens": count, "generator": 3, "eos_token_id": None, **options}
    out = generate(policy, teacher, prompts, **asked)
    worst = 0.0
    for row, prompt in enumerate(prompts):
        for place in range(count):
            ids = prompt.tolist() + out.tokens[row, :place].tolist()
            right = qstar.solve_kl_symmetry(
                *(distribution(m, ids) for m in own or (policy, teacher))
            )
            worst = max(
                worst, abs(right.chernoff - float(out.trace.minus_log_partition[row, place]))
            )
    return worst


def rows(*sizes):
    rng = np.random.default_rng(0)
    return [torch.tensor(rng.integers(2, VOCAB, size)) for size in sizes]


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch):
    monkeypatch.setattr(cache_check, "_FOUND", {})


# Rope factors that switch.


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("sizes", [(7,), (11, 6, 13)], ids=["one row", "rows"])
def test_rope_factors_that_switch_inside_the_text_change_no_distribution(scheme, sizes):
    """Drafts cross the switch first, rows of a batch one after another."""
    models = made("longrope", 1), made("longrope", 2)
    assert furthest(*models, rows(*sizes), **SCHEMES[scheme]) < EXACT


def test_stale_keys_would_show():
    """The control: with the switch unknown, the same text is read wrongly."""
    models = made("longrope", 1), made("longrope", 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kv_cache, "switch_of", lambda text, ropes: None)
        patch.setattr(cache_check, "check", lambda cache, length, rows: None)
        assert furthest(*models, rows(7), scheme="plain") > 1e-3


@pytest.mark.parametrize("size", [SWITCH - 1, SWITCH, SWITCH + 1, SWITCH + 2, 30])
def test_a_text_beyond_the_switch_is_read_once_and_then_from_the_cache(size):
    read = []
    model = made("longrope")
    model.register_forward_pre_hook(lambda module, args: read.append(args[0].shape[-1]))
    given = KVCache(model)
    ids = rows(size + 8)[0].tolist()
    calls = given.start([ids[:size]])
    for n in range(size, size + 8):
        distributions = given.feed([ids[given.lengths[0] : n]])[0, 0]
        read_so_far = list(read)
        np.testing.assert_allclose(distributions.numpy(), distribution(model, ids[:n]), atol=EXACT)
        read[:] = read_so_far
    assert calls == (size <= SWITCH)
    assert sum(width > 1 for width in read) == 1 + (size <= SWITCH)


def test_a_rejected_draft_leads_back_across_the_switch():
    model = made("longrope")
    given = KVCache(model)
    ids = rows(20)[0].tolist()
    given.start([ids[: SWITCH - 1]])
    for n in (SWITCH - 1, SWITCH):
        drafts = torch.tensor([ids[n : n + 3]])
        distributions = given.feed([ids[given.lengths[0] : n]], drafts, positions=4)[0]
        for j in range(4):
            np.testing.assert_allclose(
                distributions[j].numpy(), distribution(model, ids[: n + j]), atol=EXACT
            )
        given.truncate([n])
    assert given.lengths == [SWITCH]


def test_dynamic_rope_is_exact_below_its_switch_and_refused_beyond():
    scaling = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10_000.0}
    models = [llama(s, rope_parameters=dict(scaling), max_position_embeddings=16) for s in (1, 2)]
    assert furthest(*models, rows(7), count=10, **SCHEMES["one-sided"]) < EXACT
    for context_length in (None, 64):
        with pytest.raises(ValueError, match=r"holds 16 tokens.* its rope scaling is dynamic"):
            generate(*models, rows(7), max_new_tokens=11, context_length=context_length)


# Positions.


@pytest.mark.parametrize("kind", ["roberta", "xlm-roberta", "camembert", "data2vec"])
def test_positions_that_do_not_begin_at_zero_are_left_to_the_model(kind):
    prompts = [torch.tensor([5, 1, 9, 4]), torch.tensor([7, 8])]  # 1 is the padding, and no place
    with pytest.warns(UserWarning, match="is read anew for every token, without a cache"):
        error = furthest(made(kind, 1), made(kind, 2), prompts, count=4, **SCHEMES["one-sided"])
    assert error < EXACT


def test_positions_counted_from_zero_would_show(monkeypatch):
    monkeypatch.setattr(cache_check, "check", lambda cache, length, rows: None)
    models = made("roberta", 1), made("roberta", 2)
    assert furthest(*models, rows(5), count=4, scheme="plain") > 1e-3


def test_a_model_without_position_ids_is_read_by_its_mask():
    """In float32: in float64 its attention answers nan for a row of padding."""
    models = [made("bloom", seed, initializer_range=0.5).float() for seed in (1, 2)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        error = furthest(*models, rows(5, 2), count=5, **SCHEMES["one-sided"])
    assert error < ROUNDED


def test_a_model_that_looks_ahead_is_read_one_text_at_a_time():
    models = made("bidirectional bert", 1), made("bidirectional bert", 2)
    with pytest.warns(UserWarning, match=r"changes by .* with what it reads along with them"):
        assert furthest(*models, rows(5, 2), count=3, **SCHEMES["one-sided"]) < EXACT


# Windows.

WINDOWS = {
    "gpt-neo": "sees only its last 6 tokens, counted in cache slots",
    "llama-4": "attends within chunks of 8 tokens, counted in cache slots",
}


@pytest.mark.parametrize("kind", WINDOWS)
def test_a_window_by_any_name_is_exact_where_no_holes_meet_it(kind):
    models = made(kind, 1), made(kind, 2)
    assert furthest(*models, rows(9), **SCHEMES["one-sided"]) < ROUNDED
    assert furthest(*models, rows(9, 3), **SCHEMES["plain"]) < ROUNDED


@pytest.mark.parametrize("kind", WINDOWS)
def test_holes_in_a_window_by_any_name_are_refused(kind):
    with pytest.raises(ValueError, match=WINDOWS[kind]):
        generate(
            made(kind, 1), made(kind, 2), rows(9, 3), max_new_tokens=20, generator=0, gamma=4,
            scheme="one-sided", eos_token_id=None,
        )  # fmt: skip


def test_a_window_that_only_a_layer_knows_counts():
    model = llama()
    assert not KVCache(model).slides(64)
    model.model.layers[1].self_attn.local_window = 6
    assert KVCache(model).slides(7)
    assert not KVCache(model).slides(6)


# The check itself.


class WrongWhenCached(LlamaForCausalLM):
    """Positions slip by one as soon as there is a cache to go on from."""

    def forward(self, ids, position_ids=None, past_key_values=None, **options):
        if past_key_values is not None and past_key_values.get_seq_length():
            position_ids = position_ids + 1
        return super().forward(
            ids, position_ids=position_ids, past_key_values=past_key_values, **options
        )


class Unmasked(LlamaForCausalLM):
    """Padding and holes are attended to."""

    def forward(self, ids, attention_mask=None, position_ids=None, past_key_values=None, **options):
        return super().forward(
            ids, position_ids=position_ids, past_key_values=past_key_values, **options
        )


class HolesSeen(LlamaForCausalLM):
    """Padding is not attended to, but what was taken back is."""

    def forward(self, ids, attention_mask=None, position_ids=None, past_key_values=None, **options):
        if attention_mask is not None:
            attention_mask = attention_mask.cummax(-1).values
        options |= {"position_ids": position_ids, "past_key_values": past_key_values}
        return super().forward(ids, attention_mask=attention_mask, **options)


class Forgetful(LlamaForCausalLM):
    """It keeps nothing in the cache that it is given."""

    def forward(self, ids, past_key_values=None, use_cache=None, **options):
        return super().forward(ids, use_cache=False, **options)


class Failing(LlamaForCausalLM):
    """It cannot go on from a cache."""

    def forward(self, ids, past_key_values=None, **options):
        if past_key_values is not None:
            raise KeyError("no cache here")
        return super().forward(ids, **options)


class Renamed(LlamaForCausalLM):
    """It calls its cache `cache`, as all models do since transformers 5.24."""

    widths: ClassVar[list[int]] = []

    def forward(self, ids, attention_mask=None, position_ids=None, cache=None, **options):
        self.widths.append(ids.shape[-1])
        where = {"attention_mask": attention_mask, "position_ids": position_ids}
        (name,) = {"past_key_values", "cache"} & {*inspect.signature(super().forward).parameters}
        return super().forward(ids, **{name: cache}, **where, **options)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_cache_of_another_name_is_used(kind):
    models = llama(1, kind=Renamed), llama(2, kind=Renamed)
    assert not KVCache(models[0]).rereads
    options = SCHEMES["one-sided"] | {"cache_implementation": kind}
    assert furthest(*models, rows(5, 2), count=4, **options) < EXACT
    Renamed.widths.clear()
    furthest(*models, rows(5), count=8, scheme="plain", cache_implementation=kind)
    assert Renamed.widths.count(1) >= 14, "the text was read again"


BROKEN = {
    WrongWhenCached: r"from a cache, in one row, is .* in total variation away",
    Forgetful: "from a cache, in one row, it raised ValueError: .* does not keep what it reads",
    Failing: "from a cache, in one row, it raised KeyError: 'no cache here'",
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_model_that_its_cache_misleads_is_found_out(kind):
    models = llama(1, kind=kind), llama(2)
    with pytest.warns(UserWarning, match=BROKEN[kind]):
        assert furthest(*models, rows(5), count=4, **SCHEMES["one-sided"]) < EXACT


def test_a_mistake_that_is_not_looked_for_would_show(monkeypatch):
    monkeypatch.setattr(cache_check, "check", lambda cache, length, rows: None)
    assert furthest(llama(1, kind=WrongWhenCached), llama(2), rows(5), scheme="plain") > 1e-3


def test_padding_that_is_seen_is_found_out_only_where_there_is_some():
    models = llama(1, kind=Unmasked), llama(2)
    assert furthest(*models, rows(5), count=4, **SCHEMES["one-sided"]) < EXACT
    with pytest.warns(UserWarning, match="in rows that take back different numbers"):
        assert furthest(*models, rows(5, 2), count=4, **SCHEMES["one-sided"]) < EXACT


def test_a_cache_that_only_holes_mislead_has_none():
    models = llama(1, kind=HolesSeen), llama(2)
    assert furthest(*models, rows(5, 2), count=5, scheme="auto") < EXACT
    with pytest.raises(ValueError, match="answers otherwise where its cache has holes"):
        furthest(*models, rows(5, 2), count=12, **SCHEMES["one-sided"])


def test_a_model_is_tried_once_and_left_as_it_was():
    calls = []
    model = llama()
    model.train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    model.register_forward_pre_hook(lambda module, args: calls.append(module.training))
    torch.manual_seed(4)
    expected = torch.rand(3)
    torch.manual_seed(4)
    cache_check.check(KVCache(model), 20)
    assert torch.equal(torch.rand(3), expected)
    assert len(calls) > 2
    assert not any(calls)
    assert [module.training for module in model.modules()] == modes
    tried = len(calls)
    cache_check.check(KVCache(model), 30)
    cache_check.check(KVCache(llama(2)), 20)  # other weights, the same configuration
    assert len(calls) == tried + 5, "a longer text is tried anew"
    cache_check.check(KVCache(model), 25)
    assert len(calls) == tried + 5
    cache_check.check(KVCache(model), 25, rows=2)
    assert len(calls) > tried + 5, "several rows are another matter"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2])
def test_rounding_raises_no_alarm(make, dtype):
    for seed in range(4):
        cache_check._FOUND.clear()
        for count in (1, 3):
            given = KVCache(make(seed, vocab=VOCAB, dtype=dtype))
            cache_check.check(given, 60, rows=count)
            assert not given.rereads
            assert not given.slides(60)


class LastBits(LlamaForCausalLM):
    """Two tokens are equally likely; from a cache, the last bits of both logits are others."""

    def forward(self, ids, past_key_values=None, **options):
        cached = past_key_values is not None and past_key_values.get_seq_length()
        found = super().forward(ids, past_key_values=past_key_values, **options)
        off = torch.finfo(found.logits.dtype).eps if cached else 0.0
        found.logits = torch.full_like(found.logits, -20)
        found.logits[..., 0] = 20 * (1 + off)
        found.logits[..., 1] = 20 * (1 - off)
        return found


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_last_bits_of_logits_are_no_mistake_and_a_shifted_position_is(dtype):
    for kind, wrong in ((LastBits, False), (WrongWhenCached, True)):
        cache_check._FOUND.clear()
        given = KVCache(llama(1, kind=kind).to(dtype))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore" if wrong else "error")
            cache_check.check(given, 60)
        assert given.rereads == wrong


# How long a text may be.

SCALED = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    "yarn, stated": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 8},
    "llama3": {
        "rope_type": "llama3",
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
}


@pytest.mark.parametrize("name", SCALED)
def test_scaled_positions_reach_as_far_as_they_are_scaled(name):
    scaling = {**SCALED[name], "rope_theta": 10_000.0}
    models = [llama(s, rope_parameters=dict(scaling), max_position_embeddings=16) for s in (1, 2)]
    reach = 16 if name == "yarn, stated" else 64
    assert KVCache(models[0]).window == reach
    if reach > 16:
        assert furthest(*models, rows(24, 17), count=4, **SCHEMES["one-sided"]) < EXACT
    with pytest.raises(ValueError, match=f"holds {reach} tokens.* pass context_length"):
        generate(*models, rows(reach), max_new_tokens=2)


def test_the_context_length_may_be_said():
    models = llama(1, max_position_embeddings=16), llama(2, max_position_embeddings=16)
    assert furthest(*models, rows(20), count=3, scheme="plain", context_length=22) < EXACT
    with pytest.raises(ValueError, match=r"context window holds 22 tokens.* would have 23"):
        generate(*models, rows(20), max_new_tokens=4, context_length=22)
    with pytest.raises(ValueError, match="context window holds 8 tokens"):
        generate(*models, rows(8), max_new_tokens=4, context_length=8)
    assert "context_length" in inspect.signature(Sampling).parameters


def test_a_table_of_positions_keeps_its_end():
    given = tiny.gpt2(1, vocab=VOCAB, window=16)
    with pytest.raises(ValueError, match="the policy's context window holds 16 tokens"):
        generate(given, llama(), rows(10), max_new_tokens=10, context_length=64)
    assert KVCache(given, context_length=8).window == 8


@pytest.mark.parametrize("alibi", [True, False])
def test_slopes_in_place_of_positions_have_no_end(alibi):
    options = {"vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 1, "alibi": alibi}
    options |= {"num_attention_heads": 2, "max_position_embeddings": 16}
    config = AutoConfig.for_model("falcon", **options)
    window = KVCache(AutoModelForCausalLM.from_config(config).eval()).window
    assert window == (None if alibi else 16)


@pytest.mark.parametrize("value", [0, -1, True])
def test_a_context_of_no_length_is_refused(value):
    with pytest.raises(ValueError, match="context_length is the most tokens of a text"):
        generate(llama(1), llama(2), rows(4), max_new_tokens=2, context_length=value)


# Wrapped and unusual models.


class Adapted(torch.nn.Module):
    """What an adapter's wrapper looks like from outside."""

    def __init__(self, base):
        super().__init__()
        self.base, self.config = base, base.config
        self.device, self.dtype = base.device, base.dtype

    def get_base_model(self):
        return self.base

    def forward(self, *args, **kwargs):
        return self.base(*args, **kwargs)


class OtherHead(LlamaForCausalLM):
    """Its output layer is found by nobody."""

    def get_output_embeddings(self):
        raise NotImplementedError


def hooked(model):
    """The forward replaced in place, as accelerate does it."""
    old = model.forward

    def new_forward(module, *args, **kwargs):
        return old(*args, **kwargs)

    model.forward = functools.update_wrapper(functools.partial(new_forward, model), old)
    return model


WRAPPED = {
    "compiled": lambda: torch.compile(llama(), backend="eager"),
    "parallel": lambda: torch.nn.DataParallel(llama()),
    "adapted": lambda: Adapted(llama()),
    "compiled adapter": lambda: torch.compile(Adapted(llama()), backend="eager"),
    "hooked": lambda: hooked(llama()),
    "another head": lambda: llama(kind=OtherHead),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_wrapped_models_are_read_as_what_they_wrap(name):
    models = WRAPPED[name](), llama(2)
    with torch.compiler.set_stance("force_eager"):
        own = llama(), models[1]
        assert furthest(*models, rows(5, 2), count=5, own=own, **SCHEMES["one-sided"]) < EXACT


def test_a_model_without_a_cache_is_read_anew():
    models = made("gpt-1", 1), made("gpt-1", 2)
    for scheme in ("alternating", "lookup"):
        assert furthest(*models, rows(5, 2), count=5, **SCHEMES[scheme]) < EXACT
    asked = {"max_new_tokens": 3, "scheme": "auto", "eos_token_id": None}
    assert {r.scheme for r in generate(*models, rows(5), **asked).trace.rounds} == {"plain"}


@pytest.mark.filterwarnings("ignore:.*deprecated")
def test_layers_that_share_their_rounding_are_read_one_text_at_a_time():
    kinds = {torch.nn.Linear}
    model = torch.ao.quantization.quantize_dynamic(llama().float(), kinds, dtype=torch.qint8)
    with pytest.warns(UserWarning, match="its layers, quantised dynamically"):
        error = furthest(model, llama(2), rows(5, 2), count=4, **SCHEMES["one-sided"])
    assert error < ROUNDED


NO_MODELS = {
    "a name": ("gpt2", "must be a causal language model of transformers, loaded: got str"),
    "a layer": (torch.nn.Linear(2, 2), "loaded: got Linear"),
    "no head": (llama().model, r"the teacher \(LlamaModel\) cannot be read: .* AttributeError"),
    "nowhere": (llama().to("meta"), "must have its weights on a device: got meta"),
}


@pytest.mark.parametrize("name", NO_MODELS)
def test_what_is_no_model_is_refused(name):
    given, message = NO_MODELS[name]
    with pytest.raises(ValueError, match=message):
        generate(llama(), given, rows(4), max_new_tokens=2)


def test_a_model_that_needs_more_than_the_text_is_refused():
    config = AutoConfig.for_model(
        "xlnet", vocab_size=VOCAB, d_model=16, n_layer=1, n_head=2, d_inner=16
    )
    model = XLNetLMHeadModel(config).double().eval()
    with pytest.raises(ValueError, match=r"its own generate feeds it .*perm_mask"):
        generate(model, llama(), rows(4), max_new_tokens=2)
