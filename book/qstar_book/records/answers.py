"""Whole answers of one language model under two prompts: drawn, weighted, and recorded.

    qstar-book record answers --out data/results/answers_cpu.json

makes the record that the chapter on sequences reads. Distributions of whole answers cannot be
enumerated; here they are sampled by `qstar.theory.particles` and measured by
`qstar.families.montecarlo`.
"""

import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy import ndarray
from torch import Tensor
from tqdm import tqdm

from qstar.adapters import checkpoints
from qstar.decoding import cache_check
from qstar.decoding.kv_cache import PREFILL_WIDTH, KVCache
from qstar.families import montecarlo
from qstar.theory.particles import Particles, sample_token_level, smc

from .. import shipped_model
from ..files import RefusedError, provenance, write_json


class ModelPair:
    """A language model under two prompts as a `Pair`: policy and teacher read the same new tokens.

    A sequence has a fixed number of tokens: after a token that ends the text both parents repeat it
    with certainty. Two caches of keys and values are kept, one for each prompt.

    Args:
        model: A causal language model of transformers.
        policy_ids: The policy's prompt, token ids in one dimension.
        teacher_ids: The teacher's prompt.
        num_particles: How many sequences are read at a time.
        ends: The token ids that end a text.
    """

    def __init__(
        self,
        model: Any,
        policy_ids: Tensor,
        teacher_ids: Tensor,
        num_particles: int,
        *,
        ends: Sequence[int] = (),
    ):
        self._readers = KVCache(model), KVCache(model)
        self._ends = np.asarray(list(ends), dtype=np.int64)
        self._last = np.full(num_particles, -1)
        for reader, ids in zip(self._readers, (policy_ids, teacher_ids), strict=True):
            # How long texts get is not known here: as long as the model can read.
            cache_check.check(reader, reader.window or len(ids) + PREFILL_WIDTH, rows=num_particles)
            reader.start([ids.tolist()] * num_particles)
        # Read only when their distributions are asked for: nobody asks after the last token.
        self._unread = [[ids[-1:].tolist()] * num_particles for ids in (policy_ids, teacher_ids)]

    def log_rows(self) -> tuple[ndarray, ndarray]:
        over = np.isin(self._last, self._ends)
        rows = []
        for reader, ids in zip(self._readers, self._unread, strict=True):
            log_p = reader.feed(ids)[:, -1].double().log_softmax(-1).cpu().numpy()
            log_p[over] = -np.inf
            log_p[over, self._last[over]] = 0.0
            rows.append(log_p)
        return rows[0], rows[1]

    def keep(self, rows: ndarray) -> None:
        for reader in self._readers:
            reader.select(rows.tolist())
        self._last = self._last[rows]

    def extend(self, tokens: ndarray) -> None:
        self._last = tokens.copy()
        self._unread = [[[token] for token in tokens.tolist()]] * 2


# --- The recorded run ----------------------------------------------------------------------------


def record(
    name: str,
    model: Any,
    tokenizer: Any,
    prompt: Mapping[str, str],
    *,
    length: int,
    num_particles: int,
    num_draws: int,
    num_runs: int,
    resample_below: float,
    seed: int,
    progress: bool = False,
) -> dict[str, Any]:
    """Whole answers of one model under two system prompts, drawn in every way of this module.

    First `num_draws` answers from each parent and from the token-level q*; the parents' answers
    give alpha* and C of the distributions of whole answers (`qstar.families.montecarlo`). Then, at
    that alpha, `num_runs` runs each of SMC and of plain importance sampling.

    Args:
        name: What `shipped_model.load` was given.
        model: A causal language model.
        tokenizer: Its tokenizer, with a chat template.
        prompt: policy_system, teacher_system and user.
        length: How many tokens an answer has; after its end it repeats the token that ended it.
        num_particles: Answers in one batch.
        num_draws: Answers in a sample; a multiple of `num_particles`.
        num_runs: How often SMC and importance sampling are run.
        resample_below: SMC resamples where fewer than this share of its particles is effective.
        seed: Of the first batch; every batch has the next one.
        progress: Show a bar on standard error.

    Returns:
        What the JSON file holds, except for how and where it was made.
    """
    policy_ids, teacher_ids = (
        checkpoints.chat_ids(tokenizer, prompt["user"], system=prompt[system])
        for system in ("policy_system", "teacher_system")
    )
    given = model.generation_config.eos_token_id
    ends = [] if given is None else given if isinstance(given, list) else [given]
    batches = num_draws // num_particles
    seeds = iter(range(seed, seed + 3 * batches + 2 * num_runs))
    bar = tqdm(total=3 * batches + 2 * num_runs, unit="batch", disable=not progress)

    def run(method: Callable[..., Particles], **options: Any) -> dict[str, Any]:
        drawn = method(
            ModelPair(model, policy_ids, teacher_ids, num_particles, ends=ends),
            length,
            num_particles=num_particles,
            generator=np.random.default_rng(next(seeds)),
            **options,
        )
        bar.update()
        return _as_plain(drawn, tokenizer)

    samples = {
        party: [run(sample_token_level, alpha=alpha) for _ in range(batches)]
        for party, alpha in (("policy", 1.0), ("teacher", 0.0), ("token_level", None))
    }
    solved = montecarlo.solve_sample(parents_sample(samples["policy"], samples["teacher"]))
    at = solved.alpha
    runs = {
        kind: [run(smc, alpha=at, resample_below=below) for _ in range(num_runs)]
        for kind, below in (("smc", resample_below), ("importance", 0.0))
    }
    bar.close()
    return {
        "model": name,
        "prompt": dict(prompt),
        "length": length,
        "num_particles": num_particles,
        "resample_below": resample_below,
        "seed": seed,
        "alpha": at,
        "balance": asdict(solved),
        "samples": samples,
        "runs": runs,
    }


def parents_sample(
    policy: Sequence[Mapping[str, Any]], teacher: Sequence[Mapping[str, Any]]
) -> montecarlo.Sample:
    """Recorded draws of both parents as a `qstar.families.samples.Sample` of whole sequences."""
    rows = [
        np.concatenate([run[key] for run in (*policy, *teacher)])
        for key in ("log_policy", "log_teacher")
    ]
    ours = sum(len(run["log_policy"]) for run in policy)
    drawn = np.split(np.arange(len(rows[0])), [ours])
    parents = [
        montecarlo.Sampled(lambda at, row=row: row[at], lambda count, _, at=at: at)  # type: ignore[misc]
        for row, at in zip(rows, drawn, strict=True)
    ]
    return montecarlo.draw_sample(
        parents[0],
        parents[1],
        len(rows[0]),
        weight=ours / len(rows[0]),
        generator=np.random.default_rng(0),  # the draws are there: nothing is random
    )


def _as_plain(drawn: Particles, tokenizer: Any) -> dict[str, Any]:
    """A run as JSON holds it: tokens and texts, and of each sequence its two log-probabilities,
    its weight and its sum of log Z."""
    return {
        "tokens": drawn.tokens.tolist(),
        "texts": [tokenizer.decode(row, skip_special_tokens=True) for row in drawn.tokens],
        "log_policy": drawn.log_policy.round(6).tolist(),
        "log_teacher": drawn.log_teacher.round(6).tolist(),
        "log_weights": drawn.log_weights.round(6).tolist(),
        "log_correction": drawn.log_partitions.sum(axis=1).round(6).tolist(),
        "log_partition": round(drawn.log_partition, 6),
        "effective": drawn.effective.round(4).tolist(),
        "resampled": list(drawn.resampled),
        "origin": drawn.origin.tolist(),
    }


def command(
    *,
    out: Path,
    model: str | None,
    prompt: int,
    length: int,
    particles: int,
    draws: int,
    runs: int,
    resample_below: float,
    seed: int,
) -> None:
    """`qstar-book record answers`."""
    from . import corpus  # only the command needs it

    if draws % particles or min(draws, runs) < 1:
        raise RefusedError(
            "--draws must be a positive multiple of --particles, and --runs positive"
        )
    name = model or shipped_model.DEFAULT
    made = record(
        name,
        *shipped_model.load(name, device="cpu"),
        asdict(corpus.read_prompts(corpus.data_file("prompts.json"))[prompt]),
        length=length,
        num_particles=particles,
        num_draws=draws,
        num_runs=runs,
        resample_below=resample_below,
        seed=seed,
        progress=True,
    )
    packages = ("numpy", "scipy", "torch", "transformers")
    made_by = provenance(*packages, device="cpu", architecture=platform.machine())
    write_json(out, made_by | made)
    print(out)
