"""Two parents that are one set of weights, and parents that answer alike: said, not decoded."""

import copy
import warnings

import pytest
import tiny
import torch
from torch import nn

from qstar.decoding.generate import EqualParentsWarning, generate

PROMPT, OTHER = torch.tensor([1, 4, 0]), torch.tensor([5, 3, 3])
ONE_SET = r"are two objects over one set of weights.* load the base model a second time"
OPTIONS = {"max_new_tokens": 3, "generator": 0, "eos_token_id": None}


class LowRank(nn.Module):
    """A linear layer and a change of it, as adapters put them in its place."""

    def __init__(self, base, seed):
        super().__init__()
        self.base, self.on = base, True
        self.in_features, self.out_features = base.in_features, base.out_features
        generator = torch.Generator().manual_seed(seed)
        change = torch.randn(2, base.in_features, generator=generator, dtype=torch.float64)
        self.down = nn.Parameter(change)
        self.up = nn.Parameter(torch.ones(base.out_features, 2, dtype=torch.float64))

    def forward(self, x):
        return self.base(x) + self.on * (x @ self.down.T @ self.up.T)


class Wrapped(nn.Module):
    """Somebody's wrapper: another object, over the modules that it was given."""

    def __init__(self, model):
        super().__init__()
        self.inner = model

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, input_ids, position_ids=None, logits_to_keep=0, **options):
        return self.inner(
            input_ids, position_ids=position_ids, logits_to_keep=logits_to_keep, **options
        )

    def eval(self):
        self.inner.eval()
        return self


def adapted(base, seed):
    """An adapter on a base model, in place, and a wrapper around both."""
    for layer in base.model.layers:
        layer.mlp.down_proj = LowRank(layer.mlp.down_proj, seed)
    return Wrapped(base)


def two_adapters(base):
    return adapted(base, 1), adapted(base, 2)


def adapter_and_base(base):
    return adapted(base, 1), base


def compiled(base):
    return torch.compile(base, backend="eager"), base


def shallow_copy(base):
    return copy.copy(base), base


def copy_over_the_same_memory(base):
    """Another tree of modules, which an adapter merged into the first would change."""
    return copy.deepcopy(base, {id(p): p for p in base.parameters()}), base


def wrapper_of_wrapper(base):
    return Wrapped(Wrapped(base)), Wrapped(base)


ONE = [
    two_adapters,
    adapter_and_base,
    compiled,
    shallow_copy,
    copy_over_the_same_memory,
    wrapper_of_wrapper,
]


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("made", ONE)
def test_two_objects_over_one_set_of_weights_are_refused(made, turned):
    policy, teacher = made(tiny.llama(1))[:: -1 if turned else 1]
    with pytest.raises(ValueError, match="policy and teacher " + ONE_SET):
        generate(policy, teacher, PROMPT, OTHER, **OPTIONS)


def test_a_draft_model_that_is_an_adapter_on_a_parent_is_refused():
    base, other = tiny.llama(1), tiny.llama(2)
    draft = adapted(base, 1)
    with pytest.raises(ValueError, match="policy and draft model " + ONE_SET):
        generate(base, other, PROMPT, draft_model=draft, **OPTIONS)


def test_adapters_on_two_bases_are_two_models():
    """What the refusal advises: C is then what it is."""
    pair = adapted(tiny.llama(1), 1), adapted(tiny.llama(1), 2)
    trace = generate(*pair, PROMPT, scheme="plain", **OPTIONS).trace
    assert (trace.balance.chernoff > 1e-3).all()


def test_a_wrapper_passed_twice_is_one_model_under_two_prompts():
    """The other advice."""
    base = tiny.llama(1)
    wrapped = Wrapped(base)
    expected = generate(base, base, PROMPT, OTHER, **OPTIONS)
    found = generate(wrapped, wrapped, PROMPT, OTHER, **OPTIONS)
    assert found.tokens.tolist() == expected.tokens.tolist()
    assert (found.trace.balance.chernoff > 1e-3).all()


def test_models_that_share_some_modules_are_two_models():
    one, other = tiny.llama(1), tiny.llama(2)
    other.set_input_embeddings(one.get_input_embeddings())
    other.model.layers[0] = one.model.layers[0]
    trace = generate(one, other, PROMPT, **OPTIONS).trace
    assert (trace.balance.chernoff > 1e-6).all()


def test_one_set_of_weights_under_two_configs_is_two_models():
    one, other = tiny.llama(1), tiny.llama(1, window=128)
    other.config.rope_parameters["rope_theta"] = 10.0
    other.model.rotary_emb = type(other.model.rotary_emb)(other.config).double()
    other.load_state_dict(one.state_dict(), assign=True)
    assert other.lm_head.weight.data_ptr() == one.lm_head.weight.data_ptr()
    trace = generate(one, other, PROMPT, scheme="plain", **OPTIONS).trace
    assert (trace.balance.chernoff > 1e-9).all()


# Parents that answer alike.


def switched(model, on):
    for module in model.modules():
        if isinstance(module, LowRank):
            module.on = on
    return model


EQUAL = {
    "one model": lambda: [tiny.llama(1)] * 2,
    "a copy": lambda: (tiny.llama(1), tiny.llama(1)),
    "one adapted model": lambda: [adapted(tiny.llama(1), 1)] * 2,
    "an adapter that is switched off": lambda: (
        switched(adapted(tiny.llama(1), 1), False),
        tiny.llama(1),
    ),
}


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("scheme", ["plain", "alternating", "lookup"])
@pytest.mark.parametrize("name", EQUAL)
def test_equal_parents_are_said_to_be_equal_once(name, scheme, rows):
    policy, teacher = EQUAL[name]()
    with pytest.warns(EqualParentsWarning, match="one set of weights") as said:
        generate(policy, teacher, PROMPT.expand(rows, -1), scheme=scheme, **OPTIONS)
    assert len(said) == 1
    assert said[0].filename == __file__


def test_parents_that_differ_or_whose_difference_does_not_matter_are_not_warned_about():
    model = tiny.llama(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generate(model, model, PROMPT, OTHER, **OPTIONS)
        generate(model, model, PROMPT, alpha=1.0, **OPTIONS)
        generate(model, tiny.llama(2), PROMPT, **OPTIONS)
        generate(
            model, tiny.llama(2), PROMPT, top_k=1, filtered="parents", disjoint="mixture", **OPTIONS
        )
        # One row of two is enough to tell the parents apart.
        prompts = [PROMPT, OTHER], [PROMPT, PROMPT]
        generate(model, model, *prompts, **OPTIONS)
