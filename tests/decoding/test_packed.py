"""Packed linear layers answer like plain ones, and leave the model as it was."""

import copy
import os
import re

import pytest
import tiny
import torch
from torch import nn

from qstar.decoding import packed as module
from qstar.decoding.packed import TOLERANCE, packed, why_not

pytestmark = pytest.mark.skipif(
    module._missing() is not None, reason=f"nothing to test: {module._missing()}"
)


def layers(*shapes, bias=True, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(*(nn.Linear(inputs, outputs, bias=bias) for inputs, outputs in shapes))


@torch.no_grad()
def error(layer, x, answer):
    """How far an answer is from the exact one, relative to sum |x| |w| + |bias|."""
    wide = copy.deepcopy(layer).double()
    exact = nn.functional.linear(x.double(), wide.weight, wide.bias)
    bias = None if wide.bias is None else wide.bias.abs()
    scale = nn.functional.linear(x.double().abs(), wide.weight.abs(), bias)
    return ((answer - exact).abs() / scale).max().item()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (64, 48), (333, 130), (576, 1536)])
@pytest.mark.parametrize("width", [1, 2, 3, 5, 9, 17])
def test_a_packed_layer_answers_as_a_plain_one_to_rounding(shape, width, bias):
    model = layers(shape, bias=bias)
    x = torch.randn(2, width, shape[0], generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), packed(model) as packing:
        answer = model(x)
    with torch.no_grad():
        assert error(model[0], x, model(x)) <= TOLERANCE
    assert packing.layers == 1
    assert answer.shape == (2, width, shape[1])
    assert error(model[0], x, answer) <= TOLERANCE
    largest = max(parameter.abs().max() for parameter in model.parameters())
    worse = answer + 3 * TOLERANCE * largest * (x.abs().sum(-1, keepdim=True) + 1)
    assert error(model[0], x, worse) > TOLERANCE, "the tolerance must be able to fail"


@pytest.mark.parametrize(
    "x",
    [
        torch.arange(4.0),
        torch.arange(12.0).view(3, 4),
        torch.arange(12.0).view(4, 3).mT,
        torch.arange(24.0).view(2, 3, 4)[:, ::2],
        torch.arange(16.0).view(2, 8)[:, ::2],
        torch.zeros(0, 4),
        torch.zeros(2, 0, 4),
    ],
    ids=["one row", "rows", "transposed", "every other row", "strided", "no row", "no position"],
)
def test_inputs_of_any_shape_and_stride_fit(x):
    model = layers((4, 5))
    with torch.no_grad():
        expected = model(x)
        with packed(model):
            answer = model(x)
    torch.testing.assert_close(answer, expected, rtol=0, atol=1e-5)


def calls(monkeypatch):
    """The layers that the packed road answered for, by number of calls."""
    answered = []
    linear = module._linear

    def counted(*arguments):
        answered.append(arguments[0])
        return linear(*arguments)

    monkeypatch.setattr(module, "_linear", counted)
    return answered


def test_a_language_model_answers_through_every_packed_layer(monkeypatch):
    answered = calls(monkeypatch)
    model = tiny.llama(0, dtype=torch.float32)
    ids = torch.tensor([[1, 2, 3, 4]])
    with torch.no_grad():
        expected = model(ids).logits
        with packed(model) as packing:
            answer = model(ids).logits
            assert len(answered) == packing.layers == 2 * 7 + 1
        again = model(ids).logits
    assert len(answered) == 15, "after the block the plain layers answer"
    torch.testing.assert_close(answer, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(again, expected, rtol=0, atol=0)


def heads_of_keys(monkeypatch, model, width=2):
    """How many heads the keys have that torch's attention is given, at each layer."""
    seen = []
    attend = nn.functional.scaled_dot_product_attention

    def spied(query, key, value, **options):
        seen.append(key.shape[1])
        return attend(query, key, value, **options)

    ids = torch.tensor([[1, 2, 3, 4, 5, 6]])
    with torch.no_grad(), monkeypatch.context() as patch:
        cache = model(ids[:, :-width], use_cache=True).past_key_values
        patch.setattr(nn.functional, "scaled_dot_product_attention", spied)
        logits = model(ids[:, -width:], past_key_values=cache).logits
    return set(seen), logits


def test_keys_are_not_copied_for_every_query_head(monkeypatch):
    monkeypatch.delenv(module.GROUPED, raising=False)
    model = tiny.llama(0, dtype=torch.float32)
    copied, expected = heads_of_keys(monkeypatch, model)
    with packed(model):
        shared, answer = heads_of_keys(monkeypatch, model)
    again, _ = heads_of_keys(monkeypatch, model)
    heads = model.config.num_attention_heads, model.config.num_key_value_heads
    assert (copied, shared, again) == ({heads[0]}, {heads[1]}, {heads[0]})
    torch.testing.assert_close(answer, expected, rtol=0, atol=1e-5)


def test_the_switch_of_attention_is_given_back_as_it_was(monkeypatch):
    monkeypatch.delenv(module.GROUPED, raising=False)
    one, other = layers((4, 5)), layers((4, 5), seed=1)
    with packed(one):
        with pytest.raises(KeyError, match="inside"), packed(other):
            raise KeyError("inside")
        assert os.environ[module.GROUPED] == "1", "another block is still open"
    assert module.GROUPED not in os.environ
    with pytest.warns(RuntimeWarning, match="no layer is packed"), packed(one.double()):
        assert module.GROUPED not in os.environ, "nothing is packed"
    monkeypatch.setenv(module.GROUPED, "0")
    with packed(other):
        assert os.environ[module.GROUPED] == "0", "whoever has set it has decided"
    assert os.environ[module.GROUPED] == "0"


def tied():
    """A model whose embedding is its output layer's weight."""
    model = tiny.llama(0, dtype=torch.float32)
    model.config.tie_word_embeddings = True
    model.lm_head.weight = model.model.embed_tokens.weight
    return model


def test_tied_weights_stay_tied_and_answer_alike():
    model, ids = tied(), torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        expected = model(ids).logits
        with packed(model):
            assert model.get_output_embeddings().weight is model.model.embed_tokens.weight
            torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=1e-5)


def snapshot(model):
    return {
        "modules": [(name, id(m), sorted(m.__dict__)) for name, m in model.named_modules()],
        "parameters": [
            (name, id(p), p.data_ptr(), p._version, p.requires_grad)
            for name, p in model.named_parameters(remove_duplicate=False)
        ],
        "training": [m.training for m in model.modules()],
        "forwards": [m.forward for m in model.modules()],
    }


@pytest.mark.parametrize("make", [lambda: tiny.llama(0, dtype=torch.float32), tied])
def test_the_model_is_given_back_exactly(make):
    model = make()
    before, state = snapshot(model), {k: v.clone() for k, v in model.state_dict().items()}
    with packed(model):
        assert snapshot(model)["parameters"] == before["parameters"]
        assert snapshot(model)["forwards"] != before["forwards"]
    assert snapshot(model) == before
    with pytest.raises(KeyError, match="inside"), packed(model):
        raise KeyError("inside")
    assert snapshot(model) == before
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_a_layer_that_cannot_be_packed_midway_leaves_none_packed(monkeypatch):
    model, pack = layers((4, 4), (4, 4)), module._pack
    before, left = snapshot(model), [1]

    def failing(weight):
        if not left:
            raise MemoryError("no room for a second copy")
        left.pop()
        return pack(weight)

    monkeypatch.setattr(module, "_pack", failing)
    with pytest.raises(MemoryError, match="no room"), packed(model):
        raise AssertionError("never entered")
    assert snapshot(model) == before


def test_gradients_come_from_the_plain_layer(monkeypatch):
    answered = calls(monkeypatch)
    model, x = layers((4, 3)), torch.randn(2, 4)
    model(x).sum().backward()
    expected = model[0].weight.grad.clone()
    model.zero_grad()
    with packed(model):
        model(x).sum().backward()
    assert torch.equal(model[0].weight.grad, expected)
    assert not answered


def test_a_changed_weight_is_never_answered_for_by_the_old_one():
    model, x = layers((4, 3)), torch.randn(2, 4)
    with torch.no_grad(), packed(model):
        model[0].weight.mul_(2)
        assert torch.equal(model(x), nn.functional.linear(x, model[0].weight, model[0].bias))
        model[0].weight = nn.Parameter(torch.ones(3, 4))
        assert torch.equal(model(x), nn.functional.linear(x, model[0].weight, model[0].bias))
        model.double()
        assert model(x.double()).dtype == torch.float64


def test_a_copy_made_inside_answers_from_its_own_weights():
    model, x = layers((4, 3)), torch.randn(2, 4)
    with torch.no_grad(), packed(model):
        other = copy.deepcopy(model)
        other[0].weight.zero_()
        assert torch.equal(other(x), other[0].bias.expand(2, 3))


def test_a_model_may_be_named_twice_or_packed_already():
    model, x = layers((4, 3)), torch.randn(2, 4)
    with torch.no_grad(), packed(model, model) as packing:
        expected = model(x)
        with packed(model) as inner:
            assert (inner.layers, inner.reason) == (1, None)
        assert packing.layers == 1
        assert "forward" in model[0].__dict__, "the inner block must not unpack"
        assert torch.equal(model(x), expected)
    assert "forward" not in model[0].__dict__


def test_the_memory_reported_is_that_of_the_weights_once_more():
    model = tiny.llama(0, dtype=torch.float32)
    linear = [m for m in model.modules() if isinstance(m, nn.Linear)]
    with packed(model) as packing:
        assert packing.num_bytes == sum(4 * m.weight.numel() for m in linear)


def bare():
    return nn.Sequential(nn.ReLU())


def odd():
    return nn.Sequential(type("Odd", (nn.Linear,), {})(4, 3))


def inference():
    with torch.inference_mode():
        return nn.Sequential(nn.Linear(4, 3))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: layers((4, 3)).double(), "needs float32 on a CPU, .* torch.float64 on cpu"),
        (lambda: layers((4, 3)).bfloat16(), "needs float32 on a CPU, .* torch.bfloat16 on cpu"),
        (lambda: layers((4, 3)).to("meta"), "needs float32 on a CPU, .* on meta"),
        (bare, "there is no nn.Linear layer"),
        (odd, "Odd is not nn.Linear itself"),
        (inference, "inference mode"),
    ],
)
def test_what_cannot_be_packed_says_so_and_answers_as_before(make, reason):
    model = make()
    forwards = [m.forward for m in model.modules()]
    with pytest.warns(RuntimeWarning, match=f"no layer is packed.*{reason}"), packed(model) as done:
        inside = [m.forward for m in model.modules()]
    assert inside == forwards
    assert (done.layers, done.num_bytes) == (0, 0)
    assert re.search(reason, done.reason)


def test_a_mixed_model_is_packed_where_it_can_be():
    model = nn.Sequential(layers((4, 4)), layers((4, 4)).double())
    with packed(model) as packing:
        assert (packing.layers, packing.plain) == (1, 1)
    assert "float64" in packing.reason


@pytest.mark.parametrize("absent", [None, "_reorder_linear_weight", "_linear_pointwise"])
def test_a_torch_without_the_private_operators_falls_back(monkeypatch, absent):
    class Operators:
        def __getattr__(self, name):
            if absent in (None, name):
                raise AttributeError(f"no operator {name}")
            return getattr(operators, name)

    operators = torch.ops.mkldnn
    monkeypatch.setattr(torch.ops, "mkldnn", Operators())
    monkeypatch.setattr(module, "_missing", module._missing.__wrapped__)
    model, x = layers((4, 3)), torch.randn(2, 4)
    assert "no working oneDNN linear layer (no operator" in why_not(model[0])
    expected = model(x)
    with pytest.warns(RuntimeWarning, match="no working oneDNN"), torch.no_grad(), packed(model):
        assert torch.equal(model(x), expected)


def test_an_operator_that_answers_wrongly_is_not_used(monkeypatch):
    monkeypatch.setattr(module, "_linear", lambda x, weight, bias: x)
    monkeypatch.setattr(module, "_missing", module._missing.__wrapped__)
    assert "wrong answers" in why_not(nn.Linear(4, 3))
