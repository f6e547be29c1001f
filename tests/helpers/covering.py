"""Fewer cases than a full product of options, in which every two options still meet."""

import itertools
from collections.abc import Iterable
from typing import Any


def all_pairs(*factors: Iterable[Any]) -> list[tuple[Any, ...]]:
    """Tuples of one value of each factor, such that any two values of two factors share a tuple.

    For options between which no interaction of three is plausible; known mistakes that need one
    are tests of their own. Greedy and deterministic: each tuple is the one of the full product
    that holds the most pairs which have not met yet, the first of several.
    """
    values = [list(factor) for factor in factors]
    product = list(itertools.product(*map(range, map(len, values))))
    if len(values) < 2:
        return [tuple(v[i] for v, i in zip(values, case, strict=True)) for case in product]

    def pairs(case: tuple[int, ...]) -> set[tuple[tuple[int, int], ...]]:
        return set(itertools.combinations(enumerate(case), 2))

    open_pairs = set().union(*map(pairs, product))
    chosen = []
    while open_pairs:
        best = max(product, key=lambda case: len(pairs(case) & open_pairs))
        open_pairs -= pairs(best)
        chosen.append(best)
    return [tuple(v[i] for v, i in zip(values, case, strict=True)) for case in sorted(chosen)]
