"""Every scheme, with drafts as short as show it, and prompts, for enumerations of a decoder."""

import gc

import tiny
import torch

from qstar.decoding.costs import Costs

VOCAB = 3

PROMPTS = [
    tuple(map(torch.tensor, pair))
    for pair in (([1], [2, 0, 1]), ([1, 2, 0, 0], [0]), ([1, 2, 0, 1, 2], [2, 1, 1, 0, 2]))
]

COSTS = Costs(policy={1: 1.0, 9: 1.4}, teacher={1: 1.0, 9: 1.4}, draft={1: 0.2})

SHORT = {  # every scheme, with drafts as short as show it
    "plain": {"scheme": "plain"},
    "the policy drafts": {"scheme": "one-sided", "gamma": 1, "drafter": "policy"},
    "the teacher drafts": {"scheme": "one-sided", "gamma": 1, "drafter": "teacher"},
    "alternating": {"scheme": "alternating", "gamma": 1},
    "coin": {"scheme": "coin", "gamma": 2},
    "lookup": {"scheme": "lookup", "gamma": 1},
    "a third model drafts": {"scheme": "draft-model", "gamma": 1},
    "auto": {"scheme": "auto", "costs": COSTS},
}
LONGER = {
    "the policy drafts two": {"scheme": "one-sided", "gamma": 2, "drafter": "policy"},
    "the teacher drafts two": {"scheme": "one-sided", "gamma": 2, "drafter": "teacher"},
    "alternating twos": {"scheme": "alternating", "gamma": 2},
}
OF_THREE = {  # a third's draft comes with a bonus token: two drafts need room for three
    "lookup of two": {"scheme": "lookup", "gamma": 2},
    "a third model drafts two": {"scheme": "draft-model", "gamma": 2},
}


def without_garbage_collection():
    """A batch of thousands of rows is thousands of lists; looking through them takes the time.

    A fixture for a module: `pytest.fixture(autouse=True, scope="module")(...)`.
    """
    gc.collect()
    gc.disable()
    yield
    gc.enable()
    gc.collect()


def asked(options, vocab=VOCAB):
    if options["scheme"] == "draft-model":
        return options | {"draft_model": tiny.gpt2(7, vocab=vocab, sharpness=0.5)}
    return options
