"""Answers of one checkpoint under two contexts: drawn, read again, and compared with right ones.

The policy reads a question; the teacher reads the same question after a hint, which holds the
answer or shows how such questions are answered. Both write the same answer, so that each position
has two distributions over one vocabulary. A rollout is an answer that was drawn; what it was drawn
from is known of every token, which is what importance weights need.

    questions = of_characters(tasks.items(None, 64))
    drawn = sample([(policy, questions.plain), (teacher, questions.hinted)], TARGETS["half"], ...)
    drawn = from_q_star(policy, teacher, questions, ...)     # by `qstar.generate`
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from scipy.stats import t as student_t
from torch import Tensor

from qstar.decoding.generate import generate
from qstar.decoding.traits import cache_name, core_of

from . import family, tasks

Context = Sequence[Tensor]
"""A prompt for each row: token ids in one dimension."""


@dataclass(frozen=True, slots=True, eq=False)
class Questions:
    """Questions as a model reads them, without a hint and with one, and their right answers.

    Attributes:
        items: What is asked.
        plain: The policy's prompts.
        hinted: The teacher's prompts, with the hint.
        answers: The right answers' token ids, the token that ends a text last.
        end: The token that ends a text.
    """

    items: tuple[tasks.Item, ...]
    plain: tuple[Tensor, ...]
    hinted: tuple[Tensor, ...]
    answers: tuple[Tensor, ...]
    end: int

    def __len__(self) -> int:
        return len(self.items)


def of_characters(items: Sequence[tasks.Item]) -> Questions:
    """Questions for models of the family."""
    return Questions(
        tuple(items),
        tuple(family.prompt_ids(tasks.question(item)) for item in items),
        tuple(family.prompt_ids(tasks.question(item, hint=item.answer)) for item in items),
        tuple(torch.cat([family.prompt_ids(f" {x.answer}")[1:], torch.tensor([1])]) for x in items),
        1,
    )


HINTS = ("answer", "examples")
"""What a chat model's teacher reads besides the question: the answer, or worked examples."""

SHOWN = 2
"""Worked examples before a question, all of its kind."""


def of_chat(tokenizer: Any, *, hint: str = "answer") -> Callable[[Sequence[tasks.Item]], Questions]:
    """What makes questions for a chat model.

    Args:
        tokenizer: With a chat template.
        hint: Of `HINTS`. The answer is a part of the teacher's system prompt; the examples are
            turns before the question: other questions of its kind, none of them held out, each
            answered rightly.

    Raises:
        ValueError: The hint is unknown.
    """
    from qstar.adapters import checkpoints

    if hint not in HINTS:
        raise ValueError(f"hint must be among {', '.join(HINTS)}; got {hint!r}")
    system = "Answer in one line, with the result alone."
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")

    def plain(item: tasks.Item) -> Tensor:
        return checkpoints.chat_ids(tokenizer, item.prompt, system=system)

    def hinted(item: tasks.Item) -> Tensor:
        if hint == "answer":
            told = f"{system} The right answer is: {item.answer}"
            return checkpoints.chat_ids(tokenizer, item.prompt, system=told)
        messages = [
            {"role": role, "content": content}
            for shown in examples_of(item)
            for role, content in (("user", shown.prompt), ("assistant", shown.answer))
        ]
        messages.append({"role": "user", "content": item.prompt})
        return checkpoints.chat_ids(tokenizer, messages, system=system)

    def questions(items: Sequence[tasks.Item]) -> Questions:
        answers = [
            torch.tensor([*tokenizer(x.answer, add_special_tokens=False).input_ids, end])
            for x in items
        ]
        return Questions(
            tuple(items),
            tuple(map(plain, items)),
            tuple(map(hinted, items)),
            tuple(answers),
            end,
        )

    return questions


def examples_of(item: tasks.Item) -> list[tasks.Item]:
    """The worked examples before a question: the same ones whenever it is asked."""
    found = tasks.stream(("examples", item.prompt), [item.kind])
    return list(islice((other for other in found if other.prompt != item.prompt), SHOWN))


# --- Reading -------------------------------------------------------------------------------------


def _left_padded(rows: Context, device: Any) -> tuple[Tensor, Tensor]:
    """Token ids and whether they are real. Shapes: (rows, longest), twice."""
    longest = max(map(len, rows))
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros(len(rows), longest, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, longest - len(row) :] = row
        mask[i, longest - len(row) :] = 1
    return ids.to(device), mask.to(device)


def padded(rows: Context, *, value: int) -> Tensor:
    """Rows of different lengths as one block, filled up behind. Shape (rows, longest)."""
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=value)


def log_distributions(model: Any, prompts: Context, tokens: Tensor) -> Tensor:
    """The distribution of each token of a text, given the prompt and the tokens before it.

    Args:
        model: A causal language model of transformers; gradients flow if they are wanted.
        prompts: One for each row.
        tokens: What follows them. Shape (rows, new).

    Returns:
        Log-probabilities in float32. Shape (rows, new, vocab).
    """
    device = next(model.parameters()).device
    ids, mask = _left_padded(prompts, device)
    ids = torch.cat([ids, tokens.to(device)], 1)
    mask = torch.cat([mask, torch.ones_like(tokens, device=device)], 1)
    new = tokens.shape[1]
    logits = model(
        ids,
        attention_mask=mask,
        position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
        use_cache=False,
        logits_to_keep=new + 1,
    ).logits[:, :-1]
    return logits.float().log_softmax(-1)


class _Reader:
    """A model that reads one token of each row at a time, and keeps its cache."""

    def __init__(self, model: Any, prompts: Context) -> None:
        from transformers import DynamicCache

        self._model, self._cache = model, DynamicCache(config=model.config)
        self._cache_name = str(cache_name(core_of(model, "model")))
        self._next, self._mask = _left_padded(prompts, next(model.parameters()).device)
        self._at = (self._mask.cumsum(-1) - 1).clamp(min=0)

    def log_p(self) -> Tensor:
        """The distribution of the next token. Shape (rows, vocab)."""
        logits = self._model(
            self._next,
            attention_mask=self._mask,
            position_ids=self._at,
            logits_to_keep=1,
            **{self._cache_name: self._cache},
        ).logits[:, -1]
        return logits.float().log_softmax(-1)  # type: ignore[no-any-return]

    def extend(self, tokens: Tensor) -> None:
        self._next, self._at = tokens[:, None], self._at[:, -1:] + 1
        self._mask = torch.cat([self._mask, torch.ones_like(self._next)], 1)


# --- Drawing -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class Rollouts:
    """Answers that were drawn, on the device of the models.

    Attributes:
        tokens: A row that has ended is filled up with the token that ended it. Shape (rows, new).
        drawn: Whether a token was drawn there. Shape (rows, new).
        log_target: The log-probability of each token in what it was drawn from; 0 where none was.
            Shape (rows, new).
        forwards: Forwards of a parent over one row, for each drawn token; nan if not counted.
    """

    tokens: Tensor
    drawn: Tensor
    log_target: Tensor
    forwards: float = math.nan

    def right(self, questions: Questions) -> Tensor:
        """Whether each answer is the right one, and ends there. Shape (rows,)."""
        told = padded(questions.answers, value=questions.end).to(self.tokens.device)
        lengths = torch.tensor([len(x) for x in questions.answers], device=told.device)
        width = min(told.shape[1], self.tokens.shape[1])
        place = torch.arange(width, device=told.device)
        same = (told[:, :width] == self.tokens[:, :width]) | (place >= lengths[:, None])
        return same.all(-1) & (self.drawn.sum(-1) == lengths)


Target = Callable[[Sequence[Tensor]], Tensor]
TARGETS: dict[str, tuple[tuple[str, ...], Target]] = {
    "policy": (("policy",), lambda logs: logs[0]),
    "teacher": (("teacher",), lambda logs: logs[0]),
    "mixture": (
        ("policy", "teacher"),
        lambda logs: torch.logaddexp(logs[0], logs[1]) - math.log(2),
    ),
    "half": (("policy", "teacher"), lambda logs: ((logs[0] + logs[1]) / 2).log_softmax(-1)),
}
"""By name: whose distributions are read, and what is drawn from, of their logarithms."""


@torch.no_grad()
def sample(
    readers: Sequence[tuple[Any, Context]],
    target: Target,
    *,
    end: int,
    max_new_tokens: int,
    generator: torch.Generator,
) -> Rollouts:
    """Answers to a batch of prompts, all rows at once.

    The uniform numbers are the generator's, which is the CPU's: one seed gives one draw on every
    device, rounding apart.

    Args:
        readers: Models, each with its prompts.
        target: From their log-probabilities (rows, vocab) those of the next token.
        end: The token that ends a row.
        max_new_tokens: The most tokens of a row.
        generator: On the CPU.
    """
    parents = [_Reader(model, prompts) for model, prompts in readers]
    device = next(readers[0][0].parameters()).device
    rows = len(readers[0][1])
    chance = torch.rand(max_new_tokens, rows, 1, generator=generator, dtype=torch.float64)
    chance = chance.to(device)
    alive = torch.ones(rows, dtype=torch.bool, device=device)
    tokens, drawn, logs = [], [], []
    for step in range(max_new_tokens):
        log_target = target([parent.log_p() for parent in parents])
        steps = log_target.double().exp().cumsum(-1)
        token = (steps <= chance[step] * steps[:, -1:]).sum(-1).clamp(max=steps.shape[-1] - 1)
        token = torch.where(alive, token, end)
        said = log_target.gather(-1, token[:, None]).squeeze(-1)
        tokens.append(token)
        drawn.append(alive)
        logs.append(torch.where(alive, said, 0.0))
        alive = alive & (token != end)
        if not bool(alive.any()):
            break
        for parent in parents:
            parent.extend(token)
    return Rollouts(
        torch.stack(tokens, 1), torch.stack(drawn, 1), torch.stack(logs, 1), len(parents)
    )


def from_q_star(
    policy: Any,
    teacher: Any,
    questions: Questions,
    *,
    max_new_tokens: int,
    seed: int,
    scheme: str = "plain",
    alpha: float | None = None,
) -> Rollouts:
    """The same from q*, exactly, by the package's decoder."""
    device = next(policy.parameters()).device
    result = generate(
        policy,
        teacher,
        [row.to(device) for row in questions.plain],
        [row.to(device) for row in questions.hinted],
        max_new_tokens=max_new_tokens,
        generator=seed,
        scheme=scheme,
        alpha=alpha,
        eos_token_id=questions.end,
        cache_implementation="dynamic",
        one_call=False if policy is teacher and scheme != "plain" else None,
    )
    longest = int(result.lengths.max())
    place = torch.arange(longest, device=result.tokens.device)
    drawn = place < result.lengths[:, None]
    log_target = torch.where(drawn, result.trace.log_target[:, :longest].float(), 0.0)
    forwards = 1 / result.trace.tokens_per_forward
    return Rollouts(result.tokens[:, :longest], drawn, log_target.to(drawn.device), forwards)


def draw(
    name: str,
    policy: Any,
    teacher: Any,
    questions: Questions,
    *,
    max_new_tokens: int,
    seed: int,
) -> Rollouts:
    """Rollouts by name: "q*" by the package, the keys of `TARGETS` by `sample`."""
    if name == "q*":
        return from_q_star(policy, teacher, questions, max_new_tokens=max_new_tokens, seed=seed)
    whose, target = TARGETS[name]
    sides = {"policy": (policy, questions.plain), "teacher": (teacher, questions.hinted)}
    return sample(
        [sides[one] for one in whose],
        target,
        end=questions.end,
        max_new_tokens=max_new_tokens,
        generator=torch.Generator().manual_seed(seed),
    )


# --- What is measured of them --------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class Told:
    """The right answers as a model reads them: exact, without a draw.

    Attributes:
        log_p: The distribution at each position. Shape (rows, longest, vocab).
        real: Which positions belong to an answer. Shape (rows, longest).
        log_right: The log-probability of each right token, 0 beyond. Shape (rows, longest).
        greedy: Whether the most probable tokens are the right answer. Shape (rows,).
    """

    log_p: Tensor
    real: Tensor
    log_right: Tensor
    greedy: Tensor

    @property
    def chance(self) -> Tensor:
        """The probability that a drawn answer is the right one. Shape (rows,)."""
        return self.log_right.double().sum(-1).exp()


@torch.no_grad()
def told(model: Any, prompts: Context, questions: Questions) -> Told:
    """What a model makes of the right answers after these prompts."""
    device = next(model.parameters()).device
    tokens = padded(questions.answers, value=questions.end).to(device)
    lengths = torch.tensor([len(x) for x in questions.answers], device=device)
    real = torch.arange(tokens.shape[1], device=device) < lengths[:, None]
    log_p = log_distributions(model, prompts, tokens)
    said = log_p.gather(-1, tokens[..., None]).squeeze(-1)
    greedy = ((log_p.argmax(-1) == tokens) | ~real).all(-1)
    return Told(log_p, real, torch.where(real, said, 0.0), greedy)


def reverse_kl(log_policy: Tensor, log_teacher: Tensor) -> Tensor:
    """KL(policy || teacher) over the last axis, in nats; gradients reach the policy."""
    return (log_policy.exp() * (log_policy - log_teacher)).sum(-1)


def distinct(tokens: Tensor, drawn: Tensor, n: int = 3) -> float:
    """The share of different ones among all n-grams of a batch of answers."""
    found = [
        tuple(row[i : i + n])
        for row, real in zip(tokens.tolist(), drawn.sum(-1).tolist(), strict=True)
        for i in range(real - n + 1)
    ]
    return len(set(found)) / max(1, len(found))


def rounded(found: Any) -> Any:
    """The same with seven digits of every float, which is as many as float32 has."""
    if isinstance(found, float):
        return float(f"{found:.7g}")
    if isinstance(found, dict):
        return {name: rounded(x) for name, x in found.items()}
    return [rounded(x) for x in found] if isinstance(found, list) else found


def curves(record: Mapping[str, Any], quantity: str) -> dict[str, np.ndarray]:
    """A quantity of a record's learning curves, by way, of the seeds that every way has.

    Shape (seeds, evaluations), by way.
    """
    ways = record["config"]["ways"]
    made = {(run["way"], run["seed"]): run for run in record["runs"]}
    seeds = [
        seed
        for seed in range(record["config"]["seeds"])
        if all((way, seed) in made for way in ways)
    ]
    return {
        way: np.array([[x[quantity] for x in made[way, seed]["curve"]] for seed in seeds])
        for way in ways
    }


LEVEL = 0.95
"""Of the intervals over seeds."""


def over_seeds(values: Any) -> dict[str, Any]:
    """Mean and interval (Student's t, at `LEVEL`) over the first axis, of independent seeds."""
    x = np.asarray(values, dtype=float)
    mean, n = x.mean(0), len(x)
    half = (
        student_t.ppf((1 + LEVEL) / 2, n - 1) * x.std(0, ddof=1) / math.sqrt(n)
        if n > 1
        else 0 * mean
    )
    return {"mean": mean.tolist(), "low": (mean - half).tolist(), "high": (mean + half).tolist()}
