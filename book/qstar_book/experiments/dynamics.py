"""alpha*, C and the divergences between a model in training and where it is going.

    qstar-book record dynamics --out data/results/dynamics.json

A model of the family is trained from scratch. At some steps its next-token distributions over
held-out documents are compared with those of the model at the end of its training, and with those
of another trained model that stays what it is. The theorems: towards its own end C falls to 0;
alpha* tends to 1/2 at positions where the range of the log-ratio does, and there alone.
"""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor

from qstar.decoding.diagnostics import Comparison, measure

from . import family, tasks
from .jobs import Keep, collect, write

STEPS = (0, 1, 2, 5, 10, 20, 50, 100, 200, 400, 700, 1_000, 1_400, 1_800, 2_000, 3_000, 4_000)
"""After which steps a checkpoint is looked at, if the training has so many; and at its end."""


@dataclass(frozen=True, slots=True)
class Dynamics:
    """What is trained and looked at.

    Attributes:
        size: A key of `family.SIZES`.
        steps: Optimiser steps.
        batch: Documents a step.
        other: The trained model that stays what it is.
        seeds: How many trainings; the first has the seed of the family's own models.
        documents: Held-out documents, half of them with a hint.
        kept: Of how many positions the numbers are kept one by one.
        kinds: What is asked; empty: every kind of `tasks.KINDS`.
    """

    size: str = "300k"
    steps: int = 200
    batch: int = 32
    other: str = "300k"
    seeds: int = 3
    documents: int = 48
    kept: int = 200
    kinds: tuple[str, ...] = ()

    def quick(self) -> "Dynamics":
        """Small and few: a rehearsal."""
        return replace(self, steps=6, batch=4, seeds=1, documents=8, kept=20)

    def training(self, seed: int) -> family.Training:
        """The training of one seed."""
        return family.Training(
            self.size, steps=self.steps, batch=self.batch, seed=seed, kinds=self.kinds
        )

    def looked_at(self) -> list[int]:
        """The steps after which a checkpoint is looked at."""
        return [step for step in STEPS if step < self.steps] + [self.steps]


def documents_of(config: Dynamics) -> tuple[Tensor, Tensor]:
    """Token ids of held-out documents, right-padded, and which are real. Shape (rows, longest)."""
    kinds = config.kinds or tuple(tasks.KINDS)
    share = -(-config.documents // len(kinds))
    items = [item for kind in kinds for item in tasks.items(kind, share, "dynamics")]
    rows = [
        family.prompt_ids(tasks.document(item, hint=item.answer if i % 2 else ""))
        for i, item in enumerate(items)
    ]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    lengths = torch.tensor([len(row) for row in rows])
    return ids, torch.arange(ids.shape[1]) < lengths[:, None]


@torch.no_grad()
def log_rows(model: Any, ids: Tensor, real: Tensor) -> Tensor:
    """The next-token distribution after every real token, in float64, on the CPU.

    Shape (positions, vocab).
    """
    device = next(model.parameters()).device
    logits = model(ids.to(device), use_cache=False).logits[real.to(device)]
    return logits.double().log_softmax(-1).cpu()  # type: ignore[no-any-return]


QUANTITIES = ("alpha", "chernoff", "log_ratio_range", "policy_to_teacher", "teacher_to_policy")


def positions(found: Comparison) -> dict[str, ndarray]:
    """What is kept of each position, by name."""
    return {
        "alpha": found.balance.alpha.numpy(),
        "chernoff": found.balance.chernoff.numpy(),
        "log_ratio_range": found.log_ratio_range.numpy(),
        "policy_to_teacher": found.policy_to_teacher.numpy(),
        "teacher_to_policy": found.teacher_to_policy.numpy(),
    }


def summary(rows: dict[str, ndarray]) -> dict[str, Any]:
    """Means of divergences and quantiles of the rest, over all positions."""
    away = np.abs(rows["alpha"] - 0.5)
    small = rows["chernoff"] < SMALL
    narrow = rows["log_ratio_range"] < NARROW
    return {
        "chernoff": float(rows["chernoff"].mean()),
        "policy_to_teacher": float(rows["policy_to_teacher"].mean()),
        "teacher_to_policy": float(rows["teacher_to_policy"].mean()),
        "alpha_quantiles": np.quantile(rows["alpha"], AT).tolist(),
        "range_quantiles": np.quantile(rows["log_ratio_range"], AT).tolist(),
        "chernoff_quantiles": np.quantile(rows["chernoff"], AT).tolist(),
        "away_mean": float(away.mean()),
        "small": int(small.sum()),
        "small_and_away": int((small & (away > AWAY)).sum()),
        "narrow": int(narrow.sum()),
        "narrow_away_most": float(away[narrow].max(initial=0.0)),
        "positions": len(away),
    }


AT = (0.05, 0.25, 0.5, 0.75, 0.95)
"""The quantiles of a summary."""
SMALL = 1e-3
"""Below this many nats of C two distributions are called near."""
AWAY = 0.05
"""Further than this from 1/2 alpha* is called away."""
NARROW = 0.5
"""Below this range of the log-ratio, in nats, alpha* is within 0.021 of 1/2 by the range bound."""


def run(*, config: dict[str, Any], seed: int, device: str) -> dict[str, Any]:
    """One training, and its checkpoints against its end and against the other model.

    Args:
        config: The fields of a `Dynamics`.
        seed: Of the weights and the documents that are learned from.
        device: Where.
    """
    asked = Dynamics(**config)
    ids, real = documents_of(asked)
    other, _ = family.load(asked.other, device=device)
    fixed = log_rows(other, ids, real)
    seen: dict[int, Tensor] = {}

    def look(step: int, model: Any) -> None:
        if step in asked.looked_at():
            model.eval()
            seen[step] = log_rows(model, ids, real)
            model.train()

    _, losses = family.train(asked.training(seed), device=device, on_step=look)
    end = seen[asked.steps]
    kept = np.linspace(0, len(end) - 1, min(asked.kept, len(end))).round().astype(int)
    found: dict[str, Any] = {"seed": seed, "steps": [], "kept": kept.tolist()}
    for step, rows in sorted(seen.items()):
        entry: dict[str, Any] = {"step": step, "loss": losses[min(step, len(losses) - 1)]}
        for name, teacher in (("end", end), ("other", fixed)):
            if name == "end" and step == asked.steps:
                continue  # one and the same model
            at = positions(measure(rows, teacher))
            entry[name] = summary(at)
            if seed == 0:
                entry[name]["kept"] = {
                    key: [float(f"{x:.5g}") for x in at[key][kept]]
                    for key in ("alpha", "chernoff", "log_ratio_range")
                }
        found["steps"].append(entry)
    return found


def record(
    config: Dynamics,
    *,
    device: str = "cpu",
    processes: int = 1,
    limit_s: float | None = None,
    keep: Keep | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """All trainings. Arguments as in `distillation.record`."""
    told = asdict(config)
    made: dict[str, Any] = {"config": told}
    given = [{"config": told, "seed": seed, "device": device} for seed in range(config.seeds)]
    return collect(
        made,
        run,
        given,
        order=lambda x: x["seed"],
        processes=processes,
        limit_s=limit_s,
        keep=keep,
        progress=progress,
    )


def command(
    *,
    out: Path,
    size: str,
    other: str,
    device: str,
    quick: bool,
    seeds: int | None,
    steps: int | None,
    batch: int | None,
    jobs: int,
    limit: float | None,
) -> None:
    """`qstar-book record dynamics`."""
    config = Dynamics(size, other=other, kinds=family.kinds_of(other))
    config = config.quick() if quick else config
    named: dict[str, Any] = {"seeds": seeds, "steps": steps, "batch": batch}
    config = replace(config, **{name: x for name, x in named.items() if x is not None})
    write(record, config, out=out, device=device, processes=jobs, limit_s=limit)
