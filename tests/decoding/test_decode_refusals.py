"""A refusal that can be foreseen comes before the first token, and its advice works."""

from functools import partial

import pytest
import tiny
import torch
from transformers import (
    MinPLogitsWarper,
    MistralConfig,
    MistralForCausalLM,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
)

from qstar.decoding import cache_check
from qstar.decoding.costs import Costs
from qstar.decoding.generate import generate

ROWS = [torch.tensor([1, 4, 0, 2, 2, 1, 3]), torch.tensor([2]), torch.tensor([6, 5, 0])]
WINDOW = 8
SCHEMES = {
    "one-sided": {"scheme": "one-sided", "gamma": 4},
    "alternating": {"scheme": "alternating", "gamma": 3},
    "lookup": {"scheme": "lookup", "gamma": 4},
    "draft-model": {"scheme": "draft-model", "gamma": 4},
    "only a gamma": {"gamma": 2},
}


def sliding(seed, window=WINDOW, positions=64):
    torch.manual_seed(seed)
    config = MistralConfig(
        vocab_size=7,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=positions,
        sliding_window=window,
        initializer_range=0.5,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    return MistralForCausalLM(config).double().eval()


def asked(name):
    third = {"draft_model": tiny.llama(9)} if name == "draft-model" else {}
    return SCHEMES[name] | third | {"max_new_tokens": 20, "eos_token_id": None}


def none_yet(tokens):
    raise AssertionError(f"refused after {tokens.tolist()}")


# Sliding windows and batches.


@pytest.mark.parametrize("where", [0, 1])
@pytest.mark.parametrize("name", SCHEMES)
def test_a_batch_that_may_outgrow_a_window_is_refused_before_its_first_token(name, where):
    models = [tiny.llama(1), tiny.llama(2)]
    models[where] = sliding(3)
    who = ("policy", "teacher")[where]
    with pytest.raises(ValueError, match=f"the {who} sees only its last .* scheme='plain'"):
        generate(*models, ROWS, generator=0, on_tokens=none_yet, **asked(name))


def test_so_is_the_batch_of_a_draft_model_with_a_window():
    options = asked("draft-model") | {"draft_model": sliding(3)}
    with pytest.raises(ValueError, match="the draft model sees only its last"):
        generate(tiny.llama(1), tiny.llama(2), ROWS, on_tokens=none_yet, **options)


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("max_new_tokens", [1, 4])
def test_whether_a_batch_is_refused_does_not_hang_on_the_seed(name, max_new_tokens):
    """On either side of the limit: no seed meets the reader's own refusal of holes."""
    models = sliding(1, window=22), sliding(2, window=22)
    seeds = range(4)  # each shows a limit of 2 max_new_tokens in place of 3
    options = asked(name) | {"max_new_tokens": max_new_tokens}
    for length in (7, 9, 10, 11):
        rows = [torch.arange(length) % 7, ROWS[1], ROWS[2], ROWS[0][:2]]
        found = set()
        for seed in seeds:
            try:
                generate(*models, rows, generator=seed, **options)
                found.add("decoded")
            except ValueError as error:
                found.add(
                    "refused"
                    if "leaves holes in the cache of a batch" in str(error)
                    else str(error)
                )
        assert len(found) == 1
        must_refuse = length + 3 * max_new_tokens > 22 and max_new_tokens > 1
        assert found == {"refused" if must_refuse else "decoded"}


@pytest.mark.parametrize("advised", [{}, {"scheme": "plain"}, {"scheme": "auto"}])
def test_plain_is_exact_past_a_window_in_a_batch_of_any_lengths(advised):
    """The advice, and the default: greedy tokens are those of each row alone."""
    models = sliding(1), sliding(2)
    options = {"max_new_tokens": 20, "eos_token_id": None, "greedy": True} | advised
    result = generate(*models, ROWS, **options)
    assert {r.scheme for r in result.trace.rounds} == {"plain"}
    for i, row in enumerate(ROWS):
        alone = generate(*models, row, **options | {"scheme": "plain"})
        assert alone.tokens.tolist() == result.tokens[i].tolist()
        torch.testing.assert_close(
            result.trace.balance.chernoff[i], alone.trace.balance.chernoff, rtol=0, atol=1e-11
        )


@pytest.mark.parametrize("name", SCHEMES)
def test_its_rows_may_be_decoded_one_at_a_time(name):
    """The other advice."""
    models = sliding(1), sliding(2)
    for row in ROWS:
        alone = generate(*models, row, generator=0, **asked(name))
        assert alone.lengths == 20


@pytest.mark.parametrize("name", SCHEMES)
def test_a_batch_within_a_window_is_decoded_though_its_cache_has_holes(name):
    """Holes are squeezed out before they fill it: greedy tokens are those of a row alone."""
    models = sliding(1, window=30), sliding(2, window=30)
    options = asked(name) | {"max_new_tokens": 7, "greedy": True}
    result = generate(*models, ROWS, **options)
    for i, row in enumerate(ROWS):
        alone = generate(*models, row, max_new_tokens=7, greedy=True, scheme="plain")
        assert alone.tokens.tolist() == result.tokens[i].tolist()


# Filters that cut supports apart.


CUTTING = {
    "top-k": {"top_k": 2},
    "top-p": {"top_p": 0.5},
    "a processor": {"logits_processor": [MinPLogitsWarper(0.5)]},
    "transformers' top-k": {"logits_processor": [TopKLogitsWarper(2)]},
}


@pytest.mark.parametrize("name", CUTTING)
def test_filters_that_may_cut_the_parents_apart_ask_what_is_to_be_done(name):
    call = partial(
        generate,
        tiny.llama(1),
        tiny.llama(2),
        ROWS[0],
        max_new_tokens=8,
        eos_token_id=None,
        generator=0,
        **CUTTING[name],
    )
    with pytest.raises(ValueError, match="can leave them without a shared token"):
        call(filtered="parents", on_tokens=none_yet)
    for advised in ({"filtered": "target"}, {"filtered": "parents", "disjoint": "mixture"}):
        assert call(**advised).lengths == 8
    wide = [TemperatureLogitsWarper(2.0), TopKLogitsWarper(50)]
    kept = {"filtered": "parents", "logits_processor": wide, "top_k": None, "top_p": 1.0}
    assert call(**kept).lengths == 8, "what keeps every token cuts nothing"


# What else is known before anything is read.


FORESEEN = {
    "costs without the draft": (
        {"scheme": "auto", "costs": Costs({1: 1.0}, {1: 1.0}), "draft_model": tiny.llama(3)},
        r"costs say nothing of the draft model",
    ),
    "a draft's prompt without a draft": ({"draft_ids": ROWS[0]}, "draft_ids are read by a draft"),
    "a criterion alone": ({"stopping_criteria": lambda ids, scores: False}, "functions, in a list"),
    "a criterion that is none": (
        {"stopping_criteria": ["stop"]},
        "must hold functions: got 'stop'",
    ),
    "a processor that is none": ({"logits_processor": [3]}, "must hold functions: got 3"),
    "a processor alone": ({"logits_processor": lambda i, s: s}, "functions, in a list"),
    "no alpha": ({"alpha": float("nan")}, "must be a finite number"),
    "no temperature": ({"temperature": 0.0}, "temperature must be"),
    "no top-k": ({"top_k": 0}, "top_k must be"),
    "no top-p": ({"top_p": 1.5}, "top_p is a probability"),
    "no end": ({"eos_token_id": "stop"}, "eos_token_id must be"),
    "no generator": ({"generator": 2.5}, "generator must be a seed"),
    "other prompts shown": ({"shown_ids": [ROWS[0]] * 2}, "shown_ids"),
    "filters without advice": ({"top_k": 2, "filtered": "parents"}, "without a shared token"),
    "no way out": ({"disjoint": "skip"}, "disjoint must be one of"),
    "one call for two": ({"one_call": True}, "one_call needs one model"),
}


@pytest.fixture
def none_tried(monkeypatch):
    """No kind of model has been tried with its cache in this process."""
    monkeypatch.setattr(cache_check, "_FOUND", {})


@pytest.mark.parametrize("name", FORESEEN)
def test_what_is_known_at_once_is_refused_before_a_model_reads(name, none_tried):
    options, message = FORESEEN[name]
    models = tiny.llama(1), tiny.llama(2)
    for model in models:
        model.register_forward_pre_hook(lambda *given: pytest.fail("it was read"))
    with pytest.raises(ValueError, match=message):
        generate(*models, ROWS[0], max_new_tokens=5, **options)
    with pytest.raises(pytest.fail.Exception, match="it was read"):
        generate(*models, ROWS[0], max_new_tokens=5)


# Advice about nan.


def with_attention(name, seed):
    model = tiny.llama(seed, sharpness=0.5)
    model.set_attn_implementation(name)
    return model


def decode_ragged(*models):
    prompts = [torch.tensor([5, 6, 0, 1]), torch.tensor([3])]
    others = [torch.tensor([5]), torch.tensor([2, 1, 4])]
    options = {"max_new_tokens": 4, "generator": 0, "eos_token_id": None, "scheme": "plain"}
    return generate(*models, prompts, others, **options)


def test_eager_attention_in_float64_is_read_around_and_said():
    """As attention does where padding sees nothing: nan as soon as there are two rows."""
    broken = with_attention("eager", 0)
    broken.lm_head.register_forward_hook(
        lambda module, given, out: out * torch.nan if len(out) > 1 else out
    )
    other = with_attention("sdpa", 1)
    with pytest.warns(UserWarning, match="the policy .* is read anew for every token"):
        found = decode_ragged(broken, other)
    wide = decode_ragged(with_attention("sdpa", 0), other)
    torch.testing.assert_close(
        found.trace.balance.chernoff, wide.trace.balance.chernoff, rtol=0, atol=1e-5
    )
    assert found.tokens.tolist() == wide.tokens.tolist()


def overflowing(dtype):
    """A head that is finite in float32, and whose logits overflow float16."""
    model = tiny.llama(1, dtype=torch.float32)
    with torch.no_grad():
        model.lm_head.weight *= 60_000 / model.lm_head.weight.abs().max()
        model.model.norm.weight *= 100
    return model.to(dtype)


def test_the_advice_for_narrow_weights_works():
    with pytest.raises(ValueError, match=r"the policy answers nan .* Try wider weights"):
        generate(overflowing(torch.float16), tiny.llama(2), ROWS[0], max_new_tokens=2, generator=0)
    wide = overflowing(torch.float32)
    assert generate(wide, tiny.llama(2), ROWS[0], max_new_tokens=2, generator=0).lengths > 0


def test_weights_that_hold_nan_are_named():
    broken, whole = tiny.llama(1), tiny.llama(1)
    with torch.no_grad():
        broken.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"weights hold nan \(model.layers.1.mlp.up_proj.weight\)"):
        generate(broken, tiny.llama(2), ROWS[0], max_new_tokens=2)
    assert generate(whole, tiny.llama(2), ROWS[0], max_new_tokens=2, generator=0).lengths == 2


def test_whole_weights_in_float32_are_not_called_narrow():
    model = tiny.llama(1, dtype=torch.float32)
    model.lm_head.register_forward_hook(lambda module, given, out: out * torch.nan)
    with pytest.raises(ValueError, match="Look for what broke the model"):
        generate(model, tiny.llama(2), ROWS[0], max_new_tokens=2)
