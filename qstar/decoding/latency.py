"""What forward passes of each width take, measured for the choice of a scheme."""

import time
import weakref
from typing import Any

import torch

from .costs import Costs
from .kv_cache import KVCache
from .parents import Parents
from .state import State
from .timing import Timer, timed
from .traits import modules_of

MEASURED_WIDTHS = (1, 2, 3, 5, 9)
MEASURED_TIMES = 4
MEASURED_SECONDS = 2.0  # after which one forward of each kind must do

_COSTS: weakref.WeakKeyDictionary[Any, dict[tuple[Any, ...], Costs]] = weakref.WeakKeyDictionary()
"""What was measured, by policy; so that a seed repeats within a process."""


def measured_costs(parents: Parents, state: State) -> Costs:
    """What forward passes of each width take here, behind the prompts; measured once.

    Args:
        parents: The models, reading apart.
        state: The prompts.
    """
    caches = parents.caches
    policy = caches["policy"].model
    models = [cache.model for cache in caches.values()]
    # Layers that answer in another way (`packed`) take another time.
    swapped = ["forward" in vars(module) for model in models for module in modules_of(model)]
    # Weak references, for a later model may be given the address of one that is gone.
    kinds = [(weakref.ref(model), str(model.device), model.dtype) for model in models]
    static = tuple(cache.static for cache in caches.values())
    key = (len(state.rows), sum(swapped), static, *kinds)
    kept = _COSTS.setdefault(policy, {})
    # A call for few tokens measures few widths, which must not be all that later calls know.
    if key not in kept or max(kept[key].policy) < max(_widths(state.limit)):
        parents.start(state)
        readers = {name: (cache, parents.unread(name, state)) for name, cache in caches.items()}
        if caches["teacher"].model is policy:
            del readers["teacher"]
            both = parents.together()
            both.start(state)
            readers["both"] = both.caches["both"], both.unread("both", state)
        seconds = _seconds_by_width(readers, state.limit)
        kept[key] = Costs(
            policy=seconds["policy"],
            teacher=seconds.get("teacher", seconds["policy"]),
            draft=seconds.get("draft"),
            both=seconds.get("both"),
        )
    return kept[key]


def _widths(limit: int) -> list[int]:
    return [width for width in MEASURED_WIDTHS if width <= limit]


def _seconds_by_width(
    readers: dict[str, tuple[KVCache, list[list[int]]]], limit: int
) -> dict[str, dict[int, float]]:
    """The least time of a forward pass of each reader and width; what it read is taken back.

    They take turns, so that what else the machine does for a while falls on all of them, and of
    each the least counts: a time that something disturbed is never shorter.

    Args:
        readers: By name, a cache and what it has not read of each row.
        limit: The most columns to measure.
    """
    spent: dict[str, dict[int, float]] = {name: {} for name in readers}
    lengths = {name: list(cache.lengths) for name, (cache, _) in readers.items()}
    begun = time.perf_counter()
    for turn in range(MEASURED_TIMES + 1):
        if turn > 1 and time.perf_counter() - begun > MEASURED_SECONDS:
            break
        for name, (cache, unread) in readers.items():
            device = cache.model.device
            for width in _widths(limit)[: None if turn else 1]:
                drafts = torch.zeros(len(unread), width - 1, dtype=torch.long, device=device)
                timers: list[Timer] = []
                with timed(timers, name, width, len(unread), device):
                    cache.feed(unread, drafts, positions=width)
                cache.truncate(lengths[name])
                if turn > 0:  # the first one warms up
                    taken = timers[0].forward().seconds
                    spent[name][width] = min(taken, spent[name].get(width, taken))
    return spent
