"""Threads that share a model find it as they need it, and leave it as it was."""

import threading

import pytest
import tiny
import torch
from torch import nn

from qstar.decoding.eval_mode import eval_mode, quiet
from qstar.decoding.generate import generate
from qstar.decoding.packed import packed

PROMPT = torch.tensor([1, 4, 0])


def overlapping(first, second):
    """Enter one block, enter the other, leave the first, look, leave the second."""
    states = []
    entered, left = threading.Event(), threading.Event()

    def other():
        with second():
            entered.set()
            assert left.wait(20)
            states.append("inside")

    thread = threading.Thread(target=other)
    with first():
        thread.start()
        assert entered.wait(20)
    yield  # the first block is over, the second is not
    left.set()
    thread.join(20)
    assert states == ["inside"]
    yield


@pytest.mark.parametrize("shared", ["the model", "a part of it"])
def test_a_model_stays_in_eval_mode_until_the_last_of_its_users_has_left(shared):
    model = tiny.gpt2(1, dropout=0.5).train()
    other = model if shared == "the model" else model.transformer
    modes = [module.training for module in model.modules()]
    steps = overlapping(lambda: eval_mode(model), lambda: eval_mode(other))
    next(steps)
    assert not any(module.training for module in other.modules())
    next(steps)
    assert [module.training for module in model.modules()] == modes


def test_a_model_that_is_tried_stays_in_eval_mode_for_who_decodes_with_it():
    """Trying a cache is a use like any other: it neither ends nor outlasts another's."""
    model = tiny.gpt2(1, dropout=0.5).train()
    steps = overlapping(lambda: quiet(model), lambda: eval_mode(model))
    next(steps)
    assert not any(module.training for module in model.modules())
    next(steps)
    assert all(module.training for module in model.modules())


def test_modes_are_given_back_where_a_block_fails():
    model = tiny.gpt2(1, dropout=0.5).train()
    with pytest.raises(ZeroDivisionError), eval_mode(model):
        1 / 0  # noqa: B018
    assert all(module.training for module in model.modules())


def test_layers_stay_packed_until_the_last_block_ends():
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    with torch.no_grad():
        steps = overlapping(lambda: packed(model), lambda: packed(model[0]))
        next(steps)
        assert "forward" in model[0].__dict__
        assert "forward" not in model[1].__dict__
        next(steps)
    assert all("forward" not in layer.__dict__ for layer in model)


def test_two_threads_that_decode_with_one_model_draw_what_each_would_alone():
    policy, teacher = tiny.gpt2(1, dropout=0.5), tiny.gpt2(2, dropout=0.5)
    policy.train()
    options = {"max_new_tokens": 25, "eos_token_id": None}
    alone = [generate(policy, teacher, PROMPT, generator=s, **options).tokens for s in range(4)]
    found = {}

    def run(seed):
        found[seed] = generate(policy, teacher, PROMPT, generator=seed, **options).tokens

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [found[seed].tolist() for seed in range(4)] == [t.tolist() for t in alone]
    assert policy.training
    assert not teacher.training


@pytest.mark.parametrize("trains", [None, "model.layers.0.mlp"])
def test_only_what_trains_is_switched_and_given_back(trains, monkeypatch):
    """One module in training mode is enough; where there is none, none is written to."""
    model = tiny.llama(1).eval()
    if trains is not None:
        model.get_submodule(trains).training = True
    written = []
    set_it = torch.nn.Module.__setattr__

    def watched(module, name, value):
        if name == "training":
            written.append(value)
        set_it(module, name, value)

    monkeypatch.setattr(torch.nn.Module, "__setattr__", watched)
    with eval_mode(model):
        assert not any(module.training for module in model.modules())
    assert (written == []) == (trains is None)
    trained = [name for name, module in model.named_modules() if module.training]
    assert trained == ([] if trains is None else [trains])
