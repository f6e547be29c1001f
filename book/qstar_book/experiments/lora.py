"""LoRA fine-tunes of the shipped model: pairs of real weights, trained here from text at hand.

    qstar-book train lora lora-arithmetic --out FOLDER
    qstar-book train lora lora-arithmetic --check 3   # the first steps again, against the record

Two texts need no download. The sums and differences of `tasks`, and the passages of the Python
language reference that every Python carries (`pydoc_data.topics`; PSF licence), each as the answer
to a question. Only the answer is learned. What is held out, items by `tasks.is_held_out` and one
heading in ten of the manual, is measured before, between and after.

The folder gets adapter_model.safetensors in bfloat16 and adapter_config.json, as peft reads them,
and training.json, which says how they came about:

    training    the fields of `Training`
    base        the model that was trained, and the digest of its weights
    text        where the text is from, its licence, and a digest of what was made of it
    losses      of each step, nats a token of an answer
    held_out    {step: {loss, right}}: nats a token of an answer, and the share of answers whose
                every token is the most probable one
    adapter_sha256, command, made_by
"""

import hashlib
import json
import math
import random
import sys
import time
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from qstar.adapters import checkpoints

from .. import shipped_model
from ..files import RefusedError, command_line, cpu_name, find_checkout, provenance, write_json
from ..records.corpus import adapter_folder
from . import tasks

SYSTEM = "You are a helpful assistant."
"""The system prompt of every question, as in data/prompts.json."""

MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The layers of attention and MLP that get an adapter."""

CHECKPOINTS = (0, 5, 10, 20, 40, 80, 160, 320, 640)
"""Steps after which the held-out loss is measured and, if asked for, weights are kept; the last
step always is."""

TOLERANCE = 0.02
"""Of a loss among the first steps, nats a token, between two machines."""


@dataclass(frozen=True, slots=True)
class Training:
    """How an adapter is trained.

    Attributes:
        text: A key of `TEXTS`.
        steps: Optimiser steps.
        batch: Answers a step.
        learning_rate: The highest one, after a tenth of the steps; a cosine leads to a tenth of it.
        rank: Of the adapters; they are scaled by two.
        seed: Of the adapters' first weights and of the text.
    """

    text: str
    steps: int = 100
    batch: int = 8
    learning_rate: float = 1e-3
    rank: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        if self.text not in TEXTS:
            raise ValueError(f"text must be one of {', '.join(TEXTS)}; got {self.text!r}")
        if min(self.steps, self.batch, self.rank) < 1:
            raise ValueError(f"steps, batch and rank must be at least 1; got {self}")


# --- The texts -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Example:
    """A question and the answer that is learned."""

    question: str
    answer: str


Draw = Callable[[int, int, int], Sequence[Example]]


@dataclass(frozen=True, slots=True)
class Text:
    """What an adapter learns.

    Attributes:
        about: Where it is from.
        licence: Of the text.
        draw: The examples of a step, from seed, step and how many.
        held_out: What no step holds.
    """

    about: str
    licence: str
    draw: Draw
    held_out: Callable[[], Sequence[Example]]


def _of_items(kinds: Sequence[str], count: int) -> Text:
    def draw(seed: int, step: int, batch: int) -> list[Example]:
        found = islice(tasks.stream((seed, step), kinds), batch)
        return [Example(item.prompt, item.answer) for item in found]

    def held_out() -> list[Example]:
        chosen = [item for kind in kinds for item in tasks.items(kind, count // len(kinds))]
        return [Example(item.prompt, item.answer) for item in chosen]

    said = f"generated items of the kinds {', '.join(kinds)}"
    return Text(said, "CC0-1.0", draw, held_out)


def _of_manual(count: int) -> Text:
    def draw(seed: int, step: int, batch: int) -> list[Example]:
        passages = manual(held_out=False)
        return random.Random(f"{seed} {step}").sample(passages, min(batch, len(passages)))

    def held_out() -> list[Example]:
        return random.Random(0).sample(manual(held_out=True), count)

    said = "passages of the Python language reference, pydoc_data.topics of Python "
    said += ".".join(map(str, sys.version_info[:3]))
    return Text(said, "PSF-2.0", draw, held_out)


@cache
def manual(*, held_out: bool) -> tuple[Example, ...]:
    """Passages of the Python language reference, each the answer to what it explains.

    A passage is as many paragraphs under one heading as fit into 500 characters; the lines of a
    paragraph that is no code are joined. One heading in ten, by checksum, is held out, with every
    passage that is also found under another one: topics repeat each other.
    """
    from pydoc_data import topics  # type: ignore[import-untyped]

    every = dict.fromkeys(example for text in topics.topics.values() for example in _passages(text))
    out = {example.answer for example in every if zlib.crc32(_heading(example)) % 10 == 0}
    return tuple(example for example in every if (example.answer in out) == held_out)


def _heading(example: Example) -> bytes:
    return example.question.partition(": ")[2].encode()


def _passages(text: str, longest: int = 500) -> Iterator[Example]:
    heading, passage, told = "", "", False
    for paragraph in [*text.split("\n\n"), ""]:
        lines = paragraph.strip("\n").split("\n")
        is_heading = len(lines) > 1 and len(set(lines[1])) == 1 and lines[1][0] in "*=-~^"
        if not any(line.startswith(" ") for line in lines) and not is_heading:
            lines = [" ".join(lines)]
        new = "\n".join(lines)
        if passage and (not new or is_heading or len(passage) + len(new) > longest):
            yield Example(f"{'Tell me more about' if told else 'Explain'}: {heading}", passage)
            passage, told = "", True
        if is_heading:
            heading, told = lines[0], False
        elif new and len(new) <= longest and heading:
            passage = f"{passage}\n\n{new}" if passage else new


TEXTS: Mapping[str, Text] = {
    "arithmetic": _of_items(("sum", "difference"), 32),
    "tasks": _of_items(tuple(tasks.KINDS), 32),
    "manual": _of_manual(12),
}

TRAININGS: Mapping[str, Training] = {
    "lora-arithmetic": Training("arithmetic"),
    "lora-tasks": Training("tasks"),
    "lora-manual": Training("manual", batch=2),
}
"""The adapters of data/adapters, by name, at the size that a CPU trains in some minutes."""


# --- From text to tokens -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows of text, padded on the right.

    Attributes:
        ids: Token ids. Shape (rows, longest).
        mask: 1 where there is text. Shape (rows, longest).
        targets: What each position is to say next, -100 where nothing is learned. Shape (rows,
            longest).
    """

    ids: Tensor
    mask: Tensor
    targets: Tensor


def token_ids(tokenizer: Any, example: Example) -> tuple[Tensor, Tensor]:
    """The prompt and the answer, which ends with the token that ends a turn. Shapes (length,)."""
    prompt = checkpoints.chat_ids(tokenizer, example.question, system=SYSTEM)
    answer = tokenizer(example.answer, add_special_tokens=False).input_ids
    return prompt, torch.tensor([*answer, tokenizer.eos_token_id])


def make_batch(tokenizer: Any, examples: Sequence[Example]) -> Batch:
    """Examples as rows of one tensor, their answers as targets."""
    pairs = [token_ids(tokenizer, example) for example in examples]
    rows = [torch.cat([prompt, answer[:-1]]) for prompt, answer in pairs]
    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), tokenizer.eos_token_id)
    mask, targets = torch.zeros_like(ids), torch.full_like(ids, -100)
    for at, (row, (_, answer)) in enumerate(zip(rows, pairs, strict=True)):
        ids[at, : len(row)], mask[at, : len(row)] = row, 1
        targets[at, len(row) - len(answer) : len(row)] = answer
    return Batch(ids, mask, targets)


def _learned(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """Logits where something is learned, float32, and what. Shapes (learned, vocab), (learned,)."""
    device = next(model.parameters()).device
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        hidden = model.get_decoder()(
            input_ids=batch.ids.to(device), attention_mask=batch.mask.to(device), use_cache=False
        ).last_hidden_state
        chosen = (batch.targets != -100).to(device)
        logits = model.get_output_embeddings()(hidden[chosen])
    return logits.float(), batch.targets.to(device)[chosen]


@torch.no_grad()
def measure(model: Any, tokenizer: Any, examples: Sequence[Example]) -> dict[str, float]:
    """Nats a token of the answers, and the share of them that greedy decoding gives whole."""
    losses, right = [], []
    for at in range(0, len(examples), 8):
        batch = make_batch(tokenizer, examples[at : at + 8])
        logits, targets = _learned(model, batch)
        nats = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
        losses += nats.tolist()
        lengths = (batch.targets != -100).sum(-1).tolist()
        right += [bool(row.all()) for row in (logits.argmax(-1) == targets).split(lengths)]
    return {"loss": math.fsum(losses) / len(losses), "right": sum(right) / len(right)}


# --- Training ------------------------------------------------------------------------------------


def learning_rate(training: Training, step: int) -> float:
    """Of one step: linear over a tenth of the steps, then a cosine to a tenth."""
    warm = max(1, training.steps // 10)
    if step < warm:
        return training.learning_rate * (step + 1) / warm
    way = (step - warm) / max(1, training.steps - warm)
    return training.learning_rate * (0.55 + 0.45 * math.cos(math.pi * way))


def train(
    training: Training,
    model: Any,
    tokenizer: Any,
    *,
    stop_after: int | None = None,
    on_step: Callable[[int, Any], None] | None = None,
    progress: bool = False,
) -> tuple[Any, list[float]]:
    """The model with an adapter in it, as peft has it, and the loss of each step.

    Args:
        training: What to do.
        model: The model to adapt, on its device; it is changed in place, its own weights are not.
        tokenizer: Its tokenizer, with a chat template.
        stop_after: Steps to really make, of a schedule that stays that of `training.steps`.
        on_step: Called with (steps made, adapted model) before the first step and after each.
        progress: Whether a bar shows the steps.
    """
    import peft

    draw = TEXTS[training.text].draw
    with torch.random.fork_rng(devices=[]):  # the same first weights on every device
        torch.manual_seed(training.seed)
        device = next(model.parameters()).device
        config = peft.LoraConfig(
            r=training.rank,
            lora_alpha=2 * training.rank,
            target_modules=list(MODULES),
            task_type="CAUSAL_LM",
        )
        with warnings.catch_warnings():  # peft asks transformers by an old name
            warnings.filterwarnings("ignore", ".is_gradient_checkpointing. is deprecated")
            adapted = peft.get_peft_model(model.cpu(), config).to(device)
    weights = [weight for weight in adapted.parameters() if weight.requires_grad]
    optimiser = torch.optim.AdamW(weights, betas=(0.9, 0.98), weight_decay=0.0)
    steps = min(training.steps, stop_after or training.steps)
    losses: list[Tensor] = []
    if on_step is not None:
        on_step(0, adapted)
    for step in tqdm(range(steps), training.text, unit="step", disable=not progress):
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(training, step)
        batch = make_batch(tokenizer, draw(training.seed, step, training.batch))
        loss = torch.nn.functional.cross_entropy(*_learned(model, batch))
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimiser.step()
        losses.append(loss.detach())
        if on_step is not None:
            on_step(step + 1, adapted)
    return adapted, torch.stack(losses).double().cpu().tolist()


def save_adapter(adapted: Any, folder: Path, *, base: str) -> str:
    """Write the adapter in bfloat16, as peft reads it; the digest of its weights."""
    import peft
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    weights = {
        name: weight.detach().to("cpu", torch.bfloat16).contiguous()
        for name, weight in peft.get_peft_model_state_dict(
            adapted, save_embedding_layers=False
        ).items()
    }
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = adapted.peft_config["default"]
    config.base_model_name_or_path = base
    config.inference_mode = True
    config.target_modules = list(MODULES)  # peft's set has another order in every process
    config.save_pretrained(folder)
    return shipped_model.weights_digest(weights)


# --- The command ---------------------------------------------------------------------------------


def command(
    *,
    name: str,
    out: Path | None,
    model: str | None,
    steps: int | None,
    batch: int | None,
    rank: int | None,
    seed: int | None,
    device: str,
    threads: int,
    checkpoints_in: Path | None,
    check: int,
) -> int:
    """`qstar-book train lora`; 1 if the steps that were made again went another way."""
    torch.set_num_threads(threads)
    base = model or shipped_model.DEFAULT
    if check:
        return _check(name, out, base, device, check)
    given = {"steps": steps, "batch": batch, "rank": rank, "seed": seed}
    training = _training(name, {key: value for key, value in given.items() if value is not None})
    text = TEXTS[training.text]
    lm, tokenizer = shipped_model.load(base, device=device)
    before = base_digest(lm)
    shipped = {known.weights_sha256: name for name, known in shipped_model.SHIPPED.items()}
    base = shipped.get(before, base)  # whatever folder it came from
    folder = out or find_checkout() / "data" / "adapters" / name
    held_out = text.held_out()
    measured: dict[str, dict[str, float]] = {}
    begun = time.perf_counter()

    def on_step(step: int, adapted: Any) -> None:
        if step not in CHECKPOINTS and step != training.steps:
            return
        measured[str(step)] = found = measure(lm, tokenizer, held_out)
        print(f"step {step}: {found}", file=sys.stderr, flush=True)
        if checkpoints_in is not None:
            save_adapter(adapted, checkpoints_in / f"step-{step}", base=base)

    adapted, losses = train(training, lm, tokenizer, on_step=on_step, progress=True)
    digest = save_adapter(adapted, folder, base=base)
    made = {
        "training": asdict(training),
        "base": {"model": base, "weights_sha256": before},
        "text": {"about": text.about, "licence": text.licence, "sha256": text_digest(training)},
        "losses": [round(loss, 6) for loss in losses],
        "held_out": measured,
        "adapter_sha256": digest,
        "took_s": round(time.perf_counter() - begun, 1),
        "command": command_line(),
        "made_by": provenance(
            "torch", "transformers", "peft", device=device, cpu=cpu_name(), threads=threads
        ),
    }
    write_json(folder / "training.json", made)
    print(f"{folder}: last loss {losses[-1]:.3f}; held out {measured}")
    return 0


def _training(name: str, changes: Mapping[str, Any]) -> Training:
    if name not in TRAININGS:
        raise RefusedError(f"no adapter {name!r}; there are: {', '.join(TRAININGS)}")
    return replace(TRAININGS[name], **changes)


def base_digest(model: Any) -> str:
    """`weights_digest` of a model's weights as its file holds them: tied ones once."""
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    weights = {k: v.cpu() for k, v in model.state_dict().items() if k not in tied}
    return shipped_model.weights_digest(weights)


def text_digest(training: Training, steps: int = 100) -> str:
    """SHA-256 of the questions and answers of the first steps, and of those held out."""
    text = TEXTS[training.text]
    learned = [e for step in range(steps) for e in text.draw(training.seed, step, training.batch)]
    every = [[e.question, e.answer] for e in [*learned, *text.held_out()]]
    return hashlib.sha256(json.dumps(every).encode()).hexdigest()


def read_training(folder: Path) -> tuple[Training, dict[str, Any]]:
    """How an adapter was trained, and all that its training.json says."""
    record = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    known = {field.name for field in fields(Training)}
    return Training(**{k: v for k, v in record["training"].items() if k in known}), record


def _check(name: str, folder: Path | None, base: str, device: str, steps: int) -> int:
    training, record = read_training(folder or adapter_folder(name))
    if text_digest(training) != record["text"]["sha256"]:
        raise RefusedError(
            f"{name} was trained on {record['text']['about']}, which is not the text here: there "
            f"are no losses to compare with."
        )
    gap = repeat(training, record["losses"], *shipped_model.load(base, device=device), steps=steps)
    print(f"{name}: {steps} steps again, losses within {gap:.1e} of the recorded ones")
    return int(gap > TOLERANCE)


def repeat(
    training: Training, losses: Sequence[float], model: Any, tokenizer: Any, *, steps: int
) -> float:
    """How far the losses of the first steps are from recorded ones, nats a token, at most."""
    _, again = train(training, model, tokenizer, stop_after=steps)
    return max(abs(a - b) for a, b in zip(again, losses, strict=False))
