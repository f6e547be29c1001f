"""Independent runs of one experiment, several at a time, each told of as soon as it is there."""

import json
import multiprocessing
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from itertools import count, islice
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ..files import RefusedError, cpu_name, provenance, write_json


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
    torch.set_num_threads(1)


def device_name(device: str) -> str:
    """What the GPU, or the processor, calls itself."""
    return torch.cuda.get_device_name() if device.startswith("cuda") else cpu_name()


Keep = Callable[[dict[str, Any]], None]


def collect(
    made: dict[str, Any],
    function: Callable[..., Any],
    given: Sequence[Mapping[str, Any]],
    *,
    order: Callable[[Any], Any],
    processes: int = 1,
    limit_s: float | None = None,
    keep: Keep | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """The record with each call's result in its "runs".

    Args:
        made: What is there already, perhaps with "runs".
        function: As in `each`.
        given: As in `each`.
        order: The key by which runs are sorted, however they come.
        processes: How many runs at a time.
        limit_s: After so many seconds no run is begun.
        keep: Called with what is there after each run.
        progress: Show a bar on standard error.
    """
    made.setdefault("runs", [])
    for _, found in each(function, given, jobs=processes, limit_s=limit_s, progress=progress):
        made["runs"] = sorted([*made["runs"], found], key=order)
        if keep is not None:
            keep(made)
    return made


def compare(
    made: dict[str, Any],
    function: Callable[..., Any],
    *,
    quantity: str,
    device: str,
    processes: int = 1,
    **how: Any,
) -> dict[str, Any]:
    """Every way and seed of the configuration in `made`, at its best rate if it has several.

    Args:
        made: What is there already, with the fields of the configuration as its "config"; if it
            has "runs" and a "scan" of the rates, they stay.
        function: As in `best_rate`.
        quantity: As in `best_rate`.
        device: Where.
        processes: How many runs at a time.
        how: What else `collect` takes.
    """
    told = made["config"]
    if told["rates"]:
        if "scan" not in made:
            made["scan"] = best_rate(
                function, told, quantity=quantity, device=device, processes=processes
            )
        told["learning_rate"] = made["scan"]["rate"]
    tried = made.get("scan", {}).get("seed")
    seeds = list(islice((seed for seed in count() if seed != tried), told["seeds"]))
    there = {(one["way"], one["seed"]) for one in made.get("runs", [])}
    given = [
        {"config": told, "way": way, "seed": seed, "device": device}
        for seed in seeds
        for way in told["ways"]
        if (way, seed) not in there
    ]

    def order(one: Mapping[str, Any]) -> tuple[int, int]:
        return told["ways"].index(one["way"]), one["seed"]

    return collect(made, function, given, order=order, processes=processes, **how)


def best_rate(
    function: Callable[..., Any],
    told: Mapping[str, Any],
    *,
    quantity: str,
    device: str,
    processes: int = 1,
) -> dict[str, Any]:
    """The learning rate at which rollouts of the policy itself end best; every way then gets it.

    Each rate is tried on one seed, which is none of those that are compared afterwards.

    Args:
        function: Makes one run, with a "curve".
        told: The fields of its configuration, among them "rates" and "seeds".
        quantity: Of a curve's last point; the more the better.
        device: Where.
        processes: How many runs at a time.

    Returns:
        "quantity", "seed", "curves" (one for each of the rates) and the best "rate".
    """
    rates, seed = told["rates"], told["seeds"]
    given = [
        {"config": {**told, "learning_rate": r}, "way": "policy", "seed": seed, "device": device}
        for r in rates
    ]
    found = dict(each(function, given, jobs=processes))
    curves = [found[place]["curve"] for place in range(len(rates))]
    ends = [curve[-1][quantity] for curve in curves]
    best = rates[ends.index(max(ends))]
    return {"quantity": quantity, "seed": seed, "curves": curves, "rate": best}


def write(
    record: Callable[..., dict[str, Any]],
    config: Any,
    *,
    out: Path,
    device: str,
    processes: int,
    limit_s: float | None,
    more: bool = False,
) -> None:
    """Make a record and write it, after each of its runs and at the end, with its provenance.

    Args:
        record: (configuration, how) -> the record.
        config: A dataclass.
        out: The record.
        device: Where.
        processes: How many runs at a time.
        limit_s: After so many seconds no run is begun.
        more: Keep what `out` holds, and add the runs that it lacks.

    Raises:
        RefusedError: There is no record to add to, or its runs were made otherwise.
    """
    machine = {"device": device, "name": device_name(device), "processes": processes}
    made_by = provenance("torch", "transformers", **machine)
    asked: dict[str, Any] = {"device": device, "processes": processes, "limit_s": limit_s}
    if more:
        asked["held"] = held = to_go_on_with(out, config)
        made_by["earlier"] = [*held.pop("earlier", []), held_of(held, *made_by)]

    def keep(made: dict[str, Any]) -> None:
        write_json(out, made_by | made)

    keep(record(config, **asked, keep=keep, progress=True))
    print(out)


def to_go_on_with(out: Path, config: Any) -> dict[str, Any]:
    """The record at `out`, to which runs of a configuration can be added.

    Raises:
        RefusedError: There is none, or its runs were made otherwise.
    """
    if not out.exists():
        raise RefusedError(f"--more adds runs to a record; {out} does not exist")
    held: dict[str, Any] = json.loads(out.read_text(encoding="utf8"))
    told = json.loads(json.dumps(asdict(config)))
    chosen = {"seeds", "learning_rate"} if told.get("rates") else {"seeds"}
    others = [
        f"{name} {was!r}, not {told.get(name)!r}"
        for name, was in held["config"].items()
        if name not in chosen and was != told.get(name)
    ]
    if told["seeds"] < held["config"]["seeds"]:
        raise RefusedError(
            f"--more adds runs to {out}, which has {held['config']['seeds']} seeds of each way: "
            f"ask for at least as many, not for {told['seeds']}"
        )
    if others:
        raise RefusedError(f"--more adds runs like those of {out}, which has {'; '.join(others)}")
    return held


def held_of(held: Mapping[str, Any] | None, *names: str) -> dict[str, Any]:
    """These parts of a record, as far as it has them."""
    return {name: held[name] for name in names if held is not None and name in held}
