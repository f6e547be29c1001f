"""Independent runs of one experiment, several at a time, each told of as soon as it is there."""

import multiprocessing
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any

from tqdm import tqdm


def each(
    function: Callable[..., Any],
    given: Sequence[Mapping[str, Any]],
    *,
    jobs: int = 1,
    progress: bool = False,
) -> Iterator[tuple[int, Any]]:
    """Call a function with each of these arguments; yields (place, result) as they come.

    Args:
        function: One that stands in a module by its own name.
        given: The arguments of each call, by name.
        jobs: How many processes; with one, everything runs here, in order. Each of several
            computes on one thread.
        progress: Show a bar on standard error.

    Raises:
        Whatever a call raised; what was yielded before stays valid.
    """
    with tqdm(total=len(given), unit="run", disable=not progress) as bar:
        if jobs == 1:
            for place, arguments in enumerate(given):
                yield place, function(**arguments)
                bar.update()
            return
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(jobs, mp_context=context, initializer=_one_thread) as pool:
            places = {pool.submit(function, **x): place for place, x in enumerate(given)}
            for done in as_completed(places):
                yield places[done], done.result()
                bar.update()


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)
