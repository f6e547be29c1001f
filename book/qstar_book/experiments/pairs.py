"""Pairs of language models by name, and what two real parents look like, position by position.

    pair = load_pair("smollm2/lora-manual")          # a model and its fine-tune, merged
    pair = load_pair("family/1m+4m")                 # two small models of one vocabulary
    pair = load_pair("folder", "another", dtype=torch.bfloat16, device_map="auto")

    qstar-book record pairs --out data/results/pairs_cpu.json

The record holds answers to fixed questions that were drawn once from q* of each pair, token by
token, and what either parent makes of every position of them. So a later run needs one forward of
each parent and no draw: `read_answers` does it again for any of them.

The record (JSON):

    questions, max_new_tokens, seed, and how it was made
    pairs   {name: {
        about, synthetic, policy, teacher {parameters, weights_bytes, cache_bytes_a_token},
        memory_bytes   weights of both, shared ones once, in the type they were read in
        answers        [{kind, question, tokens, text, positions}]; positions {field: values}, one
                       value for each token, of the `FIELDS`}}
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from qstar.adapters import checkpoints
from qstar.decoding.diagnostics import measure
from qstar.decoding.generate import generate
from qstar.rows_torch import log_geometric_mean

from .. import shipped_model
from ..files import RefusedError, cpu_name, provenance, write_json
from ..records import accelerator, corpus, mean_with_interval
from ..records.decoding import NOISE, noised
from . import family, tasks

Ask = Callable[[str], tuple[Tensor, Tensor]]


@dataclass(frozen=True, slots=True, eq=False)
class Pair:
    """Two causal language models over one vocabulary, and how they are asked.

    Attributes:
        name: What `load_pair` was given.
        about: What the two are.
        synthetic: Whether one is the other with noise: the shape of a pair, and no meaning.
        policy: A model in eval mode.
        teacher: The other; the same object where one model reads two contexts.
        tokenizer: Of both.
        ask: What the policy and the teacher read before their answer to a question, as token ids.
        questions: The fixed questions of the record, each with its kind.
    """

    name: str
    about: str
    synthetic: bool
    policy: Any
    teacher: Any
    tokenizer: Any
    ask: Ask
    questions: Sequence[tuple[str, str]]


NAMES = (
    "smollm2/two-prompts",
    "smollm2/lora-manual",
    "smollm2/lora-arithmetic",
    "smollm2/noised-copy",
    "family/300k+4m",
    "family/1m+4m",
    "family/1m-words+1m-numbers",
    "family/1m+hint",
)
"""The pairs of the record."""


def load_pair(policy: str | Path, teacher: str | Path | None = None, **options: Any) -> Pair:
    """A pair by its one name, or two models by folder, hub id or name of a shipped model.

    Args:
        policy: A model; or, without a teacher, "smollm2/" and "two-prompts", "noised-copy" or an
            adapter of data/adapters; or "family/A+B" of two trained sizes, and "family/A+hint" for
            one that is told the answer as teacher.
        teacher: Another model, or a folder with a LoRA adapter, which is merged.
        options: What `qstar.adapters.checkpoints.load` takes: dtype, device, device_map,
            attn_implementation, quantization_config. For a pair of the family dtype and device.

    Raises:
        RefusedError: There is no pair of this name.
        ValueError: A model cannot be loaded, or the vocabularies differ.
    """
    if teacher is not None:
        return _of_two(policy, teacher, options)
    kind, _, what = str(policy).partition("/")
    if kind == "smollm2" and what:
        return _of_shipped(what, options)
    if kind == "family" and what.count("+") == 1:
        return _of_family(what, options)
    raise RefusedError(f"no pair {str(policy)!r}; there are {', '.join(NAMES)}, or give two models")


def _of_two(policy: str | Path, teacher: str | Path, options: dict[str, Any]) -> Pair:
    trained_on = checkpoints.adapter_base(teacher) or checkpoints.adapter_base(policy)
    if trained_on is not None:
        options = {"base": shipped_model.place_of(trained_on)} | options
    places = map(shipped_model.place_of, (policy, teacher))
    pair = checkpoints.load_pair(*places, **options)
    chats = pair.tokenizer.chat_template is not None

    def ask(question: str) -> tuple[Tensor, Tensor]:
        if chats:
            both = pair.tokenizer, pair.teacher_tokenizer
            ids = [checkpoints.chat_ids(tokenizer, question) for tokenizer in both]
            return ids[0], ids[1]
        read = torch.tensor(pair.tokenizer(question).input_ids)
        return read, read

    name = f"{policy} + {teacher}"
    return Pair(name, name, False, pair.policy, pair.teacher, pair.tokenizer, ask, _questions())


def _of_shipped(what: str, options: dict[str, Any]) -> Pair:
    policy, tokenizer = shipped_model.load(shipped_model.DEFAULT, **options)
    asked = corpus.read_questions(corpus.data_file("pair_questions.json"))
    systems = asked[0].system, asked[0].system
    teacher, synthetic = policy, False
    if what == "two-prompts":
        prompt = corpus.read_prompts(corpus.data_file("prompts.json"))[0]
        systems = prompt.policy_system, prompt.teacher_system
        about = f"one model under two system prompts: {systems[0]!r} and {systems[1]!r}"
    elif what == "noised-copy":
        teacher, synthetic = noised(policy, NOISE["noised copy"]), True
        about = "a model and a copy with noise in its layers, synthetic"
    else:
        try:
            folder = corpus.adapter_folder(what)
        except FileNotFoundError as error:
            raise RefusedError(
                f"no pair smollm2/{what}: it is neither two-prompts nor noised-copy nor an adapter "
                f"of data/adapters"
            ) from error
        teacher, _ = shipped_model.load(folder, **options)
        about = f"a model and its fine-tune {what}, merged: two sets of weights"

    def ask(question: str) -> tuple[Tensor, Tensor]:
        ours, its = (checkpoints.chat_ids(tokenizer, question, system=s) for s in systems)
        return ours, its

    name = f"smollm2/{what}"
    return Pair(name, about, synthetic, policy, teacher, tokenizer, ask, _questions())


def _questions() -> list[tuple[str, str]]:
    asked = corpus.read_questions(corpus.data_file("pair_questions.json"))
    return [(question.kind, question.user) for question in asked]


def _of_family(what: str, options: dict[str, Any]) -> Pair:
    one, other = what.split("+")
    policy, tokenizer = family.load(one, **options)
    items = tasks.items(None, 2 * len(tasks.KINDS))
    answers = {item.prompt: item.answer for item in items}
    hinted = other == "hint"
    teacher = policy if hinted else family.load(other, **options)[0]

    def ask(question: str) -> tuple[Tensor, Tensor]:
        item = tasks.Item("", question, answers.get(question, ""))
        told = item.answer if hinted else ""
        both = tasks.question(item), tasks.question(item, hint=told)
        return family.prompt_ids(both[0]), family.prompt_ids(both[1])

    about = f"two small models trained here from scratch, {one} and {other}"
    if hinted:
        about = f"one small model, {one}, without and with the answer as a hint"
    questions = [(item.kind, item.prompt) for item in items]
    return Pair(f"family/{what}", about, False, policy, teacher, tokenizer, ask, questions)


# --- Measuring -----------------------------------------------------------------------------------

FIELDS = (
    "alpha",
    "chernoff",
    "accept_policy",
    "accept_teacher",
    "accept_coin",
    "overlap",
    "policy_to_teacher",
    "teacher_to_policy",
    "log_ratio_range",
)
"""What is kept of a position: alpha*; C, nats; the acceptance probability of a draft by the policy,
by the teacher and by an even coin between them; 1 - TV of the parents; their divergences, nats; and
the range of the log-ratio."""


def compare(log_policy: Tensor, log_teacher: Tensor) -> dict[str, Tensor]:
    """The `FIELDS` at positions where the parents have these log-probabilities, in float64.

    Args:
        log_policy: Shape (positions, vocab).
        log_teacher: Shape (positions, vocab).
    """
    seen = measure(log_policy, log_teacher)
    rows = [torch.log_softmax(x.double(), -1) for x in (log_policy, log_teacher)]
    log_q = log_geometric_mean(rows[0], rows[1], seen.balance.alpha)
    p, t = (row.exp() for row in rows)
    found = {
        "alpha": seen.balance.alpha,
        "chernoff": seen.balance.chernoff,
        "accept_policy": seen.accept_policy,
        "accept_teacher": seen.accept_teacher,
        "accept_coin": torch.minimum(log_q.exp(), (p + t) / 2).sum(-1).clamp(max=1),
        "overlap": torch.minimum(p, t).sum(-1).clamp(max=1),
        "policy_to_teacher": seen.policy_to_teacher,
        "teacher_to_policy": seen.teacher_to_policy,
        "log_ratio_range": seen.log_ratio_range,
    }
    return {name: found[name].cpu() for name in FIELDS}


def read_answer(pair: Pair, question: str, tokens: Sequence[int]) -> dict[str, Tensor]:
    """What both parents make of an answer that is given: one forward of each, nothing drawn."""
    given = torch.tensor(tokens)
    models = pair.policy, pair.teacher
    rows = [
        checkpoints.log_distributions(model, ids.to(model.device), given.to(model.device))
        for model, ids in zip(models, pair.ask(question), strict=True)
    ]
    return compare(*rows)


def draw_answers(
    pair: Pair, *, max_new_tokens: int, seed: int, progress: bool = False
) -> list[dict[str, Any]]:
    """An answer from q* to each of the pair's questions, and what its positions look like."""
    answers = []
    for i, (kind, question) in enumerate(tqdm(pair.questions, pair.name, disable=not progress)):
        result = generate(
            pair.policy,
            pair.teacher,
            *pair.ask(question),
            max_new_tokens=max_new_tokens,
            generator=seed + i,
            scheme="plain",  # a seed's draw must not hang on what was fast that day
        )
        tokens = result.tokens[: int(result.lengths)].tolist()
        seen = read_answer(pair, question, tokens)
        answers.append(
            {
                "kind": kind,
                "question": question,
                "tokens": tokens,
                "text": pair.tokenizer.decode(tokens),
                "positions": {
                    name: [float(f"{x:.6g}") for x in values.tolist()]
                    for name, values in seen.items()
                },
            }
        )
    return answers


def sizes(model: Any) -> dict[str, int]:
    """How large a model is: weights, their bytes, and the bytes of the cache for each token."""
    config = model.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    each = model.dtype.itemsize
    return {
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "weights_bytes": sum(weight.numel() * weight.itemsize for weight in model.parameters()),
        "cache_bytes_a_token": 2 * config.num_hidden_layers * heads * width * each,
    }


# --- Reading the record --------------------------------------------------------------------------


def positions_of(found: Mapping[str, Any], field: str, kind: str | None = None) -> np.ndarray:
    """A field at every recorded position of a pair, or of its answers of one kind."""
    chosen = [a for a in found["answers"] if kind in (None, a["kind"])]
    return np.concatenate([np.array(a["positions"][field]) for a in chosen])


def mean_of(found: Mapping[str, Any], field: str) -> dict[str, float]:
    """The mean of a field over all tokens, with its 95% bootstrap interval over the answers."""
    each = [np.array(answer["positions"][field]) for answer in found["answers"]]
    sums, sizes = ([of(x) for x in each] for of in (np.sum, len))
    return mean_with_interval(np.array(sums), np.array(sizes))


def largest_gaps(pair: Pair, found: Mapping[str, Any], answers: int) -> dict[str, float]:
    """How far the first recorded answers of a pair, read again, are from what was recorded."""
    gaps = dict.fromkeys(FIELDS, 0.0)
    for answer in found["answers"][:answers]:
        seen = read_answer(pair, answer["question"], answer["tokens"])
        for name in FIELDS:
            recorded = torch.tensor(answer["positions"][name], dtype=torch.float64)
            gaps[name] = max(gaps[name], float((seen[name] - recorded).abs().max()))
    return gaps


# --- Pairs of public models, which were not run ---------------------------------------------------


@dataclass(frozen=True, slots=True)
class Public:
    """A public model, by what its configuration says.

    Attributes:
        model: Its id on the hub.
        kind: Of its architecture, as transformers calls it.
        sizes: In the order of `records.accelerator.SIZES`.
        tied: Whether the output layer is the embedding.
        source: Where these values stand.
    """

    model: str
    kind: str
    sizes: tuple[int, int, int, int, int, int]
    tied: bool
    source: str

    def config(self) -> Any:
        """The configuration as transformers takes it."""
        from transformers import AutoConfig

        given = dict(zip(accelerator.SIZES, self.sizes, strict=True))
        return AutoConfig.for_model(self.kind, **given, tie_word_embeddings=self.tied)


_LLAMA3 = "The Llama 3 Herd of Models (arXiv:2407.21783), table 3; vocab_size from config.json"
_QWEN = "Qwen2 Technical Report (arXiv:2407.10671), table 1, whose shapes Qwen2.5 keeps; vocab_size"
_QWEN += " (rows, not tokens) from config.json"
_MISTRAL = "Mistral 7B (arXiv:2310.06825), table 1"

PUBLIC: Mapping[str, Public] = {
    public.model: public
    for public in (
        Public(
            "meta-llama/Meta-Llama-3-8B",
            "llama",
            (128_256, 4096, 14_336, 32, 32, 8),
            False,
            _LLAMA3,
        ),
        Public(
            "meta-llama/Meta-Llama-3-8B-Instruct",
            "llama",
            (128_256, 4096, 14_336, 32, 32, 8),
            False,
            _LLAMA3,
        ),
        Public(
            "Qwen/Qwen2.5-7B-Instruct", "qwen2", (152_064, 3584, 18_944, 28, 28, 4), False, _QWEN
        ),
        Public(
            "Qwen/Qwen2.5-1.5B-Instruct", "qwen2", (151_936, 1536, 8960, 28, 12, 2), True, _QWEN
        ),
        Public("Qwen/Qwen2.5-Math-1.5B", "qwen2", (151_936, 1536, 8960, 28, 12, 2), True, _QWEN),
        Public("Qwen/Qwen2.5-0.5B-Instruct", "qwen2", (151_936, 896, 4864, 24, 14, 2), True, _QWEN),
        Public(
            "mistralai/Mistral-7B-v0.1",
            "mistral",
            (32_000, 4096, 14_336, 32, 32, 8),
            False,
            _MISTRAL,
        ),
        Public(
            "mistralai/Mistral-7B-Instruct-v0.1",
            "mistral",
            (32_000, 4096, 14_336, 32, 32, 8),
            False,
            _MISTRAL,
        ),
    )
}
"""Public models by id."""

NOT_RUN = (
    ("meta-llama/Meta-Llama-3-8B", "meta-llama/Meta-Llama-3-8B-Instruct"),
    ("Qwen/Qwen2.5-Math-1.5B", "Qwen/Qwen2.5-1.5B-Instruct"),
    ("Qwen/Qwen2.5-0.5B-Instruct", "Qwen/Qwen2.5-7B-Instruct"),
    ("mistralai/Mistral-7B-v0.1", "mistralai/Mistral-7B-Instruct-v0.1"),
)
"""Pairs of public models that nobody ran here: (policy, teacher)."""


def expected_sizes(public: Public) -> dict[str, int]:
    """`sizes` of a public model in bfloat16, from its configuration: no weight is read."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(public.config(), dtype=torch.bfloat16)
    return sizes(model)


def expected_of(policy: str, teacher: str, *, context: int = 4096) -> dict[str, Any]:
    """What a pair of `PUBLIC` models would take, and whether its rows could be one vocabulary.

    Equal numbers of rows are necessary and not sufficient: `load_pair` compares the tokenizers.

    Returns:
        parameters of both, memory_gb in bfloat16 with the caches of `context` tokens, rows of
        both output layers, same_rows, and the command.
    """
    both = [PUBLIC[policy], PUBLIC[teacher]]
    found = [expected_sizes(public) for public in both]
    taken = sum(x["weights_bytes"] + context * x["cache_bytes_a_token"] for x in found)
    rows = [public.sizes[0] for public in both]
    return {
        "parameters": [x["parameters"] for x in found],
        "memory_gb": taken / 1e9,
        "rows": rows,
        "same_rows": rows[0] == rows[1],
        "command": f"qstar-book record pairs --policy {policy} --teacher {teacher} "
        "--dtype bfloat16 --device-map auto --out FILE",
    }


# --- The command ---------------------------------------------------------------------------------


def command(
    *,
    out: Path,
    names: Sequence[str] | None,
    policy: str | None,
    teacher: str | None,
    dtype: str,
    device: str,
    device_map: str | None,
    attn_implementation: str | None,
    max_new_tokens: int,
    seed: int,
    threads: int,
) -> None:
    """`qstar-book record pairs`."""
    if (policy is None) != (teacher is None) or (policy and names):
        raise RefusedError("give --policy and --teacher together, or names of pairs, or neither")
    torch.set_num_threads(threads)
    options: dict[str, Any] = {"dtype": getattr(torch, dtype), "device": device}
    if policy is not None:
        given = {"device_map": device_map, "attn_implementation": attn_implementation}
        loads = {f"{policy} + {teacher}": partial(load_pair, policy, teacher, **options, **given)}
    else:
        loads = {name: partial(load_pair, name, **options) for name in names or NAMES}
    machine = {"device": device, "cpu": cpu_name(), "threads": threads, "dtype": dtype}
    made_by = provenance("torch", "transformers", **machine)
    record = {**made_by, "max_new_tokens": max_new_tokens, "seed": seed, "pairs": {}}
    for name, load in loads.items():
        pair = load()
        parents = {id(model): sizes(model) for model in (pair.policy, pair.teacher)}
        record["pairs"][name] = {
            "about": pair.about,
            "synthetic": pair.synthetic,
            "policy": sizes(pair.policy),
            "teacher": sizes(pair.teacher),
            "memory_bytes": sum(each["weights_bytes"] for each in parents.values()),
            "answers": draw_answers(
                pair, max_new_tokens=max_new_tokens, seed=seed, progress=sys.stderr.isatty()
            ),
        }
        write_json(out, record)
        print(f"{name}: done", file=sys.stderr, flush=True)
    print(out)
