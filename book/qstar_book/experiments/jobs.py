"""Independent runs of one experiment, several at a time, each told of as soon as it is there."""

import multiprocessing
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any

from tqdm import tqdm


def each(
    function: Callable[..., Any],
    given: Sequence[Mapping[str, Any]],
    *,
    jobs: int = 1,
    limit_s: float | None = None,
    progress: bool = False,
) -> Iterator[tuple[int, Any]]:
    """Call a function with each of these arguments; yields (place, result) as they come.

    Args:
        function: One that stands in a module by its own name.
        given: The arguments of each call, by name.
        jobs: How many processes; with one, everything runs here, in order. Each of several
            computes on one thread.
        limit_s: After so many seconds no call is begun that has not begun.
        progress: Show a bar on standard error.

    What a call raises ends the loop; what was yielded before stays valid.
    """
    begun = time.monotonic()

    def late() -> bool:
        return limit_s is not None and time.monotonic() - begun > limit_s

    with tqdm(total=len(given), unit="run", disable=not progress) as bar:
        if jobs == 1:
            for place, arguments in enumerate(given):
                if late():
                    return
                yield place, function(**arguments)
                bar.update()
            return
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(jobs, mp_context=context, initializer=_one_thread) as pool:
            places = {pool.submit(function, **x): place for place, x in enumerate(given)}
            for done in as_completed(places):
                if done.cancelled():
                    continue
                yield places[done], done.result()
                bar.update()
                if late():
                    for waiting in places:
                        waiting.cancel()


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)
