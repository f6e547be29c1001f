"""The experiments with language models: one function each, from a configuration to a record.

    qstar-book record corpus --out data/continuations.json

draws the recorded continuations anew. A sampled text can part ways between two machines, whose
logits differ by rounding; a recorded text cannot. So what the book publishes about decoding is
measured on recorded tokens, by one forward of each parent over the whole text.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from qstar.adapters import checkpoints
from qstar.decoding.diagnostics import Comparison, concatenate, measure, to_cpu
from qstar.decoding.generate import generate

from .. import shipped_model
from ..files import write_json
from . import made_with

TEMPERATURES = (0.6, 0.3)
"""Of the sharper copies of the policy that `score` pairs it with."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """One question, and what either parent is told to be when it answers."""

    policy_system: str
    teacher_system: str
    user: str


@dataclass(frozen=True, slots=True)
class Continuation:
    """An answer drawn from q*: its token ids, the one that ends it included, and its text."""

    prompt: Prompt
    tokens: tuple[int, ...]
    text: str


@dataclass(frozen=True, slots=True)
class Corpus:
    """Answers drawn from q* of one model under pairs of prompts, and how they were drawn.

    Attributes:
        model: What `shipped_model.load` was given.
        seed: The first answer's; the others count up from it.
        max_new_tokens: The longest an answer could get.
        made_by: The command, the versions and the processor.
        continuations: The answers.
    """

    model: str
    seed: int
    max_new_tokens: int
    made_by: Mapping[str, str]
    continuations: tuple[Continuation, ...]


def draw(
    name: str,
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int = 48,
    seed: int = 0,
    progress: bool = False,
) -> Corpus:
    """Answer every prompt from q* of one model under the prompt's two system prompts.

    Args:
        name: What `shipped_model.load` was given, for the record.
        model: A causal language model.
        tokenizer: Its tokenizer, with a chat template.
        prompts: The questions.
        max_new_tokens: The longest an answer may get.
        seed: Of the first answer; the next one has the next seed.
        progress: Show a bar on standard error.
    """
    answers = []
    total = len(prompts) * max_new_tokens
    with tqdm(total=total, desc="drawing from q*", unit="token", disable=not progress) as bar:
        for i, prompt in enumerate(prompts):
            result = generate(
                model,
                model,
                checkpoints.chat_ids(tokenizer, prompt.user, system=prompt.policy_system),
                checkpoints.chat_ids(tokenizer, prompt.user, system=prompt.teacher_system),
                max_new_tokens=max_new_tokens,
                scheme="plain",  # a seed's draw must not hang on what was fast that day
                generator=seed + i,
                on_tokens=lambda block: bar.update(block.shape[-1]),
            )
            tokens = result.tokens[: int(result.lengths)].tolist()
            answers.append(Continuation(prompt, tuple(tokens), tokenizer.decode(tokens)))
    return Corpus(name, seed, max_new_tokens, made_with(model), tuple(answers))


def score(
    model: Any, tokenizer: Any, corpus: Corpus, *, progress: bool = False
) -> dict[str, Comparison]:
    """What four kinds of parents make of the recorded answers, at all their positions.

    Nothing is sampled: the answers are read, each in one forward a parent. In every pair the
    policy is the model under the answer's own policy prompt. The teacher is

    - "two system prompts": the model under the teacher's prompt (the pair that was decoded),
    - "two questions": the policy's system prompt, but another question of the corpus,
    - "temperatures 1 and T": the policy itself, its logits divided by T in `TEMPERATURES`.

    Returns:
        The traces by kind, the answers one after another, on the CPU.
    """
    kinds: dict[str, list[Comparison]] = {}
    answers = tqdm(corpus.continuations, "scoring", unit="answer", disable=not progress)
    for i, _ in enumerate(answers):
        for kind, pair in read_pairs(model, tokenizer, corpus, i).items():
            kinds.setdefault(kind, []).append(measure(*pair))
    return {kind: to_cpu(concatenate(traces)) for kind, traces in kinds.items()}


def read_pairs(
    model: Any, tokenizer: Any, corpus: Corpus, index: int
) -> dict[str, tuple[Tensor, Tensor]]:
    """(log policy, log teacher) at every position of one recorded answer, by kind of pair.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer, with a chat template.
        corpus: The recorded answers.
        index: Which of them.

    Returns:
        The four kinds that `score` describes, in its order. Shape (positions, vocab).
    """
    answer = corpus.continuations[index]
    prompt, tokens = answer.prompt, torch.tensor(answer.tokens)
    other = next(
        c.prompt.user
        for c in (*corpus.continuations[index:], *corpus.continuations[:index])
        if c.prompt.user != prompt.user
    )
    policy, teacher, elsewhere = (
        checkpoints.log_distributions(
            model, checkpoints.chat_ids(tokenizer, user, system=system), tokens
        )
        for user, system in (
            (prompt.user, prompt.policy_system),
            (prompt.user, prompt.teacher_system),
            (other, prompt.policy_system),
        )
    )
    pairs = {"two system prompts": (policy, teacher), "two questions": (policy, elsewhere)}
    for t in TEMPERATURES:
        pairs[f"temperatures 1 and {t:g}"] = policy, torch.log_softmax(policy / t, dim=-1)
    return pairs


# --- The record ----------------------------------------------------------------------------------


def data_file(name: str) -> Path:
    """A recorded file: of the checkout that the package lies in, or as it was installed with it."""
    package = Path(__file__).parents[1]
    places = [package.parents[1] / "data", package / "data"]
    for place in places:
        if (place / name).is_file():
            return place / name
    raise FileNotFoundError(
        f"no record {name} in {places[0]} (a checkout) nor in {places[1]} (an installed package): "
        f"data/README.md of the project lists the records; a path to a file of your own needs no "
        f"data_file."
    )


def read_prompts(path: Path) -> list[Prompt]:
    """The prompts of a JSON file."""
    return [Prompt(**entry) for entry in json.loads(path.read_text(encoding="utf-8"))["prompts"]]


@dataclass(frozen=True, slots=True)
class Question:
    """What every pair is asked, under one system prompt, and of which kind that is."""

    kind: str
    system: str
    user: str


def read_questions(path: Path) -> list[Question]:
    """The questions of data/pair_questions.json."""
    record = json.loads(path.read_text(encoding="utf-8"))
    return [Question(system=record["system"], **entry) for entry in record["questions"]]


def adapter_folder(name: str) -> Path:
    """Where the LoRA adapter of this name stands in data/.

    Raises:
        FileNotFoundError: There is none.
    """
    return data_file(f"adapters/{name}/adapter_config.json").parent


def read_corpus(path: Path) -> Corpus:
    """A corpus that `write_corpus` wrote."""
    record = json.loads(path.read_text(encoding="utf-8"))
    answers = tuple(
        Continuation(Prompt(**entry["prompt"]), tuple(entry["tokens"]), entry["text"])
        for entry in record.pop("continuations")
    )
    return Corpus(continuations=answers, **record)


def write_corpus(corpus: Corpus, path: Path) -> None:
    """Write a corpus as JSON, complete or not at all."""
    write_json(path, asdict(corpus))


def command(*, out: Path, model: str | None, seed: int, max_new_tokens: int) -> None:
    """`qstar-book record corpus`."""
    name = model or shipped_model.DEFAULT
    prompts = read_prompts(data_file("prompts.json"))
    pair = shipped_model.load(name)
    drawn = draw(name, *pair, prompts, max_new_tokens=max_new_tokens, seed=seed, progress=True)
    write_corpus(drawn, out)
    print(out)
