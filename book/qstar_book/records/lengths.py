"""What the length of a text costs, and when it is there: first calls of "auto", streamed answers,
long prompts, batches.

    qstar-book record lengths --out data/results/lengths_cpu.json

makes the record that the chapter on speed reads; with `--pairs` or `--parts` these cells anew, and
the others as they were. The ways of a cell take turns on the same prompts, as in
`records.decoding`, whose pairs these are; each pair has a process of its own.

The record (JSON) holds

    command, date, machine, versions, model
    first_calls  for each of `FIRST` and each length: pair, layers, new_tokens, load, and runs of
                 "plain", of "plain, one call" where one model is both parents, and of "auto", which
                 is made to forget before each call what it learned of the pair
    streamed     for each of `STREAMED`: pair, layers, new_tokens, load, and runs whose `arrivals`
                 are [seconds since the call began, new tokens], one for each time that tokens came
    contexts     for each of `CONTEXTS`: pair, layers, context, new_tokens, load, runs
    batches      for each of `BATCHES`: pair, layers, rows, new_tokens, load, runs; tokens are those
                 of all rows

each with the date when it was made and the source of `qstar` that made it, and with runs as in
`records.decoding`, without what they accepted; newer ones have "prompts_s", the seconds in which
prompts were read before the first round.
"""

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qstar.decoding import generate as decode
from qstar.decoding import latency
from qstar.decoding.packed import packed

from .. import shipped_model
from ..files import RefusedError, in_own_process, write_json
from . import corpus, decoding

FIRST: Mapping[tuple[str, str], tuple[str, ...]] = {
    ("two prompts", "packed"): ("plain", "plain, one call", "auto"),
    ("noised copy", "packed"): ("plain", "auto"),
    ("noised copy", "as loaded"): ("plain", "auto"),
    ("lora-manual", "packed"): ("plain", "auto"),
    ("far copy", "as loaded"): ("plain", "auto"),
}
"""Pairs whose first calls are measured, and the ways."""

LENGTHS = {8: 8, 32: 6, 128: 3}
"""New tokens of a first call, and how many blocks of them."""

ONE = ("noised copy", "packed")
"""The pair whose long prompts and batches are measured."""

STREAMED: Mapping[tuple[str, str], tuple[str, ...]] = {
    ("two prompts", "packed"): ("plain", "plain, one call", "alternating 1", "coin", "auto"),
    ("lora-manual", "packed"): ("plain", "alternating 1", "coin", "auto"),
}
"""Real pairs whose answers are streamed, and the ways."""

CONTEXTS = (64, 500, 1000, 2000)
BATCHES = (1, 4, 16)
TOKENS, BLOCKS = 24, 3
"""New tokens of a block there, and how many blocks."""

ANSWER, ANSWERS = 40, 8
"""Tokens of a streamed answer, and how many of each way."""

PARTS = ("first_calls", "streamed", "contexts", "batches")

Run = Callable[[int, str], dict[str, Any]]
Models = tuple[Any, Any]


def in_turns(ways: Sequence[str], run: Run, *, blocks: int) -> dict[str, Any]:
    """Runs of all ways, block by block, each block beginning with another one.

    Args:
        ways: Their names.
        run: (block, way) -> what was measured.
        blocks: How many.
    """
    load, runs = os.getloadavg()[0], []
    for block in range(blocks):
        start = block % len(ways)
        for way in [*ways[start:], *ways[:start]]:
            runs.append({"way": way, "prompt": block, "seed": block, **run(block, way)})
    return {"load": [load, os.getloadavg()[0]], "runs": runs}


def timed(models: Models, prompts: Any, way: str, **options: Any) -> dict[str, Any]:
    """One decode: seconds, in all, before the first round (what of long prompts is read there), and
    in the models after that; tokens; calls of the models; and how many rounds of each scheme."""
    asked = {**decoding.OURS[way], **options}
    with decoding.clocks() as spent:
        result = decode.generate(*models, *prompts, **asked)
    rounds = [r.scheme for r in result.trace.rounds]
    calls = [forward for r in result.trace.rounds for forward in r.forwards]
    return {
        **spent,
        "prompts_s": round(sum(forward.seconds for forward in result.trace.prefill), 4),
        "model_s": round(sum(forward.seconds for forward in calls), 4),
        "tokens": int(result.lengths.sum()),
        "model_calls": result.trace.model_calls,
        "schemes": {scheme: rounds.count(scheme) for scheme in dict.fromkeys(rounds)},
    }


def first_calls(pair: str, layers: str, models: Models, tokenizer: Any) -> list[dict[str, Any]]:
    """Calls that know nothing of the pair, at each of `LENGTHS`."""
    asked, cells = decoding.questions_of(pair, tokenizer), []
    for length, blocks in LENGTHS.items():

        def run(block: int, way: str, length: int = length) -> dict[str, Any]:
            latency.forget(models[0])
            prompts = asked[block % len(asked)]
            return timed(models, prompts, way, max_new_tokens=length, generator=block)

        found = in_turns(FIRST[pair, layers], run, blocks=blocks)
        cells.append({"new_tokens": length, **found})
    return cells


def streamed(pair: str, layers: str, models: Models, tokenizer: Any) -> list[dict[str, Any]]:
    """When the tokens of an answer come."""
    asked = decoding.questions_of(pair, tokenizer)

    def run(block: int, way: str) -> dict[str, Any]:
        arrivals: list[tuple[float, int]] = []
        begun = time.perf_counter()

        def arrived(tokens: Tensor) -> None:
            arrivals.append((round(time.perf_counter() - begun, 4), tokens.shape[1]))

        prompts, named = asked[block % len(asked)], {"max_new_tokens": ANSWER, "generator": block}
        return timed(models, prompts, way, **named, on_tokens=arrived) | {"arrivals": arrivals}

    return [{"new_tokens": ANSWER, **in_turns(STREAMED[pair, layers], run, blocks=ANSWERS)}]


def as_seen(cell: Mapping[str, Any]) -> dict[str, Any]:
    """A cell of `streamed`, of whose runs is also said what people see.

    Of each run: "first_s", the seconds until tokens are there; "answer_s", until all are;
    "pauses_s", those between one arrival and the next; and "outside", the share of the time from
    the first round on that is not spent in the models.
    """
    runs = []
    for run in cell["runs"]:
        came = np.array([seconds for seconds, _ in run["arrivals"]])
        runs.append(
            run
            | {"first_s": float(came[0]), "answer_s": float(came[-1])}
            | {"pauses_s": np.diff(came).tolist()}
            | {"outside": 1 - run["model_s"] / (run["wall_s"] - run["prompts_s"])}
        )
    return {**cell, "runs": runs}


def contexts(models: Models, tokenizer: Any) -> list[dict[str, Any]]:
    """Prompts of each length, cut from one text."""
    texts = [q.user for q in corpus.read_questions(corpus.data_file("pair_questions.json"))]
    ids = tokenizer("\n".join(texts), return_tensors="pt").input_ids[0]
    cells = []
    for length in CONTEXTS:
        prompt = ids.repeat(-(-length // len(ids)))[:length]

        def run(block: int, way: str, prompt: Tensor = prompt) -> dict[str, Any]:
            return timed(models, (prompt, prompt), way, max_new_tokens=TOKENS, generator=block)

        found = in_turns(("plain", "alternating 1", "coin", "auto"), run, blocks=BLOCKS)
        cells.append({"context": length, "new_tokens": TOKENS, **found})
    return cells


def batches(models: Models, tokenizer: Any) -> list[dict[str, Any]]:
    """Questions asked by so many rows at once."""
    asked, cells = decoding.questions_of(ONE[0], tokenizer), []
    for rows in BATCHES:
        prompts = [[asked[row % len(asked)][side] for row in range(rows)] for side in (0, 1)]

        def run(block: int, way: str, prompts: Any = prompts) -> dict[str, Any]:
            return timed(models, prompts, way, max_new_tokens=TOKENS, generator=block)

        ways = ("plain", "alternating 1", "auto")
        cells.append({"rows": rows, "new_tokens": TOKENS, **in_turns(ways, run, blocks=BLOCKS)})
    return cells


def measure_pair(
    *, pair: str, layers: str, model: str, threads: int, parts: Sequence[str] = PARTS
) -> dict[str, Any]:
    """The cells of one pair, in this process: of these parts, those that measure it."""
    torch.set_num_threads(threads)
    policy, teacher, tokenizer = decoding.models_of(pair, model)
    for parent in {policy, teacher}:
        parent.generation_config.eos_token_id = None
    key, models = (pair, layers), (policy, teacher)
    ways: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "first_calls": lambda: first_calls(*key, models, tokenizer),
        "streamed": lambda: streamed(*key, models, tokenizer),
        "contexts": lambda: contexts(models, tokenizer),
        "batches": lambda: batches(models, tokenizer),
    }
    with packed(policy, teacher) if layers == "packed" else contextlib.nullcontext():
        warm = decoding.questions_of(pair, tokenizer)[0]
        for scheme in ("plain", "coin"):
            decode.generate(
                policy, teacher, *warm, max_new_tokens=8, scheme=scheme, generator=0, one_call=False
            )
        found = {part: ways[part]() for part in parts if key in measured_in(part)}
    made = {"pair": pair, "layers": layers, **decoding.made_now()}
    return {part: [made | cell for cell in cells] for part, cells in found.items()}


def measured_in(part: str) -> list[tuple[str, str]]:
    """The pairs, with their layers, that a part of the record measures."""
    return {"first_calls": [*FIRST], "streamed": [*STREAMED]}.get(part, [ONE])


def command(
    *,
    out: Path,
    model: str | None,
    threads: int,
    pairs: Sequence[str] | None = None,
    parts: Sequence[str] | None = None,
) -> None:
    """`qstar-book record lengths`.

    Raises:
        RefusedError: A pair or a part is not known.
    """
    name = model or shipped_model.DEFAULT
    wanted = decoding.chosen_pairs(pairs, [pair for pair, _ in FIRST])
    if unknown := sorted(set(parts or ()) - {*PARTS}):
        raise RefusedError(f"no part {', '.join(unknown)}; the parts are {', '.join(PARTS)}")
    parts = parts or PARTS
    record: dict[str, list[Any]] = {part: [] for part in PARTS}
    if {*parts} != {*PARTS} or {*wanted} != {pair for pair, _ in FIRST}:
        held = json.loads(out.read_text(encoding="utf8")) if out.exists() else {}
        record |= {part: held.get(part, []) for part in PARTS}
    for pair, layers in FIRST:
        its = [part for part in parts if (pair, layers) in measured_in(part)]
        if pair not in wanted or not its:
            continue
        print(f"{pair}, layers {layers}", file=sys.stderr)
        given = {"pair": pair, "layers": layers, "model": name, "threads": threads, "parts": its}
        its_own = decoding.of_threads(threads)
        for part, cells in in_own_process(measure_pair, given, environment=its_own).items():
            others = [c for c in record[part] if (c["pair"], c["layers"]) != (pair, layers)]
            record[part] = sorted(
                others + cells, key=lambda cell: list(FIRST).index((cell["pair"], cell["layers"]))
            )
        write_json(out, {**decoding.made_on("cpu", threads), "model": name, **record})
    print(out)
