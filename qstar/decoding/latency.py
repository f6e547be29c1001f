"""What forward passes take, learned from those that a decode makes anyway."""

import math
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from .costs import PARENTS, Costs
from .kv_cache import KVCache
from .parents import Parents
from .state import Forward, State
from .traits import modules_of

SETTLED = 64
"""After so many forward passes what was learned stays, so that a seed repeats from then on."""

RISE = 0.1
"""By how much a forward pass is taken to grow with each further position, before one was seen."""

ASSUMED = 0.5
"""What that assumption weighs beside one forward pass that was seen."""

FURTHER = 8
"""How many positions beyond the widest that was seen the assumption is written down."""

COMPARED_FROM = 32
"""Calls for fewer tokens do not repay a comparison of one call for both parents with two."""

COMPARED_TIMES = 2
COMPARED_TEXT = 8
"""How many of the prompts' last tokens are read for it: to read a prompt twice takes long."""

_KNOWN: weakref.WeakKeyDictionary[Any, dict[tuple[Any, ...], "Learned"]] = (
    weakref.WeakKeyDictionary()
)
"""What was learned, by policy."""


class Learned:
    """What forward passes were seen to take; more of them are learned from until it is settled.

    A decode that knows nothing begins with two plain tokens. The first one reads the prompts, and
    the second tells the time of either parent.
    Of wider forward passes it assumes that each further position adds `RISE`, and corrects this
    by those it makes: one that was disturbed, or had to be prepared, counts as no more than
    `width` narrow ones.
    """

    def __init__(self, caches: Mapping[str, KVCache], rows: int) -> None:
        """Nothing yet of the readers of a batch of so many rows."""
        self._rows = rows
        self._weights = {
            name: sum(weight.numel() for weight in cache.model.parameters())
            for name, cache in caches.items()
        }
        # Parents of one size in one place take the same: what is seen of one is known of both.
        sizes = [(self._weights[name], caches[name].model.device) for name in PARENTS]
        self._alike = sizes[0] == sizes[1]
        # A static cache captures a forward pass of each width when it is first needed.
        captures = 1 + self._alike
        self._first = {name: -captures * int(cache.static) for name, cache in caches.items()}
        self._seen: dict[str, dict[int, tuple[int, float]]] = {}
        self._costs: Costs | None = None

    @property
    def left(self) -> float:
        """The share of `SETTLED` forward passes that are still to be seen."""
        seen = sum(max(0, n) for widths in self._seen.values() for n, _ in widths.values())
        return max(0.0, 1 - seen / SETTLED)

    @property
    def settled(self) -> bool:
        """Whether nothing more is learned."""
        return self.left == 0

    def add(self, forwards: Iterable[Forward]) -> None:
        """Learn from forward passes of all rows, unless it is settled."""
        if not self.settled:
            self._learn(forwards)

    def _learn(self, forwards: Iterable[Forward]) -> None:
        for forward in forwards:
            of_all = self._rows * (2 if forward.model == "both" else 1)
            if forward.rows != of_all or forward.begins:
                continue
            alike = self._alike and forward.model == PARENTS[1]
            widths = self._seen.setdefault(PARENTS[0] if alike else forward.model, {})
            first = self._first.get(forward.model, self._first[PARENTS[0]])
            n, least = widths.get(forward.width, (first, math.inf))
            # A time that something disturbed is never shorter.
            widths[forward.width] = n + 1, min(least, forward.seconds) if n >= 0 else least
        self._costs = self._estimate()

    def costs(self) -> Costs | None:
        """What forward passes take, as far as is known; None before every parent has made one."""
        return self._costs

    def compare(self, parents: Parents, state: State) -> None:
        """Find out how one call for both parents compares with one for either, where unknown.

        Short calls may have settled the time of one of the two without the other; this adds it.

        Args:
            parents: One model that is both, reading apart.
            state: The prompts.
        """
        if {PARENTS[0], "both"} <= self._seen.keys():
            return
        ends = {of: [text[-COMPARED_TEXT:] for text in own] for of, own in state.prompts.items()}
        state = replace(state, prompts=ends)
        one = Parents({PARENTS[0]: parents.caches[PARENTS[0]]}, vocab=parents.vocab)
        both = parents.together()
        for reader in (one, both):
            reader.start(state)
        for turn in range(1 + COMPARED_TIMES):
            one.read(PARENTS[:1], state)
            both.read(PARENTS, state)
            forwards = (*one.forwards(), *both.forwards())
            if turn > 0:  # the first one warms up
                self._learn(forwards)

    def _estimate(self) -> Costs | None:
        known = {
            name: _by_width({width: seen for width, seen in widths.items() if seen[0] > 0})
            for name, widths in self._seen.items()
            if widths.get(1, (0, 0.0))[0] > 0
        }
        both = known.get("both")
        # One call for both takes no less than one for either.
        policy, teacher = (known.get(name) or both for name in PARENTS)
        teacher = policy if self._alike else teacher
        if policy is None or teacher is None:
            return None
        draft = known.get("draft")
        if draft is None and "draft" in self._weights:
            smaller = self._weights["draft"] / self._weights[PARENTS[0]]
            draft = {width: smaller * seconds for width, seconds in policy.items()}
        return Costs(policy=policy, teacher=teacher, draft=draft, both=both)


def _by_width(seen: Mapping[int, tuple[int, float]]) -> dict[int, float]:
    """Seconds by width, from how often each was seen and the least that it took."""
    one = seen[1][1]
    seconds = {1: one}
    for width, (n, least) in seen.items():
        if width > 1:
            least = min(max(least, one), width * one)
            assumed = one * (1 + RISE * (width - 1))
            seconds[width] = (ASSUMED * assumed + n * least) / (ASSUMED + n)
    if len(seconds) <= 2:
        # The first wide one tells what any costs, by other kernels on another path; then they grow.
        widest = max(seconds)
        seconds[widest + FURTHER] = seconds[widest] + one * RISE * FURTHER
    return seconds


def learned(caches: Mapping[str, KVCache], rows: int) -> Learned:
    """What is known of these models here; the same object from call to call.

    Args:
        caches: By model, reading apart.
        rows: Of the batch.
    """
    policy = caches[PARENTS[0]].model
    models = [cache.model for cache in caches.values()]
    # Layers that answer in another way (`packed`) take another time.
    swapped = ["forward" in vars(module) for model in models for module in modules_of(model)]
    # Weak references, for a later model may be given the address of one that is gone.
    kinds = [(weakref.ref(model), str(model.device), model.dtype) for model in models]
    static = tuple(cache.static for cache in caches.values())
    kept = _KNOWN.setdefault(policy, {})
    return kept.setdefault((rows, sum(swapped), static, *kinds), Learned(caches, rows))


def forget(policy: Any) -> None:
    """Forget what was learned of a policy and whatever stood beside it."""
    _KNOWN.pop(policy, None)
