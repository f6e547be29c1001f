"""What q* costs on an accelerator: one record, made in stages that each stand alone.

    qstar-book record accelerator --out data/results/accelerator.json
    qstar-book record accelerator --out FILE --stages solver "decode real"

One call ends within `--limit` seconds, eight minutes by default: what does not fit waits for the
next call, which goes on where this one ended. Each stage runs in a process of its own under a time
limit, and its result enters the record as soon as it is there; a stage that fails or takes too long
leaves what it said in its place. Stages that the record holds already are kept unless they are
named. Ways that are compared take turns in one process; what is kept of them are medians, the range
of the middle 80%, and the ratio to the first way, as a median over the turns with its 95% bootstrap
interval.

The record (JSON) holds

    command, date, device
    stages
        machine   what ran it: device, memory, versions, the rate of a copy
        solver    {cell: {ways, worst_tv, same_status, converged, fused}} for each vocabulary and
                  batch: alpha* beside two log-softmaxes of the same rows, by fused kernels and by
                  torch's; and, for scale, a plain Newton iteration of six steps, captured as a
                  CUDA graph
        rows      {family and dtype: counts} of faults on adversarial rows (`stress`)
        laws      {configuration: largest error of an outcome} of the decoder, by enumeration
        seeds     whether a seed draws the same tokens here as on the CPU
        forwards  {shape: {width: ways}}: one forward through a dynamic cache, and through a static
                  cache, captured
        token     {shape: ways}: a token of q*, forwards and draw, captured as one graph
        round     {shape and scheme: milliseconds}: where the time of a round goes: in the models,
                  in everything else the device does, and waiting for the host
        batches   {shape and rows: ways}: seconds a token of a batch
        decode    cells as `records.decoding` has them, of pairs that say whether they are
                  synthetic

The shapes are those of public models; their weights are random, and the pair of two such models is
**synthetic**: a copy whose output layer carries noise of a size that gives the acceptance that is
written down. Speed depends on shape and acceptance; nothing else about them means anything.
"""

import copy
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

from qstar import STATUSES, rows_torch
from qstar.adapters import checkpoints
from qstar.decoding import enumeration
from qstar.decoding import generate as decode
from qstar.decoding.kv_cache import KVCache
from qstar.decoding.traits import cache_name

from .. import shipped_model
from ..files import OwnProcess, RefusedError, cpu_name, provenance, write_json
from . import corpus, decoding, median_with_interval, stress
from . import solver as benchmark

Way = Callable[[], Any]

LLAMA: Mapping[str, Any] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
)
SHAPES: Mapping[str, Mapping[str, Any]] = {
    "7B": dict(zip(SIZES, (32_000, 4096, 11_008, 32, 32, 32), strict=True)),
    "1B": dict(zip(SIZES, (32_000, 2048, 5632, 22, 32, 4), strict=True)),
    "3B": dict(zip(SIZES, (128_256, 3072, 8192, 28, 24, 8), strict=True)),
    "8B": dict(zip(SIZES, (128_256, 4096, 14_336, 32, 32, 8), strict=True)),
    "tiny": dict(zip(SIZES, (64, 32, 48, 2, 4, 2), strict=True)),
}
"""Llama-2-7B's, TinyLlama-1.1B's, Llama-3.2-3B's, Llama-3-8B's, and one for rehearsals."""

CONTEXT = 512


# --- Measuring -----------------------------------------------------------------------------------


def take_turns(ways: Mapping[str, Way], device: torch.device, *, rounds: int) -> dict[str, Any]:
    """Milliseconds of each way, and its ratio to the first; every round starts with another one."""
    names = list(ways)
    spent: dict[str, list[float]] = {name: [] for name in names}
    for way in ways.values():  # warms up
        way()
        way()
    for turn in range(rounds):
        shift = turn % len(names)
        for name in [*names[shift:], *names[:shift]]:
            spent[name].append(_milliseconds(ways[name], device))
    first = np.array(spent[names[0]])
    return {
        name: {
            "ms": float(np.median(values)),
            "ms_middle_80": np.quantile(values, [0.1, 0.9]).tolist(),
            "ratio": median_with_interval(np.array(values) / first),
        }
        for name, values in spent.items()
    }


def _milliseconds(way: Way, device: torch.device) -> float:
    if device.type != "cuda":
        begun = time.perf_counter()
        way()
        return 1e3 * (time.perf_counter() - begun)
    torch.cuda.synchronize()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    way()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end))


def captured(way: Way, device: torch.device) -> Way:
    """The same work, replayed from a CUDA graph; elsewhere as it is."""
    if device.type != "cuda":
        return way
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            way()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = way()

    def replay() -> Any:
        graph.replay()
        return out

    return replay


# --- The stages ----------------------------------------------------------------------------------


def machine(device: torch.device, *, quick: bool) -> dict[str, Any]:
    """What ran this."""
    versions = provenance("numpy", "scipy", "torch", "transformers")["versions"]
    found = {"host": cpu_name(), "host_cores": os.cpu_count(), "versions": versions}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "name": properties.name,
            "memory_bytes": properties.total_memory,
            "cuda": torch.version.cuda,
        }
    entries = 2**20 if quick else 2**29
    source, target = (torch.ones(entries, device=device) for _ in range(2))
    took = take_turns({"copy": lambda: target.copy_(source)}, device, rounds=10)["copy"]["ms"]
    return found | {"copy_gb_per_s": 2 * 4 * entries / took / 1e6}


def newton(log_policy: Tensor, log_teacher: Tensor, *, steps: int = 6) -> tuple[Tensor, Tensor]:
    """alpha* and log q* by a bracketed Newton iteration of so many steps, which reads no value.

    For scale only: it knows no boundary, no excluded outcome and no stopping rule.
    """
    ratio = log_policy - log_teacher
    alpha = torch.full_like(ratio[..., :1], 0.5)
    low, high = torch.zeros_like(alpha), torch.ones_like(alpha)
    for _ in range(steps):
        q = torch.addcmul(log_teacher, alpha, ratio).softmax(-1)
        mean = (q * ratio).sum(-1, keepdim=True)
        variance = (q * (ratio - mean).square()).sum(-1, keepdim=True)
        low, high = torch.where(mean < 0, alpha, low), torch.where(mean > 0, alpha, high)
        step = alpha - mean / variance.clamp_min(torch.finfo(ratio.dtype).tiny)
        alpha = torch.where((step >= low) & (step <= high), step, (low + high) / 2)
    return alpha.squeeze(-1), torch.addcmul(log_teacher, alpha, ratio).log_softmax(-1)


def solver(device: torch.device, *, quick: bool) -> dict[str, Any]:
    """alpha* on rows like a language model's, beside the log-softmaxes that made them."""
    cells = [(500, 2)] if quick else [(v, b) for v in (32_000, 151_936) for b in (1, 8, 64)]
    found = {}
    for vocab, batch in cells:
        host = benchmark.language_model_like_rows(rows=min(batch, 8), vocab=vocab, seed=0)
        rows = [torch.from_numpy(x).float().to(device) for x in host]
        rows = [x.repeat(-(-batch // len(x)), 1)[:batch].contiguous() for x in rows]
        logits = [x + 3.0 for x in rows]

        def softmaxes(logits: list[Tensor] = logits) -> Any:
            return [x.log_softmax(-1) for x in logits]

        def ours(rows: list[Tensor] = rows) -> Any:
            return rows_torch.solve_kl_symmetry(*rows, validate=False)

        def by_torch(rows: list[Tensor] = rows) -> Any:
            return rows_torch.solve_as_on_an_accelerator(*rows)

        def plain(rows: list[Tensor] = rows) -> Any:
            return newton(*rows)

        ways: dict[str, Way] = {"two log-softmaxes, captured": captured(softmaxes, device)}
        ways["two log-softmaxes"] = softmaxes
        ways["solve_kl_symmetry"] = ours
        failed = {}
        candidates: dict[str, Way] = {
            "solve_kl_symmetry, captured": ours,
            "solve_kl_symmetry, torch road, captured": by_torch,
            "six Newton steps, captured": plain,
        }
        for name, way in candidates.items():
            try:
                ways[name] = captured(way, device)
            except Exception as error:  # the record says what happened
                failed[name] = f"{type(error).__name__}: {error}"[:300]
                if device.type == "cuda":
                    torch.cuda.synchronize()
        exact = benchmark.solve_kl_symmetry(*host)
        few = len(host[0])
        worst = {}
        balance = ours()
        names = np.array([STATUSES[code] for code in balance.status.tolist()])
        answers = {
            "solve_kl_symmetry": balance.alpha,
            "solve_kl_symmetry, torch road": by_torch().alpha,
            "six Newton steps": plain()[0],
        }
        for name, alpha in answers.items():
            at = alpha[:few].double().cpu().numpy()
            q = [np.exp(benchmark.log_geometric_mean(*host, a)) for a in (at, exact.alpha)]
            worst[name] = float(0.5 * np.abs(q[0] - q[1]).sum(-1).max())
        found[f"V={vocab} batch={batch}"] = {
            "ways": take_turns(ways, device, rounds=5 if quick else 30),
            "failed": failed,
            "converged": float(balance.converged.double().mean()),
            "same_status": float(np.mean(names[:few] == exact.status)),
            "fused": rows_torch.takes_fused_kernels(*rows),
            "worst_tv": worst,
        }
    return found


def rows(device: torch.device, *, quick: bool) -> dict[str, Any]:
    """Adversarial rows (`stress`) on the device: in float32 and the half types those of the fused
    kernels, in float64 those that take all the fixed passes."""

    def solve(policy: Tensor, teacher: Tensor) -> Any:
        found = rows_torch.solve_kl_symmetry(policy.to(device), teacher.to(device))
        return type(found)(*(getattr(found, name).cpu() for name in type(found).__slots__))

    counts = stress.run(1100 if quick else 44_000, large=11 if quick else 44, solve=solve)
    probe = torch.zeros(1, 1, device=device)
    return {"fused": rows_torch.takes_fused_kernels(probe, probe)} | {
        f"{family}, {solver}": dict(zip(stress.Count._fields, count, strict=True))
        for (family, solver), count in counts.items()
        if not solver.endswith("fixed passes")
    }


def laws(device: torch.device, *, quick: bool) -> dict[str, Any]:
    """The decoder's output distribution here, by enumeration, against forwards over whole texts.

    In float64, but for the rotary tables, which transformers makes in float32 on either device.
    """
    policy, teacher = (enumeration.tiny_model(seed).to(device) for seed in (1, 2))
    third = enumeration.tiny_model(3).to(device)
    ids = torch.tensor([0, 2, 1], device=device)
    ways: list[dict[str, Any]] = [{"scheme": "plain"}]
    ways += [{"scheme": "one-sided", "gamma": 1, "drafter": who} for who in decode.PARENTS]
    ways += [{"scheme": "alternating", "gamma": gamma} for gamma in (1, 2)]
    ways += [{"scheme": "coin", "gamma": 1, "stay": 0.5}]
    ways += [{"scheme": "lookup", "gamma": 1}]
    ways += [{"scheme": "draft-model", "gamma": 1, "draft_model": third}]
    ways += [{"scheme": "alternating", "gamma": 1, "block_verification": True}]
    ways += [{"scheme": "alternating", "gamma": 1, "cache_implementation": "dynamic"}]
    ways += [{"scheme": "alternating", "gamma": 1, "dtype": "float32"}]  # and fused kernels
    found = {}
    for alpha in (None, 0.3):
        expected = enumeration.token_level_distribution(policy, teacher, ids, length=2, alpha=alpha)
        for way in ways[:1] if quick else ways if alpha is None else ways[3:4]:
            options = {k: v for k, v in way.items() if k != "dtype"}
            one, other = policy, teacher
            if "dtype" in way:
                one, other = (copy.deepcopy(model).float() for model in (policy, teacher))
            law, rows = enumeration.decoder_distribution(
                one, other, ids, length=2, alpha=alpha, **options
            )
            name = {k: v if k != "draft_model" else True for k, v in way.items()}
            found[json.dumps(name | {"alpha": alpha})] = {
                "largest_error": float(np.abs(law - expected).max()),
                "rows": rows,
            }
    return found


def seeds(device: torch.device, *, quick: bool) -> dict[str, Any]:
    """Whether the same seed draws the same tokens here as on the CPU."""
    found = {}
    for scheme, gamma, dtype in (
        ("plain", None, torch.float64),
        ("alternating", 2, torch.float64),
        ("plain", None, torch.float32),
    ):
        drawn = []
        for place in (torch.device("cpu"), device):
            policy, teacher = (
                enumeration.tiny_model(seed, vocab=31).to(place, dtype) for seed in (1, 2)
            )
            ids = torch.tensor([3, 14, 15, 9, 2, 6], device=place)
            draw = partial(decode.generate, policy, teacher, ids, max_new_tokens=24, scheme=scheme)
            texts = range(2 if quick else 10)
            drawn.append([draw(gamma=gamma, generator=seed).tokens.tolist() for seed in texts])
        same = sum(a == b for a, b in zip(*drawn, strict=True))
        name = f"{scheme}, {str(dtype).removeprefix('torch.')}"
        found[name] = {"texts": len(drawn[0]), "same": same}
    return found


def random_model(shape: str, device: torch.device, *, spread: float = 3.0, seed: int = 0) -> Any:
    """A Llama of a public shape with random weights, whose logits have this standard deviation."""
    config = LlamaConfig(**SHAPES[shape], max_position_embeddings=2048, **LLAMA)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(seed)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)
    with torch.no_grad():
        logits = model(_text(config.vocab_size, 64, device)[None]).logits.float()
        model.lm_head.weight *= spread / logits.std()
    return model


def _text(vocab: int, length: int, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(vocab, (length,), generator=generator).to(device)


def synthetic_pair(
    shape: str, device: torch.device, *, acceptance: float
) -> tuple[Any, Any, float]:
    """Two models of one shape, the second a copy whose output layer is noised until a token drafted
    by either is kept with about this probability; and the probability that was reached."""
    policy = random_model(shape, device)
    teacher = copy.deepcopy(policy)
    head = policy.lm_head.weight
    noise = torch.randn(head.shape, device=device, dtype=torch.float32).to(head) * head.std()
    with torch.no_grad():
        hidden = policy.model(_text(len(head), 64, device)[None]).last_hidden_state[0]
        log_policy = (hidden @ head.T).float().log_softmax(-1)
        low, high, reached = 0.0, 2.0, 1.0
        for _ in range(12):
            size = (low + high) / 2
            log_teacher = (hidden @ (head + size * noise).T).float().log_softmax(-1)
            _, log_q = newton(log_policy, log_teacher)
            reached = float(torch.minimum(log_policy, log_q).exp().sum(-1).mean())
            low, high = (size, high) if reached > acceptance else (low, size)
        teacher.lm_head.weight.copy_(head + size * noise)
    return policy, teacher, reached


def forwards(device: torch.device, *, quick: bool) -> dict[str, Any]:
    """One forward by width, after a text: as the decoder reads today, and captured."""
    found = {}
    for shape in ("tiny",) if quick else ("1B", "7B"):
        found[shape] = _forwards_of(shape, device, quick=quick)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return found


class _Static:
    """A model and a static cache that holds one text, read from the same place again and again."""

    def __init__(self, model: Any, text: Tensor) -> None:
        self.model = model
        self.text = text
        cache = StaticCache(config=model.config, max_cache_len=len(text) + 64)
        self._cached = {str(cache_name(model)): cache, "use_cache": True}
        with torch.no_grad():
            model(text[None], logits_to_keep=1, **self._cached)
        layers: list[Any] = list(cache.layers)
        self._lengths: list[Tensor] = [layer.cumulative_length for layer in layers]
        self._start = torch.tensor(len(text), device=text.device)

    def reads(self, width: int) -> Way:
        """A forward over so many tokens after the text, for their logits, shape (width, vocab)."""
        ids = self.text[:width][None].clone()
        place = (self._start + torch.arange(width, device=self.text.device))[None].clone()

        def forward() -> Tensor:
            torch._foreach_copy_(self._lengths, [self._start] * len(self._lengths))
            out = self.model(ids, position_ids=place, **self._cached)
            logits: Tensor = out.logits[0]
            return logits

        return forward


def _forwards_of(shape: str, device: torch.device, *, quick: bool) -> dict[str, Any]:
    model = random_model(shape, device)
    context = 64 if quick else CONTEXT
    text = _text(model.config.vocab_size, context, device)
    readers = {}
    for kind in ("dynamic", "static"):
        reader = readers[kind] = KVCache(model, implementation=kind)
        reader.reserved = context
        reader.start([text.tolist()])
    static = _Static(model, text)

    def decoded(reader: KVCache, drafts: Tensor) -> Tensor:
        law = reader.feed([text[-1:].tolist()], drafts, positions=drafts.shape[-1] + 1)
        reader.truncate([context - 1])
        return law

    widths = {}
    for width in (1, 2) if quick else (1, 2, 3, 4, 8):
        forward = static.reads(width)
        drafts = text[: width - 1][None]
        ways: dict[str, Way] = {
            f"{kind} cache, as decoded with": partial(decoded, reader, drafts)
            for kind, reader in readers.items()
        }
        ways["static cache"] = forward
        entry: dict[str, Any] = {}
        with torch.no_grad():
            once = forward().float().clone()
            try:
                ways["static cache, captured"] = captured(forward, device)
                again = ways["static cache, captured"]().float()
                entry["captured_differs_by"] = float((once - again).abs().max())
            except Exception as error:  # the record says what happened
                entry["failed"] = f"{type(error).__name__}: {error}"[:300]
            entry["ways"] = take_turns(ways, device, rounds=3 if quick else 20)
        widths[str(width)] = entry
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "dtype": str(model.dtype).removeprefix("torch."),
        "context": context,
        "widths": widths,
    }


def token(device: torch.device, *, quick: bool) -> dict[str, Any]:
    """One token of q*, all on the device: two forwards, alpha*, q* and a draw, captured as one.

    What an engine without a host in the way would take for a token of "plain".
    """
    found = {}
    for shape in ("tiny",) if quick else ("1B", "7B"):
        policy = random_model(shape, device)
        text = _text(policy.config.vocab_size, 64 if quick else CONTEXT, device)
        pair = [_Static(model, text).reads(1) for model in (policy, copy.deepcopy(policy))]
        race = torch.empty(policy.config.vocab_size, device=device)

        def logits(pair: list[Way] = pair) -> list[Tensor]:
            return [read() for read in pair]

        def whole(pair: list[Way] = pair, race: Tensor = race) -> Tensor:
            rows = [read().float().log_softmax(-1) for read in pair]
            alpha = rows_torch.solve_kl_symmetry(*rows, validate=False).alpha
            log_q = rows_torch.log_geometric_mean(rows[0], rows[1], alpha)
            return (log_q[0].exp() / race.exponential_()).argmax()

        with torch.no_grad():
            ways = {
                "two forwards, captured": captured(logits, device),
                "a token of q*, captured": captured(whole, device),
            }
            found[shape] = {"ways": take_turns(ways, device, rounds=3 if quick else 30)}
        del policy, pair, logits, whole, ways
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return found


CAPTURED_WAYS = ("plain", "alternating 1", "alternating 2", "coin", "one-sided 4", "auto")
SLOW_WAYS = (  # beside the first of the others
    "plain",
    "coin",
    "plain, dynamic cache",
    "alternating 1, dynamic cache",
    "transformers plain",
    "transformers assisted 2",
)


def decode_synthetic(device: torch.device, *, quick: bool) -> dict[str, Any]:
    """Every way of decoding, on a synthetic pair of the largest shape."""
    shape = "tiny" if quick else "7B"
    cells = [
        _synthetic_cell(shape, device, 0.9, CAPTURED_WAYS, quick=quick, seeds=3),
        _synthetic_cell(shape, device, 0.9, SLOW_WAYS, quick=quick, seeds=1, new_tokens=48),
    ]
    return {"cells": cells}


def decode_apart(device: torch.device, *, quick: bool) -> dict[str, Any]:
    """Our own ways, on synthetic pairs that are closer and further apart, and smaller."""
    pairs = [("tiny", 0.8)] if quick else [("7B", 0.95), ("7B", 0.8), ("7B", 0.6), ("1B", 0.9)]
    return _of_pairs(pairs, device, quick=quick)


def decode_shapes(device: torch.device, *, quick: bool) -> dict[str, Any]:
    """Our own ways, on synthetic pairs of newer shapes, of four times the vocabulary."""
    pairs = [("tiny", 0.9)] if quick else [("3B", 0.9), ("8B", 0.9)]
    return _of_pairs(pairs, device, quick=quick)


def _of_pairs(
    pairs: Sequence[tuple[str, float]], device: torch.device, *, quick: bool
) -> dict[str, Any]:
    ways = ("plain", "alternating 1", "coin", "auto")
    cells = []
    for shape, acceptance in pairs:
        cells.append(_synthetic_cell(shape, device, acceptance, ways, quick=quick, new_tokens=64))
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return {"cells": cells}


def _synthetic_cell(
    shape: str,
    device: torch.device,
    acceptance: float,
    ways: Sequence[str],
    *,
    quick: bool,
    seeds: int = 2,
    new_tokens: int = 96,
) -> dict[str, Any]:
    policy, teacher, reached = synthetic_pair(shape, device, acceptance=acceptance)
    cell = decoding.Cell(
        f"{shape} shape, {acceptance}",
        "as loaded",
        tuple(ways),
        new_tokens=6 if quick else new_tokens,
        seeds=1 if quick else seeds,
    )
    ids = _prompts(policy, device, quick=quick)
    found = decoding.measure_cell(cell, policy, teacher, [(x, x) for x in ids], seed=0)
    return {"synthetic": True, "acceptance_reached": reached} | found


def _prompts(model: Any, device: torch.device, *, quick: bool) -> list[Tensor]:
    vocab = model.config.vocab_size
    text = _text(vocab, 16 if quick else 128, device)
    return [(text + i) % vocab for i in range(1 if quick else 3)]


def rounds(device: torch.device, *, quick: bool) -> dict[str, Any]:
    """Where the time of a round after the first goes, at the largest shape: medians of decodes.

    The wall time of a round, what the models take of it (by the device's own clock), and in a
    decode of its own under the profiler what all kernels take together and how many there are. What
    is left of the wall time, the device waits for the host.
    """
    shape = "tiny" if quick else "7B"
    policy, teacher, reached = synthetic_pair(shape, device, acceptance=0.9)
    ids = _prompts(policy, device, quick=quick)[0]
    found = {}
    for way in ("plain", "alternating 1", "coin"):
        options: dict[str, Any] = {"max_new_tokens": 6 if quick else 64, **decoding.OURS[way]}

        def run(seed: int, options: dict[str, Any] = options) -> Any:
            result = decode.generate(policy, teacher, ids, ids, generator=seed, **options)
            return result.trace

        run(0)
        spent = []
        for seed in range(1, 3 if quick else 6):
            trace = run(seed)
            timed = trace.rounds[1:] or trace.rounds  # the first one reads the prompts
            calls = [f.seconds for r in timed for f in r.forwards]
            wall = sum(r.seconds for r in timed)
            spent.append([1e3 * x / len(timed) for x in (wall, sum(calls))])
        wall, model = np.median(spent, axis=0).tolist()
        entry = {"wall_ms": wall, "model_ms": model, "rounds": len(trace.rounds)}
        if device.type == "cuda":
            entry |= _kernels(lambda: run(1))
        found[f"{shape}, {way}"] = entry | {"tokens": int(options["max_new_tokens"])}
    return {"synthetic": True, "acceptance_reached": reached, "ways": found}


def _kernels(run: Way) -> dict[str, float]:
    """What the device did in a decode, a round: milliseconds of kernels, and how many."""
    from torch.profiler import DeviceType, ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        trace = run()
        torch.cuda.synchronize()
    events = [e for e in profiler.events() if e.device_type == DeviceType.CUDA]
    count = len(trace.rounds)
    busy = sum(e.device_time for e in events) / 1e3
    return {"device_ms": busy / count, "kernels": len(events) / count}


def batches(device: torch.device, *, quick: bool) -> dict[str, Any]:
    """Seconds a token of batches of one synthetic pair, rows of different lengths."""
    shape = "tiny" if quick else "7B"
    policy, teacher, reached = synthetic_pair(shape, device, acceptance=0.9)
    text = _prompts(policy, device, quick=True)[0]
    found = {}
    for rows in (1, 2) if quick else (1, 4, 16):
        ids = [text[: len(text) - row % 4] for row in range(rows)]
        tokens = 4 if quick else 32
        ways: dict[str, Way] = {
            way: partial(
                decode.generate,
                policy,
                teacher,
                ids,
                max_new_tokens=tokens,
                generator=0,
                eos_token_id=None,
                **options,
            )
            for way, options in {
                "plain": {"scheme": "plain"},
                "plain, dynamic cache": decoding.DYNAMIC["plain, dynamic cache"],
                "alternating 1": {"scheme": "alternating", "gamma": 1},
            }.items()
        }
        found[f"{shape}, {rows}"] = {
            "tokens": rows * tokens,
            "ways": take_turns(ways, device, rounds=2 if quick else 3),
        }
    return {"synthetic": True, "acceptance_reached": reached, "batches": found}


def decode_real(device: torch.device, *, quick: bool) -> dict[str, Any]:
    """SmolLM2 under two system prompts, a real pair; and beside a noised copy, synthetic."""
    policy, tokenizer = shipped_model.load(shipped_model.DEFAULT, device=str(device))
    every = corpus.read_prompts(corpus.data_file("prompts.json"))
    prompts = every[:1] if quick else every[:4:2]
    ids = [
        tuple(
            checkpoints.chat_ids(tokenizer, p.user, system=system).to(device)
            for system in (p.policy_system, p.teacher_system)
        )
        for p in prompts
    ]
    tokens = 4 if quick else 40
    two_prompts = decoding.Cell(
        "two prompts",
        "as loaded",
        ("plain", "plain, dynamic cache", "plain, one call", "alternating 1", "coin", "auto"),
        new_tokens=tokens,
    )
    noised = decoding.Cell(
        "noised copy",
        "as loaded",
        ("plain", "alternating 1", "coin", "transformers plain", "transformers assisted 2"),
        new_tokens=tokens,
    )
    measure = decoding.measure_cell
    one = [(p, p) for p, _ in ids]
    other = decoding.noised(policy, decoding.NOISE["noised copy"])
    return {
        "model": shipped_model.DEFAULT,
        "cells": [
            {"synthetic": False}
            | measure(two_prompts, policy, policy, ids, seed=0, width_rounds=3),
            {"synthetic": True} | measure(noised, policy, other, one, seed=0, width_rounds=3),
        ],
    }


def decode_pairs(device: torch.device, *, quick: bool) -> dict[str, Any]:
    """SmolLM2 beside its fine-tunes of data/adapters: real pairs of two sets of weights."""
    policy, tokenizer = shipped_model.load(shipped_model.DEFAULT, device=str(device))
    ways = (*CAPTURED_WAYS, "plain, dynamic cache", "transformers plain")
    cells = []
    for adapter in decoding.ADAPTERS:
        teacher = decoding.fine_tuned(shipped_model.DEFAULT, adapter, device=str(device))
        asked = decoding.questions_of(adapter, tokenizer)[1 : 2 if quick else None : 2]
        ids = [(policy_ids.to(device), its.to(device)) for policy_ids, its in asked]
        tokens, seeds = (4, 1) if quick else (64, 2)
        cell = decoding.Cell(adapter, "as loaded", ways, new_tokens=tokens, seeds=seeds)
        found = decoding.measure_cell(cell, policy, teacher, ids, seed=0, width_rounds=3)
        cells.append({"synthetic": False} | found)
    return {"model": shipped_model.DEFAULT, "cells": cells}


STAGES: Mapping[str, tuple[Callable[..., dict[str, Any]], int]] = {
    "machine": (machine, 40),
    "solver": (solver, 60),
    "decode synthetic": (decode_synthetic, 180),
    "round": (rounds, 90),
    "decode apart": (decode_apart, 140),
    "laws": (laws, 60),
    "batches": (batches, 120),
    "forwards": (forwards, 60),
    "rows": (rows, 70),
    "token": (token, 40),
    "seeds": (seeds, 40),
    "decode real": (decode_real, 90),
    "decode pairs": (decode_pairs, 150),
    "decode shapes": (decode_shapes, 120),
}
"""The stages in order, each with the seconds that it may take on an accelerator: at least 1.3 times
what it took on an H200, on which all of them together take eleven minutes; but for the last one,
which has not run on any yet."""

LIMIT_S = 470
"""Seconds that one call takes by default: eight minutes, with Python's own start and end."""


# --- The command ---------------------------------------------------------------------------------


def command(
    *, out: Path, device: str, quick: bool, stages: Sequence[str] | None, limit: float | None
) -> None:
    """`qstar-book record accelerator`."""
    started = time.perf_counter()
    limit = LIMIT_S if limit is None else limit
    if unknown := sorted(set(stages or []) - set(STAGES)):
        raise RefusedError(f"no stage {', '.join(unknown)}; the stages are {', '.join(STAGES)}")
    if device == "cuda" and not torch.cuda.is_available():
        raise RefusedError("no CUDA device was found: pass --device cpu --quick to rehearse")
    record: dict[str, Any] = {"stages": {}}
    if out.exists():
        record = json.loads(out.read_text(encoding="utf8"))
    record["device"] = device
    asked = list(stages or [stage for stage in STAGES if stage not in record["stages"]])
    late = []
    ready = OwnProcess(run_stage)
    for name in asked:
        _, limit_s = STAGES[name]
        if time.perf_counter() - started + limit_s > limit:
            late.append(name)
            continue
        process, ready = ready, OwnProcess(run_stage)  # which imports while this stage runs
        print(f"{name}, at most {limit_s} s", file=sys.stderr, flush=True)
        begun = time.perf_counter()
        given = {"name": name, "device": device, "quick": quick}
        try:
            found = process.call(given, limit_s=limit_s)
        except RuntimeError as error:
            found = {"failed": str(error)}
        took = round(time.perf_counter() - begun, 1)
        made_by = provenance()
        record["stages"][name] = {
            "date": made_by["date"],
            "command": f"qstar-book record accelerator --device {device} --stages '{name}'",
            "took_s": took,
            "source": made_by["source"],
        } | found
        write_json(out, record)
        said = f"failed: {found['failed']}" if "failed" in found else "done"
        print(f"{name}: {said} after {took} s", file=sys.stderr)
    ready.end()
    if late:
        print(
            f"not run, for want of time: {', '.join(late)}. The same command goes on with them; "
            f"--limit {limit:g} is how many seconds it takes.",
            file=sys.stderr,
        )


def run_stage(*, name: str, device: str, quick: bool) -> dict[str, Any]:
    """One of `STAGES`."""
    run, _ = STAGES[name]
    return run(torch.device(device), quick=quick)
