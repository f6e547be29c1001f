"""What decoding from q* took: every scheme and its peers on real text, recorded with its timings.

    qstar-book record decoding --out data/results/decoding_cpu.json

makes the record that the chapters on decoding and speed read; with `--pairs` or `--layers` these
cells anew, and the others as they were. A cell of the record is one pair of models with their
linear layers as loaded or packed (`qstar.decoding.packed`); in it every way of decoding answers the
same prompts in turn, so that whatever else the machine does falls on all of them.

The record (JSON) holds

    command, date, seed, machine {cpu, cores, threads, waiting}, versions, model
    cells       one for each of `CELLS`:
        pair, layers, about, synthetic, new_tokens, load (before and after), packed_layers
        date, source, threads  of this cell: when, by which source of `qstar`, and on how many;
            without them, those of the record
        widths      {width: {wall_s, cpu_s}} of one forward of the policy, medians
        widths_of_two_rows  the same of a call that reads two texts
        widths_of_teacher   the same of the teacher, where its size is another
        runs        one for each way and block (a prompt and a seed), in the order they were made:
            way, prompt, seed, tokens, wall_s, cpu_s, forwards, model_calls
            and of our own decoder: model_s (inside the models, but for what of a long prompt is
            read before the first round; records until November 2026 have all of the prompts read
            before it, in a forward pass of their own), begins ({model: seconds} of the forwards
            among them that read a prompt, too), rounds (each
            [scheme, gamma, proposer, drafted, tested, accepted, emitted]), and by new token
            accept_policy, accept_teacher and chernoff; of "auto" also the costs it measured
        round       {way: where the time of its rounds goes} (`records.rounds`), of some cells
        peers       {way: version of its package, or what is missing}, of ways that want a package
            that the book does not install (`records.peers`); "differs_by" of genlm-control is its
            first distribution against ours, in nats

Wall and processor seconds are of whole calls, prompts included. Each cell has a process of its own.
Record on a machine that has nothing else to do: the threads of a forward pass spin while they wait,
unless OMP_WAIT_POLICY says otherwise, and beside other work take its time from each other.
"""

import contextlib
import copy
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qstar.adapters import checkpoints
from qstar.decoding import costs
from qstar.decoding import generate as decode
from qstar.decoding.kv_cache import KVCache
from qstar.decoding.packed import packed
from qstar.decoding.traits import CACHE_NAMES

from .. import shipped_model
from ..files import RefusedError, cpu_name, in_own_process, provenance, write_json
from ..product_model import ProductModel, drafting
from . import corpus, median_with_interval, peers, rounds

OURS: Mapping[str, Mapping[str, Any]] = {
    "plain": {"scheme": "plain", "one_call": False},
    # Both parents in one call of batch 2, where they are one model: the honest baseline there.
    "plain, one call": {"scheme": "plain"},
    "alternating 1": {"scheme": "alternating", "gamma": 1},
    "alternating 2": {"scheme": "alternating", "gamma": 2},
    "coin": {"scheme": "coin"},
    "one-sided 4": {"scheme": "one-sided", "gamma": 4, "drafter": "policy"},
    "lookup 2": {"scheme": "lookup", "gamma": 2, "one_call": False},
    "auto": {"scheme": "auto"},
}
"""Ways to decode: what `decode.generate` is told. "plain" is the yardstick: two calls a token;
where one model is both parents, one call can read both texts."""

DYNAMIC: Mapping[str, Mapping[str, Any]] = {
    f"{way}, dynamic cache": {**OURS[way], "cache_implementation": "dynamic"}
    for way in ("plain", "alternating 1")
}
"""The same from a cache that grows, where an accelerator reads from one of fixed size."""

LONGER: Mapping[str, Mapping[str, Any]] = {
    f"lookup {gamma}": {**OURS["lookup 2"], "gamma": gamma} for gamma in (4, 8)
}
"""More tokens looked up at a time, for texts that repeat themselves."""

PEERS: Mapping[str, Mapping[str, Any]] = {
    "transformers plain": {},
    "transformers assisted 2": {"assistant": 2},
    "transformers assisted 4": {"assistant": 4},
    "transformers lookup 2": {"prompt_lookup_num_tokens": 2},
    "transformers lookup 8": {"prompt_lookup_num_tokens": 8},
}
"""What `generate` of transformers is told, for `product.ProductModel`."""

OTHERS = tuple(peers.PACKAGES)
"""Ways of packages that the book does not install."""


@dataclass(frozen=True, slots=True)
class Cell:
    """What is measured in one process.

    Attributes:
        pair: "two prompts" of one model; a key of `NOISE`, the model and a copy with multiplicative
            noise in its layers, under one prompt; one of `ADAPTERS`, the model and itself with that
            adapter merged, two sets of weights, under one prompt.
        layers: "packed" or "as loaded".
        ways: Keys of `OURS`, `DYNAMIC`, `LONGER` and `PEERS`, and of `OTHERS`.
        new_tokens: How many in each block; nothing ends a text earlier.
        seeds: How many of them; each with every prompt makes the blocks.
        temperature: Of q*.
        threads: At most so many: the matrices of a small model gain nothing from a second thread.
        round: Ways of which it is also said where the time of a round goes.
    """

    pair: str
    layers: str
    ways: tuple[str, ...]
    new_tokens: int = 40
    seeds: int = 1
    temperature: float = 1.0
    threads: int | None = None
    round: tuple[str, ...] = ()


REPEATING = "noised copy, repeating"
"""The pair of "noised copy", asked for what repeats its prompt or itself."""

NOISE = {"noised copy": 0.07, "far copy": 0.3, REPEATING: 0.07}
"""The size of the noise, relative to each weight."""

SHORT_PEERS = tuple(way for way in PEERS if not way.endswith("8"))

ADAPTERS = ("lora-manual", "lora-arithmetic")
"""Fine-tunes in data/adapters: real pairs of two sets of weights."""

FAMILY = ("family/1m-words+1m-numbers", "family/300k+4m")
"""Pairs of small models, trained here from scratch: of one size, and of two. A quarter of the time
of a plain token is spent outside such models."""

OF_ADAPTERS = ("plain", "alternating 1", "alternating 2", "coin", "one-sided 4", "auto")

OF_FAMILY = (*OF_ADAPTERS[:-1], "lookup 2", "auto", *SHORT_PEERS)

OF_ROUND = ("plain", "alternating 1", "coin")

CELLS = (
    Cell("two prompts", "packed", (*OURS, "genlm-control, one half"), seeds=2, round=OF_ROUND),
    Cell("two prompts", "as loaded", ("plain", "plain, one call", "alternating 1", "coin", "auto")),
    Cell(
        "noised copy",
        "packed",
        (*OF_ADAPTERS, *SHORT_PEERS, *OTHERS),
        seeds=2,
        round=OF_ROUND,
    ),
    Cell(
        "far copy", "as loaded", ("plain", "alternating 1", "coin", "auto"), new_tokens=32, seeds=2
    ),
    *(Cell(pair, "packed", OF_ADAPTERS, round=OF_ROUND) for pair in ADAPTERS),
    Cell(ADAPTERS[0], "as loaded", ("plain", "alternating 1", "coin", "auto")),
    *(Cell(pair, "as loaded", OF_FAMILY, threads=1, round=OF_ROUND) for pair in FAMILY),
    # Warm texts of a model this small repeat little: a low temperature, and long answers.
    Cell(
        REPEATING,
        "packed",
        ("plain", "alternating 1", "coin", *LONGER, "auto", "transformers lookup 8"),
        new_tokens=80,
        seeds=2,
        temperature=0.3,
    ),
)

WIDTHS = (1, 2, 3, 4, 5, 8, 16)


# --- Measuring -----------------------------------------------------------------------------------


def measure_cell(
    cell: Cell,
    policy: Any,
    teacher: Any,
    prompts: Sequence[Sequence[Tensor]],
    *,
    seed: int,
    tokenizer: Any = None,
    width_rounds: int = 15,
) -> dict[str, Any]:
    """One cell of the record; the models are those of its pair.

    Args:
        cell: What to measure.
        policy: A causal language model.
        teacher: The other, or the same.
        prompts: The policy's and the teacher's token ids, for each prompt. Shape (length,).
        seed: Of the first block; the next round of prompts has the next one.
        tokenizer: Of both, if one of the ways wants it; those that lack it are left out.
        width_rounds: How often a forward of each width is timed.
    """
    load = os.getloadavg()[0]
    for model in {policy, teacher}:
        model.generation_config.eos_token_id = None
    pack = packed(policy, teacher) if cell.layers == "packed" else contextlib.nullcontext(None)
    blocks = [(prompt, seed + i) for i in range(cell.seeds) for prompt in range(len(prompts))]
    runs = []
    with pack as packing:
        widths = {
            rows: seconds_by_width(policy, prompts[0][0], rows=rows, rounds=width_rounds)
            for rows in (1, 2)
        }
        of_teacher: dict[str, Any] = {}
        if teacher.num_parameters() != policy.num_parameters():
            of_teacher["widths_of_teacher"] = seconds_by_width(
                teacher, prompts[0][1], rounds=width_rounds
            )
        said, ways = {}, {}
        for way in cell.ways:
            if way not in OTHERS:
                ways[way] = _runner(way, policy, teacher, cell.temperature)
                continue
            other, said[way] = peers.of(way, policy, teacher, tokenizer, prompts[0])
            if other is not None:
                ways[way] = _timed(other.decode)
        for run in ways.values():  # warms up, and lets "auto" measure
            run(prompts[0], 12, seed)
        for turn, (prompt, block_seed) in enumerate(blocks):
            start = turn % len(ways)
            for way in [*ways, *ways][start : start + len(ways)]:
                found = ways[way](prompts[prompt], cell.new_tokens, block_seed)
                runs.append({"way": way, "prompt": prompt, "seed": block_seed, **found})
        goes = {
            way: rounds.where_the_time_goes(
                policy,
                teacher,
                prompts,
                max_new_tokens=cell.new_tokens,
                temperature=cell.temperature,
                **OURS[way],
            )
            for way in cell.round
            if way in ways
        }
    return {
        "pair": cell.pair,
        "layers": cell.layers,
        "new_tokens": cell.new_tokens,
        "temperature": cell.temperature,
        "load": [load, os.getloadavg()[0]],
        "packed_layers": 0 if packing is None else packing.layers,
        "threads": torch.get_num_threads(),
        "widths": widths[1],
        "widths_of_two_rows": widths[2],
        **of_teacher,
        **made_now(),
        **({"round": goes} if goes else {}),
        **({"peers": said} if said else {}),
        "runs": runs,
    }


def seconds_by_width(
    model: Any, prompt: Tensor, *, rows: int = 1, rounds: int
) -> dict[int, dict[str, float]]:
    """The median wall and processor seconds of a forward of each of `WIDTHS`, after a prompt.

    Round by round each width has its turn; what was read is taken back.
    """
    reader = KVCache(model)
    reader.reserved = len(prompt)
    spent: dict[int, list[tuple[float, float]]] = {width: [] for width in WIDTHS}
    with torch.no_grad():
        reader.start([prompt.tolist()] * rows)
        read = list(reader.lengths)
        for _ in range(rounds + 1):
            for width in WIDTHS:
                drafts = prompt[:1].repeat(rows, width - 1)
                begun = time.perf_counter(), time.process_time()
                log_p = reader.feed([[int(prompt[-1])]] * rows, drafts, positions=width)
                float(log_p[0, 0, 0])  # waits for a device
                now = time.perf_counter(), time.process_time()
                reader.truncate(read)
                spent[width].append((now[0] - begun[0], now[1] - begun[1]))
    medians = {width: np.median(times[1:], axis=0) for width, times in spent.items()}
    return {w: {"wall_s": float(wall), "cpu_s": float(cpu)} for w, (wall, cpu) in medians.items()}


Run = Callable[..., dict[str, Any]]


def _runner(way: str, policy: Any, teacher: Any, temperature: float = 1.0) -> Run:
    """What decodes and reports: called with both prompts, the number of tokens and a seed."""
    decode_one: Run
    known = {**OURS, **DYNAMIC, **LONGER, **PEERS}
    options = {**known[way], "temperature": temperature}
    if way not in PEERS:
        decode_one = partial(_ours, options, policy, teacher)
    else:
        decode_one = partial(_peer, options, policy, ProductModel(policy, teacher))
    return _timed(decode_one)


def _timed(decode_one: Run) -> Run:
    def timed(*given: Any) -> dict[str, Any]:
        with clocks() as spent:
            found = decode_one(*given)
        return {**spent, **found}

    return timed


@contextlib.contextmanager
def clocks() -> Iterator[dict[str, float]]:
    """The wall and processor seconds of what is done inside, once it is done."""
    spent: dict[str, float] = {}
    wall, cpu = time.perf_counter(), time.process_time()
    yield spent
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    spent |= {"wall_s": round(wall, 4), "cpu_s": round(cpu, 4)}


def _ours(
    options: Mapping[str, Any],
    policy: Any,
    teacher: Any,
    prompts: Sequence[Tensor],
    new_tokens: int,
    seed: int,
) -> dict[str, Any]:
    chosen: dict[str, Any] = {"max_new_tokens": new_tokens, "generator": seed, **options}
    result = decode.generate(policy, teacher, *prompts, **chosen)
    trace = result.trace
    who = trace.proposer.tolist()
    made, at = [], 0
    for r in trace.rounds:
        # A round of "alternating" that keeps all it tests emits its drafts; each has a proposer.
        proposer = decode.PROPOSERS[who[at]] if r.drafted else "none"
        made.append([r.scheme, r.gamma, proposer, r.drafted, r.tested, r.accepted, r.emitted])
        at += r.emitted
    calls = [forward for r in trace.rounds for forward in r.forwards]
    begins: dict[str, float] = {}
    for forward in calls:
        if forward.begins:
            begins[forward.model] = begins.get(forward.model, 0.0) + forward.seconds
    return {
        "tokens": int(result.lengths),
        **({"costs": _of_a_model(trace.costs)} if options["scheme"] == "auto" else {}),
        "forwards": trace.forwards,
        "model_calls": trace.model_calls,
        "model_s": round(sum(forward.seconds for forward in calls), 4),
        "begins": {model: round(spent, 4) for model, spent in begins.items()},
        "rounds": made,
        "accept_policy": [round(x, 4) for x in trace.accept_policy.tolist()],
        "accept_teacher": [round(x, 4) for x in trace.accept_teacher.tolist()],
        "accept_coin": [round(x, 4) for x in trace.accept_coin.tolist()],
        "chernoff": [float(f"{x:.4g}") for x in trace.balance.chernoff.tolist()],
    }


def _of_a_model(measured: costs.Costs | None) -> dict[str, Mapping[int, float] | None]:
    assert measured is not None  # as it is with "auto"
    return {"policy": measured.policy, "both": measured.both}


def _peer(
    options: Mapping[str, Any],
    policy: Any,
    product: Any,
    prompts: Sequence[Tensor],
    new_tokens: int,
    seed: int,
) -> dict[str, Any]:
    policy_ids, teacher_ids = prompts
    assert torch.equal(policy_ids, teacher_ids), "a product reads one prompt"
    chosen = dict(options)
    gamma = chosen.pop("assistant", None)
    torch.manual_seed(seed)
    with _counted(policy, product.teacher) as counts, contextlib.ExitStack() as stack:
        if gamma is not None:
            stack.enter_context(drafting(policy, gamma))
            chosen["assistant_model"] = policy
        text = product.generate(
            policy_ids[None],
            attention_mask=torch.ones_like(policy_ids[None]),
            do_sample=True,
            max_new_tokens=new_tokens,
            **chosen,
        )
    tokens = text.shape[-1] - len(policy_ids)
    # The calls that read the prompt are not counted, as in our own traces.
    calls = counts["calls"] - counts["prompts"]
    return {"tokens": tokens, "forwards": calls, "model_calls": calls}


@contextlib.contextmanager
def _counted(*parents: Any) -> Iterator[Counter[str]]:
    """The forwards of some models, and which of them read a first text."""
    counts: Counter[str] = Counter()

    def count(module: Any, given: Any, named: Mapping[str, Any]) -> None:
        cache = next((named[name] for name in CACHE_NAMES if name in named), None)
        counts["calls"] += 1
        counts["prompts"] += cache is None or cache.get_seq_length() == 0

    hooks = [parent.register_forward_pre_hook(count, with_kwargs=True) for parent in parents]
    try:
        yield counts
    finally:
        for hook in hooks:
            hook.remove()


def noised(model: Any, scale: float, *, seed: int = 0) -> Any:
    """A copy whose layers have every weight multiplied by 1 + scale * a standard normal number.

    A synthetic pair: it has the shape of two fine-tunes of one model, and no meaning.
    """
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    head = other.get_output_embeddings()
    with torch.no_grad():
        for module in other.modules():
            if isinstance(module, nn.Linear) and module is not head:
                noise = torch.randn(module.weight.shape, generator=generator)
                module.weight *= 1 + scale * noise.to(module.weight)
    return other


# --- Reading the record --------------------------------------------------------------------------


def find_cell(record: Mapping[str, Any], pair: str, layers: str) -> Mapping[str, Any]:
    """The cell of a pair, with its layers packed or as loaded."""
    return next(c for c in record["cells"] if (c["pair"], c["layers"]) == (pair, layers))


def runs_of(cell: Mapping[str, Any], way: str) -> list[Mapping[str, Any]]:
    """The runs of one way of decoding, block by block."""
    runs = [run for run in cell["runs"] if run["way"] == way]
    return sorted(runs, key=lambda run: (run["seed"], run["prompt"]))


def warm(cell: Mapping[str, Any]) -> dict[str, Any]:
    """A cell without its first block, in which an accelerator captures its forwards."""
    first = cell["runs"][0]
    block = first["prompt"], first["seed"]
    return {**cell, "runs": [r for r in cell["runs"] if (r["prompt"], r["seed"]) != block]}


@dataclass(frozen=True, slots=True)
class Ratio:
    """How many times faster than another way, over the blocks.

    Attributes:
        median: Over the blocks.
        low: The lower end of the 95% bootstrap interval of that median.
        high: Its upper end.
    """

    median: float
    low: float
    high: float


def speed_ratio(
    cell: Mapping[str, Any], way: str, *, to: str = "plain", clock: str = "wall_s"
) -> Ratio:
    """Seconds per token of `to` over those of a way, prompts included; "wall_s" or "cpu_s".

    Of our own ways also "model_s", the seconds in the models, and
    "model_calls", which counts forwards in place of seconds.
    """
    slow, fast = (
        np.array([run[clock] / run["tokens"] for run in runs_of(cell, name)]) for name in (to, way)
    )
    return Ratio(**median_with_interval(slow / fast, draws=10_000))


def within_the_models(cell: Mapping[str, Any], way: str, *, to: str = "plain") -> float:
    """How many times as fast the forward passes of a way are, as the cost model counts them: the
    median over the blocks.

    One that reads a prompt too counts as one of its model that reads a single position. Records
    whose prompts were read before the first round are taken as they are.
    """

    def seconds(run: Mapping[str, Any]) -> float:
        begins = run.get("begins", {})
        instead = sum(_of_one_position(cell, model) for model in begins)
        return float(run["model_s"] - sum(begins.values()) + instead) / run["tokens"]

    slow, fast = ([seconds(run) for run in runs_of(cell, name)] for name in (to, way))
    return float(np.median(np.divide(slow, fast)))


def _of_one_position(cell: Mapping[str, Any], model: str) -> float:
    """The seconds of a forward of one of a cell's models, or of one that serves both parents."""
    key = {"both": "widths_of_two_rows", "teacher": "widths_of_teacher"}.get(model, "widths")
    return float(cell.get(key, cell["widths"])["1"]["wall_s"])


def around_the_models(cell: Mapping[str, Any]) -> float:
    """What a token of plain decoding takes outside the models, prompts included, in forwards of its
    own: the median over the blocks."""
    shares = [
        (run["wall_s"] - run["model_s"]) / run["tokens"] / (run["model_s"] / run["model_calls"])
        for run in runs_of(cell, "plain")
    ]
    return float(np.median(shares))


def measured_costs(cell: Mapping[str, Any], clock: str = "wall_s") -> costs.Costs:
    """What a forward of each width took, as the decoder's cost model wants it."""
    policy, teacher = (
        {int(width): spent[clock] for width, spent in of_parent.items()}
        for of_parent in (cell["widths"], cell.get("widths_of_teacher", cell["widths"]))
    )
    return costs.Costs(policy=policy, teacher=teacher)


def mean_acceptance(cell: Mapping[str, Any]) -> dict[str, float]:
    """The acceptance probability of each parent's drafts, and of an even coin's where it was
    recorded, averaged over all recorded positions.

    Whatever the scheme, the tokens before a position follow q*; so all runs count.
    """
    ours = [run for run in cell["runs"] if "rounds" in run]
    return {
        parent: float(np.mean(np.concatenate([run[f"accept_{parent}"] for run in ours])))
        for parent in costs.PROPOSING
        if f"accept_{parent}" in ours[0]
    }


@dataclass(frozen=True, slots=True)
class Count:
    """Tokens per forward of one way, counted and predicted.

    Attributes:
        tokens: New tokens.
        forwards: Forwards of the parents in the rounds.
        predicted: Forwards that the cost model expects for as many tokens.
        accepted: Drafts that were kept.
        tested: Drafts that were tested.
    """

    tokens: int
    forwards: int
    predicted: float
    accepted: int
    tested: int

    @property
    def margin(self) -> float:
        """Tokens per forward over the predicted ones, minus 1."""
        return self.predicted / self.forwards - 1


def count_forwards(
    cell: Mapping[str, Any], way: str, acceptance: Mapping[str, float] | None = None
) -> Count:
    """Forwards against the cost model's, at the acceptance rates of these very runs.

    Schemes of the parents: the exact expectation for as many tokens (`costs.expected_forwards`).
    "lookup" and "auto" choose as they go; for them each round is predicted from its drafts.

    Args:
        cell: A cell of the record.
        way: A key of `OURS`.
        acceptance: By proposer, in place of the measured rates.
    """
    runs = runs_of(cell, way)
    each = [dict(zip(ROUND, r, strict=True)) for run in runs for r in run["rounds"]]
    tested, accepted = Counter[str](), Counter[str]()
    for r in each:
        tested[r["proposer"]] += r["tested"]
        accepted[r["proposer"]] += r["accepted"]
    rates = {who: accepted[who] / tested[who] for who in tested if tested[who]}
    rates |= acceptance or {}
    tokens, forwards = (sum(run[key] for run in runs) for key in ("tokens", "forwards"))
    scheme, gamma = OURS[way]["scheme"], OURS[way].get("gamma", 1)
    if scheme in ("plain", "one-sided", "alternating"):
        known = [rates[who] for who in costs.PARENTS if who in rates] or [0.0]
        policy, teacher = (rates.get(who, float(np.mean(known))) for who in costs.PARENTS)
        at = (policy, teacher) if scheme == "alternating" else policy
        predicted = sum(costs.expected_forwards(scheme, run["tokens"], gamma, at) for run in runs)
    else:
        expected = sum(_expected_tokens(r, rates) for r in each)
        predicted = forwards * tokens / expected
    return Count(tokens, forwards, predicted, sum(accepted.values()), sum(tested.values()))


ROUND = ("scheme", "gamma", "proposer", "drafted", "tested", "accepted", "emitted")


def _expected_tokens(r: Mapping[str, Any], rates: Mapping[str, float]) -> float:
    """What a round with this many drafts emits on average."""
    if not r["drafted"]:
        return 1.0
    accept = rates[r["proposer"]]
    bonus = r["scheme"] in costs.OF_OTHERS  # q* is known after the last draft
    most = r["drafted"] + int(bonus)
    return float(sum(accept**kept for kept in range(most)))


# --- The command ---------------------------------------------------------------------------------


def command(
    *,
    out: Path,
    model: str | None,
    device: str,
    threads: int,
    seed: int,
    layers: str | None,
    ways: Sequence[str] | None,
    pairs: Sequence[str] | None = None,
) -> None:
    """`qstar-book record decoding`."""
    name = model or shipped_model.DEFAULT
    wanted = chosen_pairs(pairs, [cell.pair for cell in CELLS])
    made: dict[tuple[str, str], Any] = {}
    if (pairs or layers) and out.exists():
        held = json.loads(out.read_text(encoding="utf8"))
        dated = {"date": held["date"], "source": held.get("source", "not said")}
        made = {(cell["pair"], cell["layers"]): dated | cell for cell in held["cells"]}
    order = [(cell.pair, cell.layers) for cell in CELLS]
    for index, cell in enumerate(CELLS):
        if layers not in (None, cell.layers) or cell.pair not in wanted:
            continue
        print(f"{cell.pair}, layers {cell.layers}", file=sys.stderr)
        here = min(threads, cell.threads or threads)
        given = {"index": index, "model": name, "device": device, "threads": here}
        given |= {"seed": seed, "ways": ways}
        made[cell.pair, cell.layers] = in_own_process(
            measure_cell_of_model, given, environment=of_threads(here)
        )
        cells = [made[key] for key in order if key in made]
        write_json(out, {**made_on(device, threads), "seed": seed, "model": name, "cells": cells})
    print(out)


def chosen_pairs(asked: Sequence[str] | None, known: Sequence[str]) -> Sequence[str]:
    """The pairs that are asked for, or all.

    Raises:
        RefusedError: One is not known.
    """
    known = list(dict.fromkeys(known))
    if unknown := sorted(set(asked or ()) - set(known)):
        raise RefusedError(f"no pair {', '.join(unknown)}; the pairs are {', '.join(known)}")
    return asked or known


def made_on(device: str, threads: int) -> dict[str, Any]:
    """How a record of times is being made: command, date, versions and machine."""
    return provenance(
        "numpy",
        "torch",
        "transformers",
        device=device,
        cpu=cpu_name(),
        cores=os.cpu_count(),
        threads=threads,
        waiting=os.environ.get("OMP_WAIT_POLICY", "default").lower(),
    )


def made_now() -> dict[str, str]:
    """When a cell is being made, and by which source of `qstar`: a record may hold older ones."""
    made = provenance()
    return {name: made[name] for name in ("date", "source")}


def of_threads(threads: int) -> dict[str, str]:
    """The environment of a process of so many threads, which wait as they do by default.

    Threads that spin for a while are woken sooner than threads that sleep: two of them make a
    forward pass of SmolLM2-135M 1.6 times as fast on two cores that have nothing else to do, and
    slower where they have.
    """
    return {"OMP_NUM_THREADS": str(threads)}


def measure_cell_of_model(
    *,
    index: int,
    model: str,
    device: str,
    threads: int,
    seed: int,
    ways: Sequence[str] | None = None,
) -> dict[str, Any]:
    """One of `CELLS`, with a model by its name and the prompts of `data/`; some of its ways."""
    cell = CELLS[index]
    if ways is not None:
        cell = replace(cell, ways=tuple(way for way in cell.ways if way in ways))
    if device != "cpu":  # packing is for CPUs
        cell = replace(cell, layers="as loaded")
    torch.set_num_threads(threads)
    policy, teacher, tokenizer = models_of(cell.pair, model, device=device)
    ids = questions_of(cell.pair, tokenizer)
    return measure_cell(cell, policy, teacher, ids, seed=seed, tokenizer=tokenizer)


def models_of(pair: str, model: str, *, device: str = "cpu") -> tuple[Any, Any, Any]:
    """(policy, teacher, tokenizer) of a pair of `CELLS`, from a model by its name."""
    if pair in FAMILY:
        folders = [
            corpus.data_file(f"family/{name}/config.json").parent
            for name in pair.removeprefix("family/").split("+")
        ]
        one, other = (checkpoints.load(folder, device=device) for folder in folders)
        return one[0], other[0], one[1]
    policy, tokenizer = shipped_model.load(model, device=device)
    if pair in NOISE:
        return policy, noised(policy, NOISE[pair]), tokenizer
    if pair in ADAPTERS:
        return policy, fine_tuned(model, pair, device=device), tokenizer
    return policy, policy, tokenizer


def fine_tuned(model: str, adapter: str, *, device: str) -> Any:
    """A model by its name with one of `ADAPTERS` merged into its weights."""
    folder = corpus.adapter_folder(adapter)
    teacher, _ = shipped_model.load(folder, base=model, device=device)
    return teacher


def questions_of(pair: str, tokenizer: Any) -> list[tuple[Tensor, Tensor]]:
    """What both parents of a pair are asked, as token ids. Shapes (length,), (length,).

    Two prompts: every question of data/prompts.json. Copies: its questions under the policy's
    system prompts. Adapters: the questions of data/pair_questions.json whose answers are long.
    What repeats: data/repeating_questions.json. Small models: data/family_questions.json.
    """
    if pair in FAMILY:
        asked = corpus.read_questions(corpus.data_file("family_questions.json"))
        read = [torch.tensor(tokenizer(f"<s>Q: {q.user}\nA:").input_ids) for q in asked]
        return [(ids, ids) for ids in read]
    if pair == REPEATING:
        asked = corpus.read_questions(corpus.data_file("repeating_questions.json"))
        systems = [(q.user, q.system, q.system) for q in asked]
    elif pair in ADAPTERS:
        every = corpus.read_questions(corpus.data_file("pair_questions.json"))
        asked = [q for q in every if q.kind in ("general", "manual")]
        systems = [(q.user, q.system, q.system) for q in asked]
    else:
        prompts = corpus.read_prompts(corpus.data_file("prompts.json"))
        systems = [(p.user, p.policy_system, p.teacher_system) for p in prompts]
    if pair in NOISE:
        systems = list(dict.fromkeys((user, ours, ours) for user, ours, _ in systems))

    def ids(user: str, system: str) -> Tensor:
        return checkpoints.chat_ids(tokenizer, user, system=system)

    return [(ids(user, ours), ids(user, its)) for user, ours, its in systems]
