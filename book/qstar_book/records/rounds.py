"""Where the time of a round goes on a CPU: in the models, in solving, judging and drawing, and in
what is left of it, the host's own work.

Of decodes that are made for it, since looking at the clock takes time too; the times of
`records.decoding` are of others.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

from torch import Tensor

from qstar import rows_torch
from qstar.decoding import generate as decode
from qstar.decoding.judging import Rule

TIMED = {
    "solving": (rows_torch, "solve_kl_symmetry"),
    "judging": (Rule, "judge"),  # which solves; that is taken off
    "drawing": (Rule, "draw"),
}
"""Steps of a round outside the models, and what does them."""


def where_the_time_goes(
    policy: Any, teacher: Any, prompts: Sequence[Sequence[Tensor]], **options: Any
) -> dict[str, float]:
    """Milliseconds of a round, in the models, in each of `TIMED` and in the rest; a mean.

    Args:
        policy: A causal language model, on a CPU.
        teacher: Another, or the same.
        prompts: The policy's and the teacher's token ids, for each prompt. Shape (length,).
        options: What `generate` is told besides.

    Returns:
        "round", "models", the names of `TIMED`, "rest"; and of a whole call "around", before its
        first round and after its last one, with what it is told to check.
    """
    spent: dict[str, float] = dict.fromkeys(TIMED, 0.0)
    wall, models, count, calls = 0.0, 0.0, 0, 0.0
    with _clocks_on(TIMED, spent):
        for seed, pair in enumerate(prompts):
            begun = time.perf_counter()
            result = decode.generate(policy, teacher, *pair, generator=seed, **options)
            calls += time.perf_counter() - begun
            of_rounds = result.trace.rounds
            wall += sum(r.seconds for r in of_rounds)
            models += sum(forward.seconds for r in of_rounds for forward in r.forwards)
            count += len(of_rounds)
    spent["judging"] -= spent["solving"]
    around = (calls - wall) / len(prompts)
    found = {"round": wall, "models": models, **{name: spent[name] for name in TIMED}}
    found["rest"] = wall - models - sum(spent[name] for name in TIMED)
    return {name: 1e3 * x / count for name, x in found.items()} | {"around": 1e3 * around}


@contextlib.contextmanager
def _clocks_on(places: dict[str, tuple[Any, str]], spent: dict[str, float]) -> Iterator[None]:
    """Let functions add what they take to `spent`, inside a `with` block."""

    def clocked(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **named: Any) -> Any:
            begun = time.perf_counter()
            try:
                return function(*args, **named)
            finally:
                spent[name] += time.perf_counter() - begun

        return call

    with contextlib.ExitStack() as stack:
        for name, (owner, attribute) in places.items():
            call = clocked(name, getattr(owner, attribute))
            stack.enter_context(mock.patch.object(owner, attribute, call))
        yield
