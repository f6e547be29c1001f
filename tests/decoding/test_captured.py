"""Forwards over a cache of fixed size: the distribution they draw from, and what they rest on.

There is no accelerator here. What a graph does is played by `Replayed`: it repeats a forward on
the same memory and writes its answer over the last one, as a graph does.
"""

import gc
import warnings

import numpy as np
import pytest
import tiny
import torch
from decoder_distributions import enumerated_distribution, expected_distribution
from schemes import PROMPTS, SHORT, VOCAB

from qstar.decoding import cache_check, captured
from qstar.decoding.captured import WIDTHS, Forwards, fingerprint, forget, why_not
from qstar.decoding.generate import generate
from qstar.decoding.kv_cache import KVCache

EXACT = 1e-12
WAYS = {
    "plain": SHORT["plain"],
    "one-sided": SHORT["the teacher drafts"],
    "alternating": SHORT["alternating"],
    "coin": SHORT["coin"] | {"stay": 0.4},
    "lookup": SHORT["lookup"],
}


def pair(vocab=VOCAB):
    return tiny.llama(1, vocab=vocab, sharpness=2.0), tiny.gpt2(2, vocab=vocab, sharpness=0.5)


class Replayed:
    """A stand-in for a captured graph."""

    def __init__(self, forwards, width, to):
        self.work = lambda: forwards._forward(to, width)
        self.answer = self.work()

    def replay(self):
        self.answer.copy_(self.work())


@pytest.fixture
def graphs(monkeypatch):
    """Forwards are "captured" here too; counts how often."""
    made = []

    def capture(self, width, to):
        graph = Replayed(self, width, to)
        made.append(width)
        return graph, graph.answer

    real = Forwards.__init__

    def init(self, *args):
        real(self, *args)
        self._captures = True

    monkeypatch.setattr(Forwards, "__init__", init)
    monkeypatch.setattr(Forwards, "_captured", capture)
    return made


def error_of(way, several=PROMPTS[2:], *, length=2, **options):
    """The largest error of an outcome of so many tokens, over pairs of prompts."""
    models = pair()
    options = {"cache_implementation": "static", **WAYS[way], **options}
    distribution = enumerated_distribution(models, several, length, vocab=VOCAB, **options)[0]
    expected = [expected_distribution(models, p, length, vocab=VOCAB) for p in several]
    return np.abs(distribution.reshape(len(several), -1) - np.stack(expected)).max()


@pytest.mark.parametrize("way", WAYS)
def test_the_output_distribution_is_exact(way):
    several = PROMPTS[2:] if way == "coin" else PROMPTS  # which has many sequences of choices
    assert error_of(way, several) < EXACT


@pytest.mark.parametrize("way", ["plain", "alternating", "coin"])
def test_the_output_distribution_of_replayed_forwards_is_exact(way, graphs):
    assert error_of(way) < EXACT
    assert len(graphs) >= 2


def mistaken_about_old_slots(self, to, positions, real=Forwards._forward):
    """A forward that attends to slots which an earlier text left."""
    width = to.ids.shape[-1]
    to.told[:, width : width + 6] = 1
    return real(self, to, positions)


def mistaken_about_later_columns(self, to, positions, real=Forwards._forward):
    """A forward whose columns see one another, later ones too."""
    width = to.ids.shape[-1]
    place, held = to.told[:, :width].clone(), int(to.told[0, -1])
    seen = to.told[:, width:-1].bool()[:, None].expand(-1, width, -1)
    options = {"attention_mask": seen[:, None], "position_ids": place.long()}
    for layer in self.layers:
        layer.cumulative_length.fill_(held)
    options |= {self._cache_name: self.cache, "use_cache": True}
    out = self._model()(to.ids, **options)
    return out.logits[:, -positions:].double().log_softmax(-1)


@pytest.mark.parametrize("mistake", [mistaken_about_old_slots, mistaken_about_later_columns])
def test_a_wrong_mask_would_be_seen(mistake, monkeypatch):
    """The controls, without the trial of each model's cache, which sees them first."""
    monkeypatch.setattr("qstar.decoding.cache_check.check", lambda *args, **options: None)
    assert error_of("one-sided", PROMPTS) < EXACT
    monkeypatch.setattr(Forwards, "_forward", mistake)
    assert error_of("one-sided", PROMPTS) > 1e-3


def test_a_model_that_fails_its_trial_is_read_from_a_dynamic_cache(monkeypatch):
    monkeypatch.setattr(cache_check, "_FOUND", {})  # what other tests found of such models
    monkeypatch.setattr(Forwards, "_forward", mistaken_about_later_columns)
    models = pair(7)
    with pytest.warns(UserWarning, match="is read from a dynamic cache: what it answers"):
        found = [
            generate(*models, PROMPTS[2][0], max_new_tokens=9, generator=0, eos_token_id=None,
                     cache_implementation=kind).tokens.tolist()
            for kind in ("static", "dynamic")
        ]  # fmt: skip
    assert found[0] == found[1]


def test_an_answer_that_is_kept_outlives_the_next_replay(graphs, monkeypatch):
    """A graph writes over its last answer. The control returns that very memory."""
    # The first draft's forward reads the prompt too, and is no replay.
    twice = {"scheme": "one-sided", "gamma": 3, "drafter": "policy", "length": 3}
    assert error_of("one-sided", **twice) < EXACT
    real = Forwards._replayed

    def memory_itself(self, width, to):
        real(self, width, to)
        return self._graphs[width][1]

    monkeypatch.setattr(Forwards, "_replayed", memory_itself)
    assert error_of("one-sided", **twice) > 1e-3


def texts_of(models, ids, **options):
    chosen = {"max_new_tokens": 12, "generator": 5, "eos_token_id": None, **options}
    return generate(*models, ids, **chosen).tokens.tolist()


@pytest.mark.parametrize("scheme", ["plain", "alternating", "coin", "one-sided", "auto"])
@pytest.mark.parametrize("rows", [1, 3])
def test_a_seed_draws_the_same_tokens_from_either_cache(scheme, rows):
    models = pair(11)
    ids = [torch.arange(2 + 3 * row) % 11 for row in range(rows)]
    if scheme == "auto":  # what it measures must not differ
        from qstar.decoding.costs import Costs

        options = {"costs": Costs(policy={1: 1.0, 9: 1.2}, teacher={1: 1.0, 9: 1.2})}
    else:
        options = {}
    both = [
        texts_of(models, ids, scheme=scheme, cache_implementation=kind, **options)
        for kind in ("static", "dynamic")
    ]
    assert both[0] == both[1]


def test_rows_that_end_early_change_nothing():
    models = pair(7)
    ids = [torch.tensor(x) for x in ([1, 2], [3], [4, 5, 6], [0, 1])]
    both = [
        texts_of(models, ids, eos_token_id=[0, 3], max_new_tokens=30, cache_implementation=kind)
        for kind in ("static", "dynamic")
    ]
    assert both[0] == both[1]


def test_forwards_are_captured_once_and_kept_for_the_next_call(graphs):
    models, ids = pair(7), torch.tensor([1, 2, 3])
    options = {"scheme": "alternating", "gamma": 1, "cache_implementation": "static"}
    first = texts_of(models, ids, **options)
    made = len(graphs)
    assert 0 < made <= 12  # of either model, for its trial too
    assert texts_of(models, ids, **options) == first
    assert len(graphs) == made
    for model in models:
        forget(model)
    texts_of(models, ids, **options)
    assert len(graphs) > made


def test_a_changed_weight_is_seen_and_a_changed_module_captured_anew(graphs):
    models, ids = pair(7), torch.tensor([1, 2, 3])
    read = {"cache_implementation": "static", "scheme": "plain"}
    texts_of(models, ids, **read)
    made = len(graphs)
    with torch.no_grad():
        for model in models:
            model.get_output_embeddings().weight.mul_(1.7)
    assert texts_of(models, ids, **read) == texts_of(models, ids, scheme="plain")
    assert len(graphs) == made  # the same memory
    before = fingerprint(models[0])
    models[0].config.rms_norm_eps *= 2  # some models look at their configuration in each forward
    assert fingerprint(models[0]) != before
    before = fingerprint(models[0])
    models[0].model.layers[0].mlp.act_fn = torch.nn.Tanh()
    assert fingerprint(models[0]) != before
    assert texts_of(models, ids, **read) == texts_of(models, ids, scheme="plain")
    assert len(graphs) > made


def test_one_model_under_two_prompts_has_two_caches():
    model = tiny.llama(3, vocab=7)
    ids = [torch.tensor([1, 2, 3]), torch.tensor([4, 5, 6, 0, 1])]
    both = [
        generate(
            model, model, *ids, max_new_tokens=10, generator=1, eos_token_id=None,
            one_call=one_call, cache_implementation=kind, scheme="plain",
        ).tokens.tolist()
        for kind in ("static", "dynamic")
        for one_call in (True, False)
    ]  # fmt: skip
    assert all(tokens == both[0] for tokens in both)


def test_a_text_that_outgrows_its_cache_gets_a_larger_one():
    model = tiny.llama(1, window=2048)
    cache = KVCache(model, implementation="static")
    text = torch.randint(7, (300,), generator=torch.Generator().manual_seed(0)).tolist()
    cache.start([text[:3], text[:5]])
    slots = [cache._cache._forwards.slots]
    read = [2, 4]
    for width in (1, 3, 16, 17, 40, 40, 40):
        distributions = cache.feed([text[n : n + width] for n in read], positions=1)
        read = [n + width for n in read]
        slots.append(cache._cache._forwards.slots)
        for row, n in enumerate(read):
            with torch.no_grad():
                logits = model(torch.tensor([text[:n]]), use_cache=False).logits[0, -1]
            expected = logits.double().log_softmax(-1)
            torch.testing.assert_close(distributions[row, 0], expected, rtol=0, atol=EXACT)
    assert slots[0] < slots[-1]


def test_holes_are_squeezed_out_before_a_cache_grows():
    """The reserved length is enough for a ragged batch, whatever its rows reject."""
    model = tiny.llama(1, window=2048)
    cache = KVCache(model, implementation="static")
    cache.reserved = 40
    cache.start([[1, 2], [3, 4, 5]])
    slots = cache._cache._forwards.slots
    for turn in range(40):
        keep = list(cache.lengths)
        drafts = torch.full((2, 3), turn % 7)
        cache.feed([[1]] * 2, drafts, positions=4)
        kept = [min(n + 1, 36) for n in keep]
        kept[turn % 2] = min(keep[turn % 2] + 2, 36)
        cache.truncate(kept)
        if min(kept) >= 34:
            break
    assert turn > 20
    assert cache._cache._forwards.slots == slots


def test_why_a_model_is_not_read_from_a_static_cache():
    model = tiny.llama(1)
    assert why_not(model, model) == ""
    handle = model.model.layers[0].register_forward_hook(lambda *given: None)
    assert "hooks on its modules" in why_not(model, model)
    handle.remove()
    everywhere = torch.nn.modules.module.register_module_forward_hook(lambda *given: None)
    assert "hooks on all modules" in why_not(model, model)
    everywhere.remove()
    model.config._attn_implementation = "flash_attention_2"
    assert "takes no mask of any form" in why_not(model, model)
    model.config._attn_implementation = "sdpa"
    model._can_compile_fullgraph = False
    assert "does not say that LlamaForCausalLM takes" in why_not(model, model)
    with pytest.raises(ValueError, match="cannot be read from a static cache"):
        generate(model, model, PROMPTS[0][0], max_new_tokens=2, cache_implementation="static")
    with pytest.raises(ValueError, match="cache_implementation must be one of static, dynamic"):
        generate(model, model, PROMPTS[0][0], max_new_tokens=2, cache_implementation="paged")


def test_a_capture_that_fails_is_said_and_the_forward_launched(monkeypatch):
    real = Forwards.__init__

    def init(self, *args):
        real(self, *args)
        self._captures = True

    def fails(self, width, to):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(Forwards, "__init__", init)
    monkeypatch.setattr(Forwards, "_captured", fails)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    models = pair(7)
    with pytest.warns(UserWarning, match="one kernel at a time, for capturing one raised"):
        told = texts_of(models, PROMPTS[2][0], cache_implementation="static")
    assert told == texts_of(models, PROMPTS[2][0])


def test_memory_is_given_back_with_the_model():
    import weakref

    models = pair(7)
    texts_of(models, PROMPTS[2][0], cache_implementation="static")
    assert len(captured._IDLE[models[0]]) >= 1
    assert all(len(idle) <= captured.IDLE_AT_MOST for idle in captured._IDLE.values())
    kept = [weakref.ref(model) for model in models]
    del models
    gc.collect()
    assert [ref() for ref in kept] == [None, None]


def test_the_widths_that_are_captured_go_up_to_all_that_a_planner_asks_for():
    from qstar.decoding.planner import COIN_GAMMA

    assert tuple(sorted(WIDTHS)) == WIDTHS
    assert WIDTHS[-1] > COIN_GAMMA + 1


def test_nothing_warns():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        texts_of(pair(7), PROMPTS[2][0], cache_implementation="static")
