"""Reinforcement learning in small: rollouts of the policy, and of q* of the policy and a teacher.

    qstar-book record policy-gradient --out data/results/policy_gradient.json

The policy reads a question; the reward is 1 for the right answer and nothing else, 0 otherwise. The
step is REINFORCE, its baseline the policy's own chance of the right answer (known exactly), with a
penalty: the divergence of the policy from the checkpoint it began as (the reference), at each token
in full over the vocabulary. The teacher is the reference under a hint. Rollouts come from the
policy, from a mean of policy and teacher, from their q*, or from the teacher; taken as they are, or
weighted by policy / q* of the whole answer, which makes the step unbiased.

Source: the analysis, which names online RLHF as a use of q* and an "optimal balance of exploration
and stability" as its merit. REINFORCE: Williams (1992), Machine Learning 8.
"""

import copy
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor

from qstar.rows import kl, log_geometric_mean
from qstar.solve import solve_kl_symmetry

from . import family, rollouts, tasks
from .jobs import Keep, compare, held_of, write
from .rollouts import Questions

WEIGHTED = ", weighted"


@dataclass(frozen=True, slots=True)
class PolicyGradient:
    """What is trained, and how.

    Attributes:
        model: A trained model of the family.
        ways: How rollouts are drawn: "q*" and keys of `rollouts.TARGETS`; ", weighted" after one
            weighs each answer by policy / what it was drawn from.
        seeds: How many runs of each way.
        steps: Optimiser steps.
        prompts: Questions of a step, one answer each.
        learning_rate: Of AdamW, the same at every step.
        rates: Learning rates that are tried first (`jobs.best_rate`); the best of them becomes the
            learning rate. Empty: it stays what it is.
        beta: What a nat of divergence from the reference costs, in units of the reward.
        held_out: Questions of the evaluation.
        evaluations: How often it takes place after the start.
        max_new_tokens: The longest answer.
        kinds: What is asked; empty: every kind of `tasks.KINDS`.
    """

    model: str = "300k"
    ways: tuple[str, ...] = ("policy", "half", "q*", "q*" + WEIGHTED, "teacher")
    seeds: int = 5
    steps: int = 100
    prompts: int = 32
    learning_rate: float = 2e-4
    rates: tuple[float, ...] = ()
    beta: float = 0.05
    held_out: int = 96
    evaluations: int = 3
    max_new_tokens: int = 32
    kinds: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        known = ["q*", *rollouts.TARGETS]
        if not {way.removesuffix(WEIGHTED) for way in self.ways} <= set(known):
            raise ValueError(f"ways must be among {', '.join(known)}; got {self.ways}")
        if min(self.seeds, self.steps, self.prompts, self.evaluations) < 1 or self.beta <= 0:
            raise ValueError(f"expected seeds, steps, ... >= 1 and beta > 0; got {self}")

    def quick(self) -> "PolicyGradient":
        """Small and few: a rehearsal."""
        small: dict[str, Any] = {"seeds": 2, "steps": 2, "prompts": 8}
        return type(self)(**asdict(self) | small | {"held_out": 16, "evaluations": 1})


# --- One step ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class Objective:
    """What a batch of rollouts says: a step goes up its gradient.

    Attributes:
        value: Whose gradient is the step's.
        weights: policy / what was drawn from, of each answer. Shape (rows,).
        rewards: Shape (rows,).
        divergence: Of the policy from the reference, summed over each answer. Shape (rows,).
    """

    value: Tensor
    weights: Tensor
    rewards: Tensor
    divergence: Tensor


def objective(
    policy: Any,
    reference: Any,
    questions: Questions,
    drawn: rollouts.Rollouts,
    *,
    beta: float,
    weighted: bool,
) -> Objective:
    """REINFORCE with an exact baseline, and the penalty of each token.

    The gradient of `value` is the mean over answers of
    w (R - b) grad log policy(answer) - beta sum_t w_(t-1) grad KL(policy || reference)(t),
    where w_t is policy / what was drawn from, of the first t tokens, if weighted, else 1; b is the
    policy's chance of the right answer. Weighted it is an unbiased estimate of what draws of the
    policy estimate.
    """
    baseline = rollouts.told(policy, questions.plain, questions).chance
    rewards = drawn.right(questions).double()
    with torch.no_grad():
        log_reference = rollouts.log_distributions(reference, questions.plain, drawn.tokens)
    log_policy = rollouts.log_distributions(policy, questions.plain, drawn.tokens)
    said = log_policy.gather(-1, drawn.tokens[..., None]).squeeze(-1)
    said = torch.where(drawn.drawn, said, 0.0)
    log_weight = (said.detach() - drawn.log_target).double().cumsum(-1)
    weight = log_weight.exp()
    before = torch.cat([torch.ones_like(weight[:, :1]), weight[:, :-1]], 1)
    if not weighted:
        before = torch.ones_like(before)
    last = weight[:, -1] if weighted else torch.ones_like(weight[:, -1])
    gap = torch.where(drawn.drawn, rollouts.reverse_kl(log_policy, log_reference), 0.0)
    gain = last * (rewards - baseline) * said.double().sum(-1)
    value = (gain - beta * (before * gap).sum(-1)).mean()
    return Objective(value, weight[:, -1], rewards, gap.detach().sum(-1))


def effective(weights: Tensor) -> float:
    """The share of the draws that weighted ones are worth: (sum w)^2 / (n sum w^2)."""
    return (weights.sum() ** 2 / (len(weights) * (weights**2).sum())).item()


def evaluate(policy: Any, reference: Any, questions: Questions, config: PolicyGradient) -> Any:
    """The policy without a hint: chance of the reward, budget used, how much it explores."""
    plain = rollouts.told(policy, questions.plain, questions)
    own = rollouts.draw(
        "policy", policy, policy, questions, max_new_tokens=config.max_new_tokens, seed=1
    )
    with torch.no_grad():
        log_ps = [
            rollouts.log_distributions(m, questions.plain, own.tokens) for m in (policy, reference)
        ]
    gap = torch.where(own.drawn, rollouts.reverse_kl(*log_ps), 0.0).sum(-1)
    entropy = -(log_ps[0].exp() * log_ps[0]).sum(-1)[own.drawn].mean()
    return {
        "right_chance": plain.chance.mean().item(),
        "right_greedy": plain.greedy.double().mean().item(),
        "kl_to_reference": gap.mean().item(),
        "objective": (plain.chance.mean() - config.beta * gap.mean()).item(),
        "entropy": entropy.item(),
        "distinct_trigrams": rollouts.distinct(own.tokens, own.drawn),
    }


def run(
    *, config: dict[str, Any], way: str, seed: int, device: str, stop_after: int | None = None
) -> dict[str, Any]:
    """One way of drawing, one seed: its curve. Arguments as in `distillation.run`."""
    asked = PolicyGradient(**config)
    policy, _ = family.load(asked.model, device=device)
    reference = copy.deepcopy(policy).requires_grad_(False)
    optimiser = torch.optim.AdamW(policy.parameters(), lr=asked.learning_rate, weight_decay=0.0)
    held_out = rollouts.of_characters(held_out_of(asked))
    at = {round(asked.steps * i / asked.evaluations) for i in range(asked.evaluations + 1)}
    curve, steps = [], []
    for step in range(asked.steps + 1):
        if step in at and stop_after is None:
            curve.append({"step": step} | evaluate(policy, reference, held_out, asked))
        if step in (asked.steps, stop_after):
            break
        begun = time.perf_counter()
        items = list(islice(tasks.stream(("rewards", seed, step), asked.kinds), asked.prompts))
        questions = rollouts.of_characters(items)
        drawn = rollouts.draw(
            way.removesuffix(WEIGHTED),
            policy,
            reference,
            questions,
            max_new_tokens=asked.max_new_tokens,
            seed=1_000 * seed + step,
        )
        weighted = way.endswith(WEIGHTED)
        found = objective(policy, reference, questions, drawn, beta=asked.beta, weighted=weighted)
        optimiser.zero_grad(set_to_none=True)
        (-found.value).backward()
        norm = torch.nn.utils.clip_grad_norm_(list(policy.parameters()), 1.0)
        optimiser.step()
        steps.append(
            {
                "value": found.value.item(),
                "reward": found.rewards.mean().item(),
                "kl_to_reference": found.divergence.mean().item(),
                "gradient_norm": norm.item(),
                "effective": effective(found.weights),
                "largest_weight": found.weights.max().item(),
                "tokens": int(drawn.drawn.sum()),
                "distinct_trigrams": rollouts.distinct(drawn.tokens, drawn.drawn),
                "step_s": time.perf_counter() - begun,
            }
        )
    return rollouts.rounded({"way": way, "seed": seed, "curve": curve, "steps": steps})


def held_out_of(config: PolicyGradient) -> list[tasks.Item]:
    """What the evaluation asks, evenly by kind."""
    kinds = config.kinds or tuple(tasks.KINDS)
    share = -(-config.held_out // len(kinds))
    return [item for kind in kinds for item in tasks.items(kind, share, "held out")]


# --- The soft value ------------------------------------------------------------------------------


def soft_value(chance: ndarray, beta: float) -> ndarray:
    """beta log E[e^(R / beta)] of a reward of 1 with this chance, else 0. Shape (rows,)."""
    return beta * np.logaddexp(np.log1p(-chance), np.log(chance) + 1 / beta)


def log_optimum(log_policy: ndarray, right: ndarray, beta: float) -> ndarray:
    """The optimum of E[R] - beta KL(. || policy), along the right answer.

    It is policy * e^(R / beta), normalised over whole answers. Its next-token distributions are the
    policy's, tilted by what each token leaves to hope for: 1 off the right answer, and after its
    first k tokens V_k = 1 + (e^(1 / beta) - 1) times the policy's chance of the rest of it.

    Args:
        log_policy: The policy at each position of the right answer. Shape (tokens, vocab).
        right: The right answer. Shape (tokens,).
        beta: The price of a nat.
    """
    said = log_policy[np.arange(len(right)), right]
    rest = np.append(np.cumsum(said[::-1])[::-1], 0.0)[1:]  # chance of what follows each token
    value = np.logaddexp(np.log(-np.expm1(np.minimum(rest, -1e-300))), rest + 1 / beta)
    tilted = log_policy.copy()
    tilted[np.arange(len(right)), right] += value
    return tilted - np.logaddexp.reduce(tilted, axis=-1, keepdims=True)


def values(config: PolicyGradient, device: str) -> dict[str, Any]:
    """What q* of a checkpoint and two teachers is worth, exactly, on each held-out question.

    One teacher is the optimum of the regularised reward, for which the mean reward of q* is the
    soft value, of whole answers; the other is the checkpoint under the hint. Chances that an answer
    is right, drawn token by token, are products along the right answer.
    """
    policy, _ = family.load(config.model, device=device)
    questions = rollouts.of_characters(held_out_of(config))
    plain = rollouts.told(policy, questions.plain, questions)
    hinted = rollouts.told(policy, questions.hinted, questions)
    found: dict[str, list[float]] = {}
    for i, answer in enumerate(questions.answers):
        rows = {
            name: side.log_p[i, : len(answer)].double().log_softmax(-1).cpu().numpy()
            for name, side in (("policy", plain), ("hint", hinted))
        }
        right, place = answer.numpy(), np.arange(len(answer))
        rows["optimum"] = log_optimum(rows["policy"], right, config.beta)
        chance = {name: math.exp(log_p[place, right].sum()) for name, log_p in rows.items()}
        for name in ("hint", "optimum"):
            alpha = solve_kl_symmetry(rows["policy"], rows[name]).alpha
            q_star = log_geometric_mean(rows["policy"], rows[name], alpha)
            chance[f"q* with {name}"] = math.exp(q_star[place, right].sum())
        log_wrong = math.log1p(-chance["policy"])
        shift = np.logaddexp(log_wrong, math.log(chance["policy"]) + 1 / config.beta)
        whole = [
            np.array([math.log(chance["policy"]), log_wrong]),
            np.array([math.log(chance["optimum"]), log_wrong - shift]),
        ]
        balance = solve_kl_symmetry(*whole)
        mean = log_geometric_mean(whole[0], whole[1], balance.alpha)
        chance["q* with optimum, whole answers"] = math.exp(mean[0])
        chance["soft value"] = float(soft_value(np.array(chance["policy"]), config.beta))
        chance["kl budget of q*, whole answers"] = float(kl(mean, whole[0]))
        for name, value in chance.items():
            found.setdefault(name, []).append(float(value))
    return {"beta": config.beta, "by_question": found}


# --- The record ----------------------------------------------------------------------------------


def record(
    config: PolicyGradient,
    *,
    device: str = "cpu",
    processes: int = 1,
    limit_s: float | None = None,
    keep: Keep | None = None,
    progress: bool = False,
    held: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """All ways and seeds, and the soft values. Arguments as in `distillation.record`."""
    made: dict[str, Any] = {"config": asdict(config), **held_of(held, "values", "scan", "runs")}
    if "values" not in made:
        made["values"] = values(config, device)
    return compare(
        made,
        run,
        quantity="objective",
        device=device,
        processes=processes,
        limit_s=limit_s,
        keep=keep,
        progress=progress,
    )


def command(
    *,
    out: Path,
    model: str,
    device: str,
    quick: bool,
    seeds: int | None,
    steps: int | None,
    prompts: int | None,
    learning_rate: float | None,
    rates: Sequence[float],
    kinds: Sequence[str],
    jobs: int,
    limit: float | None,
    more: bool,
) -> None:
    """`qstar-book record policy-gradient`."""
    asked = tuple(kinds) or family.kinds_of(model)
    config = PolicyGradient(model, rates=tuple(rates), kinds=asked)
    config = config.quick() if quick else config
    named = {"seeds": seeds, "steps": steps, "prompts": prompts, "learning_rate": learning_rate}
    config = PolicyGradient(**asdict(config) | {k: x for k, x in named.items() if x is not None})
    write(record, config, out=out, device=device, processes=jobs, limit_s=limit, more=more)
