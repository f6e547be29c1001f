"""What solving alpha* costs: `qstar-book record solver [--out FILE]`.

Six ways to do it are timed on the same rows, in the same process, in turn, round after round, so
that whatever else the machine does falls on all of them; what is reported are ratios to the torch
solver in float32, per row, as the median over the rounds with a 95% bootstrap interval of that
median. Before anything is timed, each way must have found the reference's q*.

The rows are synthetic, and made to be like a language model's: logits that fall as
-s log(rank), s uniform in [1, 2.5], in shuffled order, with normal noise of sd 1 that the parents
share and normal noise of sd 2 sqrt(c) that each has alone, c running from 0.004 to 4 in equal steps
of its logarithm. That gives Chernoff informations from about 0.001 to 1; the record says which.

The record (JSON) holds

    command, date, machine {cpu, cores}, versions {python, numpy, scipy, torch}
    seed, rounds, tolerance_tv, device, rows (how they were made, in words)
    solvers      {name: what it is, in words}
    cells        one for each (threads, vocab, batch):
        threads, vocab, batch
        chernoff     {min, median, max} over its rows, in nats
        passes       {min, median, max} of the torch float32 solver
        worst_tv     {solver: largest total variation between its q* and the reference's}
        clock        process_time (processor seconds; one thread) or perf_counter (wall)
        load         the machine's load average afterwards: of two threads on two cores, wall times
                     mean little unless it is about the number of threads
        seconds      {solver: median seconds per row}
        ratio        {solver: {median, low, high}}: seconds per row over torch_float32's
        ratio_cold   the same where the solvers alternate call by call, so that each finds the
                     caches as another left them; batches of 1 (else the same as ratio)
    targets      one for each target and cell: {target, threads, vocab, batch, ratio, needed, met};
                 met is null where the machine was too busy for wall times

A row in a batch of 1 is solved by a call of its own: eight different rows are, in each round, each
solver solving all eight before the next one starts, and every row gives its ratios. The brentq
functions take the rows of a larger batch one by one. One thread is timed in processor seconds,
which on a quiet machine are those of the clock on the wall and on a busy one leave out the others;
more threads can only be timed on the wall.
"""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy import ndarray
from scipy.optimize import brentq
from scipy.special import log_softmax, logsumexp

from qstar import rows_torch
from qstar.rows import log_geometric_mean
from qstar.solve import solve_kl_symmetry

from ..files import cpu_name, in_own_process, provenance, write_json
from . import median_with_interval

TOLERANCE = 1e-6  # of q* in total variation, for every solver that can be told one
EPS = float(np.finfo(float).eps)
SOLVERS = {
    "torch_float32": "qstar.rows_torch.solve_kl_symmetry, float32, tolerance 1e-6, validation "
    "on; returns alpha, C, both KL divergences and a status",
    "torch_float64": "the same in float64, default tolerance 1e-12",
    "user_brentq": "scipy.optimize.brentq, default tolerance, on the slope with "
    "scipy.special.logsumexp, float64; returns alpha",
    "lean_brentq": "brentq on a multiple of the slope that costs one exp, buffers reused, float64, "
    "told the alpha tolerance that gives 1e-6 in total variation; returns alpha",
    "lean_brentq_float32": "the same in float32",
    "read": "one sum over each of the two rows, torch, float32: a lower bound",
}
Solve = Callable[[range], list[float]]  # alpha of these rows
TARGETS = {"user_brentq": 10.0, "lean_brentq": 3.0}


def language_model_like_rows(*, rows: int, vocab: int, seed: int) -> tuple[ndarray, ndarray]:
    """(log_policy, log_teacher), float64, shape (rows, vocab): see the module's docstring."""
    rng = np.random.default_rng(seed)
    spread = 2 * np.sqrt(np.geomspace(4e-3, 4.0, rows))[:, None]
    rank = np.argsort(rng.random((rows, vocab)), axis=-1) + 1.0
    common = -rng.uniform(1.0, 2.5, size=(rows, 1)) * np.log(rank) + rng.normal(size=rank.shape)
    log_policy, log_teacher = (
        log_softmax(common + spread * rng.normal(size=rank.shape), axis=-1) for _ in range(2)
    )
    return log_policy, log_teacher


def user_brentq(log_policy: ndarray, log_teacher: ndarray) -> float:
    """What one writes first: the slope as the mean log-ratio under a normalised q."""

    def slope(alpha: float) -> float:
        log_path = alpha * log_policy + (1 - alpha) * log_teacher
        q = np.exp(log_path - logsumexp(log_path))
        return float(np.sum(q * (log_policy - log_teacher)))

    return float(brentq(slope, 0.0, 1.0))


def lean_brentq(log_policy: ndarray, log_teacher: ndarray, xtol: float) -> float:
    """What one writes last: only the sign of the slope matters, and one exp gives it."""
    log_ratio = log_policy - log_teacher
    path = np.empty_like(log_ratio)

    def slope(alpha: float) -> float:
        np.multiply(log_ratio, alpha, out=path)
        np.add(path, log_teacher, out=path)
        np.exp(path, out=path)
        return float(path @ log_ratio)

    return float(brentq(slope, 0.0, 1.0, xtol=xtol, rtol=4 * EPS))


def measure_cell(*, vocab: int, batch: int, rounds: int, seed: int) -> dict[str, Any]:
    """One cell of the record, on the threads that this process has."""
    separate = min(8, batch) if batch > 1 else 8  # rows whose answers are checked
    rows = language_model_like_rows(rows=max(batch, 8), vocab=vocab, seed=seed)
    single = tuple(side.astype(np.float32) for side in rows)
    in_float32, in_float64 = ([torch.from_numpy(x) for x in sides] for sides in (single, rows))
    exact = rows_torch.solve_kl_symmetry(*in_float64)
    xtol = (2 * TOLERANCE / exact.curvature.sqrt()).tolist()
    count = len(xtol)

    def by_torch(policy: torch.Tensor, teacher: torch.Tensor) -> Solve:
        def solve(rows: range) -> list[float]:
            part = slice(rows.start, rows.stop) if batch > 1 else rows.start
            return rows_torch.solve_kl_symmetry(policy[part], teacher[part]).alpha.view(-1).tolist()

        return solve

    def read(rows: range) -> list[float]:
        return [float(side[row].sum()) for row in rows for side in in_float32]

    def one_by_one(solve: Callable[[int], float]) -> Solve:
        return lambda rows: [solve(row) for row in rows]

    (policy, teacher), (policy32, teacher32) = rows, single
    ways: dict[str, Solve] = {
        "torch_float32": by_torch(*in_float32),
        "torch_float64": by_torch(*in_float64),
        "user_brentq": one_by_one(lambda i: user_brentq(policy[i], teacher[i])),
        "lean_brentq": one_by_one(lambda i: lean_brentq(policy[i], teacher[i], xtol[i])),
        "lean_brentq_float32": one_by_one(
            lambda i: lean_brentq(policy32[i], teacher32[i], xtol[i])
        ),
        "read": read,
    }
    groups = [range(count)] if batch > 1 else [range(row, row + 1) for row in range(count)]
    worst_tv = {}
    for name, way in ways.items():  # also the warm-up
        alpha = np.concatenate([way(group) for group in groups])
        if name == "read":
            continue
        sides = single if "float32" in name else rows
        worst_tv[name] = _worst_tv(
            tuple(x[:: count // separate] for x in sides), alpha[:: count // separate]
        )
        if not worst_tv[name] < 3 * TOLERANCE:
            raise RuntimeError(
                f"{name} must find the reference's q* before it is timed: it is off by "
                f"{worst_tv[name]:.1e} in total variation at vocabulary {vocab}."
            )
    seconds = _take_turns(ways, groups, rounds=rounds)
    cold = _take_turns(ways, groups, rounds=rounds, alternate=True) if batch == 1 else seconds
    passes = rows_torch.solve_kl_symmetry(*in_float32).passes.numpy()
    return {
        "threads": torch.get_num_threads(),
        "vocab": vocab,
        "batch": batch,
        "chernoff": _spread(exact.chernoff.numpy()),
        "passes": _spread(passes),
        "worst_tv": worst_tv,
        "clock": _clock().__name__,
        "load": os.getloadavg()[0],
        "seconds": {name: float(np.median(values)) for name, values in seconds.items()},
        "ratio": _ratios(seconds, seed=seed),
        "ratio_cold": _ratios(cold, seed=seed),
    }


def _clock() -> Callable[[], float]:
    return time.process_time if torch.get_num_threads() == 1 else time.perf_counter


def _take_turns(
    ways: dict[str, Solve], groups: list[range], *, rounds: int, alternate: bool = False
) -> dict[str, ndarray]:
    """Seconds per row, shape (rounds, groups), of each way; each round begins with another one.

    In a round every way solves all groups before the next way does, or, to `alternate`, all ways
    solve one group before the next group is touched.
    """
    clock, names = _clock(), list(ways)
    seconds = {name: np.empty((rounds, len(groups))) for name in names}
    for turn in range(rounds):
        order = names[turn % len(names) :] + names[: turn % len(names)]
        pairs = [(name, place) for name in order for place in range(len(groups))]
        if alternate:
            pairs.sort(key=lambda pair: pair[1])
        for name, place in pairs:
            start = clock()
            ways[name](groups[place])
            seconds[name][turn, place] = (clock() - start) / len(groups[place])
    return seconds


def _ratios(seconds: dict[str, ndarray], *, seed: int) -> dict[str, dict[str, float]]:
    fast = seconds["torch_float32"]
    return {
        name: median_with_interval(values / fast, seed=seed)
        for name, values in seconds.items()
        if name != "torch_float32"
    }


def _worst_tv(rows: tuple[ndarray, ...], alpha: ndarray) -> float:
    """The largest TV between q at these alphas and the reference's q*, both in float64."""
    log_policy, log_teacher = (log_softmax(x.astype(np.float64), axis=-1) for x in rows)
    expected = solve_kl_symmetry(log_policy, log_teacher).alpha
    first, second = (
        np.exp(log_geometric_mean(log_policy, log_teacher, a)) for a in (alpha, expected)
    )
    return float(0.5 * np.abs(first - second).sum(axis=-1).max())


def _spread(values: ndarray) -> dict[str, float]:
    return {
        "min": float(values.min()),
        "median": float(np.median(values)),
        "max": float(values.max()),
    }


def judge(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Which targets are met: a ratio counts by its median.

    Neither met nor missed (None) where wall times were taken while others used the processors.
    """
    targets = []
    for name, needed in TARGETS.items():
        for cell in cells:
            busy = cell["clock"] == "perf_counter" and cell["load"] > cell["threads"] + 0.25
            ratio = cell["ratio"][name]["median"]
            targets.append(
                {
                    "target": f"at least {needed:g} times faster than {name}",
                    **{key: cell[key] for key in ("threads", "vocab", "batch")},
                    "ratio": ratio,
                    "needed": needed,
                    "met": None if busy else ratio >= needed,
                }
            )
    return targets


def measure(
    *, threads: list[int], vocabs: list[int], batches: list[int], rounds: int, seed: int
) -> dict[str, Any]:
    """The whole record. Each number of threads gets a process of its own, for BLAS's sake."""
    cells = []
    for count in threads:
        blas = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
        environment = dict.fromkeys(blas, str(count))
        for vocab in vocabs:
            for batch in batches:
                given = {
                    "vocab": vocab,
                    "batch": batch,
                    "rounds": max(3, rounds // 4) if batch > 1 else rounds,
                    "seed": seed,
                }
                cells.append(in_own_process(measure_cell, given, environment=environment))
    return {
        **provenance("numpy", "scipy", "torch", cpu=cpu_name(), cores=os.cpu_count()),
        "seed": seed,
        "rounds": rounds,
        "tolerance_tv": TOLERANCE,
        "device": "cpu",
        "rows": "synthetic, language-model-like: see the docstring of qstar_book.records.solver",
        "solvers": SOLVERS,
        "cells": cells,
        "targets": judge(cells),
    }


def table(record: dict[str, Any]) -> str:
    """The record as text: a table of ratios, then the targets."""
    machine, versions = record["machine"], record["versions"]
    lines = [
        f"{machine['cpu']}, {machine['cores']} cores; "
        + ", ".join(f"{name} {version}" for name, version in versions.items()),
        f"rows: {record['rows']}",
        "seconds per row over those of torch_float32, median [95% interval]:",
        f"{'threads':>7} {'vocab':>7} {'batch':>5} {'passes':>6} {'ms/row':>7}  "
        + "  ".join(f"{name:>20}" for name in SOLVERS if name != "torch_float32"),
    ]
    for cell in record["cells"]:
        ratios = "  ".join(
            "{:>20}".format(f"{r['median']:.2f} [{r['low']:.2f}, {r['high']:.2f}]")
            for r in cell["ratio"].values()
        )
        lines.append(
            f"{cell['threads']:>7} {cell['vocab']:>7} {cell['batch']:>5} "
            f"{cell['passes']['median']:>6.1f} {1e3 * cell['seconds']['torch_float32']:>7.3f}  "
            + ratios
        )
    lines.append("the same, solvers alternating call by call (cold caches), medians:")
    for cell in record["cells"]:
        if cell["batch"] == 1:
            ratios = "  ".join(f"{r['median']:>20.2f}" for r in cell["ratio_cold"].values())
            lines.append(f"{cell['threads']:>7} {cell['vocab']:>7} {1:>5} {'':>14}  {ratios}")
    for target in record["targets"]:
        verdict = {True: "met", False: "MISSED", None: "busy"}[target["met"]]
        lines.append(
            f"{verdict:<6} {target['target']}: "
            f"{target['ratio']:.2f} (threads {target['threads']}, vocabulary {target['vocab']}, "
            f"batch {target['batch']})"
        )
    return "\n".join(lines)


def command(*, out: Path | None, quick: bool, rounds: int, seed: int) -> None:
    """`qstar-book record solver`."""
    record = measure(
        threads=[1] if quick else sorted({1, os.cpu_count() or 1}),
        vocabs=[5_000] if quick else [49_152, 151_936],
        batches=[1, 3] if quick else [1, 64],
        rounds=3 if quick else rounds,
        seed=seed,
    )
    print(table(record))
    if out:
        write_json(out, record)
        print(f"written to {out}")
