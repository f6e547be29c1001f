"""On-policy distillation of one checkpoint under two contexts, with rollouts of several kinds.

    qstar-book record distillation --out data/results/distillation.json

The student is a checkpoint that reads questions without a hint. The teacher is the same checkpoint,
frozen, which reads a hint before each question. An answer is drawn, from the student, from the
teacher, from a mean of both or from their q*; both read it, and the student takes a step down the
reverse divergence KL(student || teacher) at its tokens, in full over the vocabulary. No gradient
flows through the draw. Every way of drawing trains on the same questions and equally many tokens.

Source of the method: Agarwal et al. (2024), "On-policy distillation of language models", ICLR.
"""

import copy
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qstar.decoding.diagnostics import measure
from qstar.decoding.generate import generate

from .. import shipped_model
from . import family, rollouts, tasks
from .jobs import Keep, compare, held_of, write
from .rollouts import Questions

SMOLLM2 = "smollm2"


@dataclass(frozen=True, slots=True)
class Distillation:
    """What is trained, and how.

    Attributes:
        model: A trained model of the family, or "smollm2", whose adapters (LoRA) are trained.
        ways: How rollouts are drawn: "q*" and keys of `rollouts.TARGETS`.
        seeds: How many runs of each way; they differ in the questions and in the draws.
        steps: Optimiser steps.
        prompts: Questions of a step.
        tokens: Drawn tokens of a step that are learned from.
        learning_rate: Of AdamW, the same at every step.
        rates: Learning rates that are tried first (`jobs.best_rate`); the best of them becomes the
            learning rate. Empty: it stays what it is.
        held_out: Questions of the evaluation, none of which was ever learned from.
        evaluations: How often it takes place after the start.
        max_new_tokens: The longest answer.
        kinds: What is asked; empty: every kind of `tasks.KINDS`.
        rank: Of the adapters of "smollm2".
        hint: What its teacher reads, of `rollouts.HINTS`; a model of the family knows the answer.
    """

    model: str = "300k"
    ways: tuple[str, ...] = ("policy", "mixture", "half", "q*", "teacher")
    seeds: int = 5
    steps: int = 100
    prompts: int = 32
    tokens: int = 128
    learning_rate: float = 1e-4
    rates: tuple[float, ...] = ()
    held_out: int = 96
    evaluations: int = 3
    max_new_tokens: int = 32
    kinds: tuple[str, ...] = ()
    rank: int = 8
    hint: str = "answer"

    def __post_init__(self) -> None:
        known = ["q*", *rollouts.TARGETS]
        if not set(self.ways) <= set(known):
            raise ValueError(f"ways must be among {', '.join(known)}; got {self.ways}")
        if min(self.seeds, self.steps, self.prompts, self.tokens, self.evaluations) < 1:
            raise ValueError(f"expected seeds, steps, prompts, ... >= 1; got {self}")
        if self.hint not in (rollouts.HINTS if self.model == SMOLLM2 else ("answer",)):
            raise ValueError(
                f"hint must be among {', '.join(rollouts.HINTS)}, and a model of the family reads "
                f"the answer; got {self.hint!r} for {self.model!r}"
            )

    def quick(self) -> "Distillation":
        """Small and few: a rehearsal."""
        small: dict[str, Any] = {"seeds": 2, "steps": 2, "prompts": 8, "tokens": 64}
        return type(self)(**asdict(self) | small | {"held_out": 16, "evaluations": 1})


# --- One checkpoint ------------------------------------------------------------------------------


def checkpoint(
    config: Distillation, device: str, *, seed: int
) -> tuple[Any, Any, Callable[[Sequence[tasks.Item]], Questions]]:
    """(student, teacher, what makes questions): two copies of one checkpoint, the latter frozen."""
    if config.model != SMOLLM2:
        model, _ = family.load(config.model, device=device)
        return model, copy.deepcopy(model).requires_grad_(False), rollouts.of_characters
    from peft import LoraConfig, get_peft_model

    teacher, tokenizer = _smollm2(device)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # peft asks transformers by an old name.
        warnings.filterwarnings("ignore", ".is_gradient_checkpointing. is deprecated")
        torch.manual_seed(seed)
        adapted = get_peft_model(
            copy.deepcopy(teacher),
            LoraConfig(r=config.rank, lora_alpha=2 * config.rank, target_modules="all-linear"),
        )
    student = adapted.get_base_model().eval()
    return student, teacher.requires_grad_(False), rollouts.of_chat(tokenizer, hint=config.hint)


@cache
def _smollm2(device: str) -> tuple[Any, Any]:
    """The book's language model, loaded once a process, and its tokenizer."""
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    return shipped_model.load(device=device, dtype=dtype)


def questions_of(config: Distillation, seed: int, step: int) -> list[tasks.Item]:
    """What is asked at a step: the same of every way."""
    return list(islice(tasks.stream(("rollouts", seed, step), config.kinds), config.prompts))


def held_out_of(config: Distillation) -> list[tasks.Item]:
    """What the evaluation asks, evenly by kind."""
    kinds = config.kinds or tuple(tasks.KINDS)
    share = -(-config.held_out // len(kinds))
    return [item for kind in kinds for item in tasks.items(kind, share, "held out")]


# --- One run -------------------------------------------------------------------------------------


def first_tokens(drawn: Tensor, count: int) -> Tensor:
    """The first so many drawn tokens of a batch, row by row. Shape (rows, new)."""
    order = drawn.flatten().cumsum(0).view_as(drawn)
    return drawn & (order <= count)


def step_loss(
    student: Any, teacher: Any, questions: Questions, drawn: rollouts.Rollouts, learned: Tensor
) -> Tensor:
    """The mean reverse divergence of the student at the learned tokens, in nats a token."""
    with torch.no_grad():
        log_teacher = rollouts.log_distributions(teacher, questions.hinted, drawn.tokens)
    log_student = rollouts.log_distributions(student, questions.plain, drawn.tokens)
    return rollouts.reverse_kl(log_student, log_teacher)[learned].mean()


def evaluate(student: Any, teacher: Any, questions: Questions, config: Distillation) -> Any:
    """Accuracy without a hint, and how far the student is from the teacher. Nats a token."""
    plain = rollouts.told(student, questions.plain, questions)
    hinted = rollouts.told(teacher, questions.hinted, questions)
    pair = measure(*(_some(x.log_p[x.real]).double().log_softmax(-1) for x in (plain, hinted)))
    alpha = pair.balance.alpha
    own = rollouts.draw(
        "policy", student, teacher, questions, max_new_tokens=config.max_new_tokens, seed=1
    )
    with torch.no_grad():
        log_ps = [
            rollouts.log_distributions(model, prompts, own.tokens)
            for model, prompts in ((student, questions.plain), (teacher, questions.hinted))
        ]
    gap = torch.where(own.drawn, rollouts.reverse_kl(*log_ps), 0.0).sum(-1)
    return {
        "right_greedy": plain.greedy.double().mean().item(),
        "right_chance": plain.chance.mean().item(),
        "teacher_right_chance": hinted.chance.mean().item(),
        "kl_on_right_answers": pair.policy_to_teacher.mean().item(),
        "kl_of_an_own_answer": gap.mean().item(),
        "chernoff": pair.balance.chernoff.mean().item(),
        "alpha_quartiles": [alpha.quantile(at).item() for at in (0.25, 0.5, 0.75)],
        "widest_ratio_median": pair.log_ratio_range.median().item(),
        "right_by_kind": {
            kind: sum(marks) / len(marks)
            for kind, marks in _by_kind(questions, plain.chance.tolist()).items()
        },
        "chances": plain.chance.tolist(),
        "teacher_chances": hinted.chance.tolist(),
    }


_BEFORE: dict[str, dict[str, Any]] = {}
"""What an evaluation finds before the first step, by what it depends on: every run begins there."""


def evaluate_before(
    student: Any, teacher: Any, questions: Questions, config: Distillation
) -> dict[str, Any]:
    """`evaluate` of the checkpoint itself, once a process: adapters change nothing at first."""
    asked = config.hint, config.held_out, config.kinds, config.max_new_tokens
    weights = sum(x.detach().double().sum().item() for x in teacher.parameters())
    key = repr((config.model, weights, *asked, str(next(teacher.parameters()).device)))
    if key not in _BEFORE:
        _BEFORE[key] = evaluate(student, teacher, questions, config)
    return _BEFORE[key]


def _some(rows: Tensor) -> Tensor:
    """128 of the rows, or a few more, evenly. Shape (some, vocab)."""
    return rows[:: max(1, len(rows) // 128)]


def _by_kind(questions: Questions, values: Sequence[float]) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for item, value in zip(questions.items, values, strict=True):
        found.setdefault(item.kind, []).append(value)
    return found


def run(
    *, config: dict[str, Any], way: str, seed: int, device: str, stop_after: int | None = None
) -> dict[str, Any]:
    """One way of drawing, one seed: its learning curve.

    Args:
        config: The fields of a `Distillation`.
        way: How rollouts are drawn.
        seed: Of the questions, the draws and the adapters.
        device: Where.
        stop_after: Steps to really make; the evaluation at their end is left out.
    """
    asked = Distillation(**config)
    student, teacher, ask = checkpoint(asked, device, seed=seed)
    learned_from = [x for x in student.parameters() if x.requires_grad]
    optimiser = torch.optim.AdamW(learned_from, lr=asked.learning_rate, weight_decay=0.0)
    at = sorted({round(asked.steps * i / asked.evaluations) for i in range(asked.evaluations + 1)})
    held_out = ask(held_out_of(asked))
    steps: list[dict[str, Any]] = []
    curve: list[dict[str, Any]] = []
    for step in range(asked.steps + 1):
        if step in at and stop_after is None:
            found = {"step": step, "tokens": sum(s["tokens"] for s in steps)}
            look = evaluate if step else evaluate_before
            curve.append(found | look(student, teacher, held_out, asked))
        if step in (asked.steps, stop_after):
            break
        begun = time.perf_counter()
        questions = ask(questions_of(asked, seed, step))
        drawn = rollouts.draw(
            way,
            student,
            teacher,
            questions,
            max_new_tokens=asked.max_new_tokens,
            seed=1_000 * seed + step,
        )
        rolled_s = time.perf_counter() - begun
        learned = first_tokens(drawn.drawn, asked.tokens)
        loss = step_loss(student, teacher, questions, drawn, learned)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(learned_from, 1.0)
        optimiser.step()
        steps.append(
            {
                "loss": loss.item(),
                "gradient_norm": norm.item(),
                "tokens": int(learned.sum()),
                "right": drawn.right(questions).double().mean().item(),
                "log_target": (drawn.log_target.sum() / drawn.drawn.sum()).item(),
                "distinct_trigrams": rollouts.distinct(drawn.tokens, drawn.drawn),
                "rollout_s": rolled_s,
                "step_s": time.perf_counter() - begun,
            }
        )
    return rollouts.rounded({"way": way, "seed": seed, "curve": curve, "steps": steps})


# --- What rollouts cost --------------------------------------------------------------------------


def costs(config: Distillation, device: str, *, rows: int, single: int) -> dict[str, Any]:
    """Tokens and forwards of rollouts, by how they are drawn.

    Args:
        config: The pair and its questions.
        device: Where.
        rows: Answers of a batch.
        single: Answers that are drawn one at a time.
    """
    student, teacher, ask = checkpoint(config, device, seed=0)
    items = list(islice(tasks.stream("costs", config.kinds), max(rows, single)))
    batch = ask(items[:rows])

    def small(name: str) -> tuple[int, float]:
        drawn = rollouts.draw(
            name, student, teacher, batch, max_new_tokens=config.max_new_tokens, seed=0
        )
        return int(drawn.drawn.sum()), drawn.forwards

    def package(scheme: str) -> tuple[int, float]:
        drawn = rollouts.from_q_star(
            student, teacher, batch, max_new_tokens=config.max_new_tokens, seed=0, scheme=scheme
        )
        return int(drawn.drawn.sum()), drawn.forwards

    def one_by_one(scheme: str) -> tuple[int, float]:
        tokens = calls = 0
        for i in range(single):
            one = ask(items[i : i + 1])
            drawn = generate(
                student,
                teacher,
                one.plain[0].to(device),
                one.hinted[0].to(device),
                max_new_tokens=config.max_new_tokens,
                generator=i,
                scheme=scheme,
                eos_token_id=one.end,
                cache_implementation="dynamic",
            )
            tokens += int(drawn.lengths)
            calls += drawn.trace.forwards
        return tokens, calls / tokens

    def counted(ways: Mapping[str, Callable[[], tuple[int, float]]]) -> dict[str, Any]:
        found = ((name, draw()) for name, draw in ways.items())
        return {name: {"tokens": n, "forwards_a_token": calls} for name, (n, calls) in found}

    batched = {f"{name}, small sampler": partial(small, name) for name in ("policy", "half")}
    batched |= {f"q*, {name}": partial(package, name) for name in ("plain", "alternating", "auto")}
    schemes = ("plain", "alternating", "coin", "auto")
    return {
        "rows": rows,
        "single": single,
        "batched": counted(batched),
        "one_by_one": counted({name: partial(one_by_one, name) for name in schemes}),
    }


# --- The record ----------------------------------------------------------------------------------


def record(
    config: Distillation,
    *,
    device: str = "cpu",
    processes: int = 1,
    limit_s: float | None = None,
    keep: Keep | None = None,
    progress: bool = False,
    held: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """All ways and seeds, and what rollouts cost.

    Args:
        config: What is trained, and how.
        device: Where.
        processes: How many runs at a time.
        limit_s: After so many seconds no run is begun; a way that lacks a seed is left out there.
        keep: Called with what is there after each run.
        progress: Show a bar on standard error.
        held: A record whose runs stay (`jobs.to_go_on_with`).
    """
    made: dict[str, Any] = {"config": asdict(config)}
    rows = config.prompts
    single = 4 if config.model == SMOLLM2 else max(2, rows // 8)
    made |= held_of(held, "costs", "scan", "runs")
    if "costs" not in made:
        made["costs"] = costs(config, device, rows=rows, single=single)
    return compare(
        made,
        run,
        quantity="right_chance",
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
    hint: str,
    jobs: int,
    limit: float | None,
    more: bool,
) -> None:
    """`qstar-book record distillation`."""
    chosen: dict[str, Any] = {"model": model}
    chosen |= SMOLLM2_SIZE if model == SMOLLM2 else {"kinds": family.kinds_of(model)}
    if kinds:
        chosen["kinds"] = tuple(kinds)
    named = {"seeds": seeds, "steps": steps, "prompts": prompts, "learning_rate": learning_rate}
    chosen["rates"] = tuple(rates)
    if hint:
        chosen["hint"] = hint
    config = Distillation(**chosen)
    config = config.quick() if quick else config
    chosen = asdict(config) | {name: x for name, x in named.items() if x is not None}
    config = Distillation(**chosen)
    write(record, config, out=out, device=device, processes=jobs, limit_s=limit, more=more)


SMOLLM2_SIZE = {
    "ways": ("policy", "mixture", "half", "q*"),
    "seeds": 3,
    "steps": 12,
    "prompts": 16,
    "tokens": 80,
    "learning_rate": 1e-3,
    "held_out": 36,
    "evaluations": 2,
    "max_new_tokens": 18,
    "kinds": ("copy", "json", "largest"),
    "hint": "examples",
}
"""Three quarters of an hour on two CPU cores. Of the kinds of `tasks`, two worked examples raise
the chance of a right answer above a tenth in these three; told the answer itself, the model is
hardly ever right."""
